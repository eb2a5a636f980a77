"""Compare our model with recorded numbers of the reference implementations.

    python -m tests.parity DIR [--kernels=tpu]

Every sub-folder of DIR (config.json, model.safetensors, golden.npz) goes through our import and model. A line a case begins
with PASS, FAIL or SKIP; the last line is `N passed, M failed`. Exit status 1 if any failed. With `--kernels` every operation has the
implementation of that name, in Pallas's interpreter, and meets the same numbers.
"""

import argparse
import contextlib
import json
import pathlib
import sys
from collections.abc import Generator, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax import config as config_lib
from llada_jax.diffusion import blocks
from llada_jax.diffusion import loss as loss_lib
from llada_jax.interop import hf_config, hf_weights
from llada_jax.model import moe, transformer
from llada_jax.sampling import block_decoders, decoders, engine
from llada_jax.sampling import canvas as canvas_lib
from llada_jax.training.optimizer import global_norm
from pallas_kernels import dispatch
from pallas_kernels.attention import AttentionSpec
from pallas_kernels.attention.reference import visible

ATOL, RTOL = 2e-5, 1e-5  # activations and logits, float32
LOSS_ATOL = 1e-5  # losses and gradients
BLOCK = 4  # block length of every recorded block mask
Case = tuple[str, str, str]  # status, name, detail


def check_folder(folder: pathlib.Path, kernels: config_lib.Kernels = config_lib.Kernels()) -> Iterator[Case]:
    """All cases of one fixture."""
    golden = dict(np.load(folder / "golden.npz"))
    meta = json.loads((folder / "meta.json").read_text())
    published = hf_config.read(str(folder), meta["mask_token_id"])
    model = transformer.build(published.model, kernels)
    variables = jax.tree.map(jnp.asarray, hf_weights.load(str(folder), published.family, model.shapes))
    yield from _activations(folder.name, golden, model, variables)
    yield from (_block_losses if "bd_train/logits" in golden else _losses)(folder.name, golden, model, variables, published.family)
    yield from _generations(folder.name, golden, model, variables, published)


def _compare(name: str, got, want, atol: float = ATOL, rtol: float = RTOL) -> Case:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        return "FAIL", name, f"shape {got.shape} instead of {want.shape}"
    difference = float(np.max(np.abs(got - want), initial=0.0))
    return ("PASS" if np.allclose(got, want, atol=atol, rtol=rtol) else "FAIL"), name, f"max abs difference {difference:.1e}"


def _inputs(golden) -> dict[str, tuple[Any, Any, AttentionSpec]]:
    """(tokens, positions, attention spec) of every recorded run, by tag."""
    tokens, invisible = golden["input/noised"], jnp.asarray(golden["input/attention_mask"] == 0)
    B, T = tokens.shape
    positions = np.broadcast_to(np.arange(T), (B, T))
    block = jnp.asarray(positions // BLOCK)
    block_causal = tokens, positions, AttentionSpec.own(block=block)
    found = {"full": (tokens, positions, AttentionSpec()), "padded": (golden["input/padded"], positions, AttentionSpec(padding_k=invisible)),
             "block_causal": block_causal, "block_causal4": block_causal}
    if "input/position_ids" in golden:
        found["posids"] = (tokens, golden["input/position_ids"], AttentionSpec())
    if "input/doc_ids" in golden:
        found["doc"] = (tokens, positions, AttentionSpec.own(segment=jnp.asarray(golden["input/doc_ids"])))
    if "bd_train/input_ids" in golden:
        clean = jnp.asarray(golden["input/clean"])
        block = blocks.ids(jnp.asarray(positions), BLOCK, "row")
        found["bd_train"] = blocks.doubled(jnp.asarray(tokens), clean, jnp.asarray(positions), AttentionSpec(), block)
    return {tag: run for tag, run in found.items() if f"{tag}/logits" in golden}


def _activations(fixture: str, golden, model, variables) -> Iterator[Case]:
    run = jax.jit(lambda v, *x: (model.apply(v, *x[:2], None, x[2], None, None)[0], model.intermediates(v, *x)))
    for tag, (tokens, positions, spec) in _inputs(golden).items():
        mask = {"block_causal4": "input/block_bias", "block_causal": "block_causal/mask", "bd_train": "bd_train/mask"}.get(tag)
        if mask is not None:
            want = np.broadcast_to(golden[mask].reshape(tokens.shape[1], -1), (len(tokens), tokens.shape[1], tokens.shape[1]))
            yield _compare(f"{fixture}/{tag}/mask", visible(spec), want, atol=0, rtol=0)
        hidden, stacks = run(variables, jnp.asarray(tokens), jnp.asarray(positions), spec)
        joined = lambda key, stacks=stacks: np.concatenate([stack[key] for stack in stacks if key in stack])
        outputs = joined("output")
        yield _compare(f"{fixture}/{tag}/logits", model.head(variables, hidden), golden[f"{tag}/logits"])
        yield _compare(f"{fixture}/{tag}/layer_outputs", outputs, golden[f"{tag}/layer_outputs"])
        states = np.concatenate([np.asarray(variables["params"]["embedding"])[tokens][None], outputs[:-1], np.asarray(hidden)[None]])
        yield _compare(f"{fixture}/{tag}/hidden_states", states, golden[f"{tag}/hidden_states"])
        if f"{tag}/attn_outputs" in golden:
            yield _compare(f"{fixture}/{tag}/attn_outputs", joined("attention"), golden[f"{tag}/attn_outputs"])
        if f"{tag}/router_logits" in golden:
            yield _compare(f"{fixture}/{tag}/router_logits", joined("router_logits"), golden[f"{tag}/router_logits"])
            order = np.argsort(joined("experts"), axis=-1)
            theirs = np.argsort(golden[f"{tag}/topk_idx"], axis=-1)
            yield _compare(f"{fixture}/{tag}/topk_idx", np.take_along_axis(joined("experts"), order, -1),
                           np.take_along_axis(golden[f"{tag}/topk_idx"], theirs, -1), atol=0, rtol=0)
            yield _compare(f"{fixture}/{tag}/topk_weights", np.take_along_axis(joined("weights"), order, -1),
                           np.take_along_axis(golden[f"{tag}/topk_weights"], theirs, -1))


def _losses(fixture: str, golden, model, variables, family: str) -> Iterator[Case]:
    clean, noised, mask = (jnp.asarray(golden[f"input/{key}"]) for key in ("clean", "noised", "mask"))
    B, T = clean.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    p_BT = jnp.broadcast_to(jnp.asarray(golden["input/t"])[:, None], (B, T))
    rest = {key: value for key, value in variables.items() if key != "params"}

    def mdm(params, tokens, noised, masked, p_BT, target_BT, normalization):
        terms, stats = loss_lib.elbo_terms(model.apply, model.cross_entropy, {"params": params, **rest}, tokens, noised, masked, p_BT, positions,
                                           AttentionSpec(), lambda p: 1 / p)
        return jnp.sum(loss_lib.term_weights(target_BT, jnp.ones_like(tokens), normalization) * terms.weighted_BT), (terms.nll_BT, stats)

    everywhere = jnp.ones_like(mask)
    recorded = lambda p: mdm(p, clean, noised, mask, p_BT, everywhere, "token")
    (loss, (nll_BT, stats)), gradient = jax.jit(jax.value_and_grad(recorded, has_aux=True))(variables["params"])
    yield _compare(f"{fixture}/loss/mdm", loss, golden["loss/mdm"], LOSS_ATOL)
    every_nll, _ = jax.jit(lambda p: mdm(p, clean, noised, everywhere, p_BT, everywhere, "token")[1])(variables["params"])
    yield _compare(f"{fixture}/loss/ce_per_token", every_nll, golden["loss/ce_per_token"], LOSS_ATOL)
    yield _compare(f"{fixture}/loss/ce_masked_only", nll_BT, np.where(golden["input/mask"], golden["loss/ce_per_token"], 0), LOSS_ATOL)
    gradients = {"grad_mdm": gradient}
    if "loss/lb" in golden:
        gradients["grad_total"] = yield from _router_losses(fixture, golden, model, variables, mdm, stats)
    yield from _gradients(fixture, golden, family, gradients)


def _router_losses(fixture: str, golden, model, variables, mdm, stats) -> Generator[Case, None, Any]:
    """Cases of the router's losses and of fine-tuning; returns the gradient of the total loss."""
    clean, noised, mask = (jnp.asarray(golden[f"input/{key}"]) for key in ("clean", "noised", "mask"))
    B, T = clean.shape
    positions, everywhere = jnp.broadcast_to(jnp.arange(T), (B, T)), jnp.ones_like(mask)
    p_BT = jnp.broadcast_to(jnp.asarray(golden["input/t"])[:, None], (B, T))
    layers = stats.z_B.shape[0]
    one = lambda i: jax.tree.map(lambda x: x[i:i + 1], stats)
    yield _compare(f"{fixture}/loss/lb", moe.balance_loss(stats, "all_layers"), golden["loss/lb"], LOSS_ATOL)
    each = [moe.balance_loss(one(i), "all_layers") for i in range(layers)]
    yield _compare(f"{fixture}/loss/lb_per_layer", each, golden["loss/lb_per_layer"], LOSS_ATOL)
    yield _compare(f"{fixture}/loss/lb_mean_of_layers", moe.balance_loss(stats, "per_layer"), golden["loss/lb_per_layer"].mean(), LOSS_ATOL)
    yield _compare(f"{fixture}/loss/z", moe.z_sum(stats) / (B * T), golden["loss/z"], LOSS_ATOL)
    invisible = jnp.asarray(golden["input/attention_mask"] == 0)
    padded = {"with": AttentionSpec(padding_k=invisible),
              "without": AttentionSpec(block_q=jnp.zeros_like(positions), block_k=invisible.astype(jnp.int32))}  # invisible, but counted
    tokens = jnp.asarray(golden["input/padded"])
    balance = jax.jit(lambda spec: moe.balance_loss(model.apply(variables, tokens, positions, None, spec)[2], "all_layers"))
    for which, spec in padded.items():
        yield _compare(f"{fixture}/loss/lb_padded_{which}_mask", balance(spec), golden[f"loss/lb_padded_{which}_mask"], LOSS_ATOL)

    def total(params):
        loss, (_, stats) = mdm(params, clean, noised, mask, p_BT, everywhere, "token")
        return loss + 0.01 * moe.balance_loss(stats, "all_layers") + 0.001 * moe.z_sum(stats) / (B * T)
    value, gradient = jax.jit(jax.value_and_grad(total))(variables["params"])
    yield _compare(f"{fixture}/loss/total_lb0.01_z0.001", value, golden["loss/total_lb0.01_z0.001"], LOSS_ATOL)

    answer = positions >= jnp.asarray(golden["sft/prompt_lens"])[:, None]
    sft = mdm(variables["params"], clean, jnp.asarray(golden["sft/noised"]), jnp.asarray(golden["sft/mask"]), p_BT, answer, "sequence")[0]
    yield _compare(f"{fixture}/sft/loss", sft, golden["sft/loss"], LOSS_ATOL)
    return gradient


def _block_losses(fixture: str, golden, model, variables, family: str) -> Iterator[Case]:
    """Block diffusion on [x_t ; x_0], as the training step computes it."""
    clean, noised, mask = (jnp.asarray(golden[f"input/{key}"]) for key in ("clean", "noised", "mask"))
    B, T = clean.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    p_BT = jnp.broadcast_to(jnp.asarray(golden["input/t"])[:, None], (B, T))
    rest = {key: value for key, value in variables.items() if key != "params"}

    def terms(params, masked):
        return loss_lib.elbo_terms(model.apply, model.cross_entropy, {"params": params, **rest}, clean, noised, masked, p_BT, positions,
                                   AttentionSpec(), lambda p: 1 / p, block_BT=blocks.ids(positions, BLOCK, "row"))[0]

    def mean(params):
        found = terms(params, mask)
        return found.nll_BT.sum() / mask.sum(), found

    (loss, found), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(variables["params"])
    yield _compare(f"{fixture}/loss/bd_mean_masked", loss, golden["loss/bd_mean_masked"], LOSS_ATOL)
    yield _compare(f"{fixture}/loss/bd_inv_t", found.weighted_BT.sum() / (B * T), golden["loss/bd_inv_t"], LOSS_ATOL)
    every = jax.jit(terms)(variables["params"], jnp.ones_like(mask)).nll_BT
    yield _compare(f"{fixture}/loss/ce_per_token", every, golden["loss/ce_per_token"], LOSS_ATOL)
    yield from _gradients(fixture, golden, family, {"grad_bd_mean": gradient})


def _gradients(fixture: str, golden, family: str, trees: dict[str, Any]) -> Iterator[Case]:
    for tag, tree in trees.items():
        ours = hf_weights.to_theirs(family, {"params": tree})
        for key in sorted(k for k in golden if k.startswith(tag + "/")):
            name = key.split("/", 1)[1]
            got = global_norm(tree) if name == "__global_norm__" else ours[name]
            yield _compare(f"{fixture}/{key}", got, golden[key], LOSS_ATOL)


GENERATIONS = {  # how the reference was run
    "greedy_b1": decoders.LowConfidence(16, 16, 8), "greedy_semi_ar": decoders.LowConfidence(16, 4, 16),
    "cfg": decoders.LowConfidence(8, 8, 4, guidance=1.5),
    "b_thr95": block_decoders.BlockThreshold(12, BLOCK, BLOCK, 0.95), "b_thr05": block_decoders.BlockThreshold(12, BLOCK, BLOCK, 0.05),
    "half_steps": block_decoders.BlockThreshold(12, BLOCK, BLOCK // 2, 0.95),
}


def _generations(fixture: str, golden, model, variables, published: hf_config.Published) -> Iterator[Case]:
    prompt, mask, eos = golden["gen/prompt"][0].tolist(), published.mask_id, published.eos_id
    for name, decoder in GENERATIONS.items():
        if f"gen/{name}" not in golden:
            continue
        canvas = canvas_lib.build([[prompt, decoder.gen_length]], block_length=decoder.block_length, mask_id=mask, pad_id=eos,
                                  max_length=published.model.max_length, aligned=decoder.aligned)
        tokens, _ = engine.generate(engine.Denoiser.of(model), variables, canvas, decoder, key=jax.random.key(0), row_B=jnp.zeros(1, jnp.int32),
                                    mask_id=mask, eos_id=eos, stop_at_eos=decoder.block_causal)
        tokens = np.asarray(tokens)[canvas.valid_BT][None]
        if decoder.block_causal:  # recorded without the prompt, up to the first EOS
            answer = tokens[0, len(prompt):]
            tokens = answer[: np.argmax(answer == eos) + 1 if (answer == eos).any() else None][None]
        yield _compare(f"{fixture}/gen/{name}", tokens, golden[f"gen/{name}"], atol=0, rtol=0)


def all_kernels(name: str) -> config_lib.Kernels:
    """Every operation by the implementation of this name."""
    return config_lib.Kernels(**dict.fromkeys(config_lib.IMPLEMENTATIONS, name))


def main(folder: str, kernels: str = "auto") -> int:
    found = sorted(path for path in pathlib.Path(folder).iterdir() if (path / "golden.npz").exists())
    if not found:
        print(f"error: {folder} holds no fixture (a folder with config.json, model.safetensors and golden.npz)", file=sys.stderr)
        return 1
    counts = {"PASS": 0, "FAIL": 0, "SKIP": 0}
    for path in found:
        with jax.default_matmul_precision("highest"), dispatch.interpreted() if kernels != "auto" else contextlib.nullcontext():
            for status, name, detail in check_folder(path, all_kernels(kernels)):
                counts[status] += 1
                print(f"{status} {name}: {detail}", flush=True)
    print(f"{counts['PASS']} passed, {counts['FAIL']} failed" + (f", {counts['SKIP']} skipped" if counts["SKIP"] else ""))
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.parity")
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--kernels", default="auto", choices=("auto", "reference", *dispatch.BACKENDS[1:]))
    arguments = parser.parse_args()
    sys.exit(main(arguments.folder, arguments.kernels))
