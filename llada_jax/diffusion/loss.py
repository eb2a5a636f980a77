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
    entropy_BT: jax.Array | None = None  # nats, of the distribution at a predicted token, where that was asked for
    right_BT: jax.Array | None = None  # bool, whether a predicted token is the most probable one


def elbo_terms(apply_fn: Callable[..., Any], cross_entropy_fn: Callable[..., Any], variables: Any, tokens_BT: jax.Array, noisy_BT: jax.Array,
               masked_BT: jax.Array, p_BT: jax.Array, positions_BT: jax.Array, spec: AttentionSpec,
               weight_fn: Callable[[jax.Array], jax.Array], block_BT: jax.Array | None = None, with_entropy: bool = False) -> tuple[Terms, Any]:
    """Terms of the negative ELBO (arXiv 2502.09992 eq. 3): weight(p) · -log p(token | noisy) at masked positions.

    Logits stand at their own position (no shift). Summed over positions, and averaged over (t, mask), the weighted terms
    are an unbiased estimate of the bound. With `block` (`blocks.ids`) it is that of block diffusion, p(token | noisy block, clean earlier blocks)
    (arXiv 2512.15745 eq. 1): one pass over [noisy ; clean], of which the noisy half predicts. Also returns the model's router statistics, over
    all positions that it saw. `with_entropy` says that `cross_entropy_fn` is `LanguageModel.cross_entropy_and_entropy`.
    """
    shapes.check("BT BT BT BT BT", tokens_BT, noisy_BT, masked_BT, p_BT, positions_BT)
    T = tokens_BT.shape[1]
    if block_BT is not None:
        noisy_BT, positions_BT, spec = blocks.doubled(noisy_BT, tokens_BT, positions_BT, spec, block_BT)
    hidden_BTD, _, stats = apply_fn(variables, noisy_BT, positions_BT, None, spec, None, None)
    found = cross_entropy_fn(variables, hidden_BTD[:, :T], tokens_BT, masked_BT)
    nll_BT, *more = found if with_entropy else (found,)
    weight_BT = jnp.where(masked_BT, weight_fn(jnp.where(masked_BT, p_BT, 1.0)), 0.0)
    return Terms(weight_BT * nll_BT, nll_BT, masked_BT.astype(jnp.float32), *more), stats


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


def confidence_loss(terms: Terms) -> jax.Array:
    """Mean entropy over the predicted tokens that are right already (CAP of LLaDA2.0, arXiv 2512.15745), nats; 0 where none is.

    Whether a token is right has no gradient, so the loss makes right tokens surer and leaves the others to the objective.
    """
    return jnp.where(terms.right_BT, terms.entropy_BT, 0.0).sum() / jnp.maximum(terms.right_BT.sum(), 1)


def weight_function(weighting: str, schedule: str, power: float, min_noise: float = 0.0, max_noise: float = 1.0) -> Callable[[jax.Array], jax.Array]:
    """weight(p) by name: elbo (the schedule's exact weight; 1/t on the linear one), count (L/k = 1/p), uniform (1).

    cart and cart_elbo are 1 and the exact weight, to be multiplied by `conversion.context_weights`.
    """
    return {
        "elbo": lambda p: schedule_lib.elbo_weight(p, schedule, power, min_noise, max_noise),
        "count": lambda p: 1 / p,
        "uniform": jnp.ones_like,
        "cart": jnp.ones_like,
        "cart_elbo": lambda p: schedule_lib.elbo_weight(p, schedule, power, min_noise, max_noise),
    }[weighting]


def term_weights(target_BT: jax.Array, segment_BT: jax.Array, normalization: str) -> jax.Array:
    """Weight of each position's term, (B, T) or a scalar, float32: the loss is Σ weight · term. It has terms at targets alone.

    token: one over all targets of the batch (LLaDA's pre-training, B·L);  masked: the same, where the targets are the masked tokens
    (dFactory: the plain mean over them);  sequence: segments (documents, answers) are averaged over their own targets, then over segments
    (LLaDA's SFT, answer length / B);  batch: one over the number of rows (dllm's names). What has no targets counts nowhere.
    """
    count_B = target_BT.sum(-1).astype(jnp.float32)
    if normalization in ("token", "masked"):
        return 1 / jnp.maximum(count_B.sum(), 1.0)
    if normalization == "batch":
        return 1 / jnp.maximum((count_B > 0).sum(), 1).astype(jnp.float32)
    if normalization == "sequence":
        per_segment = lambda target_T, segment_T: jnp.zeros(target_BT.shape[1] + 1, jnp.float32).at[segment_T].add(target_T)
        count_BS = jax.vmap(per_segment)(target_BT.astype(jnp.float32), segment_BT)
        segments = jnp.maximum((count_BS > 0).sum(), 1)
        return 1 / (jnp.maximum(jnp.take_along_axis(count_BS, segment_BT, axis=1), 1.0) * segments)
    raise ValueError(f"unknown normalization {normalization!r}")
