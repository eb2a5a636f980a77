"""What every config file shares: the defaults and the parser of `--config=configs/x.py:name=value,…`."""

import ml_collections

from llada_jax import config as config_lib


def default_config() -> ml_collections.ConfigDict:
    """All settings at their defaults (`llada_jax/settings.py`), locked against unknown keys."""
    return config_lib.to_config_dict(config_lib.Config())


def on_a_pod(config: ml_collections.ConfigDict, sequence_length: int, batch_size: int, steps: int, learning_rate: float) -> None:
    """Pre-training settings that the large configs share: LLaDA's warm-up and its kind of run, memory before speed, kept checkpoints."""
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "full"
    config.data.sequence_length = sequence_length
    config.data.vocab_size = 16_384
    config.optimizer.learning_rate = learning_rate
    config.optimizer.warmup_steps = 2000
    config.train.batch_size = batch_size
    config.train.steps = steps
    config.train.checkpoint_every = config.train.eval_every = 1000
    config.train.keep_every = 10_000


MESHES = {  # by name: axes, rows a step and micro-batches; 256 rows of 4096 tokens are 2^20 of them
    "v5e-256": (dict(fsdp=32, expert=8), 256, 1),
    "2xv5e-256": (dict(data=2, fsdp=32, expert=8), 512, 1),  # two slices: gradients, and weights that the other updated, pass between them
    "v5p-128": (dict(fsdp=8, expert=8), 256, 1),  # 64 chips
    "v6e-256": (dict(fsdp=32, expert=8), 256, 1),
    "8xh100": (dict(fsdp=8), 256, 8),
    "8xh200": (dict(fsdp=8), 256, 4),
}


def on_mesh(config: ml_collections.ConfigDict, name: str) -> None:
    """Mesh, batch and micro-batches of a named machine; "" leaves one axis for whatever devices there are."""
    if not name:
        config.mesh.data, config.mesh.fsdp = 1, -1
        return
    one_of("mesh", name, MESHES)
    axes, config.train.batch_size, config.train.accumulate = MESHES[name]
    config.mesh.update({"data": 1, **axes})


def short(config: ml_collections.ConfigDict, steps: int, seed: int) -> ml_collections.ConfigDict:
    """A run of an ablation: so many steps, measured on all held-out rows when they are done."""
    config.train.steps = config.train.checkpoint_every = config.train.eval_every = steps
    config.train.eval_batches = 0
    config.train.seed = seed
    return config


def ablation(arg: str | None, variants, base: ml_collections.ConfigDict, steps: int, batch_size: int = 0) -> tuple[ml_collections.ConfigDict, str]:
    """(`base` as a short run, name of the variant) of an ablation's `variant=NAME,seed=N`; the first variant by default."""
    arg = parse_arg(arg, variant=next(iter(variants)), seed=0)
    one_of("variant", arg.variant, variants)
    base.train.batch_size = batch_size or base.train.batch_size
    return short(base, steps, arg.seed), arg.variant


def parse_arg(arg: str | None, **defaults):
    """Parse `name=value,name=value` into a ConfigDict with the defaults' types; unknown names are errors.

    A lone name switches a boolean on: `tiny` equals `tiny=True`.
    """
    values = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        name, has_value, text = part.partition("=")
        if name not in defaults:
            raise config_lib.ConfigError(f"unknown config argument '{name}'; this config knows: {', '.join(defaults) or 'none'}")
        default = defaults[name]
        if isinstance(default, bool):
            if has_value and text not in ("True", "False", "true", "false", "0", "1"):
                raise config_lib.ConfigError(f"config argument {name}={text!r} is a switch: use {name}=True or {name}=False")
            values[name] = not has_value or text in ("True", "true", "1")
        elif not has_value:
            raise config_lib.ConfigError(f"config argument '{name}' needs a value, for example {name}={default}")
        else:
            try:
                values[name] = type(default)(text)
            except ValueError:
                raise config_lib.ConfigError(f"config argument {name}={text!r} is not a {type(default).__name__} such as {default!r}") from None
    return ml_collections.ConfigDict(values)


def one_of(name: str, value: str, known) -> None:
    """Raise ConfigError unless `value` is one of the known names."""
    if value not in known:
        raise config_lib.ConfigError(f"config argument {name}={value!r} is not one of {', '.join(known)}")
