"""Who sees whom: the attention operation against a mask and a softmax written with loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import AttentionSpec, attention

B, T, N, K, H = 2, 8, 4, 2, 6


@pytest.fixture(scope="module")
def qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (B, T, heads, H)) for key, heads in zip(keys, (N, K, K), strict=True))


SEGMENT = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 2, 3, 3]])
BLOCK = np.array([[0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 1, 1, 1, 2, 2, 2]])
DOUBLED = np.array([[0, 0, 1, 1, 0, 0, 1, 1], [0, 1, 1, 1, 0, 1, 1, 1]])  # blocks of [noisy; clean]
HALF = np.array([[0, 0, 0, 0, 1, 1, 1, 1]] * 2)
PADDING = np.array([[0, 1, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0]], bool)
CAUSAL = np.broadcast_to(np.arange(T), (B, T))
RULES = {
    "everything": {},
    "segment": dict(segment=SEGMENT),
    "causal": dict(block=CAUSAL),
    "block-causal": dict(block=BLOCK),
    "noisy and clean": dict(block=DOUBLED, half=HALF),
    "padding": dict(padding=PADDING),
    "all but half": dict(segment=SEGMENT, block=BLOCK, padding=PADDING),
}


def sees(rule, b, i, j):
    """The docstring of AttentionSpec, one pair at a time."""
    if "segment" in rule and rule["segment"][b, i] != rule["segment"][b, j]:
        return False
    if "padding" in rule and rule["padding"][b, j]:
        return False
    if "half" in rule:
        mine, other = rule["block"][b, i], rule["block"][b, j]
        match ["noisy", "clean"][rule["half"][b, i]], ["noisy", "clean"][rule["half"][b, j]]:
            case "noisy", "noisy":
                return mine == other
            case "noisy", "clean":
                return other < mine
            case "clean", "clean":
                return other <= mine
            case _:
                return False
    return "block" not in rule or rule["block"][b, j] <= rule["block"][b, i]


def by_loops(q, k, v, rule):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, i, n in np.ndindex(B, T, N):
        visible = [j for j in range(T) if sees(rule, b, i, j)]
        if visible:
            scores = np.array([q[b, i, n] @ k[b, j, n // (N // K)] for j in visible]) / np.sqrt(H)
            weights = np.exp(scores - scores.max())
            out[b, i, n] = weights @ v[b, visible, n // (N // K)] / weights.sum()
    return out


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_equals_loops(qkv, rule):
    spec = AttentionSpec.own(**{key: jnp.asarray(value) for key, value in rule.items()})
    np.testing.assert_allclose(attention(*qkv, spec), by_loops(*qkv, rule), atol=2e-6)


def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient(qkv):
    spec = AttentionSpec(padding_k=jnp.asarray(PADDING).at[0].set(True))
    def total(q, k, v):
        return jnp.sum(jnp.sin(attention(q, k, v, spec)))
    assert (attention(*qkv, spec)[0] == 0).all() and (attention(*qkv, spec)[1] != 0).any()
    for gradient in jax.grad(total, (0, 1, 2))(*qkv):
        assert np.isfinite(gradient).all() and (gradient[0] == 0).all()


def test_keys_may_be_others_than_queries(qkv):
    q, k, v = qkv
    whole = attention(q, k, v, AttentionSpec.own(segment=jnp.asarray(SEGMENT)))
    part = attention(q[:, 2:5], k, v, AttentionSpec(segment_q=jnp.asarray(SEGMENT)[:, 2:5], segment_k=jnp.asarray(SEGMENT)))
    np.testing.assert_allclose(part, whole[:, 2:5], atol=1e-6)


def test_scale_and_dtype(qkv):
    q, k, v = qkv
    np.testing.assert_allclose(attention(q, k, v, scale=0.2), attention(0.2 * np.sqrt(H) * q, k, v), atol=1e-6)
    low = attention(*(x.astype(jnp.bfloat16) for x in qkv))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), attention(*qkv), atol=0.03)


def test_what_cannot_run_raises(qkv):
    q, k, v = qkv
    with pytest.raises(ValueError, match="4 query heads are not divisible by 3"):
        attention(q, jnp.zeros((B, T, 3, H)), jnp.zeros((B, T, 3, H)))
    with pytest.raises(ValueError, match="no implementation 'flash'"):
        attention(q, k, v, implementation="flash")
