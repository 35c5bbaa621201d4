"""The finished cells of a comparison of activation functions, as a small table to keep beside the code.

python -m analysis.activations_table --ledger=runs/activations/ledger --out=analysis/data/smollm2_activations.csv
Whoever wants to train a row again finds its cell by the id, and compares the digest of its parameters.
"""

import argparse

import pandas as pd

from analysis import read_ledger
from analysis.measured import SE, UNITS
from sae_jax import files
from sae_jax.errors import one_line_errors

COLUMNS = [
  'id',
  'git_commit',
  'params_digest',
  'activation',
  'n_latents',
  'k',
  'l0',
  'nmse',
  'seed',
  'dead_fraction',
  'tokens',
  'wall_s',
]


def rows(table: pd.DataFrame) -> pd.DataFrame:
  """These columns of a ledger's table and what was measured beyond them, a row a cell.

  They are ordered by what was asked for, so that a ledger that grew changes few lines.
  """
  measured = [name for column in table.attrs.get(UNITS, ()) for name in (column, column + SE)]
  whole = dict.fromkeys(('n_latents', 'k', 'tokens', 'seed'), 'Int64')  # a coefficient stands in for k
  return table[[*COLUMNS, *measured]].astype(whole).sort_values(['activation', *whole])


@one_line_errors
def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog='python -m analysis.activations_table', description=__doc__.split('\n')[0])
  parser.add_argument('--ledger', required=True, help='folder that a sweep wrote')
  parser.add_argument('--out', required=True, help='CSV file, replaced')
  args = parser.parse_args(argv)
  found = rows(read_ledger.load_ledger(args.ledger))
  files.write_output(args.out, found.to_csv(index=False).encode(), '--out')
  print(f'{len(found)} cells in {args.out}')
  return 0


if __name__ == '__main__':
  main()
