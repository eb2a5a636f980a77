"""The decoders: small frozen dataclasses, each with only its own fields, made of the rules of `select.py`. `presets.py` names them."""

import abc
import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from llada_jax.config import ConfigError
from llada_jax.sampling import score as score_lib
from llada_jax.sampling import select
from llada_jax.sampling.decoder import Decoder, Moment
from llada_jax.sampling.score import Proposal


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

    forwards: int = 0  # forwards of a row at most, or one for each block, and one more where the last is shorter; 0 = any number

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


@dataclasses.dataclass(frozen=True)
class Smoothed(Threshold):
    """Threshold, where an open slot of the block goes into the next forward as the mask's embedding plus a share of those proposed there (dInfer's
    iteration smoothing).

    The share of the k-th forward is min(soft + growth · k, most), and the threshold falls from 1 by `fall` a forward.
    """

    threshold: float = 0.8  # probability from which on a token is written at once
    slack: float = 1e-5  # slots within this of the best one are written with it
    soft: float = 0.15  # share of the expected embedding after the first forward
    growth: float = 0.02  # what it grows by a forward
    most: float = 0.3  # and up to
    fall: float = 0.02  # what the threshold falls by a forward, from 1
    tokens: int = 0  # of the likeliest tokens alone; 0 = of all

    name = "smoothed"
    smooths = True

    def __post_init__(self):
        super().__post_init__()
        if min(self.soft, self.growth, self.most, self.fall, self.tokens) < 0 or not math.isfinite(self.soft + self.growth + self.most + self.fall):
            raise ConfigError(f"decoder.soft={self.soft}, growth={self.growth}, most={self.most}, fall={self.fall} and tokens={self.tokens} "
                              "must be finite numbers, at least 0")
        if self.guidance:
            raise ConfigError(f"decoder.guidance={self.guidance} does not go with smoothing: nothing was proposed without the given text")

    @property
    def soft_tokens(self) -> int:
        return self.tokens

    def softness(self, moment):
        return jnp.minimum(self.soft + self.growth * moment.forward_B, self.most)

    def allowed(self, proposal, open_BC, moment):
        least_B1 = jnp.maximum(1 - self.fall * moment.forward_B, self.threshold)[:, None]
        return select.threshold(self.score(proposal, moment), open_BC, least_B1, self.slack)


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
        place = lambda logits_V, token_K: jnp.where(token_K < 0, logits_V.size, token_K)
        add = jax.vmap(jax.vmap(lambda logits_V, token_K, more_K: logits_V.at[place(logits_V, token_K)].add(more_K, mode="drop")))
        bonus_BCK = jnp.where(writable_BC[..., None], self.alpha * jnp.log1p(credit_BCK), 0.0)
        state = Credits(state.token_BCK.at[:, :C].set(token_BCK), state.credit_BCK.at[:, :C].set(credit_BCK))
        return add(logits_BCV, token_BCK, bonus_BCK), state
