"""The error with another number of latents a token than an autoencoder was trained for (Gao et al. 2024, section 5).

    nmse_at_8             with the 8 largest codes of each token
    threshold_nmse_at_8   with the codes above one threshold for all tokens and latents
    threshold_l0_at_8     how many those are on average, a token

The threshold is the one above which tokens of the training windows have 8 latents on average. Both choose among the
codes before the family's own choice: those of a selection are ReLU of its pre-activations. Numbers are the powers of
two up to a limit beyond k, and k. Thresholds end where a family has no more codes above 0.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import inference
from sae_jax.codes import Dense, Sparse
from sae_jax.measures import centre, estimate
from sae_jax.measures.inputs import Inputs
from sae_jax.measures.measure import Judged, Unit, Value

_BEYOND = 4  # times k


@dataclasses.dataclass(frozen=True)
class Progressive:
  """Settings.

  Attributes:
    most: latents a token that are looked at, even where k is far lower.
    fitted_windows: training windows that thresholds are chosen on.
  """

  NAME: ClassVar[str] = 'progressive'

  most: int = 256
  fitted_windows: int = 64

  def units(self, inputs: Inputs) -> int:
    return inputs.blocks('held_out')

  def run(self, unit: int, judged: Judged, inputs: Inputs) -> Unit:
    """One block of held-out windows: for each window the sums over the positions that count."""
    block, form, ks = inputs.block('held_out', unit), judged.form, self._ks(judged)
    thresholds = _thresholds(judged, inputs, ks, self.fitted_windows)

    def run(both: Any, x_WTD: jax.Array) -> dict[str, jax.Array]:
      params, mean_D, thresholds_N = both[1]
      n, _, d_model = x_WTD.shape
      unit_BD = form.unit(x_WTD.reshape(-1, d_model))[0]
      dense = Dense(form.dense(params, unit_BD))
      z_BK, idx_BK, _ = dense.listed(max(ks))

      def error(codes: Sparse | Dense) -> jax.Array:
        return jnp.sum((unit_BD - form.rebuilt(params, codes)) ** 2, axis=-1)

      def above(threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes = dense.above(threshold)
        return error(codes), codes.active()

      by_token = {f'error_{k}': error(Sparse(z_BK[:, :k], idx_BK[:, :k])) for k in ks}
      by_token['square'] = jnp.sum((unit_BD - mean_D[None]) ** 2, axis=-1)
      error_NB, active_NB = jax.lax.map(above, thresholds_N)
      for i, k in enumerate(ks[: len(thresholds)]):
        by_token |= {f'threshold_error_{k}': error_NB[i], f'threshold_l0_{k}': active_NB[i]}
      return {name: a_B.reshape(n, -1) for name, a_B in by_token.items()}

    counted_WTD = block.counted_BD.reshape(*block.places_WT.shape, -1)
    numbers = (judged.params, centre.means(form, inputs)['unit_D'], np.array(thresholds, np.float32))
    found = inputs.over_windows(('progressive', form, ks, len(thresholds)), run, numbers, counted_WTD)
    record = {name: a_WT.sum(axis=1, dtype=np.float64).tolist() for name, a_WT in found.items()}
    return Unit(record | {'tokens': [counted_WTD.shape[1]] * len(counted_WTD)})

  def values(self, units: list[Unit]) -> dict[str, Value]:
    records = [unit.record for unit in units]
    sums = {name: estimate.column(records, name) for name in records[0]}
    parts = [name.rpartition('_') for name in sums if name not in ('square', 'tokens')]
    found = {}
    for what, _, k in sorted(parts, key=lambda part: (part[0], int(part[2]))):
      if what.endswith('error'):
        nmse = estimate.ratio(sums[f'{what}_{k}'], sums['square'], 'share')
        found[f'{what.replace("error", "nmse")}_at_{k}'] = nmse
      else:
        found[f'{what}_at_{k}'] = estimate.ratio(sums[f'{what}_{k}'], sums['tokens'], 'latents a token')
    return found

  def flops(self, judged: Judged, inputs: Inputs) -> float:
    size, ks = judged.form.size, self._ks(judged)
    tokens = inputs.count('held_out') * inputs.window_tokens
    fitted = min(self.fitted_windows, inputs.count('train')) * inputs.window_tokens
    return 2 * size.d_model * (tokens * ((1 + len(ks)) * size.n_latents + sum(ks)) + fitted * size.n_latents)

  def _ks(self, judged: Judged) -> tuple[int, ...]:
    n, k = judged.form.size.n_latents, judged.form.size.k or 1
    limit = min(max(self.most, _BEYOND * k), n)
    return tuple(sorted({2**i for i in range(limit.bit_length())} | {min(k, n)}))


@functools.lru_cache(maxsize=1)
def _thresholds(judged: Judged, inputs: Inputs, ks: tuple[int, ...], windows: int) -> tuple[float, ...]:
  """The threshold of each k, as far as there are codes above 0."""
  some, left = [], min(windows, inputs.count('train'))
  for i in range(inputs.blocks('train')):
    block = inputs.block('train', i)
    some.append(block.counted_BD[: left * block.places_WT.shape[1]])
    left -= min(left, len(block.windows))
    if not left:
      break
  form, x_BD = judged.form, np.concatenate(some)
  dense = jax.jit(lambda params, x_RD: form.dense(params, form.unit(x_RD)[0]))
  counts = [k * len(x_BD) for k in ks]
  found, _ = inference.largest(lambda x_RD: dense(judged.params, x_RD), x_BD, form.size.n_latents, max(counts) + 1)
  return tuple(float(found[count]) for count in counts if count < len(found))
