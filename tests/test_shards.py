"""Folders of safetensors: equal to the format's library in both directions, one line for every kind of damage, never half-written."""

import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import numpy as library
from safetensors import safe_open

from llada_jax.config import ConfigError
from llada_jax.interop import shards

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
FUZZ = settings(max_examples=400, deadline=None, derandomize=True, database=None)


def every_dtype():
    """Vectors, matrices, scalars and empty tensors of each dtype, in the library's order: wide dtypes first, then names."""
    tensors = {}
    for kind, dtype in shards.DTYPES.items():
        for shape in [(3,), (2, 5), (), (0, 4)]:
            values = np.arange(math.prod(shape)).reshape(shape)
            tensors[f"{kind}.é\"\\\n.{len(shape)}.{values.size}"] = np.asarray(values % 2 if kind == "BOOL" else values, dtype)
    header = json.loads(header_of(library.save(tensors)))
    return {name: tensors[name] for name in header}


def header_of(content):
    return content[8:8 + struct.unpack("<Q", content[:8])[0]]


def file_of(header, data=b""):
    """A file with this header (text, bytes or an object)."""
    header = json.dumps(header) if isinstance(header, dict) else header
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header)) + header + data


def write(folder, tensors, **options):
    with shards.Writer(folder, {name: (array.dtype, array.shape) for name, array in tensors.items()}, **options) as writer:
        for name, array in tensors.items():
            writer.array(name)[...] = array


def equal(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def refused(action, *parts):
    """The action raises ConfigError with one printable line that holds the parts."""
    with pytest.raises(ConfigError) as error:
        action()
    line = str(error.value)
    assert line.isprintable() and all(part in line for part in parts), line
    return line


def touch(folder):
    """Every byte of every tensor, through copies."""
    with shards.Reader(folder) as reader:
        return {name: reader.array(name).tobytes() for name in reader.tensors}


@pytest.fixture
def sharded(tmp_path):
    """Two files and an index, made by the library: a and c in the first, b in the second."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    library.save_file({"a": np.arange(3, dtype=np.float32), "c": np.arange(2, dtype=np.int32)}, folder / A)
    library.save_file({"b": np.ones((2, 2), np.float32)}, folder / B)
    (folder / shards.INDEX).write_text(json.dumps({"metadata": {"total_size": 36}, "weight_map": {"a": A, "b": B, "c": A}}))
    return folder


def test_one_file_is_the_librarys_byte_for_byte(tmp_path):
    tensors = every_dtype()
    write(tmp_path / "ours", tensors)
    library.save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert os.listdir(tmp_path / "ours") == [shards.SINGLE]
    assert (tmp_path / "ours" / shards.SINGLE).read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    with shards.Reader(tmp_path / "ours") as reader:
        assert list(reader.tensors) == list(tensors) and reader.order == [shards.SINGLE]
        assert reader.metadata == {shards.SINGLE: {"format": "pt"}}
        assert all(equal(reader.array(name), array) for name, array in tensors.items())
        arrays = [reader.array(name) for name in tensors]
    assert all(map(equal, arrays, tensors.values()))  # arrays outlive the reader
    assert not any(array.flags.writeable or array.flags.owndata for array in arrays)


def test_the_order_given_is_kept_though_it_leaves_tensors_unaligned(tmp_path):
    tensors = dict(reversed(every_dtype().items()))  # bytes before doubles
    write(tmp_path / "ours", tensors, metadata={})
    with shards.Reader(tmp_path / "ours") as reader:
        assert list(reader.tensors) == list(tensors) and reader.metadata == {shards.SINGLE: {}}
        assert any(not reader.array(name).flags.aligned for name in tensors)
        assert all(equal(reader.array(name), array) for name, array in tensors.items())
    with safe_open(tmp_path / "ours" / shards.SINGLE, "np") as theirs:
        for name, array in tensors.items():
            if "F8" not in name:  # the library's reader has no numpy dtype for them
                assert equal(theirs.get_tensor(name), array)


def test_shards(tmp_path):
    tensors = {f"t{i}": np.full((5, 2), i, np.float32) for i in (3, 1, 2, 0)}
    tensors["long"], tensors["end"] = np.zeros(100, np.int8), np.array(7, ml_dtypes.bfloat16)
    write(tmp_path / "ours", tensors, max_shard_bytes=80)
    index = json.loads((tmp_path / "ours" / shards.INDEX).read_text())
    groups = [["t3", "t1"], ["t2", "t0"], ["long"], ["end"]]
    expected = {name: f"model-{i:05d}-of-00004.safetensors" for i, names in enumerate(groups, 1) for name in names}
    assert index == {"metadata": {"total_size": 4 * 40 + 100 + 2}, "weight_map": expected}
    assert list(index["weight_map"]) == sorted(expected)
    assert shards.index_only(tmp_path / "ours") == expected
    with shards.Reader(tmp_path / "ours") as reader:
        assert list(reader.tensors) == [name for names in groups for name in names]
        assert {name: tensor.file for name, tensor in reader.tensors.items()} == expected
        assert reader.order == sorted(set(expected.values()))
        assert all(equal(reader.array(name), array) for name, array in tensors.items())
    (tmp_path / "ours" / shards.INDEX).unlink()  # without an index: the files in the order of their names
    with shards.Reader(tmp_path / "ours") as reader:
        assert list(reader.tensors) == [name for names in groups for name in names]


def test_a_published_folder_is_written_back_byte_for_byte(sharded, tmp_path):
    with shards.Reader(sharded) as reader:
        order = {name: (tensor.dtype, tensor.shape) for name, tensor in reader.tensors.items()}
        with shards.Writer(tmp_path / "back", order, shard_of=shards.index_only(sharded), metadata={}) as writer:
            for name in order:
                writer.array(name)[...] = reader.array(name)
            (writer.folder / "config.json").write_text("{}")
    assert sorted(os.listdir(tmp_path / "back")) == sorted([A, B, "config.json", shards.INDEX])
    for file in (A, B):
        assert (tmp_path / "back" / file).read_bytes() == (sharded / file).read_bytes()
    assert shards.index_only(tmp_path / "back") == shards.index_only(sharded)


def test_parts_of_a_tensor_are_filled_one_by_one(tmp_path):
    with shards.Writer(tmp_path / "ours", {"qkv": (ml_dtypes.bfloat16, (3, 4)), "rest": ("float16", [2])}) as writer:
        for i in range(3):
            writer.array("qkv")[i] = i + 1
    loaded = library.load_file(tmp_path / "ours" / shards.SINGLE)
    assert loaded["qkv"].astype(int).tolist() == [[1] * 4, [2] * 4, [3] * 4] and loaded["rest"].tolist() == [0, 0]


def test_which_files_are_read(sharded, tmp_path):
    (sharded / shards.SINGLE).write_bytes(b"not read, as the index wins")
    (sharded / "pytorch_model.bin").write_bytes(b"")
    assert list(touch(sharded)) == ["a", "c", "b"]
    links = tmp_path / "links"  # as the Hub's cache has them
    links.mkdir()
    for file in (A, B, shards.INDEX):
        (links / file).symlink_to(sharded / file)
    assert touch(links) == touch(sharded)
    plain = tmp_path / "plain"
    plain.mkdir()
    library.save_file({"y": np.ones(1)}, plain / "b.safetensors")
    library.save_file({"z": np.ones(1)}, plain / "a.safetensors")
    (plain / "._a.safetensors").write_bytes(b"what macOS leaves")
    assert list(touch(plain)) == ["z", "y"]
    shutil.copy(plain / "a.safetensors", plain / shards.SINGLE)
    assert list(touch(plain)) == ["z"]


def test_a_folder_without_weights_says_so(tmp_path):
    refused(lambda: shards.Reader(tmp_path), str(tmp_path), "holds no .safetensors file")
    refused(lambda: shards.Reader(tmp_path / "nowhere"), "nowhere is not a folder")
    refused(lambda: shards.index_only(tmp_path), f"{shards.INDEX} cannot be read")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    refused(lambda: shards.Reader(tmp_path), "pickle", "pytorch_model.bin", "safetensors version")


def entry(dtype="F32", shape=(1,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


DAMAGE = {
    "empty": (b"", "0 bytes"),
    "shorter than a length": (b"1234", "4 bytes"),
    "header cut": (struct.pack("<Q", 100) + b"{}", "100 bytes", "has 10"),
    "a web page": (b"<!DOCTYPE html><html></html>", "its header should have"),
    "absurd length": (struct.pack("<Q", 2**63) + b"{}", str(2**63), "at most 100000000"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "pointer of Git LFS", "git lfs pull"),
    "not an object": (file_of("[1]"), "[1]", "not a JSON object"),
    "not utf-8": (file_of(b'{"\xff": 1}'), "not JSON", "0xff"),
    "not json": (file_of('{"a": '), "not JSON"),
    "deep": (file_of('{"a":' + "[" * 200_000), "nested too deeply"),
    "long number": (file_of('{"a": ' + "1" * 5000 + "}"), "not JSON"),
    "twice": (file_of('{"a": 1, "a": 2}'), "not JSON", "'a' is there twice"),
    "entry": (file_of({"a": [1]}), "'a'", "[1]"),
    "entry lacks": (file_of({"a": {"dtype": "F32"}}), "'a'", "data_offsets"),
    "dtype": (file_of({"a": entry("F4")}, bytes(4)), "'a'", "'F4'", "BF16"),
    "dtype kind": (file_of({"a": entry(["F32"])}, bytes(4)), "'a'", "['F32']"),
    "shape": (file_of({"a": entry(shape=[-1])}, bytes(4)), "'a'", "[-1]"),
    "shape kind": (file_of({"a": entry(shape=[True])}, bytes(4)), "'a'", "[True]"),
    "shape float": (file_of({"a": entry(shape=[1.0])}, bytes(4)), "'a'", "[1.0]"),
    "shape long": (file_of({"a": entry(shape=[1] * 65)}, bytes(4)), "'a'", "at most 64"),
    "shape huge": (file_of({"a": entry(shape=[2**62, 0], offsets=[0, 0])}), "'a'", str(2**62), "64 bits"),
    "offsets": (file_of({"a": entry(offsets=[0, 4.0])}, bytes(4)), "'a'", "4.0"),
    "offsets three": (file_of({"a": entry(offsets=[0, 4, 8])}, bytes(4)), "'a'", "[0, 4, 8]"),
    "reversed": (file_of({"a": entry(offsets=[4, 0])}, bytes(4)), "'a'", "[4, 0]"),
    "size": (file_of({"a": entry(shape=[2])}, bytes(4)), "'a'", "8 bytes", "[0, 4]"),
    "beyond": (file_of({"a": entry(), "b": entry(offsets=[4, 8])}, bytes(7)), "'b'", "4 to 8", "only 7"),
    "overlap": (file_of({"a": entry(), "b": entry(offsets=[2, 6])}, bytes(6)), "'b'", "2 to 6", "ends at 4", "overlap"),
    "hole": (file_of({"a": entry(), "b": entry(offsets=[6, 10])}, bytes(10)), "'b'", "6 to 10", "ends at 4", "hole"),
    "hole at first": (file_of({"a": entry(offsets=[4, 8])}, bytes(8)), "'a'", "4 to 8", "hole"),
    "trailing": (file_of({"a": entry()}, bytes(9)), "'a'", "byte 4", "9 follow"),
    "trailing alone": (file_of({}, bytes(9)), "no tensors", "9 follow"),
    "metadata": (file_of({"__metadata__": {"a": 1}}), "__metadata__", "{'a': 1}"),
    "metadata kind": (file_of({"__metadata__": "pt"}), "__metadata__", "'pt'"),
    "line breaks": (file_of({"a\nb": entry("x\ny")}, bytes(4)), r"'a\nb'", r"'x\ny'"),
    "lone surrogate": (file_of('{"\\ud800": 1}'), r"'\ud800'"),
    "lone surrogate in a whole file": (file_of(r'{"\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', bytes(4)), "JSON"),
    "long": (file_of({"a" * 10_000: 1}), "aaa...aaa"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_gives_one_line(name, tmp_path):
    content, *parts = DAMAGE[name]
    path = tmp_path / shards.SINGLE
    path.write_bytes(content)
    line = refused(lambda: shards.Reader(tmp_path), str(path), *parts)
    assert len(line) < 1000
    assert re.search("download it again|git lfs pull|use a version", line)


def test_a_cut_file_names_the_first_tensor_that_is_not_whole(sharded):
    os.truncate(sharded / A, os.path.getsize(sharded / A) - 1)
    refused(lambda: shards.Reader(sharded), str(sharded / A), "'c'", "12 to 20", "only 19", "download")


WRONG_INDEX = {
    "not json": ("{", "not JSON"),
    "no map": ({"metadata": {}}, "no weight_map"),
    "list": ({"weight_map": [1]}, "no weight_map"),
    "empty": ({"weight_map": {}}, "no weight_map"),
    "number": ({"weight_map": {"a": 1}}, "'a' in 1"),
    "twice": ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' is there twice"),
    "parent": ({"weight_map": {"a": "../x.safetensors"}}, "'a' in '../x.safetensors'", "within the folder"),
    "absolute": ({"weight_map": {"a": "/x.safetensors"}}, "'a' in '/x.safetensors'"),
    "backslash": ({"weight_map": {"a": "..\\x.safetensors"}}, "'a'"),
    "zero byte": ({"weight_map": {"a": "\0.safetensors"}}, r"'\x00.safetensors'"),
    "line break": ({"weight_map": {"a": "a\nb.safetensors"}}, r"'a\nb.safetensors'"),
    "pickle": ({"weight_map": {"a": "pytorch_model.bin"}}, "'pytorch_model.bin'", "no other kind is read"),
    "pointer": ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
}


@pytest.mark.parametrize("name", WRONG_INDEX)
def test_a_wrong_index_gives_one_line(name, sharded):
    content, *parts = WRONG_INDEX[name]
    (sharded / shards.INDEX).write_text(json.dumps(content) if isinstance(content, dict) else content)
    for action in (shards.Reader, shards.index_only):
        refused(lambda action=action: action(sharded), str(sharded / shards.INDEX), *parts)


def test_index_and_files_disagree(sharded):
    def index(**weight_map):
        (sharded / shards.INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return lambda: shards.Reader(sharded)

    refused(index(a=A, b=B, c=B), str(sharded / A), "'c'", f"has it in {B}", "download")
    refused(index(a=A, b=B), str(sharded / A), "'c'", "does not know it")
    refused(index(a=A, b=B, c=A, d=A), str(sharded / A), "'d' is not in this file")
    refused(index(a=A, b="long" * 100 + ".safetensors", c=A), "long.safetensors is not there")
    (sharded / B).unlink()
    refused(index(a=A, b=B, c=A), f"{sharded / B} is not there", "of 2 files 1 are missing")
    (sharded / B).symlink_to("nowhere")
    refused(index(a=A, b=B, c=A), f"{sharded / B} is not there")
    (sharded / B).unlink()
    (sharded / shards.INDEX).unlink()
    refused(lambda: shards.Reader(sharded), f"{sharded / B} is not there")  # the first file's name counts two
    (sharded / shards.INDEX).symlink_to("nowhere")
    refused(lambda: shards.Reader(sharded), f"{sharded / shards.INDEX} cannot be read")


def test_two_files_hold_one_name(tmp_path):
    for file in ("x.safetensors", "y.safetensors"):
        library.save_file({"a": np.ones(1)}, tmp_path / file)
    refused(lambda: shards.Reader(tmp_path), str(tmp_path / "y.safetensors"), "'a'", "x.safetensors holds too")


def test_opening_reads_no_weights(tmp_path):
    """25,000 tensors of 4 MB each in files without blocks: reading them would take minutes."""
    program = """
import resource, sys, time
from llada_jax.interop import shards
start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with shards.Reader(sys.argv[1]) as reader:
    print(len(reader.tensors), time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    size = 4 * 2**20
    for i, file in enumerate((A, B)):
        header = file_of({f"model.layers.{i}.mlp.experts.{j}.down_proj.weight": entry("BF16", [2048, 1024], [j * size, (j + 1) * size])
                          for j in range(12_500)})  # fmt: skip
        (tmp_path / file).write_bytes(header)
        os.truncate(tmp_path / file, len(header) + 12_500 * size)
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    count, seconds, kilobytes = map(float, result.stdout.split())
    for file in (A, B):
        (tmp_path / file).unlink()
    assert count == 25_000 and seconds < 5 and kilobytes < 200_000, result.stdout  # about 0.4 s and 30 MB where nothing else runs


def test_nothing_is_left_after_an_exception(tmp_path):
    with pytest.raises(KeyboardInterrupt), shards.Writer(tmp_path / "ours", {"a": (np.float32, (2,))}) as writer:
        assert writer.folder.parent.parent == tmp_path and os.listdir(writer.folder) == [shards.SINGLE]
        writer.array("a")[...] = 1
        raise KeyboardInterrupt
    assert not os.listdir(tmp_path)


def test_a_folder_in_use_is_kept(tmp_path):
    specs = {"a": (np.float32, (2,))}
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("used", "file"):
        refused(lambda name=name: shards.Writer(tmp_path / name, specs), name, "not an empty folder")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", {"a": np.ones(2, np.float32)})
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "used"] and os.listdir(tmp_path / "used") == ["mine"]
    assert (tmp_path / "empty").stat().st_mode == (tmp_path / "used").stat().st_mode

    def race():
        with shards.Writer(tmp_path / "late", specs):
            (tmp_path / "late").mkdir()
            (tmp_path / "late" / "mine").write_text("mine")

    refused(race, str(tmp_path / "late"), "meanwhile")
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "late", "used"] and os.listdir(tmp_path / "late") == ["mine"]


def test_the_disk_is_asked_before(tmp_path):
    refused(lambda: shards.Writer(tmp_path / "ours", {"a": (np.float64, (2**50,))}), f"{tmp_path / 'ours'} needs {2**53 + 128} bytes", "free")
    assert not os.listdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    refused(lambda: shards.Writer(tmp_path / "file" / "ours", {"a": (np.float32, (2,))}), "file/ours cannot be written")


def test_a_disk_that_is_full_after_all(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(lambda: shards.Writer(tmp_path / "ours", {"a": (np.float32, (2,))}), "ours cannot be written (No space left on device)", "bytes")
    assert not os.listdir(tmp_path)


def test_what_the_format_does_not_have(tmp_path):
    for name, dtype in {"a": np.complex128, "b": ">f4", "__metadata__": np.float32}.items():
        refused(lambda name=name, dtype=dtype: shards.Writer(tmp_path / "ours", {name: (dtype, (2,))}), repr(name), "cannot be written")
    specs = {"a": (np.float32, (2,)), "b": (np.float32, (2,))}
    for shard_of, part in [({"a": A}, "'b'"), ({"a": A, "b": B, "c": B}, "'c'"), ({"a": A, "b": "../x.safetensors"}, "../x.safetensors")]:
        refused(lambda shard_of=shard_of: shards.Writer(tmp_path / "ours", specs, shard_of), "shard_of", part)
    assert not os.listdir(tmp_path)


def test_no_tensors_at_all(tmp_path):
    write(tmp_path / "ours", {}, metadata={})
    assert (tmp_path / "ours" / shards.SINGLE).read_bytes() == library.save({})
    assert touch(tmp_path / "ours") == {}


VALID = library.save({"w": np.ones((2, 3), np.float32), "b": np.ones(4, np.int8), "e": np.zeros((0, 2), np.float16)}, {"format": "pt"})
PIECES = [b"", b"\0", b"\xff", b'"', b"{", b"}", b"[", b"]", b",", b":", b"-", b"0", b"9", b"e9", b"null", b"NaN", b"true", b"\\ud800", b"\\u0000",
          b"18446744073709551616", b"9223372036854775807", b"BF16", b"F64", b"BOOL", b"[" * 5000, b"\n"]  # fmt: skip


def mutations(content):
    """One to three (position, bytes replaced, replacement)."""
    change = st.tuples(st.integers(0, len(content)), st.integers(0, 4), st.sampled_from(PIECES) | st.binary(max_size=3))
    return st.lists(change, min_size=1, max_size=3)


def changed(content, changes):
    for at, removed, piece in changes:
        content = content[:at] + piece + content[at + removed:]
    return content


def opens_or_refuses(folder, action):
    try:
        action(folder)
    except ConfigError as error:
        assert str(error).isprintable() and str(folder) in str(error)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzzed")


@FUZZ
@given(data=st.data())
def test_any_header_opens_or_is_refused(fuzzed, data):
    header, weights = header_of(VALID), VALID[8 + len(header_of(VALID)):]
    header = changed(header, data.draw(mutations(header)))
    length = data.draw(st.sampled_from([len(header)] * 8 + [0, 1, len(header) - 1, len(header) + 1, 2**32, 2**64 - 1]) | st.integers(0, 2**64 - 1))
    content = struct.pack("<Q", length) + header + weights
    content = content[:data.draw(st.just(len(content)) | st.integers(0, len(content)))]
    (fuzzed / shards.SINGLE).write_bytes(content)
    opens_or_refuses(fuzzed, touch)


@FUZZ
@given(data=st.data())
def test_any_fields_are_read_as_the_library_does_or_both_refuse(fuzzed, data):
    kinds = {"F32": 4, "BF16": 2, "I64": 8, "U8": 1, "F8_E4M3": 1}
    header, at = {}, 0
    for name, kind in zip("abc", data.draw(st.lists(st.sampled_from(list(kinds)), max_size=3)), strict=False):
        shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
        end = at + math.prod(shape) * kinds[kind]
        header[name], at = entry(kind, shape, [at, end]), end
    wrong = st.none() | st.booleans() | st.integers(-1, 20) | st.sampled_from([4.0, "", "F32", "U8", 2**64])
    if header and data.draw(st.booleans()):
        fields = header[data.draw(st.sampled_from(list(header)))]
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        fields[field] = data.draw(wrong | st.lists(wrong, max_size=3) if field == "dtype" or not fields[field] else
                                  st.permutations(fields[field]) | st.tuples(*[st.just(v) | wrong for v in fields[field]]).map(list))
    header = dict(data.draw(st.permutations(list(header.items()))))
    content = file_of(header, (bytes(range(256)) * 3)[:max(at + data.draw(st.sampled_from([0, 0, 0, -1, 1])), 0)])
    (fuzzed / shards.SINGLE).write_bytes(content)
    try:
        theirs = {name: bytes(view["data"]) for name, view in safetensors.deserialize(content)}
    except safetensors.SafetensorError:
        theirs = None
    try:
        ours = touch(fuzzed)
    except ConfigError:
        ours = None
    assert ours == theirs


INDEX = json.dumps({"metadata": {"total_size": 36}, "weight_map": {"a": A, "b": B, "c": A}}).encode()


@FUZZ
@given(mutations(INDEX))
def test_any_index_opens_or_is_refused(fuzzed, changes):
    folder = fuzzed / "index"
    if not folder.exists():
        folder.mkdir()
        library.save_file({"a": np.ones(3, np.float32), "c": np.ones(2, np.int32)}, folder / A)
        library.save_file({"b": np.ones((2, 2), np.float32)}, folder / B)
    (folder / shards.INDEX).write_bytes(changed(INDEX, changes))
    opens_or_refuses(folder, touch)
    opens_or_refuses(folder, shards.index_only)
