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
    """See `api.attention`. Materialises the (B, K, G, T, S) scores in float32.

    The G query heads of a key/value head are joined with the positions, so that XLA:CPU sees plain batched matmuls.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    q_BKMH = (q_BTNH * scale).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    k_BKSH = k_BSKH.transpose(0, 2, 1, 3)
    scores_BKMS = jnp.einsum("BKMH,BKSH->BKMS", q_BKMH, k_BKSH, preferred_element_type=jnp.float32)
    scores_BKGTS = scores_BKMS.reshape(B, K, G, T, S)
    mask_BTS = visible(spec)
    if mask_BTS is not None:
        scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKMS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype).reshape(B, K, G * T, S)
    out_BKMH = jnp.matmul(weights_BKMS, v_BSKH.transpose(0, 2, 1, 3))
    out_BTKGH = out_BKMH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4)
    if mask_BTS is not None:  # a query that sees nothing: zeros, not the mean of all values
        out_BTKGH = jnp.where(mask_BTS.any(-1)[:, :, None, None, None], out_BTKGH, 0)
    return out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)
