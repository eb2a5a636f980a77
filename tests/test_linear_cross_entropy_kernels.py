"""The kernels of the linear cross-entropy in Pallas's interpreter; compiled ahead of time for TPUs, lowered for a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.linear_cross_entropy import gpu, linear_cross_entropy, tpu
from tests import ahead_of_time
from tests.abstract_gpu import h100
from tests.test_linear_cross_entropy import REFERENCE, inputs

M, D, V = 70, 24, 300  # tiles of 32 rows, 128 entries and, on GPUs, 16 of the width: none divides
both = pytest.mark.parametrize("implementation", ["tpu", "gpu"])


def run(implementation, x, w, targets, needed, d):
    value, pull = jax.vjp(lambda x, w: linear_cross_entropy(x, w, targets, needed, implementation=implementation), x, w)
    return value, pull(d)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(dispatch, "tiles", lambda operation, shape, default: default | {"rows": 32, "columns": 128, "depth": 16})
    monkeypatch.setattr(gpu, "PROGRAMS", 6)  # two shares of the vocabulary, of two tiles and one
    monkeypatch.setattr(gpu, "CHUNKS", 2)  # of two tiles and one


def interpreted(implementation, *args):
    with dispatch.interpreted():
        return jax.jit(functools.partial(run, implementation))(*args)


@functools.cache
def kernels(implementation):
    """One compilation for all tests; the interpreter is chosen when it is traced."""
    with dispatch.interpreted():
        return jax.jit(functools.partial(run, implementation)).trace(*arguments(0)).lower().compile()


def arguments(count, dtype=jnp.float32):
    x, w, targets, d = inputs(M, D, V, dtype)
    return x, w, targets, jnp.zeros(M, bool).at[np.random.RandomState(count).permutation(M)[:count]].set(True), d


def close(got, want, tolerance=3e-6):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=tolerance, rtol=tolerance)


@both
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 64, 70])
def test_equals_the_reference_for_any_number_of_needed_rows(implementation, count):
    args = arguments(count)
    got = kernels(implementation)(*args)
    close(got, REFERENCE(*args))
    rest = ~np.asarray(args[3])
    assert (np.asarray(got[0])[rest] == 0).all() and (np.asarray(got[1][0])[rest] == 0).all()
    assert (np.asarray(got[0])[~rest] > 0).all() and (count > 0) == bool((np.asarray(got[1][1]) != 0).any())


@both
def test_first_and_last_entries_of_the_vocabulary_are_targets(implementation):
    x, w, targets, needed, d = arguments(M)
    targets = targets.at[:6].set(jnp.array([0, 127, 128, 255, 256, V - 1]))
    close(kernels(implementation)(x, w, targets, needed, d), REFERENCE(x, w, targets, needed, d))


@both
def test_large_logits_and_unneeded_rows(implementation):
    """Logits of hundreds do not overflow; infinities and targets outside the vocabulary of unneeded rows reach nothing."""
    x, w, targets, needed, d = arguments(40)
    clean = kernels(implementation)(100 * x, w, targets, needed, d)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(REFERENCE(100 * x, w, targets, needed, d)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))  # float32 logits of 500 are exact to 3e-5
    dirty = kernels(implementation)(jnp.where(needed[:, None], 100 * x, jnp.inf), w, jnp.where(needed, targets, 10**6), needed, d)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(a, b)


@both
def test_a_row_with_nan_does_not_reach_others(implementation):
    """It has a loss and a gradient of NaN itself, and so do the weights."""
    x, w, targets, needed, d = arguments(M)
    (value, (dx, dw)), (want, (wanted, _)) = (kernels(implementation)(x, w, targets, needed, d) for x in (x.at[5].set(jnp.nan), x))
    assert np.isnan(value[5]) and np.isnan(dx[5]).all() and np.isnan(dw).all()
    np.testing.assert_array_equal(np.delete(value, 5), np.delete(want, 5))
    np.testing.assert_array_equal(np.delete(dx, 5, 0), np.delete(wanted, 5, 0))


def simulated(function, *args):
    """The result on two simulated cores, whose memories begin as NaN."""
    with dispatch.interpreted(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2, random_seed=1):
        return jax.block_until_ready(jax.jit(lambda *args: function(*args))(*args))


def test_no_race_and_no_read_of_unwritten_memory(monkeypatch, capfd):
    """Tiles in which no row is needed included; accumulating on two cores at once is seen."""
    args = arguments(33)
    close(simulated(functools.partial(run, "tpu"), *args), REFERENCE(*args))
    assert "RACE" not in capfd.readouterr().out
    monkeypatch.setattr(tpu, "SEMANTICS", ("parallel", "parallel"))
    simulated(functools.partial(linear_cross_entropy, implementation="tpu"), *args[:4])
    assert "RACE DETECTED" in capfd.readouterr().out


@pytest.mark.parametrize("backend", [tpu, gpu])
@pytest.mark.parametrize("name", ["_ids", "_busy"])
def test_planted_errors_are_found(monkeypatch, backend, name):
    """Off by one: entries of the vocabulary, and the number of tiles that hold needed rows."""
    args, right = arguments(33), getattr(backend, name)
    monkeypatch.setattr(backend, name, lambda *args: right(*args) - 1)
    wrong = interpreted(backend.__name__.split(".")[-1], *args)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        close(wrong, REFERENCE(*args))


@pytest.mark.parametrize("name", ["add_rows_gradient", "write_weights_gradient"])
def test_a_chunk_out_of_place_is_found(monkeypatch, name):
    args, right = arguments(33), getattr(gpu, name)
    monkeypatch.setattr(gpu, name, lambda rows, other, busy, chunk, *rest: right(rows, other, busy, jnp.zeros_like(chunk), *rest))
    wrong = interpreted("gpu", *args)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        close(wrong, REFERENCE(*args))


@both
def test_bfloat16(implementation):
    """No further from float32 than bfloat16's rounding of logit gradients and results."""
    args = arguments(50, jnp.bfloat16)
    value, gradients = interpreted(implementation, *args)
    want, wanted = REFERENCE(*(a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in args))
    close(value, want, 1e-5)
    for a, b in zip(gradients, wanted, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.01 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_lowers_for_a_gpu(monkeypatch, dtype):
    """Chosen there of itself: four Triton kernels at the full vocabulary, and no array of rows x vocabulary."""
    monkeypatch.undo()  # the tiles that a GPU would run with
    step = jax.value_and_grad(lambda x, w, targets, needed: linear_cross_entropy(x, w, targets, needed).sum(), (0, 1))
    arrays = (jax.ShapeDtypeStruct(*a) for a in (((4096, 2048), dtype), ((2048, 157184), dtype), ((4096,), jnp.int32), ((4096,), bool)))
    with h100():
        text = jax.jit(step).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 4 and "2048x157184x" in text and "4096x157184x" not in text


AHEAD_OF_TIME = """
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
def step(x, w, targets, needed):
    return jax.value_and_grad(lambda x, w: linear_cross_entropy(x, w, targets, needed, implementation="tpu").sum(), (0, 1))(x, w)
program = compiled(step, struct((4096, 2048), jnp.bfloat16), struct((2048, 157184), jnp.bfloat16), struct((4096,), jnp.int32), struct((4096,), bool))
print(launches(program), temporary(program))
"""


@pytest.mark.libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_ahead_of_time(topology):
    """Forward and backward at the full vocabulary: three kernels, and temporaries far below the 2.6 GB of float32 logits."""
    (line,) = ahead_of_time.run(AHEAD_OF_TIME, topology)
    launches, temporary = map(int, line.split())
    assert launches == 3 and temporary < 50 * 2**20
