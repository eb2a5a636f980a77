"""LLaDA-MoE at three sizes; `7b_a1b` is the published architecture (arXiv 2509.24389), pre-training stage 1.

    python -m llada_jax.train --config=configs/llada_moe.py:variant=100m_a20m --dry_run

builds data and shapes and stops; without `--dry_run` it trains. `mesh=v5p-128` (or v5e-256, 2xv5e-256, v6e-256, 8xh100, 8xh200) sets the mesh and
the batch for a machine, 2^20 tokens a step; `stage=anneal` takes rows twice as long and the rotary base that goes with them:

    python -m llada_jax.compile --config=configs/llada_moe.py:variant=7b_a1b,mesh=v5p-128 --topology=v5p-128

The data are Python's standard library unless `--config.data.sources='corpus/*.jsonl'` names yours, which a model of this size needs.

The published recipe leaves learning rate, batch and optimizer open; those here are LLaDA-8B's (arXiv 2502.09992: AdamW,
weight decay 0.1, WSD, 4e-4, batch 1280 x 4096 tokens), scaled for the small sizes without a sweep.
"""

import math

from configs import common

VARIANTS = {
    "100m_a20m": dict(hidden_size=384, num_layers=8, num_heads=6, num_experts=32, experts_per_token=4, expert_size=256),
    "1b_a200m": dict(hidden_size=1024, num_layers=12, num_heads=8, num_experts=64, experts_per_token=8, expert_size=384),
    "7b_a1b": dict(hidden_size=2048, num_layers=16, num_heads=16, num_experts=64, experts_per_token=8, expert_size=1024),
}
TRAIN = {  # tokens a row, rows, steps, peak learning rate, vocabulary (0: the tokenizer's)
    "100m_a20m": (512, 128, 20_000, 1e-3, 0),
    "1b_a200m": (2048, 256, 50_000, 6e-4, 0),
    "7b_a1b": (4096, 1280, 100_000, 4e-4, 157_184),
}
PRESETS = [f"variant={name}" for name in VARIANTS]


def get_config(arg=None):
    """ConfigDict of `variant=…,mesh=…,stage=pretrain|anneal`."""
    arg = common.parse_arg(arg, variant="100m_a20m", mesh="", stage="pretrain")
    variant = arg.variant
    common.one_of("variant", variant, VARIANTS)
    common.one_of("stage", arg.stage, ("pretrain", "anneal"))
    config = common.default_config()
    length, batch, steps, rate, vocabulary = TRAIN[variant]
    config.model.update(VARIANTS[variant])
    config.model.rope_theta = 10_000.0
    config.model.vocab_size = vocabulary
    common.on_a_pod(config, length, batch, steps, rate)
    if variant == "100m_a20m":  # fits one accelerator
        config.model.compute_dtype, config.model.remat, config.train.keep_every = "float32", "none", 0
    if variant == "7b_a1b" or arg.mesh:
        common.on_mesh(config, arg.mesh)
    if arg.stage == "anneal":  # arXiv 2509.24389: context 8192, rotary base 50,000
        config.data.sequence_length = 2 * length
        config.train.batch_size = max(config.train.batch_size // 2, math.prod(config.mesh.values()))  # at least a row for each device
        config.model.rope_theta = 50_000.0
    return config
