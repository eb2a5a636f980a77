"""Parameters and FLOPs in closed form."""

import math
from typing import NamedTuple

from llada_jax import config as config_lib
from llada_jax.diffusion import blocks
from llada_jax.model import lora, transformer


class Count(NamedTuple):
    """Numbers of parameters. `active` are those that one token passes through, with both embeddings."""

    total: int
    active: int
    input_embedding: int  # 0 when it is tied to the head, whose matmul counts
    experts: int
    adapters: int = 0  # of `total`; not `active`, since they are added to their weights, whatever the number of tokens


def parameters(config: config_lib.Model) -> Count:
    """Total and active parameters; 7,356,880,896 and 1,719,736,320 for LLaDA-MoE-7B-A1B."""
    D, V, E, A = config.hidden_size, config.vocab_size, config.num_experts, config.experts_per_token
    total = active = D + V * D * (1 if config.tie_embeddings else 2)
    experts = adapters = 0
    for _, kind, length in transformer.stacks(config):
        for name, parameter in transformer.layer_parameters(config, kind).items():
            size = length * math.prod(parameter.shape)
            total += size
            if name.endswith((lora.A, lora.B)):
                adapters += size
            elif kind == "moe" and name in ("gate", "up", "down"):
                experts += size
                active += size * A // E
            else:
                active += size
    return Count(total, active, 0 if config.tie_embeddings else V * D, experts, adapters)


def forward_flops(config: config_lib.Model, length: int, head_share: float = 1.0) -> float:
    """FLOPs a token of one forward pass over rows of `length`: 2 a multiply-add, full bidirectional attention.

    `head_share` is the share of positions whose logits are computed (about 0.5 in masked-diffusion training).
    """
    count = parameters(config)
    head = config.vocab_size * config.hidden_size
    matmuls = count.active - count.input_embedding - head
    attention = 2 * config.num_layers * length * config.num_heads * config.head_size
    return 2.0 * (matmuls + head_share * head + attention)


def train_flops(config: config_lib.Config, clean_half: bool | None = None) -> float:
    """FLOPs a token of one training step (`clean_half` as in `step.make_step`): three forward passes' worth; recomputation (remat) is not counted.

    The clean half of block diffusion goes through every matrix but the head. Both halves see about half of the row, so attention costs the same.
    Each draw of preference optimisation has a forward of the reference besides.
    """
    diffusion = config.diffusion
    share = 0.5 if diffusion.model_kind == "masked" else 1.0
    clean_half = blocks.Schedule.of(config).clean_half() if clean_half is None else clean_half
    passes = 4 * diffusion.preference_draws if diffusion.objective == "preference" else 3
    return passes * (forward_flops(config.model, config.data.sequence_length, share) + forward_flops(config.model, 0, 0.0) * clean_half)


def state_bytes(config: config_lib.Config) -> int:
    """Bytes of weights, gradients, moments, average and reference during training; activations are not counted."""
    size, moments = parameters(config.model), 2 if config.optimizer.name == "adamw" else 1
    weights = (4 if config.model.param_dtype == "float32" else 2) * (size.total - size.adapters) + 4 * size.adapters
    return weights * (1 + (config.optimizer.ema_decay > 0) + config.keeps_reference) + 4 * (size.adapters or size.total) * (1 + moments)
