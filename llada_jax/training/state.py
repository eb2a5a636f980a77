"""The training state: everything that a step changes and a checkpoint keeps. Data needs no state beyond (seed, step)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llada_jax import config as config_lib
from llada_jax import partitioning
from llada_jax.model.transformer import LanguageModel
from llada_jax.training import optimizer as optimizer_lib


class TrainState(NamedTuple):
    """Master weights and moments are float32."""

    step: jax.Array  # int32, optimizer steps taken or skipped
    variables: Any  # {"params": …, "router_bias": …}
    opt_state: Any
    ema: Any  # average of params, or None
    skipped: jax.Array  # int32, steps skipped for non-finite loss or gradients, in all
    skipped_in_a_row: jax.Array  # int32
    reference: Any = None  # frozen params that preference optimisation compares with, or None


def create(model: LanguageModel, optimizer: optax.GradientTransformation, config: config_lib.Config, seed: jax.Array | None = None) -> TrainState:
    """Fresh state from `seed`, by default `train.seed`; the same on every mesh."""
    variables = model.init(jax.random.key(config.train.seed if seed is None else seed))
    zero = lambda: jnp.zeros((), jnp.int32)  # each its own buffer: the state is donated
    ema = jax.tree.map(jnp.copy, variables["params"]) if config.optimizer.ema_decay else None
    reference = jax.tree.map(jnp.copy, variables["params"]) if config.keeps_reference else None
    return TrainState(zero(), variables, optimizer.init(variables["params"]), ema, zero(), zero(), reference)


def shardings(model: LanguageModel, state: Any, mesh: jax.sharding.Mesh) -> Any:
    """Sharding of every leaf of a (possibly abstract) state: weights by their logical axes, moments like their weight and
    split over the copies of the model besides."""
    variables = partitioning.shardings_of(mesh, model.axes, model.shapes)
    by_path = {optimizer_lib.path_of(path): (leaf.shape, sharding) for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(model.shapes["params"]), jax.tree.leaves(variables["params"]), strict=True)}

    def moment(path: Any, leaf: Any) -> Any:
        parts = optimizer_lib.path_of(path).split("/")
        for i in range(len(parts)):
            shape, sharding = by_path.get("/".join(parts[i:]), (None, None))
            if shape == leaf.shape:
                return partitioning.split_over_copies(sharding, shape)
        return partitioning.replicated(mesh)

    scalar = partitioning.replicated(mesh)
    return TrainState(scalar, variables, jax.tree_util.tree_map_with_path(moment, state.opt_state),
                      None if state.ema is None else variables["params"], scalar, scalar,
                      None if state.reference is None else variables["params"])
