"""Parameter-free pieces of the transformer: RMSNorm, rotary embedding, SwiGLU."""

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


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding, half-split (GPT-NeoX) layout: pair (i, i + rotated/2) turns by its angle; the rest passes through."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    x32 = x_BTNH.astype(jnp.float32)
    a, b, rest = x32[..., :half], x32[..., half:2 * half], x32[..., 2 * half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x_BTNH.dtype)


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
