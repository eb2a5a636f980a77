"""Parameter-free pieces of the transformer: RMSNorm, rotary embedding, SwiGLU."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch

HEAD_COLUMNS = 4096  # of the vocabulary head at a time, where XLA would make a float32 copy of the whole of it


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last dimension: float32 inside, cast back before the scale (the order of the reference model)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


def rotary_angles(positions_BT: jax.Array, rotated: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine tables (B, T, rotated / 2), float32, for the first `rotated` dimensions of a head."""
    inverse = theta ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
    angles = positions_BT[..., None].astype(jnp.float32) * inverse
    return jnp.cos(angles), jnp.sin(angles)


@jax.custom_vjp
def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding, half-split (GPT-NeoX) layout: pair (i, i + rotated/2) turns by its angle; the rest passes through.

    The gradient turns back, in one pass; the angles have none.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    x32 = x_BTNH.astype(jnp.float32)
    a, b, rest = x32[..., :half], x32[..., half:2 * half], x32[..., 2 * half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x_BTNH.dtype)


def _rotate_forward(x_BTNH, cos, sin):
    return rotate(x_BTNH, cos, sin), (cos, sin)


def _rotate_backward(saved, d_BTNH):
    cos, sin = saved
    return rotate(d_BTNH, cos, -sin), None, None


rotate.defvjp(_rotate_forward, _rotate_backward)


def computed_once(tree: Any) -> Any:
    """The same arrays, as the results of a loop on a CPU, where XLA otherwise computes small ones again in every loop that reads them: cosines for
    each layer and head, the mask's ids for each pair of positions (`optimization_barrier` is gone by then)."""
    if dispatch.platform() != "cpu":
        return tree
    return jax.lax.fori_loop(0, 2, lambda i, _: tree, jax.tree.map(jnp.zeros_like, tree))


def heads(x_BTD: jax.Array, w_DNH: jax.Array) -> jax.Array:
    """x w, (B, T, N, H)."""
    if dispatch.platform() != "cpu":
        return jnp.einsum("BTD,DNH->BTNH", x_BTD, w_DNH)
    B, T, D = x_BTD.shape  # XLA:CPU has the product of two transposed matrices, but copies to transpose arrays of three dimensions
    return (x_BTD.reshape(B * T, D) @ w_DNH.reshape(D, -1)).reshape(B, T, *w_DNH.shape[1:])


def swiglu(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """(silu(x gate) * (x up)) down."""
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def vocabulary_logits(hidden: jax.Array, weight_DV: jax.Array) -> jax.Array:
    """hidden (..., D) times the vocabulary head, (..., V) float32.

    XLA:CPU converts bf16 operands of a product to float32 first: there columns go by in parts, so that no copy of the head is made.
    """
    product = lambda w: jnp.einsum("...D,DV->...V", hidden, w, preferred_element_type=jnp.float32)
    V = weight_DV.shape[1]
    if dispatch.platform() != "cpu" or weight_DV.dtype != jnp.bfloat16 or V <= HEAD_COLUMNS:
        return product(weight_DV)

    def part(i, logits):
        start = jnp.minimum(i * HEAD_COLUMNS, V - HEAD_COLUMNS)  # the last part overlaps: its columns are computed twice, alike
        columns = jax.lax.dynamic_slice_in_dim(weight_DV, start, HEAD_COLUMNS, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(logits, product(columns), start, axis=-1)

    return jax.lax.fori_loop(0, -(-V // HEAD_COLUMNS), part, jnp.zeros((*hidden.shape[:-1], V), jnp.float32))


def at_positions(x_BT: jax.Array, index_BC: jax.Array) -> jax.Array:
    """x[b, index[b, c]], (B, C, ...)."""
    return jnp.take_along_axis(x_BT, index_BC.reshape(*index_BC.shape, *(1,) * (x_BT.ndim - 2)), axis=1)
