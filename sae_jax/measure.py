"""Measures one finished autoencoder: python -m sae_jax.measure --cell=DIR [--measures=downstream,...] [--dry_run]

What is there already is not measured again, and a run that was killed goes on where it was. Values and standard errors
are printed, and stand in DIR/measures/measures.json. `--against=DIR` adds the differences to another autoencoder on the
same windows, with the paired standard error.
"""

import argparse
import contextlib
import sys
import time
from typing import TYPE_CHECKING

from sae_jax import files, flags, lease, schema, signals
from sae_jax.errors import PREEMPTED, UserError, one_line_errors
from sae_jax.measures import Given, Scope, names, results, some
from sae_jax.progress import Display

if TYPE_CHECKING:  # they load jax, which --help does without
  from sae_jax.measures import run
  from sae_jax.measures.inputs import Inputs
  from sae_jax.measures.measure import Measure

_EVERY_S = 10.0


class Shown(Display):
  """How far measures are: units done, of how many, and how long the rest takes."""

  def __init__(self, label: str, units: int, visible: bool = True):
    super().__init__(sys.stderr if visible else None, total=units, desc=label, unit='unit')
    self._label, self._units, self._done = label, units, 0
    self._began = self._said = time.monotonic()

  def restart(self, label: str, units: int) -> None:
    """Goes on to other work."""
    self._label, self._units, self._done, self._began = label, units, 0, time.monotonic()
    if self._bar is not None:
      self._bar.reset(units)
      self._bar.set_description(label)

  def update(self, done: int, words: str) -> None:
    if self._bar is not None:
      self._bar.set_postfix_str(words, refresh=False)
      self._bar.update(done - self._done)
    elif (now := time.monotonic()) - self._said >= _EVERY_S:
      self._said = now
      left = (self._units - done) * (now - self._began) / done if done else 0.0
      self.say(f'{self._label}: {words}, {done} of {self._units} units' + (f', {left:.0f} s left' if done else ''))
    self._done = done


def parser(prog: str, about: str) -> argparse.ArgumentParser:
  """With the flags of both commands that measure."""
  made = argparse.ArgumentParser(prog=prog, description=about)
  known, usual = ', '.join(names.VERSIONS), ', '.join(names.USUAL)
  made.add_argument('--measures', default='', metavar='NAME,...', help=f'some of {known} (default: {usual})')
  made.add_argument('--weights', choices=('raw', 'ema'), help='default: those that training found better')
  made.add_argument(
    '--windows', type=flags.whole('--windows'), default=Scope.held_out, help='held-out windows (%(default)s)'
  )
  made.add_argument(
    '--train_windows', type=flags.whole('--train_windows'), default=Scope.train, help='for what is fitted (%(default)s)'
  )
  made.add_argument(
    '--probe_tasks',
    default='',
    metavar='FILE',
    help='tasks of probes in place of the built-in ones: docs/probe_tasks.md',
  )
  made.add_argument(
    '--suffix',
    type=flags.whole('--suffix'),
    default=Given.suffix,
    help='n2g: longest piece of text tried (%(default)s)',
  )
  made.add_argument('--pad', default=Given.pad, help='n2g: text of the token that replaces others (%(default)r)')
  made.add_argument(
    '--rule', choices=('simplified', 'original'), default=Given.rule, help='n2g: how patterns are made (%(default)s)'
  )
  made.add_argument('--dry_run', action='store_true', help='say what would be measured, and what it costs')
  return made


def asked(args: argparse.Namespace) -> 'list[Measure]':
  """The measures that are asked for. Raises `UserError` for an unknown one."""
  given = Given(args.probe_tasks, args.suffix, args.pad, args.rule)
  return some([name for name in args.measures.split(',') if name], given)


def costs(of: 'run.Target', wanted: 'list[Measure]', inputs: 'Inputs') -> list[str]:
  """A line for each measure: what is there, or how much work it is."""
  from sae_jax.measures import run

  todo, the = run.missing(of, wanted, inputs), None
  lines = []
  for one in wanted:
    if one not in todo:
      lines.append(f'{of.id} {one.NAME}: done')
      continue
    the = the or run.judged(of)
    lines.append(f'{of.id} {one.NAME}: {one.units(inputs)} units, {one.flops(the, inputs):.2g} FLOPs')
  return lines


@one_line_errors
def main(argv: list[str]) -> int:
  made = parser('python -m sae_jax.measure', 'Measure one finished autoencoder.')
  made.add_argument('--cell', required=True, metavar='DIR', help='folder of a finished cell')
  made.add_argument(
    '--against', metavar='DIR', help='another finished cell: print the differences, paired over windows'
  )
  args = made.parse_args(argv)
  from sae_jax.measures import paired, run

  stop, scope = signals.Signalled(), Scope(args.windows, args.train_windows)
  wanted = asked(args)
  targets = [run.target(cell, args.weights) for cell in (args.cell, args.against) if cell]
  folder = run.inputs_folder(args.cell)
  inputs = run.inputs_of(targets[0], scope, folder)
  if len({run.group(of, scope) for of in targets}) > 1:
    raise UserError(f'{args.against} has another subject, site or text than {args.cell}; compare cells of one stream')
  if args.dry_run:
    print('\n'.join(line for of in targets for line in costs(of, wanted, inputs)))
    return 0
  for of in targets:
    try:
      done = measured(of, wanted, inputs, stop)
    except lease.LeaseLost as error:
      print(f'lease lost: {error}', file=sys.stderr)
      return PREEMPTED
    if not done:
      return 128 + stop.signum if stop.signum == signals.STOP[1] else PREEMPTED
  found = [results.read(of.folder, of.id) for of in targets]
  for one in wanted:
    for name, value in found[0][one.NAME].values.items():
      print(shown(f'{one.NAME}/{name}', value))
    if len(targets) == 2:
      rows = [run.records(of, result[one.NAME]) for of, result in zip(targets, found, strict=True)]
      differences = paired.differences(one, *rows)
      for name, value in differences.items():
        print(shown(f'{one.NAME}/{name} - that of {targets[1].id}', value))
      if not differences:
        print(f'{one.NAME}: no differences; none of its values has an error over windows, tasks or places of both')
  return 0


def measured(of: 'run.Target', wanted: 'list[Measure]', inputs: 'Inputs', stop: signals.Signalled) -> bool:
  """Measures a cell under the lease of its measures; False when asked to stop. Waits for another who measures it."""
  from sae_jax.measures import run

  observer, held = lease.Observer(), None
  folder = files.join(of.folder, schema.MEASURES)
  while (held := observer.claim(folder)) is None:
    if stop():
      return False
    time.sleep(0.5)
  total = sum(one.units(inputs) for one in run.missing(of, wanted, inputs))
  before: dict[str, int] = {}
  with held, contextlib.closing(Shown(of.id, total)) as progress:

    def update(one: 'Measure', done: int, units: int) -> None:
      before[one.NAME] = done
      progress.update(sum(before.values()), f'{one.NAME} {done}/{units}')

    return run.run(of, wanted, inputs, held, stop=stop, update=update)


def shown(name: str, value: dict) -> str:
  """'downstream/kl  0.3290 +- 0.0220 nats a token'."""
  error = '' if value['se'] is None else f' ± {value["se"]:.2g}'
  return f'{name}  {value["value"]:.4g}{error} {value["units"]}'


if __name__ == '__main__':
  main()
