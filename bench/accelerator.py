"""The first minutes on a GPU or TPU: is it right, how fast is it, and how far from its roofline.

python -m bench.accelerator --minutes=10 --json=OUT [--peers_python=runs/peers/bin/python]
python -m bench.accelerator --dry_run       every part at toy sizes on a CPU, kernels interpreted: shows that it runs
No network is needed. Parts come in the order of their value, and OUT is whole after every row: cut it off when you like.
"""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import jax

from bench import command, numerics, on_device
from bench.numerics import PRECISIONS, Shape
from bench.parts import Part, Row, run
from sae_jax import flags
from sae_jax.errors import UserError, one_line_errors
from sae_jax.families.family import NAMES

_ANSWER_SECONDS = 180  # in which a device is opened: on a large TPU slice that takes a minute or two


class Sizes(NamedTuple):
  """Shapes are D, N, B, K."""

  toy: bool
  numerics: Shape
  families: Sequence[str]
  precisions: Sequence[str]  # the first is judged
  selection: Sequence[Shape]  # rows, columns, k
  timed: Sequence[Shape]  # selection and products
  steps: Sequence[Shape]
  calls: Sequence[int]  # windows of a harvest's call
  seconds: float  # of one measure


REAL = Sizes(
  toy=False,
  numerics=(256, 1024, 256, 16),
  families=NAMES,
  precisions=PRECISIONS,
  selection=((64, 4096, 32), (64, 131_072, 64), (16, 1_048_576, 128)),
  timed=((768, 16_384, 8192, 32), (768, 262_144, 8192, 32)),
  steps=tuple((768, 2**14 * 4**i, 8192, 32) for i in range(4)),
  calls=(32, 128),
  seconds=1.0,
)
TOY = Sizes(
  toy=True,
  numerics=(16, 128, 24, 4),
  families=('topk', 'gated', 'cs294a'),  # one of each kind of codes
  precisions=PRECISIONS[::2],
  selection=((5, 64, 4),),
  timed=((8, 96, 12, 3),),
  steps=((8, 96, 12, 3),),
  calls=(2,),
  seconds=0.0,
)


def parts(sizes: Sizes, pythons: Sequence[str]) -> list[Part]:
  """In the order of their value; seconds are guesses, as none has run on an accelerator."""
  of, s, toy = functools.partial, sizes.seconds, sizes.toy
  shape, again = sizes.timed[0], sizes.families[: 1 if toy else None]
  steps = [
    Part(f'step, n={one[1]}, {dtype}', 20, of(on_device.step, one, dtype, s))
    for one in sizes.steps
    for dtype in ('float32', 'bfloat16')
  ]
  return [
    Part('machine', 10, on_device.machine),
    Part('numerics of products', 40, of(numerics.products, sizes.numerics, sizes.precisions, toy)),
    Part('numerics of steps', 90, of(numerics.steps, sizes.numerics, sizes.families, sizes.precisions[:1])),
    Part('exact selection', 20, of(numerics.selection, sizes.selection)),
    Part('time of selection', 25, of(on_device.selection, sizes.timed, s)),
    Part('time of products', 60, of(on_device.products, sizes.timed, s, toy)),
    *steps,
    Part('harvest', 30, of(on_device.harvest, sizes.calls, toy, s)),
    Part('sparsify', 40, of(on_device.sparsify, shape, pythons, 5 * s)),
    Part('approximate selection', 25, of(on_device.approximate, sizes.timed, s)),
    Part('AuxK', 60, of(on_device.auxk, shape, (0.1, 0.5), 5 * s)),
    Part('numerics of steps, lower precision', 120, of(numerics.steps, sizes.numerics, again, sizes.precisions[1:])),
  ]


def table(record: Row) -> str:
  """Markdown: a row a part, and below it each step."""
  lines = ['| part | status | seconds | |', '|---|---|---|---|']
  for one in record['parts']:
    why = one.get('error') or one.get('reason') or ''
    lines.append(f'| {one["part"]} | {one["status"]} | {one.get("seconds", "")} | {why} |')
  steps = [row for one in record['parts'] for row in one['rows'] if 'tokens_per_s' in row and 'dtype' in row]
  if steps:
    lines += [
      '',
      '| d, n, B, k | inputs of products | step | times its roofline | peak / predicted bytes |',
      '|---|---|---|---|---|',
    ]
  for row in steps:
    over = f'{row["times_roofline"]:.2f}' if 'times_roofline' in row else 'not known'
    peak = f'{row["peak_bytes"] / row["predicted_bytes"]:.2f}' if row['peak_bytes'] else 'not known'
    shape = ', '.join(map(str, row['shape']))
    lines.append(f'| {shape} | {row["dtype"]} | {row["ms"]:.2f} ms | {over} | {peak} |')
  return '\n'.join(lines)


def _backend() -> str:
  """The platform that jax takes, 'cpu' where the one that was asked for is not there.

  Another process is asked: this one must use no device, for the parts are forked from it. Raises `UserError` where it
  cannot say.
  """
  named = jax.config.jax_platforms
  try:
    asked = subprocess.run(
      [sys.executable, '-c', 'import jax; print(jax.default_backend())'],
      env=os.environ | ({'JAX_PLATFORMS': named} if named else {}),
      capture_output=True,
      text=True,
      timeout=_ANSWER_SECONDS,
    )
  except subprocess.TimeoutExpired:
    raise UserError(f'jax opened no device within {_ANSWER_SECONDS} s; see whether another process holds it') from None
  if asked.returncode:
    why = (asked.stderr.strip().splitlines() or ['no word of why'])[-1]
    raise UserError(f'jax cannot open a device: {why}')
  return asked.stdout.split()[-1]


@one_line_errors
def main(argv: list[str]) -> int:
  parser = command.parser('accelerator', __doc__)
  parser.add_argument('--minutes', type=flags.whole('--minutes'), default=10, help='in all (default 10)')
  parser.add_argument('--dry_run', action='store_true', help='toy sizes on a CPU; its numbers mean nothing')
  command.add_peers_python(parser)
  args = parser.parse_args(argv)
  sizes = TOY if args.dry_run else REAL
  if args.dry_run:
    jax.config.update('jax_platforms', 'cpu')
    # Compiles in half the time.
    quick = '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {quick}'
  else:
    if (named := jax.config.jax_platforms) and 'cpu' not in named.split(','):
      jax.config.update('jax_platforms', f'{named},cpu')  # the reference is computed there
    if _backend() == 'cpu':
      raise UserError('jax finds no accelerator here; install the extra cuda12 or tpu, or rehearse with --dry_run')
  record: Row = {'dry_run': args.dry_run, 'minutes': args.minutes}
  # Parts share their compiled programs, of which several meet twice.
  cache = tempfile.mkdtemp() if not jax.config.jax_compilation_cache_dir else None
  if cache:
    jax.config.update('jax_compilation_cache_dir', cache)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  try:
    run(parts(sizes, [sys.executable, args.peers_python]), 60 * args.minutes, record, args.json)
  finally:
    if cache:
      shutil.rmtree(cache)
  print(table(record))
  return 0


if __name__ == '__main__':
  main()
