"""Does confidence-aware training (CAP, LLaDA2.0: a loss on the entropy of right tokens) let a model write more tokens a forward?

    python -m llada_jax.train --config=configs/ablations/confidence.py --sweep --workdir=runs/confidence
    python -m llada_jax.plot runs/confidence

Hypothesis: at an equal rate of exact answers a model trained with diffusion.confidence_coefficient=2 (what dFactory recommends; LLaDA2.0's is not
published) writes more tokens a forward than one trained without.
Metric: 1,000 held-out sudokus, decoded at six thresholds of confidence; tokens a forward, interpolated over the thresholds, at an exact rate that
both reach; paired by seed.
Budget: two variants of 600 steps of 128 grids, five seeds.

Found (confidence.jsonl, 2026-11-27): 0.944 (0.725, 1.228) times as many tokens a forward with the loss, so no difference shows at this scale.
The held-out bound is 0.467 (0.343, 0.592) bits a byte worse with it. The ten runs took 26 min on two cores of an AMD EPYC virtual machine that had
other work.
"""

from configs import common, sudoku

VARIANTS = ("without", "confidence")
SEEDS = 5
THRESHOLDS = (0.4, 0.5, 0.6, 0.75, 0.9, 0.97)
EVALUATE = {"": "--tasks=sudoku --batch_size=100 --decoder=" + ",".join(f"threshold:threshold={threshold}" for threshold in THRESHOLDS)}
PRESETS = [f"variant={variant}" for variant in VARIANTS]


def get_config(arg=None):
    """ConfigDict of `variant=without|confidence,seed=N`."""
    config, variant = common.ablation(arg, VARIANTS, sudoku.get_config(), steps=600)
    config.diffusion.confidence_coefficient = 2.0 * (variant == "confidence")
    return config
