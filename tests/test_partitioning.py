"""Meshes: one loss and one gradient on any of them, under any accumulation, from the same noise to the bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax import partitioning
from llada_jax.config import ConfigError
from llada_jax.diffusion import corrupt
from llada_jax.model import transformer
from llada_jax.training import step as step_lib
from pallas_kernels import dispatch
from tests import mesh_rows

B, T, V, MASK, STEP = 8, 12, 16, 15, 3
CONFIG = config_lib.Config(
    model=config_lib.Model(vocab_size=V, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, num_experts=4, experts_per_token=2,
                           expert_size=8, max_length=T, init_std=0.4),
    diffusion=config_lib.Diffusion(balance_coefficient=0.1, z_coefficient=0.01, min_noise=0.1, variable_length_rate=0.0),
    train=config_lib.Train(batch_size=B, seed=8))
MESHES = {"one": dict(data=1), "data=8": dict(data=8), "fsdp=8": dict(data=1, fsdp=8), "data=2 expert=4": dict(data=2, expert=4),
          "expert=2": dict(data=1, expert=2), "fsdp=2 expert=2": dict(data=1, fsdp=2, expert=2),
          "data=4 tensor=2": dict(data=4, tensor=2), "data=2 tensor=4": dict(data=2, tensor=4)}  # four parts do not divide two key/value heads


def mesh_of(name):
    sizes = MESHES[name]
    return partitioning.make_mesh(config_lib.Mesh(**sizes), jax.devices()[:int(np.prod(list(sizes.values())))])


def batch():
    return mesh_rows.rows(B, T, MASK, first=STEP * B)


def with_(config=CONFIG, **groups):
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **values) for group, values in groups.items()})


def gradients(model, config, mesh, variables, rows):
    variables = jax.device_put(variables, partitioning.shardings_of(mesh, model.axes, model.shapes)) if model.axes else variables
    run = jax.jit(lambda v, b: step_lib.gradients(model, config, MASK, v, b, jnp.int32(STEP)))
    return jax.device_get(run(variables, partitioning.put_batch(mesh, rows)))


# ---- noise, through the training step ---------------------------------------------------------------------------------


def noise_of(config=CONFIG, mesh="one", rows=None):
    """weight · mask of each position (B, T): the gradient of a toy loss that has one weight for each position of the batch."""
    rows = batch() if rows is None else rows
    size = rows["tokens"].shape
    rows = {**rows, "tokens": np.arange(np.prod(size), dtype=np.int32).reshape(size)}
    toy = transformer.build(CONFIG.model)._replace(
        apply=lambda v, tokens, *_: (tokens, None, None), axes=None,
        cross_entropy=lambda v, hidden, targets, needed: jnp.where(needed, v["params"]["w"][targets], 0.0))
    tree, _ = gradients(toy, config, mesh_of(mesh), {"params": {"w": jnp.ones(int(np.prod(size)))}}, rows)
    return tree["w"].reshape(size)


@pytest.mark.parametrize("settings", [
    {}, dict(corruption="exact_count", weighting="count"), dict(time_sampling="independent", noise_unit="segment"),
    dict(block_schedule="5", noise_unit="block", block_origin="segment"),
], ids=str)  # fmt: skip
def test_noise_is_the_same_to_the_bit(settings):
    """On 1 and 8 devices and under accumulation 1, 2 and 4."""
    config = with_(diffusion=settings)
    want = noise_of(config)
    assert ((want != 0) <= batch()["maskable"]).all() and 0.2 < (want != 0).sum() / batch()["maskable"].sum() < 0.9
    assert (noise_of(config, "data=8") == want).all()
    for parts in (2, 4):
        assert (noise_of(with_(config, train=dict(accumulate=parts))) == want).all()
    assert (noise_of(with_(config, train=dict(seed=9))) != want).any()


def test_kept_positions_keep_their_noise_in_padded_and_in_cut_rows():
    want = noise_of() != 0
    rows = {key: np.pad(x, [(0, 0), (0, 5)]) if x.ndim == 2 else x for key, x in batch().items()}
    assert ((noise_of(rows=rows) != 0) == np.pad(want, [(0, 0), (0, 5)])).all()
    config = with_(diffusion=dict(variable_length_rate=1.0))
    length = int(corrupt.cut_length((CONFIG.train.seed, STEP, step_lib.DRAW), T, 1.0, 8))
    assert 8 <= length < T and want[:, length:].any()
    assert ((noise_of(config) != 0) == want & (np.arange(T) < length)).all()


# ---- loss and gradients -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def variables():
    return jax.device_get(jax.jit(transformer.build(CONFIG.model).init)(jax.random.key(35)))


@pytest.fixture(scope="module")
def computed(variables):
    cache = {}

    def run(mesh="one", parts=1, balance=0.1):
        key = (mesh, parts, balance)
        if key not in cache:
            config = with_(train=dict(accumulate=parts), diffusion=dict(balance_coefficient=balance))
            cache[key] = gradients(transformer.build(config.model, config.kernels, mesh_of(mesh)), config, mesh_of(mesh), variables, batch())
        return cache[key]
    return run


def assert_equal_to_rounding(got, want):
    for key in ("loss", "total", "z", "nll_S", "predicted_S", "load_SLE"):
        np.testing.assert_allclose(got[1][key], want[1][key], rtol=1e-5, atol=1e-7, err_msg=key)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got[0]), jax.tree.leaves(want[0]), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), (jax.tree_util.keystr(path), np.linalg.norm(a - b) / np.linalg.norm(b))
        assert np.linalg.norm(b) > 0


def test_choices_of_experts_are_not_near_ties(variables):
    """What makes the comparisons below fair: rounding cannot change a choice."""
    rows, noisy = batch(), mesh_rows.noisy(CONFIG, batch(), STEP, MASK)
    model = transformer.build(CONFIG.model)
    [stack] = model.intermediates(variables, noisy, jnp.asarray(rows["position"]), step_lib.attention_spec(rows))
    probability = np.sort(np.asarray(jax.nn.softmax(stack["router_logits"])), axis=-1)
    margin = (probability[..., -2] - probability[..., -3])[:, rows["segment"] > 0]
    assert margin.min() > 1e-4, margin.min()


@pytest.mark.parametrize("mesh", ["data=2 tensor=4"])
def test_loss_and_gradients_are_equal_where_heads_do_not_divide(mesh, computed):
    assert_equal_to_rounding(computed(mesh), computed())
    np.testing.assert_allclose(computed(mesh)[1]["balance"], computed()[1]["balance"], rtol=1e-5)


@pytest.mark.parametrize("mesh, parts", [("one", 2), pytest.param("one", 4, marks=pytest.mark.slow), ("data=2", 4)])
def test_accumulation_adds_up_to_the_whole_batch(mesh, parts, computed, monkeypatch):
    monkeypatch.setitem(MESHES, "data=2", dict(data=2))
    assert_equal_to_rounding(computed(mesh, parts, balance=0.0), computed(balance=0.0))


@pytest.mark.parametrize("mesh", ["data=4 tensor=2", pytest.param("data=2 tensor=4", marks=pytest.mark.slow)])
def test_kernels_run_on_every_shard(mesh, computed, variables):
    """Pallas calls are not partitioned by XLA; here in their interpreter, forward and backward."""
    names = dict.fromkeys(config_lib.IMPLEMENTATIONS, "tpu")
    with dispatch.interpreted():
        model = transformer.build(CONFIG.model, config_lib.Kernels(**names), mesh_of(mesh))
        got = gradients(model, with_(diffusion=dict(balance_coefficient=0.1)), mesh_of(mesh), variables, batch())
    assert_equal_to_rounding(got, computed())


@pytest.mark.parametrize("rows, skewed", [pytest.param(8, True, marks=pytest.mark.slow), (1, True), (3, False)])
def test_split_experts_and_positions_of_few_rows_equal_one_device(rows, skewed, variables):
    """Rows that the devices do not divide are split by position; `skewed`: every token chooses the two experts of one device."""
    config = with_(model=dict(router_bias=True)).model
    bias = jnp.broadcast_to(jnp.array([9.0, 9.0, 0.0, 0.0]) * skewed, (config.num_layers, config.num_experts))
    variables, some = {**variables, "router_bias": {"bias": bias}}, jax.tree.map(lambda x: x[:rows], batch())
    target = np.roll(some["tokens"], 1, 1)

    def run(mesh):
        model = transformer.build(config, config_lib.Kernels(), mesh_of(mesh))

        def total(v):
            hidden, _, stats = model.apply(v, some["tokens"], some["position"], None, step_lib.attention_spec(some))
            nll = model.cross_entropy(v, hidden, target, some["segment"] > 0)
            return nll.sum() + (stats.selected_BE * stats.probability_BE).sum() + stats.z_B.sum(), (hidden, nll, stats)

        placed = jax.device_put(variables, partitioning.shardings_of(mesh_of(mesh), model.axes, model.shapes))
        return jax.jit(jax.value_and_grad(total, has_aux=True))(placed)

    want = run("one")
    load = np.asarray(want[0][1][2].load_BE).sum((0, 1))
    assert (load[2:] == 0).all() if skewed else (load > 0).all()
    for mesh in ("expert=2", "fsdp=2 expert=2"):
        got = run(mesh)
        of_rows, of_positions, *_ = *got[0][1][0].sharding.spec, None, None  # the hidden states
        assert (of_rows is None, of_positions is None) == (rows < 8, rows == 8)
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
            a, b = np.asarray(a), np.asarray(b)
            assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), jax.tree_util.keystr(path)


def test_what_is_gathered_travels_together():
    """Two arrays of one dtype in one collective, another dtype in a second."""
    mesh, arrays = mesh_of("expert=2"), (np.arange(8.0, dtype=np.float32).reshape(4, 2), np.ones((4, 3), np.float32), np.arange(4).reshape(4, 1))
    names = ("batch", None)
    run = partitioning.over_shards(lambda *parts: partitioning.all_gather("expert", *parts), mesh, (names,) * 3, (None, None))
    program = jax.jit(run).lower(*arrays).compile()
    assert program.as_text().count(" all-gather(") == 2
    for got, whole in zip(program(*arrays), arrays, strict=True):
        assert (np.asarray(got) == whole).all()


def test_a_kernel_by_name_that_does_not_run_here_is_refused():
    for mesh in (None, mesh_of("data=8")):
        with pytest.raises(ConfigError, match=r"kernels\.attention=tpu: .* does not run on cpu"):
            transformer.build(CONFIG.model, config_lib.Kernels(attention="tpu"), mesh)
        with pytest.raises(ConfigError, match=r"kernels\.expert_dispatch=ragged: XLA has no ragged all-to-all on CPUs"):
            transformer.build(CONFIG.model, config_lib.Kernels(expert_dispatch="ragged"), mesh)


def test_experts_that_the_mesh_does_not_divide_are_refused():
    three = partitioning.make_mesh(config_lib.Mesh(data=1, expert=3), jax.devices()[:3])
    with pytest.raises(ConfigError, match=r"num_experts=4 cannot be split over mesh\.expert=3 devices; mesh\.expert may be 1, 2, 4"):
        transformer.build(CONFIG.model, mesh=three)
    dense = dataclasses.replace(CONFIG.model, dense_layers=(0, 1), dense_size=32)
    assert transformer.build(dense, mesh=three), "the batch alone is split"


# ---- devices and sizes ------------------------------------------------------------------------------------------------


def test_batches_and_meshes_that_do_not_divide_are_refused():
    mesh = mesh_of("data=2 expert=4")
    partitioning.check_batch(16, 2, mesh)
    with pytest.raises(ConfigError, match=r"global batch 30 is not divisible by data·fsdp·expert = 8; use 32"):
        partitioning.check_batch(30, 1, mesh)
    with pytest.raises(ConfigError, match=r"data·fsdp·expert·accumulate = 16; use 32"):
        partitioning.check_batch(24, 2, mesh)
    with pytest.raises(ConfigError, match=r"data=3 · fsdp=1 · expert=1 · tensor=1 needs 3 devices, there are 8"):
        partitioning.make_mesh(config_lib.Mesh(data=3))
    assert dict(partitioning.make_mesh(config_lib.Mesh(data=2, fsdp=-1)).shape) == {"data": 2, "fsdp": 4, "expert": 1, "tensor": 1}


@pytest.mark.parametrize("mesh, devices, cpus, named, words", [
    (dict(expert=4), 2, True, None, "there are 2; choose sizes that divide 2, or, as CPU devices can be made: --config.mesh.data=1 makes 4"),
    (dict(expert=4), 2, True, ("JAX_NUM_CPU_DEVICES", "2"), "choose sizes that divide 2, or ask for 4 CPU devices in JAX_NUM_CPU_DEVICES"),
    (dict(expert=4), 2, True, ("XLA_FLAGS", "--xla_force_host_platform_device_count=2"), "ask for 4 CPU devices in XLA_FLAGS=--xla_force"),
    (dict(expert=4), 2, False, None, "there are 2; choose sizes that divide 2"),
    (dict(data=1, expert=4), 8, False, None, "there are 8; set mesh.expert to -1"),
    (dict(data=3, fsdp=2), 8, False, None, "there are 8; set mesh.data to -1"),
    (dict(data=3, fsdp=3), 8, False, None, "there are 8; choose sizes that divide 8"),
])  # fmt: skip
def test_a_mesh_that_does_not_fit_its_devices_says_what_would(mesh, devices, cpus, named, words, monkeypatch):
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    if named:
        monkeypatch.setenv(*named)
    with pytest.raises(ConfigError) as raised:
        partitioning.resolved(config_lib.Mesh(**mesh), devices, cpus)
    assert words in str(raised.value) and (cpus or str(raised.value).endswith(words))


def test_dimensions_are_split_where_they_divide():
    mesh = mesh_of("data=2 expert=4")
    spec = lambda *names, shape=None: tuple(partitioning.sharding(mesh, *names, shape=shape).spec)
    assert spec("batch", None) == (("data", "expert"), None) and spec("experts", "embed", "mlp") == ("expert", None, None)
    assert spec("experts", shape=(6,)) == (None,) and spec("experts", shape=(8,)) == ("expert",)
    assert spec("batch", "positions", shape=(8, 8)) == (("data", "expert"), None)
    assert spec("batch", "positions", shape=(4, 8)) == (None, ("data", "expert")) and spec("batch", "positions", shape=(4, 12)) == (None, None)


@pytest.mark.parametrize("environment, batch_size, devices", [
    ({}, None, 6), ({}, 8, 4), ({}, 7, 1), ({}, 12, 6),
    ({"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, 8, None), ({"JAX_NUM_CPU_DEVICES": "2"}, 8, None),
])  # fmt: skip
def test_one_cpu_device_a_core_unless_told_otherwise(environment, batch_size, devices, monkeypatch):
    asked = {}
    monkeypatch.setattr(partitioning.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(jax.config, "update", asked.__setitem__)
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    partitioning.setup_devices(batch_size)
    assert asked.get("jax_num_cpu_devices") == devices


def test_a_mesh_that_leaves_nothing_open_says_how_many_cpu_devices(monkeypatch):
    asked = {}
    monkeypatch.setattr(jax.config, "update", asked.__setitem__)
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    partitioning.setup_devices(12, mesh=config_lib.Mesh(data=2, expert=3))
    assert asked["jax_num_cpu_devices"] == 6
