"""Decoders side by side on tasks with exact answers: a line of json an item, and the table of what they say together."""

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from llada_jax.config import ConfigError, nearest
from llada_jax.evaluation import decode, tasks
from llada_jax.sampling import presets
from llada_jax.sampling.cache import Cache
from llada_jax.sampling.canvas import Piece
from llada_jax.sampling.decoder import Decoder
from llada_jax.tokenizer import Tokenizer

FIELDS = {  # of a line: `forwards` by kind, `tokens` that were written, `seconds` its share of the batch's
    "task": str, "id": int, "decoder": str, "exact": bool, "text": str, "forwards": dict, "tokens": int, "seconds": float, "settings": dict}

Line = dict[str, Any]


class Lines:
    """Results so far, each once, by (task, decoder, id); those of a file, to which new ones are appended as they come."""

    def __init__(self, path: str | None, resume: bool):
        """Raises ConfigError for a file that is there without `resume`, or is none of ours; a half line at its end is cut off."""
        self.found: dict[tuple[str, str, int], Line] = {}
        self.path = path
        if not path:
            if resume:
                raise ConfigError("--resume needs --out, the file to go on with")
            return
        if "://" in path or os.path.isdir(path):
            raise ConfigError(f"--out={path}: name a file of this machine, to which lines can be appended")
        if os.path.exists(path):
            if not resume:
                raise ConfigError(f"--out={path} exists; --resume goes on with it, or name another file")
            self._read(path)
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)

    def _read(self, path: str) -> None:
        with open(path, "rb") as file:
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        half = data[len(whole) :]
        for number, text in enumerate(whole.split(b"\n")[:-1] + [half] * (half[:8] != b'{"task": '[: len(half[:8])]), 1):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                line = None
            if not isinstance(line, dict) or not all(isinstance(line.get(name), kind) for name, kind in FIELDS.items()) \
                    or not isinstance(line["settings"].get("decoder"), dict):
                raise ConfigError(f"{path}, line {number} is no result of evaluate; name another --out")
            self.found[line["task"], line["decoder"], line["id"]] = line
        if half:
            os.truncate(path, len(whole))

    def check(self, task: str, decoder: str, settings: dict[str, Any]) -> None:
        """Raise ConfigError where lines came about with other settings; those of `decoder` and `cache` may differ between decoders and tasks."""
        for line in self.found.values():
            old, new = ({**given, **given["decoder"]} for given in (line["settings"], settings))
            keys = new if (line["task"], line["decoder"]) == (task, decoder) else settings.keys() - {"cache"}
            differ = [f"{key}={old.get(key)!r}, now {new[key]!r}" for key in sorted(keys) if key != "decoder" and old.get(key) != new[key]]
            if differ:
                raise ConfigError(f"{self.path} holds results of {line['task']} by {line['decoder']} with other settings: {'; '.join(differ)}; "
                                  "name another --out")

    def add(self, lines: Sequence[Line]) -> None:
        for line in lines:
            self.found[line["task"], line["decoder"], line["id"]] = line
        if self.path:
            with open(self.path, "a") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def decoders(flags: presets.Flags, default: str, answer: int, block_length: int = 0) -> dict[str, tuple[Decoder, Cache]]:
    """{label: (decoder, cache)} of `--decoder=a,b:field=value:cache=dual:cache.warmup=2`, for answers of so many tokens.

    What the command line says besides goes to each decoder and cache that has such a field; own settings win. A block has `block_length`
    tokens, or the whole answer, unless told otherwise. Raises ConfigError for a setting that none of them has, and for what `presets.build` refuses.
    """
    made: dict[str, tuple[Decoder, Cache]] = {}
    asked = [("decoder", key) for key in flags.decoder_settings] + [("cache", key) for key in flags.cache_settings]
    used = set()
    for label in filter(None, (part.strip() for part in (flags.decoder or default).split(","))):
        name, *own = label.split(":")
        if any("=" not in part for part in own):
            raise ConfigError(f"--decoder={label}: settings of one decoder are written {name}:field=value")
        given = dict(part.split("=", 1) for part in own)
        cache = given.pop("cache", flags.cache)
        of_cache = {key.removeprefix("cache."): given.pop(key) for key in list(given) if key.startswith("cache.")}
        fields = presets.fields_of(name, cache)
        settings = {key: value for key, value in flags.decoder_settings.items() if ("decoder", key) in fields} | given
        of_cache = {key: value for key, value in flags.cache_settings.items() if ("cache", key) in fields} | of_cache
        used |= fields
        block = int(settings["block_length"]) if settings.get("block_length", "").isdecimal() else block_length or answer
        default_lengths = {"block_length": block, "gen_length": -(-answer // max(block, 1)) * max(block, 1)}
        made[label] = presets.build(name, {**settings}, default_lengths), presets.build_cache(cache, of_cache, name)
    if not made:
        raise ConfigError("--decoder is empty; name one or several, for example --decoder=low_confidence,random")
    for prefix, key in asked:
        if (prefix, key) not in used:
            raise ConfigError(f"none of {', '.join(made)} has a setting '{key}'{nearest(key, [k for p, k in used if p == prefix], f'--{prefix}.')}")
    return made


class Asked(NamedTuple):
    """Instances of a task, as requests for one tokenizer."""

    name: str
    items: list[tasks.Item]
    requests: list[list[Piece]]

    @classmethod
    def of(cls, name: str, count: int, seed: int, tokenizer: Tokenizer) -> "Asked":
        """Raises ConfigError for an unknown task, and for a tokenizer without its letters."""
        if name not in tasks.TASKS:
            raise ConfigError(f"unknown task '{name}'{nearest(name, tasks.TASKS)}")
        items = tasks.TASKS[name].instances(count, seed)
        try:
            return cls(name, items, tasks.TASKS[name].requests(items, tokenizer))
        except ConfigError as error:
            raise ConfigError(f"the task {name}: {error}") from None

    def lines(self, batch: decode.Batch, decoder: str, tokenizer: Tokenizer, settings: dict[str, Any]) -> list[Line]:
        """A line for each item of a batch."""
        made = []
        for b, i in enumerate(batch.rows):
            text = tasks.text_of(batch, b, tokenizer)
            made.append({"task": self.name, "id": i, "decoder": decoder, "exact": tasks.TASKS[self.name].exact(self.items[i], text), "text": text,
                         "forwards": batch.forwards(b), "tokens": batch.written(b), "seconds": round(batch.seconds / len(batch.rows), 6),
                         "settings": settings})
        return made


def summary(lines: dict[str, list[Line]]) -> dict[str, dict[str, Any]]:
    """Figures of each decoder from its lines on the same items; standard errors are over items, differences to the first decoder paired."""
    figures, first = {}, None
    for decoder, own in lines.items():
        exact = np.array([line["exact"] for line in own], float)
        first = exact if first is None else first
        forwards, tokens = sum(sum(line["forwards"].values()) for line in own), sum(line["tokens"] for line in own)
        figures[decoder] = {
            "items": len(own), "exact": exact.mean(), "exact_se": _error(exact), "difference": (exact - first).mean(),
            "difference_se": _error(exact - first), "forwards": forwards / len(own), "tokens_per_forward": tokens / forwards,
            "tokens_per_second": tokens / sum(line["seconds"] for line in own)}
    return figures


def _error(x: np.ndarray) -> float:
    return float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else 0.0


def describe(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The table of {task: {decoder: figures}} for people."""
    text = []
    for task, rows in found.items():
        first, width = next(iter(rows)), max(map(len, rows)) + 2
        text += [f"{task}: {rows[first]['items']:,} held-out items; differences to {first}, item by item; tokens/s without compilation",
                 f"{'decoder':<{width}}{'exact':>18}{'difference':>20}{'forwards':>10}{'tokens/forward':>16}{'tokens/s':>12}"]
        for label, r in rows.items():
            exact, difference = (f"{r[key]:{sign}.2%} ± {r[f'{key}_se']:.2%}" for key, sign in (("exact", ""), ("difference", "+")))
            text.append(f"{label:<{width}}{exact:>18}{difference:>20}{r['forwards']:>10.2f}{r['tokens_per_forward']:>16.2f}"
                        f"{r['tokens_per_second']:>12,.0f}")
    return "\n".join(text)
