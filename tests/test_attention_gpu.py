"""What is particular to the GPU kernels of attention: lists of tiles, splits, tile sizes, and that they lower for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.attention import AttentionSpec, attention, gpu, reference, structure, vjp
from tests.abstract_gpu import h100
from tests.attention_cases import SCALE, H, arrays, assert_equal, both_ways, packed_spec


def plan(T, S, H, dtype=jnp.bfloat16):
    return gpu.plan(jax.ShapeDtypeStruct((1, T, 4, H), dtype), jax.ShapeDtypeStruct((1, S, 4, H), dtype), SCALE)


def test_tile_sizes():
    assert plan(8192, 8192, 128) == (128, 128, (128, 64, 4, 2), (128, 64, 8, 3), (128, 64, 8, 3), 128, SCALE)
    assert plan(32, 4096, 64)[:4] == (32, 128, (32, 64, 4, 2), (32, 64, 8, 3)) and plan(5, 20, 8)[:2] == (16, 32)
    assert plan(64, 64, 80).H == 128 and plan(64, 64, 5).H == 16
    assert plan(4096, 4096, 256).dkv == (64, 32, 8, 3) and plan(4096, 4096, 128, jnp.float32).forward == (32, 32, 8, 2)
    with pytest.raises(ValueError, match="hold heads of up to 256, not 320; take 'reference'"):
        plan(128, 128, 320)


def test_lists_and_runs_hold_the_visited_tiles():
    """Every owner once; its list and its run together are the tiles that the map allows, the run the longest of whole ones; long walks first."""
    some, whole = structure.tile_map(*structure.ids(packed_spec(), 2, 300, 300, 20, 20), 32, 16)
    some, whole = some.at[0, 3].set(False), np.asarray(whole.at[0, 3].set(False))
    work = np.asarray(gpu.worklists(some, whole))
    runs = set()
    for b in range(2):
        assert sorted(work[b, :, 0]) == list(range(10)) and (np.diff(work[b, :, 1:3].sum(1)) <= 0).all()
        for owner, listing, run, first, *tiles in work[b]:
            members = range(first, first + run)
            assert sorted([*tiles[:listing], *members]) == list(np.flatnonzero(some[b, owner])) and list(tiles[:listing]) == sorted(tiles[:listing])
            assert whole[b, owner, members].all()
            assert run == max(map(len, "".join("x" if w else " " for w in whole[b, owner]).split()), default=0)
            runs.add(run)
    assert work[0, -1, 0] == 3 and work[0, -1, 1:3].sum() == 0
    assert len(runs) > 2 and (np.asarray(some) & ~whole).any()


@pytest.mark.parametrize("plant", ["start", "end", "owner"])
def test_a_wrong_list_is_seen(monkeypatch, plant):
    """Lists that begin one tile late, walks that end one too early, that belong to the neighbour."""
    make = gpu.worklists
    change = {
        "start": lambda work: jnp.concatenate([work[..., :gpu.HEADER], jnp.roll(work[..., gpu.HEADER:], -1, -1)], -1),
        "end": lambda work: work.at[..., 1].add(-1),
        "owner": lambda work: work.at[..., 0].set(jnp.roll(work[..., 0], 1, -1)),
    }[plant]
    monkeypatch.setattr(gpu, "worklists", lambda *pairs: change(make(*pairs)))
    q, k, v, _ = arrays(0, 2, 300, 300, 2, 2, H)
    with dispatch.interpreted():
        ours = attention(q, k, v, packed_spec(), scale=SCALE, implementation="gpu")
    assert not np.allclose(ours, reference.attention(q, k, v, packed_spec(), SCALE), atol=1e-3)


def test_few_queries_against_many_keys_are_split(monkeypatch):
    """Parts that see nothing, parts that no number of tiles divides, a row that sees nothing at all; gradients too."""
    splits = []
    call = gpu._call
    monkeypatch.setattr(gpu, "_call", lambda *a, **options: splits.append(options.get("splits", 1)) or call(*a, **options))
    q, k, v, do = arrays(2, 2, 16, 1500, 4, 2, H)
    position = jnp.tile(jnp.arange(1500), (2, 1))
    padding = jnp.stack([position[0] > 700, position[0] >= 0])
    spec = AttentionSpec(block_q=position[:, 1000:1016], block_k=position, padding_k=padding)
    with dispatch.interpreted():
        ours = both_ways(lambda *a: vjp.attention(gpu, *a))(q, k, v, spec, do)
    assert_equal(ours, both_ways(reference.attention)(q, k, v, spec, do))
    assert splits[0] == 11 and (np.asarray(ours[0])[1] == 0).all()


def both(q, k, v, spec, do):
    out, pull = jax.vjp(lambda *qkv: attention(*qkv, spec), q, k, v)
    return out, pull(do)


@pytest.mark.parametrize("T, S, N, K, H, dtype", [
    (4096, 4096, 16, 16, 128, jnp.bfloat16), (8192, 8192, 16, 16, 128, jnp.bfloat16), (32, 32768, 16, 16, 128, jnp.bfloat16),
    (300, 200, 4, 2, 80, jnp.bfloat16), (300, 300, 4, 2, 64, jnp.float32), (5, 7, 1, 1, 8, jnp.float32)])
def test_lowers_for_cuda(T, S, N, K, H, dtype):
    """Without a choice the kernels are taken, three of them, and no array of the size of a mask or of scores is made."""
    ids_q, ids_k = (jax.ShapeDtypeStruct((1, length), jnp.int32) for length in (T, S))
    spec = AttentionSpec(ids_q, ids_k, ids_q, ids_k, ids_q, ids_k, jax.ShapeDtypeStruct((1, S), jnp.bool_))
    q, k = jax.ShapeDtypeStruct((1, T, N, H), dtype), jax.ShapeDtypeStruct((1, S, K, H), dtype)
    with h100():
        text = jax.jit(both).trace(q, k, k, spec, q).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 3
    assert f"{T}x{S}x" not in text and f"{S}x{T}x" not in text
