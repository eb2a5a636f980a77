"""Tokenizers: text to ids and back, exactly.

Four back ends share one protocol: SentencePiece (trained here on the corpus, or any model that holds our two control
pieces), raw bytes, a fixed alphabet for puzzles, and the `tokenizer.json` of a published checkpoint. For the first three
`decode(encode(text)) == text`: newlines, tabs, runs of blanks and the spelling `<|mask|>` included; a published one may
normalise. The mask and end-of-text ids never come from text.
"""

import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import sentencepiece
from etils import epath

from llada_jax.config import ConfigError

MASK = "<|mask|>"
EOS = "<|endoftext|>"
ENDS = (EOS, "<|im_end|>", "<|eot_id|>")  # what ends a text in published checkpoints
MASKS = (MASK, "<|mdm_mask|>", "[MASK]")  # spellings in published tokenizers; the second is LLaDA's
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
        known = range(len(self.pieces))  # a model may have more rows than its tokenizer has ids
        return b"".join(self.pieces[i] for i in map(int, ids) if i in known).decode("utf-8", errors="replace")

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


class HuggingFace(_Table):
    """The `tokenizer.json` of a published checkpoint, read by the `tokenizers` library: byte-level, or with byte fallback.

    `decode(encode(text)) == text` holds if it has neither a normaliser (Qwen2.5: NFC) nor a dummy prefix (Llama 2). Special
    tokens never come from text; added tokens that are not special (`<tool_call>`) may, and stand for their own spelling.
    """

    kind = "huggingface"

    def __init__(self, text: str, mask_id: int, eos_id: int):
        """`text`: the file; the ids are those of the checkpoint's config.json. Raises ConfigError where the two do not fit."""
        self.text, self.mask_id, self.eos_id = text, mask_id, eos_id
        try:
            import tokenizers
        except ImportError:
            raise ConfigError("a tokenizer.json needs the tokenizers library: pip install -c requirements.txt -e '.[hub]'") from None
        try:
            settings = json.loads(text)
            self._library = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(f"not a tokenizer.json that the tokenizers library reads ({str(error).partition(chr(10))[0]})") from None
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        for token in settings.get("added_tokens") or ():
            if vocabulary.get(token["content"]) != token["id"]:  # the library numbers tokens anew that leave a gap
                raise ConfigError(f"tokenizer.json gives {token['content']} the id {token['id']}, the tokenizers library reads "
                                  f"{vocabulary.get(token['content'])}; its added tokens must follow the vocabulary without gaps")
        self._check_id("mask_id", mask_id, MASKS, vocabulary)
        self._check_id("eos_id", eos_id, ENDS, vocabulary)
        # Text decides ids alone: nothing is cut, filled or drawn, and special spellings are text like any other.
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True
        if settings["model"].get("dropout"):
            self._library.model.dropout = None
        self._added = {token.content: index for index, token in self._library.get_added_tokens_decoder().items()}
        self._special = {index for index, token in self._library.get_added_tokens_decoder().items() if token.special}
        to_bytes = _piece_reader(settings, vocabulary)
        self.pieces = [b""] * (1 + max(mask_id, eos_id, *vocabulary.values()))
        for piece, index in vocabulary.items():
            if index not in self._special:
                self.pieces[index] = piece.encode() if piece in self._added else to_bytes(piece)
        for piece in self._added:  # what encode would refuse is refused here
            self.encode(piece)

    def encode(self, text: str) -> list[int]:
        """Ids of a text without control ids; raises UnicodeEncodeError for lone surrogates, which are no text."""
        text.encode()
        ids = self._library.encode(text, add_special_tokens=False).ids
        if not self._special.isdisjoint(ids):  # a Unigram model may hold the spelling as an ordinary piece too
            raise ConfigError(f"tokenizer.json reads the text {text[:40]!r} as the control id {min(self._special.intersection(ids))}")
        return ids

    def special_id(self, piece: str) -> int | None:
        """Id of an added token, special or not, by its spelling; None if there is none."""
        return self._added.get(piece)

    def _check_id(self, name: str, index: int, spellings: tuple[str, ...], vocabulary: dict[str, int]) -> None:
        """Is `index` the token that it should be? If so the library knows it as special from here on."""
        piece = next((piece for piece, i in vocabulary.items() if i == index), None)
        there = f"tokenizer.json has {piece!r} there" if piece is not None else "tokenizer.json has no token there"
        known = [f"{spelling} at {vocabulary[spelling]}" for spelling in spellings if spelling in vocabulary]
        added = {token.content for token in self._library.get_added_tokens_decoder().values()}
        if known and piece not in spellings:
            raise ConfigError(f"config.json gives {name}={index}, but {there} and {', '.join(known)}: they are of different checkpoints")
        # Without any mask token the id lies beyond the table (Dream with the tokenizer of Qwen2.5) or in a hole of it.
        if index < 0 or (piece is None and name != "mask_id"):
            raise ConfigError(f"config.json gives {name}={index}, but {there}; its ids end at {max(vocabulary.values())}")
        if piece is not None and (piece not in added or (name == "mask_id" and piece not in spellings)):
            raise ConfigError(f"config.json gives {name}={index}, but {there}, which is no control token for it (known: {', '.join(spellings)})")
        if piece is not None:
            self._library.add_special_tokens([piece])

    def _identity(self) -> bytes:
        settings = {"kind": self.kind, "mask_id": self.mask_id, "eos_id": self.eos_id, "tokenizer": self.text}
        return (json.dumps(settings, ensure_ascii=False) + "\n").encode()

    def __reduce__(self):
        return HuggingFace, (self.text, self.mask_id, self.eos_id)


def _piece_reader(settings: dict[str, Any], vocabulary: dict[str, int]) -> Callable[[str], bytes]:
    """The function from a piece of this tokenizer.json to the bytes it stands for; raises ConfigError if some byte has no piece."""
    model = settings["model"]
    if "ByteLevel" in {*_steps(settings.get("pre_tokenizer")), *_steps(settings.get("decoder"))}:
        letters = _byte_letters()
        to_bytes = lambda piece: bytes(map(letters.__getitem__, piece)) if set(piece) <= letters.keys() else piece.encode()
    else:
        letters = {f"<0x{b:02X}>": b for b in range(256)} if model.get("byte_fallback") else {}
        to_bytes = lambda piece: bytes([letters[piece]]) if piece in letters else piece.replace(_BLANK, " ").encode()
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model.get("type", "BPE") not in ("BPE", "Unigram") or affixes or not letters or letters.keys() - vocabulary.keys():
        raise ConfigError(f"a {model.get('type')} tokenizer.json whose pieces do not cover all 256 bytes is not supported: "
                          "it must be BPE or Unigram, byte-level or with byte_fallback, without affixes")
    return to_bytes


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters of bytes: printable ones of Latin-1 as themselves, the others in order from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(sorted(set(range(256)) - set(plain)))}


def bytes_json(vocab_size: int, special: dict[str, int]) -> str:
    """A tokenizer.json of `vocab_size` > 256 ids that spells text in bytes: id = byte, then special tokens where `special` wants them."""
    vocabulary = _byte_letters() | {f"unused{i}": i for i in range(256, vocab_size)}
    for token, i in special.items():
        del vocabulary[f"unused{i}"]
        vocabulary[token] = i
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None,
        "added_tokens": [{"id": i, "content": token, **flags} for token, i in sorted(special.items(), key=lambda item: item[1])],
        "decoder": byte_level, "model": {"type": "BPE", "vocab": vocabulary, "merges": []}}, ensure_ascii=False) + "\n"


def _steps(part: Any) -> Iterator[str]:
    """Names of the steps, nested or not, in a part of a tokenizer.json."""
    if isinstance(part, dict):
        yield part.get("type", "")
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from _steps(inner)


def from_published(folder: epath.PathLike, mask_id: int, eos_id: int, vocab_size: int) -> HuggingFace:
    """The tokenizer of a published checkpoint; ids and `vocab_size` are those of its config.json.

    Raises ConfigError if there is no tokenizer.json, if it does not fit these ids, or holds ids that the model does not.
    """
    path = epath.Path(folder) / "tokenizer.json"
    if not path.exists():
        raise ConfigError(f"{folder} holds no tokenizer.json; put that of the checkpoint there")
    if max(mask_id, eos_id) >= vocab_size:
        raise ConfigError(f"{folder}/config.json gives mask_id={mask_id} and eos_id={eos_id}, beyond its vocab_size={vocab_size}")
    try:
        result = HuggingFace(path.read_bytes().decode(), mask_id, eos_id)
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if result.vocab_size > vocab_size:
        raise ConfigError(f"{path} holds ids up to {result.vocab_size - 1}, but {folder}/config.json has vocab_size={vocab_size}")
    return result


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
        settings = json.loads(path.read_bytes()) if path.name.endswith(".json") else {}
        if settings.get("kind") == "bytes":
            return Bytes()
        if settings.get("kind") == "characters":
            return Characters(settings["alphabet"])
        if settings.get("kind") == "huggingface":
            return HuggingFace(settings["tokenizer"], settings["mask_id"], settings["eos_id"])
        if "model" in settings:
            raise ConfigError("a published tokenizer.json does not say which ids are mask and end of text; convert import makes a folder "
                              "that does, from it and the config.json of its checkpoint")
    except (ConfigError, ValueError, KeyError, AttributeError, TypeError) as error:
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
