"""Arithmetic that the kernels share."""

import jax
import jax.numpy as jnp
from jax import lax


def dot(a: jax.Array, b: jax.Array, contract_a: int = 1, contract_b: int = 0) -> jax.Array:
    """The float32 product of two matrices over one dimension of each; float32 operands at full precision, others in one pass."""
    dtype = jnp.promote_types(a.dtype, b.dtype)
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    contracted = (((contract_a,), (contract_b,)), ((), ()))
    return lax.dot_general(a.astype(dtype), b.astype(dtype), contracted, precision=precision, preferred_element_type=jnp.float32)
