"""Published weights in and out: one declarative table a family, used in both directions.

Their matrices are torch `[out, in]`; ours are `(in, out)` with heads split and equal layers stacked. `PATTERNS` says, in
einops' notation, how each of our parameters lies in their tensor; a family's table says which of their names holds it.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import einops
import jax
import ml_dtypes
import numpy as np

from llada_jax.config import ConfigError
from llada_jax.interop import shards

PATTERNS = {  # our name: (their layout, ours); f is the hidden width of an expert, a dense layer or the shared expert
    "embedding": ("v d", "v d"), "head": ("v d", "d v"), "final_norm": ("d", "d"), "attention_norm": ("d", "d"), "mlp_norm": ("d", "d"),
    "query": ("(n h) d", "d n h"), "key": ("(n h) d", "d n h"), "value": ("(n h) d", "d n h"), "output": ("d (n h)", "n h d"),
    "query_bias": ("(n h)", "n h"), "key_bias": ("(n h)", "n h"), "value_bias": ("(n h)", "n h"), "query_norm": ("h", "h"), "key_norm": ("h", "h"),
    "router": ("e d", "d e"), "bias": ("e", "e"), "gate": ("f d", "d f"), "up": ("f d", "d f"), "down": ("d f", "f d"),
    "shared_gate": ("f d", "d f"), "shared_up": ("f d", "d f"), "shared_down": ("d f", "f d"),
}
Names = dict[str, tuple[str, ...]]  # their name: our names; several are joined along their output features (the last dimension but one)


class Family(NamedTuple):
    """Their names. Layers' names stand behind `layer`; a name applies where the model has the parameter."""

    top: Names
    layer: str
    block: Names  # of every layer
    dense: Names  # feed-forward part of a dense layer
    moe: Names  # of a layer with experts, but for the experts themselves
    experts: dict[str, Names]  # by layout: `{expert}` names one expert, names without it hold all of them


def _swiglu(prefix: str, ours: str = "", suffix: str = ".weight") -> Names:
    return {f"{prefix}{name}_proj{suffix}": (ours + name,) for name in ("gate", "up", "down")}


TOP = {"model.embed_tokens.weight": ("embedding",), "model.norm.weight": ("final_norm",), "lm_head.weight": ("head",)}
NORMS = {"input_layernorm.weight": ("attention_norm",), "post_attention_layernorm.weight": ("mlp_norm",)}
ATTENTION = NORMS | {f"self_attn.{theirs}_proj.{kind}": (ours + suffix,) for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"))
                     for kind, suffix in (("weight", ""), ("bias", "_bias"))} | {
    "self_attn.o_proj.weight": ("output",), "self_attn.q_norm.weight": ("query_norm",), "self_attn.k_norm.weight": ("key_norm",)}
PER_EXPERT = {"per_expert": _swiglu("mlp.experts.{expert}.")}

QWEN = Family(TOP, "model.layers.{layer}.", ATTENTION, _swiglu("mlp."), {"mlp.gate.weight": ("router",)}, PER_EXPERT)
FAMILIES = {
    "llada_moe": QWEN._replace(
        moe=QWEN.moe | {"mlp.expert_bias": ("bias",)} | _swiglu("shared_expert.", "shared_"),
        experts=PER_EXPERT | {"fused": {"mlp.w1": ("gate", "up"), "mlp.w2": ("down",)}}),
    "llada": Family(
        {"model.transformer.wte.weight": ("embedding",), "model.transformer.ln_f.weight": ("final_norm",),
         "model.transformer.ff_out.weight": ("head",)},
        "model.transformer.blocks.{layer}.",
        {"attn_norm.weight": ("attention_norm",), "ff_norm.weight": ("mlp_norm",), "q_proj.weight": ("query",), "k_proj.weight": ("key",),
         "v_proj.weight": ("value",), "attn_out.weight": ("output",)},
        {"ff_proj.weight": ("gate",), "up_proj.weight": ("up",), "ff_out.weight": ("down",)}, {}, {}),
    "llada2_moe": Family(
        {"model.word_embeddings.weight": ("embedding",), "model.norm.weight": ("final_norm",), "lm_head.weight": ("head",)},
        "model.layers.{layer}.",
        NORMS | {"attention.query_key_value.weight": ("query", "key", "value"), "attention.dense.weight": ("output",),
                 "attention.query_layernorm.weight": ("query_norm",), "attention.key_layernorm.weight": ("key_norm",)},
        _swiglu("mlp."),
        {"mlp.gate.weight": ("router",), "mlp.gate.expert_bias": ("bias",)} | _swiglu("mlp.shared_experts.", "shared_"),
        PER_EXPERT | {"stacked": _swiglu("mlp.experts.", suffix="")}),
    "dream": QWEN,
    "qwen2": QWEN,
    "qwen3_moe": QWEN,
}


class Piece(NamedTuple):
    """A part of one of their tensors, and where it lives with us."""

    ours: str  # path of our leaf
    index: tuple[int, ...]  # into its leading dimensions: layer, expert
    theirs: str  # einops pattern of their part
    pattern: str  # einops pattern of leaf[index]
    sizes: dict[str, int]  # of the patterns' letters
    rows: slice  # of their last dimension but one, where several parts are joined


class Entry(NamedTuple):
    """One of their tensors."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def table(family: str, shapes: Any, layout: str = "per_expert") -> list[Entry]:
    """Every tensor of a checkpoint of this family, for a model with variables of these shapes (arrays or descriptions).

    Raises ConfigError for a layout that the family does not have.
    """
    names, leaves = FAMILIES[family], {path_of(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    if names.experts and layout not in names.experts:
        raise ConfigError(f"{family} has no expert layout '{layout}'; it has {', '.join(names.experts)}")
    entries, layer, moe_layer = [], 0, 0

    def add(rows: Names, prefix: str, folder: str, index: tuple[int, ...]) -> None:
        for name, ours in rows.items():
            places = [("router_bias/bias", (moe_layer,)) if leaf == "bias" else (f"{folder}{leaf}", index) for leaf in ours]
            if all(path in leaves for path, _ in places):
                if "{expert}" in name:
                    entries.extend(_entry(prefix + name.format(expert=e), [(path, (*at, e)) for path, at in places], leaves)
                                   for e in range(leaves[places[0][0]][len(index)]))
                else:
                    entries.append(_entry(prefix + name, places, leaves))

    add(names.top, "", "params/", ())
    for number in range(sum(re.fullmatch(r"params/stack_\d+/query", path) is not None for path in leaves)):
        folder = f"params/stack_{number}/"
        moe = f"{folder}router" in leaves
        for i in range(leaves[f"{folder}query"][0]):
            for rows in (names.block, names.moe, names.experts.get(layout, {})) if moe else (names.block, names.dense):
                add(rows, names.layer.format(layer=layer), folder, (i,))
            layer, moe_layer = layer + 1, moe_layer + moe
    return entries


def _entry(name: str, places: list[tuple[str, tuple[int, ...]]], leaves: Mapping[str, tuple[int, ...]]) -> Entry:
    pieces, shape, row = [], (), 0
    for path, index in places:
        theirs, pattern = PATTERNS[path.rsplit("/", 1)[-1]]
        own = leaves[path][len(index):]
        if len(own) > len(pattern.split()):  # one tensor for all experts
            theirs, pattern = f"e {theirs}", f"e {pattern}"
        sizes = dict(zip(pattern.split(), own, strict=True))
        shape = tuple(math.prod(sizes[letter] for letter in group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", theirs))
        rows = slice(row, row + shape[-2]) if len(places) > 1 else slice(None)
        row += shape[-2] if len(places) > 1 else 0
        pieces.append(Piece(path, index, theirs, pattern, sizes, rows))
    return Entry(name, (*shape[:-2], row, shape[-1]) if len(places) > 1 else shape, tuple(pieces))


def layout_of(family: str, names: Mapping[str, Any] | set[str]) -> str:
    """The expert layout in which these tensors are stored; the first one where no expert is seen."""
    layouts = FAMILIES[family].experts or {"per_expert": {}}
    suffixes = {layout: [re.escape(name).replace(r"\{expert\}", r"\d+") + "$" for name in rows] for layout, rows in layouts.items()}
    return next((layout for layout, found in suffixes.items() if any(re.search(p, name) for p in found for name in names)), next(iter(layouts)))


def check_names(entries: list[Entry], names: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError, naming tensors, unless `names` are exactly those of the table."""
    known = {entry.name for entry in entries}
    missing, extra = [entry.name for entry in entries if entry.name not in names], [name for name in names if name not in known]
    if missing or extra:
        listed = lambda found: f" ({', '.join(found[:3])}{', …' if len(found) > 3 else ''})" if found else ""
        raise ConfigError(f"{where} does not fit its config.json: {len(missing)} tensors are missing{listed(missing)}, "
                          f"{len(extra)} are not known{listed(extra)}")


def check(entries: list[Entry], reader: shards.Reader) -> None:
    """Raise ConfigError, naming file and tensor, unless the folder holds the table's tensors in their shapes, as floating-point numbers."""
    check_names(entries, reader.tensors, str(reader.folder))
    for entry in entries:
        tensor = reader.tensors[entry.name]
        if tuple(tensor.shape) != entry.shape:
            raise ConfigError(f"{tensor.file}: {entry.name} has shape {list(tensor.shape)}, its config.json makes it {list(entry.shape)}")
        if tensor.dtype.name not in FLOATS:
            raise ConfigError(f"{tensor.file}: {entry.name} has dtype {tensor.dtype.name}; weights are read from {', '.join(FLOATS)}")


FLOATS = ("float32", "bfloat16", "float16")


def param_dtype(entries: list[Entry], reader: shards.Reader) -> str:
    """The dtype in which nothing is lost: bfloat16 where all weights but those of the router are, else float32."""
    stored = {reader.tensors[entry.name].dtype.name for entry in entries if not entry.pieces[0].ours.endswith(("/router", "/bias"))}
    return "bfloat16" if stored == {"bfloat16"} else "float32"


class Source:
    """Our leaves from a published folder, one at a time: `source(path)` gives a numpy array in the dtype of `shapes`.

    Raises ConfigError, naming file and tensor, for a value that is not finite (unless `allow_nonfinite`) and for a dtype that
    the leaf would round.
    """

    def __init__(self, reader: shards.Reader, entries: list[Entry], shapes: Any, allow_nonfinite: bool = False):
        check(entries, reader)
        self._reader, self._tree, self._allow_nonfinite = reader, shapes, allow_nonfinite
        self._shapes = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
        self._parts: dict[str, list[tuple[str, Piece]]] = {path: [] for path in self._shapes}
        for entry in entries:
            for piece in entry.pieces:
                self._parts[piece.ours].append((entry.name, piece))

    def __call__(self, path: str) -> np.ndarray:
        like = self._shapes[path]
        leaf = np.empty(like.shape, like.dtype)
        for name, piece in self._parts[path]:
            tensor = self._reader.tensors[name]
            if tensor.dtype.itemsize > leaf.dtype.itemsize or (tensor.dtype.name == "float16" and leaf.dtype.name == "bfloat16"):
                raise ConfigError(f"{tensor.file}: {name} is {tensor.dtype.name}, {leaf.dtype.name} would round it")
            theirs = self._reader.array(name)
            theirs = theirs if piece.rows == slice(None) else theirs[..., piece.rows, :]
            if not (self._allow_nonfinite or _finite(theirs)):
                raise ConfigError(f"{self._reader.folder / tensor.file}: {name} holds NaN or infinity; "
                                  "convert import --allow_nonfinite takes it as it is")
            leaf[piece.index] = einops.rearrange(theirs, f"{piece.theirs} -> {piece.pattern}", **piece.sizes)
            self._reader.release(name)
        return leaf

    def tree(self) -> Any:
        """All of them, as the tree of variables."""
        return jax.tree_util.tree_map_with_path(lambda path, _: self(path_of(path)), self._tree)


def load(folder: str, family: str, shapes: Any) -> Any:
    """All variables (numpy) of a published folder."""
    with shards.Reader(folder) as reader:
        return Source(reader, table(family, shapes, layout_of(family, reader.tensors)), shapes).tree()


def put(entry: Entry, leaves: Mapping[str, np.ndarray], target: np.ndarray) -> None:
    """Write the parts of one of their tensors that these leaves hold into `target`, in its layout and dtype."""
    for piece in entry.pieces:
        if piece.ours in leaves:
            ours = einops.rearrange(leaves[piece.ours][piece.index], f"{piece.pattern} -> {piece.theirs}", **piece.sizes)
            target[(..., piece.rows, slice(None)) if piece.rows != slice(None) else ...] = ours


def to_theirs(family: str, variables: Any, layout: str = "per_expert") -> dict[str, np.ndarray]:
    """Our variables (or gradients of them) under their names and in their layout."""
    leaves = {path_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
    tensors = {}
    for entry in table(family, variables, layout):
        tensors[entry.name] = np.empty(entry.shape, leaves[entry.pieces[0].ours].dtype)
        put(entry, leaves, tensors[entry.name])
    return tensors


def _finite(x: np.ndarray) -> bool:
    if x.dtype == ml_dtypes.bfloat16:  # all exponent bits set
        return not ((x.view(np.uint16) & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(x).all())


def path_of(path: Any) -> str:
    """'params/stack_0/query' for a jax key path."""
    return "/".join(str(key.key) for key in path)
