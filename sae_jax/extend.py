"""Where a cell with a larger budget may go on from the last state of one with a smaller budget.

It may where no horizon depends on the budget (`Cell.one_curve`): then the longer run would have passed through that very
state, bit for bit, and what is left out is only the time.
"""

from sae_jax import files, schema
from sae_jax.cell import Cell, from_json
from sae_jax.errors import UserError
from sae_jax.startup import SAMPLE_TOKENS


def shorter(config: Cell, workdir: str) -> tuple[str, str]:
  """Folder and id of the finished cell that `train.extends` names. Raises `UserError` when this one is not its extension.

  The name is that of a folder beside this cell's own, as all cells of a ledger have, or a path.
  """
  named = config.train.extends
  folder = named if '/' in named else files.join(workdir.rstrip('/').rpartition('/')[0] or '.', named)
  what = f'train.extends={named!r}'
  try:
    found = from_json(files.read(files.join(folder, schema.CONFIG)))
  except (OSError, schema.Broken) as error:
    raise UserError(f'{what}: {folder} holds no cell ({error}); name the folder of a finished cell') from None
  if not files.exists(files.join(folder, schema.RESULT)):
    raise UserError(f'{what} is not finished; train it first')
  mine, other = config.identity(), found.identity()
  differ = sorted(
    key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key) and key != 'train.tokens'
  )
  if differ:
    raise UserError(f'{what} differs in {", ".join(differ)}; only train.tokens may be larger')
  if found.train.tokens >= config.train.tokens:
    raise UserError(
      f'{what} has train.tokens={found.train.tokens}, no fewer than the {config.train.tokens} here; raise train.tokens'
    )
  if not config.one_curve:
    raise UserError(
      f"{what}: its averages and thresholds follow the budget, so a longer run is another; set recipe.horizon='so far'"
    )
  if found.train.tokens < SAMPLE_TOKENS:
    raise UserError(
      f'{what} has train.tokens={found.train.tokens}, and a longer run starts from a sample of {SAMPLE_TOKENS}; train anew'
    )
  return folder, found.id
