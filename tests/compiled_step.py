"""`python -m llada_jax.compile` with a fault planted, for the test of the test: python -m tests.compiled_step dense_experts FLAGS…"""

import sys

import jax
import jax.numpy as jnp

from llada_jax import compile as entry_point
from pallas_kernels.grouped_matmul import api as grouped_matmul


def dense_swiglu(x_RD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """What a mixture must not do: right, but E times the work and the memory."""
    ends_E = jnp.cumsum(group_sizes_E)[:, None, None]
    row_R1 = jnp.arange(len(x_RD))[:, None]
    own_ER1 = (row_R1 < ends_E) & (row_R1 >= ends_E - group_sizes_E[:, None, None])
    h_ERF = jax.nn.silu(jnp.einsum("RD,EDF->ERF", x_RD, gate_EDF)) * jnp.einsum("RD,EDF->ERF", x_RD, up_EDF)
    return jnp.einsum("ERF,EFD->RD", jnp.where(own_ER1, h_ERF, 0), down_EFD)


if __name__ == "__main__":
    assert sys.argv.pop(1) == "dense_experts"
    grouped_matmul.SWIGLUS["tpu"] = dense_swiglu
    entry_point.run()
