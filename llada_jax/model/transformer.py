"""The masked-diffusion transformer: its parameters (a thin Flax layer) and its forward pass (plain functions).

Layers of one kind that follow each other form a stack: their parameters carry a leading layer dimension and one
compiled layer is scanned over it. Everything outside sees a `LanguageModel`: functions and a plain parameter tree.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from llada_jax import config as config_lib
from llada_jax import partitioning
from llada_jax.model import attention as attention_lib
from llada_jax.model import expert_parallel, functional, lora, moe
from pallas_kernels import dispatch, linear_confidence, linear_cross_entropy
from pallas_kernels.attention import AttentionSpec

_SENT = jax.checkpoint_policies.save_only_these_names(*expert_parallel.SAVED)  # experts' inputs from other devices
REMAT = {  # named remat policies: what the backward pass may keep
    "dots": jax.checkpoint_policies.save_from_both_policies(jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _SENT),
    "full": _SENT,
}


NOT_RAGGED = {"cpu": "CPUs", "TPU v5 lite": "v5e"}  # devices without a ragged all-to-all, by the start of their kind (jax 0.10.2, libtpu 0.0.42)


class Parameter(NamedTuple):
    """Shape, logical axes and fan-in of one layer's parameter; fan-in 0 begins as a constant (norm scales, biases)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    fan_in: int
    constant: float = 1.0


def stacks(config: config_lib.Model) -> list[tuple[str, str, int]]:
    """Runs of equal layers as (name, kind, length), kind "moe" or "dense", in order."""
    kinds = ["dense" if i in config.dense_layers else "moe" for i in range(config.num_layers)]
    return [(f"stack_{i}", kind, len(list(run))) for i, (kind, run) in enumerate(itertools.groupby(kinds))]


def layer_parameters(config: config_lib.Model, kind: str) -> dict[str, Parameter]:
    """The parameters of one layer, by name."""
    D, N, K, H = config.hidden_size, config.num_heads, config.kv_heads, config.head_size
    E, F, S, W = config.num_experts, config.expert_size, config.shared_expert_size, config.dense_size
    table = {
        "attention_norm": Parameter((D,), (None,), 0),
        "query": Parameter((D, N, H), ("embed", "heads", None), D),
        "key": Parameter((D, K, H), ("embed", "heads", None), D),
        "value": Parameter((D, K, H), ("embed", "heads", None), D),
        "output": Parameter((N, H, D), ("heads", None, "embed"), N * H),
        "mlp_norm": Parameter((D,), (None,), 0),
    }
    if config.qk_norm:
        table |= {"query_norm": Parameter((H,), (None,), 0), "key_norm": Parameter((H,), (None,), 0)}
    if config.qkv_bias:
        table |= {"query_bias": Parameter((N, H), ("heads", None), 0, 0.0), "key_bias": Parameter((K, H), ("heads", None), 0, 0.0),
                  "value_bias": Parameter((K, H), ("heads", None), 0, 0.0)}
    if kind == "dense":
        return _with_adapters(config, table | {
            "gate": Parameter((D, W), ("embed", "mlp"), D),
            "up": Parameter((D, W), ("embed", "mlp"), D),
            "down": Parameter((W, D), ("mlp", "embed"), W),
        })
    table |= {
        "router": Parameter((D, E), ("embed", None), D),
        "gate": Parameter((E, D, F), ("experts", "embed", "mlp"), D),
        "up": Parameter((E, D, F), ("experts", "embed", "mlp"), D),
        "down": Parameter((E, F, D), ("experts", "mlp", "embed"), F),
    }
    if S:
        table |= {
            "shared_gate": Parameter((D, S), ("embed", "mlp"), D),
            "shared_up": Parameter((D, S), ("embed", "mlp"), D),
            "shared_down": Parameter((S, D), ("mlp", "embed"), S),
        }
    return _with_adapters(config, table)


def _with_adapters(config: config_lib.Model, table: dict[str, Parameter]) -> dict[str, Parameter]:
    """At the end, so that the weights begin as they do without."""
    adapters = {}
    for name, p in table.items():
        if lora.adapted(config, name, p.fan_in):
            a, b = lora.shapes(name, p.shape, p.axes, config.lora_rank)
            adapters |= {name + lora.A: Parameter(*a), name + lora.B: Parameter(*b, 0.0)}
    return table | adapters


class Stack(nn.Module):
    """Declares the parameters of `length` equal layers, each with a leading layer dimension."""

    config: config_lib.Model
    kind: str
    length: int

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        def declare(name, p):
            constant, normal = nn.initializers.constant(p.constant), nn.initializers.normal
            adapter = name.endswith((lora.A, lora.B))
            init = normal(p.fan_in**-0.5 if adapter else self.config.init_std or p.fan_in**-0.5) if p.fan_in else constant
            dtype = jnp.float32 if adapter or name == "router" else self.config.param_dtype
            return self.param(name, nn.with_partitioning(init, (None, *p.axes)), (self.length, *p.shape), dtype)
        return {name: declare(name, p) for name, p in layer_parameters(self.config, self.kind).items()}


class Transformer(nn.Module):
    """Embedding, stacks, final norm, vocabulary head (LLaDA-MoE, arXiv 2509.24389; the state at a position predicts its own token)."""

    config: config_lib.Model
    kernels: config_lib.Kernels = config_lib.Kernels()
    mesh: jax.sharding.Mesh | None = None

    def setup(self):
        config = self.config
        D, V, dtype = config.hidden_size, config.vocab_size, config.param_dtype
        init = nn.initializers.normal(config.init_std or D**-0.5)
        self.embedding = self.param("embedding", nn.with_partitioning(init, ("vocab", "embed")), (V, D), dtype)
        self.layers = {name: Stack(config, kind, length, name=name) for name, kind, length in stacks(config)}
        self.final_norm = self.param("final_norm", nn.with_partitioning(nn.initializers.ones, (None,)), (D,), dtype)
        if not config.tie_embeddings:
            self.head = self.param("head", nn.with_partitioning(init, ("embed", "vocab")), (D, V), dtype)
        if config.router_bias:
            self.router_bias = self.variable("router_bias", "bias", jnp.zeros, (len(config.moe_layers), config.num_experts), jnp.float32)

    def __call__(self, tokens_or_embeddings, positions_BT, slots_BT, spec, cache, store_BT, wanted_BC):
        """See `LanguageModel.apply`."""
        config, dtype = self.config, jnp.dtype(self.config.compute_dtype)
        # of few rows the positions are split, but not what the caller makes these from
        tokens_or_embeddings, positions_BT = (partitioning.constrain(x, self.mesh, "batch") for x in (tokens_or_embeddings, positions_BT))
        if jnp.issubdtype(tokens_or_embeddings.dtype, jnp.floating):
            x_BTD = tokens_or_embeddings.astype(dtype)
        else:
            x_BTD = _embed(self.embedding, tokens_or_embeddings, dtype, self.mesh)
        x_BTD = partitioning.constrain(x_BTD, self.mesh, "batch", "positions", None)
        rotary = functional.rotary_angles(positions_BT, int(config.head_size * config.rotary_fraction), config.rope_theta)
        rotary = tuple(partitioning.constrain(angles, self.mesh, "batch") for angles in rotary)
        valid_BT = _valid(spec, slots_BT, x_BTD.shape[:2])
        if not config.scan_layers:
            rotary, spec, valid_BT = functional.computed_once((rotary, spec, valid_BT))
        capture = self.is_mutable_collection("intermediates")
        caches, stats, captured, moe_layers = {}, [], [], 0
        if config.shift_predictions and cache is not None:
            raise config_lib.ConfigError("model.shift_predictions reads the state of the slot before, which a window with a cache may "
                                         "lack; use --cache=none")
        if wanted_BC is not None:
            wanted_BC = partitioning.constrain(wanted_BC, self.mesh, "batch")
        by_expert = config.router_choice == "expert"
        if by_expert and (cache is not None or spec.block_q is not None):
            raise config_lib.ConfigError("model.router_choice=expert compares all tokens of a row: decode with --cache=none and a decoder that is "
                                         "not block-causal")
        if wanted_BC is not None and config.shift_predictions:
            wanted_BC = jnp.where(functional.at_positions(positions_BT, wanted_BC) == 0, wanted_BC, jnp.maximum(wanted_BC - 1, 0))
        for name, kind, length in (runs := stacks(config)):
            params = self.layers[name]()
            bias = None
            if kind == "moe":
                bias = self.router_bias.value[moe_layers:moe_layers + length] if config.router_bias else None
                moe_layers += length

            def layer(x_BTD, xs, wanted_BC=None, kind=kind):
                return _layer(x_BTD, *xs, kind, rotary, spec, valid_BT, slots_BT, store_BT, config, self.kernels, self.mesh, capture, wanted_BC)

            xs = (params, bias, None if cache is None else cache[name])
            last = None if wanted_BC is None or by_expert else functools.partial(layer, wanted_BC=wanted_BC if name == runs[-1][0] else None)
            x_BTD, (caches[name], layer_stats, layer_captured) = _scan(layer, x_BTD, xs, length, config, last)
            stats += [layer_stats] if kind == "moe" else []
            captured.append(layer_captured)
        if capture:
            self.sow("intermediates", "layers", captured)
        if wanted_BC is not None and (config.scan_layers or by_expert):
            x_BTD = functional.at_positions(x_BTD, wanted_BC)
        hidden_BTD = functional.rms_norm(x_BTD, self.final_norm, config.norm_eps)
        if config.shift_predictions and wanted_BC is None:
            hidden_BTD = _shift(hidden_BTD, positions_BT, spec)
        return hidden_BTD, None if cache is None else caches, jax.tree.map(lambda *s: jnp.concatenate(s), *stats) if stats else None

    def declare(self):
        """Declare every parameter, without a forward pass."""
        for stack in self.layers.values():
            stack()

    def embed(self, tokens_or_weights):
        """See `LanguageModel.embed`."""
        dtype = jnp.dtype(self.config.compute_dtype)
        if jnp.issubdtype(tokens_or_weights.dtype, jnp.floating):
            return jnp.einsum("BTV,VD->BTD", tokens_or_weights.astype(dtype), self.embedding.astype(dtype))
        return _embed(self.embedding, tokens_or_weights, dtype, self.mesh)

    def head_weight(self):
        """(D, V) in the compute dtype."""
        weight = self.embedding.T if self.config.tie_embeddings else self.head
        return weight.astype(self.config.compute_dtype)


def _embed(embedding_VD, tokens_BT, dtype, mesh):
    """Rows of the table, (B, T, D) in the compute dtype. Each device looks up its own columns for all that share the table with it: tokens
    and activations travel, and not the table or its gradient, which are larger."""
    V, D = embedding_VD.shape

    def local(embedding_VD, tokens_BT):
        split = embedding_VD.shape[1] < D
        tokens_M = tokens_BT.reshape(-1)
        if split:
            [tokens_M] = partitioning.all_gather(partitioning.FSDP_AXIS, tokens_M)
        if len(embedding_VD) < V:
            tokens_M -= jax.lax.axis_index(partitioning.TENSOR_AXIS) * len(embedding_VD)
            here_M = (tokens_M >= 0) & (tokens_M < len(embedding_VD))
            x_MD = jnp.where(here_M[:, None], jnp.take(embedding_VD, jnp.where(here_M, tokens_M, 0), axis=0).astype(dtype), 0)
            x_MD = jax.lax.psum(x_MD, partitioning.TENSOR_AXIS)
        else:
            x_MD = jnp.take(embedding_VD, tokens_M, axis=0).astype(dtype)
        if split:
            x_MD = jax.lax.all_to_all(x_MD, partitioning.FSDP_AXIS, 0, 1, tiled=True)
        return x_MD.reshape(*tokens_BT.shape, D)

    table, tokens = ("vocab", "embed"), ("batch", "positions")
    return partitioning.over_shards(local, mesh, (partitioning.Weight(table, table), tokens), tokens)(embedding_VD, tokens_BT)


def _layer(x_BTD, params, bias_E, cache, kind, rotary, spec, valid_BT, slots_BT, store_BT, config, kernels, mesh, capture, wanted_BC):
    """x + attention(norm(x)), then x + ffn(norm(x)); returns x and (cache, router statistics, captured intermediates), of `wanted` positions."""
    params = {key: p if key == "router" else p.astype(config.compute_dtype) for key, p in lora.merged(params, config).items()}
    normed = functional.rms_norm(x_BTD, params["attention_norm"], config.norm_eps)
    asking = None
    if wanted_BC is not None:
        whole_BTD = partitioning.constrain(x_BTD, mesh, "batch")  # gathered once; from parts of a row XLA makes five collectives
        x_BTD, valid_BT = functional.at_positions(whole_BTD, wanted_BC), functional.at_positions(valid_BT, wanted_BC)
        asking = functional.rms_norm(x_BTD, params["attention_norm"], config.norm_eps), wanted_BC
    attended, cache = attention_lib.attend(normed, params, rotary, spec, config, cache, slots_BT, store_BT, kernels.attention, mesh, asking)
    x_BTD = x_BTD + attended
    normed = functional.rms_norm(x_BTD, params["mlp_norm"], config.norm_eps)
    stats, chosen = None, {}
    if kind == "moe":
        out, stats, chosen = moe.moe(normed, params, bias_E, valid_BT, config, kernels, mesh)
    else:
        out = functional.swiglu(normed, params["gate"], params["up"], params["down"])
    x_BTD = partitioning.constrain(x_BTD + out, mesh, "batch", "positions", None)
    captured = {"attention": attended, "output": x_BTD, **chosen} if capture else {}
    return x_BTD, (cache, stats, captured)


def _scan(layer: Callable[..., Any], x: jax.Array, xs: Any, length: int, config: config_lib.Model,
          last: Callable[..., Any] | None) -> tuple[jax.Array, Any]:
    """`lax.scan` over the layers, or the same unrolled, where `last`, if not None, takes the place of the last layer; `remat` by name."""
    if config.remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT[config.remat], prevent_cse=not config.scan_layers)
    if config.scan_layers:
        return jax.lax.scan(layer, x, xs, length=length)
    outputs = []
    for i in range(length):
        mine = jax.tree.map(lambda leaf, i=i: leaf[i], xs)
        if last is None:
            x, out = layer(x, mine)
        else:  # in a decode's loop, out of which XLA:CPU takes slices, but not what they were fused into
            x, out = (last if i == length - 1 else layer)(x, jax.lax.optimization_barrier(mine))
        outputs.append(out)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def _shift(hidden_BTD, positions_BT, spec):
    """Each position takes the state of the one before it; the first of a row or segment (position 0) keeps its own (Dream).

    Of [noisy ; clean] halves the first position of a block takes the state of the clean position before it: the noisy one there is of another
    block, which it must not see, and in a decode that block is finished. So blocks of one token predict what the autoregressive model does.
    """
    before = lambda x_BT: jnp.concatenate([x_BT[:, :1], x_BT[:, :-1]], axis=1)
    before_BTD = before(hidden_BTD)
    if spec.half_q is not None:
        clean_BTD = jnp.roll(before_BTD, -(hidden_BTD.shape[1] // 2), axis=1)
        begins_BT = (spec.half_q == 0) & (spec.block_q != before(spec.block_q))
        before_BTD = jnp.where(begins_BT[..., None], clean_BTD, before_BTD)
    return jnp.where((positions_BT == 0)[..., None], hidden_BTD, before_BTD)


def _valid(spec: AttentionSpec, slots_BT: jax.Array | None, shape: tuple[int, int]) -> jax.Array:
    """Which of the T positions are real tokens; those at a slot that the canvas lacks are none."""
    if spec.padding_k is None:
        return jnp.ones(shape, bool)
    return ~(spec.padding_k if slots_BT is None else jnp.take_along_axis(spec.padding_k, slots_BT, axis=1, mode="fill", fill_value=True))


def _check_kernels(kernels: config_lib.Kernels, mesh: jax.sharding.Mesh | None) -> None:
    asked = {operation: name for operation, name in dataclasses.asdict(kernels).items() if name != "auto"}
    # the automatic choice always runs, and asks no device before the first trace
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh is not None and asked else contextlib.nullcontext():
        for operation, name in asked.items():
            if operation in config_lib.IMPLEMENTATIONS:
                try:
                    dispatch.choose(operation, config_lib.IMPLEMENTATIONS[operation], name)
                except ValueError as error:
                    raise config_lib.ConfigError(f"kernels.{operation}={name}: {error}") from None
            elif lacking := [words for kind, words in NOT_RAGGED.items() if name == "ragged" and dispatch.device()[1].startswith(kind)]:
                raise config_lib.ConfigError(f"kernels.{operation}=ragged: XLA has no ragged all-to-all on {lacking[0]}; use auto or capacity")


def _check_experts(config: config_lib.Model, mesh: jax.sharding.Mesh | None) -> None:
    devices = 1 if mesh is None else mesh.shape[partitioning.EXPERT_AXIS]
    if config.router_choice == "expert" and devices > 1:
        raise config_lib.ConfigError(f"model.router_choice=expert runs where every device has all experts: set mesh.expert=1, not {devices}; "
                                     "mesh.fsdp splits their weights")
    if config.moe_layers and config.num_experts % devices:
        fitting = [n for n in range(1, config.num_experts + 1) if config.num_experts % n == 0]
        raise config_lib.ConfigError(f"model.num_experts={config.num_experts} cannot be split over mesh.expert={devices} devices; "
                                     f"mesh.expert may be {', '.join(map(str, fitting))}")


def _check_adapters(config: config_lib.Model) -> None:
    names = {name: p.fan_in for _, kind, _ in stacks(config) for name, p in layer_parameters(lora.without(config), kind).items() if p.fan_in}
    if config.lora_rank and not any(lora.adapted(config, name, fan_in) for name, fan_in in names.items()):
        raise config_lib.ConfigError(f"model.lora_targets={config.lora_targets!r} names no matrix of a layer in full; these are {', '.join(names)}")


class LanguageModel(NamedTuple):
    """The model as functions of `variables = {"params": …, "router_bias": … (where there is one)}`.

    init(key) -> variables
    apply(variables, tokens_BT or embeddings_BTD, positions_BT, slots_BT, attention_spec, cache, store_BT, wanted_BC)
        -> (hidden_BTD after the final norm, cache, router statistics with leading (L_moe, B), or None without experts);
        hidden_BCD of the `wanted` ones of the T given positions, if not None: alone computed by the last layer, where layers are unrolled
        (in a scan one body serves all, and the weights of another one would take as much memory again)
    embed(variables, tokens_BT, or weights_BTV of the vocabulary) -> embeddings_BTD in the compute dtype, for `apply`
    head(variables, hidden_...D) -> logits_...V, float32
    confidence(variables, hidden_BCD, keys_BC2, temperature, suppressed) -> linear_confidence of each row, arrays (B, C), without logits; None on
        CPUs, where whole logits are faster, unless `kernels` names an implementation
    cross_entropy(variables, hidden_BTD, targets_BT, needed_BT) -> -log p(target) in nats (B, T), float32, 0 where not needed
    cross_entropy_and_entropy(variables, hidden_BTD, targets_BT, needed_BT) -> the same, the entropy of the distribution in nats (B, T), float32, and
        whether the target is its most probable entry, bool, both 0 where not needed
    whole_rows(arrays of 32-bit numbers (B, C)) -> the same, split over devices by rows alone, by one collective
    intermediates(variables, tokens_BT, positions_BT, attention_spec) -> per stack: attention and layer outputs, router choices
    init_cache(batch, slots) -> cache of zeros for that many canvas slots
    axes: logical axis names of `variables`; shapes: its shapes
    """

    config: config_lib.Model
    init: Callable[..., Any]
    apply: Callable[..., Any]
    embed: Callable[..., Any]
    head: Callable[..., Any]
    confidence: Callable[..., Any]
    cross_entropy: Callable[..., Any]
    cross_entropy_and_entropy: Callable[..., Any]
    whole_rows: Callable[..., Any]
    intermediates: Callable[..., Any]
    init_cache: Callable[..., Any]
    axes: Any
    shapes: Any


def build(config: config_lib.Model, kernels: config_lib.Kernels = config_lib.Kernels(), mesh: jax.sharding.Mesh | None = None) -> LanguageModel:
    """The model of this configuration on this mesh (None: one device). Raises ConfigError for a kernel by name that does not run there, and for
    experts that the mesh does not divide."""
    _check_kernels(kernels, mesh)
    _check_experts(config, mesh)
    _check_adapters(config)
    module = Transformer(config, kernels, mesh)

    def boxed_init(key):
        return module.init(key, method=module.declare)

    def init(key):
        return nn.meta.unbox(boxed_init(key))

    def apply(variables, tokens, positions_BT, slots_BT=None, spec=AttentionSpec(), cache=None, store_BT=None, wanted_BC=None):
        return module.apply(variables, tokens, positions_BT, slots_BT, spec, cache, store_BT, wanted_BC)

    def head_weight(variables):
        return module.apply(variables, method=module.head_weight)

    def embed(variables, tokens_or_weights):
        return module.apply(variables, tokens_or_weights, method=module.embed)

    def head(variables, hidden):
        return functional.vocabulary_logits(hidden, head_weight(variables))

    def confidence(variables, hidden_BCD, keys_BC2, temperature, suppressed):
        if kernels.linear_confidence == "auto" and dispatch.platform() == "cpu":
            return None

        def local(hidden_BCD, keys_BC2, weight_DV):
            keys_M2 = keys_BC2.reshape(-1, 2) if temperature else None
            part = weight_DV.shape[1] < config.vocab_size
            first = jax.lax.axis_index(partitioning.TENSOR_AXIS) * weight_DV.shape[1] if part else 0
            found = linear_confidence.linear_confidence_partial(
                hidden_BCD.reshape(-1, hidden_BCD.shape[-1]), weight_DV, first=first, temperature=temperature, keys_M2=keys_M2, suppressed=suppressed,
                implementation=kernels.linear_confidence)
            found = linear_confidence.merge(found, partitioning.TENSOR_AXIS) if part else linear_confidence.finish(found)
            return linear_confidence.Confidence(*(x.reshape(hidden_BCD.shape[:2]) for x in found))
        rows = ("batch",)
        run = partitioning.over_shards(local, mesh, (rows, rows, partitioning.Weight(("embed", "vocab"), ("vocab",))), rows)
        return run(hidden_BCD, keys_BC2, head_weight(variables))

    def over_rows(operation, variables, hidden_BTD, targets_BT, needed_BT):
        def local(hidden_BTD, targets_BT, needed_BT, weight_DV):
            rows = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
            found = operation(rows, weight_DV, targets_BT.reshape(-1), needed_BT.reshape(-1), implementation=kernels.linear_cross_entropy)
            return jax.tree.map(lambda x_M: x_M.reshape(targets_BT.shape), found)
        tokens = ("batch", "alone")
        names = [tokens] * 3 if operation is linear_cross_entropy.loss_and_entropy else tokens
        run = partitioning.over_shards(local, mesh, (tokens, tokens, tokens, partitioning.Weight(("embed", "vocab"))), names)
        return run(hidden_BTD, targets_BT, needed_BT, head_weight(variables))

    cross_entropy = functools.partial(over_rows, linear_cross_entropy.linear_cross_entropy)
    cross_entropy_and_entropy = functools.partial(over_rows, linear_cross_entropy.loss_and_entropy)

    def whole_rows(*arrays_BC):
        if mesh is None or mesh.size == 1:
            return arrays_BC
        bits = [jax.lax.bitcast_convert_type(x, jnp.int32) for x in arrays_BC]
        joined = partitioning.constrain(jnp.stack(bits, -1), mesh, "batch")
        return tuple(jax.lax.bitcast_convert_type(joined[..., i], x.dtype) for i, x in enumerate(arrays_BC))

    def intermediates(variables, tokens_BT, positions_BT, spec=AttentionSpec()):
        _, state = module.apply(variables, tokens_BT, positions_BT, None, spec, None, None, None, mutable=["intermediates"])
        return state["intermediates"]["layers"][0]

    def init_cache(batch, slots):
        shape = (batch, slots, config.kv_heads, config.head_size)
        return {name: tuple(jnp.zeros((length, *shape), config.compute_dtype) for _ in "kv") for name, _, length in stacks(config)}

    abstract = jax.eval_shape(lambda: boxed_init(jax.random.key(0)))  # no array is made: the devices may be descriptions only
    axes, shapes = nn.get_partition_spec(abstract), nn.meta.unbox(abstract)
    return LanguageModel(config, init, apply, embed, head, confidence, cross_entropy, cross_entropy_and_entropy, whole_rows, intermediates,
                         init_cache, axes, shapes)
