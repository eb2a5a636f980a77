"""Is the mean of the best checkpoints of a run at a constant rate better than its last one (LLaDA2.0, arXiv 2512.15745, section 4)?

    python -m llada_jax.train --config=configs/ablations/averaging.py --sweep --workdir=runs/averaging
    python -m llada_jax.plot runs/averaging

Hypothesis: without a decay of the learning rate the mean of the four checkpoints with the best bounds beats the last checkpoint.
Metric: held-out bits a byte of the standard library, all held-out rows, equal masks; paired by seed.
Budget: 800 steps of 48 x 96 tokens, a checkpoint every 40, five seeds. (A first try with 300 steps and a checkpoint every 30, when the bound still
fell steeply, showed no difference: 0.0008 (-0.0104, 0.0120) bits a byte.) The four are chosen by the bound on the same held-out rows, as LLaDA2.0
chooses them.

Found (averaging.jsonl, 2026-11-27): the last 2.0987 bits a byte, the mean 0.1199 (0.1089, 0.1309) less. The ten runs took 23 min on two cores of an
AMD EPYC virtual machine that had other work.
"""

from configs import common, pystdlib

VARIANTS = ("last", "mean")
SEEDS = 5
FROM = {"mean": "last"}
COMMANDS = {"mean": "-m llada_jax.convert average --workdir={start} --top=4 --out={folder}"}
EVALUATE = {"": ""}


def get_config(arg=None):
    """ConfigDict of `variant=last|mean,seed=N`; the mean is made from the run of the last."""
    config, _ = common.ablation(arg, VARIANTS, pystdlib.get_config(), steps=800)
    config.optimizer.schedule = "constant"
    config.train.eval_every = config.train.checkpoint_every = config.train.keep_every = 40
    return config
