"""Weights made of others: the mean of several checkpoints of a run; a base and its low-rank adapters."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from llada_jax import config as config_lib
from llada_jax.config import ConfigError
from llada_jax.model import lora
from llada_jax.training import checkpoint, metrics
from llada_jax.training import optimizer as optimizer_lib

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


class Merged(Mapping[str, np.ndarray]):
    """The leaves of a model with its adapters in its weights, by path, made each time one is asked for, in float32 and rounded to the weight's dtype.

    `config` is the model of the adapters; they and whatever else `sources` hold come from the first of these (`checkpoint.Leaves`) that has it.
    """

    def __init__(self, config: config_lib.Model, *sources: Any):
        self._sources = {path: source for source in reversed(sources) for path in source.shapes}
        self._scale = config.lora_alpha / config.lora_rank
        self.shapes = {path: source.shapes[path] for path, source in self._sources.items() if not path.endswith((lora.A, lora.B))}

    def _adapters(self, path: str) -> tuple[np.ndarray, ...]:
        return tuple(self._sources[path + end][path + end] for end in (lora.A, lora.B) if path + end in self._sources)

    def __getitem__(self, path: str) -> np.ndarray:
        weight, adapters = np.require(self._sources[path][path], requirements="W"), self._adapters(path)
        if adapters:
            a, b = adapters
            lead, rank = a.ndim + b.ndim - weight.ndim - 2, a.shape[-1]  # as in `lora.merge`
            a, b = a.reshape(*a.shape[:lead], -1, rank), b.reshape(*b.shape[:lead], rank, -1)
            for i in range(len(weight)):  # layer by layer, in place
                weight[i] = weight[i].astype(np.float32) + np.float32(self._scale) * (a[i] @ b[i]).reshape(weight.shape[1:])
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def read(self, like: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
        """As `checkpoint.Leaves.read`, onto devices."""
        found = {}
        for source in {id(source): source for source in map(self._sources.__getitem__, like)}.values():
            mine = {path: x for path, x in like.items() if self._sources[path] is source}
            stored = lambda path, x, source=source: jax.ShapeDtypeStruct(x.shape, source.shapes[path].dtype, sharding=x.sharding)
            found |= source.read({path: stored(path, x) if self._adapters(path) else x for path, x in mine.items()})
        for path, x in like.items():
            if adapters := self._adapters(path):
                add = lambda weight, adapters, x=x: lora.merge(weight, *adapters, self._scale).astype(x.dtype)
                found[path] = jax.jit(add, out_shardings=x.sharding, donate_argnums=0)(found[path], adapters)
        return found


def plain(leaves: Any, config: config_lib.Model) -> Any:
    """A checkpoint's leaves as the model without adapters (`lora.without`) has them; itself where there are none."""
    return Merged(config, leaves) if config.lora_rank else leaves


def load_variables(workdir: str, step: int, config: config_lib.Model, shapes: Any, shardings: Any, weights: str) -> Any:
    """As `checkpoint.load_variables`, with the adapters of a model of this `config` merged; `shapes` and `shardings` are of `lora.without` it."""
    if not config.lora_rank:
        return checkpoint.load_variables(workdir, step, shapes, shardings, weights)
    leaves = plain(checkpoint.read_leaves(workdir, step, weights), config)
    check_whole(leaves, shapes, workdir)
    like = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings)
    found = leaves.read(_by_path(like))
    return jax.tree_util.tree_map_with_path(lambda path, _: found[optimizer_lib.path_of(path)], shapes)


def check_whole(leaves: Any, shapes: Any, folder: str) -> None:
    """Raise ConfigError unless `leaves` hold all those of the model with variables of these `shapes`."""
    for path, x in _by_path(shapes).items():
        if path not in leaves.shapes:
            raise ConfigError(f"{folder} holds adapters without their base ({path} is not there); "
                              f"put them together: python -m llada_jax.convert merge --checkpoint=BASE --adapters={folder} --out=…")
        if leaves.shapes[path].shape != x.shape:
            raise ConfigError(f"{path} of {folder} is {list(leaves.shapes[path].shape)}, the model's is {list(x.shape)}")


def _by_path(tree: Any) -> dict[str, Any]:
    return {optimizer_lib.path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
