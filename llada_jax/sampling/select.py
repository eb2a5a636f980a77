"""Decoders: which proposals are written at this step. Small frozen dataclasses, each with only its own fields.

A decoder says what it needs of the canvas and the model (`Decoder`) and has three pure functions of static shapes in which no row
reads another:
  init(B)                                         -> state, a pytree of (B, ...) arrays; the engine starts every block with it
  score(proposal)                                 -> (B, C) float32, what slots are ordered by
  select(state, proposal, canvas_BC, writable_BC) -> (write_BC, state); at least one slot wherever one is open
`writable` marks the open slots: the engine passes those that still hold the mask token.
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from llada_jax.config import ConfigError, nearest
from llada_jax.sampling.score import Proposal


class Decoder(abc.ABC):
    """What the engine asks of every decoder. Subclasses make fields of what can be set."""

    name: ClassVar[str]
    aligned: ClassVar[bool] = False  # blocks count positions from the start of the row, not gaps: `canvas.build(aligned=…)`
    block_causal: ClassVar[bool] = False  # a position sees its own block and earlier ones; needs aligned blocks

    gen_length: int
    block_length: int
    steps: int
    temperature: float
    guidance: float = 0.0

    def __post_init__(self):
        if self.gen_length < 1 or self.block_length < 1 or self.steps < 0:
            raise ConfigError(f"decoder.gen_length={self.gen_length} and decoder.block_length={self.block_length} must be at least 1, "
                              f"decoder.steps={self.steps} at least 0")
        for name in ("temperature", "guidance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"decoder.{name}={getattr(self, name)} must be a finite number, at least 0")

    @abc.abstractmethod
    def init(self, B: int) -> Any: ...

    @abc.abstractmethod
    def score(self, proposal: Proposal) -> jax.Array: ...

    @abc.abstractmethod
    def select(self, state: Any, proposal: Proposal, canvas_BC: jax.Array, writable_BC: jax.Array) -> tuple[jax.Array, Any]: ...


class QuotaState(NamedTuple):
    """Per row: forwards spent in this block, and open slots when the row entered it."""

    step_B: jax.Array
    entry_B: jax.Array


@dataclasses.dataclass(frozen=True)
class Remasking(Decoder):
    """Write a fixed number of slots a forward, best score first (LLaDA, arXiv 2502.09992, algorithms 4 and 5).

    A block of m open slots gets S = steps / blocks forwards; forward i writes m // S + (i < m % S) slots. A block with fewer slots
    than S (the last one of an infill) ends when it is full. Raises ConfigError for numbers that do not divide.
    """

    gen_length: int = 128  # tokens written after a prompt
    block_length: int = 32  # slots of a block; blocks are written left to right
    steps: int = 0  # forwards for gen_length tokens; 0 = gen_length, a token each
    temperature: float = 0.0  # of Gumbel noise on the logits; 0 = the likeliest token
    guidance: float = 0.0  # how far logits move away from those without the given text; 0 = off, else two forwards a step

    def __post_init__(self):
        super().__post_init__()
        gen, block, steps = self.gen_length, self.block_length, self.steps
        if gen % block:
            raise ConfigError(f"decoder.gen_length={gen} is not divisible by decoder.block_length={block}; "
                              f"use --decoder.gen_length={-(-gen // block) * block} or --decoder.block_length={gen}")
        blocks = gen // block
        if steps % blocks:
            raise ConfigError(f"decoder.steps={steps} is not divisible by the {blocks} blocks of gen_length={gen} / block_length={block}; "
                              f"use --decoder.steps={-(-steps // blocks) * blocks}")

    @property
    def steps_per_block(self) -> int:
        return (self.steps or self.gen_length) // (self.gen_length // self.block_length)

    def init(self, B: int) -> QuotaState:
        return QuotaState(jnp.zeros(B, jnp.int32), jnp.zeros(B, jnp.int32))

    def select(self, state: QuotaState, proposal: Proposal, canvas_BC: jax.Array, writable_BC: jax.Array) -> tuple[jax.Array, QuotaState]:
        entry_B = jnp.where(state.step_B == 0, writable_BC.sum(-1), state.entry_B)
        quota_B = share(entry_B, self.steps_per_block, state.step_B)
        return top(self.score(proposal), writable_BC, quota_B), QuotaState(state.step_B + 1, entry_B)


@dataclasses.dataclass(frozen=True)
class LowConfidence(Remasking):
    """Slots with the highest probability of their token first; the least confident stay masked."""

    name = "low_confidence"

    def score(self, proposal: Proposal) -> jax.Array:
        return proposal.prob_BC


@dataclasses.dataclass(frozen=True)
class Random(Remasking):
    """Slots in random order."""

    name = "random"

    def score(self, proposal: Proposal) -> jax.Array:
        return proposal.uniform_BC


@dataclasses.dataclass(frozen=True)
class BlockThreshold(Decoder):
    """Write every slot whose probability exceeds a threshold, but at least a fixed number a forward (LLaDA2.0's generate).

    Blocks are aligned to the row's start, prompt included, and attention is block-causal. Forward i of S writes at least
    block_length // S + (i < block_length % S) slots, the best ones if too few exceed the threshold, however many are open.
    """

    gen_length: int = 128  # tokens written after a prompt
    block_length: int = 32  # the model's own: blocks that attention sees whole, counted from the start of the sequence
    steps: int = 0  # most forwards a block; 0 = block_length. Never more than gen_length, as in the reference
    threshold: float = 0.95  # probability above which a token is written at once
    temperature: float = 0.0  # of Gumbel noise on the logits; 0 = the likeliest token

    name = "llada2"
    aligned = True
    block_causal = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"decoder.threshold={self.threshold} must be a probability, from 0 to 1")

    def init(self, B: int) -> jax.Array:
        """Forwards spent in this block, (B,) int32."""
        return jnp.zeros(B, jnp.int32)

    def score(self, proposal: Proposal) -> jax.Array:
        return proposal.prob_BC

    def select(self, state: jax.Array, proposal: Proposal, canvas_BC: jax.Array, writable_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        quota_B = share(self.block_length, min(self.steps or self.block_length, self.gen_length), state)
        sure_BC = writable_BC & (proposal.prob_BC > self.threshold)
        # both sets are the likeliest slots, so the union is the larger one
        return sure_BC | top(self.score(proposal), writable_BC, quota_B), state + 1


DECODERS: dict[str, type[Decoder]] = {decoder.name: decoder for decoder in (LowConfidence, Random, BlockThreshold)}


def share(total: Any, parts: int, index: Any) -> Any:
    """How much of `total` falls to part `index` of `parts` as even ones as possible, the larger ones first."""
    return total // parts + (index < total % parts)


def top(score_BC: jax.Array, open_BC: jax.Array, count_B: jax.Array) -> jax.Array:
    """The `count` open slots of each row with the largest score, the first slot winning ties; (B, C) bool. `count` may be traced."""
    lowest = jnp.finfo(jnp.float32).max  # an open slot whose score is not a number still comes before every closed one, or the loop would not end
    order_BC = jnp.argsort(jnp.where(open_BC, jnp.nan_to_num(-score_BC, nan=lowest), jnp.inf), axis=-1, stable=True)
    rank_BC = jnp.argsort(order_BC, axis=-1)
    return (rank_BC < count_B[:, None]) & open_BC


def build(name: str, settings: dict[str, Any]) -> Any:
    """The decoder called `name` with `settings`, {field: value or its text}.

    Raises ConfigError for an unknown name or field, naming the nearest, or a value of another type.
    """
    if name not in DECODERS:
        raise ConfigError(f"unknown decoder '{name}'{nearest(name, DECODERS)}")
    fields = {field.name: field.default for field in dataclasses.fields(DECODERS[name])}
    values = {}
    for key, value in settings.items():
        if key not in fields:
            raise ConfigError(f"decoder {name} has no setting '{key}'{nearest(key, fields, '--decoder.')}")
        try:
            values[key] = type(fields[key])(value)
        except ValueError:
            raise ConfigError(f"--decoder.{key}={value!r} is not a {type(fields[key]).__name__} such as {fields[key]!r}") from None
    return DECODERS[name](**values)


def split_flags(argv: list[str]) -> tuple[str | None, dict[str, str], list[str]]:
    """Take `--decoder=NAME` and `--decoder.field=value` out of a command line: (name or None, settings, the rest).

    Raises ConfigError for a decoder's field under a wrong prefix or none, naming the right flag.
    """
    name, settings, rest = None, {}, []
    known = {field.name for decoder in DECODERS.values() for field in dataclasses.fields(decoder)}
    words = iter(argv)
    for word in words:
        flag, has_value, value = word.partition("=")
        dashless = flag.lstrip("-")
        if word == "--":
            return name, settings, [*rest, word, *words]
        if flag.startswith("-") and (dashless == "decoder" or dashless.startswith("decoder.")):
            value = value if has_value else next(words, None)
            if value is None:
                raise ConfigError(f"--{dashless} needs a value, for example --decoder={LowConfidence.name} or --decoder.steps=64")
            if dashless == "decoder":
                name = value
            else:
                settings[dashless.removeprefix("decoder.")] = value
        elif flag.startswith("-") and dashless.removeprefix("config.") in known:
            raise ConfigError(f"unknown flag '{flag}'; did you mean --decoder.{dashless.removeprefix('config.')}?")
        else:
            rest.append(word)
    return name, settings, rest
