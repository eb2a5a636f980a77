"""tokenizer.json files of published checkpoints: exact bytes, control ids apart from text, ids that fit the config."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from llada_jax import tokenizer as tokenizer_lib
from llada_jax.config import ConfigError

TEXTS = ["def f(x):\n    return  x + 1\n", "The quick brown fox jumps over the lazy dog; été, naïve, 日本語."] * 5
SPECIAL = ["<|startoftext|>", "<|endoftext|>", "<|mask|>", "<|role_end|>"]


def byte_level(special=SPECIAL, added=("<tool_call>", "été"), **trainer):
    """A trained byte-level BPE with special tokens first and added ones last, as the library's own object."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.train_from_iterator(TEXTS, trainers.BpeTrainer(**{
        "vocab_size": 400, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": list(special), "show_progress": False,
    } | trainer))
    library.add_tokens(list(added))
    return library


def metaspace():
    """Llama 2's kind: blanks are U+2581, a dummy prefix, letters outside the vocabulary are spelled in bytes."""
    pieces = ["<unk>", "<|endoftext|>", "<|mask|>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", *"abcdefgh", "ab", "\u2581ab"]
    library = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("a", "b"), ("\u2581", "ab")],
                                              unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    library.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    library.add_special_tokens(pieces[:3])
    return library


def make(library, mask="<|mask|>", eos="<|endoftext|>"):
    return tokenizer_lib.HuggingFace(library.to_str(), library.token_to_id(mask), library.token_to_id(eos))


@pytest.fixture(scope="module")
def published():
    return make(byte_level())


def changed(library, change):
    """The text of its tokenizer.json after `change` of the parsed file."""
    parsed = json.loads(library.to_str())
    change(parsed)
    return json.dumps(parsed)


AWKWARD = st.lists(st.sampled_from([*SPECIAL, "<tool_call>", "été", "<|", "|>", " ", "\n", "\0", "Ġ", "\u2581", "\u0301", "é", "x"])).map("".join)
ANY = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=300, deadline=None)
@given(st.one_of(AWKWARD, ANY))
@example("<|mask|><|endoftext|><tool_call>\n    \n\n \u2581 \u0120x")
def test_byte_level_is_exact(published, text):
    ids = published.encode(text)
    assert published.decode(ids) == text
    assert published.piece_bytes(ids).sum() == len(text.encode())
    assert not {published.special_id(piece) for piece in SPECIAL} & set(ids)


@settings(max_examples=200, deadline=None)
@given(st.one_of(AWKWARD, ANY).filter(lambda text: text and "\u2581" not in text))
def test_byte_fallback_is_exact_but_for_its_dummy_prefix(text):
    tokenizer = make(metaspace())
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == " " + text
    assert tokenizer.piece_bytes(ids).sum() == 1 + len(text.encode())
    assert not {tokenizer.special_id(piece) for piece in ("<unk>", "<|mask|>", "<|endoftext|>")} & set(ids)


def test_ids_are_those_of_the_library(published):
    library = byte_level()
    for text in TEXTS:
        assert published.encode(text) == library.encode(text).ids
    assert published.vocab_size == len(published.pieces) == library.get_vocab_size()
    assert (published.mask_id, published.eos_id, published.pad_id) == (2, 1, 1)
    assert [published.pieces[published.special_id(piece)] for piece in (*SPECIAL, "<tool_call>", "été")] == [
        b"", b"", b"", b"", b"<tool_call>", "été".encode()]
    assert published.special_id("été") == library.get_vocab_size() - 1 and published.special_id("the") is None
    assert published.encode("<tool_call>") == [published.special_id("<tool_call>")]
    assert published.decode([2, 1, 3]) == "" and published.piece_bytes(np.array([[2, 1]])).tolist() == [[0, 0]]


def test_nothing_but_text_decides_ids():
    """A file may ask for truncation, padding, dropout and begin-of-text tokens."""
    plain = byte_level()
    noisy = byte_level()
    noisy.enable_truncation(3)
    noisy.enable_padding(length=50)
    noisy.post_processor = processors.TemplateProcessing(single="<|startoftext|> $A", special_tokens=[("<|startoftext|>", 0)])
    text = changed(noisy, lambda parsed: parsed["model"].update(dropout=0.5))
    tokenizer = tokenizer_lib.HuggingFace(text, 2, 1)
    assert all(tokenizer.encode(TEXTS[1]) == plain.encode(TEXTS[1]).ids for _ in range(5))


def test_a_mask_that_is_not_marked_special_still_never_comes_from_text():
    library = byte_level(SPECIAL[:2], added=["<|mask|>"])
    assert library.token_to_id("<|mask|>") in library.encode("a<|mask|>").ids
    tokenizer = make(library)
    assert tokenizer.mask_id not in tokenizer.encode("a<|mask|>") and tokenizer.decode(tokenizer.encode("a<|mask|>")) == "a<|mask|>"
    assert tokenizer.pieces[tokenizer.mask_id] == b""


def test_a_mask_beyond_the_table():
    """Dream has Qwen2.5's tokenizer, which ends below Dream's mask id."""
    library = byte_level(["<|endoftext|>"])
    size = library.get_vocab_size()
    tokenizer = tokenizer_lib.HuggingFace(library.to_str(), size + 1, 0)
    assert tokenizer.vocab_size == size + 2 and tokenizer.pieces[size:] == [b"", b""]


def test_a_normaliser_is_not_undone():
    library = byte_level()
    library.normalizer = normalizers.NFC()
    tokenizer = make(library)
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"


def test_save_and_load(tmp_path, published):
    text = byte_level().to_str(pretty=True).replace("\n", "\r\n") + " \n"  # kept to the byte
    tokenizer = tokenizer_lib.HuggingFace(text, 2, 1)
    path = tokenizer.save(tmp_path)
    assert path.name == "tokenizer.huggingface.json" and [p.name for p in tmp_path.iterdir()] == [path.name]
    assert json.loads(path.read_bytes()) == {"kind": "huggingface", "mask_id": 2, "eos_id": 1, "tokenizer": text}
    for loaded in (tokenizer_lib.load(tmp_path), tokenizer_lib.load(path), pickle.loads(pickle.dumps(tokenizer))):
        assert loaded.fingerprint == tokenizer.fingerprint and loaded.pieces == tokenizer.pieces
        assert (loaded.mask_id, loaded.eos_id, loaded.encode(TEXTS[0])) == (2, 1, tokenizer.encode(TEXTS[0]))
    assert tokenizer.fingerprint != published.fingerprint != tokenizer_lib.HuggingFace(byte_level(added=[]).to_str(), 2, 1).fingerprint
    path.write_text('{"kind": "huggingface", "mask_id": 2, "eos_id": 1}')
    with pytest.raises(ConfigError, match=r"tokenizer\.huggingface\.json: 'tokenizer'"):
        tokenizer_lib.load(tmp_path)


def test_from_published(tmp_path, published):
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.json"):
        tokenizer_lib.from_published(tmp_path, 2, 1, 1000)
    (tmp_path / "tokenizer.json").write_text(published.text)
    size = published.vocab_size
    tokenizer = tokenizer_lib.from_published(tmp_path, 2, 1, size)  # a model may have more rows than there are tokens, not fewer
    assert tokenizer.fingerprint == published.fingerprint
    with pytest.raises(ConfigError, match=rf"ids up to {size - 1}, but .*config\.json has vocab_size={size - 1}"):
        tokenizer_lib.from_published(tmp_path, 2, 1, size - 1)
    with pytest.raises(ConfigError, match=r"mask_id=156895 and eos_id=1, beyond its vocab_size=1000"):
        tokenizer_lib.from_published(tmp_path, 156895, 1, 1000)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(ConfigError, match=r"tokenizer\.json: .* does not say which ids are mask .*config\.json"):
            tokenizer_lib.load(path)
    (tmp_path / "tokenizer.json").write_bytes(b'{"\xff')
    with pytest.raises(ConfigError, match=r"tokenizer\.json: .*utf-8"):
        tokenizer_lib.from_published(tmp_path, 2, 1, size)


@pytest.mark.parametrize(("mask_id", "eos_id", "message"), [
    (3, 1, r"mask_id=3, but tokenizer.json has '<\|role_end\|>' there and <\|mask\|> at 2: they are of different checkpoints"),
    (9999, 1, r"mask_id=9999, but tokenizer.json has no token there and <\|mask\|> at 2"),
    (2, 3, r"eos_id=3, but tokenizer.json has '<\|role_end\|>' there and <\|endoftext\|> at 1"),
    (2, 50, r"eos_id=50, but .* and <\|endoftext\|> at 1"),
    (-1, 1, r"mask_id=-1"),
])
def test_ids_of_another_checkpoint(published, mask_id, eos_id, message):
    with pytest.raises(ConfigError, match=message):
        tokenizer_lib.HuggingFace(published.text, mask_id, eos_id)


def test_ids_that_name_no_control_token():
    library = byte_level(["<|role_end|>"])
    for mask_id, eos_id, message in [
        (50, 0, "mask_id=50, .* no control token"),  # an ordinary piece
        (0, 0, r"mask_id=0, .*'<\|role_end\|>' there, which is no control token for it"),
        (-1, 0, "mask_id=-1, but .* no token there"),
        (9999, 50, "eos_id=50, .* no control token"),
        (9999, 9998, rf"eos_id=9998, .* its ids end at {library.get_vocab_size() - 1}"),
    ]:
        with pytest.raises(ConfigError, match=message):
            tokenizer_lib.HuggingFace(library.to_str(), mask_id, eos_id)
    assert tokenizer_lib.HuggingFace(library.to_str(), 9999, 0).eos_id == 0  # any control token may end a text


def test_files_that_cannot_be_used():
    good = byte_level()
    word_level = tokenizers.Tokenizer(models.WordLevel({"<|mask|>": 0, "<|endoftext|>": 1, "[UNK]": 2}, unk_token="[UNK]"))
    unigram = tokenizers.Tokenizer(models.Unigram(
        [("<|mask|>", 0.0), ("<|endoftext|>", 0.0), *((f"<0x{b:02X}>", -9.0) for b in range(256))], unk_id=2, byte_fallback=True))
    for library in (word_level, unigram):
        library.add_special_tokens(["<|mask|>", "<|endoftext|>"])
    for text, mask_id, message in [
        ("{", 2, "not a tokenizer.json"),
        ("[]", 2, "not a tokenizer.json"),
        ("{}", 2, "not a tokenizer.json .*Model missing"),
        (changed(good, lambda parsed: parsed["model"].update(type="Other")), 2, "not a tokenizer.json"),
        (changed(good, lambda parsed: parsed["added_tokens"][-1].update(id=999)), 2, "été the id 999, the tokenizers library reads"),
        (changed(good, lambda parsed: parsed["model"].update(end_of_word_suffix="</w>")), 2, "a BPE .* is not supported"),
        (byte_level(initial_alphabet=[]).to_str(), 2, "do not cover all 256 bytes"),
        (word_level.to_str(), 0, "a WordLevel .* is not supported"),
        (unigram.to_str(), 0, r"reads the text '<\|mask\|>' as the control id 0"),
    ]:
        with pytest.raises(ConfigError, match=message) as error:
            tokenizer_lib.HuggingFace(text, mask_id, 1)
        assert "\n" not in str(error.value)


def test_lone_surrogates_are_no_text(published):
    with pytest.raises(UnicodeEncodeError):
        published.encode("a\ud800")


def test_without_the_library(tmp_path, published):
    published.save(tmp_path)
    program = ("import sys; sys.modules['tokenizers'] = None\n"
               "from llada_jax import tokenizer, config\n"
               "try: tokenizer.load(sys.argv[1])\n"
               "except config.ConfigError as error: print(error)")
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "pip install -c requirements.txt -e '.[hub]'" in result.stdout
