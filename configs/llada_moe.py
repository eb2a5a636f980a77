"""LLaDA-MoE at four sizes; `7b_a1b` is the published architecture (arXiv 2509.24389).

    python -m llada_jax.train --config=configs/llada_moe.py:variant=100m_a20m --dry_run

builds data and shapes and stops; without `--dry_run` it trains. `mesh=v5p-128` (or v5e-256, 2xv5e-256, v6e-256, 8xh100, 8xh200) sets the mesh and
the batch for a machine, 2^20 tokens a step:

    python -m llada_jax.compile --config=configs/llada_moe.py:variant=7b_a1b,mesh=v5p-128 --topology=v5p-128

Pre-training has four stages, each from the weights and the tokenizer of the one before: 10T tokens at 4096 a row; 10T with more mathematics and
code; 500B of high quality, from the checkpoint of stage 2 with the best evaluations (--init_from=RUN@STEP); 500B at 8192 a row with a rotary base of
50,000 in place of 10,000. `configs/sft.py:variant=llada_moe` comes after. Sizes between 7b_a1b and tiny have tokens in the same proportions.
`variant=tiny` does all of it on Python's standard library:

    python -m llada_jax.train --config=configs/llada_moe.py:variant=tiny,stage=1 --workdir=runs/moe1
    python -m llada_jax.train --config=configs/llada_moe.py:variant=tiny,stage=2 --init_from=runs/moe1 --workdir=runs/moe2
    python -m llada_jax.train --config=configs/llada_moe.py:variant=tiny,stage=3 --init_from=runs/moe2 --workdir=runs/moe3
    python -m llada_jax.train --config=configs/llada_moe.py:variant=tiny,stage=4 --init_from=runs/moe3 --workdir=runs/moe4
    python -m llada_jax.convert export --checkpoint=runs/moe4 --out=runs/moe4_published
    python -m llada_jax.convert check --hf_dir=runs/moe4_published --finite

Held out, an upper bound of 2.428, 2.205, 2.050 and 2.018 bits a byte after the four stages (± 0.03 to 0.05 over rows, the same files throughout),
and 2.082 at the start of stage 4, whose rows and rotary base the weights had not seen. They took 2 min 52 s, 3 min 21 s, 1 min 57 s and 2 min 20 s of
processor time, compilation included (two cores of an AMD EPYC virtual machine that other work kept busy; 2026-11-26, one seed). No other shares,
rates or orders were tried, so these figures do not say that the stages are of use.

Published are tokens, lengths, rotary bases, the loss with its coefficients, and that a hundredth of the steps is cut to 8 to 4096 tokens. Not
published, so ours, and none of it swept: the shares of the data (MIXTURES; the paths are examples, yours go there or into
--config.data.sources); the learning rate (LLaDA-8B's peak of 4e-4, arXiv 2502.09992, held through stages 1 and 2, a tenth of it at the end of
stage 3 and a hundredth at the end of 4; scaled up for small sizes); AdamW with its weight decay and batch (LLaDA-8B's); and that a stage
takes over the weights alone, so its moments begin anew and it warms up.

Without a number, `stage=pretrain` and `stage=anneal` have the shapes of stages 1 and 4 on one source, for a run of its own or to compile.
"""

import math
from typing import NamedTuple

from configs import common, pystdlib

VARIANTS = {
    "tiny": {},  # the model of pystdlib.py
    "100m_a20m": dict(hidden_size=384, num_layers=8, num_heads=6, num_experts=32, experts_per_token=4, expert_size=256),
    "1b_a200m": dict(hidden_size=1024, num_layers=12, num_heads=8, num_experts=64, experts_per_token=8, expert_size=384),
    "7b_a1b": dict(hidden_size=2048, num_layers=16, num_heads=16, num_experts=64, experts_per_token=8, expert_size=1024),
}
TRAIN = {  # tokens a row, rows, steps, peak learning rate, vocabulary (0: the tokenizer's)
    "tiny": (96, 48, 300, 1.6e-2, 0),
    "100m_a20m": (512, 128, 20_000, 1e-3, 0),
    "1b_a200m": (2048, 256, 50_000, 6e-4, 0),
    "7b_a1b": (4096, 1280, 100_000, 4e-4, 157_184),
}
PRESETS = [f"variant={name}" for name in VARIANTS]
FIRST_TOKENS = 10e12  # of 7b_a1b's first stage


class Stage(NamedTuple):
    """A stage of pre-training beside the first."""

    tokens: float  # share of the first stage's
    length: int  # rows are so many times as long
    rope_theta: float
    first_rate: float  # learning rate at its start and its end, shares of the peak (unpublished)
    last_rate: float


STAGES = {"1": Stage(1, 1, 1e4, 1, 1), "2": Stage(1, 1, 1e4, 1, 1), "3": Stage(0.05, 1, 1e4, 1, 0.1), "4": Stage(0.05, 2, 5e4, 0.1, 0.01)}
SHAPES = {"pretrain": "1", "anneal": "4"}
LATER_WARMUP = 200  # steps, where moments begin anew on trained weights
MIXTURES = {  # the share of rows drawn from each source
    "1": "web/*.jsonl:0.7,books/*.jsonl:0.1,math/*.jsonl:0.1,code/*.jsonl:0.1",
    "2": "web/*.jsonl:0.3,books/*.jsonl:0.1,math/*.jsonl:0.3,code/*.jsonl:0.3",
    "3": "best_web/*.jsonl:0.3,best_math/*.jsonl:0.35,best_code/*.jsonl:0.35",
    "4": "best_web/*.jsonl:0.3,best_math/*.jsonl:0.35,best_code/*.jsonl:0.35",
}
MODULES = {"1": 0.4, "2": 0.7, "3": 0.9, "4": 0.9}  # of tiny: the share of modules, against packages, whose tables of encodings teach little
TINY_ANNEAL = 0.5  # of tiny: share of stages 3 and 4, which would otherwise last 15 steps


def get_config(arg=None):
    """ConfigDict of `variant=…,mesh=…,stage=1|2|3|4|pretrain|anneal`."""
    arg = common.parse_arg(arg, variant="100m_a20m", mesh="", stage="pretrain")
    variant = arg.variant
    common.one_of("variant", variant, VARIANTS)
    common.one_of("stage", arg.stage, (*STAGES, *SHAPES))
    stage = STAGES[SHAPES.get(arg.stage, arg.stage)]
    config = pystdlib.get_config() if variant == "tiny" else common.default_config()
    length, batch, steps, rate, vocabulary = TRAIN[variant]
    config.model.update(VARIANTS[variant])
    config.model.rope_theta = stage.rope_theta
    config.model.vocab_size = vocabulary
    if variant != "tiny":
        common.on_a_pod(config, length, batch, steps, rate)
    if variant == "100m_a20m":  # fits one accelerator
        config.model.compute_dtype, config.model.remat, config.train.keep_every = "float32", "none", 0
    if variant == "7b_a1b" or arg.mesh:
        common.on_mesh(config, arg.mesh)
    config.data.sequence_length = stage.length * length
    config.train.batch_size = max(config.train.batch_size // stage.length, math.prod(config.mesh.values()))  # at least a row for each device
    if arg.stage in STAGES:
        _staged(config, variant, arg.stage)
    return config


def _staged(config, variant, name):
    """Tokens, data and learning rate of a numbered stage."""
    stage, (length, batch, steps, rate, _) = STAGES[name], TRAIN[variant]
    tokens = FIRST_TOKENS if variant == "7b_a1b" else steps * batch * length
    share = TINY_ANNEAL if variant == "tiny" and stage.tokens < 1 else stage.tokens
    config.train.steps = round(share * tokens / (config.train.batch_size * config.data.sequence_length))
    config.data.sources = MIXTURES[name]
    config.optimizer.learning_rate = rate * stage.first_rate
    config.optimizer.schedule = "constant"
    if stage.last_rate < stage.first_rate:
        config.optimizer.schedule, config.optimizer.decay_fraction = "wsd", 1.0
        config.optimizer.final_fraction = stage.last_rate / stage.first_rate
    if name != "1":
        config.optimizer.warmup_steps = LATER_WARMUP
    if variant == "tiny":
        config.data.sources = f"pystdlib/*.py:{MODULES[name]},pystdlib/*/**/*.py:{1 - MODULES[name]:.1f}"
        config.optimizer.warmup_steps = 20 if name == "1" else 10
        config.train.checkpoint_every = config.train.eval_every = 150
