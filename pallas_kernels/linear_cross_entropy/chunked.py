"""Linear cross-entropy over chunks of packed rows: one loop with as many turns as the needed rows fill."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy import reference

CHUNK_LOGITS = 1 << 19  # logits held at a time, 2 MiB in float32: chunks of 512 rows at a vocabulary of 1024
MIN_ROWS = 64


def loss_and_logsumexp(x_MD: jax.Array, w_DV: jax.Array, targets_M: jax.Array, needed_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See `api.loss_and_logsumexp`. Needed rows are packed to the front by a stable counting sort."""
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
    def body(i, outs_R):
        _, logits, target, valid = _chunk(i, rows, source_R, x_MD, w_DV, targets_M)
        return tuple(jax.lax.dynamic_update_slice_in_dim(out_R, jnp.where(valid, new, 0.0), i * rows, 0)
                     for out_R, new in zip(outs_R, reference.of_logits(logits, target), strict=True))
    outs_R = jax.lax.fori_loop(0, (count + rows - 1) // rows, body, (jnp.zeros(source_R.shape, jnp.float32),) * 2)
    outs_M = tuple(jnp.take(out_R, rank_M, mode="fill", fill_value=0.0) for out_R in outs_R)
    return outs_M, (x_MD, w_DV, targets_M, source_R, rank_M, count)


def _backward(rows, saved, d_M):
    x_MD, w_DV, targets_M, source_R, rank_M, count = saved
    d_nll_M, d_logsumexp_M = d_M

    def body(i, carry):
        dx_RD, dw_DV = carry
        x, logits, target, _ = _chunk(i, rows, source_R, x_MD, w_DV, targets_M)
        source = jax.lax.dynamic_slice_in_dim(source_R, i * rows, rows)
        soft, hard = (jnp.take(d_M, source, mode="fill", fill_value=0.0)[:, None] for d_M in (d_nll_M + d_logsumexp_M, d_nll_M))
        d_logits = soft * jax.nn.softmax(logits, axis=-1) - jnp.where(jnp.arange(logits.shape[-1]) == target[:, None], hard, 0.0)
        d_logits = d_logits.astype(x.dtype)
        dx_RD = jax.lax.dynamic_update_slice_in_dim(dx_RD, (d_logits @ w_DV.T).astype(dx_RD.dtype), i * rows, 0)
        return dx_RD, dw_DV + jnp.matmul(x.T, d_logits, preferred_element_type=jnp.float32)
    start = (jnp.zeros((source_R.shape[0], x_MD.shape[1]), x_MD.dtype), jnp.zeros(w_DV.shape, jnp.float32))
    dx_RD, dw_DV = jax.lax.fori_loop(0, (count + rows - 1) // rows, body, start)
    dx_MD = jnp.take(dx_RD, rank_M, axis=0, mode="fill", fill_value=0)
    return dx_MD, dw_DV.astype(w_DV.dtype), None, None, None, None


_packed.defvjp(_forward, _backward)
