"""Weights made of others: the mean of several checkpoints of a run."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from llada_jax.config import ConfigError
from llada_jax.training import checkpoint, metrics

WAY_OUT = "train.keep_every=N keeps all checkpoints at multiples of N, and train.eval_every=N measures them"


class Chosen(NamedTuple):
    """Checkpoints to average, the best first."""

    steps: list[int]
    bounds: list[float | None]  # held-out bits a byte; None where it was not measured
    gone: list[int]  # steps with a better bound than the worst of these, of which no checkpoint is left


def best(workdir: str, top: int) -> Chosen:
    """The `top` checkpoints with the lowest held-out bound in metrics.jsonl, of those that exist; the later one among equals.

    Raises ConfigError where nothing was measured, or fewer are left.
    """
    bounds, kept = _bounds(workdir), checkpoint.steps_of(workdir)
    if not bounds:
        raise ConfigError(f"{workdir}/metrics.jsonl holds no held-out bound (train.eval_every); name the checkpoints by --steps=A,B,…")
    ranked = sorted(bounds, key=lambda step: (bounds[step], -step))
    steps = [step for step in ranked if step in kept][:top]
    if len(steps) < top:
        raise ConfigError(f"{workdir} has {len(steps)} of {top} checkpoints with a held-out bound; it was measured at the steps "
                          f"{_named(sorted(bounds))}, checkpoints exist of {_named(kept)}; {WAY_OUT}")
    return Chosen(steps, [bounds[step] for step in steps], [step for step in ranked[:ranked.index(steps[-1])] if step not in kept])


def named(workdir: str, steps: Sequence[int]) -> Chosen:
    """These checkpoints; raises ConfigError for one that is missing or named twice."""
    bounds, kept = _bounds(workdir), checkpoint.steps_of(workdir)
    missing = [step for step in steps if step not in kept]
    if missing or len(set(steps)) < len(steps):
        raise ConfigError(f"--steps={_named(steps)}: {f'no checkpoint of {_named(missing)}' if missing else 'each may stand there once'}; "
                          f"{workdir} has {_named(kept)}" + (f"; {WAY_OUT}" if missing else ""))
    return Chosen(list(steps), [bounds.get(step) for step in steps], [])


def _bounds(workdir: str) -> dict[int, float]:
    lines = metrics.read_jsonl(epath.Path(workdir) / "metrics.jsonl")
    return {line["step"]: line["heldout_bits_per_byte"] for line in lines if line.get("heldout_bits_per_byte") is not None}


def _named(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


class Mean(Mapping[str, np.ndarray]):
    """The arithmetic mean of several checkpoints' leaves by path, the expert bias too, added up in float32 each time one is asked for.

    Holds two leaves at once, in float32.
    """

    def __init__(self, sources: Sequence[Mapping[str, Any]]):
        self._sources = sources

    def __getitem__(self, path: str) -> np.ndarray:
        first = self._sources[0][path]
        total = np.require(first, np.float32, "W")
        for source in self._sources[1:]:
            total += source[path].astype(np.float32)
        total /= len(self._sources)
        return total.astype(first.dtype, copy=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources[0])

    def __len__(self) -> int:
        return len(self._sources[0])
