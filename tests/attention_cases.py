"""What the tests of the attention kernels share: arrays, structures, and a run of both ways beside the reference."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import AttentionSpec, gpu, tpu, vjp

B, T, S, N, K, H = 2, 300, 200, 4, 2, 8  # no length is a multiple of a tile, nor the head size of what the kernels pad it to
SCALE = 0.4
KERNELS = {"tpu": tpu, "gpu": gpu}
TILES = {"tpu": dict(q=128, k=128), "gpu": dict(own=64, step=32)}


def arrays(seed, B, T, S, N, K, H, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))


def doubled(length, C, copies=1):
    """Block and half ids of [noisy ; clean], each of `length` positions in blocks of C."""
    block, half = np.tile(np.arange(length) // C, 2), np.repeat([0, 1], length)
    return np.tile(block, (copies, 1)).astype(np.int32), np.tile(half, (copies, 1)).astype(np.int32)


def random_spec(seed, B, T, S):
    rng = np.random.default_rng(seed)
    def ids(length, high):
        return rng.integers(0, high, (B, length), np.int32)
    return AttentionSpec(ids(T, 3), ids(S, 3), ids(T, 5), ids(S, 5), ids(T, 2), ids(S, 2), rng.random((B, S)) < 0.3)


def packed_spec():
    """Two packed texts and padding in [noisy ; clean] form, 300 positions; row 1 is one text; its tail sees nothing."""
    block, half = doubled(150, 7, 2)
    segment = np.tile([np.repeat([1, 2, 0], [60, 70, 20]), np.repeat([1, 1, 3], [60, 70, 20])], 2)
    padding = (segment == 3) | ((segment == 1) & (block == 2))
    return AttentionSpec.own(segment.astype(np.int32), block, half, padding)


def both_ways(function):
    """Output and gradients of q, k and v, jitted."""
    def run(q, k, v, spec, do):
        out, pull = jax.vjp(lambda *qkv: function(*qkv, spec, SCALE), q, k, v)
        return out, *pull(do)
    return jax.jit(run)


def kernel(name):
    """attention(q, k, v, spec, scale) with the kernels of a back end and small tiles."""
    return lambda *arguments: vjp.attention(KERNELS[name], *arguments, TILES[name])


def assert_equal(ours, theirs, tolerance=1e-5):
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance, err_msg=name)


def full(**fields):
    """All fields given, so that one program serves; those not named allow everything."""
    zero = np.zeros((B, T), np.int32)
    return AttentionSpec.own(**(dict(segment=zero, block=zero, half=zero + 1, padding=zero > 0) | fields))


RULES = {
    "everything": full(),
    "causal": full(block=np.tile(np.arange(T, dtype=np.int32), (B, 1))),
    "segments": full(segment=np.stack([np.arange(T) // 90, np.arange(T) // 128]).astype(np.int32)),
    "packed [noisy ; clean]": packed_spec(),
    "nothing in order": random_spec(3, B, T, T),
    "row 0 sees nothing": full(padding=np.stack([np.ones(T, bool), np.arange(T) % 3 == 0])),
    "a tile without keys": full(segment=np.tile(np.arange(T, dtype=np.int32) // 128, (B, 1)), padding=np.tile(np.arange(T) < 128, (B, 1))),
}
