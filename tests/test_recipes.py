"""The recipes under configs/: stages that hand weights over to each other, and tiny twins that end in a published layout."""

import dataclasses

import numpy as np
import pytest

from configs import common, llada2, llada_moe, sft
from llada_jax import config as config_lib
from llada_jax.interop import hf_config, shards
from llada_jax.training import optimizer
from tests import tiny_run

STAGES = tuple(llada_moe.STAGES)


def of(file, arg: str) -> config_lib.Config:
    config = config_lib.from_config_dict(file.get_config(arg))
    return config_lib.with_vocab_size(config, config.model.vocab_size or 1024)


@pytest.mark.parametrize("variant", llada_moe.VARIANTS)
def test_stages_of_llada_moe_hand_over(variant):
    first, second, third, fourth = configs = [of(llada_moe, f"variant={variant},stage={stage}") for stage in STAGES]
    assert len({config.data.sources for config in configs[:3]}) == 3, "other shares of the data"
    assert second.model == third.model == first.model and fourth.model == dataclasses.replace(first.model, rope_theta=50_000.0)
    assert first.model.rope_theta == 10_000.0
    T = first.data.sequence_length
    assert [config.data.sequence_length for config in configs] == [T, T, T, 2 * T]
    rates = [optimizer.learning_rate(config.optimizer, config.train.steps) for config in configs]
    ends = [float(rate(config.train.steps - 1)) for rate, config in zip(rates, configs, strict=True)]
    peaks = [config.optimizer.learning_rate for config in configs]
    np.testing.assert_allclose(np.divide(ends, peaks[0]), [1, 1, 0.1, 0.01], rtol=1e-5)
    np.testing.assert_allclose(peaks[1:], ends[:-1], rtol=1e-5)
    tokens = [config.train.steps * config.train.batch_size * config.data.sequence_length for config in configs]
    shares = [1, 1, 0.5, 0.5] if variant == "tiny" else [1, 1, 0.05, 0.05]
    np.testing.assert_allclose(np.divide(tokens, tokens[0]), shares, rtol=1e-4)


@pytest.mark.parametrize("mesh", ["", *common.MESHES])
def test_the_large_stages_have_the_published_tokens(mesh):
    configs = [of(llada_moe, f"variant=7b_a1b,mesh={mesh},stage={stage}") for stage in STAGES]
    tokens = [config.train.steps * config.train.batch_size * config.data.sequence_length for config in configs]
    np.testing.assert_allclose(tokens, [10e12, 10e12, 500e9, 500e9], rtol=1e-4)
    assert [config.data.sequence_length for config in configs] == [4096] * 3 + [8192]
    for config in configs:
        assert config.diffusion.variable_length_rate == 0.01 and config.diffusion.variable_length_min == 8
    for stage, name in ((configs[0], "pretrain"), (configs[3], "anneal")):
        shape = of(llada_moe, f"variant=7b_a1b,mesh={mesh},stage={name}")
        assert (shape.model, shape.mesh, shape.train.batch_size, shape.data.sequence_length) == (
            stage.model, stage.mesh, stage.train.batch_size, stage.data.sequence_length)


def test_fine_tuning_takes_the_models_of_the_recipes():
    assert of(sft, "variant=llada_moe").model == of(llada_moe, "variant=7b_a1b,stage=4").model
    assert of(sft, "variant=llada2").model == of(llada2, "variant=mini,blocks=wsd").model
    assert of(sft, "variant=llada2").diffusion.block_schedule == "32" == of(llada2, "variant=mini,blocks=wsd").diffusion.block_schedule.split(",")[-1]


@pytest.mark.parametrize(("family", "file", "arg"), [
    ("llada_moe", llada_moe, "variant=tiny,stage=4"), ("llada2_moe", llada2, "variant=tiny,blocks=wsd"),
    ("llada_moe", sft, "variant=tiny,recipe=llada"),
])  # fmt: skip
def test_tiny_twins_have_a_published_layout(family, file, arg):
    assert hf_config.family_of(of(file, arg).model) == family


def test_the_conversion_begins_from_the_same_model():
    start, blocks = of(llada2, "variant=tiny,objective=autoregressive"), of(llada2, "variant=tiny,blocks=wsd")
    assert start.model == blocks.model and start.diffusion.objective == "autoregressive" and blocks.diffusion.objective == "masked"
    assert blocks.model.router_score == "sigmoid" and blocks.model.shared_expert_size and blocks.optimizer.router_bias_rate == 1e-3
    sizes = config_lib.block_stages(blocks.diffusion.block_schedule)
    assert [size for size, _ in sizes] == [1, 4, 8, 16, 0, 64, 32, 16, 8] and sum(steps for _, steps in sizes) < blocks.train.steps
    assert all(start.data.sequence_length % size == 0 for size, _ in sizes if size)


@pytest.mark.slow
def test_the_commands_of_the_tiny_twins(tmp_path):
    """Two steps of each stage; the end of each is exported, and is what its family's table says."""
    texts = tiny_run.write_texts(tmp_path / "texts")
    short = ["--config.train.steps=2", "--config.train.steps_per_call=2", "--config.train.checkpoint_every=2", "--config.train.eval_every=0",
             "--config.train.batch_size=8", "--config.data.vocab_size=300", f"--config.data.sources={texts}"]
    moe, blocks = "configs/llada_moe.py:variant=tiny,stage", "configs/llada2.py:variant=tiny"
    path = lambda name: str(tmp_path / name)
    chain = [[f"--config={moe}=1", f"--workdir={path('moe1')}"]]
    chain += [[f"--config={moe}={i}", f"--init_from={path(f'moe{i - 1}')}", f"--workdir={path(f'moe{i}')}"] for i in (2, 3, 4)]
    chain += [[f"--config={blocks},objective=autoregressive", f"--workdir={path('ling')}"],
              [f"--config={blocks},blocks=wsd", f"--init_from={path('ling')}", f"--workdir={path('llada2')}",
               "--config.diffusion.block_schedule=1:1,8"]]
    for done in tiny_run.train_each([[*command, *short] for command in chain]):
        assert done.returncode == 0, (done.args, done.stderr)
        if any(word.startswith("--init_from") for word in done.args):
            assert "missing (kept at their initial values): none; extra (ignored): none; its tokenizer" in done.stdout, done.stdout
            assert ("model.rope_theta: 10000.0 → 50000.0" in done.stdout) == ("stage=4" in done.args[0])
    commands = [["export", f"--checkpoint={path(name)}", f"--out={path(f'{name}_out')}"] for name in ("moe4", "llada2")]
    commands += [["check", f"--hf_dir={path(f'{name}_out')}", "--finite"] for name in ("moe4", "llada2")]
    for done, family in zip(tiny_run.each("convert", commands), ["llada_moe", "llada2_moe"] * 2, strict=True):
        assert done.returncode == 0 and family in done.stdout, done.stderr
    with shards.Reader(path("llada2_out")) as reader:
        assert {"model.layers.1.mlp.gate.expert_bias", "model.layers.1.mlp.shared_experts.up_proj.weight"} <= reader.tensors.keys()
