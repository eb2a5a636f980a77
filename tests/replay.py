"""Replay recorded decodes through the engine: `python -m tests.replay DIR`.

Each *.json of DIR holds a toy denoiser's constants, an initial canvas, the settings of a reference sampler, and the canvas after
every forward. A case passes when each changing forward gives the same canvas and, unless the reference spends forwards on nothing,
their number is equal. Runners that are not supported are skipped by name.
"""

import json
import pathlib
import sys

import jax
import numpy as np

from llada_jax.sampling import canvas as canvas_lib
from llada_jax.sampling import engine, select, trace
from tests import toy_denoiser


def llada(case):
    """LLaDA's generate: semi-autoregressive blocks from the prompt's end, a quota a forward."""
    settings = case["settings"]
    if set(settings) - {"gen_length", "block_length", "steps", "temperature", "remasking", "attention_mask"}:
        return None  # guidance and other extras
    gen_length = settings["gen_length"]
    decoder_cls = select.Random if settings.get("remasking") == "random" else select.LowConfidence
    decoder = decoder_cls(gen_length, settings["block_length"], settings["steps"], settings.get("temperature", 0.0))
    kept = settings.get("attention_mask", np.ones_like(case["prompt"]))
    requests = [[[t for t, k in zip(row, keep, strict=True) if k], gen_length] for row, keep in zip(case["prompt"], kept, strict=True)]
    return requests, decoder


def infill(case):
    """dllm's infill with one block: gaps anywhere, a quota a forward."""
    row, settings = case["prompt"][0], case["settings"]
    if settings["block_size"] is not None or len(case["prompt"]) > 1:
        return None
    request = [1 if token == toy_denoiser.MASK else [token] for token in row]
    return [request], select.LowConfidence(len(row), len(row), settings["steps"])


RUNNERS = {"llada_generate": llada, "eoserass_generate": llada, "dllm_mdlm_infill": infill}


def canvases(case) -> list[np.ndarray] | None:
    """The canvas after each forward of our engine; None where the case is not supported."""
    plan = RUNNERS.get(case["runner"], lambda case: None)(case)
    if plan is None:
        return None
    requests, decoder = plan
    toy = toy_denoiser.toy_of(case)
    canvas = canvas_lib.build(requests, block_length=decoder.block_length, mask_id=toy_denoiser.MASK, pad_id=toy_denoiser.EOS, max_length=1 << 20)
    if canvas.tokens_BT.tolist() != case["initial"]:
        raise ValueError("the initial canvas differs")
    B, T = canvas.tokens_BT.shape
    names = (np.arange(B) * T + (~canvas.valid_BT).sum(-1)).astype(np.int32)  # see Toy.recorded_noise
    _, record = engine.generate(toy.apply, toy.head, {}, canvas, decoder, key=jax.random.key(0), row_B=names,
                                mask_id=toy_denoiser.MASK, eos_id=toy_denoiser.EOS, noise=toy.recorded_noise)
    return trace.canvases(record)


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
