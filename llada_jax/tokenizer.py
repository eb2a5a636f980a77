"""Tokenizers: text to ids and back, exactly.

Three back ends share one protocol: SentencePiece (trained here on the corpus, or any model that holds our two control
pieces), raw bytes, and a fixed alphabet for puzzles. For every one `decode(encode(text)) == text`: newlines, tabs, runs of
blanks and the spelling `<|mask|>` included. The mask and end-of-text ids never come from text.
"""

import functools
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import sentencepiece
from etils import epath

from llada_jax.config import ConfigError

MASK = "<|mask|>"
EOS = "<|endoftext|>"
_BLANK = "\u2581"  # SentencePiece writes a blank as this letter
_INDENTS = [_BLANK * 4 * depth for depth in range(1, 6)]
# Whole tokens for what begins a line of code; without them runs of blanks cost a token in five.
_SYMBOLS = ["\n", "\t", "\r", *("\n" + i for i in _INDENTS), "\n\n", *("\n\n" + i for i in _INDENTS[:3]), *(_BLANK * n for n in (2, 4, 8, 16))]
_CHUNK = 1000  # characters of one training sentence; longer lines are cut, never dropped
# What a model of another origin must survive before it is used.
_PROBE = "\n\tdef f( x ):\r\n    return  '\u2581é<|mask|>'  \n\n"


class Tokenizer(Protocol):
    """Text to ids and back. `pieces[id]` holds the bytes an id stands for: empty for control ids."""

    kind: str  # back end
    pieces: list[bytes]
    vocab_size: int
    mask_id: int
    eos_id: int
    pad_id: int  # equals eos_id, as in LLaDA
    fingerprint: str  # 16 hex digits over everything that changes ids

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def piece_bytes(self, ids: Any) -> np.ndarray: ...
    def save(self, folder: epath.PathLike) -> epath.Path: ...


class _Table:
    """What follows from the table of pieces alone."""

    pieces: list[bytes]
    mask_id: int
    eos_id: int
    kind: str

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @property
    def pad_id(self) -> int:
        return self.eos_id

    @functools.cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._identity()).hexdigest()[:16]

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        return np.array([len(piece) for piece in self.pieces], np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; control ids are empty, bytes that are no UTF-8 (a cut or sampled sequence) become U+FFFD."""
        return b"".join(self.pieces[int(i)] for i in ids).decode("utf-8", errors="replace")

    def piece_bytes(self, ids: Any) -> np.ndarray:
        """int32 array of the shape of `ids`: UTF-8 bytes of the original text that each id stands for, 0 for control ids."""
        return self._lengths[np.asarray(ids, np.int64)]

    def save(self, folder: epath.PathLike) -> epath.Path:
        """Write `tokenizer.*` into a folder; `load(folder)` gives an equal tokenizer."""
        path = epath.Path(folder) / self._file()
        temporary = path.parent / f".{path.name}"
        temporary.write_bytes(self._identity())
        return temporary.replace(path)  # so that a killed run leaves no half of it

    def _file(self) -> str:
        return f"tokenizer.{self.kind}.json"

    def _identity(self) -> bytes:
        return (json.dumps({"kind": self.kind}) + "\n").encode()


class SentencePiece(_Table):
    """A SentencePiece model with identity normalisation, byte fallback and the control pieces `<|mask|>` and `<|endoftext|>`."""

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        """`model`: the bytes of a `.model` file. Raises ConfigError if a control piece is missing or text does not survive."""
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ConfigError(f"not a SentencePiece model ({str(error).splitlines()[0]})") from None
        for name, piece in (("mask_id", MASK), ("eos_id", EOS)):
            if not self._processor.IsControl(index := self._processor.PieceToId(piece)):
                raise ConfigError(f"this SentencePiece model has no control piece {piece}; leave data.tokenizer empty to train one")
            setattr(self, name, index)
        self.pieces = [self._bytes(i) for i in range(self._processor.GetPieceSize())]
        try:
            self._blank_ids = [self.pieces.index(bytes([b]), 0) for b in _BLANK.encode()]
        except ValueError:
            raise ConfigError("this SentencePiece model has no byte fallback; train it with byte_fallback=True") from None
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise ConfigError("this SentencePiece model changes text: train it with identity normalisation and without a dummy prefix")

    def encode(self, text: str) -> list[int]:
        """Ids of a text without end-of-text; raises UnicodeEncodeError for lone surrogates, which are no text."""
        first, *rest = text.split(_BLANK)  # the library would read this letter as a blank: spell it in bytes
        ids = self._processor.EncodeAsIds(first)
        for part in rest:
            ids += self._blank_ids
            ids += self._processor.EncodeAsIds(part)
        return ids

    def _bytes(self, index: int) -> bytes:
        if self._processor.IsControl(index) or self._processor.IsUnknown(index):
            return b""
        piece = self._processor.IdToPiece(index)
        return bytes([int(piece[3:5], 16)]) if self._processor.IsByte(index) else piece.replace(_BLANK, " ").encode()

    def _file(self) -> str:
        return "tokenizer.model"

    def _identity(self) -> bytes:
        return self._model

    def __reduce__(self):
        return SentencePiece, (self._model,)


class Bytes(_Table):
    """One id a byte: 0..255, end-of-text 256, mask 257."""

    kind = "bytes"
    eos_id, mask_id = 256, 257

    def __init__(self):
        self.pieces = [bytes([b]) for b in range(256)] + [b"", b""]

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class Characters(_Table):
    """A fixed alphabet for puzzles: mask 0, then the letters in order, then end-of-text; so a digit is its own id."""

    kind = "characters"
    mask_id = 0

    def __init__(self, alphabet: str):
        self.alphabet = alphabet
        self.eos_id = len(alphabet) + 1
        self.pieces = [b"", *(letter.encode() for letter in alphabet), b""]
        self._ids = {letter: i for i, letter in enumerate(alphabet, 1)}

    def encode(self, text: str) -> list[int]:
        """Ids of a text; raises ConfigError for a letter outside the alphabet."""
        outside = sorted(set(text) - set(self._ids))
        if outside:
            raise ConfigError(f"text holds {outside[0]!r}, this tokenizer knows only the letters {self.alphabet!r}")
        return [self._ids[letter] for letter in text]

    def _identity(self) -> bytes:
        return (json.dumps({"kind": self.kind, "alphabet": self.alphabet}) + "\n").encode()


def load(path: epath.PathLike) -> Tokenizer:
    """The tokenizer named `bytes`, of a file (`*.model`, `tokenizer.*.json`), or of a folder that holds one `tokenizer.*`.

    Raises ConfigError for a missing, unknown or unusable file.
    """
    if str(path) == "bytes":
        return Bytes()
    path = epath.Path(path)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.name.startswith("tokenizer."))
        if len(found) != 1:
            raise ConfigError(f"{path} holds {len(found)} files tokenizer.*, expected one")
        path = found[0]
    if not path.exists():
        raise ConfigError(f"no tokenizer at {path}: give a .model file, a folder with tokenizer.*, or bytes")
    try:
        if path.name.endswith(".model"):
            return SentencePiece(path.read_bytes())
        settings = json.loads(path.read_text()) if path.name.endswith(".json") else {}
        if settings.get("kind") == "bytes":
            return Bytes()
        if settings.get("kind") == "characters":
            return Characters(settings["alphabet"])
    except (ConfigError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    raise ConfigError(f"{path} is no tokenizer known here: give a .model file, a folder with tokenizer.*, or bytes")


def train(texts: Iterable[str], vocab_size: int, max_bytes: int = 64_000_000) -> SentencePiece:
    """Train byte-pair pieces on texts, the same model bytes for the same texts in the same order.

    Above `max_bytes` of text (sizes of the texts in characters) evenly spaced pieces of it are used. Raises ConfigError
    for an empty corpus and for a vocabulary that the corpus cannot fill or that the fixed pieces do not fit in.
    """
    texts = list(texts)
    stride = max(1, -(-sum(map(len, texts)) // max_bytes))
    fixed = 3 + 256 + len(_SYMBOLS)
    if vocab_size <= fixed:
        raise ConfigError(f"data.vocab_size={vocab_size} leaves no room beside {fixed} control, byte and indentation tokens; use 512 or more")
    if not any(texts):
        raise ConfigError("the corpus is empty: there is nothing to train a tokenizer on")
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=(chunk for i, chunk in enumerate(_chunks(texts)) if i % stride == 0), model_writer=out,
            model_type="bpe", vocab_size=vocab_size, byte_fallback=True, character_coverage=0.9999, max_sentence_length=8 * _CHUNK,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            user_defined_symbols=_SYMBOLS, control_symbols=[MASK], eos_piece=EOS, unk_id=0, eos_id=1, bos_id=-1, pad_id=-1,
            required_chars=_BLANK,  # also where the corpus has no blank: byte fallback would spell the letter, not the blank
            hard_vocab_limit=True, num_threads=2, minloglevel=2)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rsplit("] ", 1)[-1]
        raise ConfigError(f"data.vocab_size={vocab_size} does not fit this corpus ({reason}); "
                          "change it or set data.tokenizer=bytes (in prepare: --tokenizer=bytes)") from None
    return SentencePiece(out.getvalue())


def _chunks(texts: Sequence[str]) -> Iterator[str]:
    """Lines without their ends, cut to `_CHUNK` characters; NUL, which the trainer refuses, separates too."""
    for text in texts:
        for line in text.replace("\0", "\n").split("\n"):
            for start in range(0, len(line), _CHUNK):
                yield line[start:start + _CHUNK]
