"""Replay recorded decodes through the engine: `python -m tests.replay DIR`.

Each *.json of DIR holds a toy denoiser's constants, an initial canvas, the settings of a reference sampler, and the canvas after
every forward. A case passes when each changing forward gives the same canvas and, unless the reference spends forwards on nothing,
their number is equal. The references let the rows of a batch wait for each other at the end of every block; ours do not wait, so
the forwards of each block are lined up again before they are compared. Runners and settings that are not supported are skipped.
"""

import json
import pathlib
import sys
from typing import NamedTuple

import jax
import numpy as np

from llada_jax.sampling import block_decoders, decoders, engine, trace
from llada_jax.sampling import cache as caches
from llada_jax.sampling import canvas as canvas_lib
from tests import toy_denoiser


class Plan(NamedTuple):
    """A case in our terms."""

    requests: list
    decoder: decoders.Decoder
    cache: caches.Cache = caches.NoCache()
    stop_at_eos: bool = False


def of(cls, names, stop_at_eos=False, pick=lambda settings: {}, cache=lambda settings: caches.NoCache(), **fixed):
    """A runner: `cls` with the case's settings under our `names`, the `fixed` ones, and what `pick` makes of the rest."""
    def plan(case):
        settings = dict(case["settings"])
        ours = {names[name]: settings.pop(name) for name in list(settings) if name in names} | fixed
        ours |= pick(settings)
        chosen = cache(settings)
        if settings:
            raise ValueError(f"settings {sorted(settings)} are not known")
        decoder = cls(**ours)
        kept = case["settings"].get("attention_mask", np.ones_like(case["prompt"])) if same_length(case["prompt"]) else case["prompt"]
        rows = [[t for t, k in zip(row, keep, strict=True) if k or keep is row] for row, keep in zip(case["prompt"], kept, strict=True)]
        return Plan([[row, decoder.gen_length] for row in rows], decoder, chosen, stop_at_eos)
    return plan


def same_length(rows):
    return len({*map(len, rows)}) == 1


def taken(settings, **names):
    """The settings under our names, out of the dict."""
    return {ours: settings.pop(theirs) for ours, theirs in names.items() if theirs in settings}


def infill(case):
    """dllm's infill with one block: gaps anywhere, a quota a forward."""
    [row], settings = case["prompt"], case["settings"]
    request = [1 if token == toy_denoiser.MASK else [token] for token in row]
    return Plan([request], decoders.Scheduled(gen_length=len(row), block_length=len(row), steps=settings["steps"]))


def llada(case):
    """LLaDA's generate: semi-autoregressive blocks from the prompt's end, a quota a forward."""
    cls = decoders.Random if case["settings"].get("remasking") == "random" else decoders.LowConfidence
    return of(cls, {**BLOCKS, "steps": "steps", "temperature": "temperature", "cfg_scale": "guidance"},
              pick=lambda settings: (settings.pop("remasking", None) and {}) or (settings.pop("attention_mask", None) and {}) or {})(case)


def fast(cache):
    """Fast-dLLM's generate: a quota, or with a threshold as many as reach it, whatever `steps` says."""
    def plan(case):
        if "threshold" not in case["settings"]:
            return of(decoders.LowConfidence, {**BLOCKS, "steps": "steps"}, cache=lambda _: cache)(case)
        return of(decoders.Threshold, {**BLOCKS, "threshold": "threshold"}, pick=lambda s: s.pop("steps") and {}, cache=lambda _: cache)(case)
    return plan


def dinfer(case):
    """dInfer's blockwise loop: a decoder and a cache by name."""
    def cache(settings):
        name, more = settings.pop("cache", "none"), taken(settings, refresh_every="cache_update_freq", warmup="warmup_steps")
        look = taken(settings, before="prefix_look", after_block="after_look")
        return (caches.Vicinity if look else caches.CACHES[name])(**more, **look)

    names = {**BLOCKS, **{name: name for name in ("threshold", "low_threshold")},
             "credit_alpha": "alpha", "boost_gamma": "gamma", "decay_beta": "decay"}
    name = case["settings"]["decoder"]
    cls = {"threshold": decoders.Threshold, "hierarchy": decoders.Hierarchical, "credit": decoders.Credit}[name]
    slack = {"slack": 1e-5} if name != "hierarchy" else {}
    return of(cls, names, True, lambda settings: settings.pop("decoder") and slack, cache, eos_at_block=True)(case)


def sglang(case):
    """SGLang's block-causal algorithms; engines without a schedule write at least one slot a forward, as block_length steps do."""
    names = {**BLOCKS, "threshold": "threshold", "edit_threshold": "edit_threshold", "max_post_edit_steps": "most_after",
             "penalty_lambda": "penalty", "gamma": "entropy"}
    cls = {"LowConfidence": block_decoders.BlockThreshold, "JointThreshold": block_decoders.Editing,
           "EBSampling": block_decoders.BlockEntropyBounded}[case["settings"]["algorithm"]]
    return of(cls, names, pick=lambda settings: settings.pop("algorithm") and {})(case)


def entropy(case):
    """The entropy rules from their formulas, in blocks from the prompt's end."""
    rule = case["settings"]["rule"]
    cls = {"med": decoders.Med, "ar_med": decoders.ContiguousMed, "ltr": decoders.LeftToRight}[rule]
    pick = lambda settings: settings.pop("rule") and ({"steps": case["settings"]["gen_length"] // settings.pop("k")} if rule == "ltr" else {})
    return of(cls, {**BLOCKS, "lam": "entropy", "k_max": "most"}, pick=pick)(case)


def dream(case):
    """dllm's Dream: one block, slots by one of three scores."""
    orders = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}
    length = case["settings"]["max_new_tokens"]
    return of(decoders.Scheduled, {"max_new_tokens": "gen_length", "steps": "steps", "temperature": "temperature"}, block_length=length,
              pick=lambda s: {"order": orders[s.pop("alg")], "top_k": s.pop("top_k") or 0} | (s.pop("right_shift_logits") and {}))(case)


BLOCKS = {name: name for name in ("gen_length", "block_length")}
DLLM = {"max_new_tokens": "gen_length", "block_size": "block_length", "steps": "steps", "steps_per_block": "steps", "threshold": "threshold",
        "editing_threshold": "edit_threshold"}
LLADA2 = {**BLOCKS, "steps": "steps", "threshold": "threshold", "editing_threshold": "edit_threshold"}
ASCENDING = {"gen_length": "gen_length", "block_num": "blocks"}
RUNNERS = {
    "llada_generate": llada,
    "eoserass_generate": llada,
    "eoserass_eoser_generate": of(decoders.EosRejection, {**BLOCKS, "steps": "steps"}),
    "eoserass_ass_generate": of(decoders.Ascending, ASCENDING, pick=lambda settings: settings.pop("steps") and {}),
    "eoserass_eoser_ass_generate": of(decoders.Ascending, ASCENDING, pick=lambda settings: settings.pop("steps") and {}, gamma=0.01),
    "fastdllm_generate": fast(caches.NoCache()),
    "fastdllm_generate_with_prefix_cache": fast(caches.Prefix()),
    "fastdllm_generate_with_dual_cache": fast(caches.Dual()),
    "dllm_fastdllm": of(decoders.Factor, {"max_new_tokens": "gen_length", "block_size": "block_length", "factor": "factor"},
                        pick=lambda settings: settings.pop("steps") and {}),
    "dllm_mdlm": of(decoders.Scheduled, DLLM),
    "dllm_mdlm_infill": infill,
    "dllm_dream": dream,
    "dllm_llada2": of(block_decoders.BlockThreshold, DLLM),
    "hf_llada2_generate": of(block_decoders.BlockThreshold, LLADA2, True),
    "dllm_llada21": of(block_decoders.Editing, DLLM),
    "hf_llada21_generate": of(block_decoders.Editing, LLADA2, True, pick=lambda settings: settings.pop("eos_early_stop") and {}),
    "sglang_dllm": sglang,
    "dinfer_blockwise": dinfer,
    "dinfer_block_diffusion": of(block_decoders.BlockThreshold, {**BLOCKS, "threshold": "threshold"}, True,
                                 lambda settings: settings.pop("decoder") and {}),
    "own_entropy": entropy,
}


def canvases(case) -> list[np.ndarray] | None:
    """The canvas after each forward of our engine; None where the case is not supported."""
    plan = RUNNERS.get(case["runner"], lambda case: None)(case)
    if plan is None:
        return None
    decoder = plan.decoder
    toy = toy_denoiser.toy_of(case)
    canvas = canvas_lib.build(plan.requests, block_length=decoder.block_lengths, aligned=decoder.aligned, mask_id=toy_denoiser.MASK,
                              pad_id=toy_denoiser.EOS, max_length=1 << 20)
    B, T = canvas.tokens_BT.shape
    padding_B = (~canvas.seen).sum(-1)
    # our rows are padded on the left; those of some references on the right
    shift_B = 0 * padding_B if same_length(case["prompt"]) else -padding_B
    theirs = lambda rows: np.stack([np.roll(row, shift) for row, shift in zip(rows, shift_B, strict=True)])
    width = len(case["initial"][0]) if plan.stop_at_eos else T  # a reference that stops early never makes the blocks behind
    if theirs(canvas.tokens_BT)[:, :width].tolist() != case["initial"]:
        raise ValueError("the initial canvas differs")
    names = (np.arange(B) * T + padding_B).astype(np.int32)  # see Toy.recorded_noise
    _, record = engine.generate(engine.Denoiser.of(toy), {}, canvas, decoder, cache=plan.cache, key=jax.random.key(0), row_B=names,
                                mask_id=toy_denoiser.MASK, eos_id=toy_denoiser.EOS, stop_at_eos=plan.stop_at_eos, noise=toy.recorded_noise)
    return [theirs(rows)[:, :width] for rows in trace.canvases(in_lock_step(record, canvas.block_BT))]


def in_lock_step(record: trace.Trace, block_BT: np.ndarray) -> trace.Trace:
    """The same decode with rows that wait for each other at the end of every block, where texts that ended are filled; one row waits for nobody."""
    if len(block_BT) == 1:
        return record
    step_BT = np.asarray(record.reveal_step_BT)
    scored_BT = ~np.isnan(record.reveal_score_BT)  # the rest was given, or filled at an EOS without a forward of its own
    made_BT, calls, filled_B = step_BT.copy(), 0, np.zeros((len(block_BT), 1), int)
    for block in range(block_BT.max() + 1):
        at_BT = scored_BT & (block_BT == block)
        first_B = np.min(step_BT, axis=1, where=at_BT, initial=step_BT.max())
        forward_BT = np.where(at_BT, step_BT - first_B[:, None], -1)
        made_BT = np.where(at_BT, calls + forward_BT, made_BT)
        calls += forward_BT.max() + 1
        filled_B = np.where(at_BT.any(1, keepdims=True), calls - 1, filled_B)
    made_BT = np.where((step_BT >= 0) & ~scored_BT, filled_B, made_BT)
    return record._replace(reveal_step_BT=made_BT, steps_B=np.array([calls]))


def problem(case, got: list[np.ndarray]) -> str | None:
    """What differs from the recorded trajectory; None if nothing does."""
    if not case["noop_forwards"] and len(got) != case["nfe"]:
        return f"{len(got)} forwards instead of {case['nfe']}"
    got, want = (_distinct(case["initial"], rows) for rows in (np.asarray(got).tolist(), case["trajectory"]))
    if len(got) != len(want):
        return f"{len(got)} changing forwards instead of {len(want)}"
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        if a != b:
            return f"forward {step}: (row, slot) {np.argwhere(np.array(a) != np.array(b))[:8].tolist()} differ"
    return None


def _distinct(last, rows):
    kept = []
    for row in rows:
        if row != last:
            kept.append(row)
            last = row
    return kept


def main(folder: str) -> int:
    counts = {"PASS": 0, "FAIL": 0, "SKIP": 0}
    for path in sorted(pathlib.Path(folder).glob("*.json")):
        case, note = json.loads(path.read_text()), ""
        try:
            got = canvases(case)
            difference = got is not None and problem(case, got)
            result = "SKIP" if got is None else "FAIL" if difference else "PASS"
            note = f": runner {case['runner']}" if got is None else f": {difference}" if difference else ""
        except Exception as error:  # one broken case must not hide the others
            result, note = "FAIL", f": {type(error).__name__}: {error}"
        counts[result] += 1
        print(f"{result} {case['name']}{note}", flush=True)
    print(f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} skipped")
    return 1 if counts["FAIL"] or not sum(counts.values()) else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.replay DIR")
    sys.exit(main(sys.argv[1]))
