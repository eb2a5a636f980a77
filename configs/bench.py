"""What `python -m llada_jax.bench` measures by default: an 11.6 M-parameter LLaDA-MoE in float32, of a size that two CPU cores run in seconds.

    python -m llada_jax.bench forward --config=configs/bench.py
    python -m llada_jax.bench train --config=configs/bench.py
    python -m llada_jax.bench sample --config=configs/bench.py

Its tokens are random there; `bench` takes the preset of its command. `task=train` has its layers unrolled and one device, whose matrix products use
both cores: a step took 10 and 7 % less time than with a scan over the layers and one device a core. `task=sample` has them unrolled too and
splits heads, hidden widths and vocabulary over a device a core: 10 % less time than splitting experts and positions, whose experts are not
equally busy, and that took 8 to 25 % less than one device and a scan. `forward` is fastest with
the scan and its rows split over a device a core (two cores of an AMD EPYC virtual machine, 2026-11-26). The config trains like any other, on
the standard library unless `data.sources` says otherwise.
"""

from configs import common


def get_config(arg=None):
    """The settings of `task=forward`, `train` (the default) or `sample`. Raises ConfigError for another task."""
    task = common.parse_arg(arg, task="train").task
    common.one_of("task", task, ("forward", "train", "sample"))
    config = common.default_config()
    config.model.vocab_size = 8192
    config.model.hidden_size = 256
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.num_experts = 16
    config.model.experts_per_token = 4
    config.model.expert_size = 128
    config.model.init_std = 0.0  # logits of unit variance, so that few tokens of a decode are near ties
    config.data.sequence_length = 256
    config.diffusion.variable_length_rate = 0.0
    config.train.batch_size = 8
    config.train.steps_per_call = 10
    if task != "forward":
        config.model.scan_layers = False
        config.mesh.data = 1
    if task == "sample":
        config.mesh.tensor = -1
    return config
