"""What a step of each family takes, over TopK's and over the products that it cannot do without.

python -m bench.families [--json=OUT]
All families take turns in one process, with fresh parameters and no dead latents.
"""

import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from bench import command
from sae_jax import bench, config, flops, heap, sae, sharding
from sae_jax.codes import Elementwise, Own, Selection
from sae_jax.errors import one_line_errors
from sae_jax.families.family import NAMES, family
from sae_jax.sae import SAMPLE
from sae_jax.step import make_step

SHAPE = (576, 4096, 2048, 32)
_COPY_FLOATS = 2**26


def cell(name: str, shape: tuple[int, ...]) -> config.Cell:
  """The paper's recipe for a family at one size."""
  known = family(name)
  base = bench.paper_cell(shape)
  flat = base.flat() | {'sae.activation': name, 'sae.k_aux': base.sae.k_aux if known.auxk else 0}
  if not known.steered:
    flat |= {'sae.k': None, 'loss.sparsity': 0.01}
  return config.resolve_flat(flat)


def products(name: str, shape: tuple[int, ...]) -> dict[str, int]:
  """How many dense products of each kind a step has; all but a selection's first are sparse. Each has 2 B D F FLOPs.

  encode: [B, D] x [D, F], decode: [B, F] x [F, D], weights: [F, B] x [B, D]. A library's matmul is not equally fast at all.
  """
  kind = sae.kind_of(cell(name, shape).sae)
  match kind:
    case Selection():
      return {'encode': 1}
    case Own():
      return {'encode': 2, 'decode': 1, 'weights': 2}  # XLA encodes once for both passes
    case Elementwise():
      learning = sum(not head.frozen for head in kind.heads)
      return {'encode': 1 + len(kind.heads), 'decode': len(kind.heads), 'weights': 1 + learning}


def measure(shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
  """Milliseconds of each family's step, medians of turns, and ratios to TopK's and to the family's own floor."""
  d, n, batch, _ = shape
  x_BD = jax.random.normal(jax.random.key(1), (batch, d))
  x_BD = x_BD / jnp.linalg.norm(x_BD, axis=1, keepdims=True)
  held, steps = {}, {}
  for name in tqdm(NAMES, 'compiling', leave=False, disable=None):
    one = cell(name, shape)
    mesh = sharding.make_mesh(one.mesh)
    init, steps[name] = make_step(one, mesh)
    # Late in a run: no family is in its first steps any more.
    late = jnp.int32(10**6)
    held[name] = init(jnp.zeros(d), jnp.float32(d), jnp.resize(x_BD, (SAMPLE, d))).replace(step=late)
    for _ in range(3):
      held[name], _ = jax.block_until_ready(steps[name](held[name], x_BD))
  options = sharding.compiler_options(mesh)
  w_FD = jnp.asarray(held['topk'].params['w_enc_FD'] + 0)
  dense = {'encode': 'bd,fd->bf', 'decode': 'bf,fd->bd', 'weights': 'bf,bd->fd'}
  multiply = {
    name: jax.jit(functools.partial(jnp.einsum, sums), compiler_options=options) for name, sums in dense.items()
  }
  z_BF = jax.block_until_ready(multiply['encode'](x_BD, w_FD))
  factors = {'encode': (x_BD, w_FD), 'decode': (z_BF, w_FD), 'weights': (z_BF, x_BD)}
  copy, copied = jax.jit(lambda a: a + 1, donate_argnums=0), jnp.ones(_COPY_FLOATS)
  times: dict[str, list[float]] = {name: [] for name in (*NAMES, *dense, 'copy')}
  heap.keep()  # as training does
  for turn in tqdm(range(rounds + 1), 'turns', leave=False, disable=None):
    for name in times:
      began = time.perf_counter()
      if name in dense:
        jax.block_until_ready(multiply[name](*factors[name]))
      elif name == 'copy':
        copied = jax.block_until_ready(copy(copied))
      else:
        held[name], _ = jax.block_until_ready(steps[name](held[name], x_BD))
      if turn:
        times[name].append(time.perf_counter() - began)
  ms = {name: 1e3 * statistics.median(taken) for name, taken in times.items()}
  state_pass = ms['copy'] * flops.state_pass_bytes(n, d) / (2 * 4 * _COPY_FLOATS)
  return {
    'shape': list(shape),
    'products_ms': {name: ms[name] for name in dense},
    'state_pass_ms': state_pass,
    'families': {
      name: {
        'step_ms': ms[name],
        'times_topk': ms[name] / ms['topk'],
        'times_floor': ms[name] / (sum(ms[one] * count for one, count in products(name, shape).items()) + state_pass),
        'products': products(name, shape),
      }
      for name in NAMES
    },
    'machine': bench.machine(),
  }


def lines(row: dict[str, Any]) -> str:
  """Markdown: a row a family."""
  out = [
    f'A step at d, n, B, k = {", ".join(map(str, row["shape"]))}. Dense products, in ms: '
    + ', '.join(f'{name} {ms:.0f}' for name, ms in row['products_ms'].items())
    + f'; state pass {row["state_pass_ms"]:.0f} ms.',
    '',
    '| family | step | times TopK | dense products | times its floor |',
    '|---|---|---|---|---|',
  ]
  for name, one in row['families'].items():
    out.append(
      f'| {name} | {one["step_ms"]:,.0f} ms | {one["times_topk"]:.2f} | {sum(one["products"].values())} '
      f'| {one["times_floor"]:.2f} |'
    )
  return '\n'.join(out)


@one_line_errors
def main(argv: list[str]) -> int:
  parser = command.parser('families', __doc__)
  command.add_shapes(parser)
  command.add_rounds(parser)
  args = parser.parse_args(argv)
  heap.one_arena()
  rows = [measure(shape, args.rounds) for shape in args.shape or [SHAPE]]
  return command.report(rows, '\n\n'.join(map(lines, rows)), args.json)


if __name__ == '__main__':
  main()
