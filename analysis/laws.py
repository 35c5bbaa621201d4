"""The parametric laws. Each is a sum of exponentials of linear forms in the logarithms of its variables.

That one shape covers every law of Gao et al. 2024 (sections 3.1, 3.2) and gives log loss, its gradient and its
starting points once for all. A new law is one more `Law` object in `LAWS`.
"""

import dataclasses

import numpy as np

from analysis.frames import near
from sae_jax.checks import shown
from sae_jax.errors import UserError

Array = np.ndarray

# Of columns, in formulas.
SYMBOLS = {
  'n_latents': 'n',
  'k': 'k',
  'l0': 'L0',
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


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One constant of a law. Inside the fit it is the coefficient t of a product of log variables."""

  name: str
  meaning: str
  factors: tuple[int, ...]  # axes whose logs are multiplied: () is the constant 1, (0, 1) is ln x0 ln x1
  kind: str = 'coefficient'  # the constant is t; 'amplitude': exp(t); 'exponent': -t

  def outside(self, t: Array) -> Array:
    """Fit coordinate to the published constant. An amplitude too large for float64 becomes inf."""
    if self.kind == 'amplitude':
      with np.errstate(over='ignore'):
        return np.exp(t)
    return -t if self.kind == 'exponent' else t

  def slope(self, t: Array) -> Array:
    """d outside / dt, which carries a standard error to the published constant."""
    return self.outside(t) if self.kind == 'amplitude' else np.full_like(t, -1.0 if self.kind == 'exponent' else 1.0)


@dataclasses.dataclass(frozen=True)
class Law:
  """L(x) = sum over terms of exp(sum over the term's parameters of t * product of logs)."""

  name: str
  formula: str
  latex: str  # <0>, <1> stand for the symbols of the axes
  axes: tuple[str, ...]  # the columns it is usually fitted over, in order
  terms: tuple[tuple[Parameter, ...], ...]
  floor: int | None  # the term that remains when axis 0 grows without bound
  inner: int = 0  # of the last axes: no variables, they tell curves apart by being e inside one and 1 outside

  @property
  def parameters(self) -> tuple[Parameter, ...]:
    return tuple(parameter for term in self.terms for parameter in term)

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(parameter.name for parameter in self.parameters)

  def features(self, u_NQ: Array) -> list[Array]:
    """Per term, the products of log variables its parameters multiply: arrays [N, parameters of the term]."""
    return [
      np.stack([np.prod(u_NQ[:, list(p.factors)], axis=1) for p in term], axis=1)  # an empty product is 1
      for term in self.terms
    ]

  def log_terms(self, theta_MP: Array, u_NQ: Array, features: list[Array] | None = None) -> Array:
    """Logarithm of every term: [terms, M, N]. `features` saves making those of `u_NQ` again."""
    features = features or self.features(u_NQ)
    t_JMN = np.empty((len(features), len(theta_MP), len(u_NQ)))
    start = 0
    for t_MN, f_NP in zip(t_JMN, features, strict=True):
      stop = start + f_NP.shape[1]
      np.matmul(theta_MP[:, start:stop], f_NP.T, out=t_MN)
      start = stop
    return t_JMN

  def log_prediction(
    self, theta_MP: Array, u_NQ: Array, features: list[Array] | None = None
  ) -> tuple[Array, Array, Array]:
    """ln L at N points under M parameter vectors, its gradient, and what share of L each term has.

    Args:
      theta_MP: parameters in fit coordinates.
      u_NQ: natural logarithms of the variables.
      features: those of `u_NQ`, where they are at hand.

    Returns:
      f_MN, jacobian_MNP = df / dtheta, and share_JMN.
    """
    features = features or self.features(u_NQ)
    t_JMN = self.log_terms(theta_MP, u_NQ, features)
    top_MN = t_JMN.max(axis=0)
    share_JMN = np.exp(t_JMN - top_MN)
    total_MN = share_JMN.sum(axis=0)
    share_JMN /= total_MN
    jacobian_MNP = np.concatenate([share[:, :, None] * f for share, f in zip(share_JMN, features, strict=True)], axis=2)
    return top_MN + np.log(total_MN), jacobian_MNP, share_JMN

  def starts(self, u_NQ: Array, v_N: Array, count: int, rng: np.random.Generator) -> Array:
    """Random starting points [count, P] whose terms add up to the data's centre.

    Each term gets a random share of the mean loss there, and each log variable a random change over its range.
    """
    columns = []
    share_MJ = rng.dirichlet(np.ones(len(self.terms)), size=count)
    for j, (term, f_NP) in enumerate(zip(self.terms, self.features(u_NQ), strict=True)):
      constant = [p.factors for p in term].index(())
      spread_P = np.ptp(f_NP, axis=0)
      spread_P[constant] = 1.0
      theta_MP = rng.uniform(-3.0, 1.0, size=(count, len(term))) / spread_P
      theta_MP[:, constant] = 0.0
      level_M = np.log(share_MJ[:, j] + 1e-6) + v_N.mean()
      theta_MP[:, constant] = level_M - theta_MP @ f_NP.mean(axis=0)
      columns.append(theta_MP)
    return np.concatenate(columns, axis=1)

  def outside(self, theta_MP: Array) -> Array:
    """Published constants [M, P] from fit coordinates."""
    return np.stack([p.outside(theta_MP[:, i]) for i, p in enumerate(self.parameters)], axis=1)


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
