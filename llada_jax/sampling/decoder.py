"""What a decoder is: what a forward's proposals lead to. A small frozen dataclass that says what it needs of canvas and model, and
pure functions of static shapes in which no row reads another:
  init(B)                                                 -> state, a pytree of (B, ...) arrays; the engine starts every block with it
  score(proposal, moment)                                 -> (B, C) float32, what slots are ordered by
  select(state, proposal, canvas_BC, writable_BC, moment) -> (write_BC, state)
  finished(state, masked_BC, moment)                      -> (B,) bool, whether the block is, given its masks after the write
`writable` marks the open slots, those that hold the mask token; for a decoder that `edits`, also those that it wrote itself.
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from llada_jax.config import ConfigError
from llada_jax.sampling.score import Proposal, Sampling


class Moment(NamedTuple):
    """Where each row stands, and the ids that have a meaning."""

    forward_B: jax.Array  # int32, forwards of the row so far that decoded
    step_B: jax.Array  # int32, of these in this block
    entry_B: jax.Array  # int32, open slots when the row entered the block
    left_B: jax.Array  # int32, open slots of the whole row
    position_BC: jax.Array  # int32, positions of the block's slots
    choice_B: jax.Array  # int32, the decoder of the row, of several
    mask_id: int
    eos_id: int
    start_B: Any = None  # int32, the position at which the block begins, given ones included


@dataclasses.dataclass(frozen=True)
class Decoder(abc.ABC):
    """What the engine asks of every decoder. Raises ConfigError for numbers that cannot be."""

    gen_length: int = 128  # tokens written after a prompt
    block_length: int = 32  # slots of a block; blocks are written left to right
    _: dataclasses.KW_ONLY
    temperature: float = 0.0  # of Gumbel noise on the logits; 0 = the likeliest token
    top_k: int = 0  # draw among the k likeliest tokens; 0 = all
    top_p: float = 1.0  # draw among the likeliest tokens that have this share of the probability together
    guidance: float = 0.0  # how far logits move away from those without the given text; 0 = off, else two forwards a step
    eos_at_block: bool = False  # an end of the text counts at the end of a block only, not after any forward
    answer_entropy: float = 0.0  # nats; a row ends, and its last gap is written, when that gap's open slots have less together; 0 = never

    name: ClassVar[str]
    aligned: ClassVar[bool] = False  # blocks count positions from the start of the row, not gaps: `canvas.build(aligned=…)`
    block_causal: ClassVar[bool] = False  # a position sees its own block and earlier ones; needs aligned blocks
    edits: ClassVar[bool] = False  # may write over what it wrote
    needs_logits: ClassVar[bool] = False  # `adjust` changes them
    smooths: ClassVar[bool] = False  # open slots of the block carry what was proposed there, see `softness`

    def __post_init__(self):
        if self.gen_length < 1 or self.block_length < 1:
            raise ConfigError(f"decoder.gen_length={self.gen_length} and decoder.block_length={self.block_length} must be at least 1")
        for name in ("temperature", "guidance", "answer_entropy"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"decoder.{name}={getattr(self, name)} must be a finite number, at least 0")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(f"decoder.top_k={self.top_k} must be at least 0, and decoder.top_p={self.top_p} above 0 and at most 1")

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    @property
    def block_lengths(self) -> tuple[int, ...]:
        """Slots of each block; the last number stands for all that follow."""
        return (self.block_length,)

    def init(self, B: int) -> Any:
        return ()

    def adjust(self, state: Any, logits_BCV: jax.Array, canvas_BC: jax.Array, writable_BC: jax.Array, moment: Moment) -> tuple[jax.Array, Any]:
        """Logits, float32, before anything is drawn; called where `needs_logits`."""
        return logits_BCV, state

    def softness(self, moment: Moment) -> jax.Array:
        """(B,) weight of the proposals' embeddings that are added to those of open slots in the next forward; asked where `smooths`."""
        return jnp.zeros_like(moment.forward_B, jnp.float32)

    @property
    def soft_tokens(self) -> int:
        """Of how many tokens, the likeliest ones; 0 = of all."""
        return 0

    def score(self, proposal: Proposal, moment: Moment) -> jax.Array:
        return proposal.prob_BC

    @abc.abstractmethod
    def select(self, state: Any, proposal: Proposal, canvas_BC: jax.Array, writable_BC: jax.Array, moment: Moment) -> tuple[jax.Array, Any]: ...

    def finished(self, state: Any, masked_BC: jax.Array, moment: Moment) -> jax.Array:
        return ~masked_BC.any(-1)


@dataclasses.dataclass(frozen=True)
class Mixed(Decoder):
    """Several decoders in one batch, one compiled loop: row b follows decoder `choice_B[b]` of `generate`."""

    decoders: tuple[Decoder, ...] = ()
    block_length: int = 0  # that of each decoder

    name = "mixed"

    def __post_init__(self):
        if not self.decoders:
            raise ConfigError("a mixed decoder needs decoders")
        if len({decoder.soft_tokens for decoder in self.decoders if decoder.smooths}) > 1:
            raise ConfigError("decoders that smooth by different numbers of tokens cannot share a batch")
        object.__setattr__(self, "block_length", max(decoder.block_length for decoder in self.decoders))

    @property
    def edits(self) -> bool:
        return any(decoder.edits for decoder in self.decoders)

    @property
    def needs_logits(self) -> bool:
        return any(decoder.needs_logits for decoder in self.decoders)

    @property
    def smooths(self) -> bool:
        return any(decoder.smooths for decoder in self.decoders)

    @property
    def soft_tokens(self) -> int:
        return next((decoder.soft_tokens for decoder in self.decoders if decoder.smooths), 0)

    def softness(self, moment):
        return self._own([decoder.softness(moment) for decoder in self.decoders], moment)

    def init(self, B: int) -> tuple[Any, ...]:
        return tuple(decoder.init(B) for decoder in self.decoders)

    def adjust(self, state, logits_BCV, canvas_BC, writable_BC, moment):
        made = [decoder.adjust(s, logits_BCV, canvas_BC, writable_BC, moment) for decoder, s in zip(self.decoders, state, strict=True)]
        return self._own([logits for logits, _ in made], moment), tuple(s for _, s in made)

    def score(self, proposal, moment):
        return self._own([decoder.score(proposal, moment) for decoder in self.decoders], moment)

    def select(self, state, proposal, canvas_BC, writable_BC, moment):
        made = []
        for decoder, s in zip(self.decoders, state, strict=True):
            mine_BC = writable_BC if decoder.edits else writable_BC & (canvas_BC == moment.mask_id)
            made.append(decoder.select(s, proposal, canvas_BC, mine_BC, moment))
        return self._own([write for write, _ in made], moment), tuple(s for _, s in made)

    def finished(self, state, masked_BC, moment):
        return self._own([decoder.finished(s, masked_BC, moment) for decoder, s in zip(self.decoders, state, strict=True)], moment)

    def _own(self, made: list[jax.Array], moment: Moment) -> jax.Array:
        """Of one array a decoder, each row's own."""
        return pick(made, moment.choice_B)


def pick(made: list[jax.Array], choice_B: jax.Array) -> jax.Array:
    """Of several (B, …) arrays, each row from the one that it chose."""
    stacked = jnp.stack(made)
    return jnp.take_along_axis(stacked, choice_B.reshape((1, -1) + (1,) * (stacked.ndim - 2)), axis=0)[0]


def members(decoder: Decoder) -> tuple[Decoder, ...]:
    """The decoders that rows may follow."""
    return decoder.decoders if isinstance(decoder, Mixed) else (decoder,)


def guided(decoder: Decoder) -> bool:
    """Whether a forward has two canvases a row."""
    return any(member.guidance for member in members(decoder))


def of_rows(decoder: Decoder, field: str, choice_B: jax.Array) -> Any:
    """A setting: one number if all decoders agree, else (B,)."""
    values = [getattr(member, field) for member in members(decoder)]
    return values[0] if len(set(values)) == 1 else jnp.asarray(values)[choice_B]


def sampling_of(decoder: Decoder, choice_B: jax.Array) -> Sampling:
    """How each row's tokens are drawn."""
    return Sampling(*(of_rows(decoder, field, choice_B) for field in Sampling._fields))


def blocks_of(decoder: Decoder, positions_BT: jax.Array, choice_B: jax.Array) -> jax.Array | None:
    """Block ids for attention, (B, T); None where every position sees every other."""
    ids = [positions_BT // member.block_length if member.block_causal else None for member in members(decoder)]
    if all(x is None for x in ids):
        return None
    return pick([jnp.zeros_like(positions_BT) if x is None else x for x in ids], choice_B) if len(ids) > 1 else ids[0]
