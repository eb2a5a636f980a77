"""Decoders of block-causal models (LLaDA2): blocks are the model's own, aligned to the start of the row."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llada_jax.config import ConfigError
from llada_jax.sampling import select
from llada_jax.sampling.decoder import Decoder
from llada_jax.sampling.decoders import EntropyBounded, check_probabilities


@dataclasses.dataclass(frozen=True)
class BlockThreshold(Decoder):
    """Write every slot whose probability exceeds a threshold, but at least a fixed number a forward (LLaDA2.0's generate).

    Blocks are aligned to the row's start, prompt included, and attention is block-causal. Forward i of S writes at least
    block_length // S + (i < block_length % S) slots, the best ones if too few exceed the threshold, however many are open.
    """

    block_length: int = 32  # the model's own: blocks that attention sees whole, counted from the start of the sequence
    steps: int = 0  # most forwards a block; 0 = block_length. Never more than gen_length, as in the reference
    threshold: float = 0.95  # probability above which a token is written at once
    eos_at_block: bool = dataclasses.field(default=True, kw_only=True)  # as the reference has it

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

    eos_at_block: bool = dataclasses.field(default=True, kw_only=True)  # as the reference has it

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
    eos_at_block: bool = dataclasses.field(default=True, kw_only=True)  # as a written end of the text may be edited away

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
