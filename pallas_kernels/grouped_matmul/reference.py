"""Plain XLA specification of the grouped matrix multiplication."""

import jax
import jax.numpy as jnp


def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """See `api.grouped_matmul`."""
    return _dot(_grouped(x_RD, group_sizes_E), w_EDF, group_sizes_E)


def grouped_swiglu(x_RD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """See `api.grouped_swiglu`."""
    x_RD = _grouped(x_RD, group_sizes_E)
    h_RF = jax.nn.silu(_dot(x_RD, gate_EDF, group_sizes_E)) * _dot(x_RD, up_EDF, group_sizes_E)
    return _dot(h_RF, down_EFD, group_sizes_E)


def _dot(x_RD, w_EDF, group_sizes_E):
    return _grouped(jax.lax.ragged_dot(x_RD, w_EDF, group_sizes_E, preferred_element_type=jnp.float32), group_sizes_E).astype(x_RD.dtype)


def _grouped(x_RD, group_sizes_E):
    """Zeros beyond the last group, whatever a back end's `ragged_dot` makes of those rows."""
    return jnp.where((jnp.arange(x_RD.shape[0]) < group_sizes_E.sum())[:, None], x_RD, 0)
