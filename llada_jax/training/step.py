"""One training step, and K of them in one jitted call."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llada_jax import config as config_lib
from llada_jax import partitioning
from llada_jax.diffusion import blocks, conversion
from llada_jax.diffusion import corrupt as corrupt_lib
from llada_jax.diffusion import loss as loss_lib
from llada_jax.diffusion.likelihood import LEVELS
from llada_jax.model import moe
from llada_jax.model.transformer import LanguageModel
from llada_jax.training import optimizer as optimizer_lib
from llada_jax.training import preference
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


def corrupted(config: config_lib.Config, mask_id: int, batch: Batch, step: jax.Array) -> Batch:
    """The batch with its noise at this step: noisy (int32), masked (bool), p (float32) and block (int32), each (B, T).

    Under diffusion.complementary the rows with an odd index take the inverse of the mask that the row before them, the same sample, has.
    """
    diffusion, train = config.diffusion, config.train
    key, copies = (train.seed, step, DRAW), 1 + diffusion.complementary
    index_B, noise = batch["index"] // copies, corrupt_lib.Noise.of(diffusion, mask_id)
    if diffusion.complementary:
        noise = noise._replace(complementary=(batch["index"] % 2 == 1)[:, None])
    block_BT = blocks.ids(batch["position"], blocks.Schedule.of(config).size(step), diffusion.block_origin)
    unit_BT = {"sequence": jnp.zeros_like(block_BT), "segment": jnp.maximum(batch["segment"] - 1, 0),
               "block": blocks.units(block_BT, batch["segment"])}[diffusion.noise_unit]
    units = 1 if diffusion.noise_unit == "sequence" else batch["tokens"].shape[1]
    t_BU = corrupt_lib.times(key, index_B, units, train.batch_size // copies, diffusion.time_sampling)
    noisy_BT, masked_BT, p_BT = corrupt_lib.corrupt(key, index_B, batch["tokens"], batch["maskable"], unit_BT, noise, t_BU)
    return {**batch, "noisy": noisy_BT, "masked": masked_BT, "p": p_BT, "block": block_BT}


def masked_terms(model: LanguageModel, config: config_lib.Config, mask_id: int, variables: Any, batch: Batch, step: jax.Array,
                 clean_half: bool) -> tuple[loss_lib.Terms, Any]:
    """Terms of masked diffusion, in blocks or not, of a corrupted batch, and the router statistics.

    `clean_half` (`blocks.Schedule`) is right at every step, but needless where a block is the whole row; without it only such steps are right.
    """
    diffusion, key = config.diffusion, (config.train.seed, step, DRAW)
    weight = loss_lib.weight_function(diffusion.weighting, diffusion.schedule, diffusion.schedule_power, diffusion.min_noise, diffusion.max_noise)
    weight_fn, apply_fn, spec = weight, model.apply, attention_spec(batch)
    if diffusion.weighting in ("cart", "cart_elbo"):
        context_BT = conversion.context_weights(batch["masked"], batch["segment"], batch["block"], diffusion.cart_p)
        weight_fn = lambda p_BT: context_BT * weight(p_BT)
    if diffusion.mask_noise_std:
        std = diffusion.mask_noise_std * jnp.maximum(1 - step / diffusion.mask_noise_steps, 0.0)
        apply_fn = conversion.with_mask_noise(model.apply, model.embed, variables["params"]["embedding"], key, batch["index"],
                                              batch["tokens"].shape[1], mask_id, std)
    if diffusion.anneal_steps:
        spec = conversion.annealed(spec, key, batch["index"], step / diffusion.anneal_steps)
    confident = diffusion.confidence_coefficient > 0
    return loss_lib.elbo_terms(apply_fn, model.cross_entropy_and_entropy if confident else model.cross_entropy, variables, batch["tokens"],
                               batch["noisy"], batch["masked"], batch["p"], batch["position"], spec, weight_fn,
                               block_BT=batch["block"] if clean_half else None, with_entropy=confident)


def batch_loss(model: LanguageModel, config: config_lib.Config, mask_id: int, params: Any, rest: Any, batch: Batch, step: jax.Array,
               weight_BT: jax.Array, tokens: jax.Array, clean_half: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of one (micro-)batch, corrupted if the objective is: objective + router losses, and sums for the metrics.

    `weight` and `tokens` (real ones that the model sees) come from the whole batch, so that micro-batches add up to it; the balance
    and confidence losses alone are taken per micro-batch, over all devices, and averaged.
    """
    diffusion, train = config.diffusion, config.train
    variables = {"params": params, **rest}
    if diffusion.objective == "masked":
        p_BT = batch["p"]
        terms, stats = masked_terms(model, config, mask_id, variables, batch, step, clean_half)
    else:
        p_BT = jnp.zeros(batch["tokens"].shape, jnp.float32)
        terms, stats = loss_lib.next_token_terms(model.apply, model.cross_entropy, variables, batch["tokens"], batch["maskable"],
                                                 batch["position"], attention_spec(batch))
    loss = jnp.sum(weight_BT * terms.weighted_BT)
    level_BTS = jax.nn.one_hot(jnp.clip(jnp.floor(p_BT * LEVELS), 0, LEVELS - 1), LEVELS) * terms.predicted_BT[..., None]
    sums = {"loss": loss, "nll_S": jnp.einsum("BTS,BT->S", level_BTS, terms.nll_BT), "predicted_S": level_BTS.sum((0, 1))}
    total = loss
    if terms.entropy_BT is not None:
        sums["confidence"] = loss_lib.confidence_loss(terms) / train.accumulate
        total = total + diffusion.confidence_coefficient * sums["confidence"]
    if stats is not None:
        balance = moe.balance_loss(stats, diffusion.balance_form) / train.accumulate
        z = moe.z_sum(stats) / tokens
        total = total + diffusion.balance_coefficient * balance + diffusion.z_coefficient * z
        row_level_BS = jax.nn.one_hot(jnp.argmax(level_BTS.sum(1), axis=-1), LEVELS)
        overflow = stats.overflow_B.mean(0).sum() / tokens
        sums |= {"balance": balance, "z": z, "overflow": overflow, "load_SLE": jnp.einsum("BS,LBE->SLE", row_level_BS, stats.load_BE)}
    return total, {**sums, "total": total}


def gradients(model: LanguageModel, config: config_lib.Config, mask_id: int, variables: Any, batch: Batch, step: jax.Array,
              clean_half: bool | None = None) -> tuple[Any, dict[str, jax.Array]]:
    """Gradient of the whole batch's loss, summed over `train.accumulate` micro-batches, and the summed metrics. Frozen leaves get zeros, without
    a backward pass of theirs.

    `clean_half` says whether the clean half of block diffusion is computed: False serves the steps whose blocks are whole rows, at half the cost;
    None is what serves all steps of the schedule.
    """
    diffusion, parts = config.diffusion, config.train.accumulate
    if diffusion.objective == "preference":
        return preference.gradients(preference.Preference.of(diffusion), model, config, mask_id, variables, batch, step)
    clean_half = blocks.Schedule.of(config).clean_half() if clean_half is None else clean_half
    T = batch["tokens"].shape[1]
    batch = cut(batch, corrupt_lib.cut_length((config.train.seed, step, DRAW), T, diffusion.variable_length_rate, diffusion.variable_length_min))
    if diffusion.objective == "masked":
        batch = corrupted(config, mask_id, batch, step)
    weight_BT = loss_lib.term_weights(_targets(batch, diffusion), batch["segment"], diffusion.normalization)
    weight_BT = jnp.broadcast_to(weight_BT, batch["tokens"].shape)
    tokens = jnp.maximum((batch["segment"] > 0).sum(), 1).astype(jnp.float32) * (1 + clean_half)
    params, rest = variables["params"], {key: value for key, value in variables.items() if key != "params"}

    free = optimizer_lib.chosen(optimizer_lib.trainable(config.optimizer, params), params)
    whole = lambda found: (optimizer_lib.filled(found[0], jax.tree.map(jnp.zeros_like, params)), found[1])

    def one(micro: Batch, weight_BT: jax.Array):
        loss = lambda p: batch_loss(model, config, mask_id, optimizer_lib.filled(p, params), rest, micro, step, weight_BT, tokens, clean_half)
        return jax.grad(loss, has_aux=True)(free)

    if parts == 1:
        return whole(one(batch, weight_BT))
    # every micro-batch takes each parts-th row, so that it spreads over all devices
    split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1), (batch, weight_BT))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, *jax.tree.map(lambda x: x[0], split)))
    add = lambda sums, micro: (jax.tree.map(jnp.add, sums, one(*micro)), None)
    return whole(jax.lax.scan(add, zeros, split)[0])


def _targets(batch: Batch, diffusion: config_lib.Diffusion) -> jax.Array:
    """Positions that the loss is averaged over."""
    if diffusion.objective == "masked":
        return batch["masked" if diffusion.normalization == "masked" else "maskable"]
    follows = (batch["segment"][:, 1:] == batch["segment"][:, :-1]) & (batch["position"][:, 1:] == batch["position"][:, :-1] + 1)
    return jnp.pad(follows, ((0, 0), (1, 0))) & batch["maskable"]


def make_step(model: LanguageModel, optimizer: optax.GradientTransformation, config: config_lib.Config, mask_id: int,
              gradients: Callable[..., Any] = gradients) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """step(state, batch, seed) -> (state, metrics). A step with a non-finite loss or gradient changes nothing but the counters.

    `seed` may be traced, so that one compiled program serves all seeds; without one it is `train.seed`. `gradients` may be one with a `clean_half`,
    or with other settings of preference.py. The expert bias takes its own step (`moe.balanced_bias`), from the load of the whole batch under the
    bias it had.
    """
    decay, rate = config.optimizer.ema_decay, optimizer_lib.learning_rate(config.optimizer, config.train.steps)

    def step(state: TrainState, batch: Batch, seed: jax.Array | None = None) -> tuple[TrainState, dict[str, jax.Array]]:
        params = state.variables["params"]
        given = state.variables if state.reference is None else {**state.variables, "reference": state.reference}
        seeded = config if seed is None else dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
        grads, sums = gradients(model, seeded, mask_id, given, batch, state.step)
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


def make_call(step: Callable[..., tuple[TrainState, dict[str, jax.Array]]], shardings: Any = None) -> Callable[..., Any]:
    """call(state, batches_K, count, seed) -> (state, metrics_K), jitted: the first `count` of K steps in one loop, without the host. The state is
    donated.

    `count` is traced, so that a call that ends early (at a checkpoint, say) compiles nothing new. `shardings` of the state hold between
    the steps too: left open, the moments' finer split spreads to the weights, which are then gathered at each of their uses.
    """
    def call(state: TrainState, batches: Batch, count: jax.Array, seed: jax.Array | None = None) -> tuple[TrainState, dict[str, jax.Array]]:
        K = batches["tokens"].shape[0]
        pinned = lambda state: state if shardings is None else jax.lax.with_sharding_constraint(state, shardings)
        at = lambda i: jax.tree.map(lambda x: x[i], batches)
        empty = jax.tree.map(lambda x: jnp.zeros((K, *x.shape), x.dtype), jax.eval_shape(step, state, at(0), seed)[1])

        def body(i, carry):
            state, metrics = carry
            state, new = step(pinned(state), at(i), seed)
            state = pinned(state)
            return state, jax.tree.map(lambda buffer, value: buffer.at[i].set(value), metrics, new)
        return jax.lax.fori_loop(0, count, body, (state, empty))

    out = None if shardings is None else (shardings, partitioning.replicated(jax.tree.leaves(shardings)[0].mesh))
    return jax.jit(call, donate_argnums=0, out_shardings=out)


def calls(first: int, train: config_lib.Train, others: tuple[int, ...]) -> list[range]:
    """Steps of each jitted call: `steps_per_call` of them, fewer where a checkpoint, an evaluation, the end or one of `others` is due."""
    found, now = [], first
    while now < train.steps:
        due = [(now // every + 1) * every for every in (train.checkpoint_every, train.eval_every) if every]
        end = min(now + train.steps_per_call, train.steps, *due, *(step for step in others if step > now))
        found.append(range(now, end))
        now = end
    return found
