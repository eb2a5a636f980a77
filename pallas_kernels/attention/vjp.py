"""The kernels of a back end as one differentiable function: padding, and what the forward pass keeps.

`kernels` is the back end's module: `plan` fixes tiles and head size, `forward` and `backward` run on arrays padded to them.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.attention import structure


def attention(kernels, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, spec, scale: float,
              tiles: Mapping[str, int] | None = None) -> jax.Array:
    """See `api.attention`. Ids lie strictly between the smallest and the largest int32. `tiles` overrides the plan's, by name.

    Positions are padded to multiples of the tiles and heads to the plan's size: a copy, where they are not already.
    """
    (B, T, N, H), S = q_BTNH.shape, k_BSKH.shape[1]
    plan = kernels.plan(q_BTNH, k_BSKH, scale, tiles)

    def flat(x, tile):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), (0, 0), (0, plan.H - H)))
        return x.reshape(*x.shape[:2], -1)

    ids = structure.ids(spec, B, T, S, -T % plan.tile_q, -S % plan.tile_k)
    o_BTX = _flash(flat(q_BTNH, plan.tile_q), flat(k_BSKH, plan.tile_k), flat(v_BSKH, plan.tile_k), *ids, plan, kernels)
    return o_BTX.reshape(B, -1, N, plan.H)[:, :T, :, :H]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _flash(q_BTX, k_BSX, v_BSX, ids_q, ids_k, plan, kernels):
    return kernels.forward(q_BTX, k_BSX, v_BSX, ids_q, ids_k, plan)[0]


def _forward(q_BTX, k_BSX, v_BSX, ids_q, ids_k, plan, kernels):
    o_BTX, lse = kernels.forward(q_BTX, k_BSX, v_BSX, ids_q, ids_k, plan)
    return o_BTX, (q_BTX, k_BSX, v_BSX, ids_q, ids_k, o_BTX, lse)


def _backward(plan, kernels, saved, do_BTX):
    q_BTX, k_BSX, v_BSX, ids_q, ids_k, o_BTX, lse = saved
    products = o_BTX.astype(jnp.float32) * do_BTX.astype(jnp.float32)
    delta = products.reshape(*o_BTX.shape[:2], -1, plan.H).sum(-1).swapaxes(1, 2)[:, :, None]
    return *kernels.backward(q_BTX, k_BSX, v_BSX, do_BTX, lse, delta, ids_q, ids_k, plan), None, None


_flash.defvjp(_forward, _backward)
