"""Decoders: what a forward's proposals lead to. Small frozen dataclasses, each with only its own fields; `presets.py` names them.

A decoder says what it needs of the canvas and the model (`Decoder`) and has pure functions of static shapes in which no row reads another:
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
from llada_jax.sampling import score as score_lib
from llada_jax.sampling import select
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

    name: ClassVar[str]
    aligned: ClassVar[bool] = False  # blocks count positions from the start of the row, not gaps: `canvas.build(aligned=…)`
    block_causal: ClassVar[bool] = False  # a position sees its own block and earlier ones; needs aligned blocks
    edits: ClassVar[bool] = False  # may write over what it wrote
    needs_logits: ClassVar[bool] = False  # `adjust` changes them

    def __post_init__(self):
        if self.gen_length < 1 or self.block_length < 1:
            raise ConfigError(f"decoder.gen_length={self.gen_length} and decoder.block_length={self.block_length} must be at least 1")
        for name in ("temperature", "guidance"):
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

    def score(self, proposal: Proposal, moment: Moment) -> jax.Array:
        return proposal.prob_BC

    @abc.abstractmethod
    def select(self, state: Any, proposal: Proposal, canvas_BC: jax.Array, writable_BC: jax.Array, moment: Moment) -> tuple[jax.Array, Any]: ...

    def finished(self, state: Any, masked_BC: jax.Array, moment: Moment) -> jax.Array:
        return ~masked_BC.any(-1)


def check_probabilities(decoder: Decoder, *names: str) -> None:
    """Raise ConfigError for fields that are no probabilities."""
    for name in names:
        if not 0 <= getattr(decoder, name) <= 1:
            raise ConfigError(f"decoder.{name}={getattr(decoder, name)} must be a probability, from 0 to 1")


# ---- a fixed number of slots a forward -------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Remasking(Decoder):
    """Write a fixed number of slots a forward, best score first (LLaDA, arXiv 2502.09992, algorithms 4 and 5).

    A block of m open slots gets S = steps / blocks forwards; forward i writes m // S + (i < m % S) slots. A block with fewer slots
    than S (the last one of an infill) ends when it is full.
    """

    steps: int = 0  # forwards for gen_length tokens; 0 = gen_length, a token each

    def __post_init__(self):
        super().__post_init__()
        gen, block, steps = self.gen_length, self.block_length, self.steps
        if gen % block:
            raise ConfigError(f"decoder.gen_length={gen} is not divisible by decoder.block_length={block}; "
                              f"use --decoder.gen_length={-(-gen // block) * block} or --decoder.block_length={gen}")
        blocks = gen // block
        if steps < 0 or steps % blocks:
            raise ConfigError(f"decoder.steps={steps} is not divisible by the {blocks} blocks of gen_length={gen} / block_length={block}; "
                              f"use --decoder.steps={max(-(-steps // blocks), 1) * blocks}")

    @property
    def steps_per_block(self) -> int:
        return (self.steps or self.gen_length) // (self.gen_length // self.block_length)

    def select(self, state, proposal, canvas_BC, writable_BC, moment):
        quota_B = select.share(moment.entry_B, self.steps_per_block, moment.step_B)
        return select.top(self.score(proposal, moment), writable_BC, quota_B), state


@dataclasses.dataclass(frozen=True)
class LowConfidence(Remasking):
    """Slots with the highest probability of their token first; the least confident stay masked."""

    name = "low_confidence"


@dataclasses.dataclass(frozen=True)
class Random(Remasking):
    """Slots in random order."""

    name = "random"

    def score(self, proposal, moment):
        return proposal.uniform_BC


@dataclasses.dataclass(frozen=True)
class Margin(Remasking):
    """Slots whose token is farthest ahead of the next likely one first."""

    name = "margin"

    def score(self, proposal, moment):
        return proposal.prob_BC - proposal.runner_up_BC


@dataclasses.dataclass(frozen=True)
class Entropy(Remasking):
    """Slots with the lowest entropy first."""

    name = "entropy"

    def score(self, proposal, moment):
        return -proposal.entropy_BC


@dataclasses.dataclass(frozen=True)
class LeftToRight(Remasking):
    """Slots in the order of the text."""

    name = "left_to_right"

    def score(self, proposal, moment):
        return -moment.position_BC.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class EosRejection(Remasking):
    """Low confidence, where an EOS counts less at first: × gamma, rising with the row's forwards (EOSER, of EOSER-ASS-RL). For one large block."""

    block_length: int = 128  # slots of a block: the whole answer
    gamma: float = 0.4  # what the score of an EOS is multiplied by in the first forward; 1 in the last

    name = "eoser"

    def __post_init__(self):
        super().__post_init__()
        check_probabilities(self, "gamma")

    def score(self, proposal, moment):
        last = max((self.steps or self.gen_length) - 1, 1)
        return rejected(proposal, moment, self.gamma, moment.forward_B / last)


@dataclasses.dataclass(frozen=True)
class Ascending(Decoder):
    """Forward k writes 2^k slots, the last one all that are left: log2(gen_length) forwards (ASS, of EOSER-ASS-RL).

    In `blocks` blocks, the last ones of which take one forward each, and the first one those before.
    """

    blocks: int = 1  # blocks of rising length
    block_length: int = 0  # given by gen_length and blocks
    gamma: float = 1.0  # what the score of an EOS is multiplied by at first (EOSER); 1 = nothing

    name = "ass"

    def __post_init__(self):
        if self.block_length:
            raise ConfigError(f"decoder.block_length={self.block_length}: its blocks follow from decoder.gen_length and decoder.blocks; leave it out")
        if self.gen_length < 2 or not 1 <= self.blocks <= self.steps:
            raise ConfigError(f"decoder.blocks={self.blocks} must be from 1 to the {self.steps} forwards of decoder.gen_length={self.gen_length}")
        object.__setattr__(self, "block_length", max(self.block_lengths))
        super().__post_init__()
        check_probabilities(self, "gamma")

    @property
    def steps(self) -> int:
        """Forwards for gen_length tokens."""
        return max(self.gen_length, 1).bit_length() - 1

    @property
    def block_lengths(self) -> tuple[int, ...]:
        S, L = self.steps, self.gen_length
        late = [2**k for k in range(S - self.blocks + 1, S - 1)] + [L - (2**(S - 1) - 1)] if self.blocks > 1 else []
        return (L - sum(late), *late)

    def score(self, proposal, moment):
        return rejected(proposal, moment, self.gamma, 2.0**(moment.forward_B + 1 - self.steps))

    def select(self, state, proposal, canvas_BC, writable_BC, moment):
        quota_B = jnp.where(moment.forward_B < self.steps - 1, 1 << jnp.minimum(moment.forward_B, 30), writable_BC.shape[1])
        return select.top(self.score(proposal, moment), writable_BC, quota_B), state


def rejected(proposal: Proposal, moment: Moment, gamma: float, progress_B: jax.Array) -> jax.Array:
    """Probabilities, those of EOS times gamma + (1 - gamma) · progress."""
    scale_B1 = (gamma + (1 - gamma) * jnp.minimum(progress_B, 1.0))[:, None].astype(jnp.float32)
    return jnp.where(proposal.token_BC == moment.eos_id, proposal.prob_BC * scale_B1, proposal.prob_BC)


@dataclasses.dataclass(frozen=True)
class Scheduled(Decoder):
    """What a forward writes follows a schedule of noise levels (dllm): the share of the slots left that its linear one gives, best score first.

    Forwards that would write nothing are left out.
    """

    steps: int = 64  # forwards for gen_length tokens
    order: str = "confidence"  # confidence, margin or entropy (Dream's maskgit_plus, topk_margin and entropy)
    order_temperature: float = 0.0  # slots are drawn from softmax(score / this); 0 = the best ones

    name = "scheduled"

    ORDERS: ClassVar[tuple[str, ...]] = ("confidence", "margin", "entropy")

    def __post_init__(self):
        super().__post_init__()
        if self.order not in self.ORDERS:
            raise ConfigError(f"decoder.order={self.order!r} is none of {', '.join(self.ORDERS)}")
        if self.steps < 1 or not 0 <= self.order_temperature < math.inf:
            raise ConfigError(f"decoder.steps={self.steps} must be at least 1, decoder.order_temperature={self.order_temperature} a number from 0 on")

    @property
    def steps_per_block(self) -> int:
        return max(self.steps // -(-self.gen_length // self.block_length), 1)

    def init(self, B: int) -> jax.Array:
        """Steps of the schedule that are over, (B,) int32."""
        return jnp.zeros(B, jnp.int32)

    def score(self, proposal, moment):
        score_BC = {"confidence": proposal.prob_BC, "margin": proposal.prob_BC - proposal.runner_up_BC, "entropy": -proposal.entropy_BC}[self.order]
        if self.order_temperature:  # the k largest of these are k draws without replacement
            return score_BC / self.order_temperature - jnp.log(-jnp.log(proposal.uniform_BC))
        return score_BC

    def select(self, state, proposal, canvas_BC, writable_BC, moment):
        left_B = writable_BC.sum(-1)
        step_B = jnp.maximum(state, self.steps_per_block + 1 - 2 * left_B)  # the first step whose share is at least 1
        quota_B = select.rounded_share(left_B, jnp.maximum(self.steps_per_block - step_B, 1))
        return select.top(self.score(proposal, moment), writable_BC, quota_B), step_B + 1


@dataclasses.dataclass(frozen=True)
class DreamOrigin(Decoder):
    """Each slot is written with the probability that the schedule 1 … eps of noise levels gives, whatever its score (Dream's `origin`).

    A forward may write nothing; the last one writes all.
    """

    block_length: int = 128  # slots of a block: the whole answer
    steps: int = 128  # forwards for each block
    eps: float = 1e-3  # the last noise level

    name = "dream_origin"

    def __post_init__(self):
        super().__post_init__()
        if self.steps < 1 or not 0 < self.eps < 1:
            raise ConfigError(f"decoder.steps={self.steps} must be at least 1, decoder.eps={self.eps} between 0 and 1")

    def score(self, proposal, moment):
        return -proposal.uniform_BC

    def select(self, state, proposal, canvas_BC, writable_BC, moment):
        level = lambda i: 1 + (self.eps - 1) * i / self.steps
        chance_B = jnp.where(moment.step_B >= self.steps - 1, 1.0, 1 - level(moment.step_B + 1) / level(moment.step_B))
        return writable_BC & (proposal.uniform_BC < chance_B[:, None]), state


# ---- as many slots as are sure enough --------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Adaptive(Decoder):
    """A forward writes what a rule allows, at least one slot; with `forwards`, at least what keeps the row within so many."""

    forwards: int = 0  # forwards of a row at most, where there are no fewer blocks; 0 = any number

    def __post_init__(self):
        super().__post_init__()
        if self.forwards < 0:
            raise ConfigError(f"decoder.forwards={self.forwards} must be at least 0")

    @abc.abstractmethod
    def allowed(self, proposal: Proposal, open_BC: jax.Array, moment: Moment) -> jax.Array:
        """The slots that the rule allows, (B, C) bool."""

    def select(self, state, proposal, canvas_BC, writable_BC, moment):
        write_BC = self.allowed(proposal, writable_BC, moment)
        if self.forwards:
            least_B = -(-moment.left_B // jnp.maximum(self.forwards - moment.forward_B, 1))
            write_BC |= select.top(self.score(proposal, moment), writable_BC, jnp.where(write_BC.sum(-1) < least_B, least_B, 0))
        return write_BC, state


@dataclasses.dataclass(frozen=True)
class Threshold(Adaptive):
    """Slots whose probability is at least a threshold (Fast-dLLM, arXiv 2505.22618)."""

    threshold: float = 0.9  # probability from which on a token is written at once
    slack: float = 0.0  # slots within this of the best one are written with it (dInfer: 1e-5)

    name = "threshold"

    def __post_init__(self):
        super().__post_init__()
        check_probabilities(self, "threshold", "slack")

    def allowed(self, proposal, open_BC, moment):
        return select.threshold(self.score(proposal, moment), open_BC, self.threshold, self.slack)


@dataclasses.dataclass(frozen=True)
class Factor(Adaptive):
    """The r surest slots, as long as the last of them has a probability of at least 1 - factor / (r + 1) (Fast-dLLM)."""

    factor: float = 1.0  # larger writes more at once

    name = "factor"

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.factor < math.inf:
            raise ConfigError(f"decoder.factor={self.factor} must be a finite number, at least 0")

    def allowed(self, proposal, open_BC, moment):
        return select.factor(proposal.prob_BC, open_BC, self.factor)


@dataclasses.dataclass(frozen=True)
class Hierarchical(Adaptive):
    """Slots above a threshold, and the surest one of each run of open neighbours if it is above a lower one (dInfer)."""

    threshold: float = 0.92  # probability above which a token is written at once
    low_threshold: float = 0.62  # probability above which the best token of a run is

    name = "hierarchical"

    def __post_init__(self):
        super().__post_init__()
        check_probabilities(self, "threshold", "low_threshold")

    def allowed(self, proposal, open_BC, moment):
        return select.hierarchical(proposal.prob_BC, open_BC, moment.position_BC, self.threshold, self.low_threshold)


@dataclasses.dataclass(frozen=True)
class Med(Adaptive):
    """Slots whose entropy is below a limit, `most` of them at most (MED, arXiv 2510.19990; d3LLM's entropy threshold without `most`)."""

    entropy: float = 0.2  # nats
    most: int = 32  # slots a forward; 0 = any number

    name = "med"

    def __post_init__(self):
        super().__post_init__()
        if not self.entropy >= 0 or self.most < 0:
            raise ConfigError(f"decoder.entropy={self.entropy} and decoder.most={self.most} must be at least 0")

    def score(self, proposal, moment):
        return -proposal.entropy_BC

    def allowed(self, proposal, open_BC, moment):
        return select.surest(proposal.entropy_BC, open_BC, self.entropy, self.most)


@dataclasses.dataclass(frozen=True)
class ContiguousMed(Med):
    """The same from the first open slot on, without leaving one out."""

    name = "contiguous_med"

    def allowed(self, proposal, open_BC, moment):
        return select.contiguous(proposal.entropy_BC, open_BC, self.entropy, self.most)


@dataclasses.dataclass(frozen=True)
class EntropyBounded(Adaptive):
    """The surest slots whose entropies, but the largest, add up to at most a limit (EB-Sampler, arXiv 2505.24857)."""

    entropy: float = 0.1  # nats

    name = "eb"

    def __post_init__(self):
        super().__post_init__()
        if not self.entropy >= 0:
            raise ConfigError(f"decoder.entropy={self.entropy} must be at least 0")

    def score(self, proposal, moment):
        return -proposal.entropy_BC

    def allowed(self, proposal, open_BC, moment):
        return select.entropy_bounded(proposal.entropy_BC, open_BC, self.entropy)


class Credits(NamedTuple):
    """Per slot a small table of tokens, -1 where there is none, and their credit: a forward adds to one token of a slot."""

    token_BCK: jax.Array
    credit_BCK: jax.Array


@dataclasses.dataclass(frozen=True)
class Credit(Threshold):
    """Threshold on logits + alpha ln(1 + credit), where tokens that were likeliest before have credit (dInfer)."""

    threshold: float = 0.8  # probability from which on a token is written at once
    slack: float = 1e-5  # slots within this of the best one are written with it
    alpha: float = 0.7  # weight of the credit
    gamma: float = 0.2  # a forward adds probability ** gamma
    decay: float = 0.8  # what is left of a credit after a forward

    name = "credit"
    needs_logits = True

    def init(self, B: int) -> Credits:
        shape = B, self.block_length, self.block_length  # a forward writes a slot at least, so it is over before a table is full
        return Credits(jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32))

    def adjust(self, state, logits_BCV, canvas_BC, writable_BC, moment):
        C = logits_BCV.shape[1]
        token_BCK, credit_BCK = state.token_BCK[:, :C], state.credit_BCK[:, :C] * self.decay
        kept_BCV = jnp.where(jnp.arange(logits_BCV.shape[-1]) == moment.mask_id, -jnp.inf, logits_BCV)
        favourite_BC = score_lib.first_largest(kept_BCV)
        prob_BC = jnp.exp(kept_BCV.max(-1) - jax.nn.logsumexp(kept_BCV, axis=-1))
        known_BCK = token_BCK == favourite_BC[..., None]
        free_BCK = (token_BCK < 0) & (jnp.cumsum(token_BCK < 0, axis=-1) == 1)
        place_BCK = jnp.where(known_BCK.any(-1, keepdims=True), known_BCK, free_BCK) & writable_BC[..., None]
        token_BCK = jnp.where(place_BCK, favourite_BC[..., None], token_BCK)
        credit_BCK = credit_BCK + jnp.where(place_BCK, (prob_BC**self.gamma)[..., None], 0.0)
        add = jax.vmap(jax.vmap(lambda logits_V, token_K, more_K: logits_V.at[jnp.where(token_K < 0, logits_V.size, token_K)].add(more_K, mode="drop")))
        bonus_BCK = jnp.where(writable_BC[..., None], self.alpha * jnp.log1p(credit_BCK), 0.0)
        state = Credits(state.token_BCK.at[:, :C].set(token_BCK), state.credit_BCK.at[:, :C].set(credit_BCK))
        return add(logits_BCV, token_BCK, bonus_BCK), state


# ---- block-causal models ---------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class BlockThreshold(Decoder):
    """Write every slot whose probability exceeds a threshold, but at least a fixed number a forward (LLaDA2.0's generate).

    Blocks are aligned to the row's start, prompt included, and attention is block-causal. Forward i of S writes at least
    block_length // S + (i < block_length % S) slots, the best ones if too few exceed the threshold, however many are open.
    """

    block_length: int = 32  # the model's own: blocks that attention sees whole, counted from the start of the sequence
    steps: int = 0  # most forwards a block; 0 = block_length. Never more than gen_length, as in the reference
    threshold: float = 0.95  # probability above which a token is written at once
    eos_at_block: bool = True  # an end of the text counts at the end of a block only, not after any forward

    name = "llada2"
    aligned = True
    block_causal = True

    def __post_init__(self):
        super().__post_init__()
        check_probabilities(self, "threshold")
        if self.steps < 0:
            raise ConfigError(f"decoder.steps={self.steps} must be at least 0")

    def select(self, state, proposal, canvas_BC, writable_BC, moment):
        quota_B = select.share(self.block_length, min(self.steps or self.block_length, self.gen_length), moment.step_B)
        sure_BC = writable_BC & (proposal.prob_BC > self.threshold)
        # both sets are the likeliest slots, so the union is the larger one
        return sure_BC | select.top(self.score(proposal, moment), writable_BC, quota_B), state


@dataclasses.dataclass(frozen=True)
class BlockEntropyBounded(EntropyBounded):
    """`eb` in blocks of a block-causal model (SGLang)."""

    eos_at_block: bool = True  # an end of the text counts at the end of a block only, not after any forward

    name = "llada2_eb"
    aligned = True
    block_causal = True


class EditState(NamedTuple):
    """Forwards since the block was full, and whether the last one changed a written slot; (B,)."""

    after_B: jax.Array
    edited_B: jax.Array


@dataclasses.dataclass(frozen=True)
class Editing(Decoder):
    """LLaDA2.1: write open slots above a threshold, `least` at least, and write over own tokens where another is likelier than a second threshold.

    A block is finished when it is full and a forward changes nothing more, or `most_after` forwards after it was full.
    """

    block_length: int = 32  # the model's own
    threshold: float = 0.95  # probability above which an open slot is written
    edit_threshold: float = 0.9  # probability above which a written one is written anew
    least: int = 1  # open slots written a forward at least
    most_after: int = 16  # forwards after the block is full at most
    penalty: float = 0.0  # what the logit of the token on the left is lowered by, against repetitions
    eos_at_block: bool = True  # an end of the text counts at the end of a block only, for a written one may be edited away

    name = "llada21"
    aligned = True
    block_causal = True
    edits = True

    def __post_init__(self):
        super().__post_init__()
        check_probabilities(self, "threshold", "edit_threshold")
        if self.least < 1 or self.most_after < 0 or not 0 <= self.penalty < math.inf:
            raise ConfigError(f"decoder.least={self.least} must be at least 1, decoder.most_after={self.most_after} and "
                              f"decoder.penalty={self.penalty} at least 0")

    @property
    def needs_logits(self) -> bool:
        return self.penalty > 0

    def init(self, B: int) -> EditState:
        return EditState(jnp.zeros(B, jnp.int32), jnp.zeros(B, bool))

    def adjust(self, state, logits_BCV, canvas_BC, writable_BC, moment):
        left_BC = jnp.pad(canvas_BC[:, :-1], ((0, 0), (1, 0)), constant_values=moment.mask_id)
        adjacent_BC = jnp.diff(moment.position_BC, axis=-1, prepend=moment.position_BC[:, :1]) == 1
        repeated_BCV = (jnp.arange(logits_BCV.shape[-1]) == left_BC[..., None]) & adjacent_BC[..., None]
        return logits_BCV - self.penalty * repeated_BCV, state

    def select(self, state, proposal, canvas_BC, writable_BC, moment):
        open_BC = writable_BC & (canvas_BC == moment.mask_id)
        sure_BC = open_BC & (proposal.prob_BC > self.threshold)
        few_B = sure_BC.sum(-1) < self.least
        new_BC = sure_BC | select.top(proposal.prob_BC, open_BC, jnp.where(few_B, self.least, 0))
        edit_BC = select.edits(proposal.token_BC, proposal.prob_BC, canvas_BC, writable_BC & ~open_BC, self.edit_threshold)
        return new_BC | edit_BC, EditState(state.after_B + ~open_BC.any(-1), edit_BC.any(-1))

    def finished(self, state, masked_BC, moment):
        settled_B = (state.after_B > 0) & ~state.edited_B
        return ~masked_BC.any(-1) & (settled_B | (state.after_B >= self.most_after))


# ---- several at once -------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Mixed(Decoder):
    """Several decoders in one batch, one compiled loop: row b follows decoder `choice_B[b]` of `generate`."""

    decoders: tuple[Decoder, ...] = ()
    block_length: int = 0  # that of each decoder

    name = "mixed"

    def __post_init__(self):
        if not self.decoders:
            raise ConfigError("a mixed decoder needs decoders")
        object.__setattr__(self, "block_length", max(decoder.block_length for decoder in self.decoders))

    @property
    def edits(self) -> bool:
        return any(decoder.edits for decoder in self.decoders)

    @property
    def needs_logits(self) -> bool:
        return any(decoder.needs_logits for decoder in self.decoders)

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
