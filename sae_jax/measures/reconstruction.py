"""How well activations are reconstructed, by every definition in use, under the names that others use.

x is an activation at a held-out position that counts, x_hat its reconstruction, mean x the mean of all of these.
Values are in the space that the autoencoder reads; with `raw_` before the name in that of the subject, where few
positions of massive norm can outweigh the rest.

    nmse                          sum |x - x_hat|^2 / sum |x - mean x|^2, as evaluations here have it; sparsify: FVU
    mse                           mean over positions and components of (x - x_hat)^2
    per_token_nmse                mean of |x - x_hat|^2 / |x|^2; OpenAI: normalized_mean_squared_error
    explained_variance            1 - nmse; SAELens since version 6, with raw_
    explained_variance_legacy     mean of 1 - |x - x_hat|^2 / |x - mean x|^2; earlier SAELens and SAEBench, with raw_
    cosine_similarity             mean of the cosine between x and x_hat
    l2_ratio                      mean of |x_hat| / |x|: below 1 where an autoencoder shrinks
    relative_reconstruction_bias  sum |x_hat|^2 / sum x . x_hat; gamma of Rajamanoharan et al. 2024, section 4.1
    nmse_about_b_pre              sum |x - x_hat|^2 / sum |x - b_pre|^2: what is left of what the latents are for
    raw_frac_variance_explained   1 - variance of x - x_hat / variance of x in a block of windows, mean over blocks;
                                  dictionary_learning. An error that all positions share does not count
    l0_raw, l0_ema                latents a token that are not 0, with the raw and with the averaged weights
    massive_share                 positions whose norm is more than ten times the median of their window
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.data import windows
from sae_jax.measures import centre, estimate
from sae_jax.measures.inputs import Inputs
from sae_jax.measures.measure import Judged, Unit, Value

_TINY = 1e-30  # stands below what is 0


@dataclasses.dataclass(frozen=True)
class Reconstruction:
  NAME: ClassVar[str] = 'reconstruction'

  def units(self, inputs: Inputs) -> int:
    return inputs.blocks('held_out')

  def run(self, unit: int, judged: Judged, inputs: Inputs) -> Unit:
    """One block of held-out windows: for each window the sums over the positions that count."""
    block, form = inputs.block('held_out', unit), judged.form

    def run(both: Any, x_WTD: jax.Array) -> dict[str, jax.Array]:
      params, other, means = both[1]
      n, _, d_model = x_WTD.shape
      x_BD = x_WTD.reshape(-1, d_model)
      unit_BD, mean_B1, norm_B1 = form.unit(x_BD)
      codes = form.codes(params, unit_BD)
      x_hat_BD = form.rebuilt(params, codes)
      raw_hat_BD = x_hat_BD * norm_B1 + mean_B1
      by_token = _compared(unit_BD, x_hat_BD, means['unit_D'][None])
      by_token |= {f'raw_{name}': a_B for name, a_B in _compared(x_BD, raw_hat_BD, means['raw_D'][None]).items()}
      by_token |= {'about_b_pre': jnp.sum((unit_BD - params['b_pre_D'][None]) ** 2, axis=-1), 'l0': codes.active()}
      if other is not None:
        by_token['other_l0'] = form.codes(other, unit_BD).active()
      found = {name: a_B.reshape(n, -1) for name, a_B in by_token.items()}
      residual_WTD = x_WTD - raw_hat_BD.reshape(x_WTD.shape)
      return found | {'residual_WD': residual_WTD.sum(axis=1), 'x_WD': (x_WTD - means['raw_D'][None, None]).sum(axis=1)}

    counted_WTD = block.counted_BD.reshape(*block.places_WT.shape, -1)
    numbers = (judged.params, judged.other, centre.means(form, inputs))
    found = inputs.over_windows(('reconstruction', form), run, numbers, counted_WTD)
    residual_D, x_D = (found.pop(name).sum(axis=0, dtype=np.float64) for name in ('residual_WD', 'x_WD'))
    names = {'l0': f'l0_{judged.weights}', 'other_l0': f'l0_{"raw" if judged.weights == "ema" else "ema"}'}
    sums_W = {names.get(name, name): a_WT.sum(axis=1, dtype=np.float64) for name, a_WT in found.items()}
    tokens, d_model = counted_WTD.shape[1:]
    # Sums of squares about the means of this block.
    left, whole = (
      sums_W[f'raw_{name}'].sum() - a_D @ a_D / counted_WTD[..., 0].size
      for name, a_D in (('error', residual_D), ('square', x_D))
    )
    norm_WT = np.linalg.norm(block.x_WTD, axis=-1)
    massive_WT = norm_WT > windows.MASSIVE * np.median(norm_WT, axis=1, keepdims=True)
    sums_W |= {
      'tokens': np.full(len(counted_WTD), tokens),
      'numbers': np.full(len(counted_WTD), tokens * d_model),
      'massive': np.take_along_axis(massive_WT, block.places_WT, axis=1).sum(axis=1),
    }
    return Unit({name: a_W.tolist() for name, a_W in sums_W.items()} | {'frac_variance': float(1 - left / whole)})

  def values(self, units: list[Unit]) -> dict[str, Value]:
    records = [unit.record for unit in units]
    sums = {name: estimate.column(records, name) for name in records[0]}
    tokens = sums['tokens']
    found = {
      'nmse_about_b_pre': estimate.ratio(sums['error'], sums['about_b_pre'], 'share'),
      # Of blocks, not of windows: without an error that windows could be paired for.
      'raw_frac_variance_explained': Value(float(sums['frac_variance'].mean()), None, 'share'),
      'massive_share': estimate.ratio(sums['massive'], tokens, 'share'),
    }
    for name in ('l0_raw', 'l0_ema'):
      if name in sums:
        found[name] = estimate.ratio(sums[name], tokens, 'latents a token')
    for space in ('', 'raw_'):
      part = {name.removeprefix(space): a_U for name, a_U in sums.items() if name.startswith(space)}
      nmse = estimate.ratio(part['error'], part['square'], 'share')
      legacy = estimate.ratio(part['legacy'], tokens, 'share')
      own = {
        'nmse': nmse,
        'mse': estimate.ratio(part['error'], sums['numbers'], 'squared units'),
        'per_token_nmse': estimate.ratio(part['relative'], tokens, 'share'),
        'explained_variance': dataclasses.replace(nmse, value=1 - nmse.value),
        'explained_variance_legacy': dataclasses.replace(legacy, value=1 - legacy.value),
        'cosine_similarity': estimate.ratio(part['cosine'], tokens, 'cosine'),
        'l2_ratio': estimate.ratio(part['length'], tokens, 'ratio'),
        'relative_reconstruction_bias': estimate.ratio(part['hat_square'], part['dot'], 'ratio'),
      }
      found |= {space + name: value for name, value in own.items()}
    return found

  def flops(self, judged: Judged, inputs: Inputs) -> float:
    size = judged.form.size
    encoded = 1 if judged.other is None else 2
    return inputs.count('held_out') * inputs.window_tokens * (encoded + 1) * 2 * size.n_latents * size.d_model


def _compared(x_BD: jax.Array, x_hat_BD: jax.Array, mean_1D: jax.Array) -> dict[str, jax.Array]:
  """What each token adds to the sums of one space."""

  def dot(a_BD: jax.Array, b_BD: jax.Array) -> jax.Array:
    return jnp.sum(a_BD * b_BD, axis=-1)

  error_B, own_B, hat_B = (dot(a_BD, a_BD) for a_BD in (x_BD - x_hat_BD, x_BD, x_hat_BD))
  square_B = dot(x_BD - mean_1D, x_BD - mean_1D)
  return {
    'error': error_B,
    'square': square_B,
    'relative': error_B / jnp.maximum(own_B, _TINY),
    'legacy': error_B / jnp.maximum(square_B, _TINY),
    'cosine': dot(x_BD, x_hat_BD) / jnp.maximum(jnp.sqrt(own_B * hat_B), _TINY),
    'length': jnp.sqrt(hat_B / jnp.maximum(own_B, _TINY)),
    'hat_square': hat_B,
    'dot': dot(x_BD, x_hat_BD),
  }
