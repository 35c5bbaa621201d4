"""What a law is: a sum of exponentials of linear forms in the logarithms of its variables.

That one shape gives log loss, its gradient and its starting points once for all laws. The laws are in `laws`.
"""

import dataclasses

import numpy as np

Array = np.ndarray


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
