"""The kernel's choice with its gradient and statistics.

The statistics stay in XLA: probability and z are one pass over the logits, and the one-hot arrays fuse into the sums that the caller
takes of them, so that a kernel would only write what nobody reads. The gradient recomputes the scores from the logits and the saved experts.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.routing import tpu


def route(logits_ME: jax.Array, bias_E: jax.Array | None, spec) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """See `api.route`."""
    return route_ranked(logits_ME, bias_E, spec)[:3]


def route_ranked(logits_ME, bias_E, spec):
    """`route`, then the rank of every pair inside its expert (M, A) int32 and the pairs of each expert (E,) int32."""
    logits_ME = logits_ME.astype(jnp.float32)
    E = logits_ME.shape[-1]
    experts_MA, weights_MA, selected_MA, rank_MA, count_E = _choose(logits_ME, bias_E, spec)
    score_ME = _scores(logits_ME, spec.score)
    probability_ME = score_ME if spec.score == "softmax" else score_ME / (score_ME.sum(-1, keepdims=True) + 1e-20)
    selected_ME, load_ME = (jax.nn.one_hot(chosen_MA, E, dtype=jnp.float32).sum(1) for chosen_MA in (selected_MA, experts_MA))
    stats = (probability_ME, selected_ME, load_ME, jax.nn.logsumexp(logits_ME, axis=-1) ** 2)
    return experts_MA, weights_MA, stats, rank_MA, count_E


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _choose(logits_ME, bias_E, spec):
    return tpu.choose(logits_ME, bias_E, spec)


def _forward(logits_ME, bias_E, spec):
    out = _choose(logits_ME, bias_E, spec)
    return out, (logits_ME, bias_E, out[0])


def _backward(spec, saved, cotangents):
    logits_ME, bias_E, experts_MA = saved
    return *jax.vjp(lambda logits_ME: _weights(logits_ME, bias_E, experts_MA, spec), logits_ME)[1](cotangents[1]), None


_choose.defvjp(_forward, _backward)


def _scores(logits_ME, kind):
    return jax.nn.softmax(logits_ME, axis=-1) if kind == "softmax" else jax.nn.sigmoid(logits_ME)


def _weights(logits_ME, bias_E, experts_MA, spec):
    """Mixing weights of experts that are chosen already. A sum over a mask takes the scores, as its gradient needs no scatter."""
    score_ME = _scores(logits_ME, spec.score)
    if bias_E is not None and spec.bias_in_weight:
        score_ME = score_ME + bias_E.astype(jnp.float32)
    weights_MA = jnp.where(experts_MA[:, :, None] == jnp.arange(score_ME.shape[-1]), score_ME[:, None, :], 0).sum(-1)
    if spec.renormalize:
        weights_MA = weights_MA / (weights_MA.sum(-1, keepdims=True) + 1e-20)
    return weights_MA * spec.scale
