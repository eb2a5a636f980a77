"""The grouped matrix multiplication against a float64 oracle in numpy: sizes, gradients, isolation, precision, transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.grouped_matmul import cpu, grouped_matmul, grouped_swiglu

E, D, F = 5, 24, 16
IMPLEMENTATIONS = ("reference", "cpu")
SIZES = {  # of 600 rows: above two large tiles, so that both kinds of tile are visited
    "uneven": [0, 1, 300, 64, 235],
    "all to one": [0, 0, 600, 0, 0],
    "all to the last": [0, 0, 0, 0, 600],
    "rows left over": [17, 256, 0, 1, 100],
    "nobody": [0, 0, 0, 0, 0],
    "tile borders": [256, 64, 32, 16, 232],
}


def arrays(rows, seed=0, dtype=np.float32, E=E, D=D, F=F):
    """x, gate, up, down and the gradient of y."""
    rng = np.random.default_rng(seed)
    shapes = ((rows, D), (E, D, F), (E, D, F), (E, F, D), (rows, D))
    return [rng.normal(size=shape).astype(dtype) * (1 if len(shape) == 2 else shape[1] ** -0.5) for shape in shapes]


def oracle(x, gate, up, down, sizes, dy):
    """Forward and all gradients in float64, a group at a time."""
    x, gate, up, down, dy = (np.asarray(a, np.float64) for a in (x, gate, up, down, dy))
    y, dx, dgate, dup, ddown = (np.zeros_like(a) for a in (x, x, gate, up, down))
    start = 0
    for e, size in enumerate(sizes):
        r = slice(start, start + size)
        start += size
        g, u = x[r] @ gate[e], x[r] @ up[e]
        s = 1 / (1 + np.exp(-g))
        h = g * s * u
        y[r] = h @ down[e]
        dh = dy[r] @ down[e].T
        dg, du = dh * u * s * (1 + g * (1 - s)), dh * g * s
        dx[r] = dg @ gate[e].T + du @ up[e].T
        dgate[e], dup[e], ddown[e] = x[r].T @ dg, x[r].T @ du, h.T @ dy[r]
    return y, (dx, dgate, dup, ddown)


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def swiglu(request):
    """(x, gate, up, down, sizes, dy) -> (y, gradients), compiled once for each shape."""
    def both(*a):
        y, pull = jax.vjp(lambda *w: grouped_swiglu(*w, a[4], implementation=request.param), *a[:4])
        return y, pull(a[5])
    return jax.jit(both)


def close(got, want, tolerance=1e-5):
    """Largest error at most `tolerance` of the largest wanted value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * max(np.abs(want).max(), 1e-30), np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize("name", SIZES)
def test_swiglu_and_its_gradients_equal_the_oracle(swiglu, name):
    *operands, dy = arrays(600)
    y, grads = swiglu(*operands, jnp.array(SIZES[name], jnp.int32), dy)
    want, want_grads = oracle(*operands, SIZES[name], dy)
    close(y, want)
    for got, wanted in zip(grads, want_grads, strict=True):
        close(got, wanted)
    used = sum(SIZES[name])
    assert not np.asarray(y[used:]).any()
    assert not np.asarray(grads[0][used:]).any()


@pytest.mark.parametrize("sizes", [[3, 0, 2, 4, 1], [0, 0, 1, 0, 0], [2, 2, 2, 2, 2]])
def test_fewer_rows_than_a_tile(swiglu, sizes):
    *operands, dy = arrays(10)
    y, grads = swiglu(*operands, jnp.array(sizes, jnp.int32), dy)
    want, want_grads = oracle(*operands, sizes, dy)
    close(y, want)
    for got, wanted in zip(grads, want_grads, strict=True):
        close(got, wanted)


def test_rows_beyond_the_groups_reach_nothing(swiglu):
    *operands, dy = arrays(600)
    sizes = jnp.array(SIZES["rows left over"], jnp.int32)
    used = int(sizes.sum())
    want = swiglu(*operands, sizes, dy)
    operands[0][used:], dy[used:] = np.nan, np.nan
    got = swiglu(*operands, sizes, dy)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_nan_row_stays_in_its_expert(swiglu):
    *operands, dy = arrays(600)
    sizes = SIZES["uneven"]
    operands[0][1 + 300 + 10] = np.nan  # a row of expert 3, in the overhang of expert 2's last tile
    y, (dx, *weight_grads) = swiglu(*operands, jnp.array(sizes, jnp.int32), dy)
    assert np.isnan(y).any(1).sum() == 1
    assert np.isnan(dx).any(1).sum() == 1
    for g in weight_grads:
        assert set(np.flatnonzero(np.isnan(g).any((1, 2)))) == {3}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["uneven", "rows left over"])
def test_matmul_and_its_gradients_equal_the_oracle(implementation, name):
    x, w, _, _, _ = arrays(600)
    dy = np.random.default_rng(1).normal(size=(600, F)).astype(np.float32)
    x[sum(SIZES[name]):], dy[sum(SIZES[name]):] = np.nan, np.nan
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.array(SIZES[name], jnp.int32), implementation=implementation), x, w)
    want, want_dx, want_dw, start = np.zeros((600, F)), np.zeros(x.shape), np.zeros(w.shape), 0
    for e, size in enumerate(SIZES[name]):
        r = slice(start, start + size)
        start += size
        want[r], want_dx[r], want_dw[e] = np.float64(x[r]) @ w[e], np.float64(dy[r]) @ w[e].T, np.float64(x[r]).T @ dy[r]
    dx, dw = pull(dy)
    close(y, want)
    close(dx, want_dx)
    close(dw, want_dw)


def test_rows_are_independent_of_their_place_in_a_group(swiglu):
    *operands, dy = arrays(600)
    sizes = jnp.array([600, 0, 0, 0, 0], jnp.int32)
    order = np.random.default_rng(2).permutation(600)
    y, (dx, *_) = swiglu(*operands, sizes, dy)
    shuffled, (dx_shuffled, *_) = swiglu(operands[0][order], *operands[1:], sizes, dy[order])
    close(shuffled, y[order], 1e-6)
    close(dx_shuffled, dx[order], 1e-6)


def test_bf16_is_rounded_at_the_ends_only(swiglu):
    """Against the oracle on the same rounded inputs, the cpu path may err by a few bf16 roundings (2^-9), not by sums of them."""
    *operands, dy = (jnp.asarray(a, jnp.bfloat16) for a in arrays(600))
    y, grads = swiglu(*operands, jnp.array(SIZES["uneven"], jnp.int32), dy)
    want, want_grads = oracle(*operands, SIZES["uneven"], dy)
    assert y.dtype == jnp.bfloat16
    close(y, want, 1e-2)
    for got, wanted, operand in zip(grads, want_grads, operands, strict=True):
        assert got.dtype == operand.dtype
        close(got, wanted, 1e-2)


def test_rows_in_bf16_weights_in_float32_give_float32_weight_gradients():
    x, gate, up, down, dy = arrays(600)
    x, dy = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)
    sizes = jnp.array(SIZES["all to one"], jnp.int32)
    _, pull = jax.vjp(lambda *w: grouped_swiglu(*w, sizes, implementation="cpu"), x, gate, up, down)
    grads = pull(dy)
    assert [g.dtype for g in grads] == [jnp.bfloat16, *[jnp.float32] * 3]
    _, want = oracle(x, gate, up, down, SIZES["all to one"], dy)
    for got, wanted in zip(grads[1:], want[1:], strict=True):
        close(got, wanted, 5e-3)


def test_scan_over_stacked_layers_with_remat_equals_the_unrolled_gradient():
    x, *_, dy = arrays(96)
    layers = [np.stack(a) for a in zip(*(arrays(1, seed)[1:4] for seed in range(3)), strict=True)]
    sizes = jnp.array([10, 0, 50, 30, 6], jnp.int32)
    layer = lambda x, w: x + grouped_swiglu(x, *w, sizes, implementation="cpu")

    def scanned(x, layers):
        return jnp.sum(jax.lax.scan(lambda x, w: (jax.checkpoint(layer)(x, w), None), x, layers)[0] * dy)

    def unrolled(x, layers):
        for i in range(3):
            x = layer(x, [w[i] for w in layers])
        return jnp.sum(x * dy)

    for got, want in zip(jax.tree.leaves(jax.jit(jax.grad(scanned, (0, 1)))(x, layers)),
                         jax.tree.leaves(jax.jit(jax.grad(unrolled, (0, 1)))(x, layers)), strict=True):
        close(got, want, 1e-6)


@pytest.mark.parametrize("check_vma", [False, True])
def test_devices_with_their_own_rows_give_the_gradients_of_one_device(check_vma):
    devices = 8
    x, gate, up, down, dy = arrays(devices * 40)
    sizes = np.stack([np.random.default_rng(i).multinomial(40 - i, [1 / E] * E) for i in range(devices)]).astype(np.int32)
    mesh = Mesh(np.array(jax.devices()[:devices]), ("rows",))
    split, whole = PartitionSpec("rows"), PartitionSpec()
    run = jax.shard_map(lambda x, gate, up, down, sizes: grouped_swiglu(x, gate, up, down, sizes[0], implementation="cpu"),
                        mesh=mesh, in_specs=(split, whole, whole, whole, split), out_specs=split, check_vma=check_vma)
    got = jax.jit(jax.grad(lambda *w: jnp.sum(run(*w, sizes) * dy), (0, 1, 2, 3)))(x, gate, up, down)
    parts = [oracle(x[i * 40:(i + 1) * 40], gate, up, down, sizes[i], dy[i * 40:(i + 1) * 40])[1] for i in range(devices)]
    close(got[0], np.concatenate([p[0] for p in parts]))
    for n in (1, 2, 3):
        close(got[n], sum(p[n] for p in parts))


def test_wrong_shapes_and_names_raise():
    x, gate, up, down, _ = arrays(10)
    sizes = jnp.array([2] * E, jnp.int32)
    with pytest.raises(ValueError, match="no implementation 'fast'"):
        grouped_swiglu(x, gate, up, down, sizes, implementation="fast")
    with pytest.raises(ValueError, match=r"group sizes \(4,\)"):
        grouped_matmul(x, gate, sizes[:4])
    with pytest.raises(ValueError, match="are not"):
        grouped_swiglu(x, gate, up, gate, sizes)


def test_auto_is_the_loop_on_a_cpu():
    x, gate, _, _, _ = arrays(600)
    sizes = jnp.array(SIZES["uneven"], jnp.int32)
    assert cpu.LARGE_TILE * 2 <= 600
    assert "while" in str(jax.make_jaxpr(grouped_matmul)(x, gate, sizes))
