"""Gemma 3 270M, the middle of its 18 layers, State of the Union speeches: the cells of `make demo SUBJECT=gemma3-270m`.

python -m sae_jax.data.harvest --config=experiments/demo_gemma.py --out=runs/demo-gemma3-270m/store
python -m sae_jax.train --config=experiments/demo_gemma.py --workdir=runs/demo-gemma3-270m/one

The weights come under the Gemma Terms of Use. Everything but the subject, the site and the place is as in
experiments/demo.py. The learning rate was not tuned again: 14 to 59 % of the latents end dead, so a smaller one may do better.
Expect NMSE .148 for n = 4,096, k = 32; 25 minutes on two cores busy with other work (2026-11-29).
"""

import ml_collections

from experiments import demo


def get_config() -> ml_collections.ConfigDict:
  c = demo.get_config()
  c.data.path = 'runs/demo-gemma3-270m/store'
  c.data.subject = 'gemma3-270m'
  c.data.site = 'resid_post.8'
  return c
