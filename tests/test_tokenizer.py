"""Tokenizers: exact round trips, control ids apart from text, the same model for the same text."""

import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llada_jax import tokenizer as tokenizer_lib
from llada_jax.config import ConfigError, Data
from llada_jax.data import sources

CORPUS = [
    "def f(x):\n    if x:\n\treturn  x + 1\n\n\nclass A:\n    '''A text of some words, in a few lines.'''\n" * 3,
    "The quick brown fox jumps over the lazy dog; été, naïve, 日本語.\r\n" * 5,
]


@pytest.fixture(scope="module")
def standard_library():
    return sources.load(Data(limit=120))[0]


@pytest.fixture(scope="module")
def trained(standard_library):
    return tokenizer_lib.train((document.text for document in standard_library.train), 512)


def back_ends(trained):
    return [trained, tokenizer_lib.Bytes()]


# Letters that are likely to be lost: blanks of all kinds, SentencePiece's own letters, controls, combining marks.
AWKWARD = st.text(alphabet="ab \n\t\r\0\x01\x7f\x85\u2581\u2585\u2028\ufeff\u200b\u3000\u0301\ue000\uffff\U0010ffff<|mask>é😀0x", max_size=40)
ANY = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=400, deadline=None)
@given(st.one_of(AWKWARD, ANY))
@example("<|mask|><|endoftext|><unk><0x41>\n    \n\n\n  \u2581 \u2581x")
@example("   leading and trailing   ")
def test_round_trip(trained, text):
    for tokenizer in back_ends(trained):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.mask_id, tokenizer.eos_id} & set(ids)
        assert tokenizer.piece_bytes(ids).sum() == len(text.encode())


def test_every_file_survives(trained):
    [library] = sources.load(Data())
    for document in library.train + library.heldout:
        assert trained.decode(trained.encode(document.text)) == document.text, document.name


def test_ids(trained):
    for tokenizer in [*back_ends(trained), tokenizer_lib.Characters("1234")]:
        assert tokenizer.mask_id != tokenizer.eos_id == tokenizer.pad_id < tokenizer.vocab_size
        assert tokenizer.mask_id < tokenizer.vocab_size == len(tokenizer.pieces)
        controls = np.array([[tokenizer.mask_id, tokenizer.eos_id]])
        assert tokenizer.piece_bytes(controls).tolist() == [[0, 0]] and tokenizer.piece_bytes(controls).dtype == np.int32
        assert tokenizer.decode(controls[0]) == ""
    assert trained.vocab_size == 512


def test_characters_are_their_own_digits():
    tokenizer = tokenizer_lib.Characters("1234")
    assert tokenizer.encode("1423") == [1, 4, 2, 3] and tokenizer.decode([1, 4, 0, 3, 5]) == "143"
    with pytest.raises(ConfigError, match="'5'"):
        tokenizer.encode("125")


def test_a_corpus_without_blanks():
    tokenizer = tokenizer_lib.train(["wombat" * 50], 290)
    assert tokenizer.decode(tokenizer.encode(" a ▁ b")) == " a ▁ b"


def test_code_takes_whole_indentations(trained):
    assert len(trained.encode("\n        ")) == len(trained.encode("\n\n    ")) == 1


def test_training_is_deterministic(tmp_path):
    program = ("import sys; from llada_jax import tokenizer; from tests.test_tokenizer import CORPUS; "
               "print(tokenizer.train(CORPUS, 330).save(sys.argv[1]))")
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    here = tokenizer_lib.train(CORPUS, 330)
    assert (tmp_path / "tokenizer.model").read_bytes() == here._identity()
    assert tokenizer_lib.train(CORPUS[::-1] + ["zebra " * 30], 330).fingerprint != here.fingerprint


def test_long_lines_and_nul_are_trained_on():
    # one line, far longer than SentencePiece's default limit of 4,192 bytes, behind a NUL, which its trainer refuses
    tokenizer = tokenizer_lib.train(["\0" + "wombat quokka " * 2000], 300)
    assert len(tokenizer.encode("wombat")) < 6


@pytest.mark.parametrize("make", [tokenizer_lib.Bytes, lambda: tokenizer_lib.Characters("abc"), lambda: tokenizer_lib.train(CORPUS, 330)])
def test_save_and_load(tmp_path, make):
    tokenizer = make()
    path = tokenizer.save(tmp_path)
    assert path.name.startswith("tokenizer.") and len(list(tmp_path.iterdir())) == 1
    for loaded in (tokenizer_lib.load(tmp_path), tokenizer_lib.load(path)):
        assert loaded.fingerprint == tokenizer.fingerprint and loaded.pieces == tokenizer.pieces
        assert (loaded.mask_id, loaded.eos_id) == (tokenizer.mask_id, tokenizer.eos_id)


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="empty"):
        tokenizer_lib.train([], 512)
    with pytest.raises(ConfigError, match="vocab_size=100 "):
        tokenizer_lib.train(CORPUS, 100)
    with pytest.raises(ConfigError, match="vocab_size=5000 does not fit"):
        tokenizer_lib.train(["hello"], 5000)
    with pytest.raises(ConfigError, match="no tokenizer at"):
        tokenizer_lib.load(tmp_path / "none.model")
    with pytest.raises(ConfigError, match="holds 0 files"):
        tokenizer_lib.load(tmp_path)
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(ConfigError, match=r"bad\.model"):
        tokenizer_lib.load(tmp_path / "bad.model")
    (tmp_path / "tokenizer.other.json").write_text('{"kind": "other"}')
    with pytest.raises(ConfigError, match="no tokenizer known"):
        tokenizer_lib.load(tmp_path)


def test_models_that_lose_text_are_refused(tmp_path):
    lossy = {"control_symbols": ["<|mask|>"], "eos_piece": "<|endoftext|>"}
    for options, reason in (({}, "no control piece"), (lossy | {"byte_fallback": True}, "changes text"),
                            (lossy | {"normalization_rule_name": "identity"}, "byte fallback")):
        sentencepiece.SentencePieceTrainer.Train(sentence_iterator=iter(CORPUS), model_prefix=str(tmp_path / "m"), vocab_size=400,
                                                 model_type="bpe", minloglevel=2, hard_vocab_limit=False, **options)
        with pytest.raises(ConfigError, match=reason):
            tokenizer_lib.load(tmp_path / "m.model")
