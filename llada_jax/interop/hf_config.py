"""Published `config.json` files to our configuration and back: one table of fields a family.

A family is found by `architectures`: LLaDA and LLaDA-MoE share a `model_type`. Nothing in a folder is ever executed.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath

from llada_jax import config as config_lib
from llada_jax.config import ConfigError, Model
from llada_jax.interop.chat import IDS

NORMAL = {  # fields that change the computation, and the values that mean what our model computes; absent is such a value too
    "rope_scaling": (None,), "attention_bias": (False, None), "use_sliding_window": (False, None), "hidden_act": ("silu", None),
}
MOST = {  # of what tables are as long as: more is damage, which would fill the memory
    "num_hidden_layers": 1000, "n_layers": 1000, "first_k_dense_replace": 1000, "num_experts": 10_000, "num_local_experts": 10_000,
}


class Published(NamedTuple):
    """What a published folder says of itself."""

    family: str
    model: Model
    mask_id: int | None  # None: an autoregressive model has no mask
    eos_id: int
    objective: str  # masked | autoregressive
    fields: dict[str, Any]  # the whole file


class Family(NamedTuple):
    """How a family writes its config. `fields` pairs their names with ours; `special` covers what is no plain copy."""

    architectures: tuple[str, ...]  # the first is written
    model_type: str
    fields: dict[str, str]
    special: Callable[[dict[str, Any]], dict[str, Any]]  # their fields -> settings of Model
    write: Callable[[Model], dict[str, Any]]  # the inverse of `special`
    normal: dict[str, tuple[Any, ...]] = NORMAL
    ids: str = ""  # key of IDS: ids that config.json may leave out
    objective: str = "masked"


def read(folder: str, mask_id: int | None = None) -> Published:
    """The family and our configuration of the folder's config.json; `mask_id` where the file has none and the family's own does not fit.

    Raises ConfigError for a missing or broken file, a family or setting that is not supported, or values that fit no model.
    """
    path = epath.Path(folder) / "config.json"
    if not path.exists():
        raise ConfigError(f"{folder} holds no config.json")
    try:
        fields = json.loads(path.read_text())
        if not isinstance(fields, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not the json of a config ({error})") from None
    return parse(fields, str(path), mask_id)


def parse(fields: dict[str, Any], name: str = "config.json", mask_id: int | None = None) -> Published:
    """The same from the fields themselves; `name` is for messages."""
    found = fields.get("architectures")
    architecture = found[0] if isinstance(found, list) and found else None
    key = next((key for key, family in FAMILIES.items() if architecture in family.architectures), None)
    if key is None:
        known = ", ".join(family.architectures[0] for family in FAMILIES.values())
        raise ConfigError(f"{name}: architectures={found!r} is not supported; supported: {known}")
    family, known_ids = FAMILIES[key], IDS.get(FAMILIES[key].ids)
    for field, allowed in family.normal.items():
        if fields.get(field, allowed[0]) not in allowed:
            raise ConfigError(f"{name}: {field}={fields[field]!r} is not supported; supported: {', '.join(map(repr, allowed))}")
    for field, most in MOST.items():
        value = fields.get(field)
        if value is not None and not (type(value) is int and 0 <= value <= most):
            raise ConfigError(f"{name}: {field}={value!r} is not a whole number from 0 to {most}")
    try:
        settings = {ours: fields[theirs] for theirs, ours in family.fields.items() if fields.get(theirs) is not None}
        settings |= family.special(fields)
        missing = [theirs for theirs, ours in family.fields.items() if ours not in settings and ours not in OPTIONAL]
        if missing:
            raise ConfigError(f"without {', '.join(missing)} it describes no model")
        for ours, value in settings.items():
            if isinstance(value, int | float) and not 0 <= value <= (1 if ours == "rotary_fraction" else 2**31 - 1):
                raise ConfigError(f"model.{ours}={value!r} is out of range")
        model = config_lib.from_config_dict({"model": settings, "data": {"sequence_length": 1}}).model
        eos = next((fields[key] for key in ("eos_token_id", "pad_token_id") if fields.get(key) is not None), known_ids.eos if known_ids else None)
        eos_id = eos[0] if isinstance(eos, list) and eos else eos
        named = [fields.get("mask_token_id"), mask_id, known_ids.mask if known_ids else None]
        mask_id = next((index for index in named if index is not None), None)
    except KeyError as error:
        raise ConfigError(f"{name}: the field {error} is missing") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ConfigError(f"{name}: {error}") from None
    for role, index in (("mask", mask_id), ("eos", eos_id)):
        if index is None and (role == "eos" or family.objective == "masked"):
            raise ConfigError(f"{name}: {role}_token_id is missing")
        if index is not None and not (type(index) is int and 0 <= index < model.vocab_size):
            raise ConfigError(f"{name}: {role}_token_id={index!r} is not an id of the {model.vocab_size} tokens"
                              + ("; give --mask_id" if role == "mask" and fields.get("mask_token_id") is None else ""))
    return Published(key, model, mask_id if family.objective == "masked" else None, eos_id, family.objective, fields)


def write(family: str, model: Model, mask_id: int | None, eos_id: int) -> dict[str, Any]:
    """Fields of a config.json that `read` turns into this model; raises ConfigError when the family cannot express it."""
    if family not in FAMILIES:
        raise ConfigError(f"unknown family '{family}'{config_lib.nearest(family, FAMILIES)}")
    table = FAMILIES[family]
    fields = {"architectures": [table.architectures[0]], "model_type": table.model_type}
    fields |= {theirs: getattr(model, ours) for theirs, ours in table.fields.items()} | table.write(model)
    fields |= {"mask_token_id": mask_id} if mask_id is not None else {}
    fields |= {"eos_token_id": eos_id, "pad_token_id": eos_id, "torch_dtype": model.param_dtype}
    back = parse(fields, f"a {family} config").model
    differing = [key for key in Model.__dataclass_fields__ if key not in FREE and _resolved(back, key) != _resolved(model, key)]
    if differing:
        raise ConfigError(f"{table.architectures[0]} cannot express " + ", ".join(f"model.{key}={getattr(model, key)!r}" for key in differing))
    return fields


def family_of(model: Model, objective: str = "masked") -> str:
    """The first family that can express this model; raises ConfigError, with each family's reason, when none can."""
    reasons = []
    for key, family in FAMILIES.items():
        if family.objective == objective:
            try:
                write(key, model, 0 if objective == "masked" else None, 0)
                return key
            except ConfigError as error:
                reasons.append(str(error))
    raise ConfigError("no published layout fits: " + "; ".join(reasons))


OPTIONAL = ("num_kv_heads", "tie_embeddings", "init_std")  # settings whose absence means the same to their classes and to ours
FREE = ("compute_dtype", "param_dtype", "remat", "scan_layers", "init_std")  # not the architecture


def _resolved(model: Model, key: str) -> Any:
    """A setting without its abbreviations, and without what nothing reads."""
    moe = {"experts_per_token", "num_experts", "expert_size", "shared_expert_size"}
    if key in ("num_kv_heads", "head_dim"):
        return model.kv_heads if key == "num_kv_heads" else model.head_size
    if (key == "dense_size" and not model.dense_layers) or (not model.moe_layers and (key in moe or key.startswith("router_"))):
        return None
    if key == "router_bias_in_weight" and not model.router_bias:
        return None
    return getattr(model, key)


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings, which newer files keep in `rope_parameters`."""
    nested = fields.get("rope_parameters") or {}
    if nested.get("rope_type", "default") != "default":
        raise ConfigError(f"rope_parameters={nested!r} is not supported")
    fraction = fields.get("partial_rotary_factor", nested.get("partial_rotary_factor"))
    theta = fields["rope_theta"] if "rope_theta" in fields else nested["rope_theta"]
    return {"rope_theta": theta, "rotary_fraction": 1.0 if fraction is None else fraction}


LLAMA = {  # names that most families share
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads", "rms_norm_eps": "norm_eps", "max_position_embeddings": "max_length",
    "tie_word_embeddings": "tie_embeddings", "initializer_range": "init_std",
}
EXPERTS = {"num_experts": "num_experts", "num_experts_per_tok": "experts_per_token"}


def _read_llada_moe(fields):
    """norm_topk_prob, routed_scaling_factor and the router's groups stand in its configs, but its model class ignores them."""
    layers = fields["num_hidden_layers"]
    frequency = fields.get("moe_layer_freq") or [1] * layers
    frequency = frequency if isinstance(frequency, list) else [int(i % frequency == 0) for i in range(layers)]
    if len(frequency) < layers:
        raise ConfigError(f"moe_layer_freq holds {len(frequency)} of {layers} layers")
    dense = tuple(i for i, moe in enumerate(frequency[:layers]) if not moe)
    return _rope(fields) | {
        "dense_layers": dense, "dense_size": fields["dense_intermediate_size"] if dense else 0,
        "shared_expert_size": fields.get("shared_expert_intermediate_size") or 0, "qk_norm": fields.get("qk_layernorm", True),
        "router_bias": bool(fields.get("moe_router_enable_expert_bias")), "clip_qkv": fields.get("clip_qkv") or 0.0,
    }


def _write_llada_moe(model):
    return {
        "moe_layer_freq": [int(i in model.moe_layers) for i in range(model.num_layers)], "dense_intermediate_size": model.dense_size or None,
        "shared_expert_intermediate_size": model.shared_expert_size or None, "qk_layernorm": model.qk_norm,
        "moe_router_enable_expert_bias": model.router_bias, "clip_qkv": model.clip_qkv or None, "num_key_value_heads": model.kv_heads,
        "rope_theta": model.rope_theta, "partial_rotary_factor": model.rotary_fraction, "norm_topk_prob": None, "hidden_act": "silu",
    }


def _all_dense(fields, layers, size):
    return {"dense_layers": tuple(range(fields[layers])), "dense_size": fields[size]}


def _read_llada(fields):
    if fields.get("mlp_hidden_size") is None:
        raise ConfigError("mlp_hidden_size is missing")
    return _all_dense(fields, "n_layers", "mlp_hidden_size") | {
        "vocab_size": fields.get("embedding_size") or fields["vocab_size"], "num_kv_heads": fields.get("n_kv_heads") or 0, "qk_norm": False}


def _write_llada(model):
    return {"mlp_hidden_size": model.dense_size, "vocab_size": model.vocab_size, "embedding_size": model.vocab_size, "n_kv_heads": model.kv_heads,
            "block_type": "llama", "block_group_size": 1, "activation_type": "silu", "layer_norm_type": "rms", "layer_norm_with_affine": True,
            "rope": True, "rope_full_precision": True, "attention_layer_norm": False, "include_bias": False, "include_qkv_bias": False,
            "bias_for_layer_norm": False, "scale_logits": False, "input_emb_norm": False, "alibi": False, "multi_query_attention": None}


def _read_llada2(fields):
    """norm_topk_prob is ignored by its model class: the weights are always divided by their sum."""
    first = fields.get("first_k_dense_replace") or 0
    return _rope(fields) | {
        "head_dim": fields.get("head_dim") or 0, "dense_layers": tuple(range(first)), "dense_size": fields["intermediate_size"] if first else 0,
        "shared_expert_size": fields["moe_intermediate_size"] * (fields.get("num_shared_experts") or 0),
        "router_score": "sigmoid", "router_renormalize": fields["num_experts_per_tok"] > 1, "router_bias": True, "router_bias_in_weight": False,
        "qk_norm": fields.get("use_qk_norm", True),
    }


def _write_llada2(model):
    first = len(model.dense_layers)
    shared = model.shared_expert_size // max(model.expert_size, 1)
    return {
        "head_dim": model.head_size, "first_k_dense_replace": first, "intermediate_size": model.dense_size or model.expert_size,
        "num_shared_experts": shared, "num_key_value_heads": model.kv_heads, "use_qk_norm": model.qk_norm, "rope_theta": model.rope_theta,
        "partial_rotary_factor": model.rotary_fraction, "score_function": "sigmoid", "norm_topk_prob": True, "router_dtype": "fp32",
        "moe_router_enable_expert_bias": True, "use_bias": False, "use_qkv_bias": False, "hidden_act": "silu",
    }


def _read_qwen2(fields, shift=False):
    dense = _all_dense(fields, "num_hidden_layers", "intermediate_size")
    return _rope(fields) | dense | {"qk_norm": False, "qkv_bias": True, "shift_predictions": shift}


def _write_qwen2(model):
    return {"intermediate_size": model.dense_size, "num_key_value_heads": model.kv_heads, "rope_theta": model.rope_theta, "hidden_act": "silu",
            "use_sliding_window": False}


def _read_qwen3_moe(fields):
    layers, step = range(fields["num_hidden_layers"]), fields.get("decoder_sparse_step") or 1
    dense = tuple(i for i in layers if i in (fields.get("mlp_only_layers") or ()) or (i + 1) % step)
    return _rope(fields) | {"head_dim": fields.get("head_dim") or 0, "dense_layers": dense, "dense_size": fields["intermediate_size"] if dense else 0,
                            "router_renormalize": bool(fields.get("norm_topk_prob"))}


def _write_qwen3_moe(model):
    return {"head_dim": model.head_size, "mlp_only_layers": list(model.dense_layers), "decoder_sparse_step": 1, "hidden_act": "silu",
            "intermediate_size": model.dense_size or model.expert_size, "num_key_value_heads": model.kv_heads, "rope_theta": model.rope_theta,
            "norm_topk_prob": model.router_renormalize, "use_sliding_window": False}


FAMILIES = {
    "llada": Family(  # LLaDA-8B (arXiv 2502.09992) and LLaDA-1.5
        ("LLaDAModelLM",), "llada",
        {"d_model": "hidden_size", "n_layers": "num_layers", "n_heads": "num_heads", "rms_norm_eps": "norm_eps", "rope_theta": "rope_theta",
         "max_sequence_length": "max_length", "weight_tying": "tie_embeddings", "init_std": "init_std"},
        _read_llada, _write_llada,
        {"block_type": ("llama",), "block_group_size": (1,), "activation_type": ("silu",), "layer_norm_type": ("rms",), "rope": (True,),
         "attention_layer_norm": (False,), "input_emb_norm": (False,), "include_bias": (False,), "include_qkv_bias": (False, None),
         "bias_for_layer_norm": (False, None), "scale_logits": (False,), "alibi": (False,), "multi_query_attention": (None, False),
         "layer_norm_with_affine": (True,), "rope_full_precision": (True,)}, ids="llada"),
    "llada_moe": Family(  # arXiv 2509.24389
        ("LLaDAMoEModelLM", "LLaDAMoEModel"), "llada", LLAMA | EXPERTS | {"expert_intermediate_size": "expert_size"},
        _read_llada_moe, _write_llada_moe, NORMAL | {"moe_router_score_function": ("softmax", None)}, ids="llada_moe"),
    "llada2_moe": Family(  # LLaDA2.0-mini and -flash, LLaDA2.1
        ("LLaDA2MoeModelLM",), "llada2_moe",
        LLAMA | EXPERTS | {"moe_intermediate_size": "expert_size", "n_group": "router_groups", "topk_group": "router_groups_kept",
                           "routed_scaling_factor": "router_scale"},
        _read_llada2, _write_llada2,
        NORMAL | {"score_function": ("sigmoid",), "use_bias": (False,), "use_qkv_bias": (False,), "norm_head": (False,),
                  "moe_router_enable_expert_bias": (True,)}, ids="llada2_moe"),
    "dream": Family(  # Dream-7B (arXiv 2508.15487): Qwen2.5 with predictions shifted by one
        ("DreamModel",), "Dream", LLAMA, lambda fields: _read_qwen2(fields, shift=True), _write_qwen2, NORMAL | {"attention_bias": (True, None)},
        ids="dream"),
    "qwen2": Family(("Qwen2ForCausalLM",), "qwen2", LLAMA, _read_qwen2, _write_qwen2, NORMAL | {"attention_bias": (True, None)},
                    objective="autoregressive"),
    "qwen3_moe": Family(("Qwen3MoeForCausalLM",), "qwen3_moe",  # transformers 5 writes num_local_experts in place of num_experts
                        LLAMA | EXPERTS | {"num_local_experts": "num_experts", "moe_intermediate_size": "expert_size"},
                        _read_qwen3_moe, _write_qwen3_moe, objective="autoregressive"),
}
