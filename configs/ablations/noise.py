"""What of the noise matters: noise levels spread over the batch, the weight of 1/t, steps cut to a random length?

    python -m llada_jax.train --config=configs/ablations/noise.py --sweep --workdir=runs/noise
    python -m llada_jax.plot runs/noise

Hypothesis: levels stratified over the batch and the weight 1/t, whose loss is the bound that is measured, reach a lower bound than levels drawn
one by one and than equal weights; the 1 % of steps of variable length (LLaDA) change nothing at the full length.
Metric: held-out bits a byte of the standard library, all held-out rows, equal masks; paired by seed.
Budget: five variants of 200 steps of 32 x 96 tokens, five seeds.

Found (noise.jsonl, 2026-11-27): 2.9437 bits a byte. Levels drawn one by one 0.0118 (-0.0190, 0.0425) more: no difference shows; equal weights 0.0626
(0.0312, 0.0941) more; all steps at full length 0.0022 (-0.0007, 0.0051) less: none shows; a fifth of the steps cut 0.0484 (0.0268, 0.0701) more,
those steps seeing half as many tokens. The 25 runs took 20 min on two cores of an AMD EPYC virtual machine that had other work.
"""

from configs import common, pystdlib

VARIANTS = {
    "base": {},
    "independent": {"time_sampling": "independent"},
    "uniform": {"weighting": "uniform"},
    "fixed-length": {"variable_length_rate": 0.0},
    "often-variable": {"variable_length_rate": 0.2},
}
SEEDS = 5
PRESETS = [f"variant={variant}" for variant in VARIANTS]


def get_config(arg=None):
    """ConfigDict of `variant=NAME,seed=N`."""
    config, variant = common.ablation(arg, VARIANTS, pystdlib.get_config(), steps=200, batch_size=32)
    config.diffusion.update(VARIANTS[variant])
    return config
