"""How much of the predictions a latent touches: ablation sparsity (Gao et al. 2024).

At one token of a window, t, the contribution of a latent is taken out of the activation. The model runs on, and v is how
its logits change at T positions, t the first, less the median over the vocabulary at each position. Then

    sparsity = (|v|_1 / |v|_2)^2 / length of v

is about the share of (token, position) pairs that change: 2/pi for a Gaussian v, the least for a single entry. Lower is
sparser. Every value is a mean over pairs of a place (window, t) and what is edited there.

    latent     z W_dec of a latent is subtracted, times the norm that normalisation divided the token by
    channel    a number of the activation becomes 0
    random     a random direction is subtracted, as long at each place as the edits of its latents at t
    ..._once   edited at t
    ..._all    edited at all T positions; a latent is taken out where it is active, as strongly as it is there

    latent_over_channel_once, latent_over_channel_all   mean of latents over that of channels at the same places

Places, channels and random directions depend on the seed, and are the same for all autoencoders. The latents of a place
are drawn from those active at t. Positions that do not count stay as they are. An edit that changes nothing has no
sparsity: `left_out` says how many such pairs there were. An autoencoder whose reconstruction is not a sum of latents gets
no values.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from sae_jax import sae
from sae_jax.data.order import permutation
from sae_jax.measures import estimate
from sae_jax.measures.active import active
from sae_jax.measures.inputs import BLOCK_WINDOWS, Inputs
from sae_jax.measures.measure import Judged, Unit, Value
from sae_jax.subjects.subject import Cache

_VARIANTS = ('once', 'all')


class Place(NamedTuple):
  """Where edits are made, and what the undisturbed model does there.

  Attributes:
    window: which of the held-out windows.
    start: t.
    x_SD: activations at the T positions, raw.
    counts_S: which of these positions count.
    cache: of the window.
    clean_SV: logits.
  """

  window: int
  start: int
  x_SD: np.ndarray
  counts_S: np.ndarray
  cache: Cache
  clean_SV: np.ndarray


@dataclasses.dataclass(frozen=True)
class Ablation:
  """Settings.

  Attributes:
    places: how many, each in a window of its own; fewer where there are fewer windows.
    edits: of each kind at a place; fewer where fewer latents are active, or activations have fewer numbers.
    positions: T; fewer where fewer count in a window.
    seed: of all that is drawn.
  """

  NAME: ClassVar[str] = 'ablation'

  places: int = 16
  edits: int = 8
  positions: int = 16
  seed: int = 0

  def units(self, inputs: Inputs) -> int:
    return min(self.places, inputs.count('held_out'))

  def run(self, unit: int, judged: Judged, inputs: Inputs) -> Unit:
    """One place: for each kind of edit the sum of sparsities, and how many pairs have one."""
    if not sae.has_linear_decoder(judged.form.size):
      return Unit({})
    place = self.place(unit, inputs)
    drawn = self._drawn(place, inputs)
    latent_ESD = self.contributions(place, judged, inputs)
    length_E11 = np.linalg.norm(latent_ESD[:, :1], axis=-1, keepdims=True)
    random_ESD = length_E11 * drawn['direction_ED'][: len(latent_ESD), None] * place.counts_S[:, None]
    both_PSD = np.concatenate([latent_ESD, random_ESD])
    by_variant_2KE = sparsities(_variants(place.x_SD - both_PSD, place), place, inputs).reshape(2, 2, -1)
    latent_2E, random_2E = by_variant_2KE.transpose(1, 0, 2)
    record = {}
    for kind, found_2E in (('latent', latent_2E), ('channel', drawn['channel_2E']), ('random', random_2E)):
      for variant, found_E in zip(_VARIANTS, found_2E, strict=True):
        record |= {f'{kind}_{variant}': float(np.nansum(found_E)), f'{kind}_{variant}_pairs': int((found_E > 0).sum())}
    return Unit(record | {'left_out': int(np.isnan(by_variant_2KE).sum() + np.isnan(drawn['channel_2E']).sum())})

  def values(self, units: list[Unit]) -> dict[str, Value]:
    records = [unit.record for unit in units if unit.record]
    if not records:
      return {}
    sums = {name: estimate.column(records, name) for name in records[0]}
    found = {'left_out': Value(float(sums['left_out'].sum()), None, 'pairs')}
    for variant in _VARIANTS:
      for kind in ('latent', 'channel', 'random'):
        pairs_U = sums[f'{kind}_{variant}_pairs']
        if pairs_U.any():
          found[f'{kind}_{variant}'] = estimate.ratio(sums[f'{kind}_{variant}'], pairs_U, 'share')
      # Channels weigh as much at each place as latents do.
      mean_U = sums[f'channel_{variant}'] / np.maximum(sums[f'channel_{variant}_pairs'], 1)
      weighed_U = mean_U * sums[f'latent_{variant}_pairs']
      if weighed_U.any():
        found[f'latent_over_channel_{variant}'] = estimate.ratio(sums[f'latent_{variant}'], weighed_U, 'ratio')
    return found

  def flops(self, judged: Judged, inputs: Inputs) -> float:
    """With as many latents at each place as are asked for."""
    subject, size = inputs.subject, judged.form.size
    if not sae.has_linear_decoder(size):
      return 0.0
    last = f'resid_post.{subject.arch.n_layers - 1}'
    blocks = subject.flops(last, inputs.window_tokens) - subject.flops(inputs.site, inputs.window_tokens)
    edited = blocks + 2 * subject.arch.d_model * subject.arch.vocabulary
    tokens = self.units(inputs) * self.positions
    return tokens * (2 * len(_VARIANTS) * self.edits * edited + 2 * size.n_latents * size.d_model)

  def place(self, unit: int, inputs: Inputs) -> Place:
    """A place: its window is drawn from all, and t from the positions that count with T - 1 more after them."""
    window = int(permutation(inputs.count('held_out'), 'ablation windows', self.seed)[unit])
    block, row = inputs.block('held_out', window // BLOCK_WINDOWS), window % BLOCK_WINDOWS
    counting_T = block.places_WT[row]
    length = min(self.positions, len(counting_T))
    fit = counting_T[counting_T + length <= inputs.window_tokens]
    start = int(fit[permutation(len(fit), 'ablation position', self.seed, window)[0]])
    here = slice(start, start + length)
    x_SD, counts_S = block.x_WTD[row, here], np.isin(np.arange(inputs.window_tokens)[here], counting_T)

    def make() -> dict[str, np.ndarray]:
      cache = inputs.subject.prefix(block.windows.ids_WT[row : row + 1], inputs.site)
      fields = {field.name: getattr(cache, field.name) for field in dataclasses.fields(cache)}
      known = {name: np.asarray(field) for name, field in fields.items() if field is not None}
      # By the program that edits go through, so that no edit is no change.
      return known | {'clean_SV': _logits(x_SD[None], cache, start, inputs)[0]}

    kept = inputs.kept(f'ablation.{start}.{length}.{window}', make)
    cache = Cache(kept.get('x_1TD'), kept['k_LTGC'], kept['v_LTGC'], int(kept['first']))
    return Place(window, start, x_SD, counts_S, cache, kept['clean_SV'])

  def contributions(self, place: Place, judged: Judged, inputs: Inputs) -> np.ndarray:
    """What latents active at t add to the activations at a place, in the space of the model: [E, S, D]."""
    position_A, latent_A, value_A = active(place.x_SD[:, None], judged, inputs)
    chosen = np.sort(latent_A[position_A == 0])
    chosen = chosen[permutation(len(chosen), 'ablation latents', self.seed, place.window)[: self.edits]]
    z_ES = np.zeros((len(chosen), len(place.x_SD)), np.float32)
    for e, latent in enumerate(chosen):
      own_A = latent_A == latent
      z_ES[e, position_A[own_A]] = value_A[own_A]
    norm_S1 = np.asarray(judged.form.unit(place.x_SD)[2])
    rows_ED = np.asarray(judged.params['w_dec_FD'][chosen], np.float32)
    return (z_ES * place.counts_S)[..., None] * norm_S1 * rows_ED[:, None]

  def _drawn(self, place: Place, inputs: Inputs) -> dict[str, np.ndarray]:
    """What all autoencoders have at a place: the sparsities of channels, and random directions of length 1."""
    width = place.x_SD.shape[1]

    def make() -> dict[str, np.ndarray]:
      direction_ED = np.random.default_rng([self.seed, place.window]).standard_normal((self.edits, width))
      direction_ED = (direction_ED / np.linalg.norm(direction_ED, axis=1, keepdims=True)).astype(np.float32)
      channels = permutation(width, 'ablation channels', self.seed, place.window)[: self.edits]
      edited_ESD = np.repeat(place.x_SD[None], len(channels), axis=0)
      for e, channel in enumerate(channels):
        edited_ESD[e, place.counts_S, channel] = 0
      channel_2E = sparsities(_variants(edited_ESD, place), place, inputs).reshape(2, -1)
      return {'direction_ED': direction_ED, 'channel_2E': channel_2E}

    return inputs.kept(f'ablation.{place.start}.{len(place.x_SD)}.{place.window}.{self.edits}.{self.seed}', make)


def sparsity(change_PSV: np.ndarray) -> np.ndarray:
  """The sparsity [P] of changes of logits; nan where nothing changes."""
  v_PSV = change_PSV - np.median(change_PSV, axis=-1, keepdims=True)
  one_P = np.abs(v_PSV).sum(axis=(1, 2), dtype=np.float64)
  two_P = np.square(v_PSV).sum(axis=(1, 2), dtype=np.float64)
  return np.divide(one_P**2, two_P * v_PSV[0].size, out=np.full(len(v_PSV), np.nan), where=two_P > 0)


def sparsities(edited_PSD: np.ndarray, place: Place, inputs: Inputs) -> np.ndarray:
  """The sparsity [P] of each edit of a place; nan for one that changes nothing. Logits exist for a few edits at a time."""
  found_P = np.full(len(edited_PSD), np.nan)
  changed = np.flatnonzero((edited_PSD != place.x_SD).any(axis=(1, 2)))
  for first in range(0, len(changed), BLOCK_WINDOWS):
    some = changed[first : first + BLOCK_WINDOWS]
    found_P[some] = sparsity(_logits(edited_PSD[some], place.cache, place.start, inputs) - place.clean_SV)
  return found_P


def _logits(x_PSD: np.ndarray, cache: Cache, start: int, inputs: Inputs) -> np.ndarray:
  """Logits [P, S, V] with these activations from `start` on."""

  def run(both: Any, x_PSD: jax.Array) -> jax.Array:
    params, (cache, start) = both
    return dataclasses.replace(inputs.subject, params=params).logits_from(cache, x_PSD, inputs.site, start)

  return inputs.over_windows('ablation', run, (cache, np.int32(start)), x_PSD)


def _variants(edited_PSD: np.ndarray, place: Place) -> np.ndarray:
  """Edits at t alone, then the same at all positions: [2 P, S, D]."""
  once_PSD = np.repeat(place.x_SD[None], len(edited_PSD), axis=0)
  once_PSD[:, 0] = edited_PSD[:, 0]
  return np.concatenate([once_PSD, edited_PSD])
