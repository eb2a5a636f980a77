"""The TPU kernels of attention in Pallas's interpreter against the reference; the tiles they visit; what the compiler takes."""

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch
from pallas_kernels.attention import AttentionSpec, attention, reference, tpu, vjp

B, T, S, N, K, H = 2, 300, 200, 4, 2, 8  # neither length is a multiple of the tile, nor the head size of the lanes
TILES = (128, 128)
SCALE = 0.4


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


def kernel(q, k, v, spec, scale):
    return vjp.attention(q, k, v, spec, scale, TILES)


def assert_equal(ours, theirs, tolerance=1e-5):
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def square():
    """One compiled program of 300 positions for every structure whose fields are all given."""
    run, oracle = both_ways(kernel), both_ways(reference.attention)
    def compare(spec, seed=0):
        q, k, v, do = arrays(seed, B, T, T, N, K, H)
        with dispatch.interpreted():
            return run(q, k, v, spec, do), oracle(q, k, v, spec, do)
    return compare


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


@pytest.mark.parametrize("name", RULES)
def test_equals_the_reference(square, name):
    ours, theirs = square(RULES[name])
    assert_equal(ours, theirs)
    dead = ~np.asarray(reference.visible(RULES[name])).any(-1)
    assert (np.asarray(ours[0])[dead] == 0).all() and (np.asarray(ours[1])[dead] == 0).all()
    assert name not in ("row 0 sees nothing", "a tile without keys") or dead.any()


def test_a_window_of_queries_against_many_keys():
    q, k, v, do = arrays(1, B, 5, S, N, K, H)
    spec = random_spec(1, B, 5, S)
    with dispatch.interpreted():
        assert_equal(both_ways(kernel)(q, k, v, spec, do), both_ways(reference.attention)(q, k, v, spec, do))


@pytest.mark.parametrize("plant", ["limit", "first", "whole"])
def test_a_planted_mistake_is_seen(monkeypatch, plant):
    """A limit one too high, sums that are never begun anew, partial tiles taken for whole ones."""
    make_ids, make_list, make_map = tpu.ids, tpu.worklist, tpu.tile_map
    if plant == "limit":
        monkeypatch.setattr(tpu, "ids", lambda *a: (lambda ids_q, ids_k: (ids_q.at[:, 1].add(1), ids_k))(*make_ids(*a)))
    elif plant == "first":
        monkeypatch.setattr(tpu, "worklist", lambda *a: (lambda work, count: (work.at[1:].set(work[1:] & ~tpu.FIRST), count))(*make_list(*a)))
    else:
        monkeypatch.setattr(tpu, "tile_map", lambda *a: (lambda some, whole: (some, some))(*make_map(*a)))
    q, k, v, _ = arrays(0, B, T, T, N, K, H)
    spec = packed_spec()
    with dispatch.interpreted():
        ours = jax.jit(lambda *qkv: kernel(*qkv, spec, SCALE))(q, k, v)
    assert not np.allclose(ours, reference.attention(q, k, v, spec, SCALE), atol=1e-3)


def test_clean_text_does_not_leak():
    """Another clean block b changes no noisy query of a block up to b, bit for bit; it changes later ones."""
    run = jax.jit(kernel, static_argnums=4)
    block, half = doubled(150, 7, B)
    spec = AttentionSpec.own(block=block, half=half)
    q, k, v, _ = arrays(0, B, T, T, N, K, H)
    changed = jnp.asarray((block == 9) & (half == 1))[:, :, None, None]
    with dispatch.interpreted():
        before, after = run(q, k, v, spec, SCALE), run(q, jnp.where(changed, 2 - k, k), jnp.where(changed, 3 - v, v), spec, SCALE)
    moved = np.asarray(before != after).any((-1, -2))
    assert not moved[block < 9].any() and not moved[(half == 0) & (block <= 9)].any()
    assert moved[block > 9].all()


def test_tiles_that_are_skipped_are_not_read():
    """Values that are not numbers, in every tile that no query of the first tile sees, reach no query of the first tile."""
    block, half = doubled(512, 32)
    spec = AttentionSpec.own(block=block, half=half)
    q, k, v, _ = arrays(0, 1, 1024, 1024, 1, 1, H)
    ids = tpu.ids(spec, 1, 1024, 1024, 0, 0)
    some, _ = tpu.tile_map(*ids, *TILES)
    assert some[0, 0].sum() == 2
    poison = jnp.repeat(~some[0, 0], 128)[None, :, None, None]
    with dispatch.interpreted():
        out = kernel(q, jnp.where(poison, jnp.nan, k), jnp.where(poison, jnp.nan, v), spec, SCALE)
    assert np.isfinite(out[:, :128]).all() and np.isnan(out[:, 128:]).any()


def test_the_normal_form_and_the_map_of_tiles_agree_with_the_mask():
    """All sixteen combinations of rules; a tile is called empty or whole only where it is."""
    partly = 0
    for seed, (segment, block, half, padding) in enumerate(itertools.product((False, True), repeat=4)):
        if half and not block:
            continue
        spec = random_spec(seed, B, 20, 30)
        order = np.sort if seed % 2 else (lambda x: x)  # ids in order, as in texts, make empty and whole tiles
        spec = AttentionSpec(*(order(x) if use else None for x, use in zip(spec, (segment, segment, block, block, half, half, padding), strict=True)))
        ids_q, ids_k = tpu.ids(spec, B, 20, 30, 4, 2)
        (sq, lq, mq), (sk, lk, mk) = np.moveaxis(np.asarray(ids_q), 1, 0)[..., None], np.moveaxis(np.asarray(ids_k), 1, 0)[:, :, None]
        ours = (sq == sk) & ((lk <= lq) | (mq == mk))
        mask = reference.visible(spec)
        expected = np.zeros((B, 24, 32), bool)
        expected[:, :20, :30] = True if mask is None else mask
        np.testing.assert_array_equal(ours, expected)
        tiles = ours.reshape(B, 3, 8, 4, 8)
        some, whole = (np.asarray(x) for x in tpu.tile_map(ids_q, ids_k, 8, 8))
        assert (some >= tiles.any((2, 4))).all() and (whole <= tiles.all((2, 4))).all()
        partly += (~some).sum() * whole.sum()
    assert partly > 0


@pytest.mark.parametrize("tile, bound", [(128, 1.06), (256, 1.13), (512, 1.25)])
def test_visited_area_is_near_the_allowed_pairs(tile, bound):
    block, half = doubled(4096, 32)
    spec = AttentionSpec.own(block=block, half=half)
    Q = 4096 // 32
    allowed = 32 * 32 * (Q + Q * (Q - 1) // 2 + Q * (Q + 1) // 2)  # noisy in its own block, noisy to clean, clean to clean
    area = vjp.visited_area(spec, 1, 8192, 8192, (tile, tile))
    assert allowed <= area <= bound * allowed
    assert vjp.tile_sizes(8192, 8192, 128) == (512, 512)


def test_the_grid_walks_over_the_visited_tiles_alone():
    block, half = doubled(512, 32)
    ids = tpu.ids(AttentionSpec.own(block=block, half=half), 1, 1024, 1024, 0, 0)
    some, whole = tpu.tile_map(*ids, *TILES)
    work, count = tpu.worklist(some, whole)
    assert count == some.sum() == 4 + 10 + 10  # noisy diagonal, noisy to clean with its diagonal, clean to clean
    listed = np.stack(tpu._indices(np.asarray(work)[: int(count)], some.shape), -1)
    np.testing.assert_array_equal(listed, np.argwhere(np.asarray(some)))


def test_lists_that_scalar_memory_cannot_hold_raise():
    some = jax.ShapeDtypeStruct((8, 256, 256), jnp.bool_)
    with pytest.raises(ValueError, match="8 x 256 x 256 pairs of tiles are more than 131072; take larger tiles"):
        jax.eval_shape(tpu.worklist, some, some)


def test_low_precision_is_as_near_to_the_truth_as_the_reference():
    q, k, v, do = arrays(4, 1, 256, 256, 2, 2, 64, jnp.bfloat16)
    spec = AttentionSpec.own(block=jnp.arange(256)[None] // 32)
    truth = both_ways(reference.attention)(*(x.astype(jnp.float32) for x in (q, k, v)), spec, do.astype(jnp.float32))
    with dispatch.interpreted():
        ours = both_ways(kernel)(q, k, v, spec, do)
    def error(x, exact):
        x, exact = np.asarray(x, np.float64), np.asarray(exact, np.float64)
        return np.linalg.norm(x - exact) / np.linalg.norm(exact)
    for mine, plain, exact in zip(ours, both_ways(reference.attention)(q, k, v, spec, do), truth, strict=True):
        assert mine.dtype == jnp.bfloat16
        assert error(mine, exact) < 1.2 * error(plain, exact)


@pytest.mark.parametrize("rows", ["vmap", "shard_map"])
def test_under_transformations(rows):
    """Rows mapped one at a time or one a device, recomputed in the backward pass; the public function takes the kernel by name."""
    q, _, _, _ = arrays(5, 2, 130, 130, 2, 2, H)
    segment = jnp.arange(2 * 130).reshape(2, 130) // 50
    def gradient(implementation):
        @jax.checkpoint
        def several(q, segment):
            return attention(q, q, q, AttentionSpec.own(segment=segment), implementation=implementation)
        if rows == "vmap":
            mapped = jax.vmap(lambda q, segment: several(q[None], segment[None])[0])
        else:
            mesh = Mesh(np.array(jax.devices()[:2]), ("rows",))
            mapped = jax.shard_map(several, mesh=mesh, in_specs=P("rows"), out_specs=P("rows"), check_vma=False)
        return jax.jit(jax.grad(lambda q: jnp.sin(mapped(q, segment)).sum()))(q)
    with dispatch.interpreted():
        ours = gradient("tpu")
    np.testing.assert_allclose(ours, gradient("reference"), atol=1e-5)


def in_simulated_memories(function, *arguments):
    """The result on two cores, with memory that begins as NaN, and whether a race was seen."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call
    with dispatch.interpreted(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2):
        result = jax.block_until_ready(jax.jit(function)(*arguments))
    return result, interpret_pallas_call.races.races_found


def test_no_race_and_no_uninitialised_memory():
    q, k, v, do = arrays(6, 1, 140, 140, 2, 1, H)
    spec = AttentionSpec.own(segment=jnp.arange(140)[None] // 129)
    ours, found = in_simulated_memories(both_ways(kernel), q, k, v, spec, do)
    assert_equal(ours, both_ways(reference.attention)(q, k, v, spec, do))
    assert not found


def test_a_planted_race_is_found(monkeypatch):
    """The output laid out as the keys are: both query heads of a key/value head write one place, each from its core."""
    real = tpu._call
    def shared(kernel, plan, arrays, layouts, *rest):
        return real(kernel, plan, arrays, (layouts[0], ("k", "row")), *rest)
    monkeypatch.setattr(tpu, "_call", shared)
    q, k, v, _ = arrays(6, 1, 100, 100, 2, 1, H)
    assert in_simulated_memories(lambda *qkv: kernel(*qkv, AttentionSpec(), SCALE), q, k, v)[1]


COMPILE = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from pallas_kernels.attention import AttentionSpec, attention
device = topologies.get_topology_desc(topology_name=sys.argv[1], platform="tpu").devices[0]
def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))
def both_ways(q, k, v, spec, do):
    out, pull = jax.vjp(lambda *qkv: attention(*qkv, spec, implementation="tpu"), q, k, v)
    return out, pull(do)
for T, S, N, K, H, dtype in ((8192, 8192, 16, 16, 128, jnp.bfloat16), (32, 4096, 16, 4, 128, jnp.bfloat16), (300, 300, 4, 2, 64, jnp.float32)):
    ids_q, ids_k = array(jnp.int32, 1, T), array(jnp.int32, 1, S)
    spec = AttentionSpec(ids_q, ids_k, ids_q, ids_k, ids_q, ids_k, array(jnp.bool_, 1, S))
    q, k = array(dtype, 1, T, N, H), array(dtype, 1, S, K, H)
    with jax.default_device(device):
        compiled = jax.jit(both_ways).trace(q, k, k, spec, q).lower(lowering_platforms=("tpu",)).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 8192 * 8192  # the scores of a single head
"""


@pytest.mark.libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_for_tpus(topology):
    environment = os.environ | dict(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="true")
    result = subprocess.run([sys.executable, "-c", COMPILE, topology], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
