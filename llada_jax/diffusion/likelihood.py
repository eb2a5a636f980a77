"""Likelihoods: bounds of whole rows, and estimates of log p(answer | prompt) as LLaDA's evaluation makes them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax import shapes
from llada_jax.config import ConfigError
from llada_jax.diffusion import blocks
from llada_jax.diffusion import corrupt as corrupt_lib
from llada_jax.diffusion import loss as loss_lib
from pallas_kernels.attention import AttentionSpec

BOUND, CONDITIONAL = 0, 1  # what takes the place of the training step in the noise of evaluations
ROWS = 256  # positions whose logits exist at one time, where the head is not fused with what follows
LEVELS = 8  # bins of the mask probability in reports by noise level


class Bound(NamedTuple):
    """One draw's estimate for each row, and of its U units (the row, or its blocks)."""

    nats_B: jax.Array  # upper bound on -log p(row), nats
    p_BU: jax.Array  # share of tokens masked; 0 where a unit holds none
    nll_BU: jax.Array  # mean -log p(token) over the masked tokens, nats


def bound(apply_fn: Callable[..., Any], cross_entropy_fn: Callable[..., Any], variables: Any, batch: dict[str, jax.Array], spec: AttentionSpec,
          mask_id: int, seed: int, draw: jax.Array, draws: int, block_BT: jax.Array | None = None) -> Bound:
    """Unbiased estimate of the negative ELBO of each row: k of its L target tokens masked, weight L/k. With `block` (`blocks.ids`) it is that of
    block diffusion, of every block by itself after clean earlier ones: k of a block's L tokens (exact where L is 1).

    k is uniform in 1..L and stratified: rows (and blocks) are spread evenly by the golden ratio (and √2) from an offset drawn by the seed, and
    the `draws` draws of a row evenly between them. The masks depend on (seed, sample index, draw, position) alone, so that every
    evaluation sees the same noise. Exact-count masks with weight L/k vary far less than 1/t (arXiv 2502.09992 eq. 6).
    """
    noise = corrupt_lib.Noise(mask_id, corruption="exact_count")
    shift = jax.random.uniform(jax.random.fold_in(jax.random.key(seed), 0))
    golden_B = (batch["index"].astype(jnp.uint32) * jnp.uint32(2654435769)).astype(jnp.float32) * 2.0**-32  # 2^32 / golden ratio, mod 1
    unit_BT, units = jnp.zeros_like(batch["tokens"]), 1
    if block_BT is not None:
        unit_BT, units = blocks.units(block_BT, batch["segment"]), block_BT.shape[1]
    t_BU = ((golden_B[:, None] + shift + jnp.arange(units) * 0.41421356) % 1.0 + draw) / draws
    noisy_BT, masked_BT, p_BT = corrupt_lib.corrupt((seed, BOUND, draw), batch["index"], batch["tokens"], batch["maskable"], unit_BT, noise, t_BU)
    terms, _ = loss_lib.elbo_terms(apply_fn, cross_entropy_fn, variables, batch["tokens"], noisy_BT, masked_BT, p_BT, batch["position"], spec,
                                   lambda p: 1 / p, block_BT=block_BT)
    rows_B1, zero_BU = jnp.arange(len(unit_BT))[:, None], jnp.zeros((len(unit_BT), units), jnp.float32)
    nll_BU, count_BU = (zero_BU.at[rows_B1, unit_BT].add(x_BT) for x_BT in (terms.nll_BT, terms.predicted_BT))
    p_BU = zero_BU.at[rows_B1, unit_BT].max(jnp.where(masked_BT, p_BT, 0.0))
    return Bound(terms.weighted_BT.sum(-1), p_BU, nll_BU / jnp.maximum(count_BU, 1.0))


def exact(apply_fn: Callable[..., Any], cross_entropy_fn: Callable[..., Any], variables: Any, batch: dict[str, jax.Array],
          spec: AttentionSpec) -> Bound:
    """-log p(row) of an autoregressive model in the same form; the first token of each segment is not predicted."""
    terms, _ = loss_lib.next_token_terms(apply_fn, cross_entropy_fn, variables, batch["tokens"], batch["maskable"], batch["position"], spec)
    nats_B, count_B = terms.nll_BT.sum(-1), jnp.maximum(terms.predicted_BT.sum(-1), 1.0)
    return Bound(nats_B, jnp.ones_like(nats_B)[:, None], (nats_B / count_B)[:, None])


@dataclasses.dataclass(frozen=True)
class Estimator:
    """How log p(answer | prompt) is estimated. Raises ConfigError for numbers that do not fit.

    exact_count: k of the L answer tokens are masked, weight L/k (LLaDA, arXiv 2502.09992 eq. 6 and its get_log_likelihood).
    time: each answer token is masked with probability t, weight 1/t (eq. 4). Unbiased too, but its variance has no limit: t may be small.
    """

    noise: str = "exact_count"  # exact_count | time
    draws: int = 128  # masks for each answer; one of a single token needs one forward and is exact
    group: int = 16  # draws whose noise levels run evenly round all levels, from one random start; divides `draws` (LLaDA's batch)
    guidance: float = 0.0  # how far logits move away from those without the prompt; 0 = off, else twice the work

    def __post_init__(self):
        if self.noise not in ("exact_count", "time"):
            raise ConfigError(f"likelihood.noise={self.noise!r} must be exact_count or time")
        if self.draws < 1 or self.group < 1 or self.draws % self.group:
            whole = max(-(-self.draws // max(self.group, 1)), 1) * max(self.group, 1)
            raise ConfigError(f"likelihood.draws={self.draws} must be a multiple of likelihood.group={self.group}, at least 1; use "
                              f"draws={whole} or group={max(self.draws, 1)}")
        if not 0 <= self.guidance < np.inf:
            raise ConfigError(f"likelihood.guidance={self.guidance} must be a finite number, at least 0")


class Denoiser(NamedTuple):
    """A model as functions; see `model.transformer.LanguageModel`."""

    apply: Callable[..., Any]
    cross_entropy: Callable[..., Any]
    head: Callable[..., Any]


class Conditional(NamedTuple):
    """Estimates for the rows of a batch."""

    nats_B: jax.Array  # upper bound on -log p(answer | prompt), nats; exact for an answer of one token
    error_B: jax.Array  # its standard error, from the means of groups of draws; NaN for one group, 0 where exact
    forwards: jax.Array  # int32, model calls


def pack(requests: Sequence[tuple[Sequence[int], Sequence[int]]], names: Sequence[int], rows: int, length: int, mask_id: int,
         pad_id: int) -> dict[str, np.ndarray]:
    """(prompt, answer) pairs as a batch of `rows` rows of `length`, prompt first, padded on the right; the last request fills up the rows.

    `names` are the sample indices that settle each request's noise, int32. A prompt may be empty. Raises ConfigError for an empty
    answer, a request longer than `length` and a mask token in it.
    """
    tokens_BT = np.full((rows, length), pad_id, np.int32)
    answer_BT, valid_BT = np.zeros((rows, length), bool), np.zeros((rows, length), bool)
    for b in range(rows):
        i = min(b, len(requests) - 1)
        prompt, answer = requests[i]
        check(prompt, answer, length, mask_id, f"request {i}")
        end = len(prompt) + len(answer)
        tokens_BT[b, :end] = [*prompt, *answer]
        answer_BT[b, len(prompt) : end], valid_BT[b, :end] = True, True
    index_B = np.asarray([names[min(b, len(requests) - 1)] for b in range(rows)], np.int32)
    position_BT = np.broadcast_to(np.arange(length, dtype=np.int32), tokens_BT.shape).copy()
    return {"tokens": tokens_BT, "answer": answer_BT, "valid": valid_BT, "position": position_BT, "index": index_B}


def check(prompt: Sequence[int], answer: Sequence[int], length: int, mask_id: int, what: str) -> None:
    """Raise ConfigError, beginning with `what`, for what has no likelihood."""
    if not len(answer):
        raise ConfigError(f"{what} has an empty answer after {len(prompt)} prompt tokens: there is nothing whose likelihood could be estimated")
    if len(prompt) + len(answer) > length:
        raise ConfigError(f"{what}: {len(prompt)} prompt and {len(answer)} answer tokens are {len(prompt) + len(answer)}, longer than {length}; "
                          f"shorten the {'prompt' if len(answer) < length else 'answer'}")
    if mask_id in prompt or mask_id in answer:
        raise ConfigError(f"{what} holds the mask token (id {mask_id}), which is no text")


def conditional(model: Denoiser, variables: Any, batch: dict[str, jax.Array], mask_id: int, seed: int, estimator: Estimator,
                block_size: int = 0) -> Conditional:
    """Estimate -log p(answer | prompt) of each row of a `pack`ed batch; the prompt is never masked. With `block_size` the model is one of block
    diffusion (`blocks`), whose blocks run from the row's start; drawn over the whole answer, the masks of each block are as they should be.

    A row's masks depend on (seed, sample index, draw, position) alone. One compiled body serves all draws; a batch of one-token
    answers runs it once.
    """
    answer_BT = batch["answer"]
    shapes.check("BT BT BT BT B", *(batch[key] for key in ("tokens", "answer", "valid", "position", "index")))
    length_B = answer_BT.sum(-1)
    cross_entropy_fn, block_BT = model.cross_entropy, blocks.ids(batch["position"], block_size, "row") if block_size else None
    if estimator.guidance:
        given_BT = batch["valid"] & ~answer_BT
        model = guided(model, jnp.concatenate([given_BT] * 2, axis=1) if block_size else given_BT, mask_id, estimator.guidance)
        cross_entropy_fn = lambda variables, hidden_BTX, targets_BT, needed_BT: _cross_entropy(
            lambda hidden: model.head(variables, hidden), hidden_BTX, targets_BT, needed_BT)
    spec = AttentionSpec.own(padding=~batch["valid"])
    noise = corrupt_lib.Noise(mask_id, corruption="bernoulli" if estimator.noise == "time" else "exact_count")

    def one(draw, nats_DB):
        t_BU = levels(estimator, seed, draw, batch["index"], length_B)[:, None]
        noisy_BT, masked_BT, p_BT = corrupt_lib.corrupt((seed, CONDITIONAL, draw), batch["index"], batch["tokens"], answer_BT,
                                                        jnp.zeros_like(batch["tokens"]), noise, t_BU)
        terms, _ = loss_lib.elbo_terms(model.apply, cross_entropy_fn, variables, batch["tokens"], noisy_BT, masked_BT, p_BT, batch["position"],
                                       spec, lambda p: 1 / p, block_BT=block_BT)
        return nats_DB.at[draw].set(terms.weighted_BT.sum(-1))

    draws = jnp.where((length_B <= 1).all(), 1, estimator.draws)
    nats_DB = jax.lax.fori_loop(0, draws, one, jnp.zeros((estimator.draws, len(length_B)), jnp.float32))
    groups = estimator.draws // estimator.group
    mean_GB = nats_DB.reshape(groups, estimator.group, -1).mean(1)
    error_B = mean_GB.std(0, ddof=1) / groups**0.5 if groups > 1 else jnp.full(length_B.shape, jnp.nan)
    exact_B = length_B <= 1
    return Conditional(jnp.where(exact_B, nats_DB[0], mean_GB.mean(0)), jnp.where(exact_B, 0.0, error_B), draws)


def levels(estimator: Estimator, seed: int, draw: jax.Array, index_B: jax.Array, length_B: jax.Array) -> jax.Array:
    """Noise level t of a draw for each row, (B,) float32, with which `corrupt` masks k tokens, or each with probability t; 1 for one-token answers.

    Draw r of a group of R has t = (u + r / R) mod 1, or k = 1 + (k_0 - 1 + ⌊r L / R + 1/2⌋) mod L, with u or k_0 uniform and drawn by (seed,
    sample, group). As each k is then uniform in 1..L, the estimate is unbiased; LLaDA rounds halves to even, which makes even k likelier
    wherever r L / R ends in a half.
    """
    R, L_B = estimator.group, jnp.maximum(length_B, 1)
    r = draw % R
    u_B = corrupt_lib.sample_uniforms((seed, CONDITIONAL, draw // R), index_B, corrupt_lib.TIME, 1)[:, 0]
    if estimator.noise == "time":
        return jnp.where(length_B <= 1, 1.0, (u_B + r / R) % 1.0)
    start_B = jnp.minimum((u_B * L_B).astype(jnp.int32), L_B - 1)
    return ((start_B + (2 * r * L_B + R) // (2 * R)) % L_B + 0.5) / L_B


def is_greedy(model: Denoiser, variables: Any, batch: dict[str, jax.Array], mask_id: int, guidance: float = 0.0, block_size: int = 0) -> jax.Array:
    """Whether each row's answer is what greedy decoding writes: from masks alone, one token a forward, the most confident first; (B,) bool.

    As LLaDA's suffix_greedy_prediction, but a row stops at its first wrong token, as no token is written twice. The first slot
    wins ties. A model of block diffusion (`block_size`) fills block after block, and sees no later one.
    """
    tokens_BT, answer_BT = batch["tokens"], batch["answer"]
    if guidance:
        model = guided(model, batch["valid"] & ~answer_BT, mask_id, guidance)
    block_BT = blocks.ids(batch["position"], block_size, "row") if block_size else jnp.zeros_like(tokens_BT)
    spec = AttentionSpec.own(block=block_BT if block_size else None, padding=~batch["valid"])

    def propose(hidden_BCX):
        logprobs_BCV = jax.nn.log_softmax(model.head(variables, hidden_BCX).astype(jnp.float32))
        return jnp.argmax(logprobs_BCV, axis=-1), logprobs_BCV.max(-1)

    def step(carry):
        open_BT, right_B = carry
        hidden_BTX, _, _ = model.apply(variables, jnp.where(open_BT, mask_id, tokens_BT), batch["position"], None, spec, None, None)
        token_BT, logprob_BT = _in_pieces(propose, open_BT, hidden_BTX)
        now_BT = open_BT & (block_BT == jnp.min(jnp.where(open_BT, block_BT, block_BT.max()), axis=-1, keepdims=True))
        best_BT = jnp.arange(open_BT.shape[1]) == jnp.argmax(jnp.where(now_BT, logprob_BT, -jnp.inf), axis=-1)[:, None]
        best_BT &= open_BT
        right_B &= ((token_BT == tokens_BT) | ~best_BT).all(-1)
        return open_BT & ~best_BT & right_B[:, None], right_B

    return jax.lax.while_loop(lambda carry: carry[0].any(), step, (answer_BT, answer_BT.any(-1)))[1]


def guided(model: Denoiser, given_BT: jax.Array, mask_id: int, guidance: float) -> Denoiser:
    """Unsupervised classifier-free guidance (LLaDA): logits un + (guidance + 1)(cond - un), `un` from masks on all given slots.

    `apply` runs both canvases of a row side by side in one batch, hence on one device, and gives hidden states (B, T, 2, D) for `head`.
    """
    def apply(variables, tokens_BT, positions_BT, slots_BT, spec, cache, store_BT):
        B, T = tokens_BT.shape
        both = jnp.stack([tokens_BT, jnp.where(given_BT, mask_id, tokens_BT)], axis=1).reshape(2 * B, T)
        positions, spec = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), (positions_BT, spec))
        hidden, cache, stats = model.apply(variables, both, positions, slots_BT, spec, cache, store_BT)
        return jnp.moveaxis(hidden.reshape(B, 2, *hidden.shape[1:]), 1, 2), cache, stats

    def head(variables, hidden_BC2D):
        cond_BCV, un_BCV = jnp.moveaxis(model.head(variables, hidden_BC2D), 2, 0)
        return un_BCV + (guidance + 1) * (cond_BCV - un_BCV)

    return Denoiser(apply, None, head)


def _in_pieces(function: Callable[..., Any], needed_BT: jax.Array, *inputs: jax.Array) -> Any:
    """`function` of (B, C, ...) pieces of the inputs (B, T, ...), so that logits of all positions never exist together.

    A piece in which no row needs a position is left out; its results are zeros. Results are (B, T, ...).
    """
    B, T = needed_BT.shape
    C = min(max(ROWS // B, 1), T)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, -T % C), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(B, -1, C, *x.shape[2:]), 1, 0)

    def one(piece):
        needed_BC, inputs = piece
        nothing = lambda *inputs: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *inputs))
        return jax.lax.cond(needed_BC.any(), function, nothing, *inputs)

    results = jax.lax.map(one, (split(needed_BT), tuple(map(split, inputs))))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T], results)


def _cross_entropy(head_fn: Callable[..., Any], hidden_BTX: jax.Array, targets_BT: jax.Array, needed_BT: jax.Array) -> jax.Array:
    """-log p(target) in nats (B, T), float32, 0 where not needed, from logits."""
    def nll(hidden_BCX, targets_BC):
        logits_BCV = head_fn(hidden_BCX).astype(jnp.float32)
        return jax.nn.logsumexp(logits_BCV, axis=-1) - jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    return jnp.where(needed_BT, _in_pieces(nll, needed_BT, hidden_BTX, targets_BT), 0.0)
