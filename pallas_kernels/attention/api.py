"""Public function of the attention operation."""

from typing import NamedTuple

import jax

from pallas_kernels import dispatch
from pallas_kernels.attention import reference, vjp


class AttentionSpec(NamedTuple):
    """Who sees whom, as small integer arrays; a field left None puts no limit. The structure knows nothing of diffusion.

    A query sees a key iff all hold:
      segment  the two segment ids are equal;
      block    the key's block id is at most the query's (block-causal; with block = position this is causal);
      half     with ids 0 (noisy) and 1 (clean): noisy sees noisy of its own block and clean of earlier blocks, clean
               sees clean of its own and earlier blocks, never noisy (`block` is needed and then means this rule);
      padding  the key is not padding. Padding queries still see other keys, unless the segment forbids it.
    A query that sees no key gets zeros.
    """

    segment_q: jax.Array | None = None  # (B, T) int32
    segment_k: jax.Array | None = None  # (B, S) int32
    block_q: jax.Array | None = None  # (B, T) int32
    block_k: jax.Array | None = None  # (B, S) int32
    half_q: jax.Array | None = None  # (B, T) int32
    half_k: jax.Array | None = None  # (B, S) int32
    padding_k: jax.Array | None = None  # (B, S) bool

    @classmethod
    def own(cls, segment=None, block=None, half=None, padding=None) -> "AttentionSpec":
        """Queries and keys are the same positions."""
        return cls(segment, segment, block, block, half, half, padding)


IMPLEMENTATIONS = {"reference": reference.attention, "tpu": vjp.attention}
PREFERRED = {"tpu": "tpu"}


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, spec: AttentionSpec = AttentionSpec(), *,
              scale: float | None = None, implementation: str | None = None) -> jax.Array:
    """softmax(q kᵀ · scale) v over the keys that `spec` lets each query see; (B, T, N, H), q's dtype.

    Query head n reads key/value head n // (N / K). `scale` defaults to H^-1/2. The softmax runs in float32.
    Raises ValueError for a head count that does not divide, or an implementation that does not exist.
    """
    if q_BTNH.shape[2] % k_BSKH.shape[2]:
        raise ValueError(f"{q_BTNH.shape[2]} query heads are not divisible by {k_BSKH.shape[2]} key/value heads")
    run = dispatch.choose("attention", IMPLEMENTATIONS, implementation, PREFERRED)
    return run(q_BTNH, k_BSKH, v_BSKH, spec, scale if scale is not None else q_BTNH.shape[-1] ** -0.5)
