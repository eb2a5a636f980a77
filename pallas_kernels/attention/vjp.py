"""The TPU kernels as one differentiable function: tile sizes, padding, and what the forward pass keeps."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.attention import tpu


def tile_sizes(T: int, S: int, H: int) -> tuple[int, int]:
    """(query tile, key tile) in positions, multiples of 128: the largest up to 512 that pads by at most an eighth."""

    def fitting(length):
        return next((tile for tile in (512, 256) if -length % tile <= length // 8), tpu.LANES)

    chosen = dispatch.tiles("attention", f"T{T} S{S} H{H}", {"q": fitting(T), "k": fitting(S)})
    return chosen["q"], chosen["k"]


def visited_area(spec, B: int, T: int, S: int, tiles: tuple[int, int]) -> jax.Array:
    """How many (query, key) pairs of positions lie in the tiles that the kernels visit, of B · T · S."""
    some, _ = tpu.tile_map(*tpu.ids(spec, B, T, S, -T % tiles[0], -S % tiles[1]), *tiles)
    return some.sum() * (tiles[0] * tiles[1])


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, spec, scale: float, tiles: tuple[int, int] | None = None) -> jax.Array:
    """See `api.attention`. Ids lie strictly between the smallest and the largest int32.

    Positions are padded to multiples of the tiles and heads to multiples of 128: a copy, where they are not already.
    """
    (B, T, N, H), S = q_BTNH.shape, k_BSKH.shape[1]
    tile_q, tile_k = tiles or tile_sizes(T, S, H)

    def flat(x, tile):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), (0, 0), (0, -H % tpu.LANES)))
        return x.reshape(*x.shape[:2], -1)

    plan = tpu.Plan(tile_q, tile_k, H + -H % tpu.LANES, scale)
    ids = tpu.ids(spec, B, T, S, -T % tile_q, -S % tile_k)
    o_BTX = _flash(flat(q_BTNH, tile_q), flat(k_BSKH, tile_k), flat(v_BSKH, tile_k), *ids, plan)
    return o_BTX.reshape(B, -1, N, plan.H)[:, :T, :, :H]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _flash(q_BTX, k_BSX, v_BSX, ids_q, ids_k, plan):
    return tpu.forward(q_BTX, k_BSX, v_BSX, ids_q, ids_k, plan)[0]


def _forward(q_BTX, k_BSX, v_BSX, ids_q, ids_k, plan):
    o_BTX, lse = tpu.forward(q_BTX, k_BSX, v_BSX, ids_q, ids_k, plan)
    return o_BTX, (q_BTX, k_BSX, v_BSX, ids_q, ids_k, o_BTX, lse)


def _backward(plan, saved, do_BTX):
    q_BTX, k_BSX, v_BSX, ids_q, ids_k, o_BTX, lse = saved
    products = o_BTX.astype(jnp.float32) * do_BTX.astype(jnp.float32)
    delta = products.reshape(*o_BTX.shape[:2], -1, plan.H).sum(-1).swapaxes(1, 2)[:, :, None]
    return *tpu.backward(q_BTX, k_BSX, v_BSX, do_BTX, lse, delta, ids_q, ids_k, plan), None, None


_flash.defvjp(_forward, _backward)
