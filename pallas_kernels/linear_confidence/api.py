"""Public functions of the linear confidence operation: what a head of D x V says about M rows, without the M x V logits.

The choice is argmax(logit + T·gumbel), the lowest index wins ties; probabilities are those of the plain softmax. Suppressed
ids count as -inf everywhere. Gumbel noise is made of 32 bits for each (row, vocabulary id): `keys_M2` (M, 2) uint32 gives
them as `counter_bits(keys, ids)`, in any implementation; `bits`, an array (M, V) uint32 or a function of ids (N,) int32 that
gives (M, N), serves `reference` alone. Not differentiable.

A vocabulary split over devices: `merge(linear_confidence_partial(…, first=axis_index(axis) * V), axis)` inside shard_map.
"""

from collections.abc import Callable, Sequence

import jax

from pallas_kernels import dispatch
from pallas_kernels.linear_confidence import reference, tpu
from pallas_kernels.linear_confidence.reference import Confidence, Partial, counter_bits, finish, merge

__all__ = ["Confidence", "Partial", "counter_bits", "finish", "linear_confidence", "linear_confidence_partial", "merge"]

IMPLEMENTATIONS = {"reference": reference.partial, "tpu": tpu.partial}
PREFERRED = {"tpu": "tpu"}


def linear_confidence(x_MD: jax.Array, w_DV: jax.Array, *, temperature: float = 0.0, keys_M2: jax.Array | None = None,
                      bits: jax.Array | Callable[[jax.Array], jax.Array] | None = None, suppressed: Sequence[int] = (),
                      implementation: str | None = None) -> Confidence:
    """Token, its log-probability, the runner-up's probability, entropy and log-sum-exp of each row; see `Confidence`.

    `reference` loops over vocabulary tiles in XLA, `tpu` is a Pallas kernel. Raises ValueError for a temperature without noise.
    """
    return finish(linear_confidence_partial(x_MD, w_DV, temperature=temperature, keys_M2=keys_M2, bits=bits, suppressed=suppressed,
                                            implementation=implementation))


def linear_confidence_partial(x_MD: jax.Array, w_DV: jax.Array, *, first: jax.Array | int = 0, temperature: float = 0.0,
                              keys_M2: jax.Array | None = None, bits: jax.Array | Callable[[jax.Array], jax.Array] | None = None,
                              suppressed: Sequence[int] = (), implementation: str | None = None) -> Partial:
    """The same of a part of the vocabulary, whose ids begin at `first`; for `merge` or `finish`.

    Tokens, suppressed ids and the ids of the noise count from the beginning of the whole vocabulary; an array of bits has the
    columns of `w_DV`.
    """
    if temperature > 0 and (keys_M2 is None) == (bits is None):
        raise ValueError(f"linear_confidence: temperature {temperature} needs noise, keys or bits; got {'neither' if bits is None else 'both'}")
    if temperature < 0:
        raise ValueError(f"linear_confidence: temperature {temperature} is negative")
    implement = dispatch.choose("linear_confidence", IMPLEMENTATIONS, implementation, PREFERRED)
    return implement(x_MD, w_DV, first, temperature, keys_M2, bits, tuple(suppressed))
