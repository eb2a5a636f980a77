"""Where rows stand on their canvases: slots of a block, the last gap, the end of a text. Pure functions of arrays; no row reads another."""

import jax
import jax.numpy as jnp


def block_slots(block_BT: jax.Array, block_B: jax.Array, C: int) -> tuple[jax.Array, jax.Array]:
    """The slots of each row's current block in order, (B, C) int32, and which of them exist (a block may hold fewer than C)."""
    T = block_BT.shape[1]
    order_BT = jnp.argsort(block_BT, axis=-1, stable=True)
    first_B = (block_BT < block_B[:, None]).sum(-1)
    index_BC = first_B[:, None] + jnp.arange(C)
    slots_BC = jnp.take_along_axis(order_BT, jnp.minimum(index_BC, T - 1), axis=1)
    inside_BC = (index_BC < T) & (jnp.take_along_axis(block_BT, slots_BC, axis=1) == block_B[:, None])
    return slots_BC, inside_BC


def last_gap(writable_BT: jax.Array) -> jax.Array:
    """The last run of writable slots of each row, (B, T) bool."""
    behind_BT = jnp.flip(jnp.cumsum(jnp.flip(writable_BT[:, :-1] & ~writable_BT[:, 1:], -1), axis=-1), -1)  # gaps that end here or later
    last_BT = jnp.pad(behind_BT, ((0, 0), (0, 1))) == jnp.where(writable_BT[:, -1:], 0, 1)
    return writable_BT & last_BT


def reached_eos(tokens_BT: jax.Array, writable_BT: jax.Array, mask_id: int, eos_id: int) -> jax.Array:
    """Rows whose text has ended: an EOS in the run of writable slots that ends the canvas, with no mask left of it."""
    tail_BT = jnp.flip(jnp.cumprod(jnp.flip(writable_BT, -1).astype(jnp.int32), axis=-1), -1) > 0
    clear_BT = jnp.cumsum(tokens_BT == mask_id, axis=-1) == 0
    return (tail_BT & clear_BT & (tokens_BT == eos_id)).any(-1)
