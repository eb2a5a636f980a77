"""What of a mixture of experts matters: how many, how many a token and how wide, an expert for all, weights that add up to one?

    python -m llada_jax.train --config=configs/ablations/router.py --sweep --workdir=runs/router
    python -m llada_jax.plot runs/router

Hypothesis: at equal active FLOPs more experts lower the held-out bound, and so do finer ones; a shared expert and renormalised weights change
little (LLaDA-MoE has neither, LLaDA2.0 both).
Metric: held-out bits a byte of the standard library, all held-out rows, equal masks; paired by seed.
Budget: seven variants of 200 steps of 32 x 96 tokens, five seeds.
Found (router.jsonl, 2026-11-27): renormalised weights cost 0.040 (0.006, 0.075) bits a byte. No other difference in the bound shows: 16 experts
-0.017 (-0.041, 0.008), 4 experts 0.000 (-0.044, 0.044), one wide a token 0.022 (-0.004, 0.049), four narrow ones -0.005 (-0.031, 0.021), a shared
one 0.047 (-0.003, 0.096). The more experts, the less even their load: busiest / mean 1.32 of 4, 1.73 of 8, 2.38 of 16.
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
