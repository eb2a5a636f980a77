"""The TPU and GPU kernels of the grouped matrix multiplication, in Pallas's interpreter against a float64 oracle, and ahead of time."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import blocks, dispatch
from pallas_kernels.grouped_matmul import gpu, grouped_matmul, grouped_swiglu, tpu
from tests import ahead_of_time, test_grouped_matmul
from tests.abstract_gpu import h100
from tests.test_grouped_matmul import close, oracle

BACKENDS = {"tpu": tpu, "gpu": gpu}
E, D, F, R = 5, 256, 384, 200  # with tiles of 32 x 128 x 128: several of each kind, and a last tile of rows that is not full
SIZES = {
    "uneven": [0, 1, 100, 64, 35],
    "tile borders": [32, 64, 0, 96, 8],
    "many in one tile": [3, 1, 0, 7, 9],
    "single rows": [1, 1, 1, 1, 1],
    "all to one": [0, 0, 200, 0, 0],
    "all to the last": [0, 0, 0, 0, 200],
    "rows left over": [17, 64, 0, 1, 50],
    "nobody": [0, 0, 0, 0, 0],
}


arrays = functools.partial(test_grouped_matmul.arrays, rows=R, D=D, F=F)


def forward_and_gradients(implementation):
    """A function of its own at every call, as jit remembers a function's trace: tile sizes and what a test plants are not in its key."""
    @jax.jit
    def both(x, gate, up, down, sizes, dy):
        y, pull = jax.vjp(lambda *w: grouped_swiglu(*w, sizes, implementation=implementation), x, gate, up, down)
        return y, pull(dy)
    return both


def compare(run, sizes, *operands, dy, tolerance=1e-5):
    """Forward and gradients against the oracle, with NaN in the rows beyond the groups."""
    want, want_grads = oracle(*operands, sizes, dy)
    used = sum(sizes)
    x, dy = (jnp.asarray(a).at[used:].set(np.nan) for a in (operands[0], dy))
    y, grads = run(x, *operands[1:], jnp.array(sizes, jnp.int32), dy)
    assert y.dtype == x.dtype and [g.dtype for g in grads] == [a.dtype for a in operands]
    close(y, want, tolerance)
    for got, wanted in zip(grads, want_grads, strict=True):
        close(got, wanted, tolerance)
    assert not np.asarray(y[used:]).any()
    assert not np.asarray(grads[0][used:]).any()


def small(operation, shape, default):
    """32 x 128 x 128 where 128 divides the inner dimension, which otherwise is left whole."""
    return default | {"rows": 32, "inner": default["inner"] if default["inner"] % 128 else 128, "columns": 128}


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(dispatch, "tiles", small)


@pytest.fixture(scope="module", params=BACKENDS)
def tiled(request):
    """Forward and gradients with small tiles, compiled once."""
    with pytest.MonkeyPatch.context() as patch, dispatch.interpreted():
        patch.setattr(dispatch, "tiles", small)
        return forward_and_gradients(request.param).lower(*arrays()[:4], jnp.zeros(E, jnp.int32), arrays()[4]).compile()


@pytest.mark.parametrize("name", SIZES)
def test_swiglu_and_its_gradients_equal_the_oracle(tiled, name):
    *operands, dy = arrays()
    compare(tiled, SIZES[name], *operands, dy=dy)


def test_random_sizes(tiled):
    rng = np.random.default_rng(0)
    *operands, dy = arrays()
    for i in range(8):
        ends = np.sort(rng.integers(0, R + 1, size=E + i % 2))[:E]  # in every other draw all groups end before the last row
        compare(tiled, np.diff(ends, prepend=0).tolist(), *operands, dy=dy)


def test_a_nan_row_stays_in_its_expert(tiled):
    *operands, dy = arrays()
    operands[0][1 + 100 + 10] = np.nan  # a row of expert 3, in a tile that expert 2 visits too
    y, (dx, *weight_grads) = tiled(*operands, jnp.array(SIZES["uneven"], jnp.int32), dy)
    assert np.flatnonzero(np.isnan(y).any(1)).tolist() == np.flatnonzero(np.isnan(dx).any(1)).tolist() == [111]
    for g in weight_grads:
        assert set(np.flatnonzero(np.isnan(g).any((1, 2)))) == {3}


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("dtypes", ["float32 float32", "bfloat16 bfloat16", "bfloat16 float32"])
def test_default_tiles_fewer_rows_than_a_tile_and_narrow_weights(dtypes, implementation):
    """Rows and weights of these dtypes. In bf16 results, activations and their gradients are rounded (2^-9): a few roundings may add up."""
    rows, weights = dtypes.split()
    tolerance = 1e-5 if rows == "float32" else 1e-2
    x, *matrices, dy = arrays(rows=10, D=24, F=16)
    operands, dy = [x.astype(rows), *(w.astype(weights) for w in matrices)], dy.astype(rows)
    with dispatch.interpreted():
        run = forward_and_gradients(implementation)
        for sizes in ([3, 0, 2, 4, 1], [0, 0, 1, 0, 0], [2, 2, 2, 2, 2]):
            compare(run, sizes, *operands, dy=dy, tolerance=tolerance)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_bf16_is_as_close_to_float64_as_plain_bf16_is(implementation):
    *operands, dy = (jnp.asarray(a, jnp.bfloat16) for a in arrays(rows=64, D=64, F=32))
    sizes = [20, 0, 30, 1, 13]
    want = jax.tree.leaves(oracle(*operands, sizes, dy))
    run = lambda name: jax.tree.leaves(forward_and_gradients(name)(*operands, jnp.array(sizes, jnp.int32), dy))
    with dispatch.interpreted():
        got, plain = run(implementation), run("reference")
    error = lambda a, exact: np.linalg.norm(np.asarray(a, np.float64) - exact)
    assert all(error(a, exact) <= 1.1 * error(b, exact) for a, b, exact in zip(got, plain, want, strict=True))


@pytest.mark.parametrize("implementation", BACKENDS)
def test_matmul_and_its_gradients_equal_the_loops(small_tiles, implementation):
    x, w, _, _, _ = arrays(F=200)  # the last tile of columns overhangs
    dy = np.random.default_rng(1).normal(size=(R, 200)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, x, w, sizes, dy):
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w)
        return y, *pull(dy)

    with dispatch.interpreted():
        for name in ("uneven", "rows left over", "nobody"):
            sizes = jnp.array(SIZES[name], jnp.int32)
            for got, want in zip(run(implementation, x, w, sizes, dy), run("cpu", x, w, sizes, dy), strict=True):
                close(got, want)


@pytest.mark.parametrize("rest", [False, True])
def test_visits_cover_every_row_once_within_the_bound(rest):
    rng = np.random.default_rng(0)
    plan = jax.jit(tpu.visits, static_argnums=(1, 2), static_argnames="rest")
    for rows, tile in ((100, 16), (96, 16), (7, 7)):
        for _ in range(20):
            sizes = np.diff(np.sort(rng.integers(0, rows + 1, size=E)), prepend=0) * (rng.random(E) < 0.7)
            starts, groups, tiles, (count,) = map(np.asarray, plan(sizes, rows, tile, rest=rest))
            seen = list(dict.fromkeys(zip(groups.tolist(), tiles.tolist(), strict=True)))  # entries beyond the list repeat the last
            assert (np.diff(groups) >= 0).all() and (np.diff(tiles) >= 0).all() and tiles.max() < -(-rows // tile)
            assert sum(group < E for group, _ in seen) == count
            assert {group for group, _ in seen} >= (set(np.flatnonzero(sizes)) if rest else set(range(E)))
            visited = [row for group, at in seen for row in range(at * tile, at * tile + tile) if starts[group] <= row < starts[group + 1]]
            assert visited == list(range(rows if rest else sizes.sum()))


def test_row_tiles_cover_every_row_once():
    rng = np.random.default_rng(0)
    plan = jax.jit(gpu.row_tiles, static_argnums=(1, 2))
    for rows, tile in ((100, 16), (96, 16), (7, 16)):
        for _ in range(20):
            sizes = np.diff(np.sort(rng.integers(0, rows + 1, size=E)), prepend=0) * (rng.random(E) < 0.7)
            groups, starts, ends = map(np.asarray, plan(sizes, rows, tile))
            assert (ends - starts).max() <= tile
            of_row = [(row, group) for group, start, end in zip(groups.tolist(), starts, ends, strict=True) for row in range(start, end)]
            assert of_row == list(enumerate(np.repeat(np.arange(E + 1), [*sizes, rows - sizes.sum()]).tolist()))


def _off_by_one(starts, group, tile, size):
    row = tile * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    return (starts[group] <= row) & (row <= starts[group + 1])


def _one_visit_too_few(*args, rest, real=tpu.visits):
    plan = real(*args, rest=rest)
    return plan._replace(count=plan.count - 1)


def _one_row_too_many(ref, where, real=blocks._inside):
    return real(ref, [(*at[:2], at[2] + 1) if isinstance(at, tuple) and len(at) == 3 else at for at in where])


def _one_row_too_few(*args, real=gpu.row_tiles):
    plan = real(*args)
    return plan._replace(ends=plan.ends - 1)


FAULTS = [("tpu", tpu, "_mine", _off_by_one), ("tpu", tpu, "visits", _one_visit_too_few), ("gpu", blocks, "_inside", _one_row_too_many),
          ("gpu", gpu, "row_tiles", _one_row_too_few)]


@pytest.mark.parametrize("implementation, module, name, wrong", FAULTS)
def test_a_planted_error_is_caught(monkeypatch, small_tiles, implementation, module, name, wrong):
    monkeypatch.setattr(module, name, wrong)
    *operands, dy = arrays(D=128, F=128)
    with dispatch.interpreted(), pytest.raises(AssertionError):
        compare(forward_and_gradients(implementation), SIZES["uneven"], *operands, dy=dy)


def test_gpu_programs_write_the_same_in_any_order(monkeypatch, small_tiles):
    """The interpreter runs programs in order, a GPU does not: backwards, results are equal to the bit."""
    *operands, dy = arrays(rows=100, D=128, F=256)
    args = (*operands, jnp.array([5, 0, 30, 1, 40], jnp.int32), dy)
    with dispatch.interpreted():
        want = forward_and_gradients("gpu")(*args)
        program_id, grids = gpu.pl.program_id, []
        pallas_call = gpu.pl.pallas_call
        monkeypatch.setattr(gpu.pl, "pallas_call", lambda *args, grid, **rest: grids.append(grid) or pallas_call(*args, grid=grid, **rest))
        monkeypatch.setattr(gpu.pl, "program_id", lambda axis: grids[-1][axis] - 1 - program_id(axis))
        got = forward_and_gradients("gpu")(*args)
    assert len(grids) == 7
    jax.tree.map(np.testing.assert_array_equal, got, want)


RACES = {"detect_races": True, "uninitialized_memory": "nan"}


def test_no_race_and_no_read_of_unwritten_memory(small_tiles, capfd):
    *operands, dy = arrays(rows=40, E=3, D=128, F=256)
    with dispatch.interpreted(**RACES):
        compare(forward_and_gradients("tpu"), [5, 0, 30], *operands, dy=dy)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("planted", [False, True])
def test_a_planted_race_is_detected(monkeypatch, small_tiles, capfd, planted):
    """Two cores take a tile of columns each; planted, a visit each of the same result: visits are declared to be independent."""
    if planted:
        monkeypatch.setattr(tpu.pltpu, "CompilerParams", lambda dimension_semantics, real=tpu.pltpu.CompilerParams, **rest: real(
            dimension_semantics=("parallel",) * len(dimension_semantics), **rest))
    x, w, *_ = arrays(rows=64, E=1, D=128, F=128 if planted else 256)
    with dispatch.interpreted(**RACES, num_cores_or_threads=2):
        for run in (lambda: tpu.rows_matmul("rows", (x[:32],), (w,), jnp.array([16], jnp.int32)),
                    lambda: tpu.weights_matmul("weights", x, w[0, :64], jnp.array([64], jnp.int32), x.dtype)):
            raised = ""
            try:
                jax.block_until_ready(jax.jit(run)())
            except RuntimeError as error:  # some versions of jax raise, others print
                raised = str(error)
                tpu.pltpu.reset_tpu_interpret_mode_state()
            assert ("RACE DETECTED" in raised + capfd.readouterr().out) == planted, raised


@pytest.mark.parametrize("implementation", BACKENDS)
def test_scan_over_stacked_layers_with_remat_equals_the_loops(implementation):
    x, *_, dy = arrays(rows=96, D=24, F=16)
    layers = [np.stack(a) for a in zip(*(arrays(rows=1, D=24, F=16, seed=seed)[1:4] for seed in range(3)), strict=True)]
    sizes = jnp.array([10, 0, 50, 30, 6], jnp.int32)

    def loss(x, layers, implementation):
        layer = jax.checkpoint(lambda x, w: x + grouped_swiglu(x, *w, sizes, implementation=implementation))
        return jnp.sum(jax.lax.scan(lambda x, w: (layer(x, w), None), x, layers)[0] * dy)

    with dispatch.interpreted():
        run = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
        for got, want in zip(jax.tree.leaves(run(x, layers, implementation)), jax.tree.leaves(run(x, layers, "cpu")), strict=True):
            close(got, want)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_devices_with_their_own_rows_give_the_gradients_of_one_device(implementation):
    devices = 4
    x, *weights, dy = arrays(rows=devices * 40, D=24, F=16)
    sizes = np.stack([np.random.default_rng(i).multinomial(40 - i, [1 / E] * E) for i in range(devices)]).astype(np.int32)
    mesh, split, whole = Mesh(np.array(jax.devices()[:devices]), ("rows",)), PartitionSpec("rows"), PartitionSpec()

    def loss(x, weights, implementation):
        run = jax.shard_map(lambda x, weights, sizes: grouped_swiglu(x, *weights, sizes[0], implementation=implementation),
                            mesh=mesh, in_specs=(split, whole, split), out_specs=split, check_vma=False)
        return jnp.sum(run(x, weights, sizes) * dy)

    with dispatch.interpreted():
        run = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
        for got, want in zip(jax.tree.leaves(run(x, weights, implementation)), jax.tree.leaves(run(x, weights, "cpu")), strict=True):
            close(got, want)


def test_rows_and_sizes_under_vmap():
    x, *weights, _ = arrays(rows=80, D=24, F=16)
    sizes = jnp.array([[10, 0, 20, 1, 3], [0, 40, 0, 0, 0]], jnp.int32)
    run = jax.jit(lambda x, implementation: jax.vmap(lambda x, sizes: grouped_swiglu(x, *weights, sizes, implementation=implementation))(x, sizes),
                  static_argnums=1)
    with dispatch.interpreted():
        close(run(x.reshape(2, 40, 24), "gpu"), run(x.reshape(2, 40, 24), "cpu"))


def test_an_inner_tile_that_does_not_divide_raises(monkeypatch):
    monkeypatch.setattr(dispatch, "tiles", lambda operation, shape, default: default | {"inner": 100})
    x, w, *_ = arrays()
    with dispatch.interpreted(), pytest.raises(ValueError, match="inner tile 100 does not divide 256"):
        grouped_matmul(x, w, jnp.zeros(E, jnp.int32), implementation="tpu")


AHEAD_OF_TIME = """
from pallas_kernels.grouped_matmul import grouped_swiglu
def both(x, gate, up, down, sizes, dy):
    y, pull = jax.vjp(lambda *w: grouped_swiglu(*w, sizes, implementation="tpu"), x, gate, up, down)
    return y, pull(dy)
for R, E, D, F, dtype in ((32768, 64, 2048, 1024, jnp.bfloat16), (100, 5, 200, 72, jnp.float32)):
    x, up, down = struct((R, D), dtype), struct((E, D, F), dtype), struct((E, F, D), dtype)
    program = compiled(both, x, up, up, down, struct((E,), jnp.int32), x)
    print(launches(program), temporary(program))
"""


@pytest.mark.libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_ahead_of_time_for_the_7b_model(topology):
    """Two kernels forward and five backward; temporary memory is a few activations (64 MiB each), not a copy of the weights (256 MiB each)."""
    (launches, temporary), (small_launches, _) = (map(int, line.split()) for line in ahead_of_time.run(AHEAD_OF_TIME, topology))
    assert (launches, small_launches) == (7, 7)
    assert temporary < 200 * 2**20


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lowers_for_a_gpu_at_the_size_of_the_7b_model(dtype):
    """Left to itself, the choice on a GPU is the kernels: two forward and five backward, without an array of all experts' rows or activations."""
    E, D, F, R = 64, 2048, 1024, 65536
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((R, D), (E, D, F), (E, D, F), (E, F, D), (R, D))]
    shapes.insert(4, jax.ShapeDtypeStruct((E,), "int32"))
    with h100():
        traced = forward_and_gradients(None).trace(*shapes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 7 and "stablehlo.dot_general" not in text and "ragged_dot" not in text
    largest = max(math.prod(map(int, shape.split("x")[:-1])) for shape in re.findall(r"tensor<((?:\d+x)+)[a-z]", text))
    assert largest == R * D
