"""Published folders for tests: fields of config.json as the Hub has them, and every tensor written out from the families' own layouts.

Nothing here comes from our tables of names, so that what reads or writes by them can be checked against it.
"""

import json
import math
import pathlib
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from llada_jax import tokenizer
from llada_jax.interop import shards

V = 300  # vocabulary of the tiny ones: 256 bytes, the end at V - 2, the mask at V - 1
BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype("float16"), np.dtype("float32")
NANS = {F32: 0x7F800000, BF16: 0x7F80, F16: 0x7C00}  # bits of the exponent; all set, a number is not finite
Shapes = Iterator[tuple[str, tuple[int, ...]]]

IDS = {"mask_token_id": V - 1, "eos_token_id": V - 2, "pad_token_id": V - 2}
LLADA = {
    "architectures": ["LLaDAModelLM"], "model_type": "llada", "d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 40,
    "vocab_size": V, "embedding_size": V, "max_sequence_length": 64, "rope_theta": 500000.0, "rms_norm_eps": 1e-05, "weight_tying": False,
    "activation_type": "silu", "block_type": "llama", "block_group_size": 1, "layer_norm_type": "rms", "layer_norm_with_affine": True, "rope": True,
    "rope_full_precision": True, "alibi": False, "attention_layer_norm": False, "input_emb_norm": False, "scale_logits": False,
    "include_bias": False, "include_qkv_bias": False, "bias_for_layer_norm": False, "multi_query_attention": None, "mlp_ratio": 4,
    "flash_attention": False, "init_fn": "mitchell", "init_std": 0.02, "init_device": "meta"} | IDS
LLADA_MOE = {
    "architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2, "expert_intermediate_size": 12,
    "dense_intermediate_size": 40, "shared_expert_intermediate_size": None, "moe_layer_freq": [1, 1, 1], "rope_theta": 50000, "rope_scaling": None,
    "partial_rotary_factor": 1, "rms_norm_eps": 1e-05, "max_position_embeddings": 64, "qk_layernorm": True, "norm_topk_prob": None,
    "moe_router_enable_expert_bias": False, "moe_router_score_function": "softmax", "clip_qkv": None, "attention_bias": False,
    "tie_word_embeddings": False, "hidden_act": "silu", "initializer_range": 0.02, "router_aux_loss_coef": 0.01} | IDS
EVERY_OPTION = LLADA_MOE | {
    "num_key_value_heads": 2, "moe_layer_freq": [0, 1, 1], "shared_expert_intermediate_size": 20, "moe_router_enable_expert_bias": True,
    "clip_qkv": 8.0, "partial_rotary_factor": 0.5}
LLADA2 = {
    "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 40, "moe_intermediate_size": 12, "num_experts": 8,
    "num_experts_per_tok": 2, "num_shared_experts": 1, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
    "norm_topk_prob": True, "score_function": "sigmoid", "router_dtype": "fp32", "moe_router_enable_expert_bias": True, "rope_theta": 600000,
    "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-06, "max_position_embeddings": 64, "use_qk_norm": True, "use_qkv_bias": False, "use_bias": False,
    "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": 4096, "rope_scaling": None, "norm_head": False,
    "hidden_act": "silu", "initializer_range": 0.02} | IDS
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40, "rope_theta": 1000000.0, "rms_norm_eps": 1e-06,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": 32,
    "hidden_act": "silu", "initializer_range": 0.02,
    "bos_token_id": V - 2, "eos_token_id": V - 2}
DREAM = QWEN2 | {"architectures": ["DreamModel"], "model_type": "Dream"} | IDS
QWEN3_MOE = QWEN2 | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 3, "head_dim": 16, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 12, "decoder_sparse_step": 1, "mlp_only_layers": [1], "norm_topk_prob": True,
    "attention_bias": False}

CASES = {  # name: fields, how the experts lie
    "llada": (LLADA | {"n_kv_heads": 2}, "per_expert"), "llada, tied": (LLADA | {"weight_tying": True}, "per_expert"),
    "llada_moe": (LLADA_MOE, "per_expert"), "llada_moe, fused": (LLADA_MOE, "fused"),
    "llada_moe, every option": (EVERY_OPTION, "per_expert"), "llada_moe, every option, fused": (EVERY_OPTION, "fused"),
    "llada2_moe": (LLADA2, "per_expert"), "llada2_moe, stacked": (LLADA2, "stacked"),
    "dream": (DREAM, "per_expert"), "qwen2": (QWEN2, "per_expert"), "qwen2, tied": (QWEN2 | {"tie_word_embeddings": True}, "per_expert"),
    "qwen3_moe": (QWEN3_MOE, "per_expert"),
}
_MINI = LLADA2 | {
    "vocab_size": 157184, "num_hidden_layers": 20, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 5120, "moe_intermediate_size": 512, "num_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "max_position_embeddings": 32768, "mask_token_id": 156895, "eos_token_id": 156892, "pad_token_id": 156892}
FULL = {  # the published sizes
    "LLaDA-8B": LLADA | {
        "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288, "vocab_size": 126464, "embedding_size": 126464,
        "max_sequence_length": 4096, "mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081},
    "LLaDA-MoE-7B-A1B": {key: value for key, value in LLADA_MOE.items() if key != "mask_token_id"} | {
        "vocab_size": 157184, "num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "expert_intermediate_size": 1024, "dense_intermediate_size": 8192, "moe_layer_freq": [1] * 16,
        "max_position_embeddings": 8192, "eos_token_id": 156892, "pad_token_id": 156892},
    "LLaDA2.0-mini": _MINI,
    "LLaDA2.0-flash": _MINI | {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 9216,
                               "moe_intermediate_size": 1024},
}  # fmt: skip


def tensors(fields: dict, layout: str = "per_expert") -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of this checkpoint."""
    kind = fields["architectures"][0]
    return dict({"LLaDAModelLM": _llada, "LLaDA2MoeModelLM": _llada2}.get(kind, _llama)(fields, layout))


def _llada(f: dict, _: str) -> Shapes:
    D, F, rows = f["d_model"], f["mlp_hidden_size"], f["d_model"] // f["n_heads"] * f["n_kv_heads"]
    yield "model.transformer.wte.weight", (f["embedding_size"], D)
    for i in range(f["n_layers"]):
        block = {"attn_norm": (D,), "ff_norm": (D,), "q_proj": (D, D), "k_proj": (rows, D), "v_proj": (rows, D), "attn_out": (D, D),
                 "ff_proj": (F, D), "up_proj": (F, D), "ff_out": (D, F)}
        yield from ((f"model.transformer.blocks.{i}.{name}.weight", shape) for name, shape in block.items())
    yield "model.transformer.ln_f.weight", (D,)
    if not f["weight_tying"]:
        yield "model.transformer.ff_out.weight", (f["embedding_size"], D)


def _llama(f: dict, layout: str) -> Shapes:
    """LLaDA-MoE, Dream, Qwen2 and Qwen3-MoE."""
    family, D, heads = f["architectures"][0], f["hidden_size"], f["num_attention_heads"]
    d, E = f.get("head_dim") or D // heads, f.get("num_experts", 0)
    F, rows = f.get("expert_intermediate_size") or f.get("moe_intermediate_size"), d * f["num_key_value_heads"]
    yield "model.embed_tokens.weight", (f["vocab_size"], D)
    for i in range(f["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (D,)
        yield layer + "post_attention_layernorm.weight", (D,)
        for letter, size in (("q", heads * d), ("k", rows), ("v", rows)):
            yield f"{layer}self_attn.{letter}_proj.weight", (size, D)
            if family in ("Qwen2ForCausalLM", "DreamModel"):
                yield f"{layer}self_attn.{letter}_proj.bias", (size,)
        yield layer + "self_attn.o_proj.weight", (D, heads * d)
        if E:
            yield layer + "self_attn.q_norm.weight", (d,)
            yield layer + "self_attn.k_norm.weight", (d,)
        if not E or i in f.get("mlp_only_layers", ()) or not f.get("moe_layer_freq", [1] * (i + 1))[i]:
            yield from _swiglu(layer + "mlp.", D, f.get("intermediate_size") or f["dense_intermediate_size"])
            continue
        yield layer + "mlp.gate.weight", (E, D)
        if f.get("moe_router_enable_expert_bias"):
            yield layer + "mlp.expert_bias", (E,)
        if f.get("shared_expert_intermediate_size"):
            yield from _swiglu(layer + "shared_expert.", D, f["shared_expert_intermediate_size"])
        if layout == "fused":
            yield layer + "mlp.w1", (E, 2 * F, D)
            yield layer + "mlp.w2", (E, D, F)
        else:
            for e in range(E):
                yield from _swiglu(f"{layer}mlp.experts.{e}.", D, F)
    yield "model.norm.weight", (D,)
    if not f["tie_word_embeddings"]:
        yield "lm_head.weight", (f["vocab_size"], D)


def _llada2(f: dict, layout: str) -> Shapes:
    D, d, E, F = f["hidden_size"], f["head_dim"], f["num_experts"], f["moe_intermediate_size"]
    yield "model.word_embeddings.weight", (f["vocab_size"], D)
    for i in range(f["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (D,)
        yield layer + "post_attention_layernorm.weight", (D,)
        yield layer + "attention.query_key_value.weight", ((f["num_attention_heads"] + 2 * f["num_key_value_heads"]) * d, D)
        yield layer + "attention.dense.weight", (D, f["num_attention_heads"] * d)
        yield layer + "attention.query_layernorm.weight", (d,)
        yield layer + "attention.key_layernorm.weight", (d,)
        if i < f["first_k_dense_replace"]:
            yield from _swiglu(layer + "mlp.", D, f["intermediate_size"])
            continue
        yield layer + "mlp.gate.weight", (E, D)
        yield layer + "mlp.gate.expert_bias", (E,)
        yield from _swiglu(layer + "mlp.shared_experts.", D, F * f["num_shared_experts"])
        if layout == "stacked":
            yield from ((f"{layer}mlp.experts.{name}_proj", (E, *shape)) for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))))
        else:
            for e in range(E):
                yield from _swiglu(f"{layer}mlp.experts.{e}.", D, F)
    yield "model.norm.weight", (D,)
    yield "lm_head.weight", (f["vocab_size"], D)


def _swiglu(prefix: str, D: int, F: int) -> Shapes:
    yield from ((f"{prefix}{name}_proj.weight", shape) for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))))


DTYPES = {  # how a checkpoint may be stored: name of a tensor -> dtype
    "float32": lambda name: F32, "float16": lambda name: F16, "bfloat16": lambda name: BF16,
    "router in float32": lambda name: F32 if name.endswith(("mlp.gate.weight", "expert_bias")) else BF16,
    "mixed": lambda name: (F32, BF16, F16)[len(name) % 3],
}


def random_bits(shape: tuple[int, ...], dtype: np.dtype, rng: np.random.Generator, finite: bool = True) -> np.ndarray:
    """Any bit pattern that is a number: subnormal, negative zero, the largest; with `finite` off NaN with any payload and infinity too."""
    kind = {4: np.uint32, 2: np.uint16}[dtype.itemsize]
    bits = rng.integers(0, 2 ** (8 * dtype.itemsize), shape, kind)
    if finite:
        bits = np.where(bits & NANS[dtype] == NANS[dtype], bits ^ kind(NANS[dtype] & -NANS[dtype]), bits)
    return bits.view(dtype)


def random_tensors(fields: dict, layout: str = "per_expert", dtypes=DTYPES["float32"], seed: int = 0, finite: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: random_bits(shape, dtypes(name), rng, finite) for name, shape in tensors(fields, layout).items()}


def write(folder: pathlib.Path, fields: dict, arrays: dict[str, np.ndarray], num_files: int = 1, seed: int = 0) -> pathlib.Path:
    """A published folder with everything that lies in one; tensors in any order, in files that say nothing of what they hold."""
    rng = np.random.default_rng(seed)
    names = [str(name) for name in rng.permutation(list(arrays))]
    files = [f"model-{i:05d}-of-{num_files:05d}.safetensors" for i in range(1, num_files + 1)] if num_files > 1 else [shards.SINGLE]
    of = {name: files[int(rng.integers(num_files))] for name in names[num_files:]} | dict(zip(names, files, strict=False))
    with shards.Writer(folder, {name: (arrays[name].dtype, arrays[name].shape) for name in names}, of) as writer:
        for name, array in arrays.items():
            writer.array(name)[...] = array
        extra = {"auto_map": {"AutoModel": "modeling_none.None"}, "transformers_version": "4.46.3"}  # unknown to us
        (writer.folder / "config.json").write_text(json.dumps(fields | extra, indent=1) + "\n\n")
        special = {"<|endoftext|>": V - 2} | ({"<|mask|>": V - 1} if "mask_token_id" in fields else {})
        (writer.folder / "tokenizer.json").write_text(tokenizer.bytes_json(max(special.values()) + 1, special))
        (writer.folder / "generation_config.json").write_text('{"eos_token_id": 1}')
        (writer.folder / "README.md").write_text("# A model\r\n")
        (writer.folder / "modeling_none.py").write_text("raise SystemExit('a published folder was executed')\n")
    return folder


def content(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def size(fields: dict) -> tuple[int, int]:
    """(tensors, numbers)."""
    shapes = tensors(fields)
    return len(shapes), sum(map(math.prod, shapes.values()))
