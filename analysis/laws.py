"""The laws that a fit can be asked for by name, and the symbols of their variables.

They are those of Gao et al. 2024 (sections 3.1, 3.2). A new law is a file with a `Law`, and its entry in `LAWS`.
"""

from analysis.frames import near
from analysis.law import Law, Parameter
from sae_jax.checks import shown
from sae_jax.errors import UserError

# Of columns, in formulas.
SYMBOLS = {
  'n_latents': 'n',
  'k': 'k',
  'l0': 'L0',
  'nmse': 'NMSE',
  'tokens': 'T',
  'flops_useful': 'C',
  'flops_dense': 'C',
  'budget': 'C',
}
# Of what a law gives; else it is a loss L.
QUANTITIES = {
  'n_latents': 'n',
  'learning_rate': 'lr',
  'converged_tokens': 'T',
}


_E = Parameter('e', 'irreducible loss, in the unit of y', (), 'amplitude')
_POWER = (
  Parameter('a', 'loss above e at x = 1, in the unit of y', (), 'amplitude'),
  Parameter('b', 'exponent of x, without unit', (0,), 'exponent'),
)
_JOINT = (
  Parameter('alpha', 'log of the reducible loss at n = k = 1', ()),
  Parameter('beta_k', 'exponent of k at n = 1', (1,)),
  Parameter('beta_n', 'exponent of n at k = 1; at any other k it is beta_n + gamma ln k', (0,)),
  Parameter('gamma', 'change of the exponent of n per unit of ln k', (0, 1)),
)
_JOINT_FLOOR = (
  Parameter('zeta', 'log of the irreducible loss at k = 1', ()),
  Parameter('eta', 'exponent of k in the irreducible loss', (1,)),
)

POWER = Law('power', 'L(x) = e + a x^-b', r'e + a\,<0>^{-b}', ('n_latents',), terms=((_E,), _POWER), floor=0)
POWER_NO_FLOOR = Law('power_no_floor', 'L(x) = a x^-b', r'a\,<0>^{-b}', ('n_latents',), terms=(_POWER,), floor=None)
# As power_no_floor, with the sign of what grows: tokens to convergence, best sizes, downstream loss.
GROWTH = Law(
  'growth',
  'y(x) = c x^p',
  r'c\,<0>^{p}',
  ('n_latents',),
  terms=(
    (
      Parameter('c', 'value at x = 1, in the unit of y', (), 'amplitude'),
      Parameter('p', 'exponent of x, without unit: y grows where it is positive', (0,)),
    ),
  ),
  floor=None,
)
JOINT_NK = Law(
  'joint_nk',
  'L(n,k) = exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n) + exp(zeta + eta ln k)',
  r'e^{\alpha + \beta_k \ln <1> + \beta_n \ln <0> + \gamma \ln <1> \ln <0>} + e^{\zeta + \eta \ln <1>}',
  ('n_latents', 'k'),
  terms=(_JOINT, _JOINT_FLOOR),
  floor=1,
)
JOINT_NK_NO_FLOOR = Law(
  'joint_nk_no_floor',
  'L(n,k) = exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n)',
  r'e^{\alpha + \beta_k \ln <1> + \beta_n \ln <0> + \gamma \ln <1> \ln <0>}',
  ('n_latents', 'k'),
  terms=(_JOINT,),
  floor=None,
)
ADDITIVE2 = Law(
  'additive2',
  'L(x1,x2) = e + a x1^-alpha + b x2^-beta',
  r'e + a\,<0>^{-\alpha} + b\,<1>^{-\beta}',
  ('n_latents', 'tokens'),
  terms=(
    (_E,),
    (
      Parameter('a', 'loss of the first term at x1 = 1, in the unit of y', (), 'amplitude'),
      Parameter('alpha', 'exponent of x1, without unit', (0,), 'exponent'),
    ),
    (
      Parameter('b', 'loss of the second term at x2 = 1, in the unit of y', (), 'amplitude'),
      Parameter('beta', 'exponent of x2, without unit', (1,), 'exponent'),
    ),
  ),
  floor=0,
)

LAWS = {law.name: law for law in (POWER, POWER_NO_FLOOR, GROWTH, JOINT_NK, JOINT_NK_NO_FLOOR, ADDITIVE2)}


def named(name: str) -> Law:
  """The law of that name. Raises `UserError`."""
  if not isinstance(name, str) or name not in LAWS:
    raise UserError(f'law {shown(name)} is not known; use one of {", ".join(LAWS)}{near(name, LAWS)}')
  return LAWS[name]
