"""A site of one autoencoder's latents, which works offline: python -m sae_jax.pages --cell=DIR --out=DIR."""
