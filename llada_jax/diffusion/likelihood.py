"""Held-out likelihood bounds."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llada_jax.diffusion import corrupt as corrupt_lib
from llada_jax.diffusion import loss as loss_lib
from pallas_kernels.attention import AttentionSpec

LEVELS = 8  # bins of the mask probability in reports by noise level


class Bound(NamedTuple):
    """One draw's estimate for each row."""

    nats_B: jax.Array  # upper bound on -log p(row), nats
    p_B: jax.Array  # share of tokens masked
    nll_B: jax.Array  # mean -log p(token) over the masked tokens, nats


def bound(apply_fn: Callable[..., Any], cross_entropy_fn: Callable[..., Any], variables: Any, batch: dict[str, jax.Array], spec: AttentionSpec,
          mask_id: int, seed: int, draw: jax.Array, draws: int) -> Bound:
    """Unbiased estimate of the negative ELBO of each row: k of its L target tokens masked, weight L/k.

    k is uniform in 1..L and stratified: rows are spread evenly by the golden ratio from an offset drawn by the seed, and the
    `draws` draws of a row evenly between them. The masks depend on (seed, sample index, draw, position) alone, so that every
    evaluation sees the same noise. Exact-count masks with weight L/k vary far less than 1/t (arXiv 2502.09992 eq. 6).
    """
    noise = corrupt_lib.Noise(mask_id, corruption="exact_count")
    shift = jax.random.uniform(jax.random.fold_in(jax.random.key(seed), 0))
    golden_B = (batch["index"].astype(jnp.uint32) * jnp.uint32(2654435769)).astype(jnp.float32) * 2.0**-32  # 2^32 / golden ratio, mod 1
    t_BU = (((golden_B + shift) % 1.0 + draw) / draws)[:, None]
    noisy_BT, masked_BT, p_BT = corrupt_lib.corrupt((seed, 0, draw), batch["index"], batch["tokens"], batch["maskable"],
                                                    jnp.zeros_like(batch["tokens"]), noise, t_BU)
    terms, _ = loss_lib.elbo_terms(apply_fn, cross_entropy_fn, variables, batch["tokens"], noisy_BT, masked_BT, p_BT, batch["position"], spec,
                                   lambda p: 1 / p)
    masked_B = terms.predicted_BT.sum(-1)
    return Bound(terms.weighted_BT.sum(-1), jnp.max(jnp.where(masked_BT, p_BT, 0.0), axis=-1), terms.nll_BT.sum(-1) / jnp.maximum(masked_B, 1.0))


def exact(apply_fn: Callable[..., Any], cross_entropy_fn: Callable[..., Any], variables: Any, batch: dict[str, jax.Array],
          spec: AttentionSpec) -> Bound:
    """-log p(row) of an autoregressive model in the same form; the first token of each segment is not predicted."""
    terms, _ = loss_lib.next_token_terms(apply_fn, cross_entropy_fn, variables, batch["tokens"], batch["maskable"], batch["position"], spec)
    nats_B, count_B = terms.nll_BT.sum(-1), jnp.maximum(terms.predicted_BT.sum(-1), 1.0)
    return Bound(nats_B, jnp.ones_like(nats_B), nats_B / count_B)
