"""What the model proposes at each slot: a token, how sure it is, and how torn.

Noise enters as an argument: a `Noise` gives 32 random bits for (kind, row, step, position) and nothing else, so a row's
draws do not depend on its neighbours, its place in the batch, or padding; a test can inject the bits of a reference run.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

TOKEN, RANK = 0, 1  # kinds of draw: one word a vocabulary entry, to sample a token; one word a slot, to order slots at random

# (kind, row_B, step_B, position_BC, n) -> uint32 (B, C, n)
Noise = Callable[[int, jax.Array, jax.Array, jax.Array, int], jax.Array]


class Proposal(NamedTuple):
    """One candidate a slot, (B, C) each. Probabilities are softmax(logits) without noise or temperature, mask token excluded."""

    token_BC: jax.Array  # int32
    logprob_BC: jax.Array  # float32; log probability of `token`
    prob_BC: jax.Array  # float32; its exponential
    runner_up_BC: jax.Array  # float32; largest probability among the other tokens
    entropy_BC: jax.Array  # float32, nats
    uniform_BC: jax.Array  # float32 in (0, 1); a fresh number for decoders that order slots at random


def counter_noise(seed_key: jax.Array) -> Noise:
    """Counter-based noise: key = fold_in of kind, row, step and position into `seed_key` (a typed key)."""

    def bits(kind, row_B, step_B, position_BC, n):
        key = jax.random.fold_in(seed_key, kind)
        key_B = jax.vmap(lambda row, step: jax.random.fold_in(jax.random.fold_in(key, row), step))(row_B, step_B)
        key_BC = jax.vmap(lambda k, position_C: jax.vmap(lambda p: jax.random.fold_in(k, p))(position_C))(key_B, position_BC)
        return jax.vmap(jax.vmap(lambda k: jax.random.bits(k, (n,), jnp.uint32)))(key_BC)

    return bits


def uniform(bits: jax.Array) -> jax.Array:
    """u = (bits + 1/2) / 2^32 as float32."""
    return (bits.astype(jnp.float32) + 0.5) * 2.0**-32


def gumbel(bits: jax.Array) -> jax.Array:
    """-ln(-ln u) of the same u, float32, with both tails kept.

    Near u = 1 a float32 u has only 2^-24 steps, which ties or truncates the largest draws of a big vocabulary (arXiv 2409.02908);
    there 1 - u is used, which is small and exact.
    """
    exponential = jnp.where(bits >= jnp.uint32(1 << 31), -jnp.log1p(-uniform(~bits)), -jnp.log(uniform(bits)))
    return -jnp.log(exponential)


def first_largest(x_BCV: jax.Array) -> jax.Array:
    """argmax over V, int32, where NaN counts as infinity.

    Two reductions, which XLA:CPU vectorises: its argmax of 32 x 8192 took 1.2 ms (two cores of an AMD EPYC virtual machine, 2026-11-26).
    """
    x_BCV = jax.lax.optimization_barrier(jnp.where(jnp.isnan(x_BCV), jnp.inf, x_BCV))  # both reductions read the same bits
    index_V = jnp.arange(x_BCV.shape[-1], dtype=jnp.int32)
    return jnp.where(x_BCV == x_BCV.max(-1, keepdims=True), index_V, index_V.size).min(-1)


def propose(logits_BCV: jax.Array, *, mask_id: int, temperature: float, noise: Noise,
            row_B: jax.Array, step_B: jax.Array, position_BC: jax.Array) -> Proposal:
    """Score logits (float32). At temperature T the token is argmax(logit - T ln(-ln u)) (Gumbel-max); the lowest index wins ties.

    The mask token is never proposed: its logit counts as -inf, in the probabilities too.
    """
    vocab_V = jnp.arange(logits_BCV.shape[-1])
    logits_BCV = jnp.where(vocab_V == mask_id, -jnp.inf, logits_BCV.astype(jnp.float32))
    noisy_BCV = logits_BCV
    if temperature > 0:
        noisy_BCV = logits_BCV + temperature * gumbel(noise(TOKEN, row_B, step_B, position_BC, vocab_V.size))
    token_BC = first_largest(noisy_BCV)
    logprobs_BCV = jax.nn.log_softmax(logits_BCV, axis=-1)
    chosen_BCV = vocab_V == token_BC[..., None]
    logprob_BC = jnp.max(jnp.where(chosen_BCV, logprobs_BCV, -jnp.inf), axis=-1)
    runner_up_BC = jnp.exp(jnp.max(jnp.where(chosen_BCV, -jnp.inf, logprobs_BCV), axis=-1))
    probs_BCV = jnp.exp(logprobs_BCV)
    entropy_BC = -jnp.sum(jnp.where(probs_BCV > 0, probs_BCV * logprobs_BCV, 0), axis=-1)
    uniform_BC = uniform(noise(RANK, row_B, step_B, position_BC, 1)[..., 0])
    return Proposal(token_BC, logprob_BC, jnp.exp(logprob_BC), runner_up_BC, entropy_BC, uniform_BC)
