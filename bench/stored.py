"""The rows of a store on this machine by numpy alone, for environments that hold neither tensorstore nor jax."""

import json
import pathlib

import numpy as np

from sae_jax.data import order


class Stored:
  """What `sae_jax.data.store.Store` reads, bit for bit and in the same order, but unchecked. Blocks are mapped, not held."""

  def __init__(self, path: str):
    self._path = pathlib.Path(path)
    meta = json.loads((self._path / 'store.json').read_text())
    self.d_model, self._dtype = meta['d_model'], np.dtype(meta['config']['dtype']).newbyteorder('<')
    tokens = {'train': meta['tokens'], 'held_out': meta['held_out_tokens']}
    self._streams = {name: order.Stream(n, meta['block_tokens'], meta['config']['seed']) for name, n in tokens.items()}

  def rows(self, start: int, stop: int) -> np.ndarray:
    """Training tokens start..stop, float32 [stop - start, D]."""
    return self._rows('train', start, stop)

  def held_out(self, start: int, stop: int) -> np.ndarray:
    """Held-out tokens start..stop, float32 [stop - start, D]."""
    return self._rows('held_out', start, stop)

  def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
    parts = [
      np.memmap(self._path / name / 'c' / str(block) / '0', self._dtype, 'r').reshape(-1, self.d_model)[first:last]
      for block, first, last in self._streams[name].locate(start, stop)
    ]
    return np.concatenate(parts, dtype=np.float32)
