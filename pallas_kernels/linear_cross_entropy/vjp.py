"""The linear cross-entropy and its gradients, put together from the kernels of a back end, the module `tpu` or `gpu`."""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp


def loss_and_logsumexp(backend: ModuleType, x_MD: jax.Array, w_DV: jax.Array, targets_M: jax.Array,
                       needed_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See `api.loss_and_logsumexp`. Needed rows are packed to the front by a stable counting sort."""
    M, tile = x_MD.shape[0], backend.tiles(x_MD, w_DV)
    R = -(-M // tile["rows"]) * tile["rows"]
    row_M = jnp.arange(M, dtype=jnp.int32)
    rank_M = jnp.where(needed_M, jnp.cumsum(needed_M) - 1, R + row_M)  # slot of each needed row; the others fall off the end
    source_R = (M + jnp.arange(R, dtype=jnp.int32)).at[rank_M].set(row_M, mode="drop", unique_indices=True)
    take = lambda array, index: array.at[index].get(mode="fill", fill_value=0, unique_indices=True)
    nll_R, logsumexp_R = packed(take(x_MD, source_R), w_DV, take(targets_M, source_R), needed_M.sum(), backend, tuple(tile.items()))
    return take(nll_R, rank_M), take(logsumexp_R, rank_M)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def packed(x_RD: jax.Array, w_DV: jax.Array, target_R: jax.Array, count: jax.Array, backend: ModuleType,
           tile: tuple[tuple[str, int], ...]) -> tuple[jax.Array, jax.Array]:
    """-log softmax(x w)[target] and log-sum-exp of packed rows, (R,) float32; both are differentiable.

    The first `count` rows count, R is a multiple of the row tile. The rest of their last tile is computed too, so it must be finite.
    """
    return backend.forward(x_RD, w_DV, target_R, count, dict(tile))


def _forward(x_RD, w_DV, target_R, count, backend, tile):
    nll_R, logsumexp_R = packed(x_RD, w_DV, target_R, count, backend, tile)
    return (nll_R, logsumexp_R), (x_RD, w_DV, target_R, count, logsumexp_R)


def _backward(backend, tile, saved, d):
    *inputs, logsumexp_R = saved
    d_nll_R, d_logsumexp_R = d
    return *backend.gradients(*inputs, dict(tile), logsumexp_R, d_nll_R + d_logsumexp_R, d_nll_R), None, None


packed.defvjp(_forward, _backward)
