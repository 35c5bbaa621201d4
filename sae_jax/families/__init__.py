"""Kinds of autoencoders, one file each, and AuxK. Their shared skeleton is `sae_jax.sae`."""
