"""Low-rank adapters (LoRA, arXiv 2106.09685): W + alpha / rank · A B in place of W, where A and B alone are trained.

They are parameters beside their weight, `query_lora_a` and `query_lora_b` of `query`; every expert has its own. The sum is made in float32 inside
the layer, whose code sees plain weights: exact, for every kernel and mesh. B begins at zero, so that the model begins as its base, bit for bit.
What it costs: one layer's weights at a time are added up and, going backwards, have a gradient, from which those of A and B are made. So a step
has the FLOPs of full training and 2 · rank for each weight more, and saves the memory of gradients and moments. With remat=none the sums of all
layers are kept besides, in the compute dtype; remat=dots or full makes them again.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from llada_jax import config as config_lib

A, B = "_lora_a", "_lora_b"
PATTERN = "_lora_[ab]$"  # of their paths
OFF = {field.name: field.default for field in dataclasses.fields(config_lib.Model) if field.name.startswith("lora_")}


def shapes(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], rank: int) -> tuple[tuple[Any, Any, int], tuple[Any, Any, int]]:
    """(shape, logical axes, fan-in) of A (…, in, rank) and of B (rank, out…), for one layer's weight of this shape. Both are split as it is."""
    expert = int(axes[0] == "experts")
    into = expert + (2 if name == "output" else 1)  # `output` takes heads and their dimension
    a = (*shape[:into], rank), (*axes[:into], None)
    b = (*shape[:expert], rank, *shape[into:]), (*axes[:expert], None, *axes[into:])
    return (*a, math.prod(shape[expert:into])), (*b, 0)


def adapted(config: config_lib.Model, name: str, fan_in: int) -> bool:
    """Whether this parameter of a layer has adapters: a matrix that `lora_targets` names in full."""
    return bool(config.lora_rank and fan_in and re.fullmatch(config.lora_targets, name))


def without(config: config_lib.Model) -> config_lib.Model:
    """The model of the merged weights."""
    return dataclasses.replace(config, **OFF)


def merge(weight: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """W + scale · A B, float32; any leading dimensions (layers, experts) that all three share."""
    lead = a.ndim + b.ndim - weight.ndim - 2
    letters = "ldefghij"[:weight.ndim]
    into = letters[:a.ndim - 1]
    delta = jnp.einsum(f"{into}r,{letters[:lead]}r{letters[len(into):]}->{letters}", a, b, precision=jax.lax.Precision.HIGHEST)
    return weight.astype(jnp.float32) + scale * delta


def merged(params: dict[str, jax.Array], config: config_lib.Model) -> dict[str, jax.Array]:
    """One layer's parameters with the adapters in them."""
    if not config.lora_rank:
        return params
    plain = {name: p for name, p in params.items() if not re.search(PATTERN, name)}
    scale = config.lora_alpha / config.lora_rank
    return {name: merge(p, params[name + A], params[name + B], scale) if name + A in params else p for name, p in plain.items()}
