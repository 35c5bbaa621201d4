"""How the cost of our training step grows with n, k, batch and devices, with fitted exponents.

python -m bench.scaling [--json=OUT]
Devices are virtual ones that share this machine's cores: they show what a mesh costs, not what it gains.
"""

from typing import Any

import pandas as pd

from analysis import fit
from bench import command
from bench.alternate import Worker, alternate, machine, median, started
from sae_jax import flags, flops
from sae_jax.errors import one_line_errors

_AXES = ('d', 'n', 'B', 'k')
BASE = {'d': 512, 'n': 8192, 'B': 1024, 'k': 32}
SIZES = {
  'n': [2**i for i in range(11, 18)],
  'k': [8, 16, 32, 64, 128],
  'B': [256, 512, 1024, 2048, 4096],
}
MESHES = ((1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (2, 2))


def along(axis: str, sizes: list[int], base: dict[str, int], rounds: int) -> dict[str, Any]:
  """Step seconds along one axis, all sizes in turn, and the exponent p of seconds = c size^p over all and over the
  larger half of them, where what does not grow weighs less; beside it the exponent of the useful FLOPs.
  """
  shapes = {size: tuple((base | {axis: size})[name] for name in _AXES) for size in sizes}
  workers = {str(size): Worker('bench.step_ours', [command.shape_flag(shape)]) for size, shape in shapes.items()}
  with started(workers):
    seconds, load = alternate(workers, rounds, label=axis)
  table = pd.DataFrame(
    {
      'size': sizes,
      'seconds': [median(seconds[str(size)]) for size in sizes],
      'flops_useful': [_useful(*shape) for shape in shapes.values()],
    }
  )
  larger = table.iloc[len(table) // 2 - 1 :]
  return {
    'axis': axis,
    'base': base,
    'sizes': sizes,
    'step_s': table['seconds'].tolist(),
    'exponent': _exponent(table, 'seconds'),
    'exponent_larger_half': _exponent(larger, 'seconds') if len(larger) >= 3 else None,
    'exponent_flops_useful': _exponent(table, 'flops_useful'),
    'load_of_others': load,
    'seconds': seconds,
    'machine': machine(),
  }


def meshes(which: list[tuple[int, int]], base: dict[str, int], rounds: int) -> dict[str, Any]:
  """Step seconds of one shape on meshes of virtual devices, and as multiples of one device."""
  shape = tuple(base[name] for name in _AXES)
  workers = {
    f'{data} x {latent}': Worker('bench.step_ours', [command.shape_flag(shape), f'--mesh={data},{latent}'])
    for data, latent in which
  }
  with started(workers):
    seconds, load = alternate(workers, rounds, label='mesh')
  step_s = {name: median(times) for name, times in seconds.items()}
  first = next(iter(step_s.values()))
  return {
    'axis': 'mesh',
    'base': base,
    'step_s': step_s,
    'times_one_device': {n: s / first for n, s in step_s.items()},
    'load_of_others': load,
    'seconds': seconds,
    'machine': machine(),
  }


def lines(rows: list[dict[str, Any]]) -> str:
  """Markdown: a row an axis."""
  out = [
    '| cost of a step | range | exponent (90 % interval) | larger half | of useful FLOPs |',
    '|---|---|---|---|---|',
  ]
  for row in rows:
    if row['axis'] == 'mesh':
      continue
    p, larger = row['exponent'], row['exponent_larger_half']
    out.append(
      f'| in {row["axis"]} | {row["sizes"][0]:,} to {row["sizes"][-1]:,} | {p["estimate"]:.2f} '
      f'({p["low"]:.2f} to {p["high"]:.2f}) | {"" if larger is None else format(larger["estimate"], ".2f")} | '
      f'{row["exponent_flops_useful"]["estimate"]:.2f} |'
    )
  for row in rows:
    if row['axis'] == 'mesh':
      each = ', '.join(f'{name}: {times:.2f}' for name, times in row['times_one_device'].items())
      out += ['', f'Step on data x latent virtual devices, as a multiple of one device: {each}.']
  return '\n'.join(out)


def _exponent(table: pd.DataFrame, y: str) -> dict[str, float]:
  return fit.fit_law(table, law='growth', x=['size'], y=y, bootstrap=200).params['p']


def _useful(d: int, n: int, batch: int, k: int) -> float:
  return flops.step_flops(n, k, d, batch)['useful']


@one_line_errors
def main(argv: list[str]) -> int:
  parser = command.parser('scaling', __doc__)
  parser.add_argument('--axis', choices=(*SIZES, 'mesh'), action='append', help='only this one; may repeat')
  command.add_rounds(parser)
  parser.add_argument(
    '--shrink',
    type=flags.whole('--shrink'),
    default=1,
    help='divide n and batch by this, for a quick try',
  )
  args = parser.parse_args(argv)
  rows = measure(args.axis or [*SIZES, 'mesh'], args.rounds, args.shrink)
  return command.report(rows, lines(rows), args.json)


def measure(axes: list[str], rounds: int, shrink: int = 1) -> list[dict[str, Any]]:
  """A row an axis; `shrink` divides n and batch."""
  base = BASE | {name: BASE[name] // shrink for name in ('n', 'B')}
  rows = []
  for axis in axes:
    if axis == 'mesh':
      rows.append(meshes(list(MESHES), base, rounds))
    else:
      sizes = [max(base['k'], size // shrink) for size in SIZES[axis]] if axis in ('n', 'B') else SIZES[axis]
      rows.append(along(axis, sizes, base, rounds))
  return rows


if __name__ == '__main__':
  main()
