"""How far an encoder shrinks the values of the latents that it chooses (Gao et al. 2024, section 5).

Which latents are active stays as it is, and their values become those that reconstruct best.

    nmse_before, nmse_after   with the encoder's values and with the refined ones, of the tokens that are looked at
    error_removed             1 - nmse_after / nmse_before
    growth                    sum of all values after over before: above 1 where the encoder shrinks them

An autoencoder whose reconstruction is not a sum of latents has no such values, and gets none.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import inference, sae, sparse
from sae_jax.measures import centre, estimate
from sae_jax.measures.active import active
from sae_jax.measures.inputs import BLOCK_WINDOWS, Inputs
from sae_jax.measures.measure import Judged, Unit, Value


@dataclasses.dataclass(frozen=True)
class Refine:
  """Settings.

  Attributes:
    windows: the first held-out windows are looked at, in whole blocks: refining is dear.
    steps: of projected gradients.
  """

  NAME: ClassVar[str] = 'refine'

  windows: int = 32
  steps: int = 500

  def units(self, inputs: Inputs) -> int:
    return min(inputs.blocks('held_out'), -(-self.windows // BLOCK_WINDOWS))

  def run(self, unit: int, judged: Judged, inputs: Inputs) -> Unit:
    """One block of held-out windows: for each window the sums over the positions that count."""
    form, block = judged.form, inputs.block('held_out', unit)
    if not sae.has_linear_decoder(form.size):
      return Unit({})
    counted_WTD = block.counted_BD.reshape(*block.places_WT.shape, -1)
    unit_BD = np.asarray(form.unit(block.counted_BD)[0])
    target_BD = unit_BD - np.asarray(judged.params['b_pre_D'])[None]
    token_A, latent_A, value_A = active(counted_WTD, judged, inputs)
    active_B = np.bincount(token_A, minlength=len(unit_BD))
    slot_A = np.arange(len(token_A)) - np.repeat(np.cumsum(active_B) - active_B, active_B)
    sums = {name: np.zeros(len(unit_BD)) for name in ('error_before', 'error_after', 'sum_before', 'sum_after')}

    def run(both: Any, target_RD: jax.Array, z_RK: jax.Array, idx_RK: jax.Array) -> dict[str, jax.Array]:
      better_RK = inference.refined(both[1], target_RD, z_RK, idx_RK, self.steps)
      found = {}
      for when, values_RK in (('before', z_RK), ('after', better_RK)):
        found[f'error_{when}'] = jnp.sum((target_RD - sparse.decode(values_RK, idx_RK, both[1])) ** 2, axis=-1)
        found[f'sum_{when}'] = jnp.sum(values_RK, axis=-1)
      return found

    # Tokens with about as many latents together: one with many would make all as dear, for work grows with the square.
    slots_B = 2 ** np.ceil(np.log2(np.maximum(active_B, 1))).astype(int)
    for k in np.unique(slots_B):
      some_R, rows = np.flatnonzero(slots_B == k), inference.refined_at_once(int(k), unit_BD.shape[1])
      row_B = np.full(len(unit_BD), -1)
      row_B[some_R] = np.arange(len(some_R))
      padded = -(-len(some_R) // rows) * rows  # so that one program does for all
      target_RD = np.zeros((padded, unit_BD.shape[1]), np.float32)
      z_RK, idx_RK = np.zeros((padded, k), np.float32), np.zeros((padded, k), np.int32)
      target_RD[: len(some_R)] = target_BD[some_R]
      of_A = row_B[token_A] >= 0
      at_A = (row_B[token_A[of_A]], slot_A[of_A])
      z_RK[at_A], idx_RK[at_A] = value_A[of_A], latent_A[of_A]
      for first in range(0, padded, rows):
        part, here_R = slice(first, first + rows), some_R[first : first + rows]
        arrays = (target_RD[part], z_RK[part], idx_RK[part])
        found = inputs.over_windows(('refine', self.steps), run, judged.params['w_dec_FD'], *arrays)
        for name, a_R in found.items():
          sums[name][here_R] = a_R[: len(here_R)]
    mean_D = centre.means(form, inputs)['unit_D']
    sums['square'] = ((unit_BD - mean_D[None]) ** 2).sum(axis=1, dtype=np.float64)
    return Unit({name: a_B.reshape(block.places_WT.shape).sum(axis=1).tolist() for name, a_B in sums.items()})

  def values(self, units: list[Unit]) -> dict[str, Value]:
    records = [unit.record for unit in units if unit.record]
    if not records:
      return {}
    sums = {name: estimate.column(records, name) for name in records[0]}
    left = estimate.ratio(sums['error_after'], sums['error_before'], 'share')
    return {
      'nmse_before': estimate.ratio(sums['error_before'], sums['square'], 'share'),
      'nmse_after': estimate.ratio(sums['error_after'], sums['square'], 'share'),
      'error_removed': dataclasses.replace(left, value=1 - left.value),
      'growth': estimate.ratio(sums['sum_after'], sums['sum_before'], 'ratio'),
    }

  def flops(self, judged: Judged, inputs: Inputs) -> float:
    """With k latents for every token, or as many as were asked for."""
    size, tokens = judged.form.size, self.units(inputs) * BLOCK_WINDOWS * inputs.window_tokens
    k = size.k or size.n_latents
    if not sae.has_linear_decoder(size):
      return 0.0
    return tokens * (2 * size.n_latents * size.d_model + 2 * k**2 * (self.steps + size.d_model))
