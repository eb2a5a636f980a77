"""One training step, and K of them in one jitted call."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llada_jax import config as config_lib
from llada_jax import partitioning
from llada_jax.diffusion import corrupt as corrupt_lib
from llada_jax.diffusion import loss as loss_lib
from llada_jax.diffusion.likelihood import LEVELS
from llada_jax.model import moe
from llada_jax.model.transformer import LanguageModel
from llada_jax.training import optimizer as optimizer_lib
from llada_jax.training.state import TrainState
from pallas_kernels.attention import AttentionSpec

Batch = dict[str, jax.Array]  # tokens, segment (0 = padding), position, each (B, T) int32; maskable (B, T) bool; index (B,) int32
DRAW = 0  # training's draw number; evaluation counts its own


def attention_spec(batch: Batch) -> AttentionSpec:
    """Positions see their own segment; padding is invisible."""
    return AttentionSpec.own(segment=batch["segment"], padding=batch["segment"] == 0)


def cut(batch: Batch, length: jax.Array) -> Batch:
    """Turn everything from position `length` on into padding, inside the static shape."""
    keep_T = jnp.arange(batch["tokens"].shape[1]) < length
    return {**batch, "segment": jnp.where(keep_T, batch["segment"], 0), "maskable": batch["maskable"] & keep_T}


def batch_loss(model: LanguageModel, config: config_lib.Config, mask_id: int, params: Any, rest: Any, batch: Batch, step: jax.Array,
               row_weight_B: jax.Array, tokens: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of one (micro-)batch: objective + router losses, and sums for the metrics.

    `row_weight` and `tokens` (real tokens) come from the whole batch, so that micro-batches add up to it; the balance
    loss alone is taken per micro-batch, over all devices, and averaged.
    """
    diffusion, train = config.diffusion, config.train
    variables, spec = {"params": params, **rest}, attention_spec(batch)
    if diffusion.objective == "masked":
        key = (train.seed, step, DRAW)
        unit_BT = jnp.maximum(batch["segment"] - 1, 0) if diffusion.noise_unit == "segment" else jnp.zeros_like(batch["segment"])
        units = batch["tokens"].shape[1] if diffusion.noise_unit == "segment" else 1
        t_BU = corrupt_lib.times(key, batch["index"], units, train.batch_size, diffusion.time_sampling)
        noise = corrupt_lib.Noise.of(diffusion, mask_id)
        noisy_BT, masked_BT, p_BT = corrupt_lib.corrupt(key, batch["index"], batch["tokens"], batch["maskable"], unit_BT, noise, t_BU)
        weight = loss_lib.weight_function(diffusion.weighting, diffusion.schedule, diffusion.schedule_power, diffusion.min_noise)
        terms, stats = loss_lib.elbo_terms(model.apply, model.cross_entropy, variables, batch["tokens"], noisy_BT, masked_BT, p_BT,
                                           batch["position"], spec, weight)
    else:
        p_BT = jnp.zeros(batch["tokens"].shape, jnp.float32)
        terms, stats = loss_lib.next_token_terms(model.apply, model.cross_entropy, variables, batch["tokens"], batch["maskable"],
                                                 batch["position"], spec)
    loss = jnp.sum(row_weight_B * terms.weighted_BT.sum(-1))
    level_BTS = jax.nn.one_hot(jnp.clip(jnp.floor(p_BT * LEVELS), 0, LEVELS - 1), LEVELS) * terms.predicted_BT[..., None]
    sums = {"loss": loss, "nll_S": jnp.einsum("BTS,BT->S", level_BTS, terms.nll_BT), "predicted_S": level_BTS.sum((0, 1))}
    total = loss
    if stats is not None:
        balance = moe.balance_loss(stats, diffusion.balance_form) / train.accumulate
        z = moe.z_sum(stats) / tokens
        total = loss + diffusion.balance_coefficient * balance + diffusion.z_coefficient * z
        row_level_BS = jax.nn.one_hot(jnp.argmax(level_BTS.sum(1), axis=-1), LEVELS)
        overflow = stats.overflow_B.mean(0).sum() / tokens
        sums |= {"balance": balance, "z": z, "overflow": overflow, "load_SLE": jnp.einsum("BS,LBE->SLE", row_level_BS, stats.load_BE)}
    return total, {**sums, "total": total}


def gradients(model: LanguageModel, config: config_lib.Config, mask_id: int, variables: Any, batch: Batch,
              step: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
    """Gradient of the whole batch's loss, summed over `train.accumulate` micro-batches, and the summed metrics. Frozen leaves get zeros, without
    a backward pass of theirs."""
    diffusion, parts = config.diffusion, config.train.accumulate
    T = batch["tokens"].shape[1]
    batch = cut(batch, corrupt_lib.cut_length((config.train.seed, step, DRAW), T, diffusion.variable_length_rate, diffusion.variable_length_min))
    row_weight_B = loss_lib.row_weights(_targets(batch, diffusion.objective), diffusion.normalization)
    tokens = jnp.maximum((batch["segment"] > 0).sum(), 1).astype(jnp.float32)
    params, rest = variables["params"], {key: value for key, value in variables.items() if key != "params"}

    free = optimizer_lib.chosen(optimizer_lib.trainable(config.optimizer, params), params)
    whole = lambda found: (optimizer_lib.filled(found[0], jax.tree.map(jnp.zeros_like, params)), found[1])

    def one(micro: Batch, row_weight_B: jax.Array):
        loss = lambda p: batch_loss(model, config, mask_id, optimizer_lib.filled(p, params), rest, micro, step, row_weight_B, tokens)
        return jax.grad(loss, has_aux=True)(free)

    if parts == 1:
        return whole(one(batch, row_weight_B))
    # every micro-batch takes each parts-th row, so that it spreads over all devices
    split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1), (batch, row_weight_B))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, *jax.tree.map(lambda x: x[0], split)))
    add = lambda sums, micro: (jax.tree.map(jnp.add, sums, one(*micro)), None)
    return whole(jax.lax.scan(add, zeros, split)[0])


def _targets(batch: Batch, objective: str) -> jax.Array:
    """Positions that the loss is averaged over."""
    if objective == "masked":
        return batch["maskable"]
    follows = (batch["segment"][:, 1:] == batch["segment"][:, :-1]) & (batch["position"][:, 1:] == batch["position"][:, :-1] + 1)
    return jnp.pad(follows, ((0, 0), (1, 0))) & batch["maskable"]


def make_step(model: LanguageModel, optimizer: optax.GradientTransformation, config: config_lib.Config, mask_id: int,
              gradients: Callable[..., Any] = gradients) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """step(state, batch) -> (state, metrics). A step with a non-finite loss or gradient changes nothing but the counters.

    `gradients` is that of another objective (preference.py). The expert bias takes its own step (`moe.balanced_bias`), from the load of the whole
    batch under the bias it had.
    """
    decay, rate = config.optimizer.ema_decay, optimizer_lib.learning_rate(config.optimizer, config.train.steps)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        params = state.variables["params"]
        given = state.variables if state.reference is None else {**state.variables, "reference": state.reference}
        grads, sums = gradients(model, config, mask_id, given, batch, state.step)
        grad_norm = optimizer_lib.global_norm(grads)
        finite = jnp.isfinite(sums["total"]) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        moved = {**state.variables, "params": optax.apply_updates(params, updates)}
        if config.optimizer.router_bias_rate:
            bias_LE = state.variables["router_bias"]["bias"]
            moved["router_bias"] = {"bias": moe.balanced_bias(bias_LE, sums["load_SLE"].sum(0), config.optimizer.router_bias_rate)}
        ema = None if state.ema is None else jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, moved["params"])
        variables, opt_state, ema = jax.tree.map(lambda a, b: jnp.where(finite, a, b), (moved, opt_state, ema),
                                                 (state.variables, state.opt_state, state.ema))
        bad = (~finite).astype(jnp.int32)
        state = TrainState(state.step + 1, variables, opt_state, ema, state.skipped + bad, (state.skipped_in_a_row + bad) * bad, state.reference)
        extra = {"grad_norm": grad_norm, "learning_rate": rate(state.step - 1), "skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
        return state, {**sums, **extra}

    return step


def make_call(step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]], shardings: Any = None) -> Callable[..., Any]:
    """call(state, batches_K, count) -> (state, metrics_K), jitted: the first `count` of K steps in one loop, without the host. The state is donated.

    `count` is traced, so that a call that ends early (at a checkpoint, say) compiles nothing new. `shardings` of the state hold between
    the steps too: left open, the moments' finer split spreads to the weights, which are then gathered at each of their uses.
    """
    def call(state: TrainState, batches: Batch, count: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        K = batches["tokens"].shape[0]
        pinned = lambda state: state if shardings is None else jax.lax.with_sharding_constraint(state, shardings)
        at = lambda i: jax.tree.map(lambda x: x[i], batches)
        empty = jax.tree.map(lambda x: jnp.zeros((K, *x.shape), x.dtype), jax.eval_shape(step, state, at(0))[1])

        def body(i, carry):
            state, metrics = carry
            state, new = step(pinned(state), at(i))
            state = pinned(state)
            return state, jax.tree.map(lambda buffer, value: buffer.at[i].set(value), metrics, new)
        return jax.lax.fori_loop(0, count, body, (state, empty))

    out = None if shardings is None else (shardings, partitioning.replicated(jax.tree.leaves(shardings)[0].mesh))
    return jax.jit(call, donate_argnums=0, out_shardings=out)
