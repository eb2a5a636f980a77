"""Preference optimisation on likelihood bounds: DPO for masked diffusion with VRPO's reduced variance (LLaDA 1.5, arXiv 2505.19223).

log-likelihoods, which the model does not give, are replaced by estimates of their bound (ELBO). As the loss is not linear in them, their noise
biases it, by no more than a power of the variance of `margin`. Three things lower that without another network call: more draws; each with a noise
level of its own, rather than several masks a level; and above all the same masks for the policy and the reference. A fourth one, levels that run
evenly round all of them, is ours here. Masks are of an exact count, with weight L/k, as 1/t has a heavy tail.

`diffusion.objective=preference` trains so. The frozen weights that the policy is compared with are `TrainState.reference`, those that the run began
with; with adapters there are none: then it is the base without them. The bound is that of whole answers, not of blocks.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llada_jax import config as config_lib
from llada_jax.config import ConfigError
from llada_jax.diffusion import corrupt as corrupt_lib
from llada_jax.diffusion import loss as loss_lib
from llada_jax.diffusion.likelihood import LEVELS
from llada_jax.model import lora, moe
from llada_jax.model.transformer import LanguageModel
from llada_jax.training import optimizer as optimizer_lib
from pallas_kernels.attention import AttentionSpec

Batch = dict[str, jax.Array]  # as in step.py; rows 2i and 2i + 1 are the chosen and the rejected answer of a pair


@dataclasses.dataclass(frozen=True)
class Preference:
    """Objective and estimator; the defaults are the published ones, and `stratified`. Raises ConfigError for numbers that cannot be."""

    beta: float = 0.2  # reward a nat (LLaDA 1.5: 0.2; LLaDA2.0: 0.1)
    times: int = 8  # noise levels of an answer, n_t
    masks: int = 1  # masks of each level, n_m
    stratified: bool = True  # the levels run evenly round 1..L from one random start, else each is drawn by itself
    shared: bool = True  # policy and reference see the same masks

    @classmethod
    def of(cls, config: config_lib.Diffusion) -> "Preference":
        return cls(config.preference_beta, config.preference_draws)

    def __post_init__(self):
        if self.beta <= 0 or self.times < 1 or self.masks < 1:
            raise ConfigError(f"preference: beta={self.beta} must be positive, times={self.times} and masks={self.masks} at least 1")


class Draw(NamedTuple):
    """What one draw finds of each row."""

    nats_B: jax.Array  # bound on -log p(answer | prompt) of the policy, nats
    reference_B: jax.Array  # the same of the reference
    p_B: jax.Array  # share of the answer that is masked
    nll_B: jax.Array  # sum of -log p(token) over the masked tokens of the policy, nats
    masked_B: jax.Array  # their number, float32
    stats: Any  # the policy's router statistics, with leading (L, B)


def draws(model: LanguageModel, variables: Any, reference: Any, batch: Batch, key: tuple[jax.Array | int, jax.Array | int],
          mask_id: int, settings: Preference) -> Draw:
    """All draws of a batch of rows, each field with a leading draw dimension; their means are the estimates. Only `variables` has a gradient.

    key = (seed, step). A row's masks depend on (seed, step, sample index, draw, position) alone. Draws go one by one, in the backward pass too,
    where they are made again: memory is that of one.
    """
    length_B, spec = jnp.maximum(batch["maskable"].sum(-1), 1), AttentionSpec.own(segment=batch["segment"], padding=batch["segment"] == 0)
    noise, unit_BT = corrupt_lib.Noise(mask_id, corruption="exact_count"), jnp.zeros_like(batch["tokens"])
    total = settings.times * settings.masks

    def terms(variables: Any, draw: jax.Array, number: jax.Array) -> tuple[jax.Array, loss_lib.Terms, Any]:
        """`number`: what the masks are keyed by."""
        level = number // settings.masks  # of those that share a noise level
        one_start = number // total * total  # for all levels
        u_B = corrupt_lib.sample_uniforms((*key, one_start if settings.stratified else level), batch["index"], corrupt_lib.TIME, 1)[:, 0]
        start_B = jnp.minimum((u_B * length_B).astype(jnp.int32), length_B - 1)
        ahead_B = (2 * (draw // settings.masks) * length_B + settings.times) // (2 * settings.times) if settings.stratified else 0
        t_B = ((start_B + ahead_B) % length_B + 0.5) / length_B
        noisy_BT, masked_BT, p_BT = corrupt_lib.corrupt((*key, number), batch["index"], batch["tokens"], batch["maskable"], unit_BT, noise,
                                                        t_B[:, None])
        found, stats = loss_lib.elbo_terms(model.apply, model.cross_entropy, variables, batch["tokens"], noisy_BT, masked_BT, p_BT,
                                           batch["position"], spec, lambda p: 1 / p)
        return jnp.where(masked_BT, p_BT, 0.0).max(-1), found, stats

    @jax.checkpoint
    def one(draw: jax.Array) -> Draw:
        p_B, mine, stats = terms(variables, draw, draw)
        frozen = jax.lax.stop_gradient(reference)
        _, theirs, _ = terms(frozen, draw, draw if settings.shared else total + draw)
        return Draw(mine.weighted_BT.sum(-1), jax.lax.stop_gradient(theirs.weighted_BT.sum(-1)), p_B, mine.nll_BT.sum(-1),
                    mine.predicted_BT.sum(-1), stats)

    return jax.lax.map(one, jnp.arange(total))


def margins(found: Draw, beta: float) -> jax.Array:
    """Reward of the chosen answer over the rejected one of each pair (rows 2i and 2i + 1): β ((B_θ - B_ref)(chosen) - (B_θ - B_ref)(rejected)), B the
    mean over draws of the bound on log p; its loss is -log sigmoid (arXiv 2505.19223 eq. 5)."""
    gain_B = (found.reference_B - found.nats_B).mean(0)
    return beta * (gain_B[::2] - gain_B[1::2])


def reference_of(variables: Any) -> Any:
    """The variables of the frozen model: `reference` in place of the parameters, or, without one, these with their adapters at zero."""
    rest = {key: value for key, value in variables.items() if key not in ("params", "reference")}
    if "reference" in variables:
        return {**rest, "params": variables["reference"]}
    off = lambda path, leaf: jnp.zeros_like(leaf) if optimizer_lib.path_of(path).endswith(lora.B) else leaf
    params = jax.tree_util.tree_map_with_path(off, variables["params"])
    if not any(optimizer_lib.path_of(path).endswith(lora.B) for path, _ in jax.tree_util.tree_leaves_with_path(params)):
        raise ConfigError("preference optimisation needs frozen weights: give the state a reference, or the model adapters (model.lora_rank)")
    return {**rest, "params": params}


def batch_loss(model: LanguageModel, config: config_lib.Config, mask_id: int, settings: Preference, variables: Any, reference: Any,
               batch: Batch, step: jax.Array, pairs: int) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum over a (micro-)batch's pairs of -log sigmoid(margin), over all `pairs` of the step, with router losses; and sums for the metrics."""
    found = draws(model, variables, reference, batch, (config.train.seed, step), mask_id, settings)
    margin_P = margins(found, settings.beta)
    loss = jax.nn.softplus(-margin_P).sum() / pairs
    level_DBS = jax.nn.one_hot(jnp.clip(jnp.floor(found.p_B * LEVELS), 0, LEVELS - 1), LEVELS)
    sums = {"loss": loss, "nll_S": jnp.einsum("DBS,DB->S", level_DBS, found.nll_B), "predicted_S": jnp.einsum("DBS,DB->S", level_DBS, found.masked_B),
            "reward_margin": margin_P.sum() / pairs, "reward_accuracy": (margin_P > 0).sum() / pairs}
    total = loss
    if found.stats is not None:  # of all draws, as if they were rows
        stats = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), found.stats)
        share = len(margin_P) / pairs
        balance = moe.balance_loss(stats, config.diffusion.balance_form) * share
        z, overflow = (x * share / jnp.maximum(stats.tokens_B[0].sum(), 1.0) for x in (moe.z_sum(stats), stats.overflow_B.mean(0).sum()))
        total = loss + config.diffusion.balance_coefficient * balance + config.diffusion.z_coefficient * z
        sums |= {"balance": balance, "z": z, "overflow": overflow,
                 "load_SLE": jnp.einsum("BS,LBE->SLE", level_DBS.reshape(-1, LEVELS), stats.load_BE)}
    return total, {**sums, "total": total}


def gradients(settings: Preference, model: LanguageModel, config: config_lib.Config, mask_id: int, variables: Any, batch: Batch,
              step: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
    """What `step.gradients` gives, of a batch of pairs."""
    params, parts, pairs = variables["params"], config.train.accumulate, len(batch["tokens"]) // 2
    if len(batch["tokens"]) % 2 or pairs % parts:
        raise ConfigError(f"{len(batch['tokens'])} rows are not pairs in {parts} micro-batches; use {2 * parts} rows or a multiple of it")
    rest = {key: value for key, value in variables.items() if key not in ("params", "reference")}
    free, reference = optimizer_lib.chosen(optimizer_lib.trainable(config.optimizer, params), params), reference_of(variables)

    def one(micro: Batch):
        with_rest = lambda p: {"params": optimizer_lib.filled(p, params), **rest}
        return jax.grad(lambda p: batch_loss(model, config, mask_id, settings, with_rest(p), reference, micro, step, pairs), has_aux=True)(free)

    # every micro-batch takes each parts-th pair
    split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(pairs // parts, parts, 2, *x.shape[1:]), 0, 1).reshape(parts, -1, *x.shape[1:]), batch)
    if parts == 1:
        grads, sums = one(batch)
    else:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, jax.tree.map(lambda x: x[0], split)))
        grads, sums = jax.lax.scan(lambda total, micro: (jax.tree.map(jnp.add, total, one(micro)), None), zeros, split)[0]
    return optimizer_lib.filled(grads, jax.tree.map(jnp.zeros_like, params)), sums
