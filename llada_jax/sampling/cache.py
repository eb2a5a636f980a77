"""Which slots a forward computes, and what of the keys and values of the others it takes from earlier forwards.

A cache is a small frozen dataclass. It offers a few views of static width; each step every row takes one of them, by its own state:
  views(T, C, suffix) -> the views of a canvas of T slots in blocks of at most C, the first of which is at most `suffix` from its end
  init(B)             -> state, a pytree of (B, ...) arrays
  view(state, moment) -> (B,) int32, the index of each row's view
  after(state, moment, view_B, written_B, finished_B) -> state; the number of slots written, and whether the block is finished
Only block-causal caches are exact; for models that see to both sides every cache is an approximation (Fast-dLLM, arXiv 2505.22618).
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from llada_jax.config import ConfigError
from llada_jax.sampling.decoder import Moment


class Place(NamedTuple):
    """Where the rows stand."""

    slots_BC: jax.Array  # int32, the slots of each row's block in order; repeated ones where it has fewer than C
    inside_BC: jax.Array  # bool, which of them exist
    start_B: jax.Array  # int32, the slot of the block's first position, given ones included
    T: int

    def first(self) -> jax.Array:
        """(B,) the block's first slot."""
        return jnp.min(jnp.where(self.inside_BC, self.slots_BC, self.T), axis=-1)

    def last(self) -> jax.Array:
        """(B,) its last."""
        return jnp.max(jnp.where(self.inside_BC, self.slots_BC, -1), axis=-1)


class View(NamedTuple):
    """A forward of `width` slots; without a window, of the whole canvas."""

    kind: str  # as forwards are counted
    width: int
    window: Callable[[Place], tuple[jax.Array, jax.Array]] | None  # -> slots (B, width), T where there is none, and which are the block's, (B, C)
    stores: bool  # whether its keys and values stay
    decodes: bool = True


class Cache(abc.ABC):
    """What the engine asks of every cache."""

    name: ClassVar[str]
    keeps: ClassVar[bool] = True  # whether there are keys and values at all
    block_causal: ClassVar[bool] = False  # for decoders of block-causal models, and for them alone

    @abc.abstractmethod
    def views(self, T: int, C: int, suffix: int) -> tuple[View, ...]: ...

    @abc.abstractmethod
    def init(self, B: int) -> Any: ...

    @abc.abstractmethod
    def view(self, state: Any, moment: Moment) -> jax.Array: ...

    @abc.abstractmethod
    def after(self, state: Any, moment: Moment, view_B: jax.Array, written_B: jax.Array, finished_B: jax.Array) -> Any: ...


@dataclasses.dataclass(frozen=True)
class NoCache(Cache):
    """Every forward computes the whole canvas."""

    name = "none"
    keeps = False

    def views(self, T: int, C: int, suffix: int) -> tuple[View, ...]:
        return (View("full", T, None, stores=False),)

    def init(self, B: int) -> tuple[()]:
        return ()

    def view(self, state: Any, moment: Moment) -> jax.Array:
        return jnp.zeros_like(moment.step_B)

    def after(self, state: Any, moment: Moment, view_B: jax.Array, written_B: jax.Array, finished_B: jax.Array) -> Any:
        return state


class Fill(NamedTuple):
    """Per row: whether the cache holds something, and was filled by the last forward; passes since the row began; tokens written since the
    last refresh."""

    valid_B: jax.Array
    fresh_B: jax.Array
    pass_B: jax.Array
    written_B: jax.Array


@dataclasses.dataclass(frozen=True)
class Refreshed(Cache):
    """A forward of the whole canvas at the entry of every block fills the cache; windows around the block are computed against it.

    Both decode. What a window computes replaces the cache's for that forward alone.
    """

    warmup: int = 0  # forwards of the whole canvas before the first cached one
    refresh_every: int = 0  # windows after which the whole canvas is computed again, counted over all blocks; 0 = only at a block's entry
    refresh_after: int = 0  # tokens written since the last refresh after which the next follows; 0 = any number

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ConfigError(f"cache.{field.name}={getattr(self, field.name)} must be at least 0")

    @abc.abstractmethod
    def windows(self, T: int, C: int, suffix: int) -> tuple[View, ...]:
        """Windows from narrow to wide."""

    def views(self, T: int, C: int, suffix: int) -> tuple[View, ...]:
        return (View("full", T, None, stores=True), *self.windows(T, C, suffix))

    def init(self, B: int) -> Fill:
        return Fill(jnp.zeros(B, bool), jnp.zeros(B, bool), jnp.zeros(B, jnp.int32), jnp.zeros(B, jnp.int32))

    def view(self, state: Fill, moment: Moment) -> jax.Array:
        due_B = ~state.valid_B | (moment.step_B == 0) | (moment.forward_B < self.warmup)
        if self.refresh_every:  # a pass is a window, with the refresh before it where one is due
            due_B |= (state.pass_B % self.refresh_every == 0) & ~state.fresh_B
        if self.refresh_after:
            due_B |= state.written_B > self.refresh_after
        return jnp.where(due_B, 0, 1).astype(jnp.int32)

    def after(self, state: Fill, moment: Moment, view_B: jax.Array, written_B: jax.Array, finished_B: jax.Array) -> Fill:
        refreshed_B, cold_B = view_B == 0, moment.forward_B < self.warmup
        passed_B = ~refreshed_B | finished_B | cold_B
        return Fill((state.valid_B | refreshed_B) & ~cold_B, refreshed_B, state.pass_B + passed_B,
                    jnp.where(refreshed_B, 0, state.written_B + written_B))


@dataclasses.dataclass(frozen=True)
class Dual(Refreshed):
    """The window is the block (Fast-dLLM's dual cache)."""

    name = "dual"

    def windows(self, T: int, C: int, suffix: int) -> tuple[View, ...]:
        return (View("window", C, lambda place: around(place, 0, 0), stores=False),)


@dataclasses.dataclass(frozen=True)
class Vicinity(Refreshed):
    """The window is the block and some slots on its sides (dInfer)."""

    warmup: int = 4
    before: int = 16  # slots in front of the block that are computed with it
    after_block: int = 16  # slots behind it

    name = "vicinity"

    def windows(self, T: int, C: int, suffix: int) -> tuple[View, ...]:
        before, behind = min(self.before, T), min(self.after_block, T)
        return (View("window", before + C + behind, lambda place: around(place, before, behind), stores=False),)


@dataclasses.dataclass(frozen=True)
class Prefix(Refreshed):
    """The window is the block and all behind it (Fast-dLLM's prefix cache)."""

    name = "prefix"

    def windows(self, T: int, C: int, suffix: int) -> tuple[View, ...]:
        return (View("window", suffix, lambda place: onwards(place, suffix), stores=False),)


class Commit(NamedTuple):
    """Per row: whether the keys and values of all earlier blocks are those of their final tokens, and where the block before began."""

    clean_B: jax.Array
    start_B: jax.Array


@dataclasses.dataclass(frozen=True)
class BlockCausal(Cache):
    """Keys and values of finished blocks, which no later block changes: exact (LLaDA2.0).

    The first forward computes the whole canvas. A finished block's final tokens are computed once more, together with the first forward
    of the next block, or before it in a forward of their own. Where given blocks lie between the two, a forward of the whole canvas takes the
    place of that one.
    """

    fused: bool = True  # the commit of a block is part of the next one's first forward

    name = "block_causal"
    block_causal = True

    def views(self, T: int, C: int, suffix: int) -> tuple[View, ...]:
        views = (View("full", T, None, stores=True), View("window", C, lambda place: aligned(place, 0, C), stores=True))
        if self.fused:
            return (*views, View("commit", 2 * C, lambda place: aligned(place, C, C), stores=True))
        return (*views, View("commit", C, lambda place: committed(place, C), stores=True, decodes=False))

    def init(self, B: int) -> Commit:
        return Commit(jnp.ones(B, bool), jnp.zeros(B, jnp.int32))

    def view(self, state: Commit, moment: Moment) -> jax.Array:
        follows_B = moment.start_B - state.start_B <= moment.position_BC.shape[1]
        return jnp.where(moment.forward_B == 0, 0, jnp.where(state.clean_B, 1, jnp.where(follows_B, 2, 0))).astype(jnp.int32)

    def after(self, state: Commit, moment: Moment, view_B: jax.Array, written_B: jax.Array, finished_B: jax.Array) -> Commit:
        return Commit(~finished_B & (state.clean_B | (view_B != 1)), moment.start_B)


CACHES: dict[str, type[Cache]] = {cache.name: cache for cache in (NoCache, Prefix, Dual, Vicinity, BlockCausal)}


def around(place: Place, before: int, behind: int) -> tuple[jax.Array, jax.Array]:
    """The block's slots with `before` in front of its first and `behind` after its last."""
    C = place.slots_BC.shape[1]
    front_BW = place.first()[:, None] - before + jnp.arange(before)
    back_BW = place.last()[:, None] + 1 + jnp.arange(behind)
    block_BC = jnp.where(place.inside_BC, place.slots_BC, place.T)
    slots_BW = jnp.concatenate([jnp.where(front_BW < 0, place.T, front_BW), block_BC, jnp.minimum(back_BW, place.T)], axis=1)
    return slots_BW, jnp.broadcast_to(before + jnp.arange(C), place.slots_BC.shape)


def onwards(place: Place, width: int) -> tuple[jax.Array, jax.Array]:
    """All slots from the block's first one on."""
    slots_BW = jnp.minimum(place.first()[:, None] + jnp.arange(width), place.T)
    return slots_BW, jnp.clip(place.slots_BC - place.first()[:, None], 0, width - 1)


def aligned(place: Place, before: int, C: int) -> tuple[jax.Array, jax.Array]:
    """The whole block, given slots included, with `before` slots in front of it."""
    slots_BW = place.start_B[:, None] - before + jnp.arange(before + C)
    wanted_BC = jnp.clip(place.slots_BC - place.start_B[:, None] + before, 0, before + C - 1)
    return jnp.where((slots_BW < 0) | (slots_BW >= place.T), place.T, slots_BW), wanted_BC


def committed(place: Place, C: int) -> tuple[jax.Array, jax.Array]:
    """The whole block before; nothing of it is wanted."""
    slots_BW = place.start_B[:, None] - C + jnp.arange(C)
    return jnp.where(slots_BW < 0, place.T, slots_BW), jnp.zeros_like(place.slots_BC)
