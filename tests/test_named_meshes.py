"""The configs' named meshes: where each weight lives, what a compiled step sends, and what it does not."""

import json
import math

import pytest

from configs import common
from llada_jax import config as config_lib
from llada_jax import partitioning
from llada_jax.evaluation import footprint, hardware
from llada_jax.model import expert_parallel
from tests import named_meshes


@pytest.mark.parametrize("name", named_meshes.TRAINED)
def test_weights_live_where_they_did(name):
    config = named_meshes.config_of(name)
    kept = json.loads((named_meshes.FOLDER / f"{name}.json").read_text())
    assert named_meshes.shardings(config.model, config.mesh) == kept["shardings"]
    assert kept["mesh"] == {axis: getattr(config.mesh, axis) for axis in partitioning.AXES}


@pytest.mark.parametrize("name", common.MESHES)
def test_every_named_mesh_divides_the_model_and_the_batch(name):
    """And LLaDA-MoE-7B's training step fits its devices by the estimate."""
    from configs import llada_moe
    for stage in ("pretrain", "anneal"):
        config = config_lib.from_config_dict(llada_moe.get_config(f"variant=7b_a1b,mesh={name},stage={stage}"))
        mesh, train = config.mesh, config.train
        assert train.batch_size % (mesh.data * mesh.fsdp * mesh.expert * train.accumulate) == 0
        assert train.batch_size * config.data.sequence_length == 2**20 * mesh.data or stage == "anneal"
        assert config.model.num_experts % mesh.expert == 0 == config.model.hidden_size % mesh.fsdp
        chip = hardware.CHIPS[name.removeprefix("2x").removeprefix("8x").split("-")[0]]
        assert footprint.of_training(config).total < 0.8 * chip.hbm * hardware.GIB


@pytest.mark.slow
@pytest.mark.libtpu
@pytest.mark.parametrize("name", named_meshes.TRAINED)
def test_a_compiled_step_sends_what_it_did(name):
    """Recorded kernels and collectives; tokens go to their experts in four transfers a layer, and no gradient of the vocabulary or of the
    experts is all-reduced whole."""
    found = named_meshes.report(name)
    config = named_meshes.config_of(name)
    model, mesh = config.model, config.mesh
    layers, tokens = len(model.moe_layers), footprint.tokens_at_once(config)
    exchanged = [row for row in found["collectives"] if row["kind"] == "all-to-all" and row["axes"] == ["expert"]]
    assert all(row["usual"] for row in exchanged) and sum(row["count"] for row in exchanged) == layers * (4 + 2)  # 2 of them small
    devices = mesh.expert
    even = devices * expert_parallel.touched(model.num_experts, model.experts_per_token, model.num_experts // devices) * 2 * model.hidden_size
    assert sum(row["bytes"] for row in exchanged) <= 1.15 * even * tokens * layers * 4
    whole = 2 * min(model.vocab_size * model.hidden_size, model.num_experts * model.hidden_size * model.expert_size)
    reduced = [row for row in found["collectives"] if row["kind"] == "all-reduce" and row["usual"]]
    assert all(row["largest_bytes"] <= 4 * model.vocab_size * model.hidden_size / mesh.fsdp for row in reduced)
    assert all(row["largest_bytes"] < whole for row in reduced)
    assert math.isfinite(found["bound"]["serial"]["seconds"]) and found["fits"]
    assert named_meshes.golden(name, found) == json.loads((named_meshes.FOLDER / f"{name}.json").read_text())
