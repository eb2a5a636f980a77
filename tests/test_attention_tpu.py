"""What is particular to the TPU kernels of attention: their list of tiles, races, what the compiler takes."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.attention import AttentionSpec, reference, structure, tpu
from tests import ahead_of_time
from tests.attention_cases import SCALE, B, H, K, N, T, arrays, assert_equal, both_ways, doubled, packed_spec
from tests.attention_cases import kernel as kernels

kernel = kernels("tpu")


def test_tile_sizes():
    def tiles(T, S):
        return tpu.plan(jax.ShapeDtypeStruct((1, T, 1, 128), jnp.bfloat16), jax.ShapeDtypeStruct((1, S, 1, 128), jnp.bfloat16), SCALE)[:2]
    assert tiles(8192, 8192) == (512, 512) and tiles(32, 4096) == (128, 512) and tiles(700, 300) == (256, 128)


def test_sums_that_are_never_begun_anew_are_seen(monkeypatch):
    make_list = tpu.worklist
    monkeypatch.setattr(tpu, "worklist", lambda *a: (lambda work, count: (work.at[1:].set(work[1:] & ~tpu.FIRST), count))(*make_list(*a)))
    q, k, v, _ = arrays(0, B, T, T, N, K, H)
    spec = packed_spec()
    with dispatch.interpreted():
        ours = jax.jit(lambda *qkv: kernel(*qkv, spec, SCALE))(q, k, v)
    assert not np.allclose(ours, reference.attention(q, k, v, spec, SCALE), atol=1e-3)


def test_the_grid_walks_over_the_visited_tiles_alone():
    block, half = doubled(512, 32)
    ids = structure.ids(AttentionSpec.own(block=block, half=half), 1, 1024, 1024, 0, 0)
    some, whole = structure.tile_map(*ids, 128, 128)
    work, count = tpu.worklist(some, whole)
    assert count == some.sum() == 4 + 10 + 10  # noisy diagonal, noisy to clean with its diagonal, clean to clean
    listed = np.stack(tpu._indices(np.asarray(work)[: int(count)], some.shape), -1)
    np.testing.assert_array_equal(listed, np.argwhere(np.asarray(some)))


def test_lists_that_scalar_memory_cannot_hold_raise():
    some = jax.ShapeDtypeStruct((8, 256, 256), jnp.bool_)
    with pytest.raises(ValueError, match="8 x 256 x 256 pairs of tiles are more than 131072; take larger tiles"):
        jax.eval_shape(tpu.worklist, some, some)


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
    def shared(kernel, name, plan, arrays, layouts, *rest):
        return real(kernel, name, plan, arrays, (layouts[0], ("k", "row")), *rest)
    monkeypatch.setattr(tpu, "_call", shared)
    q, k, v, _ = arrays(6, 1, 100, 100, 2, 1, H)
    assert in_simulated_memories(lambda *qkv: kernel(*qkv, AttentionSpec(), SCALE), q, k, v)[1]


COMPILE = """
from pallas_kernels.attention import AttentionSpec, attention
def both_ways(q, k, v, spec, do):
    out, pull = jax.vjp(lambda *qkv: attention(*qkv, spec, implementation="tpu"), q, k, v)
    return out, pull(do)
for T, S, N, K, H, dtype in ((8192, 8192, 16, 16, 128, jnp.bfloat16), (32, 4096, 16, 4, 128, jnp.bfloat16), (300, 300, 4, 2, 64, jnp.float32)):
    ids_q, ids_k = struct((1, T), jnp.int32), struct((1, S), jnp.int32)
    spec = AttentionSpec(ids_q, ids_k, ids_q, ids_k, ids_q, ids_k, struct((1, S), bool))
    q, k = struct((1, T, N, H), dtype), struct((1, S, K, H), dtype)
    program = compiled(both_ways, q, k, k, spec, q)
    print(launches(program), temporary(program))
"""


@pytest.mark.libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_for_tpus(topology):
    for line in ahead_of_time.run(COMPILE, topology):
        launches, temporary = map(int, line.split())
        assert launches == 3 and temporary < 4 * 8192 * 8192  # the scores of a single head
