"""Experiment configuration, built and checked: a file under `configs/` edits the defaults of settings.py, `--config.group.key=value` edits the file,
and `from_config_dict` checks the result and freezes it.
"""

import dataclasses
import difflib
import json
import re
from typing import Any

import ml_collections

from llada_jax.settings import Config, ConfigError, Data, Diffusion, Kernels, Mesh, Model, Optimizer, StoppedError, Train
from pallas_kernels.attention import api as attention
from pallas_kernels.grouped_matmul import api as grouped_matmul
from pallas_kernels.linear_confidence import api as linear_confidence
from pallas_kernels.linear_cross_entropy import api as linear_cross_entropy
from pallas_kernels.routing import api as routing

__all__ = [  # the settings are named through this module
    "CHOICES", "IMPLEMENTATIONS", "Config", "ConfigError", "Data", "Diffusion", "Kernels", "Mesh", "Model", "Optimizer", "StoppedError", "Train",
    "block_stages", "flatten", "from_config_dict", "nearest", "to_config_dict", "to_json", "validate", "with_vocab_size",
]

IMPLEMENTATIONS = {  # of each operation that `Kernels` names
    "attention": attention.IMPLEMENTATIONS,
    "routing": routing.ROUTES,
    "grouped_matmul": grouped_matmul.SWIGLUS,
    "linear_cross_entropy": linear_cross_entropy.IMPLEMENTATIONS,
    "linear_confidence": linear_confidence.IMPLEMENTATIONS,
}
PREFERENCE_NEEDS = {  # of diffusion.objective=preference: whole answers, one a row, under noise of its own
    "data.pack": False, "diffusion.variable_length_rate": 0.0, "diffusion.complementary": False, "diffusion.mask_noise_std": 0.0,
    "diffusion.confidence_coefficient": 0.0,
}
CHOICES = {
    "model.router_choice": ("token", "expert"),
    "model.router_score": ("softmax", "sigmoid"),
    "model.compute_dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "full"),
    "diffusion.objective": ("masked", "autoregressive", "preference"),
    "diffusion.schedule": ("linear", "cosine", "polynomial"),
    "diffusion.time_sampling": ("stratified", "independent"),
    "diffusion.noise_unit": ("sequence", "segment", "block"),
    "diffusion.block_origin": ("row", "segment"),
    "diffusion.corruption": ("bernoulli", "exact_count"),
    "diffusion.weighting": ("elbo", "count", "uniform", "cart", "cart_elbo"),
    "diffusion.normalization": ("token", "masked", "sequence", "batch"),
    "diffusion.balance_form": ("all_layers", "per_layer"),
    "data.turns": ("sampled", "last", "all"),
    "optimizer.name": ("adamw", "muon"),
    "optimizer.schedule": ("wsd", "cosine", "constant"),
    "kernels.expert_dispatch": ("auto", "gathered", "capacity", "ragged"),
} | {f"kernels.{operation}": ("auto", *table) for operation, table in IMPLEMENTATIONS.items()}


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """The same settings as an editable ConfigDict (what a file under `configs/` returns)."""
    return ml_collections.ConfigDict(dataclasses.asdict(config))


def from_config_dict(config: Any) -> Config:
    """Build and validate a `Config` from a ConfigDict or a plain nested dict.

    Raises ConfigError for an unknown key (naming the nearest), a wrong type, or settings that cannot work together.
    """
    tree = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    groups = {field.name: field.default for field in dataclasses.fields(Config)}
    built = {}
    for name, values in tree.items():
        if name not in groups:
            raise ConfigError(f"unknown config group '{name}'{nearest(name, groups)}")
        built[name] = _build_group(name, type(groups[name]), values)
    result = Config(**built)
    validate(result)
    return result


def block_stages(schedule: str) -> list[tuple[int, int]]:
    """(tokens of a block, steps) of each stage of a `diffusion.block_schedule`: "4:100,32" is [(4, 100), (32, 0)], as the last one goes on.

    Raises ConfigError for anything else.
    """
    if not re.fullmatch(r"(\d{1,9}:[1-9]\d{0,8},)*\d{1,9}", schedule or "0"):
        raise ConfigError(f"diffusion.block_schedule={schedule!r} is not SIZE:STEPS,…,SIZE, for example 1:100,4:100,0:2000,32 (the last size, "
                          "without a number of steps, lasts to the end)")
    return [(int(size), int(steps or 0)) for size, _, steps in (stage.partition(":") for stage in (schedule or "0").split(","))]


def with_vocab_size(config: Config, size: int) -> Config:
    """The config with `model.vocab_size` filled in where it is 0; raises ConfigError where it is too small for the tokenizer."""
    if 0 < config.model.vocab_size < size:
        raise ConfigError(f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's {size}; set it to 0 or {size}")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=config.model.vocab_size or size))


def flatten(config: Config) -> dict[str, Any]:
    """{'group.key': value} in order of definition; tuples become lists, so that it equals its own JSON."""
    flat = {f"{group}.{key}": value for group, values in dataclasses.asdict(config).items() for key, value in values.items()}
    return json.loads(json.dumps(flat))


def to_json(config: Config) -> str:
    """The text of a run folder's `config.json`."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def validate(config: Config) -> None:
    """Raise ConfigError for the first setting that cannot work; the message holds the numbers and the way out."""
    flat = flatten(config)
    for key, allowed in CHOICES.items():
        if flat[key] not in allowed:
            raise ConfigError(f"{key}={flat[key]!r} is not one of {', '.join(allowed)}")
    for key in ("model.hidden_size", "model.num_layers", "model.num_heads", "train.steps", "train.batch_size", "train.steps_per_call",
                "train.accumulate", "train.log_every", "train.checkpoint_every",
                "diffusion.preference_draws", "diffusion.mask_noise_steps", "train.keep_last", "train.max_skipped", "train.eval_draws",
                "data.sequence_length", "data.prefetch"):
        if flat[key] < 1:
            raise ConfigError(f"{key}={flat[key]} must be at least 1")
    for key in ("train.keep_every", "train.eval_every", "train.eval_batches", "data.limit", "data.num_workers", "diffusion.anneal_steps",
                "optimizer.warmup_steps", "model.lora_rank"):
        if flat[key] < 0:
            raise ConfigError(f"{key}={flat[key]} must be at least 0")
    if not 0 <= flat["train.seed"] < 2**31:
        raise ConfigError(f"train.seed={flat['train.seed']} must be from 0 to {2**31 - 1}")
    for key in ("optimizer.trainable", "model.lora_targets"):
        try:
            re.compile(flat[key])
        except re.error as error:
            raise ConfigError(f"{key}={flat[key]!r} is not a regular expression ({error})") from None
    _validate_model(config.model)
    train, data, diffusion = config.train, config.data, config.diffusion
    if train.batch_size % train.accumulate:
        raise ConfigError(
            f"train.batch_size={train.batch_size} is not divisible by train.accumulate={train.accumulate}; "
            f"use {-(-train.batch_size // train.accumulate) * train.accumulate}")
    if diffusion.objective == "autoregressive" and config.model.shift_predictions:
        raise ConfigError("diffusion.objective=autoregressive predicts the next token already; set model.shift_predictions=False")
    blocks = block_stages(diffusion.block_schedule)
    if diffusion.block_schedule and diffusion.objective != "masked":
        raise ConfigError(f"diffusion.block_schedule={diffusion.block_schedule!r} is of diffusion.objective=masked, not {diffusion.objective}")
    if diffusion.noise_unit == "block" and not any(size for size, _ in blocks):
        raise ConfigError("diffusion.noise_unit=block needs blocks; set diffusion.block_schedule, or use noise_unit=segment")
    if diffusion.anneal_steps and (diffusion.objective != "masked" or any(size for size, _ in blocks)):
        raise ConfigError(f"diffusion.anneal_steps={diffusion.anneal_steps} opens the attention of masked diffusion without blocks; set it to 0, or "
                          "diffusion.objective=masked and diffusion.block_schedule=''")
    if diffusion.objective == "preference":
        _validate_preference(flat)
    if not 0 < diffusion.cart_p < 1:
        raise ConfigError(f"diffusion.cart_p={diffusion.cart_p} is a share: use a number above 0 and below 1")
    if diffusion.mask_noise_std < 0:
        raise ConfigError(f"diffusion.mask_noise_std={diffusion.mask_noise_std} must be at least 0")
    if config.model.router_choice == "expert" and (diffusion.objective != "masked" or diffusion.balance_coefficient):
        raise ConfigError("model.router_choice=expert shows a token how later ones score, and has an even load anyhow; set "
                          "diffusion.objective=masked and diffusion.balance_coefficient=0")
    if config.model.router_choice == "expert" and any(size for size, _ in blocks):
        raise ConfigError("model.router_choice=expert chooses among all tokens of a row, so a block would see later ones; set "
                          "diffusion.block_schedule='' or model.router_choice=token")
    if config.optimizer.router_bias_rate < 0:
        raise ConfigError(f"optimizer.router_bias_rate={config.optimizer.router_bias_rate} must be at least 0")
    if config.optimizer.router_bias_rate and (not config.model.moe_layers or not config.model.router_bias or config.model.router_bias_in_weight):
        raise ConfigError(f"optimizer.router_bias_rate={config.optimizer.router_bias_rate} moves an expert bias that only selects; "
                          "it needs experts, model.router_bias=True and model.router_bias_in_weight=False")
    if data.sequence_length > config.model.max_length:
        raise ConfigError(f"data.sequence_length={data.sequence_length} is longer than model.max_length={config.model.max_length}")
    if not re.fullmatch(r"row|batch|none|(block|align):[1-9]\d*", data.answer_padding):
        raise ConfigError(f"data.answer_padding={data.answer_padding!r} is not one of row, batch, block:N, align:N, none, with N tokens a block")
    if data.sequence_length % data.answer_rule[1]:
        raise ConfigError(f"data.sequence_length={data.sequence_length} is not a whole number of blocks of {data.answer_rule[1]} tokens "
                          f"(data.answer_padding={data.answer_padding}); use {-(-data.sequence_length // data.answer_rule[1]) * data.answer_rule[1]}")
    if not 0 <= data.holdout < 1:
        raise ConfigError(f"data.holdout={data.holdout} is a share of the documents: use a number from 0 to below 1")
    if not 0 <= diffusion.min_noise < diffusion.max_noise <= 1:
        raise ConfigError(f"diffusion.min_noise={diffusion.min_noise} and diffusion.max_noise={diffusion.max_noise} are mask probabilities: "
                          "use numbers from 0 to 1, the first below the second")
    if diffusion.confidence_coefficient < 0:
        raise ConfigError(f"diffusion.confidence_coefficient={diffusion.confidence_coefficient} must be at least 0")
    if diffusion.confidence_coefficient and diffusion.objective == "autoregressive":
        raise ConfigError("diffusion.confidence_coefficient is of masked tokens, which diffusion.objective=autoregressive has none of; set it to 0")
    if diffusion.confidence_coefficient and config.kernels.linear_cross_entropy not in ("auto", *linear_cross_entropy.WITH_ENTROPY):
        raise ConfigError(f"kernels.linear_cross_entropy={config.kernels.linear_cross_entropy} gives no entropy, which "
                          f"diffusion.confidence_coefficient needs: use auto or {' or '.join(linear_cross_entropy.WITH_ENTROPY)}")
    if diffusion.complementary:
        _validate_pairs(diffusion, train.batch_size)
    if diffusion.schedule_power <= 0:
        raise ConfigError(f"diffusion.schedule_power={diffusion.schedule_power} must be positive")
    if diffusion.weighting == "count" and diffusion.corruption != "exact_count":
        raise ConfigError("diffusion.weighting=count is the weight L/k of diffusion.corruption=exact_count; set both or neither")
    if diffusion.corruption == "exact_count" and diffusion.schedule != "linear":
        raise ConfigError(f"diffusion.corruption=exact_count draws k uniformly, which needs diffusion.schedule=linear, not {diffusion.schedule}")
    if diffusion.corruption == "exact_count" and diffusion.weighting in ("elbo", "cart_elbo"):
        raise ConfigError("diffusion.corruption=exact_count has the exact weight L/k: use diffusion.weighting=count (or uniform)")
    sizes = dataclasses.asdict(config.mesh)
    if sum(size == -1 for size in sizes.values()) > 1:
        raise ConfigError(f"only one mesh axis may be -1, got {sizes}")
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"mesh axes are positive or -1, got {sizes}")


def _validate_preference(flat: dict[str, Any]) -> None:
    wrong = [f"{key}={value}" for key, value in PREFERENCE_NEEDS.items() if flat[key] != value]
    if wrong:
        raise ConfigError(f"diffusion.objective=preference compares whole answers, one a row, under noise of its own: set {', '.join(wrong)}")
    if flat["diffusion.preference_beta"] <= 0:
        raise ConfigError(f"diffusion.preference_beta={flat['diffusion.preference_beta']} must be positive")
    unit = 2 * flat["train.accumulate"]
    if flat["train.batch_size"] % unit:
        raise ConfigError(f"train.batch_size={flat['train.batch_size']} counts rows, two a pair under diffusion.objective=preference, and is not "
                          f"divisible by 2·train.accumulate = {unit}; use {-(-flat['train.batch_size'] // unit) * unit}")


def _validate_pairs(diffusion: Diffusion, batch_size: int) -> None:
    if diffusion.objective == "autoregressive":
        raise ConfigError("diffusion.complementary inverts masks, which diffusion.objective=autoregressive has none of; set one of them back")
    if batch_size % 2:
        raise ConfigError(f"train.batch_size={batch_size} is odd, but diffusion.complementary puts each sample into two rows; use {batch_size + 1}")
    if diffusion.weighting != "uniform" and (diffusion.max_noise == 1 or diffusion.schedule != "linear"):
        raise ConfigError(f"diffusion.complementary masks with probability 1 - p, whose weight under diffusion.weighting={diffusion.weighting} has "
                          "no limit at p = 1 and holds on the linear schedule alone: set diffusion.max_noise below 1 and diffusion.schedule=linear, "
                          "or diffusion.weighting=uniform")


def _validate_model(model: Model) -> None:
    if model.hidden_size % model.num_heads and not model.head_dim:
        raise ConfigError(f"model.hidden_size={model.hidden_size} is not divisible by model.num_heads={model.num_heads}; set model.head_dim")
    if model.num_heads % model.kv_heads:
        raise ConfigError(f"model.num_heads={model.num_heads} is not divisible by model.num_kv_heads={model.kv_heads}")
    if model.moe_layers and not 1 <= model.experts_per_token <= model.num_experts:
        raise ConfigError(f"model.experts_per_token={model.experts_per_token} must be between 1 and model.num_experts={model.num_experts}")
    if model.moe_layers and (model.router_groups < 1 or model.num_experts % model.router_groups):
        raise ConfigError(f"model.num_experts={model.num_experts} is not divisible by model.router_groups={model.router_groups}")
    if not 1 <= model.router_groups_kept <= model.router_groups:
        raise ConfigError(f"model.router_groups_kept={model.router_groups_kept} must be between 1 and model.router_groups={model.router_groups}")
    selectable = model.num_experts // model.router_groups * model.router_groups_kept
    if model.moe_layers and selectable < model.experts_per_token:
        raise ConfigError(f"model.experts_per_token={model.experts_per_token}, but {model.router_groups_kept} of {model.router_groups} groups "
                          f"hold only {selectable} experts")
    if model.router_choice == "expert" and (model.router_bias or model.router_renormalize or model.router_groups > 1):
        raise ConfigError("model.router_choice=expert weighs by the plain score; set model.router_bias=False, model.router_renormalize=False and "
                          "model.router_groups=1")
    if model.dense_layers and model.dense_size < 1:
        raise ConfigError(f"model.dense_layers={model.dense_layers} need model.dense_size, their hidden width")
    outside = [i for i in model.dense_layers if not 0 <= i < model.num_layers]
    if outside:
        raise ConfigError(f"model.dense_layers holds {outside}, outside 0..{model.num_layers - 1}")
    if model.rope_theta <= 0:
        raise ConfigError(f"model.rope_theta={model.rope_theta} must be positive")
    if int(model.head_size * model.rotary_fraction) % 2:
        raise ConfigError(f"rotary covers {int(model.head_size * model.rotary_fraction)} of {model.head_size} head dimensions; it must be even")


def _build_group(name: str, cls: type, values: Any) -> Any:
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    built = {}
    for key, value in dict(values).items():
        if key not in fields:
            raise ConfigError(f"unknown config key '{name}.{key}'{nearest(key, fields, name + '.')}")
        built[key] = _typed(f"{name}.{key}", value, fields[key])
    return cls(**built)


def _typed(path: str, value: Any, default: Any) -> Any:
    if isinstance(default, tuple) and isinstance(value, (list, tuple)):
        if not all(type(v) is int for v in value):
            raise ConfigError(f"{path}={tuple(value)!r} must hold whole numbers")
        return tuple(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise ConfigError(f"{path}={value!r} is a {type(value).__name__}, expected {type(default).__name__} such as {default!r}")
    return value


def nearest(key: str, known: Any, prefix: str = "") -> str:
    """'; did you mean …?' with the closest of the known names, or '; known: …' with all of them."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{prefix}{near[0]}'?" if near else f"; known: {', '.join(known)}"
