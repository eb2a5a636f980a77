"""How does the bound depend on the size of the blocks that a model is trained with, and measured in?

    python -m llada_jax.train --config=configs/ablations/blocks.py --sweep --workdir=runs/blocks
    python -m llada_jax.plot runs/blocks

Hypothesis: in its own blocks a model of smaller blocks has the lower bound, since more of a text is known when a token is predicted; in blocks that
it was not trained with, each is worse than the model that was.
Metric: held-out bits a byte of the standard library in blocks of 4, 32 and of whole rows (96), all held-out rows, equal masks; paired by seed.
Budget: three variants of 200 steps of 32 x 96 tokens (those with blocks compute twice as much), five seeds.
Found (blocks.jsonl, 2026-11-27): the first half holds, 2.699 bits a byte of blocks of 4 in blocks of 4, 2.899 of 32 in 32, 2.944 of whole rows in
whole rows. The second does not: in blocks of 32 the model of 4 has 0.047 (0.015, 0.080) bits a byte less than that of 32 (`--against=32`), and in
whole rows no difference shows between the three.
"""

from configs import common, pystdlib

VARIANTS = {"whole": "", "32": "32", "4": "4"}
SEEDS = 5
EVALUATE = {"": "--block_size=4,32,0"}
PRESETS = [f"variant={variant}" for variant in VARIANTS]


def get_config(arg=None):
    """ConfigDict of `variant=whole|32|4,seed=N`."""
    config, variant = common.ablation(arg, VARIANTS, pystdlib.get_config(), steps=200, batch_size=32)
    config.diffusion.block_schedule = VARIANTS[variant]
    return config
