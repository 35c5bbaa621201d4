"""Kinds of autoencoders, one file each, and AuxK. Their shared skeleton is `sae_jax.sae`; `family` finds one by name.

A family's file loads jax, and commands that only look at a ledger must not. So each is imported when it is first
asked for as an attribute of this package.
"""

import importlib
import types


def __getattr__(name: str) -> types.ModuleType:
  if name.startswith('_'):
    raise AttributeError(name)
  return importlib.import_module(f'{__name__}.{name}')
