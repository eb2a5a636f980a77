"""Comparisons of runs: means over seeds, paired differences with intervals, decoders at an equal rate of exact answers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from llada_jax.config import ConfigError, nearest


class Interval(NamedTuple):
    """A mean and the two ends of its interval."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ({self.low:+.4f}, {self.high:+.4f})"


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's interval of the mean of independent values; infinite for fewer than two, and where one of them is not finite.

    Raises ConfigError for none.
    """
    values = np.asarray(values, float)
    if not len(values):
        raise ConfigError("an interval needs values; there are none")
    mean, half = float(values.mean()), float("inf")
    if not np.isfinite(values).all():
        return Interval(mean, -half, half, len(values))
    if len(values) > 1:
        half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half, len(values))


def bootstrap_interval(values: Sequence[float], level: float = 0.95, draws: int = 10_000, seed: int = 0) -> Interval:
    """Percentile interval of the mean over resampled values."""
    values = np.asarray(values, float)
    means = values[np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high), len(values))


Line = Mapping[str, Any]  # of a sweep's results.jsonl
REPEATED = 3  # epochs from which on the whole course of a run is told


def metrics_of(line: Line) -> dict[str, float]:
    """The figures of a run that are compared, by the name that tables use: bits a byte, by block size where it was measured so, load, and of a text
    that was read again and again when the bound was lowest. A bound that is not finite is infinite."""
    evaluated = line.get("evaluate") or {}
    held = evaluated.get("heldout_by_block_size") or [evaluated.get("heldout") or line.get("heldout")]
    found = {}
    for figures in filter(None, held):
        size = figures["block_size"]
        blocks = f" in blocks of {size}" if size else " in whole rows" if len(held) > 1 else ""
        found[f"bits a byte{blocks}"] = _finite_or_infinite(figures["bits_per_byte"])
    if line.get("epochs") and line["epochs"] >= REPEATED:
        steps, bits = np.array([(step, _finite_or_infinite(bits)) for step, bits in line["curve"]]).T
        epochs, best = steps * line["epochs"] / line["steps"], int(bits.argmin())
        found |= {"lowest bits a byte": float(bits[best]), "epoch of the lowest": float(epochs[best])}
        if 3 * epochs[best] <= epochs[-1]:
            found["rise after three times as many epochs"] = float(np.interp(3 * epochs[best], epochs, bits) - bits[best])
    return found | ({"busiest expert / mean": line["load"]} if line.get("load") else {})


def _finite_or_infinite(bits: float | None) -> float:
    """Json has None for what is no number."""
    return float("inf") if bits is None or not np.isfinite(bits) else bits


def comparison(lines: Sequence[Line], against: str = "") -> list[dict[str, Any]]:
    """A row a metric and variant: mean over seeds and the mean difference to `against` (the first variant) over the seeds that both have.

    Raises ConfigError for a variant that is not there, and for no lines.
    """
    if not lines:
        raise ConfigError("there are no results to compare")
    variants = list(dict.fromkeys(line["variant"] for line in lines))
    if against and against not in variants:
        raise ConfigError(f"no variant {against!r}{nearest(against, variants)}")
    against, values = against or variants[0], {}
    for line in lines:
        for metric, value in metrics_of(line).items():
            values.setdefault(metric, {}).setdefault(line["variant"], {})[line["seed"]] = value
    rows = []
    for metric, by_variant in values.items():
        base = by_variant.get(against, {})
        for variant, own in by_variant.items():
            both = sorted(own.keys() & base.keys()) if variant != against else []
            rows.append({"metric": metric, "variant": variant, "values": own, "mean": t_interval(list(own.values())),
                         "difference": t_interval([own[seed] - base[seed] for seed in both]) if both else None})
    return rows


def frontiers(lines: Sequence[Line]) -> dict[str, dict[str, dict[int, list[tuple[float, float]]]]]:
    """{task: {variant: {seed: [(exact rate, tokens a forward) of each decoder]}}}, where tasks were answered."""
    found = {}
    for line in lines:
        for task, decoders in (line.get("evaluate") or {}).get("tasks", {}).items():
            points = [(figures["exact"], figures["tokens_per_forward"]) for figures in decoders.values()]
            found.setdefault(task, {}).setdefault(line["variant"], {})[line["seed"]] = points
    return found


def gain_at_equal_rate(ours: Sequence[tuple[float, float]], theirs: Sequence[tuple[float, float]]) -> float:
    """How many times as many tokens a forward `ours` writes as `theirs`, each a list of (exact rate, tokens a forward) over settings.

    The geometric mean of the ratio over the exact rates that both reach, each curve interpolated between its settings, of which those that
    another one beats in both are left out. Raises ConfigError where the curves have no rate in common.
    """
    curves = [frontier(points) for points in (ours, theirs)]
    low, high = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    if low > high:
        raise ConfigError(f"exact rates of {curves[0][0][0]:.3f} to {curves[0][-1][0]:.3f} and of {curves[1][0][0]:.3f} to {curves[1][-1][0]:.3f} "
                          "have none in common; decode with other thresholds")
    rates = np.linspace(low, high, 101)
    logs = [np.interp(rates, *np.array([(rate, np.log(speed)) for rate, speed in curve]).T) for curve in curves]
    return float(np.exp((logs[0] - logs[1]).mean()))


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (exact rate, tokens a forward) that no other beats in both, by rising rate."""
    ranked = sorted(set(points))
    return [(rate, speed) for i, (rate, speed) in enumerate(ranked) if all(speed > other for _, other in ranked[i + 1:])]
