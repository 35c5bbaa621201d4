"""Does it fit, what crosses the wire, how long at best: `python -m sae_jax.plan --config=X.py --topology=v5p:8x8x8`.

The real training step is compiled for chips that need not be here. Memory and collectives are the compiler's; time is
a roofline from our own counts, a lower bound that no run has confirmed: compiled for is not runs on.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from typing import Any

from sae_jax import files, flags, flops
from sae_jax.ahead import dearest, hlo
from sae_jax.config import Cell, resolve
from sae_jax.errors import UserError, one_line_errors

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peak figures of one accelerator."""

  name: str
  bfloat16: float  # FLOP/s of matrix products
  float32: float  # FLOP/s at jax's default precision for float32 inputs
  memory: int  # bytes
  memory_bandwidth: float  # bytes/s
  ring_bandwidth: float  # bytes/s a chip sends in a ring along one mesh axis, both directions together
  clock: float  # cycles/s


# TPU: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}, "system architecture". A ring uses two of the chip's links, of
# 400 GB/s / 4, 1,200 GB/s / 6 and 800 GB/s / 4 counted both ways, so half of each sends. By default jax multiplies
# float32 on a TPU as bfloat16 and on an H100 as TF32. H100 SXM5: NVIDIA's data sheet, dense figures; NVLink 900 GB/s
# both ways. A TPU's clock is its bfloat16 peak by the FLOPs of its matrix units in a cycle: 4 of 128 x 128 on a v5e,
# 8 on a v5p, 4 of 256 x 256 on a v6e.
CHIPS = {
  'v5e': Chip('TPU v5e', 197e12, 197e12, 16 * GIB, 819e9, 100e9, 1.5e9),
  'v5p': Chip('TPU v5p', 459e12, 459e12, 95 * GIB, 2765e9, 200e9, 1.75e9),
  'v6e': Chip('TPU v6e', 918e12, 918e12, 32 * GIB, 1638e9, 200e9, 1.75e9),
  'h100': Chip('H100 SXM5', 989e12, 494e12, 80 * GIB, 3352e9, 450e9, 1.98e9),
}


@dataclasses.dataclass(frozen=True)
class Plan:
  """One training step on one slice. Bytes and FLOPs are of one chip unless said otherwise."""

  topology: str
  chip: str
  chips: int
  mesh: dict[str, int]  # data, latent, row_chunks
  memory: dict[str, int]  # bytes: the compiler's totals, the parts of the arguments, large known temporaries
  memory_total: int  # arguments + temporaries + outputs - aliased
  memory_fraction: float  # of the chip's memory
  collectives: list[dict[str, Any]]  # op, axis, bytes of one execution, per_step: executions a step
  network_bytes: dict[str, float]  # sent a step, by mesh axis
  operations: list[dict[str, Any]]  # the ten dearest, see ahead.dearest; share: of all
  flops: dict[str, float]  # of a step over all chips: useful, dense; executed: the matrix products it does
  seconds_by: dict[str, float]  # at the peak of each resource alone: compute, memory, network
  seconds: float  # the largest: the roofline of a step in which AuxK runs
  bound: str  # the resource it belongs to
  tokens_per_s: float
  steps: int
  chip_hours: float  # for the configuration's token budget
  compile_s: float
  warnings: list[str]

  def to_json(self) -> bytes:
    return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False).encode() + b'\n'


def plan(config: Cell, topology: str, latent_shards: int | None = None) -> Plan:
  """Compiles `config`'s step for a slice such as 'v5p:8x8x8' and accounts for it.

  Args:
    config: the cell. Its mesh is used when it has as many devices as the slice, unless `latent_shards` is given.
    topology: 'KIND:LAYOUT', a key of `CHIPS` and the slice's shape in chips.
    latent_shards: chips that share the latents; the others share the tokens.

  Raises:
    UserError: an unknown slice, a compiler that is not installed, a mesh that does not divide, or no room.
  """
  kind = topology.partition(':')[0]
  if kind not in CHIPS:
    raise UserError(f'topology {topology!r} is of no known chip; use {", ".join(CHIPS)}, e.g. v5p:8x8x8')
  _set_environment()
  from sae_jax import sharding
  from sae_jax.ahead import compile

  devices = compile.devices(topology)
  config = with_mesh(config, len(devices), CHIPS[kind], latent_shards)
  mesh = sharding.make_mesh(config.mesh, devices)
  return account(config, topology, CHIPS[kind], compile.compile_step(config, mesh))


def with_mesh(config: Cell, chips: int, chip: Chip, latent_shards: int | None) -> Cell:
  """The configuration on a mesh of all chips of a slice."""
  if latent_shards is None:
    if config.mesh.data * config.mesh.latent == chips:
      return config
    latent_shards = _least_latent_shards(config, chips, chip)
  if latent_shards < 1 or chips % latent_shards:
    raise UserError(f'latent_shards={latent_shards} does not divide {chips} chips; use a divisor')
  mesh = dataclasses.replace(config.mesh, data=chips // latent_shards, latent=latent_shards)
  return dataclasses.replace(config, mesh=mesh)


def _least_latent_shards(config: Cell, chips: int, chip: Chip) -> int:
  """Fewest shards at which whole parameters and gradients, and the chip's part of the state, take half of memory."""
  weights = flops.FLOAT * 2 * config.sae.n_latents * config.sae.d_model
  divisors = [s for s in range(1, chips + 1) if chips % s == 0 and config.sae.n_latents % s == 0]
  fitting = [s for s in divisors if 2 * weights / s + 4 * weights / chips < chip.memory / 2]
  return fitting[0] if fitting else divisors[-1]


def account(config: Cell, topology: str, chip: Chip, compiled: Any) -> Plan:
  """The plan of a step that `compile.compile_step` compiled."""
  data, latent, chunks = config.mesh.data, config.mesh.latent, config.mesh.row_chunks
  chips = data * latent
  aux = config.loss.aux_coefficient > 0 and config.sae.k_aux > 0
  parts = flops.chip_parts(config, aux=aux)
  counted = flops.step_flops(
    config.sae.n_latents,
    config.sae.k or config.sae.n_latents,
    config.sae.d_model,
    config.train.batch_tokens,
    k_aux=config.sae.k_aux if aux else 0,
  )
  collectives = hlo.collectives(compiled.text, {'data': data, 'latent': latent})
  executed = dearest.operations(compiled.text, chip)
  sent = hlo.sent(collectives)
  warnings = []
  for c in collectives:
    if c.per_step is None:
      warnings.append(f'{c.op} {c.shapes} sits in a loop whose length the compiled text does not tell')
    if carries_batch_by_latents(c.shapes, config):
      warnings.append(f'{c.op} over {c.axis} carries B x n: {", ".join(c.shapes)}')
    if c.op in ('all-reduce', 'reduce-scatter') and any(s.startswith('bf16') for s in c.shapes):
      warnings.append(f'{c.op} over {c.axis} adds in bfloat16: {", ".join(c.shapes)}')
  total = (
    compiled.memory['arguments']
    + compiled.memory['temporaries']
    + compiled.memory['outputs']
    - compiled.memory['aliased']
  )
  if total > 0.9 * chip.memory:
    warnings.append(f'{total / chip.memory:.0%} of memory leaves no room for the runtime')
  peak = chip.bfloat16 if config.train.compute_dtype == 'bfloat16' else chip.float32
  seconds_by = {
    'compute': sum(p['executed'] for p in parts.values()) / peak,
    'memory': sum(p['bytes'] for p in parts.values()) / chip.memory_bandwidth,
    'network': sum(sent.values()) / chip.ring_bandwidth,
  }
  bound = max(seconds_by, key=lambda name: seconds_by[name])
  seconds = seconds_by[bound]
  return Plan(
    topology=topology,
    chip=chip.name,
    chips=chips,
    mesh={'data': data, 'latent': latent, 'row_chunks': chunks},
    memory=compiled.state | compiled.memory | _large_temporaries(config),
    memory_total=total,
    memory_fraction=total / chip.memory,
    collectives=[c._asdict() | {'wire_bytes': c.wire_bytes, 'conditional': bool(c.branch)} for c in collectives],
    network_bytes=sent,
    operations=[o._asdict() | {'share': o.seconds / dearest.total(executed)} for o in executed[:10]],
    flops=counted | {'executed': chips * sum(p['executed'] for p in parts.values())},
    seconds_by=seconds_by,
    seconds=seconds,
    bound=bound,
    tokens_per_s=config.train.batch_tokens / seconds,
    steps=config.train.steps,
    chip_hours=seconds * config.train.steps * chips / 3600,
    compile_s=compiled.seconds,
    warnings=warnings,
  )


def _large_temporaries(config: Cell) -> dict[str, int]:
  """Counted, not read from the compiler: what a step must hold for a while beside its arguments."""
  rows = config.train.batch_tokens // config.mesh.data // config.mesh.row_chunks
  width = config.sae.n_latents // config.mesh.latent
  weights = flops.FLOAT * 2 * width * config.sae.d_model
  return {
    'gradients': weights,
    'gathered_params': weights if config.state_is_split else 0,
    'pre_activations': flops.FLOAT * rows * width,
  }


def carries_batch_by_latents(shapes: tuple[str, ...], config: Cell) -> bool:
  """Whether a collective moves something as large as a chip's own block of pre-activations, tokens by latents.

  A plan warns of it: nothing of this size may cross the wire.

  The shapes of what is moved tell. One side must count tokens: of the batch, of a chip, or of a row chunk. The other sides
  together must be no smaller than the chip's latents. A side as long as an activation is wide counts neither as tokens nor
  as latents, so that weights and reconstructions are no reason to warn.
  """
  d_model = config.sae.d_model
  rows, latents = config.train.batch_tokens // config.mesh.data, config.sae.n_latents // config.mesh.latent
  tokens = {rows, config.train.batch_tokens, rows // config.mesh.row_chunks} - {d_model}
  for shape in shapes:
    sides = [side for side in hlo.elements(shape) if side]
    others = [math.prod(sides) // side for side in sides if side in tokens]
    if any(size >= latents and size != d_model for size in others):
      return True
  return False


def report(plan: Plan) -> str:
  """The plan as text."""
  gib = {name: size / GIB for name, size in plan.memory.items()}
  lines = [
    f'{plan.topology}: {plan.chips} x {plan.chip}, mesh data={plan.mesh["data"]} x latent={plan.mesh["latent"]}, '
    f'{plan.mesh["row_chunks"]} row chunks; compiled in {plan.compile_s:.0f} s, not run',
    f'memory a chip: {plan.memory_total / GIB:.2f} GiB, {plan.memory_fraction:.1%} of it',
    '  arguments {arguments:.2f}: params {params:.2f}, moments {moments:.2f}, ema {ema:.2f}, counters {counters:.2f}, '
    'batch {batch:.2f}'.format(**gib),
    '  temporaries {temporaries:.2f}: at some time gradients {gradients:.2f}, gathered params {gathered_params:.2f}, '
    'pre-activations {pre_activations:.2f}'.format(**gib),
    f'  outputs {gib["outputs"]:.2f}, of which {gib["aliased"]:.2f} reuse arguments',
    'collectives a step and chip (sent = bytes on the wire of a ring; of branches the sum counts the dearest):',
  ]
  for c in sorted(plan.collectives, key=lambda c: -c['wire_bytes'] * (c['per_step'] or 1)):
    times = 'in a loop of unknown length' if c['per_step'] is None else f'x {c["per_step"]}'
    shapes = ', '.join(c['shapes'][:3]) + (', …' if len(c['shapes']) > 3 else '')
    note = ', in a branch for dead latents' if c['conditional'] else ''
    lines.append(f'  {c["op"]:14} {c["axis"]:11} {c["bytes"] / 1e6:12.3f} MB {times}: {shapes}{note}')
  sent = ', '.join(f'{axis} {size / 1e9:.2f}' for axis, size in plan.network_bytes.items()) or 'none'
  by = ', '.join(f'{name} {1e3 * seconds:.1f}' for name, seconds in plan.seconds_by.items())
  lines += [
    f'sent GB by axis: {sent}',
    f'FLOPs a step: useful {plan.flops["useful"]:.3g}, dense {plan.flops["dense"]:.3g}, '
    f'executed as matrix products {plan.flops["executed"]:.3g}',
    f'roofline ms of a step with AuxK (each resource at its peak): {by}; bound by {plan.bound}',
    f'at the roofline: {plan.tokens_per_s:,.0f} tokens/s, {plan.steps} steps in {plan.chip_hours:,.1f} chip-hours',
    "dearest operations by the compiler's estimate, or ~ by the bytes they touch, in the dearest branches:",
  ]
  for o in plan.operations:
    lines.append(
      f'  {o["share"]:5.1%} {1e3 * o["seconds"]:10.3f} ms{" " if o["estimated"] else "~"}x {o["times"]:<4} {o["op"]:11} '
      f'{o["shape"]:22} {o["source"].removeprefix("jit(step)/")[-60:]}'
    )
  return '\n'.join(lines + [f'warning: {text}' for text in plan.warnings])


def _set_environment() -> None:
  """For a process that has not loaded jax: no accelerator is looked for, and libtpu starts without complaints."""
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # nothing is run, so no chip is to be guarded
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  for name in ('TPU_MIN_LOG_LEVEL', 'TPU_STDERR_LOG_LEVEL', 'TF_CPP_MIN_LOG_LEVEL'):
    os.environ.setdefault(name, '3')


@one_line_errors
def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog='python -m sae_jax.plan', description=__doc__.splitlines()[0])
  parser.add_argument(
    '--topology',
    required=True,
    help='slice, e.g. v5e:4x4, v5p:8x8x8, v6e:4x4, h100:8 (needs the extra cuda12)',
  )
  parser.add_argument(
    '--latent_shards', type=int, metavar='S', help="chips that share the latents; default: the config's mesh"
  )
  parser.add_argument('--json', metavar='OUT', help='write the plan here')
  args, config_dict = flags.parse(parser, argv)
  # A program for chips that are not here cannot be read back from jax's cache: jax would warn and compile again.
  os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'
  made = plan(resolve(config_dict), args.topology, args.latent_shards)
  print(report(made))
  if args.json:
    files.write_output(args.json, made.to_json())
  return 0


if __name__ == '__main__':
  sys.exit(main())
