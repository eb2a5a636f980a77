"""Published configs and tensors: names against the families' own layouts, bits there and back, and a clear line for what does not fit."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_jax import config as config_lib
from llada_jax import partitioning
from llada_jax.config import ConfigError, Model
from llada_jax.interop import hf_config, hf_weights
from llada_jax.model import transformer
from llada_jax.training import pretrained
from tests import published
from tests.published import CASES, DREAM, EVERY_OPTION, FULL, LLADA, LLADA2, LLADA_MOE, QWEN2, QWEN3_MOE, V


def refused(action, *parts):
    """The action raises ConfigError with one printable line that holds the parts."""
    with pytest.raises(ConfigError) as error:
        action()
    line = str(error.value)
    assert line.isprintable() and all(part in line for part in parts), line


def entries_of(fields, layout="per_expert"):
    found = hf_config.parse(fields)
    return hf_weights.table(found.family, transformer.build(found.model).shapes, layout)


# ---- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields, layout", CASES.values(), ids=CASES)
def test_the_table_has_the_familys_names_and_shapes(fields, layout):
    assert {entry.name: entry.shape for entry in entries_of(fields, layout)} == published.tensors(fields, layout)


SIZES = {"LLaDA-8B": (291, 8_015_581_184), "LLaDA-MoE-7B-A1B": (3219, 7_356_880_896), "LLaDA2.0-mini": (14_813, 16_255_643_392),
         "LLaDA2.0-flash": (24_161, 102_889_705_216)}  # fmt: skip


@pytest.mark.parametrize("name", FULL)
def test_published_sizes(name):
    shapes, want = {entry.name: entry.shape for entry in entries_of(FULL[name])}, published.tensors(FULL[name])
    assert shapes == want and (len(want), sum(int(np.prod(shape)) for shape in want.values())) == SIZES[name]


@pytest.mark.parametrize("kind", published.DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_every_bit_comes_back(case, kind, tmp_path):
    fields, layout = CASES[case]
    arrays = published.random_tensors(fields, layout, published.DTYPES[kind])
    opened = pretrained.open_published(str(published.write(tmp_path / "in", fields, arrays, num_files=3)))
    assert opened.layout == layout and opened.config.model.param_dtype == ("bfloat16" if kind in ("bfloat16", "router in float32") else "float32")
    ours = opened.source().tree()
    leaves = {hf_weights.path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(ours)}
    for entry in opened.entries:
        back = np.empty(entry.shape, arrays[entry.name].dtype)
        hf_weights.put(entry, leaves, back)
        assert back.tobytes() == arrays[entry.name].tobytes(), entry.name


@pytest.mark.parametrize("kind", ["float32", "router in float32", "bfloat16", "float16"])
def test_nan_and_infinity_come_back(kind, tmp_path):
    """Bit for bit where they are held in the dtype in which they are stored; elsewhere a NaN stays a NaN, whatever its payload."""
    arrays = published.random_tensors(LLADA2, dtypes=published.DTYPES[kind], finite=False)
    opened = pretrained.open_published(str(published.write(tmp_path / "in", LLADA2, arrays)))
    refused(opened.source().tree, "model.safetensors: ", " holds NaN or infinity; convert import --allow_nonfinite takes it as it is")
    source = opened.source(allow_nonfinite=True)
    leaves = {hf_weights.path_of(path): source(hf_weights.path_of(path)) for path, _ in jax.tree_util.tree_leaves_with_path(opened.shapes)}
    kept = 0
    for entry in opened.entries:
        want = arrays[entry.name]
        back = np.empty_like(want)
        with np.errstate(invalid="ignore"):
            hf_weights.put(entry, leaves, back)
        if leaves[entry.pieces[0].ours].dtype == want.dtype:
            assert back.tobytes() == want.tobytes(), entry.name
            kept += 1
        np.testing.assert_array_equal(back.astype(np.float32), want.astype(np.float32))
    assert kept == {"bfloat16": len(arrays) - 4, "float16": 0}.get(kind, len(arrays))  # two routers and their biases are held in float32


def test_one_value_that_is_not_finite_is_found_wherever_it_is(tmp_path):
    rng = np.random.default_rng(0)
    for i, name in enumerate(rng.permutation(list(published.tensors(LLADA2)))[:40]):
        dtype = (published.F32, published.BF16, published.F16)[i % 3]
        arrays = {key: np.zeros(shape, dtype) for key, shape in published.tensors(LLADA2).items()}
        arrays[name].flat[rng.integers(arrays[name].size)] = (np.nan, np.inf, -np.inf)[i % 3]
        folder = published.write(tmp_path / str(i), LLADA2, arrays)
        refused(pretrained.open_published(str(folder)).source().tree, f"model.safetensors: {name} holds NaN")


def test_a_tensor_that_does_not_fit_is_named(tmp_path):
    def opens(number, change, *parts):
        arrays = published.random_tensors(LLADA_MOE)
        change(arrays)
        folder = published.write(tmp_path / str(number), LLADA_MOE, arrays, num_files=2)
        refused(lambda: pretrained.open_published(str(folder)), *parts)

    key, expert = "model.layers.1.self_attn.k_proj.weight", "model.layers.2.mlp.experts.3.up_proj.weight"
    opens(0, lambda arrays: arrays.pop(expert), "1 tensors are missing", expert, "0 are not known")
    opens(1, lambda arrays: arrays.update({"model.layers.1.self_attn.k_proj.bias": np.zeros(3, np.float32)}), "0 tensors are missing",
          "1 are not known", "k_proj.bias")
    opens(2, lambda arrays: arrays.update({key: arrays[key].T[:5]}), "-of-00002.safetensors: ", key, "[5, 32]", "[32, 32]")
    for dtype in (np.int8, np.int32, np.float64, bool):
        opens(str(dtype), lambda arrays, dtype=dtype: arrays.update({key: arrays[key].view(np.int32).astype(dtype)}), key, np.dtype(dtype).name)


def test_a_dtype_is_not_narrowed(tmp_path):
    """An opened folder chooses a dtype that holds everything; whoever chooses another is told."""
    arrays = published.random_tensors(LLADA_MOE, dtypes=published.DTYPES["mixed"])
    opened = pretrained.open_published(str(published.write(tmp_path / "in", LLADA_MOE, arrays)))
    narrow = transformer.build(dataclasses.replace(opened.published.model, param_dtype="bfloat16")).shapes
    refused(hf_weights.Source(opened.reader, opened.entries, narrow).tree, "bfloat16 would round it")


def test_layouts_are_the_familys():
    shapes = transformer.build(hf_config.parse(LLADA_MOE).model).shapes
    refused(lambda: hf_weights.table("llada_moe", shapes, "stacked"), "'stacked'", "per_expert, fused")
    refused(lambda: hf_weights.table("llada2_moe", shapes, "fused"), "'fused'", "per_expert, stacked")


MESHES = [dict(data=8), dict(fsdp=8), dict(expert=2, fsdp=2, tensor=2), dict(data=2, expert=4), dict(tensor=4, data=2)]


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("fields", [EVERY_OPTION, LLADA2], ids=["llada_moe", "llada2_moe"])
def test_on_any_mesh_the_weights_are_the_same(fields, axes, tmp_path):
    arrays = published.random_tensors(fields, dtypes=published.DTYPES["router in float32"])
    opened = pretrained.open_published(str(published.write(tmp_path / "in", fields, arrays)))
    want = opened.source().tree()
    mesh = partitioning.make_mesh(config_lib.Mesh(**({"data": 1} | axes)))
    model = transformer.build(opened.config.model, mesh=mesh)
    shardings = partitioning.shardings_of(mesh, model.axes, model.shapes)
    found = opened.load(model.shapes, shardings)
    for sharding, x, y in zip(jax.tree.leaves(shardings), jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert x.sharding == sharding and x.dtype == y.dtype and np.asarray(x).tobytes() == y.tobytes()
    gate = found["params"]["stack_1"]["gate"]
    split = axes.get("fsdp", 1) * axes.get("expert", 1) * axes.get("tensor", 1)
    assert gate.addressable_shards[0].data.size * split == gate.size


# ---- config.json ------------------------------------------------------------------------------------------------------

EVERY = {name: fields for name, (fields, layout) in CASES.items() if "fused" not in name and "stacked" not in name} | FULL


@pytest.mark.parametrize("fields", EVERY.values(), ids=EVERY)
def test_a_written_config_is_the_same_model(fields):
    found = hf_config.parse(fields)
    written = json.loads(json.dumps(hf_config.write(found.family, found.model, found.mask_id, found.eos_id)))
    again = hf_config.parse(written)
    resolved = lambda model: dataclasses.replace(model, num_kv_heads=model.kv_heads, head_dim=model.head_size)
    assert resolved(again.model) == resolved(found.model)
    assert (again.family, again.mask_id, again.eos_id, again.objective) == (found.family, found.mask_id, found.eos_id, found.objective)
    if found.objective == "masked":
        assert hf_config.family_of(found.model) == found.family


def test_what_the_settings_mean():
    """Field by field, against the values of the published models."""
    moe, mini, dense = (hf_config.parse(FULL[name]) for name in ("LLaDA-MoE-7B-A1B", "LLaDA2.0-mini", "LLaDA-8B"))
    assert (moe.family, moe.mask_id, moe.eos_id) == ("llada_moe", 156895, 156892)  # the mask's id is not in its config.json
    assert moe.model == Model(
        vocab_size=157184, hidden_size=2048, num_layers=16, num_heads=16, num_kv_heads=16, num_experts=64, experts_per_token=8, expert_size=1024,
        rope_theta=50000.0, norm_eps=1e-5, max_length=8192)
    assert (mini.family, mini.mask_id, mini.eos_id) == ("llada2_moe", 156895, 156892)
    assert mini.model == Model(
        vocab_size=157184, hidden_size=2048, num_layers=20, num_heads=16, num_kv_heads=4, head_dim=128, num_experts=256, experts_per_token=8,
        expert_size=512, shared_expert_size=512, dense_layers=(0,), dense_size=5120, router_score="sigmoid", router_renormalize=True,
        router_bias=True, router_bias_in_weight=False, router_groups=8, router_groups_kept=4, router_scale=2.5, rotary_fraction=0.5,
        rope_theta=600000.0, norm_eps=1e-6, max_length=32768)
    assert (dense.family, dense.mask_id, dense.eos_id) == ("llada", 126336, 126081)
    assert dense.model == Model(
        vocab_size=126464, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=32, dense_layers=tuple(range(32)), dense_size=12288,
        qk_norm=False, rope_theta=500000.0, norm_eps=1e-5, max_length=4096)


def test_the_family_of_a_model():
    moe, mini, dense = (hf_config.parse(FULL[name]).model for name in ("LLaDA-MoE-7B-A1B", "LLaDA2.0-mini", "LLaDA-8B"))
    change = dataclasses.replace
    assert hf_config.family_of(Model(vocab_size=V)) == "llada_moe"
    assert hf_config.family_of(dense) == "llada" and hf_config.family_of(change(dense, num_kv_heads=8, tie_embeddings=True)) == "llada"
    assert hf_config.family_of(change(dense, qkv_bias=True, shift_predictions=True)) == "dream"
    assert hf_config.family_of(change(dense, qkv_bias=True), "autoregressive") == "qwen2"
    assert hf_config.family_of(moe, "autoregressive") == "qwen3_moe"
    assert hf_config.family_of(change(moe, router_bias=True, rotary_fraction=0.5, clip_qkv=4.0, param_dtype="bfloat16")) == "llada_moe"
    for impossible in (change(mini, router_bias_in_weight=True), change(moe, router_renormalize=True), change(moe, head_dim=64),
                       change(mini, dense_layers=(1,)), change(moe, qkv_bias=True)):
        with pytest.raises(ConfigError, match=r"^no published layout fits: ([^;]*; ){3}[^;]*$"):  # the reason of each of four families
            hf_config.family_of(impossible)
    refused(lambda: hf_config.write("llada_moe", mini, 0, 0), "LLaDAMoEModelLM cannot express", "model.router_score='sigmoid'")
    refused(lambda: hf_config.write("lada", dense, 0, 0), "'lada'", "did you mean 'llada'")


UNSUPPORTED = [(fields, field, value) for fields, changes in [
    (LLADA, dict(block_type="sequential", block_group_size=2, activation_type="tanh", layer_norm_type="default", rope=False, alibi=True,
                 attention_layer_norm=True, input_emb_norm=True, include_bias=True, include_qkv_bias=True, bias_for_layer_norm=True,
                 scale_logits=True, multi_query_attention=True, layer_norm_with_affine=False)),
    (LLADA_MOE, dict(rope_scaling={"type": "yarn", "factor": 4.0}, attention_bias=True, use_sliding_window=True, hidden_act="gelu",
                     moe_router_score_function="sigmoid")),
    (LLADA2, dict(rope_scaling={"type": "linear"}, use_sliding_window=True, hidden_act="gelu_new", score_function="softmax", use_bias=True,
                  use_qkv_bias=True, norm_head=True, moe_router_enable_expert_bias=False)),
    (DREAM, dict(use_sliding_window=True, rope_scaling={"type": "dynamic"}, hidden_act="relu", attention_bias=False)),
    (QWEN2, dict(use_sliding_window=True, rope_scaling={"type": "dynamic"}, hidden_act="relu",
                 rope_parameters={"rope_type": "yarn", "rope_theta": 1.0})),
    (QWEN3_MOE, dict(attention_bias=True, use_sliding_window=True)),
] for field, value in changes.items()]  # fmt: skip


@pytest.mark.parametrize("fields, field, value", UNSUPPORTED, ids=[f"{fields['architectures'][0]}-{field}" for fields, field, _ in UNSUPPORTED])
def test_a_setting_that_is_not_supported_is_named(fields, field, value):
    refused(lambda: hf_config.parse(fields | {field: value}, "DIR/config.json"), "DIR/config.json: ", field, "not supported")


BROKEN = [  # fields, change, parts of the line
    (LLADA_MOE, {"hidden_size": "2048"}, ["hidden_size", "'2048'"]), (LLADA_MOE, {"hidden_size": 32.0}, ["hidden_size", "32.0"]),
    (LLADA_MOE, {"hidden_size": -32}, ["hidden_size", "-32"]), (LLADA_MOE, {"hidden_size": 0}, ["hidden_size"]),
    (LLADA_MOE, {"hidden_size": 33}, ["hidden_size", "33", "4"]), (LLADA_MOE, {"vocab_size": True}, ["vocab_size"]),
    (LLADA_MOE, {"num_hidden_layers": 10**12, "moe_layer_freq": None}, ["num_hidden_layers", "1000000000000"]),
    (LLADA, {"n_layers": 10**6}, ["n_layers", "1000000"]), (LLADA_MOE, {"num_hidden_layers": "3"}, ["num_hidden_layers"]),
    (LLADA_MOE, {"expert_intermediate_size": -12}, ["expert_size", "-12"]), (LLADA_MOE, {"num_key_value_heads": -2}, ["num_kv_heads", "-2"]),
    (LLADA2, {"head_dim": -16}, ["head_dim", "-16"]), (LLADA2, {"num_shared_experts": -1}, ["shared_expert_size", "-12"]),
    (LLADA_MOE, {"expert_intermediate_size": 10**30}, ["expert_size"]), (LLADA_MOE, {"rope_theta": float("inf")}, ["rope_theta"]),
    (LLADA_MOE, {"rms_norm_eps": "1e-5"}, ["norm_eps", "'1e-5'"]), (LLADA_MOE, {"rms_norm_eps": float("nan")}, ["norm_eps", "nan"]),
    (LLADA_MOE, {"rope_theta": 10**400}, ["rope_theta"]), (LLADA_MOE, {"partial_rotary_factor": 2}, ["rotary_fraction", "2"]),
    (LLADA_MOE, {"moe_layer_freq": [1, 1]}, ["moe_layer_freq", "2", "3"]), (LLADA_MOE, {"num_experts_per_tok": 5}, ["experts_per_token", "5"]),
    (QWEN3_MOE, {"mlp_only_layers": 3}, ["int"]), (QWEN3_MOE, {"decoder_sparse_step": "2"}, ["str"]), (LLADA2, {"n_group": 3}, ["router_groups"]),
    (LLADA_MOE, {"mask_token_id": V}, ["mask_token_id", str(V)]), (LLADA_MOE, {"mask_token_id": "x"}, ["mask_token_id", "'x'"]),
    (LLADA_MOE, {"mask_token_id": None}, ["mask_token_id=156895", "--mask_id"]), (LLADA_MOE, {"eos_token_id": []}, ["eos_token_id=[]"]),
    (LLADA_MOE, {"eos_token_id": [V - 2, 3]}, None), (LLADA_MOE, {"eos_token_id": True}, ["eos_token_id=True"]),
    (LLADA_MOE, {"max_position_embeddings": 0}, ["max_length=0"]),
]  # fmt: skip


@pytest.mark.parametrize("fields, change, parts", BROKEN, ids=[str(change)[1:40] for _, change, _ in BROKEN])
def test_values_that_make_no_model(fields, change, parts):
    if parts is None:
        assert hf_config.parse(fields | change).eos_id == V - 2
    else:
        refused(lambda: hf_config.parse(fields | change, "DIR/config.json"), "DIR/config.json: ", *parts)


@pytest.mark.parametrize("fields", [LLADA, LLADA_MOE, LLADA2, DREAM, QWEN2, QWEN3_MOE], ids=lambda fields: fields["architectures"][0])
def test_a_field_that_is_missing_is_named(fields):
    optional = {  # whose absence means what the tiny configs say
        "model_type", "architectures", "mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id", "init_std", "initializer_range",
        "num_key_value_heads", "n_kv_heads", "tie_word_embeddings", "weight_tying"}
    missing = 0
    for field in fields.keys() - optional:
        left = {key: value for key, value in fields.items() if key != field}
        try:
            hf_config.parse(left)
        except ConfigError as error:
            assert re.search(rf"\b{field}\b", str(error)), (field, str(error))
            missing += 1
    assert missing >= 7
    refused(lambda: hf_config.parse({key: value for key, value in fields.items() if "token_id" not in key}), "token_id")


@pytest.mark.parametrize("architectures", [None, [], "LLaDAModelLM", ["GPT2LMHeadModel"], [None], [["LLaDAModelLM"]], [{}], {}, 3, [3.5, "x"]],
                         ids=str)
def test_architectures_that_are_not_known(architectures):
    refused(lambda: hf_config.parse(LLADA | {"architectures": architectures}), f"architectures={architectures!r}", "LLaDAMoEModelLM")
    refused(lambda: hf_config.parse({}), "architectures=None")


def test_a_file_that_is_no_config(tmp_path):
    file = tmp_path / "config.json"
    refused(lambda: hf_config.read(str(tmp_path)), str(tmp_path), "holds no config.json")
    for text in ("", "{", "[]", "null", '"x"', "[" * 100_000, b"\xff\xfe{}"):
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        refused(lambda: hf_config.read(str(tmp_path)), str(file), "is not the json of a config")
    file.write_text(json.dumps(LLADA))
    assert hf_config.read(str(tmp_path)).model == hf_config.parse(LLADA).model


NUMBERS = st.integers(-3, 70) | st.sampled_from([10**7, 2**31, 2**63, -(2**63), 10**25, 10**400]) | st.floats()
NESTED = st.recursive(st.integers(-1, 3) | st.text(max_size=3), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
    st.sampled_from(["rope_theta", "rope_type", "partial_rotary_factor", "x"]), inner, max_size=3), max_leaves=5)
VALUES = st.none() | st.booleans() | NUMBERS | st.sampled_from(["", "silu", "3", "x" * 50]) | NESTED
MORE_KEYS = ["rope_parameters", "mlp_only_layers", "moe_layer_freq"]


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_fields_make_a_model_or_one_clear_line(data):
    fields = dict(data.draw(st.sampled_from([LLADA, LLADA_MOE, EVERY_OPTION, LLADA2, DREAM, QWEN2, QWEN3_MOE])))
    for key in data.draw(st.lists(st.sampled_from([*sorted(fields), *MORE_KEYS]), min_size=1, max_size=3)):
        if data.draw(st.booleans()):
            fields[key] = data.draw(VALUES)
        else:
            fields.pop(key, None)
    try:
        found = hf_config.parse(fields)
    except ConfigError as error:
        assert str(error).isprintable(), str(error)
        return
    config = pretrained.config_for(found)  # what opens also stands the checks of a whole config
    model = config.model
    sizes = [value for value in dataclasses.astuple(model) if isinstance(value, (int, float))]
    assert all(0 <= value < 2**31 for value in sizes) and len(model.moe_layers) + len(model.dense_layers) == model.num_layers
    entries = hf_weights.table(found.family, transformer.build(model).shapes)
    assert all(side >= 0 for entry in entries for side in entry.shape)
