"""Blocks of matrices in GPU kernels (Pallas's Triton back end): bounded loads and stores, and the loop over a product's depth.

References are whole matrices in global memory. A block begins at a multiple of its size, which has to show in the arithmetic (an
index times a constant) for wide and asynchronous loads; sides are powers of two, at least 16 where a product takes them. What
lies beyond an edge reads as 0 and is never written, and costs a mask only where it can happen.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.numerics import dot

MIN_SIDE = 16  # of a factor of a tensor core's product


def side(size: int, at_most: int) -> int:
    """The side of a block for a dimension of this size: a power of two that covers it, but not more than `at_most`."""
    return min(at_most, max(pl.next_power_of_2(size), MIN_SIDE))


def span(start: jax.Array, size: int) -> jax.Array:
    """(size,) int32: the indices from `start` on."""
    return start + lax.broadcasted_iota(jnp.int32, (size,), 0)


def load(ref, *starts_and_sizes: tuple[jax.Array, int]) -> jax.Array:
    """The block with these (start, size) of each dimension."""
    mask = _inside(ref, starts_and_sizes)
    return plgpu.load(ref.at[_slices(starts_and_sizes)], mask=mask, other=None if mask is None else 0)


def store(ref, block: jax.Array, *starts_and_sizes: tuple[jax.Array, int]) -> None:
    """Write the block, in the reference's dtype."""
    plgpu.store(ref.at[_slices(starts_and_sizes)], block.astype(ref.dtype), mask=_inside(ref, starts_and_sizes))


def product(total: jax.Array, a, b, depth: int, steps, contract_a: int = 1, contract_b: int = 0) -> jax.Array:
    """`total`, float32, plus the sum over `steps` steps k of the products of blocks a(k·depth) and b(k·depth)."""
    return lax.fori_loop(0, steps, lambda k, total: total + dot(a(k * depth), b(k * depth), contract_a, contract_b), total)


def _slices(starts_and_sizes):
    return tuple(pl.ds(start, size) for start, size in starts_and_sizes)


def _inside(ref, starts_and_sizes):
    """Which entries of a block exist; None where all must."""
    mask = None
    for axis, (start, size) in enumerate(starts_and_sizes):
        if ref.shape[axis] % size:
            shape = tuple(size if i == axis else 1 for i in range(len(starts_and_sizes)))
            inside = start + lax.broadcasted_iota(jnp.int32, shape, axis) < ref.shape[axis]
            mask = inside if mask is None else mask & inside
    return mask if mask is None else jnp.broadcast_to(mask, tuple(size for _, size in starts_and_sizes))
