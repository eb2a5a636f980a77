"""Settings: each key documented and accepted once, bad ones refused with the numbers and the way out."""

import ast
import dataclasses
import inspect
import json

import pytest

from configs import common
from llada_jax import config as config_lib
from llada_jax import settings as settings_lib
from llada_jax.config import Config, ConfigError, from_config_dict

KEYS = config_lib.flatten(Config())
LINES = inspect.getsource(settings_lib).splitlines()
PREFERENCE = {"diffusion__objective": "preference", "diffusion__variable_length_rate": 0.0, "data__pack": False}


def changed(**settings):
    """The default settings with `group__key=value` changed, checked."""
    config = common.default_config()
    for name, value in settings.items():
        group, key = name.split("__")
        config[group][key] = value
    return from_config_dict(config)


def test_keys_stay_few_and_each_has_its_meaning():
    assert len(KEYS) < 115  # a hundred for pre-training, and what conversion and fine-tuning add
    classes = [node for node in ast.parse("\n".join(LINES)).body if isinstance(node, ast.ClassDef)]
    documented = {f"{cls.name.lower()}.{field.target.id}" for cls in classes for field in cls.body
                  if isinstance(field, ast.AnnAssign) and "#" in LINES[field.lineno - 1]}
    assert set(KEYS) <= documented


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_accepted_alone(key):
    group, name = key.split(".")
    assert from_config_dict({group: {name: KEYS[key]}}) == Config()


def test_round_trips():
    config = changed(model__dense_layers=(1, 2), model__dense_size=64, train__steps=7, optimizer__learning_rate=1, diffusion__schedule="cosine")
    assert config.model.dense_layers == (1, 2) and isinstance(config.optimizer.learning_rate, float)
    assert from_config_dict(config_lib.to_config_dict(config)) == config
    assert from_config_dict(json.loads(config_lib.to_json(config))) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 8


@pytest.mark.parametrize("key", config_lib.CHOICES)
def test_named_choices_are_all_accepted_and_others_name_them(key):
    setting = key.replace(".", "__")
    companions = {"count": {"diffusion__corruption": "exact_count"}, "exact_count": {"diffusion__weighting": "count"},
                  "block": {"diffusion__block_schedule": "4"}, "expert": {"diffusion__balance_coefficient": 0.0},
                  "preference": PREFERENCE}
    for value in config_lib.CHOICES[key]:
        assert config_lib.flatten(changed(**{**companions.get(value, {}), setting: value}))[key] == value
    with pytest.raises(ConfigError) as error:
        changed(**{setting: "nonsense"})
    assert key in str(error.value) and "'nonsense'" in str(error.value) and all(value in str(error.value) for value in config_lib.CHOICES[key])


@pytest.mark.parametrize("tree, words", [
    ({"optimizer": {"learning_rat": 1e-3}}, ["optimizer.learning_rat'", "did you mean 'optimizer.learning_rate'?"]),
    ({"optimiser": {"b1": 0.8}}, ["'optimiser'", "did you mean 'optimizer'?"]),
    ({"train": {"xyzzy": 1}}, ["unknown config key 'train.xyzzy'", "known: steps, batch_size"]),
    ({"train": {"steps": "many"}}, ["train.steps='many'", "str", "expected int such as 1000"]),
    ({"train": {"tensorboard": 1}}, ["train.tensorboard=1", "expected bool"]),
])  # fmt: skip
def test_unknown_keys_and_wrong_types_name_the_nearest(tree, words):
    with pytest.raises(ConfigError) as error:
        from_config_dict(tree)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("settings, words", [
    (dict(train__steps=0), ["train.steps=0", "at least 1"]),
    (dict(train__batch_size=30, train__accumulate=4), ["30", "accumulate=4", "use 32"]),
    (dict(data__sequence_length=9000), ["9000", "8192"]),
    (dict(data__holdout=1.0), ["data.holdout=1.0"]),
    (dict(diffusion__min_noise=1.5), ["1.5", "from 0 to 1"]),
    (dict(diffusion__schedule_power=0.0), ["0.0", "positive"]),
    (dict(diffusion__weighting="count"), ["exact_count"]),
    (dict(diffusion__corruption="exact_count"), ["weighting=count"]),
    (dict(diffusion__corruption="exact_count", diffusion__weighting="count", diffusion__schedule="cosine"), ["linear", "cosine"]),
    (dict(diffusion__block_schedule="32:500"), ["'32:500'", "1:100,4:100,0:2000,32"]),
    (dict(diffusion__block_schedule="4,32"), ["'4,32'"]),
    (dict(diffusion__block_schedule="4:0,32"), ["'4:0,32'"]),
    (dict(diffusion__block_schedule="-1"), ["'-1'"]),
    (dict(diffusion__block_schedule="4", diffusion__objective="autoregressive"), ["'4'", "objective=masked"]),
    (dict(diffusion__noise_unit="block"), ["block_schedule", "segment"]),
    (dict(diffusion__noise_unit="block", diffusion__block_schedule="0"), ["block_schedule"]),
    (dict(diffusion__anneal_steps=5, diffusion__block_schedule="0:10,4"), ["anneal_steps=5", "block_schedule"]),
    (dict(diffusion__anneal_steps=5, diffusion__objective="autoregressive"), ["anneal_steps=5", "objective=masked"]),
    (dict(diffusion__anneal_steps=-1), ["anneal_steps=-1"]),
    (dict(diffusion__cart_p=1.0), ["cart_p=1.0"]),
    (dict(diffusion__mask_noise_std=-0.5), ["mask_noise_std=-0.5"]),
    (dict(diffusion__mask_noise_steps=0), ["mask_noise_steps=0"]),
    (dict(diffusion__weighting="cart_elbo", diffusion__corruption="exact_count"), ["exact_count"]),
    (dict(model__router_choice="expert", diffusion__balance_coefficient=0.0, diffusion__block_schedule="4"), ["router_choice", "block_schedule"]),
    (dict(diffusion__objective="preference"), ["whole answers, one a row", "set data.pack=False, diffusion.variable_length_rate=0.0"]),
    (PREFERENCE | dict(diffusion__complementary=True, diffusion__confidence_coefficient=1.0), ["complementary=False, diffusion.confidence_coeff"]),
    (PREFERENCE | dict(diffusion__mask_noise_std=1.0), ["set diffusion.mask_noise_std=0.0"]),
    (PREFERENCE | dict(diffusion__block_schedule="4"), ["'4'", "objective=masked"]),
    (PREFERENCE | dict(diffusion__anneal_steps=5), ["anneal_steps=5", "objective=masked"]),
    (PREFERENCE | dict(diffusion__preference_beta=0.0), ["preference_beta=0.0", "positive"]),
    (PREFERENCE | dict(diffusion__preference_draws=0), ["preference_draws=0", "at least 1"]),
    (PREFERENCE | dict(train__batch_size=12, train__accumulate=4), ["batch_size=12 counts rows, two a pair", "= 8; use 16"]),
    (dict(mesh__fsdp=-1), ["only one mesh axis may be -1"]),
    (dict(mesh__data=0), ["positive or -1"]),
    (dict(model__hidden_size=30), ["30", "num_heads=4", "head_dim"]),
    (dict(model__num_kv_heads=3), ["num_heads=4", "num_kv_heads=3"]),
    (dict(model__experts_per_token=17), ["17", "num_experts=16"]),
    (dict(model__dense_layers=(0,)), ["dense_size"]),
    (dict(model__dense_layers=(4,), model__dense_size=8), ["[4]", "0..3"]),
    (dict(model__rotary_fraction=0.3), ["19 of 64", "even"]),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused_with_their_numbers(settings, words):
    with pytest.raises(ConfigError) as error:
        changed(**settings)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_vocabulary_size_comes_from_the_tokenizer():
    assert config_lib.with_vocab_size(Config(), 300).model.vocab_size == 300
    assert config_lib.with_vocab_size(changed(model__vocab_size=512), 300).model.vocab_size == 512
    with pytest.raises(ConfigError, match=r"model\.vocab_size=256 is smaller than the tokenizer's 300"):
        config_lib.with_vocab_size(changed(model__vocab_size=256), 300)


def test_preset_arguments():
    parse = lambda arg: common.parse_arg(arg, tiny=False, layers=4, name="x").to_dict()
    assert parse(None) == {"tiny": False, "layers": 4, "name": "x"}
    assert parse("tiny,layers=2") == {"tiny": True, "layers": 2, "name": "x"} and parse("tiny=False")["tiny"] is False
    refused = {"size=3": "knows: tiny, layers, name", "layers": "layers=4", "layers=two": "'two' is not a int", "tiny=maybe": "switch"}
    for arg, words in refused.items():
        with pytest.raises(ConfigError, match=words):
            parse(arg)
    with pytest.raises(ConfigError, match="variant='7b' is not one of a, b"):
        common.one_of("variant", "7b", ["a", "b"])


@pytest.mark.parametrize("group, key, value", [
    ("model", "num_heads", 0), ("model", "num_layers", 0), ("train", "seed", 10**22), ("train", "eval_batches", -1), ("data", "limit", -1),
    ("optimizer", "trainable", "("),
])
def test_nonsense_is_named(group, key, value):
    with pytest.raises(config_lib.ConfigError, match=f"{group}.{key}"):
        config_lib.from_config_dict({group: {key: value}})
