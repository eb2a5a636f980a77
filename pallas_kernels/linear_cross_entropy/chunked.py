"""Linear cross-entropy over chunks of packed rows: one loop with as many turns as the needed rows fill."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy import reference

CHUNK_LOGITS = 1 << 21  # logits computed at a time, 8 MiB in float32: chunks of 256 rows at a vocabulary of 8192
KEPT_LOGITS = 1 << 24  # logits that the forward pass keeps for the backward one, 64 MiB in float32; of more, none
MIN_ROWS = 64


def loss_and_logsumexp(x_MD: jax.Array, w_DV: jax.Array, targets_M: jax.Array, needed_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See `api.loss_and_logsumexp`."""
    return _of_needed(x_MD, w_DV, targets_M, needed_M, entropy=False)


def loss_and_entropy(x_MD: jax.Array, w_DV: jax.Array, targets_M: jax.Array, needed_M: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.loss_and_entropy`. Nothing more is kept for the backward pass than without the entropy, which it makes again too."""
    nll_M, _, entropy_M, right_M = _of_needed(x_MD, w_DV, targets_M, needed_M, entropy=True)
    return nll_M, entropy_M, right_M > 0


def _of_needed(x_MD, w_DV, targets_M, needed_M, entropy):
    """Needed rows are packed to the front by a stable counting sort."""
    M, V = x_MD.shape[0], w_DV.shape[1]
    rows = min(max(CHUNK_LOGITS // V, MIN_ROWS), M)
    slots = -(-M // rows) * rows
    rank_M = jnp.where(needed_M, jnp.cumsum(needed_M) - 1, slots)  # slot of each needed row; the others fall off the end
    source_R = jnp.full((slots,), M, jnp.int32).at[rank_M].set(jnp.arange(M, dtype=jnp.int32), mode="drop")
    return _packed(x_MD, w_DV, targets_M, source_R, rank_M, needed_M.sum(), rows, entropy)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _packed(x_MD, w_DV, targets_M, source_R, rank_M, count, rows, entropy):
    return _forward(x_MD, w_DV, targets_M, source_R, rank_M, count, rows, entropy, keep=False)[0]


def _chunk(i, rows, source_R, x_MD, targets_M):
    """Sources, rows, targets and validity of chunk i."""
    source = jax.lax.dynamic_slice_in_dim(source_R, i * rows, rows)
    x = jnp.take(x_MD, source, axis=0, mode="fill", fill_value=0)
    target = jnp.take(targets_M, source, mode="fill", fill_value=0)
    return source, x, target, source < x_MD.shape[0]


def _logits(x_RD, w_DV):
    return jnp.matmul(x_RD, w_DV, preferred_element_type=jnp.float32)


def _forward(x_MD, w_DV, targets_M, source_R, rank_M, count, rows, entropy, keep):
    R, V = len(source_R), w_DV.shape[1]
    of_logits, outs = (reference.entropy_of_logits, 4) if entropy else (reference.of_logits, 2)

    def body(i, carry):
        outs_R, kept_RV = carry
        _, x, target, valid = _chunk(i, rows, source_R, x_MD, targets_M)
        logits = _logits(x, w_DV)
        put = lambda array, new: jax.lax.dynamic_update_slice_in_dim(array, new, i * rows, 0)
        outs_R = tuple(put(out_R, jnp.where(valid, new, 0.0)) for out_R, new in zip(outs_R, of_logits(logits, target), strict=True))
        return outs_R, put(kept_RV, logits) if keep else None

    kept_RV = jax.lax.empty((R, V), jnp.float32) if keep else None
    outs_R, kept_RV = jax.lax.fori_loop(0, _turns(count, rows), body, ((jnp.zeros(R, jnp.float32),) * outs, kept_RV))
    outs_M = tuple(jnp.take(out_R, rank_M, mode="fill", fill_value=0.0) for out_R in outs_R)
    return outs_M, (x_MD, w_DV, targets_M, source_R, rank_M, count, outs_R[1:3], kept_RV)


def _backward(rows, entropy, saved, d_M):
    x_MD, w_DV, targets_M, source_R, rank_M, count, (logsumexp_R, *entropy_R), kept_RV = saved
    d_nll_M, d_logsumexp_M, *d_entropy_M = d_M  # whether a row is right has no gradient

    def body(i, carry):
        dx_RD, dw_DV = carry
        source, x, target, _ = _chunk(i, rows, source_R, x_MD, targets_M)
        of_chunk = lambda array: jax.lax.dynamic_slice_in_dim(array, i * rows, rows)
        logits = _logits(x, w_DV) if kept_RV is None else of_chunk(kept_RV)
        soft, hard = (jnp.take(d_M, source, mode="fill", fill_value=0.0)[:, None] for d_M in (d_nll_M + d_logsumexp_M, d_nll_M))
        logprobs = logits - of_chunk(logsumexp_R)[:, None]
        d_logits = soft * jnp.exp(logprobs) - jnp.where(jnp.arange(logits.shape[-1]) == target[:, None], hard, 0.0)
        if entropy:
            change = jnp.take(d_entropy_M[0], source, mode="fill", fill_value=0.0)
            d_logits -= change[:, None] * jnp.exp(logprobs) * (logprobs + of_chunk(entropy_R[0])[:, None])
        d_logits = d_logits.astype(x.dtype)
        dx_RD = jax.lax.dynamic_update_slice_in_dim(dx_RD, (d_logits @ w_DV.T).astype(dx_RD.dtype), i * rows, 0)
        return dx_RD, dw_DV + jnp.matmul(x.T, d_logits, preferred_element_type=jnp.float32)

    start = (jnp.zeros((source_R.shape[0], x_MD.shape[1]), x_MD.dtype), jnp.zeros(w_DV.shape, jnp.float32))
    dx_RD, dw_DV = jax.lax.fori_loop(0, _turns(count, rows), body, start)
    dx_MD = jnp.take(dx_RD, rank_M, axis=0, mode="fill", fill_value=0)
    return dx_MD, dw_DV.astype(w_DV.dtype), None, None, None, None


def _turns(count, rows):
    return (count + rows - 1) // rows


def _keeping_forward(x_MD, w_DV, targets_M, source_R, rank_M, count, rows, entropy):
    return _forward(x_MD, w_DV, targets_M, source_R, rank_M, count, rows, entropy, keep=len(source_R) * w_DV.shape[1] <= KEPT_LOGITS)


_packed.defvjp(_keeping_forward, _backward)
