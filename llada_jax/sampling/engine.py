"""The decoding loop: view → model → score → select → commit → advance, in one jitted `lax.while_loop` without a host round-trip.

Every state variable is per row, so rows sit in different blocks of the same forward and each advances by itself: model, cache (`cache.py`:
which slots a forward computes), iteration (this file: blocks, ends, counts) and decoder (`decoders.py`: what is written).
The model is given as functions, `Denoiser`; a toy will do.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llada_jax.config import ConfigError
from llada_jax.sampling import cache as cache_lib
from llada_jax.sampling import progress
from llada_jax.sampling.canvas import Canvas
from llada_jax.sampling.decoder import Decoder, Moment, blocks_of, guided, members, of_rows, sampling_of
from llada_jax.sampling.score import RANK, TOKEN, Noise, Proposal, Sampling, counter_noise, noise_keys, propose, uniform
from llada_jax.sampling.trace import GIVEN, Edits, Trace, logged
from pallas_kernels.attention import AttentionSpec


class Denoiser(NamedTuple):
    """A model as functions; hashable.

    apply(variables, tokens_BW, positions_BW, slots_BW, attention_spec, cache, store_BW, wanted_BC) -> (hidden_BCD, cache, stats); slots and
      store are None without a cache; a slot that the canvas does not have is T, and is neither seen nor kept
    head(variables, hidden_BCD) -> logits_BCV, float32; called on the slots of each row's block only
    init_cache(B, T) -> an empty cache
    embed(variables, tokens_BW, or weights_BCV of tokens) -> embeddings (B, W, D) that `apply` takes in place of tokens
    confidence(variables, hidden_BCD, keys_BC2, temperature, suppressed) -> a Confidence of arrays (B, C), made without logits, or None
    whole_rows(arrays (B, C)) -> the same, where devices have parts of one row: the little that follows a forward would cost more to split
    """

    apply: Callable[..., Any]
    head: Callable[..., Any]
    init_cache: Callable[[int, int], Any] | None = None
    confidence: Callable[..., Any] | None = None
    embed: Callable[..., Any] | None = None
    whole_rows: Callable[..., Any] | None = None

    @classmethod
    def of(cls, model: Any) -> "Denoiser":
        """Of what has functions of these names."""
        return cls(*(getattr(model, name, None) for name in cls._fields))


class Carry(NamedTuple):
    """State of the loop."""

    tokens_BT: jax.Array  # int32, the canvas
    kv: Any  # the model's cache
    soft_BCD: Any  # what the block's open slots carry in the next forward beside the mask's embedding; None without smoothing
    cache: Any  # the cache manager's state, a pytree of (B, ...) arrays
    decoder: Any  # the decoder's own state, a pytree of (B, ...) arrays
    block_B: jax.Array  # int32, the block that each row is writing
    step_B: jax.Array  # int32, decoding forwards in it
    entry_B: jax.Array  # int32, open slots when it was entered
    done_B: jax.Array  # bool
    failed_B: jax.Array  # bool, of these the ones whose logits were not numbers
    forward_B: jax.Array  # int32, decoding forwards of rows that were not done
    wasted_B: jax.Array  # int32, of these the ones that changed nothing
    computed_B: jax.Array  # int32, slots that the row's forwards computed, without padding
    forwards: dict[str, jax.Array]  # by kind, (B,) int32
    calls: dict[str, jax.Array]  # by kind, () int32
    reveal_step_BT: jax.Array
    reveal_score_BT: jax.Array
    reveal_logprob_BT: jax.Array
    edits: Edits


class Rules(NamedTuple):
    """What a loop is compiled for; hashable. `noise` is made from the key given to `generate`."""

    denoiser: Denoiser
    decoder: Decoder
    cache: cache_lib.Cache
    mask_id: int
    eos_id: int
    stop_at_eos: bool = False
    suppressed: tuple[int, ...] = ()  # never written; the mask token is one of them
    suffix: int = 0  # slots from the first gap of any row to the end
    log: int = 0  # room for edits of a row
    noise: Callable[[jax.Array], Noise] = counter_noise


def generate(denoiser: Denoiser, variables: Any, canvas: Canvas, decoder: Decoder, *, key: jax.Array, row_B: jax.Array,
             mask_id: int, eos_id: int, cache: cache_lib.Cache = cache_lib.NoCache(), stop_at_eos: bool = False, suppressed: tuple[int, ...] = (),
             choice_B: jax.Array | None = None, log: int = 0, suffix: int = 0, noise: Callable[[jax.Array], Noise] = counter_noise,
             compiler_options: dict[str, str] | None = None) -> tuple[jax.Array, Trace]:
    """Fill the writable slots of `canvas`; (tokens_BT, trace).

    `row_B` (int32) names each row for the noise; with `key` and the positions it decides every draw, so a row's result does not
    depend on the batch. With `stop_at_eos` a row is done when an EOS stands in the run of slots that ends the canvas and no mask is
    left of it; masks right of it become EOS. `decoder.eos_at_block` says when. `suppressed` tokens are never written, beside the mask token.
    `choice_B` names each row's decoder among those of a `Mixed` one. `log` is the room for edits of a row (0: 4 T);
    `suffix` the slots from the first gap of any row to the end, for batches that share a compile (0: this canvas's).
    `noise` builds the noise from `key`; give another to inject the numbers of a reference.
    One compile for each shape, decoder, cache and model, with `compiler_options` of XLA. Raises ConfigError for a cache that does not go
    with the decoder.
    """
    rules = rules_of(denoiser, canvas, decoder, mask_id=mask_id, eos_id=eos_id, cache=cache, stop_at_eos=stop_at_eos, suppressed=suppressed, log=log,
                     suffix=suffix, noise=noise)
    canvas = Canvas(*map(jnp.asarray, canvas))
    choice_B = jnp.zeros(len(canvas.tokens_BT), jnp.int32) if choice_B is None else choice_B
    return compiled(**(compiler_options or {}))(rules, variables, canvas, key, row_B, choice_B)


def rules_of(denoiser: Denoiser, canvas: Canvas, decoder: Decoder, *, mask_id: int, eos_id: int, cache: cache_lib.Cache = cache_lib.NoCache(),
             stop_at_eos: bool = False, suppressed: tuple[int, ...] = (), log: int = 0, suffix: int = 0,
             noise: Callable[[jax.Array], Noise] = counter_noise) -> Rules:
    """What the loop is compiled for. Raises ConfigError for a cache that would not give this decoder's numbers."""
    check_cache(decoder, cache)
    room = (log or 4 * canvas.tokens_BT.shape[1]) if decoder.edits else 0
    return Rules(denoiser, decoder, cache, mask_id, eos_id, stop_at_eos, (mask_id, *suppressed), suffix or suffix_of(canvas, cache), room, noise)


def check_cache(decoder: Decoder, cache: cache_lib.Cache) -> None:
    """Raise ConfigError for a cache that would not give this decoder's numbers."""
    if cache.block_causal and not all(member.block_causal for member in members(decoder)):
        raise ConfigError(f"the cache {cache.name} keeps finished blocks for good, which only block-causal models allow; decoder {decoder.name} lets "
                          "every position see the whole canvas: take none, prefix, dual or vicinity")


def suffix_of(canvas: Canvas, cache: cache_lib.Cache) -> int:
    """Slots from the first gap of any row to the end, where the cache has a window of them; the only thing that a shape takes from the canvas."""
    if not isinstance(cache, cache_lib.Prefix) or isinstance(canvas.block_BT, jax.core.Tracer):
        return canvas.tokens_BT.shape[1]
    return int(canvas.tokens_BT.shape[1] - jnp.argmax((canvas.block_BT >= 0).any(0)))


@functools.cache
def compiled(**options: str) -> Callable:
    """`_generate` jitted with these compiler options."""
    return jax.jit(_generate, static_argnums=0, compiler_options=options or None)


def _generate(rules: Rules, variables: Any, canvas: Canvas, key: jax.Array, row_B: jax.Array, choice_B: jax.Array) -> tuple[jax.Array, Trace]:
    first = start(rules, variables, canvas)
    carry = jax.lax.while_loop(running, lambda carry: step(rules, variables, canvas, key, row_B, choice_B, carry), first)
    return carry.tokens_BT, trace_of(canvas, carry)


def start(rules: Rules, variables: Any, canvas: Canvas) -> Carry:
    """The loop's state before the first forward; rows without a writable slot are done."""
    B, T = canvas.tokens_BT.shape
    nothing_BT, zeros_B = jnp.full((B, T), jnp.nan, jnp.float32), jnp.zeros(B, jnp.int32)
    kinds = {view.kind: 0 for view in views(rules, T)} | ({"guidance": 0} if guided(rules.decoder) else {})
    empty_BK = jnp.full((B, rules.log), -1, jnp.int32)
    kv = None
    if rules.cache.keeps:
        assert rules.denoiser.init_cache is not None, f"the cache {rules.cache.name} needs Denoiser.init_cache"
        kv = rules.denoiser.init_cache(B * (2 if guided(rules.decoder) else 1), T)
    soft_BCD = None
    if rules.decoder.smooths:
        assert rules.denoiser.embed is not None, f"decoder {rules.decoder.name} needs Denoiser.embed"
        shape = jax.eval_shape(rules.denoiser.embed, variables, canvas.tokens_BT[:, :min(rules.decoder.block_length, T)])
        soft_BCD = jnp.zeros(shape.shape, shape.dtype)
    return Carry(
        tokens_BT=canvas.tokens_BT, kv=kv, soft_BCD=soft_BCD, cache=rules.cache.init(B), decoder=rules.decoder.init(B), block_B=zeros_B,
        step_B=zeros_B, entry_B=zeros_B, done_B=~canvas.writable_BT.any(-1), failed_B=jnp.zeros(B, bool), forward_B=zeros_B, wasted_B=zeros_B,
        computed_B=zeros_B, forwards=dict.fromkeys(kinds, zeros_B), calls={kind: jnp.int32(0) for kind in kinds},
        reveal_step_BT=jnp.full((B, T), GIVEN, jnp.int32), reveal_score_BT=nothing_BT, reveal_logprob_BT=nothing_BT,
        edits=Edits(empty_BK, empty_BK, empty_BK, empty_BK, zeros_B))


def running(carry: Carry) -> jax.Array:
    """Whether any row is not done."""
    return ~carry.done_B.all()


def step(rules: Rules, variables: Any, canvas: Canvas, key: jax.Array, row_B: jax.Array, choice_B: jax.Array, carry: Carry) -> Carry:
    """One forward of each row and what follows from it."""
    decoder, (B, T) = rules.decoder, carry.tokens_BT.shape
    slots_BC, inside_BC = progress.block_slots(canvas.block_BT, carry.block_B, min(decoder.block_length, T))
    tokens_BC, position_BC = (jnp.take_along_axis(x, slots_BC, axis=1) for x in (carry.tokens_BT, canvas.positions_BT))
    live_B, mine_BC = ~carry.done_B, inside_BC & ~carry.done_B[:, None]
    open_BC = mine_BC & (tokens_BC == rules.mask_id)
    entry_B = jnp.where(carry.step_B == 0, open_BC.sum(-1), carry.entry_B)
    left_B = ((carry.tokens_BT == rules.mask_id) & (canvas.block_BT >= 0)).sum(-1)
    offset_B = position_BC[:, 0] % of_rows(decoder, "block_length", choice_B)
    moment = Moment(carry.forward_B, carry.step_B, entry_B, left_B, position_BC, choice_B, rules.mask_id, rules.eos_id, position_BC[:, 0] - offset_B)

    # ---- model: every row by its own view of the canvas
    place = cache_lib.Place(slots_BC, inside_BC, slots_BC[:, 0] - offset_B, T)
    view_B = rules.cache.view(carry.cache, moment)
    hidden_BCD, kv, spent = look(rules, variables, canvas, carry, place, view_B, live_B, choice_B)
    decodes_B = live_B & jnp.stack([jnp.asarray(view.decodes) for view in views(rules, T)])[view_B]

    # ---- score and select
    writable_BC = (mine_BC if decoder.edits else open_BC) & decodes_B[:, None]
    proposal, state, soft_BCD = proposed(rules, variables, hidden_BCD, carry.decoder, tokens_BC, writable_BC, moment, key, row_B)
    proposal = whole(rules, proposal)
    failed_B = decodes_B & (writable_BC & ~jnp.isfinite(proposal.prob_BC)).any(-1)
    decodes_B, writable_BC = decodes_B & ~failed_B, writable_BC & ~failed_B[:, None]
    write_BC, state = decoder.select(state, proposal, tokens_BC, writable_BC, moment)
    answered_B, answer_BC = answered(rules, canvas, carry, slots_BC, writable_BC & open_BC, proposal, choice_B)
    write_BC |= answer_BC & answered_B[:, None]

    # ---- commit
    # slots outside the block go to index T, which `drop` ignores
    put = jax.vmap(lambda old_T, slots_C, new_C: old_T.at[slots_C].set(new_C, mode="drop"))
    tokens_BT = put(carry.tokens_BT, jnp.where(write_BC, slots_BC, T), proposal.token_BC)
    fresh_BC = write_BC & open_BC
    target_BC = jnp.where(fresh_BC, slots_BC, T)
    step_BC = jnp.broadcast_to(carry.forward_B[:, None], slots_BC.shape)
    reveal_step_BT = put(carry.reveal_step_BT, target_BC, step_BC)
    edits = logged(carry.edits, write_BC & ~open_BC, step_BC, slots_BC, tokens_BC, proposal.token_BC) if decoder.edits else carry.edits

    # ---- advance
    finished_B = decoder.finished(state, open_BC & ~fresh_BC, moment) & decodes_B
    block_B = carry.block_B + finished_B
    ends_B = answered_B | (finished_B & (block_B > canvas.block_BT.max(-1)))
    if rules.stop_at_eos:
        ended_B = progress.reached_eos(tokens_BT, canvas.block_BT >= 0, rules.mask_id, rules.eos_id)
        ended_B &= jnp.where(of_rows(decoder, "eos_at_block", choice_B), finished_B, decodes_B)
        fill_BT = ended_B[:, None] & (tokens_BT == rules.mask_id)
        tokens_BT = jnp.where(fill_BT, rules.eos_id, tokens_BT)
        reveal_step_BT = jnp.where(fill_BT, carry.forward_B[:, None], reveal_step_BT)
        ends_B |= ended_B
    # a new block starts anew; a row that only commits a block leaves its decoder alone
    if soft_BCD is not None:
        soft_BCD = of(finished_B, 0 * soft_BCD, of(decodes_B, soft_BCD, carry.soft_BCD))
    renewed = jax.tree.map(lambda old, went_on, new: of(finished_B, new, of(decodes_B, went_on, old)), carry.decoder, state, decoder.init(B))
    cache = rules.cache.after(carry.cache, moment, view_B, write_BC.sum(-1), finished_B)
    return Carry(
        tokens_BT, kv, soft_BCD, cache, renewed, block_B, jnp.where(finished_B, 0, carry.step_B + decodes_B), entry_B,
        carry.done_B | ends_B | failed_B, carry.failed_B | failed_B, carry.forward_B + (decodes_B | failed_B),
        carry.wasted_B + (decodes_B & ~write_BC.any(-1)), carry.computed_B + spent.computed_B,
        {kind: n + spent.forwards.get(kind, 0) for kind, n in carry.forwards.items()},
        {kind: n + spent.calls.get(kind, 0) for kind, n in carry.calls.items()},
        reveal_step_BT, put(carry.reveal_score_BT, target_BC, decoder.score(proposal, moment)),
        put(carry.reveal_logprob_BT, target_BC, proposal.logprob_BC), edits)


def answered(rules: Rules, canvas: Canvas, carry: Carry, slots_BC: jax.Array, open_BC: jax.Array, proposal: Proposal,
             choice_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows whose answer, the last gap, is clear before it is written, (B,), and the open slots of answers, (B, C)."""
    if not any(member.answer_entropy for member in members(rules.decoder)):
        return jnp.zeros(len(slots_BC), bool), jnp.zeros_like(open_BC)
    answer_BT = progress.last_gap(canvas.writable_BT) & (carry.tokens_BT == rules.mask_id)
    answer_BC = open_BC & jnp.take_along_axis(answer_BT, slots_BC, axis=1)
    unclear_B = jnp.where(answer_BC, proposal.entropy_BC, 0).sum(-1)  # at least the entropy of the answer as a whole
    whole_B = answer_BC.any(-1) & (answer_BC.sum(-1) == answer_BT.sum(-1))  # no open slot of it is in another block
    return whole_B & (unclear_B < of_rows(rules.decoder, "answer_entropy", choice_B)), answer_BC


def of(row_B: jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
    """`yes` in those rows, `no` in the others."""
    return jnp.where(row_B.reshape((-1,) + (1,) * (yes.ndim - 1)), yes, no)


class Spent(NamedTuple):
    """What the forwards of a step cost."""

    computed_B: jax.Array
    forwards: dict[str, jax.Array]
    calls: dict[str, jax.Array]


def look(rules: Rules, variables: Any, canvas: Canvas, carry: Carry, place: cache_lib.Place, view_B: jax.Array, live_B: jax.Array,
         choice_B: jax.Array) -> tuple[jax.Array, Any, Spent]:
    """Hidden states (B, C, D) at the block's slots, each row's by its own view, and the model's cache after that.

    A view that no row takes costs nothing; rows of other views pass through it without a trace.
    """
    (B, T), hidden_BCD, kv = carry.tokens_BT.shape, None, carry.kv
    computed_B, forwards, calls = jnp.zeros(B, jnp.int32), {}, {}
    doubled = guided(rules.decoder)
    for index, view in enumerate(all_views := views(rules, T)):
        here_B = live_B & (view_B == index)

        def run(kv, view=view, here_B=here_B):
            return forward(rules, variables, canvas, carry, kv, place, view, here_B, choice_B)

        if len(all_views) == 1:
            hidden_BCD, kv = run(kv)
        else:
            shape = jax.eval_shape(run, kv)[0]
            empty = lambda kv, shape=shape: (jnp.zeros(shape.shape, shape.dtype), kv)
            seen_BCD, kv = jax.lax.cond(here_B.any(), run, empty, kv)
            hidden_BCD = seen_BCD if hidden_BCD is None else jnp.where(here_B[:, None, None], seen_BCD, hidden_BCD)
        real_BT = canvas.seen if view.window is None else jax.vmap(lambda seen_T, slots_W: seen_T.at[slots_W].get(mode="fill", fill_value=False))(
            canvas.seen, view.window(place)[0])
        computed_B += here_B * real_BT.sum(-1) * (2 if doubled else 1)
        for kind in (view.kind, *(["guidance"] if doubled else [])):
            forwards[kind] = forwards.get(kind, 0) + here_B.astype(jnp.int32)
        calls[view.kind] = calls.get(view.kind, 0) + here_B.any().astype(jnp.int32)
    return hidden_BCD, kv, Spent(computed_B, forwards, calls)


def forward(rules: Rules, variables: Any, canvas: Canvas, carry: Carry, kv: Any, place: cache_lib.Place, view: cache_lib.View,
            here_B: jax.Array, choice_B: jax.Array) -> tuple[jax.Array, Any]:
    """One call of the model: hidden states (B, C, D) at the block's slots, and its cache, in which only rows that are `here` keep something.

    Unsupervised classifier-free guidance (LLaDA, arXiv 2502.09992): un + (guidance + 1)(cond - un), where `un` comes from the canvas
    with the mask token on all given slots; of hidden states, since the head is linear. The two canvases of a row stand side by side in
    one batch, hence on one device, each with its own keys and values.
    """
    decoder, tokens_BT, T = rules.decoder, carry.tokens_BT, carry.tokens_BT.shape[1]
    positions_BT, padding_BT = canvas.positions_BT, ~canvas.seen
    # a block sees itself and earlier ones alone, so it gets the numbers that it would get without the canvas right of it
    block_BT = blocks_of(decoder, positions_BT, choice_B)
    slots_BW, wanted_BC, store_BW = None, place.slots_BC, None
    if kv is not None:
        slots_BW = jnp.broadcast_to(jnp.arange(T), tokens_BT.shape)
        if view.window is not None:
            slots_BW, wanted_BC = view.window(place)
        store_BW = here_B[:, None] & (slots_BW < T) & view.stores
    guidance = of_rows(decoder, "guidance", choice_B)
    if doubled := guided(decoder):
        unprompted_BT = jnp.where(canvas.valid_BT & ~canvas.writable_BT, rules.mask_id, tokens_BT)
        tokens_BT = jnp.stack([tokens_BT, unprompted_BT], axis=1).reshape(-1, T)
        positions_BT, padding_BT, block_BT, slots_BW, wanted_BC, store_BW = jax.tree.map(
            lambda x: jnp.repeat(x, 2, axis=0), (positions_BT, padding_BT, block_BT, slots_BW, wanted_BC, store_BW))
    spec = AttentionSpec.own(block=block_BT, padding=padding_BT)
    if slots_BW is not None:
        at_BW = jnp.minimum(slots_BW, T - 1)
        window = lambda x_BT: None if x_BT is None else jnp.take_along_axis(x_BT, at_BW, axis=1)
        tokens_BT, positions_BT, spec = window(tokens_BT), window(positions_BT), spec._replace(block_q=window(block_BT))
    inputs = tokens_BT
    if carry.soft_BCD is not None and rules.denoiser.embed is not None:
        open_BC = place.inside_BC & (jnp.take_along_axis(carry.tokens_BT, place.slots_BC, axis=1) == rules.mask_id)
        more_BCD = jnp.where(open_BC[..., None], carry.soft_BCD, 0)
        more_BCD = jnp.repeat(more_BCD, 2, axis=0) if doubled else more_BCD
        inputs = jax.vmap(lambda x_WD, at_C, more_CD: x_WD.at[at_C].add(more_CD))(rules.denoiser.embed(variables, tokens_BT), wanted_BC, more_BCD)
    hidden_BCD, kv, _ = rules.denoiser.apply(variables, inputs, positions_BT, slots_BW, spec, kv, store_BW, wanted_BC)
    if doubled:
        cond_BCD, un_BCD = hidden_BCD[::2], hidden_BCD[1::2]
        scale = jnp.asarray(guidance, hidden_BCD.dtype).reshape(-1, 1, 1)
        hidden_BCD = jnp.where(scale > 0, un_BCD + (scale + 1) * (cond_BCD - un_BCD), cond_BCD)
    return hidden_BCD, kv


def proposed(rules: Rules, variables: Any, hidden_BCD: jax.Array, state: Any, tokens_BC: jax.Array, writable_BC: jax.Array, moment: Moment,
             key: jax.Array, row_B: jax.Array) -> tuple[Proposal, Any, jax.Array | None]:
    """A candidate for each slot, the decoder's state after it, and what the slots carry into the next forward; without logits where the model
    offers that and the decoder does not need them."""
    decoder, sampling = rules.decoder, sampling_of(rules.decoder, moment.choice_B)
    place = row_B, moment.forward_B, moment.position_BC
    plain = sampling in (Sampling(0.0), Sampling(1.0)) if isinstance(sampling.temperature, float) else False
    if rules.denoiser.confidence and plain and not decoder.needs_logits and not decoder.smooths and rules.noise is counter_noise:
        keys_BC2 = noise_keys(key, TOKEN, *place) if sampling.temperature else jnp.zeros((*tokens_BC.shape, 2), jnp.uint32)
        found = rules.denoiser.confidence(variables, hidden_BCD, keys_BC2, sampling.temperature, rules.suppressed)
        if found is not None:
            uniform_BC = uniform(counter_noise(key)(RANK, *place, 1)[..., 0])
            return Proposal(found.token_M, found.logprob_M, jnp.exp(found.logprob_M), found.runner_up_M, found.entropy_M, uniform_BC), state, None
    logits_BCV = rules.denoiser.head(variables, hidden_BCD)
    if decoder.needs_logits:
        logits_BCV, state = decoder.adjust(state, logits_BCV, tokens_BC, writable_BC, moment)
    proposal = propose(logits_BCV, suppressed=rules.suppressed, sampling=sampling, noise=rules.noise(key), row_B=row_B, step_B=moment.forward_B,
                       position_BC=moment.position_BC)
    soft_BCD = softened(rules, variables, logits_BCV, moment) if decoder.smooths else None
    return proposal, state, soft_BCD


def whole(rules: Rules, proposal: Proposal) -> Proposal:
    """The proposal with whole rows; what no decoder reads is not computed, so it must not travel with the rest."""
    if rules.denoiser.whole_rows is None:
        return proposal
    token, logprob, prob = rules.denoiser.whole_rows(proposal.token_BC, proposal.logprob_BC, proposal.prob_BC)
    rest = (rules.denoiser.whole_rows(x)[0] for x in (proposal.runner_up_BC, proposal.entropy_BC, proposal.uniform_BC))
    return Proposal(token, logprob, prob, *rest)


def softened(rules: Rules, variables: Any, logits_BCV: jax.Array, moment: Moment) -> jax.Array:
    """softness · Σ_v p(v) embedding(v), (B, C, D), over all tokens or the likeliest ones."""
    assert rules.denoiser.embed is not None
    prob_BCV, k = jax.nn.softmax(logits_BCV, axis=-1), rules.decoder.soft_tokens
    if k:
        prob_BCK, token_BCK = jax.lax.top_k(prob_BCV, k)
        (B, C), tokens = token_BCK.shape[:2], rules.denoiser.embed(variables, token_BCK.reshape(len(token_BCK), -1))
        mean_BCD = jnp.einsum("BCK,BCKD->BCD", prob_BCK.astype(tokens.dtype), tokens.reshape(B, C, k, -1))
    else:
        mean_BCD = rules.denoiser.embed(variables, prob_BCV)
    return (rules.decoder.softness(moment)[:, None, None] * mean_BCD).astype(mean_BCD.dtype)


def views(rules: Rules, T: int) -> tuple[cache_lib.View, ...]:
    """The views that rows of T slots may take."""
    return rules.cache.views(T, min(rules.decoder.block_length, T), rules.suffix)


def trace_of(canvas: Canvas, carry: Carry) -> Trace:
    """What the finished loop knows of its own course."""
    return Trace(canvas.tokens_BT, carry.tokens_BT, carry.reveal_step_BT, carry.reveal_score_BT, carry.reveal_logprob_BT, carry.edits,
                 carry.forwards, carry.calls, carry.forward_B, carry.wasted_B, carry.computed_B, carry.failed_B)
