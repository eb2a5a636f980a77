"""The grouped matrix multiplication and its gradients, put together from the two kernels of a back end: the module `tpu` or `gpu`."""

import functools
from types import ModuleType

import jax


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_matmul(backend: ModuleType, x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """See `api.grouped_matmul`."""
    return backend.rows_matmul("grouped_matmul", (x_RD,), (w_EDF,), group_sizes_E)[0]


def _matmul_forward(backend, x_RD, w_EDF, group_sizes_E):
    return grouped_matmul(backend, x_RD, w_EDF, group_sizes_E), (x_RD, w_EDF, group_sizes_E)


def _matmul_backward(backend, saved, dy_RF):
    x_RD, w_EDF, group_sizes_E = saved
    dx_RD = backend.rows_matmul("grouped_matmul_drows", (dy_RF,), (w_EDF,), group_sizes_E, transposed=True)[0]
    return dx_RD, backend.weights_matmul("grouped_matmul_dweights", x_RD, dy_RF, group_sizes_E, w_EDF.dtype), None


grouped_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_swiglu(backend: ModuleType, x_RD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array,
                   group_sizes_E: jax.Array) -> jax.Array:
    """See `api.grouped_swiglu`."""
    h_RF, = backend.rows_matmul("grouped_swiglu_up", (x_RD,), (gate_EDF, up_EDF), group_sizes_E, epilogue=lambda *gate_up: _activate(*gate_up)[:1])
    return backend.rows_matmul("grouped_swiglu_down", (h_RF,), (down_EFD,), group_sizes_E)[0]


def _swiglu_forward(backend, x_RD, gate_EDF, up_EDF, down_EFD, group_sizes_E):
    h_RF, gate_RF, up_RF = backend.rows_matmul("grouped_swiglu_up", (x_RD,), (gate_EDF, up_EDF), group_sizes_E, epilogue=_activate, outputs=3)
    y_RD, = backend.rows_matmul("grouped_swiglu_down", (h_RF,), (down_EFD,), group_sizes_E)
    return y_RD, (x_RD, gate_RF, up_RF, gate_EDF, up_EDF, down_EFD, group_sizes_E)


def _swiglu_backward(backend, saved, dy_RD):
    x_RD, gate_RF, up_RF, gate_EDF, up_EDF, down_EFD, group_sizes_E = saved
    dgate_RF, dup_RF, h_RF = backend.rows_matmul("grouped_swiglu_dhidden", (dy_RD,), (down_EFD,), group_sizes_E, transposed=True,
                                         extras=(gate_RF, up_RF), epilogue=_activate_backward, outputs=3)
    dx_RD, = backend.rows_matmul("grouped_swiglu_drows", (dgate_RF, dup_RF), (gate_EDF, up_EDF), group_sizes_E, transposed=True,
                         epilogue=lambda dgate, dup: (dgate + dup,))
    sums = ((x_RD, dgate_RF, gate_EDF), (x_RD, dup_RF, up_EDF), (h_RF, dy_RD, down_EFD))
    return dx_RD, *(backend.weights_matmul("grouped_swiglu_dweights", rows, drows, group_sizes_E, w.dtype) for rows, drows, w in sums), None


grouped_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _activate(gate, up):
    """The hidden activations, and what the backward pass needs of the forward one."""
    return jax.nn.silu(gate) * up, gate, up


def _activate_backward(dh, gate, up):
    """Gradients of gate and up, and the hidden activations again."""
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return dh * up * (sigmoid + silu * (1 - sigmoid)), dh * silu, silu * up
