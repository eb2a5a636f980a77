"""What of a mixture of experts matters: how many, how many a token and how wide, an expert for all, weights that add up to one?

    python -m llada_jax.train --config=configs/ablations/router.py --sweep --workdir=runs/router
    python -m llada_jax.plot runs/router

Hypothesis: at equal active FLOPs more experts lower the held-out bound, and so do finer ones; a shared expert and renormalised weights change
little (LLaDA-MoE has neither, LLaDA2.0 both).
Metric: held-out bits a byte of the standard library, all held-out rows, equal masks; paired by seed.
Budget: seven variants of 200 steps of 32 x 96 tokens, five seeds.
"""

from configs import common, pystdlib

VARIANTS = {  # experts, of which a token uses so many, of so wide; what else differs
    "base": (8, 2, 96, {}),
    "4-experts": (4, 2, 96, {}),
    "16-experts": (16, 2, 96, {}),
    "one-wide": (4, 1, 192, {}),  # this and the next one have as many parameters as base
    "four-narrow": (16, 4, 48, {}),
    "shared": (8, 1, 96, {"shared_expert_size": 96}),
    "renormalised": (8, 2, 96, {"router_renormalize": True}),
}
SEEDS = 5
PRESETS = [f"variant={variant}" for variant in VARIANTS]


def get_config(arg=None):
    """ConfigDict of `variant=NAME,seed=N`."""
    config, variant = common.ablation(arg, VARIANTS, pystdlib.get_config(), steps=200, batch_size=32)
    config.model.num_experts, config.model.experts_per_token, config.model.expert_size, others = VARIANTS[variant]
    config.model.update(others)
    return config
