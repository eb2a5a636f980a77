"""Blocks of matrices in GPU kernels (Pallas's Triton back end): bounded loads and stores, and the loop over a product's depth.

References are whole matrices in global memory. A block begins at a multiple of its size, which has to show in the arithmetic (an
index times a constant) for wide and asynchronous loads; sides are powers of two, at least 16 where a product takes them. What
lies beyond an edge reads as 0 and is never written, and costs a mask only where it can happen. A block with an end of its own may
begin anywhere, and always has a mask.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.numerics import dot

Where = tuple[jax.Array | int, int] | tuple[jax.Array | int, int, jax.Array | int] | jax.Array | int
MIN_SIDE = 16  # of a factor of a tensor core's product


def side(size: int, at_most: int) -> int:
    """The side of a block for a dimension of this size: a power of two that covers it, but not more than `at_most`."""
    return min(at_most, max(pl.next_power_of_2(size), MIN_SIDE))


def span(start: jax.Array, size: int) -> jax.Array:
    """(size,) int32: the indices from `start` on."""
    return start + lax.broadcasted_iota(jnp.int32, (size,), 0)


def load(ref, *where: Where) -> jax.Array:
    """The block with this (start, size), (start, size, end) or index of each dimension."""
    mask = _inside(ref, where)
    return plgpu.load(ref.at[_indices(where)], mask=mask, other=None if mask is None else 0)


def store(ref, block: jax.Array, *where: Where) -> None:
    """Write the block there, in the reference's dtype."""
    plgpu.store(ref.at[_indices(where)], block.astype(ref.dtype), mask=_inside(ref, where))


def product(total: jax.Array, a, b, depth: int, steps, contract_a: int = 1, contract_b: int = 0) -> jax.Array:
    """`total`, float32, plus the sum over `steps` steps k of the products of blocks a(k·depth) and b(k·depth)."""
    return lax.fori_loop(0, steps, lambda k, total: total + dot(a(k * depth), b(k * depth), contract_a, contract_b), total)


def _indices(where):
    return tuple(pl.ds(*at[:2]) if isinstance(at, tuple) else at for at in where)


def _inside(ref, where):
    """Which entries of a block exist; None where all must."""
    extents = [(*at, whole)[:3] for at, whole in zip(where, ref.shape, strict=True) if isinstance(at, tuple)]
    shape = tuple(size for _, size, _ in extents)
    inside = [start + lax.broadcasted_iota(jnp.int32, shape, axis) < end for axis, (start, size, end) in enumerate(extents)
              if not isinstance(end, int) or end % size]
    return functools.reduce(jnp.logical_and, inside) if inside else None
