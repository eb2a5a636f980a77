"""Arithmetic that the kernels share, and how they tell their references apart."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LOG2_E = math.log2(math.e)  # exp(x) = exp2(x · LOG2_E), and exp2 is what the hardware has


def dot(a: jax.Array, b: jax.Array, contract_a: int = 1, contract_b: int = 0) -> jax.Array:
    """The float32 product of two matrices over one dimension of each; float32 operands at full precision, others in one pass."""
    dtype = jnp.promote_types(a.dtype, b.dtype)
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT  # whatever the process's default is
    contracted = (((contract_a,), (contract_b,)), ((), ()))
    return lax.dot_general(a.astype(dtype), b.astype(dtype), contracted, precision=precision, preferred_element_type=jnp.float32)


def split(items: Iterable[Any], *counts: int) -> list[list[Any]]:
    """Consecutive parts of the given lengths."""
    items = iter(items)
    return [[next(items) for _ in range(count)] for count in counts]
