"""Copies the metrics of every cell to Weights & Biases, one run a cell; run again, it adds what is new.

python -m sweeps.wandb --ledger=DIR --project=NAME [--mode=offline]

An optional extra (pip install 'sae_jax[wandb]'): training knows nothing of it, and the ledger stays the truth.
"""

from sae_jax import metrics
from sae_jax.errors import UserError, one_line_errors
from sweeps import flags, grid, ledger


def export(store: ledger.Ledger, project: str, mode: str | None = None) -> int:
  """Sends the lines that a run does not have yet; returns the number of runs.

  Args:
    mode: 'online', 'offline', or None for the service's own setting.

  Raises:
    UserError: the package is missing.
  """
  try:
    import wandb  # pyrefly: ignore[missing-import]  an extra
  except ImportError:
    raise UserError("Weights & Biases is not installed; pip install 'sae_jax[wandb]'") from None
  count = 0
  for entry in store.entries():
    lines = metrics.read_metrics(store.folder(entry.id), entry.id)
    if not lines:
      continue
    run = wandb.init(
      project=project,
      id=entry.id,
      name=grid.label(entry.overrides) or entry.id,
      config=entry.cell.flat(),
      resume='allow',
      mode=mode,
    )
    for line in lines:
      if line['step'] >= run.step:  # steps only grow there; what an earlier export sent is passed over
        run.log({key: value for key, value in line.items() if key != 'step'}, step=line['step'])
    run.finish()
    count += 1
  return count


@one_line_errors
def main(argv: list[str]) -> int:
  parser = flags.parser('wandb', 'Copy the metrics of every cell to Weights & Biases.')
  parser.add_argument('--project', required=True, help='of Weights & Biases; the account is that of `wandb login`')
  parser.add_argument('--mode', choices=('online', 'offline'), help='offline writes ./wandb for `wandb sync`')
  args = parser.parse_args(argv)
  count = export(args.ledger, args.project, args.mode)
  print(f'{count} runs in project {args.project}' if count else f'no cell of {args.ledger.path} has metrics yet')
  return 0


if __name__ == '__main__':
  main()
