"""The attention kernels of every back end, in Pallas's interpreter, against the reference; the area that they visit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch
from pallas_kernels.attention import AttentionSpec, attention, reference, structure
from tests.attention_cases import KERNELS, RULES, SCALE, B, H, K, N, S, T, arrays, assert_equal, both_ways, doubled, kernel, packed_spec, random_spec


@pytest.fixture(scope="module", params=KERNELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def square(name):
    """One compiled program of 300 positions for every structure whose fields are all given."""
    run, oracle = both_ways(kernel(name)), both_ways(reference.attention)
    def compare(spec, seed=0):
        q, k, v, do = arrays(seed, B, T, T, N, K, H)
        with dispatch.interpreted():
            return run(q, k, v, spec, do), oracle(q, k, v, spec, do)
    return compare


@pytest.mark.parametrize("rule", RULES)
def test_equals_the_reference(square, rule):
    ours, theirs = square(RULES[rule])
    assert_equal(ours, theirs)
    dead = ~np.asarray(reference.visible(RULES[rule])).any(-1)
    assert (np.asarray(ours[0])[dead] == 0).all() and (np.asarray(ours[1])[dead] == 0).all()
    assert rule not in ("row 0 sees nothing", "a tile without keys") or dead.any()


def test_a_window_of_queries_against_many_keys(name):
    q, k, v, do = arrays(1, B, 5, S, N, K, H)
    spec = random_spec(1, B, 5, S)
    with dispatch.interpreted():
        assert_equal(both_ways(kernel(name))(q, k, v, spec, do), both_ways(reference.attention)(q, k, v, spec, do))


@pytest.mark.parametrize("plant", ["limit", "whole", "range"])
def test_a_planted_mistake_is_seen(monkeypatch, name, plant):
    """A limit one too high, partial tiles taken for whole ones, a tile that is left out."""
    make_ids, make_map = structure.ids, structure.tile_map
    if plant == "limit":
        monkeypatch.setattr(structure, "ids", lambda *a: (lambda ids_q, ids_k: (ids_q.at[:, 1].add(1), ids_k))(*make_ids(*a)))
    elif plant == "whole":
        monkeypatch.setattr(structure, "tile_map", lambda *a: (lambda some, whole: (some, some))(*make_map(*a)))
    else:
        monkeypatch.setattr(structure, "tile_map", lambda *a: (lambda some, whole: (some.at[:, 1, 1].set(False), whole))(*make_map(*a)))
    q, k, v, _ = arrays(0, B, T, T, N, K, H)
    spec = packed_spec()
    with dispatch.interpreted():
        ours = jax.jit(lambda *qkv: kernel(name)(*qkv, spec, SCALE))(q, k, v)
    assert not np.allclose(ours, reference.attention(q, k, v, spec, SCALE), atol=1e-3)


def test_clean_text_does_not_leak(name):
    """Another clean block b changes no noisy query of a block up to b, bit for bit; it changes later ones."""
    run = jax.jit(kernel(name), static_argnums=4)
    block, half = doubled(150, 7, B)
    spec = AttentionSpec.own(block=block, half=half)
    q, k, v, _ = arrays(0, B, T, T, N, K, H)
    changed = jnp.asarray((block == 9) & (half == 1))[:, :, None, None]
    with dispatch.interpreted():
        before, after = run(q, k, v, spec, SCALE), run(q, jnp.where(changed, 2 - k, k), jnp.where(changed, 3 - v, v), spec, SCALE)
    moved = np.asarray(before != after).any((-1, -2))
    assert not moved[block < 9].any() and not moved[(half == 0) & (block <= 9)].any()
    assert moved[block > 9].all()


def test_tiles_that_are_skipped_are_not_read(name):
    """Values that are not numbers, in every tile that no query of the first tile sees, reach no query of the first tile."""
    block, half = doubled(512, 32)
    spec = AttentionSpec.own(block=block, half=half)
    q, k, v, _ = arrays(0, 1, 1024, 1024, 1, 1, H)
    ids = structure.ids(spec, 1, 1024, 1024, 0, 0)
    some, _ = structure.tile_map(*ids, 128, 128)
    assert some[0, 0].sum() == 2
    poison = jnp.repeat(~some[0, 0], 128)[None, :, None, None]
    with dispatch.interpreted():
        out = kernel(name)(q, jnp.where(poison, jnp.nan, k), jnp.where(poison, jnp.nan, v), spec, SCALE)
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
        ids_q, ids_k = structure.ids(spec, B, 20, 30, 4, 2)
        (sq, lq, mq), (sk, lk, mk) = np.moveaxis(np.asarray(ids_q), 1, 0)[..., None], np.moveaxis(np.asarray(ids_k), 1, 0)[:, :, None]
        ours = np.asarray(structure.allowed((sq, lq, mq), (sk, lk, mk)))
        mask = reference.visible(spec)
        expected = np.zeros((B, 24, 32), bool)
        expected[:, :20, :30] = True if mask is None else mask
        np.testing.assert_array_equal(ours, expected)
        tiles = ours.reshape(B, 3, 8, 4, 8)
        some, whole = (np.asarray(x) for x in structure.tile_map(ids_q, ids_k, 8, 8))
        assert (some >= tiles.any((2, 4))).all() and (whole <= tiles.all((2, 4))).all()
        partly += (~some).sum() * whole.sum()
    assert partly > 0


def test_the_kernels_visit_little_more_than_the_allowed_pairs(monkeypatch, name):
    """[noisy ; clean] of 4096 positions in blocks of 32, with the tiles of the published head size, counted by each kernel itself.

    Scores that are 0 wherever they are computed make the sums of the softmax and of the gradients count visits.
    """
    kernels, length = KERNELS[name], 2 * 4096
    plan = kernels.plan(*(jax.ShapeDtypeStruct((1, length, 1, 128), jnp.bfloat16),) * 2, 1.0)._replace(H=H)
    scores = kernels._scores
    monkeypatch.setattr(kernels, "_scores", lambda *arguments, **options: jnp.zeros_like(scores(*arguments, **options)))
    ids = structure.ids(AttentionSpec.own(*(None, *doubled(4096, 32))), 1, length, length, 0, 0)
    zero, row = jnp.zeros((1, length, H)), jnp.zeros((1, 1, 1, length))
    with dispatch.interpreted():
        _, lse = kernels.forward(zero, zero, zero, *ids, plan)
        dq, _, dv = kernels.backward(zero, zero + 1, zero, zero + 1, row, row - 1, *ids, plan)
    Q = 4096 // 32
    allowed = 32 * 32 * (Q + Q * (Q - 1) // 2 + Q * (Q + 1) // 2)  # noisy in its own block, noisy to clean, clean to clean
    for visits in (jnp.exp2(lse), dq[..., 0], dv[..., 0]):  # of a query, of a query, of a key
        area = np.asarray(visits, np.float64).round().sum()
        assert allowed <= area <= 1.25 * allowed


def test_low_precision_is_as_near_to_the_truth_as_the_reference(name):
    q, k, v, do = arrays(4, 1, 256, 256, 2, 2, 64, jnp.bfloat16)
    spec = AttentionSpec.own(block=jnp.arange(256)[None] // 32)
    truth = both_ways(reference.attention)(*(x.astype(jnp.float32) for x in (q, k, v)), spec, do.astype(jnp.float32))
    with dispatch.interpreted():
        ours = both_ways(kernel(name))(q, k, v, spec, do)
    def error(x, exact):
        x, exact = np.asarray(x, np.float64), np.asarray(exact, np.float64)
        return np.linalg.norm(x - exact) / np.linalg.norm(exact)
    for mine, plain, exact in zip(ours, both_ways(reference.attention)(q, k, v, spec, do), truth, strict=True):
        assert mine.dtype == jnp.bfloat16
        assert error(mine, exact) < 1.2 * error(plain, exact)


@pytest.mark.parametrize("rows", ["vmap", "shard_map"])
def test_under_transformations(name, rows):
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
        ours = gradient(name)
    np.testing.assert_allclose(ours, gradient("reference"), atol=1e-5)
