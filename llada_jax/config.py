"""Experiment configuration: frozen dataclasses, built and validated from an ml_collections ConfigDict.

Every key stands here once, with its default, its meaning and its unit. A file under `configs/` edits the defaults,
`--config.group.key=value` edits the file, and `from_config_dict` checks the result and freezes it.
"""

import dataclasses
import difflib
import json
import re
from typing import Any

import ml_collections

from pallas_kernels.attention import api as attention
from pallas_kernels.grouped_matmul import api as grouped_matmul
from pallas_kernels.linear_confidence import api as linear_confidence
from pallas_kernels.linear_cross_entropy import api as linear_cross_entropy
from pallas_kernels.routing import api as routing


class ConfigError(ValueError):
    """A setting that cannot work; the message names the numbers and the way out."""


class StoppedError(ConfigError):
    """A run that cannot go on; the message names the step, the batch and the last good checkpoint."""


@dataclasses.dataclass(frozen=True)
class Model:
    """Architecture: LLaDA-MoE (arXiv 2509.24389), and every switch of the published families that share its transformer."""

    vocab_size: int = 0  # tokens; 0 = the tokenizer's size
    hidden_size: int = 256  # D, width of the residual stream
    num_layers: int = 4  # L
    num_heads: int = 4  # N, query heads
    num_kv_heads: int = 0  # K, key/value heads; 0 = num_heads
    head_dim: int = 0  # H; 0 = hidden_size / num_heads
    num_experts: int = 16  # E
    experts_per_token: int = 4  # A
    expert_size: int = 128  # F, hidden width of one expert
    dense_layers: tuple[int, ...] = ()  # indices of layers with one dense SwiGLU in place of experts
    dense_size: int = 0  # hidden width of those dense layers
    shared_expert_size: int = 0  # hidden width of the always-on expert of MoE layers; 0 = none
    router_choice: str = "token"  # who chooses: token (its best experts) | expert (its best tokens of a row: even load; no cache, no split experts)
    router_score: str = "softmax"  # score of an expert from the router's logits: softmax (over all experts) | sigmoid (each alone)
    router_renormalize: bool = False  # divide the chosen experts' weights by their sum
    router_bias: bool = False  # expert bias, added to the score before top-k; state, not a parameter
    router_bias_in_weight: bool = True  # the mixing weight keeps the bias too (LLaDA-MoE); False: it only selects (DeepSeek-V3, LLaDA2)
    router_groups: int = 1  # experts stand in this many equal groups
    router_groups_kept: int = 1  # groups that a token may choose from: those with the largest sum of their two best scores
    router_scale: float = 1.0  # the mixing weights are multiplied by this
    qk_norm: bool = True  # RMSNorm over the head dimension of queries and keys, before rotary
    qkv_bias: bool = False  # biases of the query, key and value projections
    clip_qkv: float = 0.0  # clamp queries, keys and values to +-this after the norm; 0 = off
    rotary_fraction: float = 1.0  # share of the head dimension that rotates
    rope_theta: float = 10_000.0  # rotary base
    norm_eps: float = 1e-5  # epsilon of every RMSNorm
    max_length: int = 8192  # positions, longest sequence
    tie_embeddings: bool = False  # one matrix for input embedding and vocabulary head
    shift_predictions: bool = False  # the state at position i-1 predicts token i (Dream, whose weights began autoregressive)
    init_std: float = 0.02  # standard deviation of initial matrices; 0 = 1/sqrt(fan in)
    compute_dtype: str = "float32"  # float32 | bfloat16
    param_dtype: str = "float32"  # of stored weights: float32 (what is trained needs it) | bfloat16; router and adapters are always float32
    remat: str = "none"  # what the backward pass recomputes: none | dots | full
    scan_layers: bool = True  # one compiled layer for all layers of a kind; False unrolls
    lora_rank: int = 0  # of the low-rank adapters, which alone are trained; 0 = none
    lora_alpha: float = 16.0  # adapters are multiplied by lora_alpha / lora_rank
    lora_targets: str = "query|key|value|output|(shared_)?(gate|up|down)"  # regular expression: names of a layer's matrices that get adapters

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_layers) if i not in self.dense_layers)


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """Objective: what is corrupted, how terms are weighted and averaged, router losses."""

    objective: str = "masked"  # masked (diffusion) | autoregressive (same model, causal, next token) | preference (DPO; its noise is of its own kind)
    preference_beta: float = 0.2  # reward a nat (LLaDA 1.5: 0.2; LLaDA2.0: 0.1)
    preference_draws: int = 8  # noise levels of an answer a step, n_t, one mask each (LLaDA2.0: 1)
    schedule: str = "linear"  # mask probability over time: linear | cosine | polynomial
    schedule_power: float = 2.0  # exponent of the polynomial schedule p = t^power
    min_noise: float = 1e-3  # smallest mask probability of a training draw
    max_noise: float = 1.0  # largest mask probability of a training draw
    time_sampling: str = "stratified"  # over the global batch: stratified | independent
    noise_unit: str = "sequence"  # positions that share one noise level: sequence | segment | block
    block_schedule: str = ""  # block diffusion: tokens of a block and for how many steps, SIZE:STEPS,…,SIZE; 0 = the whole row; "" = no blocks
    block_origin: str = "row"  # blocks are counted from the start of: row (LLaDA2.0) | segment (each document)
    corruption: str = "bernoulli"  # bernoulli (each token alone) | exact_count (k of L tokens)
    complementary: bool = False  # rows 2i and 2i+1 of the batch hold the same sample with a mask and its inverse
    weighting: str = "elbo"  # elbo (1/t on the linear schedule) | count (L/k) | uniform | cart (by nearness of known text, Dream) | cart_elbo (both)
    cart_p: float = 0.1  # of cart: the weight of known text falls by this share a token of distance (0.1 to 0.3 in Dream's code)
    normalization: str = "token"  # what the weighted sum is divided by: token | masked (tokens) | sequence (each by its own length) | batch
    mask_noise_std: float = 0.0  # noise on the embeddings of masks at step 0, in units of the table's root mean square (LLaDA2.0; unpublished)
    mask_noise_steps: int = 1000  # steps in which it falls linearly to 0 (unpublished)
    anneal_steps: int = 0  # steps in which attention opens from causal to both sides, where weights began autoregressive (DiffuLLaMA); 0 = at once
    variable_length_rate: float = 0.01  # share of steps cut to a random length
    variable_length_min: int = 8  # tokens, shortest such length
    confidence_coefficient: float = 0.0  # weight of the entropy of right tokens (CAP; LLaDA2.0's is unpublished, dFactory recommends 2); 0 = off
    balance_coefficient: float = 0.01  # weight of the load-balance loss
    balance_form: str = "all_layers"  # one product of means over all layers | per_layer (mean of per-layer losses)
    z_coefficient: float = 0.001  # weight of the router z-loss

    @property
    def model_kind(self) -> str:
        """What is trained: a `masked` diffusion model, by preferences too, or an `autoregressive` one."""
        return "autoregressive" if self.objective == "autoregressive" else "masked"


@dataclasses.dataclass(frozen=True)
class Data:
    """Where tokens come from and how they become rows."""

    sources: str = "pystdlib"  # name[:weight],…; pystdlib | sudoku or another puzzle | tfds/NAME | files (data/sources.py says which)
    sequence_length: int = 256  # T, tokens a row
    tokenizer: str = ""  # path of a .model file, or "bytes"; "" takes that of --init_from, or trains one on the sources
    vocab_size: int = 1024  # tokens of a tokenizer trained here
    holdout: float = 0.02  # share of documents kept for evaluation
    text_field: str = "text"  # field of a jsonl or tfds record that holds the text
    pack: bool = True  # texts are joined and cut, answers put whole into the first row with room; False gives each its own padded row
    chat_template: str = ""  # of messages, prompts and responses: a family of interop/chat.py; "" joins prompt and response as they are
    turns: str = "sampled"  # answers of a conversation to learn: sampled (one a draw) | last | all (of a model that sees later turns, too)
    answer_padding: str = "row"  # end-of-text after an answer, in the loss, up to: row | batch (its longest) | block:N tokens | align:N, none (no)
    num_workers: int = 0  # grain worker processes; 0 = in this process
    prefetch: int = 2  # calls prepared ahead of the device
    limit: int = 0  # documents read at most from each source; 0 = all

    @property
    def answer_rule(self) -> tuple[str, int]:
        """`answer_padding` as (row | batch | block | align | none, tokens of a block)."""
        rule, _, block = self.answer_padding.partition(":")
        return rule, int(block or 1)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Update rule (optax)."""

    name: str = "adamw"  # adamw | muon (matrices by Muon, the rest by AdamW; one learning rate for both)
    learning_rate: float = 3e-4  # peak
    schedule: str = "wsd"  # wsd (warm-up, stable, linear decay) | cosine | constant
    warmup_steps: int = 100  # steps from 0 to the peak
    decay_fraction: float = 0.2  # wsd: share of all steps spent decaying
    final_fraction: float = 0.1  # last learning rate as a share of the peak
    weight_decay: float = 0.1  # decoupled; matrices only
    b1: float = 0.9  # Adam's first moment
    b2: float = 0.95  # Adam's second moment
    eps: float = 1e-8  # Adam's epsilon
    clip_norm: float = 1.0  # global gradient norm; 0 = off
    trainable: str = ".*"  # regular expression on parameter paths; the rest is frozen; ".*" means the adapters alone, where there are some
    ema_decay: float = 0.0  # exponential moving average of the weights; 0 = off
    router_bias_rate: float = 0.0  # step of the expert bias towards an even load, score units a step (balancing without a loss; Ling: 1e-3); 0 = off


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each mesh axis; one of them may be -1 (what is left)."""

    data: int = -1  # copies of the model
    fsdp: int = 1  # shards of parameters and batch
    expert: int = 1  # shards of the experts (and of the batch)
    tensor: int = 1  # shards of heads, hidden widths and vocabulary


@dataclasses.dataclass(frozen=True)
class Train:
    """Length, intervals, what is kept."""

    steps: int = 1000  # optimizer steps in all
    batch_size: int = 32  # sequences of the global batch; of pairs two each
    steps_per_call: int = 10  # optimizer steps in one jitted call
    accumulate: int = 1  # micro-batches a step
    seed: int = 0  # of everything random
    log_every: int = 10  # steps between lines of metrics.jsonl
    checkpoint_every: int = 500  # steps
    keep_last: int = 2  # newest checkpoints kept
    keep_every: int = 0  # steps; checkpoints at multiples of it stay for ever; 0 = none
    eval_every: int = 500  # steps between held-out evaluations; 0 = never
    eval_batches: int = 4  # global batches of one held-out evaluation; 0 = all held-out rows
    eval_draws: int = 1  # noise draws a held-out row
    max_skipped: int = 20  # steps with non-finite loss or gradients in a row before the run stops
    tensorboard: bool = False  # write TensorBoard events
    wandb: str = ""  # wandb project; "" = off


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Implementation of each operation: auto, or a name, which then runs or raises."""

    attention: str = "auto"  # auto | reference | tpu | gpu
    routing: str = "auto"  # auto | reference | tpu | gpu
    grouped_matmul: str = "auto"  # auto | reference | cpu | tpu | gpu
    linear_cross_entropy: str = "auto"  # auto | reference | chunked | tpu | gpu
    linear_confidence: str = "auto"  # in decoding: auto (whole logits on CPUs) | reference | tpu | gpu
    expert_dispatch: str = "auto"  # to experts on other devices: auto | gathered | capacity (equal parts) | ragged (not on CPUs, v5e)


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    model: Model = Model()
    diffusion: Diffusion = Diffusion()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    train: Train = Train()
    kernels: Kernels = Kernels()

    @property
    def keeps_reference(self) -> bool:
        """Whether the state holds frozen weights to compare with; adapters are compared with their base."""
        return self.diffusion.objective == "preference" and not self.model.lora_rank


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
