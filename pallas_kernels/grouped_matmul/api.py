"""Public functions of the grouped matrix multiplication: rows sorted by expert, one weight matrix an expert.

`group_sizes` (E,) int32 counts the rows of each expert, in order; their sum is at most R. Rows beyond it give zeros,
get zero gradients, and their content (even NaN) reaches no other row and no weight gradient. Matmuls accumulate in
float32; results and saved activations have the rows' dtype, gradients the dtype of what they are gradients of.
`reference` is XLA's ragged_dot, `cpu` a loop over experts and row tiles, `tpu` Pallas kernels.
"""

import jax

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import cpu, reference, vjp

MATMULS = {"reference": reference.grouped_matmul, "cpu": cpu.grouped_matmul, "tpu": vjp.grouped_matmul}
SWIGLUS = {"reference": reference.grouped_swiglu, "cpu": cpu.grouped_swiglu, "tpu": vjp.grouped_swiglu}
PREFERRED = {"cpu": "cpu", "tpu": "tpu"}


def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """x_r w_e for every row r of expert e; (R, F), x's dtype. Raises ValueError for shapes that do not fit."""
    _check(x_RD, (w_EDF,), group_sizes_E)
    return dispatch.choose("grouped_matmul", MATMULS, implementation, PREFERRED)(x_RD, w_EDF, group_sizes_E)


def grouped_swiglu(x_RD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array, group_sizes_E: jax.Array, *,
                   implementation: str | None = None) -> jax.Array:
    """(silu(x_r gate_e) · (x_r up_e)) down_e for every row r of expert e; (R, D), x's dtype (SwiGLU, arXiv 2002.05202).

    Raises ValueError for shapes that do not fit.
    """
    _check(x_RD, (gate_EDF, up_EDF), group_sizes_E)
    if gate_EDF.shape != up_EDF.shape or down_EFD.shape != (gate_EDF.shape[0], *gate_EDF.shape[:0:-1]):
        raise ValueError(f"gate {gate_EDF.shape}, up {up_EDF.shape} and down {down_EFD.shape} are not (E, D, F), (E, D, F) and (E, F, D)")
    return dispatch.choose("grouped_swiglu", SWIGLUS, implementation, PREFERRED)(x_RD, gate_EDF, up_EDF, down_EFD, group_sizes_E)


def _check(x_RD, weights, group_sizes_E):
    for w_EDF in weights:
        if w_EDF.ndim != 3 or x_RD.ndim != 2 or w_EDF.shape[:2] != (*group_sizes_E.shape, x_RD.shape[1]):
            raise ValueError(f"rows {x_RD.shape}, weights {w_EDF.shape} and group sizes {group_sizes_E.shape} are not (R, D), (E, D, F) and (E,)")
