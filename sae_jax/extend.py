"""Where a cell with a larger budget may go on from the last state of one with a smaller budget.

It may where no horizon depends on the budget (`Cell.one_curve`) and the smaller one has the whole start-up sample: then
the longer run would have passed through that very state, bit for bit, and what is left out is only the time.

Never loads jax, for a launch asks too.
"""

from sae_jax import files, schema
from sae_jax.cell import SAMPLE_TOKENS, Cell, from_json
from sae_jax.errors import UserError

NO_CHECKPOINT = 'the shorter cell has no checkpoint left (sweeps.gc removes them)'


def obstacle(one: Cell) -> str:
  """Why no longer run passes through the last state of this cell; empty where one does."""
  if not one.one_curve:
    return "averages and thresholds follow the budget, so a longer run is another (not so with recipe.horizon='so far')"
  if one.train.tokens < SAMPLE_TOKENS:
    return f'the shorter cell has fewer than {SAMPLE_TOKENS} tokens, and a longer run starts from a sample of so many'
  return ''


def has_checkpoint(folder: str) -> bool:
  """Whether a checkpoint lies in the folder of a cell. That it is undamaged only loading it can tell."""
  checkpoints = files.join(folder, schema.CHECKPOINTS)
  return any(files.listdir(files.join(checkpoints, name)) for name in files.listdir(checkpoints) if name.isdecimal())


def why_anew(finished: Cell, folder: str) -> str:
  """Why a cell with a larger budget cannot go on from a finished one, and is trained anew; empty where it can."""
  return obstacle(finished) or ('' if has_checkpoint(folder) else NO_CHECKPOINT)


def shorter(config: Cell, workdir: str) -> tuple[str, str]:
  """Folder and id of the finished cell that `train.extends` names. Raises `UserError` when this one is not its extension.

  The name is that of a folder beside this cell's own, as all cells of a ledger have, or a path. Whether a checkpoint is left
  there is not looked at.
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
  if why := obstacle(found):
    raise UserError(f'{what}: {why}; train without train.extends')
  return folder, found.id
