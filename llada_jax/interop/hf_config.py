"""Published `config.json` files to our configuration."""

import json
from typing import Any, NamedTuple

from etils import epath

from llada_jax import config as config_lib

LLADA_MOE_MASK = 156895  # `<|mask|>` of LLaDA-MoE; its config.json does not say
FAMILIES = {"LLaDAMoEModelLM": "llada_moe", "LLaDAMoEModel": "llada_moe"}  # by `architectures`: LLaDA shares its `model_type`


class Published(NamedTuple):
    """What a published folder says of itself."""

    family: str
    model: config_lib.Model
    mask_id: int
    eos_id: int


def read(folder: str) -> Published:
    """Configuration of the checkpoint folder; raises ConfigError for a missing file or a family that is not supported."""
    path = epath.Path(folder) / "config.json"
    if not path.exists():
        raise config_lib.ConfigError(f"{folder} holds no config.json")
    fields = json.loads(path.read_text())
    name = (fields.get("architectures") or ["?"])[0]
    if name not in FAMILIES:
        raise config_lib.ConfigError(f"architecture {name} of {path} is not supported; supported: {', '.join(FAMILIES)}")
    return Published(FAMILIES[name], llada_moe(fields), fields.get("mask_token_id") or LLADA_MOE_MASK, fields["eos_token_id"])


def llada_moe(fields: dict[str, Any]) -> config_lib.Model:
    """LLaDA-MoE. Fields that its model class ignores (norm_topk_prob, scaling factor, router groups) are ignored here too."""
    layers = fields["num_hidden_layers"]
    frequency = fields.get("moe_layer_freq") or [1] * layers
    frequency = frequency if isinstance(frequency, list) else [int(i % frequency == 0) for i in range(layers)]
    dense = tuple(i for i, moe in enumerate(frequency) if not moe)
    if fields.get("rope_scaling"):
        raise config_lib.ConfigError(f"rope_scaling={fields['rope_scaling']} is not supported")
    return config_lib.Model(
        vocab_size=fields["vocab_size"], hidden_size=fields["hidden_size"], num_layers=layers, num_heads=fields["num_attention_heads"],
        num_kv_heads=fields.get("num_key_value_heads") or 0, num_experts=fields["num_experts"], experts_per_token=fields["num_experts_per_tok"],
        expert_size=fields["expert_intermediate_size"], dense_layers=dense, dense_size=fields["dense_intermediate_size"] if dense else 0,
        shared_expert_size=fields.get("shared_expert_intermediate_size") or 0, router_bias=bool(fields.get("moe_router_enable_expert_bias")),
        qk_norm=fields.get("qk_layernorm", True), clip_qkv=fields.get("clip_qkv") or 0.0,
        rotary_fraction=float(fields.get("partial_rotary_factor") or 1), rope_theta=float(fields["rope_theta"]), norm_eps=fields["rms_norm_eps"],
        max_length=fields["max_position_embeddings"],
        tie_embeddings=fields.get("tie_word_embeddings", False), init_std=fields.get("initializer_range", 0.02))
