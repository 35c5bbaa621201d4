"""Files that are pickles, or may hold them: never read, and refused with the three lines that convert them.

Reading a pickle runs code that its writer chose.
"""

import pathlib
import zipfile

from sae_jax.errors import UserError

_SUFFIXES = ('.pt', '.pth', '.ckpt', '.pkl', '.pickle', '.joblib', '.npz')
_TORCH = ('.pt', '.pth', '.ckpt', '.bin')
_OLD_TORCH = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # the magic number of files from before torch 1.6
_HEADER = 256  # bytes of a member of an archive that tell its type


def refuse(path: str) -> None:
  """Raises `UserError` when a file is a pickle, holds one, or is an archive of arrays; any other file passes."""
  target, suffix = pathlib.Path(path), pathlib.Path(path).suffix.lower()
  try:
    with open(path, 'rb') as f:
      head = f.read(_HEADER)
  except FileNotFoundError:
    if suffix in _SUFFIXES:
      raise UserError(f'{path} does not exist; name a .npy or .safetensors file') from None
    return
  except OSError:
    return
  npy, tensors = (repr(target.with_suffix(s).name) for s in ('.npy', '.safetensors'))
  if npy == repr(target.name):
    npy = repr(f'{target.stem}-plain.npy')
  torch = (
    'import torch, safetensors.torch',
    f'x = torch.load({path!r}, weights_only=True)',
    f"safetensors.torch.save_file({{'acts': x.contiguous()}}, {tensors})",
  )
  if head.startswith(b'PK\x03\x04'):
    names, pickles = _members(path)
    if any(name.endswith('data.pkl') for name in names):
      _refuse(path, True, torch)
    if arrays := [name.removesuffix('.npy') for name in names if name.endswith('.npy')]:
      allow, plain = (', allow_pickle=True', 'numpy.stack(list(x))') if pickles else ('', 'x')
      load = f'x = numpy.load({path!r}{allow})[{arrays[0]!r}]'
      _refuse(path, pickles, ('import numpy', load, f"numpy.save({npy}, {plain}.astype('f4'))"))
    if suffix in _TORCH:
      _refuse(path, True, torch)
  elif head.startswith(b'\x93NUMPY') and b"'|O" in head:
    load = f'x = numpy.load({path!r}, allow_pickle=True)'
    _refuse(path, True, ('import numpy', load, f"numpy.save({npy}, numpy.stack(list(x)).astype('f4'))"))
  elif head.startswith(_OLD_TORCH) or suffix in _TORCH[:-1]:
    _refuse(path, True, torch)
  elif (head[:1] == b'\x80' and head[1:2] in b'\2\3\4\5' and len(head) > 1) or suffix in _SUFFIXES:
    load = f'x = numpy.load({path!r}, allow_pickle=True)'  # it reads plain pickles, too
    _refuse(path, True, ('import numpy', load, f"numpy.save({npy}, numpy.asarray(x, 'f4'))"))


def _refuse(path: str, pickles: bool, lines: tuple[str, str, str]) -> None:
  what = (
    'is or holds a pickle, which runs code when it is read; if you trust it'
    if pickles
    else 'is an archive of arrays; take one out'
  )
  raise UserError(f'{path} {what}, these three lines convert it: {"; ".join(lines)}')


def _members(path: str) -> tuple[list[str], bool]:
  """Names in a zip archive, and whether an array among them holds objects."""
  try:
    with zipfile.ZipFile(path) as archive:
      names = archive.namelist()
      heads = []
      for name in names[:100]:
        if name.endswith('.npy'):
          with archive.open(name) as member:
            heads.append(member.read(_HEADER))
      return names, any(b"'|O" in head for head in heads)
  except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError):
    return [], False
