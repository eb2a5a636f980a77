"""Is it worth to begin block diffusion with autoregressive weights, and to pass through all block sizes on the way (WSD, LLaDA2.0)?

    python -m llada_jax.train --config=configs/ablations/conversion.py --sweep --workdir=runs/conversion
    python -m llada_jax.plot runs/conversion

Hypothesis: after equally many steps of block diffusion, one that began with an autoregressive model has the lower held-out bound; the steps of
that model are not counted, so this says nothing of compute. Whether WSD (blocks of 1, 4, 32, whole rows, then 32) is better than blocks of 32
throughout is left open (LLaDA2.0, arXiv 2512.15745, says so at its scale).
Metric: held-out bits a byte of the standard library in blocks of 4, 32 and of whole rows (96), all held-out rows, equal masks; paired by seed.
Budget: 300 autoregressive and three times 160 steps of block diffusion, 48 x 96 tokens, five seeds.

Found (conversion.jsonl, 2026-11-27): in blocks of 32 from scratch 2.9156 bits a byte; begun with autoregressive weights 0.6290 (0.6061, 0.6520)
less, with WSD 0.5974 (0.5730, 0.6218) less. WSD against blocks of 32 throughout: 0.0138 (-0.0022, 0.0297) more in blocks of 4, 0.0316
(0.0172, 0.0461) more in blocks of 32, 0.0185 (0.0045, 0.0325) more in whole rows: no better at this scale. The 20 runs took 22 min on two cores of
an AMD EPYC virtual machine that had other work at times.
"""

from configs import common, pystdlib

VARIANTS = ("scratch", "autoregressive", "direct", "wsd")
SEEDS = 5
FROM = {"direct": "autoregressive", "wsd": "autoregressive"}
EVALUATE = {"scratch": "--block_size=4,32,0", "direct": "--block_size=4,32,0", "wsd": "--block_size=4,32,0"}
PRESETS = [f"variant={variant}" for variant in VARIANTS]
STEPS = 160
WSD = "1:16,4:16,32:16,0:72,32"


def get_config(arg=None):
    """ConfigDict of `variant=scratch|autoregressive|direct|wsd,seed=N`."""
    arg = common.parse_arg(arg, variant="scratch", seed=0)
    common.one_of("variant", arg.variant, VARIANTS)
    ours = arg.variant == "autoregressive"
    config = common.short(pystdlib.get_config(), steps=300 if ours else STEPS, seed=arg.seed)
    if ours:
        config.diffusion.objective = "autoregressive"
    else:
        config.diffusion.block_schedule = WSD if arg.variant == "wsd" else "32"
    return config
