"""Replay recorded decodes through the engine: `python -m tests.replay DIR`.

Each *.json of DIR holds a toy denoiser's constants, an initial canvas, the settings of a reference sampler, and the canvas after
every forward. A case passes when each changing forward gives the same canvas and, unless the reference spends forwards on nothing,
their number is equal. The references let the rows of a batch wait for each other at the end of every block; ours do not wait, so
the forwards of each block are lined up again before they are compared. Runners and settings that are not supported are skipped.
"""

import json
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import numpy as np

from llada_jax.sampling import canvas as canvas_lib
from llada_jax.sampling import engine, select, trace
from tests import toy_denoiser


class Plan(NamedTuple):
    """A case in our terms."""

    requests: list
    decoder: Any
    stop_at_eos: bool = False


def llada(case):
    """LLaDA's generate: semi-autoregressive blocks from the prompt's end, a quota a forward."""
    settings = case["settings"]
    if set(settings) - {"gen_length", "block_length", "steps", "temperature", "remasking", "attention_mask", "cfg_scale"}:
        return None
    gen_length = settings["gen_length"]
    decoder_cls = select.Random if settings.get("remasking") == "random" else select.LowConfidence
    decoder = decoder_cls(gen_length, settings["block_length"], settings["steps"], settings.get("temperature", 0.0), settings.get("cfg_scale", 0.0))
    kept = settings.get("attention_mask", np.ones_like(case["prompt"]))
    requests = [[[t for t, k in zip(row, keep, strict=True) if k], gen_length] for row, keep in zip(case["prompt"], kept, strict=True)]
    return Plan(requests, decoder)


def infill(case):
    """dllm's infill with one block: gaps anywhere, a quota a forward."""
    row, settings = case["prompt"][0], case["settings"]
    if settings["block_size"] is not None or len(case["prompt"]) > 1:
        return None
    request = [1 if token == toy_denoiser.MASK else [token] for token in row]
    return Plan([request], select.LowConfidence(len(row), len(row), settings["steps"]))


def block_threshold(names, fixed=(), stop_at_eos=False):
    """LLaDA2.0's sampler under one reference's `names` of its settings, where the `fixed` ones stand as given.

    Engines without a schedule write at least one slot a forward, as block_length steps do.
    """
    def plan(case):
        settings = dict(case["settings"])
        if any(settings.pop(name, None) != value for name, value in fixed) or set(settings) - set(names):
            return None
        decoder = select.BlockThreshold(**{names[name]: value for name, value in settings.items()})
        return Plan([[row, decoder.gen_length] for row in case["prompt"]], decoder, stop_at_eos)
    return plan


COMMON = {name: name for name in ("gen_length", "block_length", "threshold")}
DLLM = {"max_new_tokens": "gen_length", "block_size": "block_length", "steps_per_block": "steps", "threshold": "threshold"}
RUNNERS = {
    "llada_generate": llada,
    "eoserass_generate": llada,
    "dllm_mdlm_infill": infill,
    "dllm_llada2": block_threshold(DLLM),
    "hf_llada2_generate": block_threshold({**COMMON, "steps": "steps"}, stop_at_eos=True),
    "sglang_dllm": block_threshold(COMMON, [("algorithm", "LowConfidence")]),
    "dinfer_block_diffusion": block_threshold(COMMON, [("decoder", "threshold")], stop_at_eos=True),
}


def canvases(case) -> list[np.ndarray] | None:
    """The canvas after each forward of our engine; None where the case is not supported."""
    plan = RUNNERS.get(case["runner"], lambda case: None)(case)
    if plan is None:
        return None
    decoder = plan.decoder
    toy = toy_denoiser.toy_of(case)
    canvas = canvas_lib.build(plan.requests, block_length=decoder.block_length, aligned=decoder.aligned, mask_id=toy_denoiser.MASK,
                              pad_id=toy_denoiser.EOS, max_length=1 << 20)
    B, T = canvas.tokens_BT.shape
    width = len(case["initial"][0]) if plan.stop_at_eos else T  # a reference that stops early never makes the blocks behind
    if canvas.tokens_BT[:, :width].tolist() != case["initial"]:
        raise ValueError("the initial canvas differs")
    names = (np.arange(B) * T + (~canvas.seen).sum(-1)).astype(np.int32)  # see Toy.recorded_noise
    _, record = engine.generate(toy.apply, toy.head, {}, canvas, decoder, key=jax.random.key(0), row_B=names, mask_id=toy_denoiser.MASK,
                                eos_id=toy_denoiser.EOS, stop_at_eos=plan.stop_at_eos, noise=toy.recorded_noise)
    return [rows[:, :width] for rows in trace.canvases(in_lock_step(record, canvas.block_BT))]


def in_lock_step(record: trace.Trace, block_BT: np.ndarray) -> trace.Trace:
    """The same decode with rows that wait for each other at the end of every block."""
    step_BT = np.asarray(record.reveal_step_BT)
    scored_BT = ~np.isnan(record.reveal_score_BT)  # the rest was given, or filled at an EOS without a forward of its own
    made_BT, calls = step_BT.copy(), 0
    for block in range(block_BT.max() + 1):
        at_BT = scored_BT & (block_BT == block)
        first_B = np.min(step_BT, axis=1, where=at_BT, initial=step_BT.max())
        forward_BT = np.where(at_BT, step_BT - first_B[:, None], -1)
        made_BT = np.where(at_BT, calls + forward_BT, made_BT)
        calls += forward_BT.max() + 1
    last_B = np.max(made_BT, axis=1, where=scored_BT, initial=trace.GIVEN)
    made_BT = np.where((step_BT >= 0) & ~scored_BT, last_B[:, None], made_BT)
    return record._replace(reveal_step_BT=made_BT, calls={"full": calls})


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
