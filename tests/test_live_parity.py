"""Our model beside the stock PyTorch classes that compute the same function, on random weights in float32, both ways."""

import dataclasses
import functools
import json
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax.interop import hf_config, hf_weights, shards
from llada_jax.model import moe, transformer
from pallas_kernels.attention import AttentionSpec

REASON = "for the live comparison: pip install torch==2.13.0, alone and first; then pip install -c requirements.txt -e '.[parity]'"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

ATOL, RTOL = 2e-5, 1e-5  # logits
LOSS_ATOL = 1e-5  # losses and gradients
B, T, V, C = 2, 16, 96, 4  # rows, positions, vocabulary, block length
Tensors = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def precise():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with jax.default_matmul_precision("highest"):
        yield
    torch.set_num_threads(threads)


class Twin(NamedTuple):
    """A family's small model, and the stock class that equals it."""

    family: str
    model: config_lib.Model
    stock: str  # transformers.{stock}Config and transformers.{stock}ForCausalLM
    settings: dict[str, Any]  # of the stock config, beyond the common ones
    rename: Callable[[Tensors], Tensors] = lambda tensors: tensors  # from the family's published names


def renamed(*pairs: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {functools.reduce(lambda text, pair: text.replace(*pair), pairs, name): x for name, x in tensors.items()}


LLADA_TO_LLAMA = renamed(
    ("model.transformer.ff_out.", "lm_head."), ("model.transformer.wte", "model.embed_tokens"), ("model.transformer.ln_f", "model.norm"),
    ("model.transformer.blocks", "model.layers"), (".attn_norm", ".input_layernorm"), (".ff_norm", ".post_attention_layernorm"),
    (".q_proj", ".self_attn.q_proj"), (".k_proj", ".self_attn.k_proj"), (".v_proj", ".self_attn.v_proj"), (".attn_out", ".self_attn.o_proj"),
    (".ff_proj", ".mlp.gate_proj"), (".up_proj", ".mlp.up_proj"), (".ff_out", ".mlp.down_proj"))
LLADA2_TO_GLM = renamed(
    ("word_embeddings", "embed_tokens"), ("attention.dense", "self_attn.o_proj"), ("attention.query_layernorm", "self_attn.q_norm"),
    ("attention.key_layernorm", "self_attn.k_norm"), ("gate.expert_bias", "gate.e_score_correction_bias"))


def llada2_to_glm(tensors: Tensors) -> Tensors:
    """All query heads, then all key heads, then all value heads lie in one tensor."""
    model, split = TWINS["llada2_moe"].model, {}
    ends = np.cumsum([model.num_heads, model.kv_heads]) * model.head_size
    for name, x in tensors.items():
        parts = zip("qkv", np.split(x, ends), strict=True) if "query_key_value" in name else ()
        split |= {name.replace("attention.query_key_value", f"self_attn.{letter}_proj"): part for letter, part in parts} or {name: x}
    return LLADA2_TO_GLM(split)


SMALL = config_lib.Model(vocab_size=V, hidden_size=48, num_layers=3, num_heads=4, num_kv_heads=2, rope_theta=50_000.0, max_length=64)
DENSE = dataclasses.replace(SMALL, dense_layers=(0, 1, 2), dense_size=56, qk_norm=False)
EXPERTS = dataclasses.replace(SMALL, num_experts=8, experts_per_token=2, expert_size=40, dense_layers=(1,), dense_size=56)
GROUPED = dataclasses.replace(
    SMALL, hidden_size=40, head_dim=16, rotary_fraction=0.5, norm_eps=1e-6, dense_layers=(0,), dense_size=56,
    num_experts=16, experts_per_token=4, expert_size=24, shared_expert_size=24, router_score="sigmoid", router_renormalize=True,
    router_bias=True, router_bias_in_weight=False, router_groups=4, router_groups_kept=2, router_scale=2.5)
SPARSE = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=40, decoder_sparse_step=1)
TWINS = {twin.family: twin for twin in (
    Twin("llada_moe", EXPERTS, "Qwen3Moe", SPARSE | dict(head_dim=12, mlp_only_layers=[1], norm_topk_prob=False)),
    Twin("llada", dataclasses.replace(DENSE, num_kv_heads=0), "Llama", {}, LLADA_TO_LLAMA),
    Twin("llada2_moe", GROUPED, "Glm4Moe",
         dict(head_dim=16, n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=24, n_shared_experts=1, first_k_dense_replace=1,
              use_qk_norm=True, n_group=4, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True), llada2_to_glm),
    Twin("dream", dataclasses.replace(DENSE, qkv_bias=True, shift_predictions=True), "Qwen2", {}),
)}  # fmt: skip


def stock_config(twin: Twin, causal: bool = False, **changes):
    model = twin.model
    rope = {"rope_type": "default", "rope_theta": model.rope_theta} | (
        {"partial_rotary_factor": model.rotary_fraction} if model.rotary_fraction < 1 else {})
    common = dict(vocab_size=V, hidden_size=model.hidden_size, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
                  num_key_value_heads=model.kv_heads, rms_norm_eps=model.norm_eps, max_position_embeddings=64, rope_parameters=rope,
                  tie_word_embeddings=False, eos_token_id=0)
    config = getattr(transformers, f"{twin.stock}Config")(**common | twin.settings | changes)
    if not causal:
        config.is_causal = False  # read where masks are made
    return config


def stock_model(twin: Twin, source: str | Tensors, **changes):
    """The stock model of a folder or of tensors; every weight is set and none is left over."""
    given = {"state_dict": {name: torch.from_numpy(x.copy()) for name, x in source.items()}} if isinstance(source, Mapping) else {}
    model, report = getattr(transformers, f"{twin.stock}ForCausalLM").from_pretrained(
        None if given else source, config=stock_config(twin, **changes), output_loading_info=True, dtype=torch.float32, **given)
    assert not any(report.values()), report
    return model.eval()


def stock_logits(model, tokens: np.ndarray, positions: np.ndarray | None = None, mask=None) -> np.ndarray:
    """(B, T, V); `mask` (B, T) is 1 where a key counts, or (T, T) True where a query sees a key."""
    if mask is not None and mask.dtype == bool:
        mask = np.where(mask, 0.0, np.finfo(np.float32).min).astype(np.float32)[None, None].repeat(len(tokens), 0)
    given = {"attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        return model(torch.tensor(tokens), **{name: torch.tensor(x) for name, x in given.items() if x is not None}).logits.numpy()


def draw(name: str, fan_in: int, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random weights of which each one matters: no norm scale is one, no bias zero, no router indifferent."""
    constant, scale = {"norm": (1, 0.3), "router": (0, 1.5 * fan_in**-0.5), "bias": (0, 0.5), "expert_bias": (0, 0.08)}.get(
        name, (0, 1.2 * fan_in**-0.5))
    return (constant + scale * rng.standard_normal(shape)).astype(np.float32)


def random_variables(model: transformer.LanguageModel, seed: int) -> Any:
    rng = np.random.default_rng(seed)

    def leaf(path, like):
        name = path[-1].key
        kind = "expert_bias" if name == "bias" else name.rsplit("_", 1)[-1]
        return draw(kind, model.config.hidden_size, rng, like.shape)

    return jax.tree_util.tree_map_with_path(leaf, model.shapes)


@functools.lru_cache
def ours(family: str) -> types.SimpleNamespace:
    """Our model of a family, its random variables and its logits as one compiled function."""
    model = transformer.build(TWINS[family].model)
    return types.SimpleNamespace(model=model, variables=random_variables(model, 0), logits=logits_of(model))


def logits_of(model: transformer.LanguageModel):
    return jax.jit(lambda variables, tokens, positions, spec: model.head(variables, model.apply(variables, tokens, positions, None, spec)[0]))


def random_tokens(length: int = T, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, (B, length))


def masks() -> dict[str, tuple[np.ndarray, AttentionSpec, np.ndarray | None]]:
    """By name: positions, our attention structure, and who sees whom written out (query, key)."""
    once, twice = (np.broadcast_to(np.tile(np.arange(T), n), (B, n * T)) for n in (1, 2))
    block, half = np.arange(2 * T) % T // C, np.arange(2 * T) // T  # of [x_t ; x_0]
    q_block, k_block, q_half, k_half = block[:, None], block[None], half[:, None], half[None]
    noisy_to_noisy = (q_half == 0) & (k_half == 0) & (q_block == k_block)
    noisy_to_clean = (q_half == 0) & (k_half == 1) & (q_block > k_block)
    clean_to_clean = (q_half == 1) & (k_half == 1) & (q_block >= k_block)
    rows = lambda x: jnp.asarray(np.broadcast_to(x, (B, x.size)))
    return {
        "full": (once, AttentionSpec(), None),
        "block causal": (once, AttentionSpec.own(block=rows(block[:T])), block[:T, None] >= block[None, :T]),
        "noisy and clean": (twice, AttentionSpec.own(block=rows(block), half=rows(half)), noisy_to_noisy | noisy_to_clean | clean_to_clean),
    }


def off(got, want, atol: float = ATOL) -> float:
    """The largest difference in units of what is tolerated: up to 1 is agreement."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return float(np.max(np.abs(got - want) / (atol + RTOL * np.abs(want))))


def write_folder(folder, family: str, model: config_lib.Model, variables, mask_id: int | None = V - 1) -> str:
    tensors = hf_weights.to_theirs(family, variables)
    with shards.Writer(folder, {name: (x.dtype, x.shape) for name, x in tensors.items()}, max_shard_bytes=20_000) as writer:
        for name, x in tensors.items():
            writer.array(name)[...] = x
        (writer.folder / "config.json").write_text(json.dumps(hf_config.write(family, model, mask_id, 0)))
    return str(folder)


def compare(family: str, stock, shift: bool = False) -> dict[str, float]:
    """How far the logits are off, by mask; with `shift` theirs predict the token after, those of a noisy block's first token in the clean half."""
    found, our = {}, ours(family)
    for name, (positions, spec, mask) in masks().items():
        tokens = random_tokens(positions.shape[1])
        want = stock_logits(stock, tokens, positions, mask)
        if shift:
            before = np.arange(want.shape[1]) - 1
            if want.shape[1] > T:
                before = np.where((before < T - 1) & ((before + 1) % C == 0), before + T, before)
            want = np.where((positions == 0)[..., None], want, want[:, before])
        found[name] = off(our.logits(our.variables, tokens, positions, spec), want)
    return found


@pytest.mark.parametrize("family", TWINS)
def test_our_weights_in_the_stock_class(family):
    twin = TWINS[family]
    stock = stock_model(twin, twin.rename(hf_weights.to_theirs(family, ours(family).variables)))
    assert max(compare(family, stock, shift=twin.model.shift_predictions).values()) <= 1


@pytest.mark.parametrize("family", ["llada_moe", "dream"])
def test_our_folder_in_the_stock_class(family, tmp_path):
    """Families whose names are the stock ones: the stock class reads the very files."""
    twin, our = TWINS[family], ours(family)
    folder = write_folder(tmp_path / "out", family, twin.model, our.variables)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    stock = stock_model(twin, folder)
    assert max(compare(family, stock, shift=twin.model.shift_predictions).values()) <= 1
    back = hf_weights.load(folder, family, our.model.shapes)
    assert jax.tree.all(jax.tree.map(np.array_equal, our.variables, back))


def test_padding_keys():
    our, tokens = ours("llada_moe"), random_tokens()
    stock = stock_model(TWINS["llada_moe"], hf_weights.to_theirs("llada_moe", our.variables))
    counts = np.arange(T) < np.array([[T], [T - 5]])
    positions = np.broadcast_to(np.arange(T), (B, T))
    got = our.logits(our.variables, tokens, positions, AttentionSpec(padding_k=jnp.asarray(~counts)))
    assert off(np.asarray(got)[counts], stock_logits(stock, tokens, mask=counts.astype(np.int64))[counts]) <= 1


def per_expert(tensors: Tensors) -> Tensors:
    """Tensors that hold all experts, gate above up, under the names of single ones."""
    split = {}
    for name, x in tensors.items():
        prefix, _, kind = name.rpartition(".")
        if prefix.endswith("mlp.experts"):
            parts = zip(("gate_proj", "up_proj"), np.split(x, 2, axis=1), strict=True) if kind == "gate_up_proj" else [("down_proj", x)]
            split |= {f"{prefix}.{e}.{part}.weight": matrix for part, all_experts in parts for e, matrix in enumerate(all_experts)}
        else:
            split[name] = x
    return split


def test_gradients():
    our, tokens = ours("llada_moe"), random_tokens(4 * T)  # enough for every expert to be chosen
    positions = np.broadcast_to(np.arange(4 * T), tokens.shape)
    stock = stock_model(TWINS["llada_moe"], hf_weights.to_theirs("llada_moe", our.variables))
    loss = torch.nn.functional.cross_entropy(stock(torch.tensor(tokens)).logits.view(-1, V), torch.tensor(tokens).view(-1))
    loss.backward()

    def mean(params):
        hidden, _, _ = our.model.apply({"params": params}, tokens, positions)
        return our.model.cross_entropy({"params": params}, hidden, tokens, np.ones(tokens.shape, bool)).mean()

    value, gradients = jax.jit(jax.value_and_grad(mean))(our.variables["params"])
    assert off(value, loss.item(), LOSS_ATOL) <= 1
    got = hf_weights.to_theirs("llada_moe", {"params": gradients})
    want = per_expert({name: p.grad.numpy() for name, p in stock.named_parameters()})
    assert got.keys() == want.keys()
    assert {name: off(got[name], want[name], LOSS_ATOL) for name in got if off(got[name], want[name], LOSS_ATOL) > 1} == {}
    assert all(x.any() for x in want.values())


@pytest.mark.parametrize("padded", [False, True])
def test_load_balance_loss(padded):
    """Over all layers at once, and over the tokens that count."""
    our, tokens = ours("llada_moe"), random_tokens()
    stock = stock_model(TWINS["llada_moe"], hf_weights.to_theirs("llada_moe", our.variables))
    counts = np.arange(T) < np.array([[T], [T - 5 * padded]])
    with torch.no_grad():
        want = stock(torch.tensor(tokens), attention_mask=torch.tensor(counts.astype(np.int64)), output_router_logits=True).aux_loss
    spec = AttentionSpec(padding_k=jnp.asarray(~counts))
    stats = our.model.apply(our.variables, tokens, np.broadcast_to(np.arange(T), (B, T)), None, spec)[2]
    assert off(moe.balance_loss(stats, "all_layers"), want.item(), LOSS_ATOL) <= 1
    assert off(moe.balance_loss(stats, "per_layer"), want.item(), LOSS_ATOL) > 1


QWEN2 = Twin("qwen2", dataclasses.replace(DENSE, qkv_bias=True, norm_eps=1e-6), "Qwen2", {})
QWEN3_MOE = Twin("qwen3_moe", dataclasses.replace(EXPERTS, head_dim=16, norm_eps=1e-6), "Qwen3Moe", SPARSE | dict(head_dim=16))
THEIRS = {
    "qwen2": (QWEN2, dict(tie_word_embeddings=False), dict()),
    "qwen2, tied": (QWEN2, dict(tie_word_embeddings=True), dict(tie_embeddings=True)),
    "qwen3_moe": (QWEN3_MOE, dict(norm_topk_prob=False), dict(dense_layers=(), dense_size=0)),
    "qwen3_moe, renormalised, a dense layer": (QWEN3_MOE, dict(norm_topk_prob=True, mlp_only_layers=[1]), dict(router_renormalize=True)),
}  # fmt: skip


def saved(folder, name: str, dtype=torch.float32):
    """A random stock model, saved in small shards."""
    twin, changes, _ = THEIRS[name]
    stock, rng = getattr(transformers, f"{twin.stock}ForCausalLM")(stock_config(twin, causal=True, **changes)), np.random.default_rng(2)
    for path, parameter in stock.named_parameters():
        kind = "router" if path.endswith("mlp.gate.weight") else path.replace("norm.weight", ".norm").rsplit(".", 1)[-1]
        parameter.data = torch.from_numpy(draw(kind, parameter.shape[-1], rng, tuple(parameter.shape))).to(dtype)
    stock.to(dtype).save_pretrained(folder, max_shard_size="20KB")
    return stock.eval()


@pytest.mark.parametrize("name", THEIRS)
def test_their_folder_in_our_model(name, tmp_path):
    stock = saved(tmp_path, name)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert {"rope_parameters", "dtype"} <= fields.keys() and not {"rope_theta", "torch_dtype"} & fields.keys()
    published = hf_config.read(str(tmp_path))
    twin, _, ours_differ = THEIRS[name]
    assert (published.family, published.objective) == (twin.family, "autoregressive")
    assert published.model == dataclasses.replace(twin.model, **ours_differ)

    model = transformer.build(published.model)
    variables, run = hf_weights.load(str(tmp_path), published.family, model.shapes), logits_of(model)
    positions = np.broadcast_to(np.arange(T), (B, T))
    causal = AttentionSpec.own(block=jnp.asarray(positions))
    ours = lambda tokens: np.asarray(run(variables, np.pad(tokens, [(0, 0), (0, T - tokens.shape[1])]), positions, causal))[:, :tokens.shape[1]]
    theirs = lambda tokens: stock_logits(stock, tokens)
    tokens = random_tokens()
    assert off(ours(tokens), theirs(tokens)) <= 1
    assert np.array_equal(greedy(ours, tokens[:, :6]), greedy(theirs, tokens[:, :6]))

    back = write_folder(tmp_path / "back", published.family, published.model, variables, mask_id=None)
    again = type(stock).from_pretrained(back).eval()  # by our config.json
    assert np.array_equal(stock_logits(again, tokens), theirs(tokens))


def greedy(logits: Callable[[np.ndarray], np.ndarray], tokens: np.ndarray) -> np.ndarray:
    while tokens.shape[1] < T:
        tokens = np.concatenate([tokens, logits(tokens)[:, -1:].argmax(-1)], axis=1)
    return tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", THEIRS)
def test_their_tensors_come_back_bit_for_bit(name, dtype, tmp_path):
    saved(tmp_path, name, getattr(torch, dtype))
    published = hf_config.read(str(tmp_path))
    with shards.Reader(tmp_path) as reader:
        entries = hf_weights.table(published.family, transformer.build(published.model).shapes)
        assert hf_weights.param_dtype(entries, reader) == dtype
        model = transformer.build(dataclasses.replace(published.model, param_dtype=dtype))
        tensors = hf_weights.to_theirs(published.family, hf_weights.load(str(tmp_path), published.family, model.shapes))
        assert tensors.keys() == reader.tensors.keys()
        for key, x in tensors.items():
            stored = reader.array(key)
            assert x.dtype == (np.float32 if key.endswith("mlp.gate.weight") else stored.dtype), key  # a router is held in float32
            assert x.astype(stored.dtype).tobytes() == stored.tobytes(), key


def exchanged(first: str, second: str) -> Callable[[Tensors], Tensors]:
    return renamed((first, "?"), (second, first), ("?", second))


BUGS = {  # family, settings of the stock class, a change of its tensors
    "rotary base": ("llada_moe", dict(rope_parameters={"rope_type": "default", "rope_theta": 100_000.0}), None),
    "norm epsilon": ("llada_moe", dict(rms_norm_eps=1e-6), None),
    "renormalised top-k": ("llada_moe", dict(norm_topk_prob=True), None),
    "causal": ("llada_moe", dict(causal=True), None),
    "query and key": ("llada", {}, exchanged("q_proj", "k_proj")),
    "gate and up": ("llada", {}, exchanged("gate_proj", "up_proj")),
    "query and key norms": ("llada2_moe", {}, exchanged("q_norm", "k_norm")),
    "expert groups": ("llada2_moe", dict(n_group=1, topk_group=1), None),
    "expert bias": ("llada2_moe", {}, lambda tensors: {name: x * (0 if "correction_bias" in name else 1) for name, x in tensors.items()}),
    "biases": ("dream", {}, lambda tensors: {name: x * (0 if "bias" in name else 1) for name, x in tensors.items()}),
    "no shift": ("dream", {}, None),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(bug):
    family, settings, change = BUGS[bug]
    tensors = TWINS[family].rename(hf_weights.to_theirs(family, ours(family).variables))
    stock = stock_model(TWINS[family], change(tensors) if change else tensors, **settings)
    found = compare(family, stock, shift=family == "dream" and bug != "no shift")
    given = {"block causal", "noisy and clean"} if bug == "causal" else set()  # masks that the stock class takes as they are
    assert {name for name, x in found.items() if x <= 1} == given, found


def test_a_tensor_left_out_is_noticed():
    tensors = hf_weights.to_theirs("dream", ours("dream").variables)
    tensors["model.layers.1.self_attn.q_proj.scale"] = tensors.pop("model.layers.1.self_attn.q_proj.bias")
    with pytest.raises(AssertionError, match=r"q_proj\.bias.*q_proj\.scale"):
        stock_model(TWINS["dream"], tensors)
