"""The linear cross-entropy against the plain one: chunked, and what all implementations share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import dispatch
from pallas_kernels.linear_cross_entropy import chunked, linear_cross_entropy, loss_and_entropy, loss_and_logsumexp, merge

IMPLEMENTATIONS = "reference", "chunked", "tpu", "gpu"
P = PartitionSpec


def run(implementation):
    def value_and_gradients(x, w, targets, needed, d):
        total = lambda x, w: jnp.vdot(d, linear_cross_entropy(x, w, targets, needed, implementation=implementation))
        return linear_cross_entropy(x, w, targets, needed, implementation=implementation), jax.grad(total, (0, 1))(x, w)
    return jax.jit(value_and_gradients)


REFERENCE, CHUNKED = run("reference"), run("chunked")


def inputs(M, D, V, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    return (jax.random.normal(keys[0], (M, D)).astype(dtype), (jax.random.normal(keys[1], (D, V)) * D**-0.5).astype(dtype),
            jax.random.randint(keys[2], (M,), 0, V), jax.random.normal(keys[3], (M,)))


@pytest.mark.parametrize("count, V", [(count, 40_000) for count in (0, 1, 63, 64, 65, 128, 150)] + [(0, 90_000), (65, 90_000)])
def test_equals_the_reference_for_any_number_of_needed_rows(count, V):
    """150 rows in chunks of 64 (the vocabulary leaves no more), the last of them not full; logits that are kept, or made again."""
    M, D = 150, 8
    assert max(chunked.CHUNK_LOGITS // V, chunked.MIN_ROWS) == 64
    assert (192 * V <= chunked.KEPT_LOGITS) == (V == 40_000)
    x, w, targets, d = inputs(M, D, V)
    needed = jnp.zeros(M, bool).at[np.random.RandomState(count).permutation(M)[:count]].set(True)
    (value, gradients), (want, wanted) = CHUNKED(x, w, targets, needed, d), REFERENCE(x, w, targets, needed, d)
    np.testing.assert_allclose(value, want, atol=2e-6)
    for a, b in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-6)
    rest = ~np.asarray(needed)
    assert (np.asarray(value)[rest] == 0).all() and (np.asarray(gradients[0])[rest] == 0).all()
    assert (np.asarray(value)[~rest] > 0).all() and (count > 0) == bool((np.asarray(gradients[1]) != 0).any())


def test_unneeded_rows_may_hold_anything():
    """Infinities and targets outside the vocabulary of rows that are not needed reach nothing."""
    x, w, targets, d = inputs(40, 8, 50)
    needed = jnp.arange(40) % 3 == 0
    clean = CHUNKED(x, w, targets, needed, d)
    dirty = CHUNKED(jnp.where(needed[:, None], x, jnp.inf), w, jnp.where(needed, targets, 10**6), needed, d)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        assert (a == b).all()


def test_all_rows_are_needed_unless_told_otherwise():
    x, w, targets, _ = inputs(10, 8, 50)
    want = -jax.nn.log_softmax(x @ w)[jnp.arange(10), targets]
    np.testing.assert_allclose(linear_cross_entropy(x, w, targets), want, atol=2e-6)


def test_bfloat16_inputs_give_float32_losses():
    x, w, targets, d = inputs(100, 16, 300, jnp.bfloat16)
    needed = jnp.arange(100) % 2 == 0
    (value, gradients), (want, wanted) = CHUNKED(x, w, targets, needed, d), REFERENCE(x, w, targets, needed, d)
    assert value.dtype == jnp.float32 and {g.dtype for g in gradients} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(value, want, atol=1e-5)
    for a, b in zip(gradients, wanted, strict=True):
        a, b = (np.asarray(g, np.float32) for g in (a, b))
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)


def test_large_vocabulary_and_large_logits():
    x, w, targets, d = inputs(70, 4, 157_184)
    needed = jnp.ones(70, bool)
    (value, gradients), (want, wanted) = CHUNKED(100 * x, w, targets, needed, d), REFERENCE(100 * x, w, targets, needed, d)
    assert np.isfinite(value).all() and float(value.max()) > 100
    np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-4)
    for a, b in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_target_outside_the_vocabulary_shows():
    """NaN in its row alone; the lower function takes its logit for 0."""
    x, w, targets, _ = inputs(10, 8, 50)
    wrong = targets.at[3].set(50).at[7].set(-1)
    for implementation in ("reference", "chunked"):
        nll, logsumexp = loss_and_logsumexp(x, w, wrong, implementation=implementation)
        np.testing.assert_array_equal(nll[jnp.array([3, 7])], logsumexp[jnp.array([3, 7])])
        needed = jnp.arange(10) != 7
        assert np.flatnonzero(np.isnan(linear_cross_entropy(x, w, wrong, needed, implementation=implementation))).tolist() == [3]


def with_z_loss(nll, logsumexp):
    return nll.sum() + 0.1 * (logsumexp**2).sum()


def same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_loss_logsumexp_and_gradients_of_both(implementation):
    """Against plain logits; also batched by vmap and computed again by remat."""
    x, w, targets, _ = inputs(40, 8, 50)
    needed = jnp.arange(40) % 3 > 0

    def plain(x, w, targets, needed):
        logits = jnp.matmul(x, w)
        logsumexp = jax.nn.logsumexp(logits, axis=-1)
        return jnp.where(needed, logsumexp - logits[jnp.arange(len(x)), targets], 0), jnp.where(needed, logsumexp, 0)

    def ours(x, w, targets, needed):
        return loss_and_logsumexp(x, w, targets, needed, implementation=implementation)

    value_and_gradients = lambda f: jax.value_and_grad(lambda x, w: with_z_loss(*f(x, w, targets, needed)), (0, 1))
    halves = lambda f: jax.vmap(f, (0, None, 0, 0))
    in_halves = lambda f: lambda x, w: with_z_loss(*halves(f)(x.reshape(2, 20, 8), w, targets.reshape(2, 20), needed.reshape(2, 20)))
    with dispatch.interpreted():
        same(jax.jit(ours)(x, w, targets, needed), plain(x, w, targets, needed))
        same(jax.jit(value_and_gradients(ours))(x, w), value_and_gradients(plain)(x, w))
        same(jax.jit(value_and_gradients(jax.checkpoint(ours)))(x, w), value_and_gradients(plain)(x, w))
        same(jax.jit(jax.value_and_grad(in_halves(ours), (0, 1)))(x, w), value_and_gradients(plain)(x, w))


@pytest.mark.parametrize("implementation, V", [("reference", 50), ("chunked", 50), ("chunked", 90_000)])
def test_loss_entropy_and_gradients_of_both(implementation, V):
    """Against plain logits; logits kept for the backward pass, or made again; rows in several chunks, of which the last is not full."""
    x, w, _, d = inputs(150, 8, V)
    targets = jnp.where(jnp.arange(150) % 2, jnp.argmax(x @ w, axis=-1), jnp.arange(150) % 50)
    needed = jnp.arange(150) % 3 > 0
    assert (192 * V <= chunked.KEPT_LOGITS) == (V == 50)

    def plain(x, w):
        logprobs = jax.nn.log_softmax(x @ w)
        values = -logprobs[jnp.arange(150), targets], -(jnp.exp(logprobs) * logprobs).sum(-1), logprobs.argmax(-1) == targets
        return tuple(jnp.where(needed, value, jnp.zeros_like(value)) for value in values)

    ours = lambda x, w: loss_and_entropy(x, w, targets, needed, implementation=implementation)
    values = jax.jit(ours)(x, w)
    same(values, plain(x, w))
    assert 20 < int(values[2].sum()) < int(needed.sum())
    total = lambda f: lambda x, w: jnp.vdot(d, f(x, w)[0]) + jnp.vdot(jnp.roll(d, 1), f(x, w)[1]) * 3
    same(jax.jit(jax.grad(total(ours), (0, 1)))(x, w), jax.grad(total(plain), (0, 1))(x, w))
    assert np.isnan(loss_and_entropy(x, w, targets.at[1].set(V), needed, implementation=implementation)[0][1])


def test_no_entropy_of_the_kernels():
    with pytest.raises(ValueError, match="it has reference, chunked"):
        loss_and_entropy(*inputs(4, 8, 50)[:3], implementation="tpu")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_or_the_vocabulary_split_over_devices(implementation):
    """Four devices with ten rows each, and four with twenty vocabulary entries each."""
    x, w, targets, _ = inputs(40, 8, 80)
    needed = jnp.arange(40) % 3 > 0
    mesh = Mesh(np.array(jax.devices()[:4]), ("part",))
    one = lambda *args: loss_and_logsumexp(*args, implementation=implementation)

    def of_entries(x, w, targets, needed):
        first = jax.lax.axis_index("part") * w.shape[1]
        return merge(*one(x, w, targets - first, needed), "part")

    rows, replicated = P("part"), P()
    split = lambda f, in_specs, out_specs: jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    by_rows = split(one, (rows, replicated, rows, rows), rows)
    by_entries = split(of_entries, (replicated, P(None, "part"), replicated, replicated), replicated)

    def value_and_gradients(f):
        total = lambda x, w: with_z_loss(*(jnp.where(needed, out, 0) for out in f(x, w, targets, needed)))
        return jax.jit(jax.value_and_grad(total, (0, 1)))(x, w)
    want = value_and_gradients(lambda *args: loss_and_logsumexp(*args, implementation="reference"))
    with dispatch.interpreted():
        same(value_and_gradients(by_rows), want)
        same(value_and_gradients(by_entries), want)
