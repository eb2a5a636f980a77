"""Plain XLA specification of the attention operation; the one place that builds a dense mask."""

import jax
import jax.numpy as jnp


def visible(spec) -> jax.Array | None:
    """The dense (B, T, S) boolean mask of an AttentionSpec; None where nothing is limited. Axes it does not limit are 1."""
    rules = []
    if spec.segment_q is not None:
        rules.append(spec.segment_q[:, :, None] == spec.segment_k[:, None, :])
    if spec.block_q is not None:
        query, key = spec.block_q[:, :, None], spec.block_k[:, None, :]
        if spec.half_q is None:
            rules.append(key <= query)
        else:
            clean_q, clean_k = spec.half_q[:, :, None] == 1, spec.half_k[:, None, :] == 1
            rules.append(jnp.where(clean_q, clean_k & (key <= query), jnp.where(clean_k, key < query, key == query)))
    if spec.padding_k is not None:
        rules.append(~spec.padding_k[:, None, :])
    mask = None
    for rule in rules:
        mask = rule if mask is None else mask & rule
    return mask


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, spec, scale: float) -> jax.Array:
    """See `api.attention`. Materialises the (B, K, G, T, S) scores in float32."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = (q_BTNH * scale).reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    mask_BTS = visible(spec)
    if mask_BTS is not None:
        scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    if mask_BTS is not None:  # a query that sees nothing: zeros, not the mean of all values
        out_BTKGH = jnp.where(mask_BTS.any(-1)[:, :, None, None, None], out_BTKGH, 0)
    return out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)
