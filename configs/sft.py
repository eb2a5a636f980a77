"""Supervised fine-tuning: a tiny model on a CPU in minutes, and the recipes of LLaDA and LLaDA2.0 for imported checkpoints.

    python -m llada_jax.train --config=configs/recall.py --config.train.steps=200 --workdir=runs/base
    python -m llada_jax.train --config=configs/sft.py --init_from=runs/base --workdir=runs/sft
    python -m llada_jax.evaluate --workdir=runs/sft --tasks=lookup --batch_size=100 --decoder=llada2:threshold=1,llada2:steps=4,llada2

The base has seen recalls of one length and never an end of text: it answers none of 1,000 held-out lookups. After 400 steps on those of 1 to 8 keys,
three samples in two rows of 64 tokens (79.7 % filled, against 51.4 % with a row each), in blocks of 8, it answers 99.8 % with a token a forward
(threshold=1), and 99.9 % in 2.1 forwards, at least two tokens each (steps=4) or one (llada2); with `--config=configs/sft.py:recipe=llada`, decoded by
low_confidence, low_confidence:steps=4 and threshold, 67.2, 69.0 and 80.0 %. Base and tuning took 1 min 28 s and 1 min 56 s of processor time,
compilation included (two cores of an AMD EPYC virtual machine that other work kept busy; 2026-11-26, one seed).

`variant=llada_moe` and `variant=llada2` tune an imported checkpoint, or the end of `llada_moe.py`'s stages and of `llada2.py`'s blocks, on
conversations: --config.data.sources='chat/*.jsonl' (lines of messages, or of prompt and response), --init_from=RUN, whose tokenizer they take.
The recipe of LLaDA has full attention; LLaDA2.0's is block diffusion, in one pass over the noisy and the clean row, and every sample of a row begins
and ends with a block, so that none holds two. A tokenizer without the template's markers needs --config.data.chat_template=''.
"""

from configs import common, llada2, llada_moe, recall

VARIANTS = ("tiny", "llada_moe", "llada2")
RECIPES = ("llada", "llada2")
PRESETS = [*(f"variant={variant}" for variant in VARIANTS), "variant=tiny,recipe=llada"]


def get_config(arg=None):
    """ConfigDict of `variant=tiny|llada_moe|llada2,recipe=llada|llada2,mesh=…`; without a recipe, the variant's own (tiny: llada2)."""
    arg = common.parse_arg(arg, variant="tiny", recipe="", mesh="")
    common.one_of("variant", arg.variant, VARIANTS)
    recipe = arg.recipe or ("llada" if arg.variant == "llada_moe" else "llada2")
    common.one_of("recipe", recipe, RECIPES)
    config = recall.get_config() if arg.variant == "tiny" else common.default_config()
    config.diffusion.variable_length_rate = 0.0
    config.diffusion.noise_unit = "segment"  # an answer
    {"llada": _llada, "llada2": _llada2}[recipe](config)
    if arg.variant == "tiny":
        _tiny(config)
    else:
        config.model.update(llada_moe.VARIANTS["7b_a1b"] | dict(vocab_size=157_184, rope_theta=50_000.0) if arg.variant == "llada_moe"
                            else llada2.SHARED | llada2.VARIANTS["mini"])
        config.model.compute_dtype, config.model.remat = "bfloat16", "full"
        config.data.sources = "chat/*.jsonl"
        config.data.chat_template = {"llada_moe": "llada_moe", "llada2": "llada2_moe"}[arg.variant]
        common.on_mesh(config, arg.mesh)
    return config


def _llada(config):
    """arXiv 2502.09992 §2.3, appendix B: one answer a row, padded with end-of-text to the longest of the batch, averaged by length.

    LLaDA-MoE (arXiv 2509.24389) says the same and takes samples of at most 4096 tokens, so that padding does not overtrain end-of-text; it draws
    one turn of a conversation. Its learning rate and batch are unpublished: these are LLaDA's.
    """
    config.data.pack = False
    config.data.answer_padding = "batch"
    config.data.sequence_length = 4096
    config.diffusion.weighting = "elbo"
    config.diffusion.normalization = "sequence"
    config.optimizer.learning_rate = 2.5e-5
    config.optimizer.warmup_steps = 50
    config.optimizer.decay_fraction = 0.1
    config.optimizer.final_fraction = 0.1
    config.train.batch_size = 256
    config.train.steps = 50_000  # three epochs of 4.5 M pairs are 52,734


def _llada2(config):
    """LLaDA2.0 (arXiv 2512.15745) with the numbers of dFactory's example: blocks of 32, masks of 0.3 to 0.8 and their inverse, plain mean.

    One noise level an answer, as there; the report leaves open whether it is one a block (diffusion.noise_unit=block).

    The inverse of a mask of p is one of 1 - p, so 0.2 to 0.7. CAP is off, as there: diffusion.confidence_coefficient=2 is what it recommends; the
    report's is unpublished. dFactory's example has 8 rows a batch.
    """
    config.data.pack = True
    config.data.answer_padding = "block:32"
    config.diffusion.block_schedule = "32"
    config.data.sequence_length = 2048
    config.diffusion.min_noise, config.diffusion.max_noise = 0.3, 0.8
    config.diffusion.complementary = True
    config.diffusion.weighting = "uniform"
    config.diffusion.normalization = "masked"
    config.optimizer.learning_rate = 1e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 300  # 3 %
    config.optimizer.b2 = 0.999
    config.train.batch_size = 256
    config.train.steps = 10_000


def _tiny(config):
    """The model of recall.py learns to end answers of many lengths."""
    config.data.sources = "lookup"
    config.data.sequence_length = 64
    if config.data.pack:
        config.data.answer_padding, config.diffusion.block_schedule = "block:8", "8"
    config.optimizer.learning_rate = 8e-3
    config.optimizer.schedule = "wsd"
    config.optimizer.warmup_steps = 20
    config.optimizer.decay_fraction = 0.6
    config.optimizer.final_fraction = 0.0
    config.optimizer.b2 = 0.95
    config.train.batch_size = 32
    config.train.steps = 400
    config.train.steps_per_call = 20
