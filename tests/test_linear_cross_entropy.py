"""Chunked linear cross-entropy against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_cross_entropy import chunked, linear_cross_entropy


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


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 128, 150])
def test_equals_the_reference_for_any_number_of_needed_rows(count):
    """150 rows in chunks of 64 (the vocabulary leaves no more), the last of them not full."""
    M, D, V = 150, 8, 10_000
    assert max(chunked.CHUNK_LOGITS // V, chunked.MIN_ROWS) == 64
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
