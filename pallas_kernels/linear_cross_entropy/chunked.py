"""Linear cross-entropy over chunks of packed rows: one loop with as many turns as the needed rows fill."""

import functools

import jax
import jax.numpy as jnp

CHUNK_LOGITS = 1 << 19  # logits held at a time, 2 MiB in float32: chunks of 512 rows at a vocabulary of 1024
MIN_ROWS = 64


def linear_cross_entropy(x_MD: jax.Array, w_DV: jax.Array, targets_M: jax.Array, needed_M: jax.Array) -> jax.Array:
    """See `api.linear_cross_entropy`. Needed rows are packed to the front by a stable counting sort."""
    M, V = x_MD.shape[0], w_DV.shape[1]
    rows = min(max(CHUNK_LOGITS // V, MIN_ROWS), M)
    slots = -(-M // rows) * rows
    rank_M = jnp.where(needed_M, jnp.cumsum(needed_M) - 1, slots)  # slot of each needed row; the others fall off the end
    source_R = jnp.full((slots,), M, jnp.int32).at[rank_M].set(jnp.arange(M, dtype=jnp.int32), mode="drop")
    return _packed(x_MD, w_DV, targets_M, source_R, rank_M, needed_M.sum(), rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _packed(x_MD, w_DV, targets_M, source_R, rank_M, count, rows):
    return _forward(x_MD, w_DV, targets_M, source_R, rank_M, count, rows)[0]


def _chunk(i, rows, source_R, x_MD, w_DV, targets_M):
    """Rows, float32 logits, targets and validity of chunk i."""
    source = jax.lax.dynamic_slice_in_dim(source_R, i * rows, rows)
    x = jnp.take(x_MD, source, axis=0, mode="fill", fill_value=0)
    target = jnp.take(targets_M, source, mode="fill", fill_value=0)
    return x, jnp.matmul(x, w_DV, preferred_element_type=jnp.float32), target, source < x_MD.shape[0]


def _forward(x_MD, w_DV, targets_M, source_R, rank_M, count, rows):
    def body(i, nll_R):
        _, logits, target, valid = _chunk(i, rows, source_R, x_MD, w_DV, targets_M)
        nll = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        return jax.lax.dynamic_update_slice_in_dim(nll_R, jnp.where(valid, nll, 0.0), i * rows, 0)
    nll_R = jax.lax.fori_loop(0, (count + rows - 1) // rows, body, jnp.zeros(source_R.shape, jnp.float32))
    nll_M = jnp.take(nll_R, rank_M, mode="fill", fill_value=0.0)
    return nll_M, (x_MD, w_DV, targets_M, source_R, rank_M, count)


def _backward(rows, saved, d_M):
    x_MD, w_DV, targets_M, source_R, rank_M, count = saved

    def body(i, carry):
        dx_RD, dw_DV = carry
        x, logits, target, valid = _chunk(i, rows, source_R, x_MD, w_DV, targets_M)
        d = jnp.where(valid, jnp.take(d_M, jax.lax.dynamic_slice_in_dim(source_R, i * rows, rows), mode="fill", fill_value=0.0), 0.0)
        d_logits = jax.nn.softmax(logits, axis=-1) - (jnp.arange(logits.shape[-1]) == target[:, None])
        d_logits = (d_logits * d[:, None]).astype(x.dtype)
        dx_RD = jax.lax.dynamic_update_slice_in_dim(dx_RD, (d_logits @ w_DV.T).astype(dx_RD.dtype), i * rows, 0)
        return dx_RD, dw_DV + jnp.matmul(x.T, d_logits, preferred_element_type=jnp.float32)
    start = (jnp.zeros((source_R.shape[0], x_MD.shape[1]), x_MD.dtype), jnp.zeros(w_DV.shape, jnp.float32))
    dx_RD, dw_DV = jax.lax.fori_loop(0, (count + rows - 1) // rows, body, start)
    dx_MD = jnp.take(dx_RD, rank_M, axis=0, mode="fill", fill_value=0)
    return dx_MD, dw_DV.astype(w_DV.dtype), None, None, None, None


_packed.defvjp(_forward, _backward)
