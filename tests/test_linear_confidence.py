"""Linear confidence against the sampler's scores of whole logits, over a split vocabulary, and in kernels for TPUs and GPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from jax.sharding import Mesh, PartitionSpec

from llada_jax.sampling import score
from pallas_kernels import dispatch
from pallas_kernels.linear_confidence import counter_bits, gpu, linear_confidence, linear_confidence_partial, merge, reference, tpu
from tests import ahead_of_time
from tests.abstract_gpu import h100

M, D, V, MASK = 40, 24, 1000, 7
KERNELS = {"tpu": tpu, "gpu": gpu}


@functools.cache
def inputs():
    """Rows with ties across tiles, with a mask token on top, and almost certain ones."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (M, D)), jax.random.normal(keys[1], (D, V)) * 0.4
    w = w.at[:, 400].mul(2)
    w = w.at[:, 900].set(w[:, 400]).at[:, MASK].set(3 * x[0]).at[:, 401].set(w[:, 400])
    x = x.at[1].set(4 * w[:, 400]).at[2].set(20 * w[:, 3]).at[3].set(0)
    return x, w, jax.random.bits(keys[2], (M, 2))


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(dispatch, "tiles", lambda operation, shape, default: default | {"rows": 16, "columns": 128, "depth": 16})
    monkeypatch.setattr(gpu, "READERS", 3)
    monkeypatch.setattr(gpu, "PROGRAMS", 9)  # three row tiles, three shares of three tiles of the vocabulary


def expected(temperature, suppressed=MASK):
    """`propose`, in the order of the fields of Confidence, with the noise of counter_bits."""
    x, w, keys = inputs()
    noise = lambda kind, row, step, position, n: counter_bits(keys, jnp.arange(n)[None])[:, None]
    logits = jnp.matmul(x, w, precision="highest")
    zeros = jnp.zeros(M, jnp.int32)
    p = score.propose(logits[:, None], suppressed=[suppressed], sampling=score.Sampling(temperature), noise=noise, row_B=zeros, step_B=zeros,
                      position_BC=zeros[:, None])
    logsumexp = jax.nn.logsumexp(jnp.where(jnp.arange(V) == suppressed, -jnp.inf, logits), axis=-1)
    return p.token_BC[:, 0], jnp.log(p.prob_BC[:, 0]), p.runner_up_BC[:, 0], p.entropy_BC[:, 0], logsumexp


def close(got, want):
    np.testing.assert_array_equal(got[0], want[0])
    assert got[0].dtype == jnp.int32
    for name, a, b in zip(got._fields[1:], got[1:], want[1:], strict=True):
        assert a.shape == (M,) and a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=5e-6, rtol=5e-6, err_msg=name)


@pytest.mark.parametrize("implementation, tile", [("reference", V), ("reference", 128), ("tpu", 128), ("gpu", 128)])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_equals_the_scores_of_whole_logits(small_tiles, monkeypatch, implementation, tile, temperature):
    """Eight tiles of 128, the last of them not full; the tied columns 400, 401 and 900 lie in two of them."""
    monkeypatch.setattr(reference, "TILE", tile)
    with dispatch.interpreted():
        got = jax.jit(lambda x, w, keys: linear_confidence(x, w, temperature=temperature, keys_M2=keys, suppressed=(MASK,),
                                                           implementation=implementation))(*inputs())
    close(got, expected(temperature))
    if temperature:
        assert (got[0] != expected(0.0)[0]).sum() > 5  # the noise chooses
    else:
        assert got[0][1] == 400 and got[2][1] == pytest.approx(float(jnp.exp(got[1][1])))  # the lowest of the tied, one of them the runner-up
        assert got[0][3] == 0 and got[3][3] == pytest.approx(np.log(V - 1), rel=1e-6)


def test_without_suppression_the_mask_token_wins():
    x, w, _ = inputs()
    got = linear_confidence(x, w)
    close(got, expected(0.0, suppressed=-1))
    assert got[0][0] == MASK


def test_bits_come_from_keys_arrays_and_functions_alike():
    x, w, keys = inputs()
    want = linear_confidence(x, w, temperature=1.0, keys_M2=keys)
    table = counter_bits(keys, jnp.arange(V)[None])
    for bits in (table, lambda id_N: counter_bits(keys, id_N[None])):
        for a, b in zip(linear_confidence(x, w, temperature=1.0, bits=bits), want, strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"temperature 0.5 needs noise.*neither"):
        linear_confidence(x, w, temperature=0.5)
    with pytest.raises(ValueError, match=r"temperature -1.0 is negative"):
        linear_confidence(x, w, temperature=-1.0)


def test_counter_bits_are_threefry():
    keys = jnp.array([[0, 0], [0x13198A2E, 0x03707344]], jnp.uint32)
    count = jnp.arange(5, dtype=jnp.uint32)
    for row, key in zip(counter_bits(keys, count[None]), keys, strict=True):
        want = threefry_2x32(key, jnp.concatenate([count, jnp.zeros_like(count)]))[:5]
        np.testing.assert_array_equal(row, want)


def test_gumbel_equals_the_samplers():
    bits = jnp.array([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 123456789, 3123456789], jnp.uint32)
    np.testing.assert_array_equal(reference.gumbel(bits), score.gumbel(bits))


@pytest.mark.parametrize("implementation", ["reference", *KERNELS])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_split_vocabulary_gives_the_same(small_tiles, monkeypatch, temperature, implementation):
    """Four devices with 250 columns each, in tiles of 128; the tied columns are on two of them, the suppressed ones on one."""
    monkeypatch.setattr(reference, "TILE", 128)
    x, w, keys = inputs()
    P = PartitionSpec

    def local(x, w, keys):
        first = jax.lax.axis_index("part") * w.shape[1]
        return merge(linear_confidence_partial(x, w, first=first, temperature=temperature, keys_M2=keys, suppressed=(MASK,),
                                               implementation=implementation), "part")
    mesh = Mesh(np.array(jax.devices()[:4]), ("part",))
    split = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P(None, "part"), P()), out_specs=P(), check_vma=implementation == "reference"))
    with dispatch.interpreted():
        close(split(x, w, keys), expected(temperature))
        text = split.lower(x, w, keys).as_text()
    assert "all_gather" not in text and "all_reduce" in text


def test_a_suppressed_shard_adds_nothing():
    x, w, _ = inputs()
    rest = linear_confidence_partial(x, w[:, 2:])
    empty = linear_confidence_partial(x, w[:, :2], suppressed=(0, 1))
    joined = reference.finish(reference.pair(empty, rest))
    for a, b in zip(joined, reference.finish(rest), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("implementation", ["reference", *KERNELS])
@pytest.mark.parametrize("suppressed", [(), (MASK,)])
def test_a_row_with_nan_does_not_reach_others(small_tiles, implementation, suppressed):
    """It has token 0, be all of its logits NaN or some of them; reductions that drop NaN would find the suppressed -inf."""
    x, w, _ = inputs()
    with dispatch.interpreted():
        run = jax.jit(lambda x, w: linear_confidence(x, w, suppressed=suppressed, implementation=implementation))
        want, got, column = run(x, w), run(x.at[5].set(jnp.nan), w), run(x, w.at[0, 500].set(jnp.nan))
    assert got[0][5] == 0 and all(jnp.isnan(field[5]) for field in got[1:])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.delete(a, 5), np.delete(b, 5))
    assert (column[0] == 0).all() and all(jnp.isnan(field).all() for field in column[1:])


def test_the_order_of_floats_as_integers():
    a = jnp.array([-jnp.inf, -3e38, -2.5, -1e-30, -0.0, 0.0, 1e-30, 2.5, 3e38, jnp.inf, jnp.nan], jnp.float32)
    assert (jnp.diff(reference.ordered(a)) > 0).all()
    np.testing.assert_array_equal(reference.ordered(reference.ordered(a)), a)
    assert reference.ordered(-a)[-1] == reference.ordered(a)[-1]  # the sign of a NaN does not matter


def in_halves(implementation, x, w, keys):
    """The kernel on two parts of the vocabulary, joined."""
    parts = [linear_confidence_partial(x, w[:, first:last], first=first, temperature=0.7, keys_M2=keys, suppressed=(MASK,),
                                       implementation=implementation) for first, last in ((0, 300), (300, V))]
    return reference.finish(reference.pair(*parts))


@pytest.mark.parametrize("implementation", KERNELS)
def test_the_kernel_on_parts_of_a_vocabulary(small_tiles, monkeypatch, implementation):
    """And ids that are off by one in the kernel are seen."""
    with dispatch.interpreted():
        close(in_halves(implementation, *inputs()), expected(0.7))
        monkeypatch.setattr(KERNELS[implementation], "of_logits", lambda logits, ids, *rest: reference.of_logits(logits, ids + 1, *rest))
        with pytest.raises(AssertionError, match="Arrays are not equal"):
            close(in_halves(implementation, *inputs()), expected(0.7))


@pytest.mark.parametrize("implementation", KERNELS)
def test_vmap(small_tiles, implementation):
    x, w, keys = inputs()
    run = lambda x, keys: linear_confidence(x, w, temperature=0.7, keys_M2=keys, suppressed=(MASK,), implementation=implementation)
    with dispatch.interpreted():
        got = jax.jit(jax.vmap(run))(x.reshape(2, M // 2, D), keys.reshape(2, M // 2, 2))
    close(got._replace(**{name: field.reshape(M) for name, field in got._asdict().items()}), expected(0.7))


def test_no_race_and_no_read_of_unwritten_memory(small_tiles, monkeypatch, capfd):
    """On two simulated cores, whose memories begin as NaN; accumulating on both at once is seen."""
    x, w, _ = inputs()

    def simulated():
        with dispatch.interpreted(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2, random_seed=1):
            return jax.block_until_ready(jax.jit(lambda x, w: linear_confidence(x, w, implementation="tpu"))(x, w[:, :300]))
    close(simulated(), linear_confidence(x, w[:, :300]))
    assert "RACE" not in capfd.readouterr().out
    monkeypatch.setattr(tpu, "SEMANTICS", ("parallel", "parallel"))
    simulated()
    assert "RACE DETECTED" in capfd.readouterr().out


@pytest.mark.parametrize("implementation", KERNELS)
def test_the_kernel_in_bfloat16(small_tiles, implementation):
    """Both multiply the same bfloat16 numbers and keep float32 sums."""
    x, w, keys = inputs()
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    with dispatch.interpreted():
        got = linear_confidence(x, w, temperature=0.7, keys_M2=keys, implementation=implementation)
        with pytest.raises(ValueError, match="noise of keys"):
            linear_confidence(x, w, temperature=0.7, bits=counter_bits(keys, jnp.arange(V)[None]), implementation=implementation)
    close(got, linear_confidence(x, w, temperature=0.7, keys_M2=keys, implementation="reference"))


@pytest.mark.parametrize("rows, dtype", [(32, jnp.bfloat16), (4096, jnp.bfloat16), (100, jnp.float32)])
def test_lowers_for_a_gpu(rows, dtype):
    """Chosen there of itself, with noise and without, at the full vocabulary: two Triton kernels each, and no array of rows x vocabulary."""
    def step(x, w, keys):
        return linear_confidence(x, w, temperature=0.5, keys_M2=keys, suppressed=(156895,)), linear_confidence(x, w)
    arrays = (jax.ShapeDtypeStruct(*a) for a in (((rows, 2048), dtype), ((2048, 157184), dtype), ((rows, 2), jnp.uint32)))
    with h100():
        text = jax.jit(step).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 4 and "2048x157184x" in text and f"{rows}x157184x" not in text


AHEAD_OF_TIME = """
from pallas_kernels.linear_confidence import linear_confidence
def step(x, w, keys):
    noisy = linear_confidence(x, w, temperature=0.5, keys_M2=keys, suppressed=(156895,), implementation="tpu")
    return noisy, linear_confidence(x, w, implementation="tpu")
for rows, dtype in ((4096, jnp.bfloat16), (32, jnp.bfloat16), (100, jnp.float32)):
    program = compiled(step, struct((rows, 2048), dtype), struct((2048, 157184), dtype), struct((rows, 2), jnp.uint32))
    print(launches(program), temporary(program))
"""


@pytest.mark.libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_ahead_of_time(topology):
    """With noise and without, at the full vocabulary, for few rows and many: one kernel each, temporaries far below the 2.6 GB of float32 logits."""
    for line in ahead_of_time.run(AHEAD_OF_TIME, topology):
        launches, temporary = map(int, line.split())
        assert launches == 2 and temporary < 50 * 2**20
