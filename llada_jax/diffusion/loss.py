"""Objectives: per-token terms, and how they are weighted and averaged.

`elbo_terms` is the one place that computes per-token terms of the diffusion bound; `next_token_terms` is the
autoregressive objective of the same model. Neither knows the model: it is given as functions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llada_jax import shapes
from llada_jax.diffusion import blocks
from llada_jax.diffusion import schedule as schedule_lib
from pallas_kernels.attention import AttentionSpec


class Terms(NamedTuple):
    """Per-token results, each (B, T) float32."""

    weighted_BT: jax.Array  # weight · -log p(token), nats; 0 where nothing is predicted
    nll_BT: jax.Array  # -log p(token), nats; 0 where nothing is predicted
    predicted_BT: jax.Array  # 1.0 where a token is predicted


def elbo_terms(apply_fn: Callable[..., Any], cross_entropy_fn: Callable[..., Any], variables: Any, tokens_BT: jax.Array, noisy_BT: jax.Array,
               masked_BT: jax.Array, p_BT: jax.Array, positions_BT: jax.Array, spec: AttentionSpec,
               weight_fn: Callable[[jax.Array], jax.Array], block_BT: jax.Array | None = None) -> tuple[Terms, Any]:
    """Terms of the negative ELBO (arXiv 2502.09992 eq. 3): weight(p) · -log p(token | noisy) at masked positions.

    Logits stand at their own position (no shift). Summed over positions, and averaged over (t, mask), the weighted terms
    are an unbiased estimate of the bound. With `block` (`blocks.ids`) it is that of block diffusion, p(token | noisy block, clean earlier blocks)
    (arXiv 2512.15745 eq. 1): one pass over [noisy ; clean], of which the noisy half predicts. Also returns the model's router statistics, over
    all positions that it saw.
    """
    shapes.check("BT BT BT BT BT", tokens_BT, noisy_BT, masked_BT, p_BT, positions_BT)
    T = tokens_BT.shape[1]
    if block_BT is not None:
        noisy_BT, positions_BT, spec = blocks.doubled(noisy_BT, tokens_BT, positions_BT, spec, block_BT)
    hidden_BTD, _, stats = apply_fn(variables, noisy_BT, positions_BT, None, spec, None, None)
    nll_BT = cross_entropy_fn(variables, hidden_BTD[:, :T], tokens_BT, masked_BT)
    weight_BT = jnp.where(masked_BT, weight_fn(jnp.where(masked_BT, p_BT, 1.0)), 0.0)
    return Terms(weight_BT * nll_BT, nll_BT, masked_BT.astype(jnp.float32)), stats


def next_token_terms(apply_fn: Callable[..., Any], cross_entropy_fn: Callable[..., Any], variables: Any, tokens_BT: jax.Array,
                     maskable_BT: jax.Array, positions_BT: jax.Array, spec: AttentionSpec) -> tuple[Terms, Any]:
    """Exact -log p(token | earlier tokens) at each maskable token but the first of its segment; causal attention.

    The terms stand at the predicted token's position.
    """
    order_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    spec = spec._replace(block_q=order_BT, block_k=order_BT)
    hidden_BTD, _, stats = apply_fn(variables, tokens_BT, positions_BT, None, spec, None, None)
    follows = positions_BT[:, 1:] == positions_BT[:, :-1] + 1
    if spec.segment_q is not None:
        follows &= spec.segment_q[:, 1:] == spec.segment_q[:, :-1]
    predicted_BT = jnp.pad(follows & maskable_BT[:, 1:], ((0, 0), (0, 1)))
    nll_BT = cross_entropy_fn(variables, hidden_BTD, jnp.roll(tokens_BT, -1, axis=1), predicted_BT)
    nll_BT, predicted_BT = jnp.roll(nll_BT, 1, axis=1), jnp.roll(predicted_BT, 1, axis=1)
    return Terms(nll_BT, nll_BT, predicted_BT.astype(jnp.float32)), stats


def weight_function(weighting: str, schedule: str, power: float, min_noise: float = 0.0) -> Callable[[jax.Array], jax.Array]:
    """weight(p) by name: elbo (the schedule's exact weight; 1/t on the linear one), count (L/k = 1/p), uniform (1).

    cart and cart_elbo are 1 and the exact weight, to be multiplied by `conversion.context_weights`.
    """
    return {
        "elbo": lambda p: schedule_lib.elbo_weight(p, schedule, power, min_noise),
        "count": lambda p: 1 / p,
        "uniform": jnp.ones_like,
        "cart": jnp.ones_like,
        "cart_elbo": lambda p: schedule_lib.elbo_weight(p, schedule, power, min_noise),
    }[weighting]


def row_weights(maskable_BT: jax.Array, normalization: str) -> jax.Array:
    """Weight of each row's sum of terms, (B,): the loss is Σ_b weight_b Σ_i term_bi.

    token: one over all target tokens of the batch (LLaDA's pre-training, B·L);  sequence: rows are averaged over their own
    target tokens, then over rows (LLaDA's SFT, answer length / B);  batch: one over the number of rows (dllm's names).
    Rows without target tokens count nowhere.
    """
    count_B = maskable_BT.sum(-1).astype(jnp.float32)
    rows = jnp.maximum((count_B > 0).sum(), 1)
    if normalization == "token":
        return jnp.broadcast_to(1 / jnp.maximum(count_B.sum(), 1.0), count_B.shape)
    if normalization == "sequence":
        return 1 / (jnp.maximum(count_B, 1.0) * rows)
    if normalization == "batch":
        return jnp.broadcast_to(1.0 / rows, count_B.shape)
    raise ValueError(f"unknown normalization {normalization!r}")
