"""The mixture of experts: routing and dispatch of one layer, and the router's losses over the global batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llada_jax import config as config_lib
from llada_jax import partitioning
from llada_jax.model import expert_choice, expert_parallel, functional
from pallas_kernels import grouped_matmul, routing


class RouterStats(NamedTuple):
    """Sums over the real (not padding) tokens of each row; float32. A leading L is added for the MoE layers of a model."""

    probability_BE: jax.Array  # router probability
    selected_BE: jax.Array  # times an expert is among the top-k of the plain probabilities
    load_BE: jax.Array  # times an expert was used (differs from `selected` under an expert bias)
    z_B: jax.Array  # logsumexp(router logits)^2
    tokens_B: jax.Array  # tokens counted
    overflow_B: jax.Array  # of these, how many went by the lossless branch, as some device had too little room (`expert_parallel`)


def moe(x_BTD: jax.Array, params: dict[str, Any], bias_E: jax.Array | None, valid_BT: jax.Array, config: config_lib.Model,
        kernels: config_lib.Kernels, mesh: jax.sharding.Mesh | None) -> tuple[jax.Array, RouterStats, dict[str, jax.Array]]:
    """Dropless mixture of SwiGLU experts (arXiv 2509.24389 §2): output (B, T, D), statistics, and what the router chose.

    Router logits, scores and the weighted sum are float32 (the sum over devices that split the experts is in the activations' dtype); scores are
    taken over all experts before top-k.
    Every device routes its own tokens; where the experts are split, `expert_parallel` takes tokens to them; where experts choose, every device has
    whole rows (`expert_choice`). Padding (`valid` false) counts in no statistic.
    """
    B, T, _ = x_BTD.shape
    spec = routing.RouterSpec(config.experts_per_token, config.router_renormalize, config.router_score, config.router_bias_in_weight,
                              config.router_groups, config.router_groups_kept, config.router_scale)
    by_expert = config.router_choice == "expert"

    def local(x_BTD, valid_BT, router_DE, gate_EDF, up_EDF, down_EFD, bias_E):
        here = x_BTD.shape[:2]
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
        logits_ME = x_MD.astype(jnp.float32) @ router_DE.astype(jnp.float32)
        swiglu = lambda rows_RD, sizes_E: grouped_matmul.grouped_swiglu(rows_RD, gate_EDF, up_EDF, down_EFD, sizes_E,
                                                                        implementation=kernels.grouped_matmul)
        over, choice = jnp.bool(False), {}
        if by_expert:
            _, _, token = routing.route(logits_ME, None, spec, implementation=kernels.routing)  # statistics of the scores
            y_BTD, load_BTE, choice = expert_choice.mixture(swiglu, x_BTD, logits_ME.reshape(*here, -1), valid_BT, config)
            y_MD, token = y_BTD.reshape(x_MD.shape), token._replace(load_ME=load_BTE.reshape(logits_ME.shape))
        elif len(gate_EDF) == config.num_experts:
            experts_MA, weights_MA, token, plan = routing.route_and_plan(logits_ME, bias_E, spec, implementation=kernels.routing)
            y_MD = routing.combine_rows(swiglu(routing.gather_rows(x_MD, plan), plan.group_sizes_E), weights_MA, plan)
        else:
            experts_MA, weights_MA, token = routing.route(logits_ME, bias_E, spec, implementation=kernels.routing)
            where = partitioning.EXPERT_AXIS
            if here == (B, T):
                y_MD = expert_parallel.summed(swiglu, len(gate_EDF), x_MD, experts_MA, weights_MA, where)
            else:
                y_MD, over = expert_parallel.mixture(swiglu, len(gate_EDF), config.num_experts, x_MD, experts_MA, weights_MA, where,
                                                     kernels.expert_dispatch)
        if gate_EDF.shape[-1] < config.expert_size:  # every device of the axis has made its share of the hidden width
            y_MD = jax.lax.psum(y_MD, partitioning.TENSOR_AXIS)
        unflat = lambda x: x.reshape(*here, *x.shape[1:])
        per_row = lambda x: jnp.einsum("BT...,BT->B...", unflat(x).astype(jnp.float32), valid_BT.astype(jnp.float32))
        tokens_B = valid_BT.sum(-1).astype(jnp.float32)
        stats = RouterStats(per_row(token.probability_ME), per_row(token.selected_ME), per_row(token.load_ME), per_row(token.z_M), tokens_B,
                            tokens_B * over)
        stats = stats if here[1] == T else jax.lax.psum(stats, partitioning.BATCH_AXES)  # other devices have other positions of these rows
        chosen = {"router_logits": unflat(logits_ME)} | (choice or {"experts": unflat(experts_MA), "weights": unflat(weights_MA)})
        return unflat(y_MD.astype(x_BTD.dtype)), stats, chosen

    tokens, split = ("batch", None if by_expert else "positions"), ("experts", "mlp")
    names = ("embed", None), ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
    router, inner, outer = (partitioning.Weight(name, split) for name in names)
    run = partitioning.over_shards(local, mesh, (tokens, tokens, router, inner, inner, outer, ()), [tokens, ("batch",), tokens])
    y_BTD, stats, chosen = run(x_BTD, valid_BT, params["router"], params["gate"], params["up"], params["down"], bias_E)
    if config.shared_expert_size:
        y_BTD = y_BTD + functional.swiglu(x_BTD, params["shared_gate"], params["shared_up"], params["shared_down"])
    return y_BTD, stats, chosen


def balance_loss(stats: RouterStats, form: str) -> jax.Array:
    """Load-balance loss E Σ_e f_e P_e over the global batch; balanced routing gives A, the experts a token.

    f_e is the mean number of times expert e is among a token's top-k, P_e its mean probability. `all_layers` takes one
    product of means over all layers and tokens (the reference's function), `per_layer` the mean of per-layer losses.
    `stats` has leading dimensions (L, B). It is a product of means: under gradient accumulation each micro-batch (over
    all devices) has its own, so the loss and gradient differ from those of the whole batch.
    """
    axes = (0, 1) if form == "all_layers" else (1,)
    tokens = jnp.maximum(stats.tokens_B.sum(axes), 1.0)[..., None]
    f = jax.lax.stop_gradient(stats.selected_BE.sum(axes)) / tokens
    P = stats.probability_BE.sum(axes) / tokens
    return jnp.mean(P.shape[-1] * jnp.sum(f * P, axis=-1))


def balanced_bias(bias_LE: jax.Array, load_LE: jax.Array, rate: float) -> jax.Array:
    """The expert bias after one step of balancing without a loss: up by `rate` where an expert was used less than the mean, down where more,
    then back to mean zero (DeepSeek-V3, arXiv 2412.19437 §2.1.2; the zero mean: Ling 2.0, arXiv 2510.22115).

    `load` counts uses by the real tokens of the global batch, float32. A layer in which nothing was counted keeps its bias.
    """
    moved_LE = bias_LE + rate * jnp.sign(load_LE.mean(-1, keepdims=True) - load_LE)
    return jnp.where(load_LE.sum(-1, keepdims=True) > 0, moved_LE - moved_LE.mean(-1, keepdims=True), bias_LE)


def z_sum(stats: RouterStats) -> jax.Array:
    """Sum over tokens of the layer-mean logsumexp(router logits)^2; divided by the number of tokens it is the z-loss."""
    return jnp.mean(stats.z_B.sum(-1))
