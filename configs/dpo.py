"""Preference optimisation: a tiny model on a CPU in minutes, and the numbers of LLaDA 1.5 and LLaDA2.0 for imported checkpoints.

    python -m llada_jax.train --config=configs/recall.py --config.train.steps=200 --workdir=runs/base
    python -m llada_jax.train --config=configs/sft.py:recipe=llada --init_from=runs/base --workdir=runs/sft
    python -m llada_jax.train --config=configs/dpo.py --init_from=runs/sft --workdir=runs/dpo
    python -m llada_jax.evaluate --workdir=runs/dpo --tasks=lookup --batch_size=100 --decoder=low_confidence,low_confidence:steps=4,threshold

Of 1,000 held-out lookups the tuned model answers 67.2 % with a token a forward, 69.0 % in 4 forwards and 80.0 % by `threshold`; after 100 steps on
right answers against wrong ones 75.8, 77.4 and 82.0 % (item by item +8.6 ± 1.3, +8.4 ± 1.4, +2.0 ± 1.2). Of 128 held-out pairs the reward is right in
99.2 %, with a mean margin of 0.96. The bound of the right answers got worse, from 0.047 to 0.088 bits a byte: DPO lowers the wrong ones, and these
with them. With other wrong answers, two thirds of which had a wrong length, a learning rate of 1e-4 changed nothing, and one of 1e-3 cost about a
third of the right ones. Preferences took 70 s of processor time, compilation and evaluation included, and 1 min 48 s on two cores that other work
kept busy (AMD EPYC virtual machine; 2026-11-26, one seed).

`variant=llada_moe` and `variant=llada2` go on with a tuned checkpoint and lines of prompt (text or messages), chosen and rejected:
--config.data.sources='pairs/*.jsonl' --init_from=TUNED, whose tokenizer they take. With model.lora_rank the base stands for the reference, and no
second set of weights is held.
"""

from configs import common, sft

VARIANTS = sft.VARIANTS
PRESETS = [f"variant={variant}" for variant in VARIANTS]


def get_config(arg=None):
    """ConfigDict of `variant=tiny|llada_moe|llada2,mesh=…`."""
    arg = common.parse_arg(arg, variant="tiny", mesh="")
    common.one_of("variant", arg.variant, VARIANTS)
    config = sft.get_config(f"variant={arg.variant},recipe=llada")
    config.diffusion.objective = "preference"
    {"tiny": _tiny, "llada_moe": _llada_1_5, "llada2": _llada2}[arg.variant](config)
    if arg.variant != "tiny":
        config.data.sources = "pairs/*.jsonl"
        common.on_mesh(config, arg.mesh)
    return config


def _llada_1_5(config):
    """arXiv 2505.19223: beta 0.2, eight draws, 64 pairs a step, 350 K pairs, learning rate 5e-7; of LLaDA-8B, LLaDA-MoE's are unpublished.

    Answers are padded as in tuning, so that where one ends is part of what is compared. Schedule, warm-up and the one epoch are ours.
    """
    config.diffusion.preference_beta = 0.2
    config.diffusion.preference_draws = 8
    config.optimizer.learning_rate = 5e-7
    config.train.batch_size = 128
    config.train.steps = 5_469


def _llada2(config):
    """LLaDA2.0 (arXiv 2512.15745): beta 0.1, a single draw, 1.5 M pairs, the last learning rate of tuning, which is unpublished: here that of sft.py.

    Its bound is that of block diffusion, ours of whole answers under full attention, which a model tuned in blocks has to get used to; it is decoded
    in blocks by --decoder=llada2 alone. Batch, schedule, warm-up and the one epoch are ours.
    """
    config.data.answer_padding = "block:32"
    config.data.sequence_length = 2048
    config.diffusion.preference_beta = 0.1
    config.diffusion.preference_draws = 1
    config.optimizer.learning_rate = 1e-6
    config.train.batch_size = 128
    config.train.steps = 23_438


def _tiny(config):
    """Right lookups against wrong ones (data/puzzles.py)."""
    config.diffusion.preference_draws = 4
    config.optimizer.learning_rate = 3e-4
    config.optimizer.weight_decay = 0.0
    config.train.batch_size = 32
    config.train.steps = 100
    config.train.checkpoint_every = config.train.eval_every = 50
