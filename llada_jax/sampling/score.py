"""What the model proposes at each slot: a token, how sure it is, and how torn.

Noise enters as an argument: a `Noise` gives 32 random bits for (kind, row, step, position) and nothing else, so a row's
draws do not depend on its neighbours, its place in the batch, or padding; a test can inject the bits of a reference run.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_confidence import counter_bits as threefry_bits

TOKEN, RANK = 0, 1  # kinds of draw: one word a vocabulary entry, to sample a token; one word a slot, to order slots at random

# (kind, row_B, step_B, position_BC, n) -> uint32 (B, C, n)
Noise = Callable[[int, jax.Array, jax.Array, jax.Array, int], jax.Array]


class Proposal(NamedTuple):
    """One candidate a slot, (B, C) each. Probabilities are softmax(logits) without noise or temperature, suppressed tokens excluded."""

    token_BC: jax.Array  # int32
    logprob_BC: jax.Array  # float32; log probability of `token` where it was drawn: under the temperature and the cuts of `Sampling`
    prob_BC: jax.Array  # float32; its probability
    runner_up_BC: jax.Array  # float32; largest probability among the other tokens
    entropy_BC: jax.Array  # float32, nats
    uniform_BC: jax.Array  # float32 in (0, 1); a fresh number for decoders that order slots at random


class Sampling(NamedTuple):
    """How a token is drawn; numbers, or (B,) arrays where rows differ."""

    temperature: Any = 0.0  # of Gumbel noise on the logits; 0 = the likeliest token
    top_k: Any = 0  # only the k likeliest tokens; 0 = all
    top_p: Any = 1.0  # only the likeliest tokens up to this share of the probability, the one that crosses it included


def counter_noise(seed_key: jax.Array) -> Noise:
    """Counter-based noise: word n under the key of (kind, row, step, position), as the kernels of `linear_confidence` count it."""

    def bits(kind, row_B, step_B, position_BC, n):
        keys_BC2 = noise_keys(seed_key, kind, row_B, step_B, position_BC)
        words = threefry_bits(keys_BC2.reshape(-1, 2), jnp.arange(n, dtype=jnp.int32)[None])
        return words.reshape(*position_BC.shape, n)

    return bits


def noise_keys(seed_key: jax.Array, kind: int, row_B: jax.Array, step_B: jax.Array, position_BC: jax.Array) -> jax.Array:
    """(B, C, 2) uint32: `seed_key` (a typed key) with kind, row, step and position folded in."""
    key = jax.random.fold_in(seed_key, kind)
    key_B = jax.vmap(lambda row, step: jax.random.fold_in(jax.random.fold_in(key, row), step))(row_B, step_B)
    key_BC = jax.vmap(lambda k, position_C: jax.vmap(lambda p: jax.random.fold_in(k, p))(position_C))(key_B, position_BC)
    return jax.random.key_data(key_BC)


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


def propose(logits_BCV: jax.Array, *, suppressed: Sequence[int], sampling: Sampling, noise: Noise,
            row_B: jax.Array, step_B: jax.Array, position_BC: jax.Array) -> Proposal:
    """Score logits (float32). At temperature T the token is argmax(logit - T ln(-ln u)) (Gumbel-max) over the tokens that the cuts leave;
    the lowest index wins ties.

    Suppressed tokens, the mask token among them, are never proposed: their logits count as -inf, in the probabilities too.
    """
    vocab_V = jnp.arange(logits_BCV.shape[-1])
    logits_BCV = logits_BCV.astype(jnp.float32)
    for token in suppressed:
        logits_BCV = jnp.where(vocab_V == token, -jnp.inf, logits_BCV)
    drawn_BCV, cut = logits_BCV, _is_set(sampling.top_k, 0) or _is_set(sampling.top_p, 1)
    temperature_B11 = jnp.broadcast_to(jnp.float32(sampling.temperature), row_B.shape)[:, None, None]
    if cut:
        drawn_BCV = cut_tail(logits_BCV, temperature_B11, sampling.top_k, sampling.top_p)
    noisy_BCV = drawn_BCV
    hot = _is_set(sampling.temperature, 0)
    if hot:
        noisy_BCV = drawn_BCV + temperature_B11 * gumbel(noise(TOKEN, row_B, step_B, position_BC, vocab_V.size))
    token_BC = first_largest(noisy_BCV)
    logprobs_BCV = jax.nn.log_softmax(logits_BCV, axis=-1)
    chosen_BCV = vocab_V == token_BC[..., None]
    of_chosen = lambda x_BCV: jnp.sum(jnp.where(chosen_BCV, x_BCV, 0.0), axis=-1)  # a sum keeps NaN; XLA:CPU's maximum of many may drop it
    model_BC = of_chosen(logprobs_BCV)
    logprob_BC = model_BC
    if hot or cut:
        scale_B11 = jnp.where(temperature_B11 > 0, temperature_B11, 1.0)
        logprob_BC = of_chosen(jax.nn.log_softmax(drawn_BCV / scale_B11, axis=-1))
    runner_up_BC = jnp.exp(jnp.max(jnp.where(chosen_BCV, -jnp.inf, logprobs_BCV), axis=-1))
    probs_BCV = jnp.exp(logprobs_BCV)
    entropy_BC = -jnp.sum(jnp.where(probs_BCV > 0, probs_BCV * logprobs_BCV, 0), axis=-1)
    uniform_BC = uniform(noise(RANK, row_B, step_B, position_BC, 1)[..., 0])
    return Proposal(token_BC, logprob_BC, jnp.exp(model_BC), runner_up_BC, entropy_BC, uniform_BC)


def cut_tail(logits_BCV: jax.Array, temperature_B11: jax.Array, top_k: Any, top_p: Any) -> jax.Array:
    """Logits with -inf for tokens beyond the `top_k` likeliest, and beyond the share `top_p` of the probability at this temperature.

    Ties with the last token that is kept are kept too.
    """
    V = logits_BCV.shape[-1]
    sorted_BCV = -jnp.sort(-logits_BCV, axis=-1)
    scale_B11 = jnp.where(temperature_B11 > 0, temperature_B11, 1.0)
    per_row = lambda x: jnp.broadcast_to(jnp.asarray(x), logits_BCV.shape[:1])[:, None, None]
    before_BCV = jnp.cumsum(probs := jax.nn.softmax(sorted_BCV / scale_B11, axis=-1), axis=-1) - probs
    kept_BCV = before_BCV < per_row(top_p)
    kept_BCV &= jnp.arange(V) < jnp.where(per_row(top_k) > 0, per_row(top_k), V)
    kept_BCV = kept_BCV.at[..., 0].set(True)
    least_BC1 = jnp.min(jnp.where(kept_BCV, sorted_BCV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BCV >= least_BC1, logits_BCV, -jnp.inf)


def _is_set(setting: Any, default: float) -> bool:
    """Whether a setting may differ from its default: an array may."""
    return not isinstance(setting, (int, float)) or setting != default
