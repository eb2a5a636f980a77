"""Scaling laws fitted to measured losses: parabolas at equal compute, power laws, and losses in closed form of size, data and epochs.

    curve = isoflop(sizes, losses)                       # at one budget: curve.size, curve.loss at the optimum
    law = power_law(budgets, [curve.size for curve in curves])
    low, high = interval(lambda y: [isoflop(sizes, y).size], losses, curve(sizes), parameters=3)[0]

Losses in nats a token, sizes in parameters, data in tokens, compute in FLOPs. Sources: IsoFLOP and the parametric form, Hoffmann et al. (arXiv
2203.15556) sections 3.2 and 3.3; repeated data, Muennighoff et al. (arXiv 2305.16264).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from llada_jax.config import ConfigError

HUBER = 1e-3  # of residuals of log loss, where the robust loss turns from square to straight (Hoffmann et al.)


class IsoFlop(NamedTuple):
    """Loss over log size at one budget, a parabola, and its lowest point."""

    size: float
    loss: float
    curvature: float  # half the second derivative over log size; positive
    inside: bool  # whether the lowest point lies between the smallest and the largest measured size

    def __call__(self, size: ArrayLike) -> np.ndarray:
        return self.loss + self.curvature * (np.log(size) - np.log(self.size)) ** 2


class PowerLaw(NamedTuple):
    """y = factor · x^exponent."""

    factor: float
    exponent: float

    def __call__(self, x: ArrayLike) -> np.ndarray:
        return self.factor * np.asarray(x, float) ** self.exponent

    def inverse(self, y: float) -> float:
        """The x at which the law gives y."""
        return float((y / self.factor) ** (1 / self.exponent))


class Optimum(NamedTuple):
    """The best size at each budget and laws of compute through these points (SMDM, arXiv 2410.18514, section 4)."""

    by_size: list[IsoFlop]  # parabolas over log size, by rising budget
    by_tokens: list[IsoFlop]  # the same over log tokens
    size: PowerLaw
    tokens: PowerLaw
    loss: PowerLaw


class Loss(NamedTuple):
    """E + A / N^a + B / D'^b, with D' = U (1 + R* (1 - exp(-(epochs - 1) / R*))) of U tokens seen so many epochs."""

    floor: float  # E
    size_factor: float  # A
    size_exponent: float  # a
    data_factor: float  # B
    data_exponent: float  # b
    repeats: float = float("inf")  # R*: after so many repeats, 1/e of what new data would bring is left; infinite: repeats are as good as new data

    def __call__(self, size: ArrayLike, tokens: ArrayLike, epochs: ArrayLike = 1.0) -> np.ndarray:
        """Of a model of `size` after `epochs` over `tokens` unique ones."""
        data = np.asarray(tokens, float) * (1 + effective_repeats(np.asarray(epochs, float) - 1, self.repeats))
        return self.floor + self.size_factor / np.asarray(size, float) ** self.size_exponent + self.data_factor / data**self.data_exponent


def _checked(positive: Sequence[str] = (), **given: ArrayLike) -> list[np.ndarray]:
    """Float arrays. Raises ConfigError where lengths differ, where a number is not finite, and where one of `positive` is not above 0."""
    arrays = {name: np.atleast_1d(np.asarray(values, float)) for name, values in given.items()}
    if len({a.shape for a in arrays.values()}) > 1:
        raise ConfigError("one number a measurement: " + ", ".join(f"{len(a)} {name}" for name, a in arrays.items()))
    for name, a in arrays.items():
        wrong = ~np.isfinite(a) | ((a <= 0) if name in positive else False)
        if wrong.any():
            raise ConfigError(f"{name} number {int(wrong.argmax())} is {a[wrong][0]}; leave that measurement out")
    return list(arrays.values())


def effective_repeats(repeats: np.ndarray, scale: float) -> np.ndarray:
    """Epochs of new data that so many repeats are worth."""
    return repeats if np.isinf(scale) else scale * -np.expm1(-repeats / scale)


def isoflop(sizes: ArrayLike, losses: ArrayLike) -> IsoFlop:
    """Least squares over log size. Raises ConfigError for fewer than three sizes, and for losses without a lowest point."""
    x, y = _checked(["sizes"], sizes=sizes, losses=losses)
    x = np.log(x)
    if len(np.unique(x)) < 3:
        raise ConfigError(f"a parabola needs three sizes, not {len(np.unique(x))}")
    middle = x.mean()
    curvature, slope, height = np.polyfit(x - middle, y, 2)
    if curvature * (x.max() - x.min()) ** 2 <= 1e-9 * np.abs(y).max():
        raise ConfigError(f"these losses have no lowest point over size (curvature {curvature:.3g}); measure smaller or larger models")
    best = middle - slope / (2 * curvature)
    return IsoFlop(float(np.exp(best)), float(height - slope**2 / (4 * curvature)), float(curvature), bool(x.min() < best < x.max()))


def power_law(x: ArrayLike, y: ArrayLike) -> PowerLaw:
    """Least squares of log y over log x. Raises ConfigError for fewer than two different x."""
    x, y = map(np.log, _checked(["x", "y"], x=x, y=y))
    if len(np.unique(x)) < 2:
        raise ConfigError(f"a power law needs two points, not {len(np.unique(x))}")
    exponent, height = np.polyfit(x, y, 1)
    return PowerLaw(float(np.exp(height)), float(exponent))


def optimum(budgets: ArrayLike, sizes: ArrayLike, tokens: ArrayLike, losses: ArrayLike) -> Optimum:
    """Of measurements at two or more budgets, one entry a run each. Raises ConfigError where a parabola has no lowest point."""
    budgets, sizes, tokens, losses = _checked(["budgets", "sizes", "tokens"], budgets=budgets, sizes=sizes, tokens=tokens, losses=losses)
    found, different = [], np.unique(budgets)
    for x in (sizes, tokens):
        found.append([isoflop(x[budgets == budget], losses[budgets == budget]) for budget in different])
    laws = (power_law(different, [getattr(curve, name) for curve in curves])
            for curves, name in ((found[0], "size"), (found[1], "size"), (found[0], "loss")))
    return Optimum(*found, *laws)


def fitted(found: Optimum, budgets: ArrayLike, sizes: ArrayLike) -> np.ndarray:
    """Losses on the parabolas, one a run."""
    place = np.unique(np.asarray(budgets, float), return_inverse=True)[1]
    return np.array([found.by_size[i](size) for i, size in zip(place, np.asarray(sizes, float), strict=True)])


def loss_law(sizes: ArrayLike, tokens: ArrayLike, losses: ArrayLike, epochs: ArrayLike | None = None) -> Loss:
    """The robust fit of Hoffmann et al.: Huber's loss of log-loss residuals, the best of L-BFGS from a grid of starts. With `epochs`, repeats too.

    Raises ConfigError for fewer points than parameters.
    """
    N, D, y, passes = _checked(["sizes", "tokens", "losses", "epochs"], sizes=sizes, tokens=tokens, losses=losses,
                               epochs=np.ones(np.size(losses)) if epochs is None else epochs)
    repeats, count = passes - 1, 5 + (epochs is not None)
    if len(y) < count:
        raise ConfigError(f"a law of {count} parameters needs as many measurements, not {len(y)}")
    N0, D0 = np.exp(np.log(N).mean()), np.exp(np.log(D).mean())  # in these units the factors are losses, which keeps the problem well scaled

    def objective(p: np.ndarray) -> float:
        scale = np.exp(p[5]) if epochs is not None else np.inf
        data = D / D0 * (1 + effective_repeats(repeats, scale))
        a, b = np.exp(np.minimum(p[[2, 4]], 3.0))  # a line search may try any; no law has exponents above 20
        terms = np.stack([np.full_like(y, p[0]), p[1] - a * np.log(N / N0), p[3] - b * np.log(data)])
        residual = np.abs(np.logaddexp.reduce(terms) - np.log(y))
        return float(np.where(residual < HUBER, residual**2 / 2, HUBER * (residual - HUBER / 2)).sum() * 1e6)

    share = np.log(y.min())
    term = (share - 1.0, share - 3.0), np.log((0.2, 0.5))  # starts of a factor and its exponent
    grid = itertools.product((share - 0.1, share - 1.0), *term, *term, *([np.log((3.0, 30.0))] if epochs is not None else []))
    best = min((optimize.minimize(objective, start, method="L-BFGS-B") for start in grid), key=lambda found: found.fun)
    best = optimize.minimize(objective, best.x, method="Nelder-Mead", options={"maxiter": 4000, "xatol": 1e-7, "fatol": 1e-9})
    E, A, a, B, b, *scale = best.x
    a, b = np.exp(a), np.exp(b)
    return Loss(float(np.exp(E)), float(np.exp(A) * N0**a), float(a), float(np.exp(B) * D0**b), float(b),
                float(np.exp(scale[0])) if scale else float("inf"))


def interval(estimate: Callable[[np.ndarray], Sequence[float]], losses: ArrayLike, fitted: ArrayLike, parameters: int, level: float = 0.95,
             draws: int = 500, seed: int = 0) -> np.ndarray:
    """Intervals, (numbers, 2), of what `estimate` makes of losses: expanded percentiles of a bootstrap of the residuals losses - fitted.

    `parameters` of the fit: a fit lies closer to its points than the truth does, so residuals are enlarged by sqrt(n / (n - parameters)), and
    percentiles are those at which a normal variable passes Student's quantiles (Hesterberg, arXiv 1411.5279, section 5.3). Draws from which nothing
    can be estimated (ConfigError) are left out. Raises ConfigError where fewer than half are left, and for no more losses than parameters.
    """
    losses, fitted = _checked(losses=losses, fitted=fitted)
    n, random, found = len(losses), np.random.default_rng(seed), []
    if (freedom := n - parameters) < 1:
        raise ConfigError(f"{n} measurements of a fit of {parameters} numbers leave nothing to judge it by; measure more")
    residuals = (losses - fitted) * np.sqrt(n / freedom)
    tail = stats.norm.cdf(stats.t.ppf((1 - level) / 2, freedom))
    for _ in range(draws):
        try:
            found.append(np.asarray(estimate(fitted + residuals[random.integers(n, size=n)]), float))
        except ConfigError:
            continue
    if len(found) < draws / 2:
        raise ConfigError(f"{draws - len(found)} of {draws} resampled fits failed: the measurements do not settle this number")
    return np.quantile(np.stack(found), [tail, 1 - tail], axis=0).T
