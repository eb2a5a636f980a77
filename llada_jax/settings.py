"""Every setting once, with its default, its meaning and its unit: frozen dataclasses, which config.py builds and checks."""

import dataclasses


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
