"""Published weights in and out: one declarative table a family, used in both directions.

Their matrices are torch `[out, in]`; ours are `(in, out)` with heads split: transposing and reshaping maps one to the other.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from llada_jax import config as config_lib

TOP = {  # their name → our path, transposed?
    "model.embed_tokens.weight": ("params/embedding", False),
    "model.norm.weight": ("params/final_norm", False),
    "lm_head.weight": ("params/head", True),
}
LAYER = {  # behind `model.layers.N.`; our name in the stack; transposed? Applies where the stack has the parameter.
    "input_layernorm.weight": ("attention_norm", False),
    "post_attention_layernorm.weight": ("mlp_norm", False),
    "self_attn.q_proj.weight": ("query", True),
    "self_attn.k_proj.weight": ("key", True),
    "self_attn.v_proj.weight": ("value", True),
    "self_attn.o_proj.weight": ("output", True),
    "self_attn.q_norm.weight": ("query_norm", False),
    "self_attn.k_norm.weight": ("key_norm", False),
    "mlp.gate.weight": ("router", True),
    "shared_expert.gate_proj.weight": ("shared_gate", True),
    "shared_expert.up_proj.weight": ("shared_up", True),
    "shared_expert.down_proj.weight": ("shared_down", True),
}
FFN = {"gate_proj.weight": "gate", "up_proj.weight": "up", "down_proj.weight": "down"}  # behind `mlp.experts.E.` or `mlp.`


class Entry(NamedTuple):
    """One of their tensors: its name, our leaf's path, the index into that leaf, and whether it is transposed."""

    theirs: str
    ours: str
    index: tuple[int, ...]
    transpose: bool


def entries(variables: Any) -> Iterator[Entry]:
    """Every tensor of a LLaDA-MoE checkpoint for a model with these variables (arrays or shapes), in the order of our leaves."""
    params = variables["params"]
    for theirs, (ours, transpose) in TOP.items():
        if ours.split("/")[1] in params:
            yield Entry(theirs, ours, (), transpose)
    first = moe_layer = 0
    for number in range(sum(name.startswith("stack_") for name in params)):
        stack = f"stack_{number}"
        names = params[stack]
        length, moe = names["query"].shape[0], "router" in names
        for i in range(length):
            prefix = f"model.layers.{first + i}."
            for theirs, (ours, transpose) in LAYER.items():
                if ours in names:
                    yield Entry(prefix + theirs, f"params/{stack}/{ours}", (i,), transpose)
            for theirs, ours in FFN.items():
                if moe:
                    for e in range(names[ours].shape[1]):
                        yield Entry(f"{prefix}mlp.experts.{e}.{theirs}", f"params/{stack}/{ours}", (i, e), True)
                else:
                    yield Entry(f"{prefix}mlp.{theirs}", f"params/{stack}/{ours}", (i,), True)
            if moe and "router_bias" in variables:
                yield Entry(f"{prefix}mlp.expert_bias", "router_bias/bias", (moe_layer + i,), False)
        first, moe_layer = first + length, moe_layer + length * moe


def to_ours(tensors: Mapping[str, np.ndarray], shapes: Any) -> Any:
    """Their tensors as our variables (numpy). Raises ConfigError naming tensors that are missing, extra or of a wrong shape."""
    leaves = {_path(path): np.zeros(leaf.shape, leaf.dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    table = list(entries(shapes))
    missing, extra = [e.theirs for e in table if e.theirs not in tensors], sorted(set(tensors) - {e.theirs for e in table})
    if missing or extra:
        raise config_lib.ConfigError(f"checkpoint does not fit its config: {len(missing)} tensors missing ({', '.join(missing[:3])}), "
                                     f"{len(extra)} not known ({', '.join(extra[:3])})")
    for entry in table:
        target, tensor = leaves[entry.ours][entry.index], tensors[entry.theirs]
        tensor = tensor.T if entry.transpose else tensor
        if tensor.size != target.size:
            raise config_lib.ConfigError(f"{entry.theirs} has shape {list(tensors[entry.theirs].shape)}, {target.size} elements are expected")
        leaves[entry.ours][entry.index] = tensor.reshape(target.shape)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves[_path(path)], shapes)


def to_theirs(variables: Any) -> dict[str, np.ndarray]:
    """Our variables (or gradients of them) under their names and in their layout."""
    leaves = {_path(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
    out = {}
    for entry in entries(variables):
        ours = leaves[entry.ours][entry.index]
        out[entry.theirs] = _matrix(entry.theirs, ours).T if entry.transpose else ours
    return out


def load(folder: str, shapes: Any) -> Any:
    """Variables (numpy) from the safetensors of a published folder."""
    from safetensors.numpy import load_file
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(epath.Path(folder).glob("*.safetensors")):
        tensors |= load_file(path)
    if not tensors:
        raise config_lib.ConfigError(f"{folder} holds no .safetensors file")
    return to_ours(tensors, shapes)


def _matrix(name: str, ours: np.ndarray) -> np.ndarray:
    """(in, out): the head dimensions join the output, or for the output projection the input."""
    return ours.reshape(-1, ours.shape[-1]) if name.endswith("o_proj.weight") else ours.reshape(ours.shape[0], -1)


def _path(path: Any) -> str:
    return "/".join(str(key.key) for key in path)
