"""FLOPs and bytes of one training step, useful and dense, per part. Plain Python.

Counting: a multiply-add is 2 FLOPs; comparisons, gathers and elementwise work on [B, F] are not counted; the
optimizer's elementwise pass is counted in bytes only. `useful` follows the sparse algorithm (only the encoder's
forward pass is dense: 2nd a token), `dense` the six products of a dense implementation (12nd a token).
"""

from sae_jax.config import Cell
from sae_jax.families.family import family

FLOAT = 4  # bytes


def step_parts(n: float, k: float | None, d: int, batch: float) -> dict[str, dict[str, float]]:
  """FLOPs (useful and dense) and least bytes of one step without AuxK, per part, over all devices.

  Without a k the codes are dense: every product is one with all latents, and no row is gathered.
  """
  dense, weights = 2.0 * batch * n * d, FLOAT * n * d
  rows = FLOAT * batch * d
  if k is None:
    sparse, codes, gather = dense, FLOAT * batch * n, weights
  else:
    sparse, codes, gather = 2.0 * batch * k * d, FLOAT * batch * k, FLOAT * batch * k * d
  return {
    'encode': {'useful': dense, 'dense': dense, 'bytes': rows + weights + FLOAT * batch * n},
    'top_k': {'useful': 0.0, 'dense': 0.0, 'bytes': FLOAT * batch * n + 2 * codes},
    'decode': {'useful': sparse, 'dense': dense, 'bytes': gather + codes + rows},
    'code_gradient': {'useful': sparse, 'dense': dense, 'bytes': gather + codes + rows},
    'decoder_gradient': {'useful': sparse, 'dense': dense, 'bytes': 2 * gather + weights},
    'encoder_gradient': {'useful': sparse, 'dense': dense, 'bytes': 2 * gather + weights},
    # A dense implementation also backpropagates through the encoder for b_pre; here one vector-matrix product.
    'pre_bias_gradient': {'useful': 2.0 * n * d, 'dense': dense, 'bytes': weights},
    'optimizer': {'useful': 0.0, 'dense': 0.0, 'bytes': float(state_pass_bytes(n, d))},
  }


def chip_parts(config: Cell, *, aux: bool) -> dict[str, dict[str, float]]:
  """`step_parts` of one chip of the configuration's mesh, with 'executed': the FLOPs of its matrix products, and of
  the slots beyond k that a family's sparse products have.

  A chip holds 1/latent of the latents and of each token's codes, 1/data of the tokens, and updates its part of the
  state. `aux` for a step in which AuxK runs. Bytes are the least that a chip's memory must move; in row chunks the
  encoder is read once a chunk.
  """
  mesh, d = config.mesh, config.sae.d_model
  n, rows = config.sae.n_latents / mesh.latent, config.train.batch_tokens / mesh.data
  known = family(config.sae.activation)
  k = None if known.penalised else config.sae.k / mesh.latent
  parts, offered = step_parts(n, k, d, rows), step_parts(n, k and min(known.offered * k, n), d, rows)
  beyond = {name: offered[name]['useful'] - part['useful'] for name, part in parts.items()}
  for name, part in parts.items():
    part['bytes'] = offered[name]['bytes']
  parts['encode']['bytes'] += FLOAT * n * d * (mesh.row_chunks - 1)
  parts['optimizer']['bytes'] /= mesh.data if config.state_is_split else 1
  if aux:
    again = step_parts(n, config.sae.k_aux / mesh.latent, d, rows)
    shared = ('encode', 'pre_bias_gradient', 'optimizer')
    parts |= {f'aux_{name}': part for name, part in again.items() if name not in shared}
  times = {'encode': 1, 'pre_bias_gradient': 1}
  if known.penalised:
    # In row chunks all is computed again on the way back.
    times['encode'] = 1 if mesh.row_chunks == 1 else 2
    times |= {'decode': known.heads, 'code_gradient': known.heads, 'decoder_gradient': 1, 'encoder_gradient': 1}
  return {
    name: part | {'executed': times[name] * part['useful'] if name in times else beyond.get(name, 0.0)}
    for name, part in parts.items()
  }


def state_pass_bytes(n: float, d: int) -> float:
  """One read of parameters, gradients, two moments and EMA, one write of all but the gradients."""
  size = FLOAT * (2 * n * d + n + d)
  return 5 * size + 4 * size


def step_flops(n: int, k: float, d: int, batch: int, *, k_aux: int = 0) -> dict[str, float]:
  """{'useful', 'dense'} FLOPs of one step with k active latents a token; `k_aux` > 0 for one in which AuxK was active.

  AuxK shares the encoder's forward pass: four more sparse products, or five dense ones.
  """
  parts = step_parts(n, k, d, batch)
  aux_useful, aux_dense = (8.0 * batch * k_aux * d, 10.0 * batch * n * d) if k_aux else (0.0, 0.0)
  return {
    'useful': sum(p['useful'] for p in parts.values()) + aux_useful,
    'dense': sum(p['dense'] for p in parts.values()) + aux_dense,
  }


def spent(config: Cell, steps: int, aux_steps: int, mean_l0: float | None = None) -> dict[str, float]:
  """{'useful', 'dense'} training FLOPs after `steps`, in `aux_steps` of which some latent was dead.

  `mean_l0` is the mean number of active latents a token so far. Without it `sae.k` counts, and where there is none
  every latent: no useful count of the cell can be larger.
  """
  active = mean_l0 if mean_l0 is not None else config.sae.k or config.sae.n_latents
  size = (config.sae.n_latents, active, config.sae.d_model, config.train.batch_tokens)
  plain, with_aux = step_flops(*size), step_flops(*size, k_aux=config.sae.k_aux)
  return {key: (steps - aux_steps) * plain[key] + aux_steps * with_aux[key] for key in plain}


def cell_flops(config: Cell) -> dict[str, float]:
  """{'useful', 'dense'} training FLOPs of a whole cell, as planned: without AuxK, whose share depends on the run."""
  return spent(config, config.train.steps, 0)
