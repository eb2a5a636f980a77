"""Public functions of routing: choose experts, plan the sorted rows, move rows there and back."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.routing import gpu, reference, tpu, vjp


class RouterSpec(NamedTuple):
    """Rule by which a router chooses: scores in float32, then top-k of score + bias, within the best groups of experts."""

    experts_per_token: int  # A
    renormalize: bool = False  # divide a token's mixing weights by their sum
    score: str = "softmax"  # softmax over all experts, or sigmoid of each
    bias_in_weight: bool = True  # the mixing weight keeps the bias (LLaDA-MoE), or the bias only selects (DeepSeek-V3, LLaDA2)
    groups: int = 1  # equal, contiguous groups of experts
    groups_kept: int = 1  # experts of other groups are not chosen; a group counts by the sum of its two best score + bias
    scale: float = 1.0  # the mixing weights are multiplied by this


class Stats(NamedTuple):
    """What the router losses and charts need of each token; float32. The caller leaves out padding."""

    probability_ME: jax.Array  # scores over their sum: the softmax, or normalised sigmoids
    selected_ME: jax.Array  # 1 for the top-k of the plain scores (the f of the load-balance loss, also under a bias or groups)
    load_ME: jax.Array  # 1 for the experts that are used
    z_M: jax.Array  # logsumexp(logits)², the z-loss (ST-MoE, arXiv 2202.08906 eq. 5)


class Plan(NamedTuple):
    """Order of the M·A (token, choice) pairs by expert, stable: R = M·A rows."""

    pair_R: jax.Array  # int32, m·A + a of each row
    row_MA: jax.Array  # int32, row of each pair: the inverse permutation, so that moves and their gradients gather both ways
    group_sizes_E: jax.Array  # int32, rows of each expert

    @property
    def token_R(self) -> jax.Array:  # noqa: N802
        """Source token of each row."""
        return self.pair_R // self.row_MA.shape[-1]


ROUTES = {"reference": reference.route, "tpu": functools.partial(vjp.route, tpu), "gpu": functools.partial(vjp.route, gpu)}
PREFERRED = {"tpu": "tpu", "gpu": "gpu"}
TRIANGLE = 256  # rows that are counted by one product


def route(logits_ME: jax.Array, bias_E: jax.Array | None, spec: RouterSpec, *,
          implementation: str | None = None) -> tuple[jax.Array, jax.Array, Stats]:
    """Experts (M, A) int32, best first and the lowest index first among equals, mixing weights (M, A) float32, and `Stats`.

    With an expert bias the top-k is of score + bias; `spec` says whether it is in the weight too. The bias is state and gets no
    gradient. Gradients flow through weights, probability and z, not through the choice. A row with NaN or infinity gets
    valid experts; its weights may be NaN. Raises ValueError for more experts a token than can be chosen.
    """
    _check(logits_ME, spec)
    experts_MA, weights_MA, stats = dispatch.choose("route", ROUTES, implementation, PREFERRED)(logits_ME, bias_E, spec)
    return experts_MA, weights_MA, Stats(*stats)


def plan(experts_MA: jax.Array, num_experts: int) -> Plan:
    """Stable counting sort of the (token, choice) pairs by expert; no comparison sort.

    A pair whose expert is outside [0, num_experts) comes after all groups: grouped operations give zeros there.
    """
    A = experts_MA.shape[1]
    experts_MA = jnp.where((experts_MA >= 0) & (experts_MA < num_experts), experts_MA, num_experts)
    count_ME = jax.nn.one_hot(experts_MA, num_experts + 1, dtype=jnp.int32).sum(1)
    before_ME, sizes_E = _counted_before(count_ME)
    first_ME = before_ME + _sum_before(sizes_E)
    row_MA = jnp.take_along_axis(first_ME, experts_MA, axis=1)
    earlier_A = jnp.tril(jnp.ones((A, A), bool), -1)  # a token may name an expert twice
    row_MA += ((experts_MA[:, :, None] == experts_MA[:, None, :]) & earlier_A).sum(-1, dtype=jnp.int32)
    return _plan(row_MA, sizes_E[:num_experts])


def _counted_before(count_ME):
    """Σ of the rows above each, and of all: products with triangles of ones, since XLA:CPU takes 20 times as long over a cumulative sum.

    Small integers are exact in float32, at the highest precision.
    """
    M, E = count_ME.shape
    size = min(M, TRIANGLE)
    padded_QCE = jnp.pad(count_ME, ((0, -M % size), (0, 0))).reshape(-1, size, E)
    triangle_CC = jnp.tril(jnp.ones((size, size), jnp.float32), -1)
    inside_QCE = jnp.einsum("CK,QKE->QCE", triangle_CC, padded_QCE.astype(jnp.float32), precision="highest").astype(jnp.int32)
    sizes_QE = padded_QCE.sum(1)
    before_QE = jnp.cumsum(sizes_QE, axis=0) - sizes_QE
    return (inside_QCE + before_QE[:, None]).reshape(-1, E)[:M], sizes_QE.sum(0)


def _sum_before(sizes_E):
    """Exclusive cumulative sum of a few numbers."""
    earlier_EE = jnp.tril(jnp.ones((len(sizes_E),) * 2, bool), -1)
    return jnp.where(earlier_EE, sizes_E, 0).sum(-1)


def _route_then_plan(logits_ME, bias_E, spec):
    experts_MA, weights_MA, stats = reference.route(logits_ME, bias_E, spec)
    return experts_MA, weights_MA, stats, plan(experts_MA, logits_ME.shape[-1])


def _plan_of_ranks(backend, logits_ME, bias_E, spec):
    """A pair's row is its expert's first row plus its rank there; a masked sum reads the first rows, as XLA gathers slowly on TPU."""
    experts_MA, weights_MA, stats, rank_MA, size_E = vjp.route_ranked(backend, logits_ME, bias_E, spec)
    first_E = jnp.cumsum(size_E) - size_E
    row_MA = rank_MA + jnp.where(experts_MA[:, :, None] == jnp.arange(len(size_E)), first_E, 0).sum(-1)
    return experts_MA, weights_MA, stats, _plan(row_MA, size_E)


ROUTES_WITH_PLAN = {"reference": _route_then_plan, "tpu": functools.partial(_plan_of_ranks, tpu),
                    "gpu": functools.partial(_plan_of_ranks, gpu)}


def route_and_plan(logits_ME: jax.Array, bias_E: jax.Array | None, spec: RouterSpec, *,
                   implementation: str | None = None) -> tuple[jax.Array, jax.Array, Stats, Plan]:
    """`route` and the `plan` of its experts. The kernels count the pairs while they choose, in one launch on a TPU and two on a GPU."""
    _check(logits_ME, spec)
    experts_MA, weights_MA, stats, order = dispatch.choose("route", ROUTES_WITH_PLAN, implementation, PREFERRED)(logits_ME, bias_E, spec)
    return experts_MA, weights_MA, Stats(*stats), order


@jax.custom_vjp
def gather_rows(x_MD: jax.Array, plan: Plan) -> jax.Array:
    """The source token's vector for every sorted row; (R, D), x's dtype. Its gradient gathers too and adds in float32."""
    return _take(x_MD, plan.token_R)


@jax.custom_vjp
def combine_rows(y_RD: jax.Array, weights_MA: jax.Array | None, plan: Plan) -> jax.Array:
    """Σ_a weight · y[row] of every token (None: of weight 1), added up in float32; (M, D), y's dtype. Its gradients gather too."""
    return _weighted_sum(y_RD, weights_MA, plan).astype(y_RD.dtype)


def _gather_forward(x_MD, plan):
    return gather_rows(x_MD, plan), plan


def _gather_backward(plan, dx_RD):
    return _weighted_sum(dx_RD, None, plan).astype(dx_RD.dtype), None


def _combine_forward(y_RD, weights_MA, plan):
    return combine_rows(y_RD, weights_MA, plan), (None if weights_MA is None else y_RD, weights_MA, plan)


def _combine_backward(saved, dout_MD):
    y_RD, weights_MA, plan = saved
    if y_RD is None:
        return _take(dout_MD, plan.token_R), None, None
    dy_RD = _take(dout_MD, plan.token_R) * _take(weights_MA.reshape(-1), plan.pair_R)[:, None]
    dweights_MA = jnp.einsum("MAD,MD->MA", _take(y_RD, plan.row_MA), dout_MD, preferred_element_type=jnp.float32)
    return dy_RD.astype(y_RD.dtype), dweights_MA.astype(weights_MA.dtype), None


gather_rows.defvjp(_gather_forward, _gather_backward)
combine_rows.defvjp(_combine_forward, _combine_backward)


def _check(logits_ME, spec):
    E = logits_ME.shape[-1]
    if E % spec.groups or not 1 <= spec.experts_per_token <= E // spec.groups * spec.groups_kept:
        raise ValueError(f"{spec.experts_per_token} experts a token out of {E} experts in {spec.groups} groups, of which {spec.groups_kept} are kept")


def _plan(row_MA, group_sizes_E):
    """The one scatter of the layer: integers, each to a place of its own."""
    row_R = row_MA.reshape(-1)
    pair_R = jnp.zeros_like(row_R).at[row_R].set(jnp.arange(row_R.size, dtype=jnp.int32), mode="promise_in_bounds", unique_indices=True)
    return Plan(pair_R, row_MA, group_sizes_E)


def _take(x_RD, row):
    return jnp.asarray(x_RD).at[row].get(mode="promise_in_bounds")


def _weighted_sum(y_RD, weights_MA, plan):
    """One gather a choice: XLA's CPU back end fuses each into the running sum, and no (M, A, D) array exists."""
    total_MD = jnp.float32(0)
    for a in range(plan.row_MA.shape[1]):
        y_MD = _take(y_RD, plan.row_MA[:, a]).astype(jnp.float32)
        total_MD += y_MD if weights_MA is None else y_MD * weights_MA[:, a, None]
    return total_MD
