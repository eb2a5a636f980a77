"""Optimizers and learning-rate schedules (optax)."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from llada_jax import config as config_lib
from llada_jax.model import lora

MUON_RMS = 0.2  # root mean square of a Muon update, that of AdamW, so that both share one learning rate (arXiv 2502.16982)
REDUCED = {  # matrices that Muon may orthogonalise: input and output dimensions, counted without the leading layer dimension
    "query": ((0,), (1, 2)), "key": ((0,), (1, 2)), "value": ((0,), (1, 2)), "output": ((0, 1), (2,)),
    "shared_gate": ((0,), (1,)), "shared_up": ((0,), (1,)), "shared_down": ((0,), (1,)),
}


def path_of(path: Any) -> str:
    """'stack_0/query' for a jax key path."""
    return "/".join(str(getattr(key, "key", key)) for key in path)


def learning_rate(config: config_lib.Optimizer, steps: int) -> optax.Schedule:
    """Learning rate by step: wsd (linear warm-up, constant, linear decay), cosine (warm-up, half cosine) or constant (warm-up)."""
    peak, warmup = config.learning_rate, min(config.warmup_steps, steps)
    final = peak * config.final_fraction
    ramp = optax.linear_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak)
    if config.schedule == "cosine":
        rest, joins = [optax.cosine_decay_schedule(peak, max(steps - warmup, 1), config.final_fraction)], [warmup]
    elif config.schedule == "wsd":
        decay = min(round(config.decay_fraction * steps), steps - warmup)
        rest = [optax.constant_schedule(peak), optax.linear_schedule(peak, final, max(decay, 1))]
        joins = [warmup, steps - decay]
    else:
        rest, joins = [optax.constant_schedule(peak)], [warmup]
    joined = optax.join_schedules([ramp, *rest], joins)
    return lambda step: jnp.maximum(joined(step + 1), 0.0)  # the first step already moves; the last may round below zero


def trainable(config: config_lib.Optimizer, params: Any) -> Any:
    """Which leaves are trained, a tree of bools: those that `optimizer.trainable` names; by default all, or the adapters alone, if there are any."""
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    adapted = config.trainable == ".*" and any(re.search(lora.PATTERN, path) for path in paths)
    pattern = lora.PATTERN if adapted else config.trainable
    return jax.tree.unflatten(jax.tree.structure(params), [re.search(pattern, path) is not None for path in paths])


def chosen(free: Any, params: Any) -> Any:
    """The leaves that are `free`, None in place of the others."""
    return jax.tree.map(lambda is_free, leaf: leaf if is_free else None, free, params)


def filled(some: Any, params: Any) -> Any:
    """`some` with the leaves of `params` where it has None."""
    return jax.tree.map(lambda leaf, other: other if leaf is None else leaf, some, params, is_leaf=lambda leaf: leaf is None)


def make(config: config_lib.Optimizer, steps: int, params: Any) -> optax.GradientTransformation:
    """The update rule: global-norm clipping, then AdamW, or Muon for matrices and AdamW for the rest; frozen leaves get zeros.

    Weight decay is decoupled and touches matrices only (no norms, no biases). Frozen leaves have no moments. Raises ConfigError when
    `optimizer.trainable` matches nothing, or weights that are not float32.
    """
    free = trainable(config, params)
    labels = jax.tree_util.tree_map_with_path(lambda path, leaf, is_free: _label(config, path, leaf) if is_free else "frozen", params, free)
    if set(jax.tree.leaves(labels)) == {"frozen"}:
        names = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise config_lib.ConfigError(f"optimizer.trainable={config.trainable!r} matches no parameter; paths are {', '.join(names[:6])}, …")
    narrow = [path_of(path) for path, leaf in jax.tree_util.tree_leaves_with_path(chosen(free, params)) if leaf.dtype != jnp.float32]
    if narrow:
        raise config_lib.ConfigError(f"optimizer.trainable={config.trainable!r} trains {narrow[0]}, which is not float32; "
                                     "set model.param_dtype=float32, or train adapters alone")
    adam = lambda decay: optax.adamw(learning_rate(config, steps), config.b1, config.b2, config.eps, weight_decay=decay)
    rules = {"matrix": adam(config.weight_decay), "vector": adam(0.0), "frozen": optax.set_to_zero()}
    if config.name == "muon":
        rules["muon"] = contrib.muon(
            learning_rate(config, steps), weight_decay=config.weight_decay, consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers=lambda tree: jax.tree_util.tree_map_with_path(_muon_dimensions, tree))
    update = optax.partition(rules, labels)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update) if config.clip_norm else update


def _label(config: config_lib.Optimizer, path: Any, leaf: Any) -> str:
    name = path_of(path).rsplit("/", 1)[-1]
    if name.endswith(("norm", "_bias")):
        return "vector"
    return "muon" if config.name == "muon" and _muon_dimensions(path, leaf) is not None else "matrix"


def _muon_dimensions(path: Any, leaf: Any) -> contrib.MuonDimensionNumbers | None:
    """Which axes of a stacked leaf (layer first) form the matrix; None for embeddings, head, router and norms."""
    name = path_of(path).rsplit("/", 1)[-1]
    if name in REDUCED:
        reduced, output = REDUCED[name]
        return contrib.MuonDimensionNumbers(tuple(i + 1 for i in reduced), tuple(i + 1 for i in output))
    if name in ("gate", "up", "down"):  # (L, E, in, out), or (L, in, out) in dense layers
        return contrib.MuonDimensionNumbers((leaf.ndim - 2,), (leaf.ndim - 1,))
    return None


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm over all leaves, accumulated in float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))
