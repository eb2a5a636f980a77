"""The decoding loop: model → score → select → commit → advance, in one jitted `lax.while_loop` without a host round-trip.

Every state variable is per row, so rows sit in different blocks of the same forward and each advances by itself.
The model is given as functions (a toy will do):
  apply_fn(variables, tokens_BT, positions_BT, slots, attention_spec, cache, store, wanted_BC) -> (hidden_BCD, cache, stats)
  head_fn(variables, hidden_BCD) -> logits_BCV, float32; called on the slots of each row's block only
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llada_jax.sampling.canvas import Canvas
from llada_jax.sampling.score import Noise, counter_noise, propose
from llada_jax.sampling.trace import GIVEN, Trace
from pallas_kernels.attention import AttentionSpec


class Carry(NamedTuple):
    """State of the loop."""

    tokens_BT: jax.Array  # int32, the canvas
    block_B: jax.Array  # int32, the block that each row is writing
    done_B: jax.Array  # bool
    forwards_B: jax.Array  # int32, forwards of rows that were not done
    calls: jax.Array  # int32, model calls
    decoder: Any  # the decoder's own state, a pytree of (B, ...) arrays
    reveal_step_BT: jax.Array
    reveal_score_BT: jax.Array
    reveal_logprob_BT: jax.Array


class Rules(NamedTuple):
    """What a loop is compiled for; hashable. `noise` is made from the key given to `generate`."""

    apply_fn: Callable
    head_fn: Callable
    decoder: Any
    mask_id: int
    eos_id: int
    stop_at_eos: bool = False
    noise: Callable[[jax.Array], Noise] = counter_noise


def generate(apply_fn: Callable, head_fn: Callable, variables: Any, canvas: Canvas, decoder: Any, *, key: jax.Array, row_B: jax.Array,
             mask_id: int, eos_id: int, stop_at_eos: bool = False, noise: Callable[[jax.Array], Noise] = counter_noise,
             compiler_options: dict[str, str] | None = None) -> tuple[jax.Array, Trace]:
    """Fill the writable slots of `canvas`; (tokens_BT, trace).

    `row_B` (int32) names each row for the noise; with `key` and the positions it decides every draw, so a row's result does not
    depend on the batch. With `stop_at_eos` a row is done when an EOS stands in the run of slots that ends the canvas and no mask is
    left of it; masks right of it become EOS. A block-causal decoder looks for it at the end of a block only. `noise` builds the
    noise from `key`; give another to inject the numbers of a reference.
    One compile for each shape, decoder and model, with `compiler_options` of XLA.
    """
    rules = Rules(apply_fn, head_fn, decoder, mask_id, eos_id, stop_at_eos, noise)
    return compiled(**(compiler_options or {}))(rules, variables, Canvas(*map(jnp.asarray, canvas)), key, row_B)


@functools.cache
def compiled(**options: str) -> Callable:
    """`_generate` jitted with these compiler options."""
    return jax.jit(_generate, static_argnums=0, compiler_options=options or None)


def _generate(rules: Rules, variables: Any, canvas: Canvas, key: jax.Array, row_B: jax.Array) -> tuple[jax.Array, Trace]:
    carry = jax.lax.while_loop(running, lambda carry: step(rules, variables, canvas, key, row_B, carry), start(rules, canvas))
    return carry.tokens_BT, trace_of(rules, canvas, carry)


def start(rules: Rules, canvas: Canvas) -> Carry:
    """The loop's state before the first forward; rows without a writable slot are done."""
    B, T = canvas.tokens_BT.shape
    nothing_BT = jnp.full((B, T), jnp.nan, jnp.float32)
    return Carry(tokens_BT=canvas.tokens_BT, block_B=jnp.zeros(B, jnp.int32), done_B=~canvas.writable_BT.any(-1),
                 forwards_B=jnp.zeros(B, jnp.int32), calls=jnp.int32(0), decoder=rules.decoder.init(B),
                 reveal_step_BT=jnp.full((B, T), GIVEN, jnp.int32), reveal_score_BT=nothing_BT, reveal_logprob_BT=nothing_BT)


def running(carry: Carry) -> jax.Array:
    """Whether any row is not done."""
    return ~carry.done_B.all()


def step(rules: Rules, variables: Any, canvas: Canvas, key: jax.Array, row_B: jax.Array, carry: Carry) -> Carry:
    """One forward and what follows from it."""
    T = carry.tokens_BT.shape[1]
    slots_BC, inside_BC = block_slots(canvas.block_BT, carry.block_B, min(rules.decoder.block_length, T))
    logits_BCV = forward(rules, variables, canvas, carry.tokens_BT, slots_BC)
    tokens_BC, position_BC = (jnp.take_along_axis(x, slots_BC, axis=1) for x in (carry.tokens_BT, canvas.positions_BT))
    proposal = propose(logits_BCV, mask_id=rules.mask_id, temperature=rules.decoder.temperature, noise=rules.noise(key),
                       row_B=row_B, step_B=carry.forwards_B, position_BC=position_BC)

    open_BC = inside_BC & (tokens_BC == rules.mask_id) & ~carry.done_B[:, None]
    write_BC, state = rules.decoder.select(carry.decoder, proposal, tokens_BC, open_BC)
    # slots outside the block go to index T, which `drop` ignores
    target_BC = jnp.where(write_BC, slots_BC, T)
    put = jax.vmap(lambda old_T, slots_C, new_C: old_T.at[slots_C].set(new_C, mode="drop"))
    tokens_BT = put(carry.tokens_BT, target_BC, proposal.token_BC)
    step_BC = jnp.broadcast_to(carry.forwards_B[:, None], slots_BC.shape)
    reveal_step_BT = put(carry.reveal_step_BT, target_BC, step_BC)

    full_B = (open_BC == write_BC).all(-1)
    block_B = carry.block_B + (full_B & ~carry.done_B)
    done_B = carry.done_B | (block_B > canvas.block_BT.max(-1))
    if rules.stop_at_eos:
        ended_B = reached_eos(tokens_BT, canvas.block_BT >= 0, rules.mask_id, rules.eos_id) & ~carry.done_B
        if rules.decoder.block_causal:
            ended_B = ended_B & full_B
        fill_BT = ended_B[:, None] & (tokens_BT == rules.mask_id)
        tokens_BT = jnp.where(fill_BT, rules.eos_id, tokens_BT)
        reveal_step_BT = jnp.where(fill_BT, carry.forwards_B[:, None], reveal_step_BT)
        done_B = done_B | ended_B
    fresh = rules.decoder.init(len(done_B))
    return Carry(
        tokens_BT, block_B, done_B, carry.forwards_B + ~carry.done_B, carry.calls + 1,
        jax.tree.map(lambda new, old: jnp.where(full_B.reshape((-1,) + (1,) * (old.ndim - 1)), new, old), fresh, state),
        reveal_step_BT, put(carry.reveal_score_BT, target_BC, rules.decoder.score(proposal)),
        put(carry.reveal_logprob_BT, target_BC, proposal.logprob_BC))


def forward(rules: Rules, variables: Any, canvas: Canvas, tokens_BT: jax.Array, slots_BC: jax.Array) -> jax.Array:
    """Logits (B, C, V) at `slots` from the whole canvas.

    Unsupervised classifier-free guidance (LLaDA, arXiv 2502.09992): un + (guidance + 1)(cond - un), where `un` comes from the canvas
    with the mask token on all given slots. The two canvases of a row stand side by side in one batch, hence on one device.
    """
    decoder, positions_BT = rules.decoder, canvas.positions_BT
    # a block sees itself and earlier ones alone, so it gets the numbers that it would get without the canvas right of it
    spec = AttentionSpec.own(block=positions_BT // decoder.block_length if decoder.block_causal else None, padding=~canvas.seen)
    if decoder.guidance:
        unprompted_BT = jnp.where(canvas.valid_BT & ~canvas.writable_BT, rules.mask_id, tokens_BT)
        tokens_BT = jnp.stack([tokens_BT, unprompted_BT], axis=1).reshape(-1, tokens_BT.shape[1])
        positions_BT, slots_BC, spec = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), (positions_BT, slots_BC, spec))
    hidden_BCD, _, _ = rules.apply_fn(variables, tokens_BT, positions_BT, None, spec, None, None, slots_BC)
    logits_BCV = rules.head_fn(variables, hidden_BCD)
    if decoder.guidance:
        cond_BCV, un_BCV = logits_BCV[::2], logits_BCV[1::2]
        logits_BCV = un_BCV + (decoder.guidance + 1) * (cond_BCV - un_BCV)
    return logits_BCV


def block_slots(block_BT: jax.Array, block_B: jax.Array, C: int) -> tuple[jax.Array, jax.Array]:
    """The slots of each row's current block in order, (B, C) int32, and which of them exist (a block may hold fewer than C)."""
    T = block_BT.shape[1]
    order_BT = jnp.argsort(block_BT, axis=-1, stable=True)
    first_B = (block_BT < block_B[:, None]).sum(-1)
    index_BC = first_B[:, None] + jnp.arange(C)
    slots_BC = jnp.take_along_axis(order_BT, jnp.minimum(index_BC, T - 1), axis=1)
    inside_BC = (index_BC < T) & (jnp.take_along_axis(block_BT, slots_BC, axis=1) == block_B[:, None])
    return slots_BC, inside_BC


def reached_eos(tokens_BT: jax.Array, writable_BT: jax.Array, mask_id: int, eos_id: int) -> jax.Array:
    """Rows whose text has ended: an EOS in the run of writable slots that ends the canvas, with no mask left of it."""
    tail_BT = jnp.flip(jnp.cumprod(jnp.flip(writable_BT, -1).astype(jnp.int32), axis=-1), -1) > 0
    clear_BT = jnp.cumsum(tokens_BT == mask_id, axis=-1) == 0
    return (tail_BT & clear_BT & (tokens_BT == eos_id)).any(-1)


def trace_of(rules: Rules, canvas: Canvas, carry: Carry) -> Trace:
    """What the finished loop knows of its own course."""
    kinds = ("full", "guidance") if rules.decoder.guidance else ("full",)
    return Trace(canvas.tokens_BT, carry.tokens_BT, carry.reveal_step_BT, carry.reveal_score_BT, carry.reveal_logprob_BT,
                 forwards=dict.fromkeys(kinds, carry.forwards_B), calls={"full": carry.calls})
