"""Does a mixture of experts beat a dense model that spends as many FLOPs a token, and what does balancing the load cost or bring?

    python -m llada_jax.train --config=configs/ablations/moe.py --sweep --workdir=runs/moe
    python -m llada_jax.plot runs/moe

Hypothesis: eight experts of which a token uses two reach a lower held-out bound than one feed-forward layer of twice an expert's width, and the
balance loss keeps the busiest expert under 1.5 times the mean without harm to the bound.
Metric: held-out bits a byte of the standard library, all held-out rows, equal masks; paired by seed.
Budget: four variants of 300 steps of 48 x 96 tokens, five seeds.

Found (moe.jsonl, 2026-11-27): 2.4916 bits a byte with experts; dense needs 0.1051 (0.0657, 0.1445) more. Balanced by the bias 0.0141
(-0.0158, 0.0439) more, not balanced 0.0111 (-0.0135, 0.0357) more: no difference that shows. Busiest expert / mean 1.48, 1.99 and 3.31 in the
last 100 steps. The 20 runs took 1 h 44 min on two cores of an AMD EPYC virtual machine that had several times as much other work.
"""

from configs import common, pystdlib

VARIANTS = ("moe", "dense", "bias", "unbalanced")
SEEDS = 5
PRESETS = [f"variant={variant}" for variant in VARIANTS]


def get_config(arg=None):
    """ConfigDict of `variant=moe|dense|bias|unbalanced,seed=N`: with the balance loss, without experts, balanced by the expert bias, not balanced."""
    config, variant = common.ablation(arg, VARIANTS, pystdlib.get_config(), steps=300)
    if variant == "dense":
        config.model.dense_layers = tuple(range(config.model.num_layers))
        config.model.dense_size = config.model.experts_per_token * config.model.expert_size
    if variant == "bias":
        config.model.router_bias = True
        config.model.router_bias_in_weight = False
        config.optimizer.router_bias_rate = 1e-3
    if variant in ("bias", "unbalanced"):
        config.diffusion.balance_coefficient = 0.0
    return config
