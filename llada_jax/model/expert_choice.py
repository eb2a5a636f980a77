"""Experts choose tokens (arXiv 2202.09368): every expert takes its best tokens of a row, so that all have the same load without a loss.

Legal here, since nothing is causal: a token may depend on how it compares with later ones (OpenMoE 2). The choice is among the real tokens of
one row. So a row's result depends neither on the rows beside it nor on padding, and a decode is what it would be alone. Documents packed into one
row do compete with each other. One XLA implementation for all back ends; its sums are scattered, on GPUs in no fixed order.
"""

import math

import jax
import jax.numpy as jnp

from llada_jax import config as config_lib
from llada_jax.model.expert_parallel import Experts


def capacity(tokens: jax.Array | int, config: config_lib.Model) -> jax.Array | int:
    """⌈tokens · A / E⌉, how many of a row's tokens each expert takes; never more than there are."""
    return -(-tokens * config.experts_per_token // config.num_experts)


def mixture(experts: Experts, x_BTD: jax.Array, logits_BTE: jax.Array, valid_BT: jax.Array,
            config: config_lib.Model) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Σ_e score_te · expert_e(x_t) over the experts that chose token t, (B, T, D) float32; 1 where they did, (B, T, E); and the choice.

    The score is the router's, over all experts, times `router_scale`. Every expert takes the `capacity` of the row's `valid` tokens, those with
    its highest scores, the first among equals. A token may be chosen by all experts or by none: then it passes by the residual alone.
    """
    (B, T, E), score = logits_BTE.shape, jax.nn.softmax if config.router_score == "softmax" else jax.nn.sigmoid
    score_BET = jnp.swapaxes(score(logits_BTE), 1, 2)
    C = capacity(T, config)
    key_BET = jnp.where(valid_BT[:, None], jax.lax.stop_gradient(score_BET), -jnp.inf)
    tokens_BEC = jax.lax.top_k(key_BET, C)[1]
    taken_BEC = jnp.broadcast_to(jnp.arange(C) < capacity(valid_BT.sum(-1), config)[:, None, None], (B, E, C))
    weights_BEC = jnp.where(taken_BEC, jnp.take_along_axis(score_BET, tokens_BEC, axis=2) * config.router_scale, 0)
    row_B11 = jnp.arange(B)[:, None, None]
    rows_EBCD = jnp.swapaxes(x_BTD[row_B11, tokens_BEC], 0, 1)
    y_RD = experts(rows_EBCD.reshape(math.prod(rows_EBCD.shape[:3]), -1), jnp.full(E, B * C, jnp.int32))
    y_BECD = jnp.swapaxes(y_RD.reshape(E, B, C, -1), 0, 1).astype(jnp.float32) * weights_BEC[..., None]
    y_BTD = jnp.zeros(x_BTD.shape, jnp.float32).at[row_B11, tokens_BEC].add(y_BECD)
    load_BTE = jnp.zeros((B, T, E)).at[row_B11, tokens_BEC, jnp.arange(E)[:, None]].add(taken_BEC)
    return y_BTD, load_BTE, {"tokens": jnp.where(taken_BEC, tokens_BEC, T), "weights": weights_BEC}
