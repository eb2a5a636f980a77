"""The kernels' choice with its gradient and statistics; the back end is the module `tpu` or `gpu`.

The statistics stay in XLA: probability and z are one pass over the logits, and the one-hot arrays fuse into the sums that the caller
takes of them, so that a kernel would only write what nobody reads. The gradient recomputes the scores from the logits and the saved experts.
"""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp

from pallas_kernels.routing import reference


def route(backend: ModuleType, logits_ME: jax.Array, bias_E: jax.Array | None, spec) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """See `api.route`."""
    return route_ranked(backend, logits_ME, bias_E, spec)[:3]


def route_ranked(backend: ModuleType, logits_ME: jax.Array, bias_E: jax.Array | None, spec):
    """`route`, then the rank of every pair inside its expert (M, A) int32 and the pairs of each expert (E,) int32."""
    logits_ME = logits_ME.astype(jnp.float32)
    experts_MA, weights_MA, selected_MA, rank_MA, count_E = _choose(backend, logits_ME, bias_E, spec)
    return experts_MA, weights_MA, reference.statistics(logits_ME, experts_MA, selected_MA, spec), rank_MA, count_E


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _choose(backend, logits_ME, bias_E, spec):
    return backend.choose(logits_ME, bias_E, spec)


def _forward(backend, logits_ME, bias_E, spec):
    out = _choose(backend, logits_ME, bias_E, spec)
    return out, (logits_ME, bias_E, out[0])


def _backward(_backend, spec, saved, cotangents):
    logits_ME, bias_E, experts_MA = saved
    return *jax.vjp(lambda logits_ME: _weights(logits_ME, bias_E, experts_MA, spec), logits_ME)[1](cotangents[1]), None


_choose.defvjp(_forward, _backward)


def _weights(logits_ME, bias_E, experts_MA, spec):
    """Mixing weights of experts that are chosen already. A sum over a mask takes the scores, as its gradient needs no scatter."""
    score_ME = reference.scores(logits_ME, spec.score)
    if bias_E is not None and spec.bias_in_weight:
        score_ME = score_ME + bias_E.astype(jnp.float32)
    chosen_MA = jnp.where(experts_MA[:, :, None] == jnp.arange(score_ME.shape[-1]), score_ME[:, None, :], 0).sum(-1)
    return reference.mixing(chosen_MA, spec)
