"""Preference optimisation (DPO on likelihood bounds, with VRPO's estimates)"""

from configs import common, sft

VARIANTS = sft.VARIANTS
PRESETS = [f"variant={variant}" for variant in VARIANTS]


def get_config(arg=None):
    """ConfigDict of `variant=tiny|llada_moe|llada2,mesh=…`."""
    arg = common.parse_arg(arg, variant="tiny", mesh="")
    common.one_of("variant", arg.variant, VARIANTS)
    config = sft.get_config(f"variant={arg.variant},recipe=llada,mesh={arg.mesh}")
    config.diffusion.objective = "preference"
    {"tiny": _tiny, "llada_moe": _llada, "llada2": _llada2}[arg.variant](config)
    return config


def _tiny(config):
    config.data.answer_padding = "none"
    config.diffusion.preference_draws = 4
    config.optimizer.learning_rate = 1e-3
    config.train.batch_size = 32
    config.train.steps = 100
    config.train.eval_every = 50
    config.train.checkpoint_every = 100
