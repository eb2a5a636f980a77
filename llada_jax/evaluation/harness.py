"""Tasks of lm-evaluation-harness (the extra `[eval]`) for a model given as two functions.

`run` asks the library for the tasks' requests, answers them in batches of few shapes, lets the library score the answers, and
puts every setting beside every score. Answers are kept in a file as they come, so a run that was stopped goes on where it was.
"""

import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from llada_jax import __version__
from llada_jax.config import ConfigError, nearest
from llada_jax.evaluation import answers
from llada_jax.tokenizer import Tokenizer

INSTALL = "pip install -c requirements.txt -e '.[eval]'"
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # in the library's order of precedence
DEFAULT_LENGTH = 256  # tokens to write for a task that says nothing, as in the library


def _no_template(messages: Sequence[Mapping[str, str]]) -> list[int]:
    raise ConfigError("chat needs a published model with a chat template")


class Model(NamedTuple):
    """What answers requests."""

    tokenizer: Tokenizer
    max_length: int  # positions, prompt and answer together
    score: answers.Score  # likelihoods; see `answers.make`
    # generate([(prompt ids, tokens to write)], names, length) -> ids written for each prompt. All of a call write equally many tokens into
    # canvases of at least `length` slots, so that few shapes compile; `names` (int32) stand for the rows in the noise
    generate: Callable[[list[tuple[list[int], int]], list[int], int], list[list[int]]]
    ends: Collection[int]  # ids after which a text is over
    temperature: float  # of `generate`
    settings: Mapping[str, Any]  # whatever else settles the answers: checkpoint, decoder, estimator, seed; json values, nested by name
    template: str | None = None  # name of the chat template
    render: Callable[[Sequence[Mapping[str, str]]], list[int]] = _no_template  # messages -> prompt ids


class Items:
    """Answers by the key of their request, in memory and, with a path, in a jsonl file that begins with the settings.

    Raises ConfigError for a file made with other settings, naming the first, and for a damaged line, except for the last one of a run
    that was killed, which is dropped.
    """

    def __init__(self, path: str | None, settings: Mapping[str, Any]):
        self.found: dict[str, dict[str, Any]] = {}
        self.file = None
        if not path:
            return
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        kept = self._read(path, settings) if os.path.exists(path) else 0
        self.file = open(path, "r+" if kept else "w", encoding="utf-8")
        self.file.seek(kept)
        self.file.truncate()
        if not kept:
            self._write({"settings": settings})

    def _read(self, path: str, settings: Mapping[str, Any]) -> int:
        """Take up the file's answers; bytes of its whole lines."""
        with open(path, "rb") as file:
            whole = file.read()
        whole = whole[: whole.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                made_with = record["settings"] if number == 1 else None
                if number > 1:
                    self.found[record["key"]] = record
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{path}, line {number}: no answer of an evaluation, but {line[:60]!r}; remove it, or name another out") from None
            if made_with is not None:
                _refuse_other(path, made_with, json.loads(json.dumps(settings)))
        return len(whole)

    def _write(self, record: Mapping[str, Any]) -> None:
        if self.file:
            self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.file.flush()

    def add(self, record: dict[str, Any]) -> None:
        """Keep an answer under record["key"]."""
        self.found[record["key"]] = record
        self._write(record)

    def close(self) -> None:
        if self.file:
            self.file.close()


def _refuse_other(path: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    then, now = _flat(then), _flat(now)
    other = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    if other:
        name, more = other[0], f" (and {', '.join(other[1:])})" if other[1:] else ""
        raise ConfigError(f"{path} was made with {name}={then.get(name)!r}, now it is {now.get(name)!r}{more}; use the same settings, or name "
                          "another out")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    flat = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


class Adapter:
    """The library's interface of a language model. `requests` are its instances: `args`, `task_name`, `doc_id`, `idx`."""

    def __init__(self, model: Model, items: Items, batch_size: int, max_new_tokens: int | None, truncate: bool):
        super().__init__()
        self.model, self.items, self.batch_size, self.max_new_tokens, self.truncate = model, items, batch_size, max_new_tokens, truncate
        self.rendered: dict[str, list[int]] = {}  # prompts made by the chat template
        self.cut: set[str] = set()  # keys of requests whose prompt lost its beginning
        self.apart: set[str] = set()  # keys of requests whose answer does not begin where a token of the whole text begins

    # ---- likelihoods --------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p, whether greedy decoding writes it) of (context, continuation) pairs."""
        def compute(todo):
            pairs = [pairs_by_key[key] for key in todo]
            for i, answer in self.model.score(pairs, list(map(name_of, todo))):
                yield todo[i], {"prompt_tokens": len(pairs[i][0]), "tokens": len(pairs[i][1]), "logprob": answer.logprob,
                                "error": _finite(answer.error), "greedy": answer.greedy}
        keys = [key_of("loglikelihood", request.args) for request in requests]
        pairs_by_key = {key: self._pair(key, request) for key, request in dict(zip(keys, requests, strict=True)).items()}
        found = self._answer("loglikelihood", keys, requests, compute)
        return [(record["logprob"], record["greedy"]) for record in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts: the sum over stretches of max_length tokens, each by itself and without a prompt."""
        def compute(todo):
            stretches = [(key, part) for key in todo for part in windows[key]]
            names = [name_of(key, n) for key in todo for n in range(len(windows[key]))]
            sums = {key: [] for key in todo}
            for i, answer in self.model.score([([], part) for _, part in stretches], names):
                key = stretches[i][0]
                sums[key].append(answer)
                if len(sums[key]) == len(windows[key]):
                    yield key, {"prompt_tokens": 0, "tokens": sum(map(len, windows[key])), "logprob": math.fsum(a.logprob for a in sums[key]),
                                "error": _finite(math.hypot(*(a.error for a in sums[key])))}
        keys = [key_of("loglikelihood_rolling", request.args) for request in requests]
        windows = {}
        for key, request in zip(keys, requests, strict=True):
            if not (ids := self.model.tokenizer.encode(request.args[0])):
                raise ConfigError(f"{_name(request)} is an empty text: it has no likelihood")
            windows[key] = [ids[i : i + self.model.max_length] for i in range(0, len(ids), self.model.max_length)]
        return [record["logprob"] for record in self._answer("loglikelihood_rolling", keys, requests, compute)]

    def _pair(self, key: str, request: Any) -> tuple[list[int], list[int]]:
        """Ids of prompt and answer. Blanks at the end of a context belong to the answer, and the two are encoded as one text, as in the library.

        Where a token straddles the boundary the library cuts the text's ids at a wrong place; here the two are then encoded apart.
        """
        context, continuation = request.args
        encode = self.model.tokenizer.encode
        if context in self.rendered:
            prompt, answer = self.rendered[context], encode(continuation)
        else:
            context, blanks = context.rstrip(), context[len(context.rstrip()) :]
            prompt, whole = encode(context), encode(context + blanks + continuation)
            answer = whole[len(prompt) :]
            if whole[: len(prompt)] != prompt or not answer:
                self.apart.add(key)
                answer = encode(blanks + continuation)
        if not answer:
            raise ConfigError(f"{_name(request)} has an empty answer {continuation!r}: it has no likelihood")
        return self._fit(key, request, prompt, len(answer), "the answer alone is too long"), answer

    def _fit(self, key: str, request: Any, prompt: list[int], needed: int, too_much: str) -> list[int]:
        """The prompt, or with `truncate` as much of its end as fits; raises ConfigError, at worst with `too_much`, where it does not."""
        room = self.model.max_length - needed
        if len(prompt) <= room:
            return prompt
        if not self.truncate or room < 0:
            way = "use fewer few-shot examples, or truncate=True, which cuts prompts on the left" if room >= 0 else too_much
            raise ConfigError(f"{_name(request)}: {len(prompt)} prompt and {needed} answer tokens are longer than the model's "
                              f"max_length={self.model.max_length}; {way}")
        self.cut.add(key)
        return prompt[len(prompt) - room :]

    # ---- texts --------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What is written after each context, cut at the first of the task's stop strings."""
        def compute(todo):
            lengths = [len(prompts[key]) + new[key] for key in todo]
            for chosen, length in answers.batches(lengths, self.batch_size, self.model.max_length, lambda i: new[todo[i]]):
                keys = [todo[i] for i in chosen]
                written = self.model.generate([(prompts[key], new[key]) for key in keys], list(map(name_of, keys)), length)
                for key, ids in zip(keys, written, strict=True):
                    ids = list(itertools.takewhile(lambda token: token not in self.model.ends, ids))
                    yield key, {"prompt_tokens": len(prompts[key]), "tokens": len(ids), "text": cut_at(self.model.tokenizer.decode(ids), stops[key])}
        keys, prompts, new, stops = [], {}, {}, {}
        seen: dict[str, int] = {}
        for request in requests:  # the same request again is another sample
            plain = key_of("generate_until", request.args)
            seen[plain] = seen.get(plain, 0) + 1
            keys.append(key := key_of("generate_until", (*request.args, seen[plain])) if seen[plain] > 1 else plain)
            context, asked = request.args
            stops[key], new[key] = self._settings(request, asked)
            prompt = self.rendered[context] if context in self.rendered else self.model.tokenizer.encode(context)
            prompts[key] = self._fit(key, request, prompt, new[key], "write less with max_new_tokens")
        return [record["text"] for record in self._answer("generate_until", keys, requests, compute)]

    def _settings(self, request: Any, asked: Mapping[str, Any]) -> tuple[list[str], int]:
        """(stop strings, tokens to write); raises ConfigError where the task asks for another temperature than the decoder's."""
        stops = asked.get("until") or []
        if "do_sample" in asked or "temperature" in asked:
            sampled = asked.get("do_sample", True)
            temperature = float(asked.get("temperature", 1.0)) if sampled else 0.0
            if temperature != self.model.temperature:
                raise ConfigError(f"{_name(request)} asks for temperature {temperature:g}, but decoder.temperature={self.model.temperature:g}; set "
                                  f"that, or gen_kwargs do_sample={self.model.temperature > 0},temperature={self.model.temperature:g}")
        length = self.max_new_tokens or next((asked[name] for name in LENGTH_NAMES if asked.get(name)), DEFAULT_LENGTH)
        return [stops] if isinstance(stops, str) else list(stops), int(length)

    # ---- both ---------------------------------------------------------------------------------------------------------

    def _answer(self, kind: str, keys: list[str], requests: Sequence[Any],
                compute: Callable[[list[str]], Iterator[tuple[str, dict[str, Any]]]]) -> list[dict[str, Any]]:
        """The record of each request; those that no earlier run or request answered are computed."""
        first = {}
        for key, request in zip(keys, requests, strict=True):
            first.setdefault(key, request)
        for key, record in compute([key for key in first if key not in self.items.found]):
            of = {"task": first[key].task_name, "document": first[key].doc_id, "choice": first[key].idx}
            self.items.add({"key": key, "kind": kind, **of, **record})
        return [self.items.found[key] for key in keys]

    @property
    def tokenizer_name(self) -> str:
        return self.model.tokenizer.fingerprint

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as text, which stands for the ids that the family's template makes of them: no text spells a control token."""
        if not add_generation_prompt:
            raise ConfigError("a task with gen_prefix begins the assistant's answer itself, which the chat templates here do not do")
        text = json.dumps(chat_history, ensure_ascii=False)
        self.rendered[text] = self.model.render(chat_history)
        return text


def key_of(kind: str, args: Sequence[Any]) -> str:
    """16 hex digits over a request."""
    return hashlib.sha256(json.dumps([kind, *args], ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]


def name_of(key: str, part: int = 0) -> int:
    """Sample index of a request in the noise, 31 bits: it follows from the request alone, not from its place in a list."""
    return (int(key[:8], 16) + part) & 0x7FFFFFFF


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings; empty ones stop nothing."""
    return text[: min((found for stop in stops if stop and (found := text.find(stop)) >= 0), default=len(text))]


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _name(request: Any) -> str:
    return f"{request.task_name}, document {request.doc_id}"


def find(names: Sequence[str], folder: str | None = None, ours: Collection[str] = ()) -> Any:
    """The library's task manager, which knows all `names`. folder: task files (*.yaml) beside the library's.

    Raises ConfigError without the library, for a folder that is none, and for an unknown name with the nearest of its tasks and `ours`.
    """
    if folder and not os.path.isdir(folder):
        raise ConfigError(f"{folder} is no folder of task files")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        without = f"; without it there is no task '{names[0]}'{nearest(names[0], ours)}" if ours else ""
        raise ConfigError(f"tasks of lm-evaluation-harness need the extra [eval] ({error}): {INSTALL}{without}") from None
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=folder)  # thousands of files
    for name in names:
        if not manager.match_tasks([name]):
            near = nearest(name, [*ours, *manager.all_tasks])
            raise ConfigError(f"there is no task '{name}'{near if near.endswith('?') else '; lm-eval ls tasks lists those of the library'}")
    return manager


def run(model: Model, tasks: Sequence[str], *, limit: int | float | None = None, num_fewshot: int | None = None, out: str | None = None,
        folder: str | None = None, manager: Any = None, chat: bool = False, system: str | None = None, gen_kwargs: Mapping[str, Any] | None = None,
        max_new_tokens: int | None = None, batch_size: int = 32, truncate: bool = False, fewshot_seed: int = 1234,
        bootstrap_iters: int = 100_000, unsafe_code: bool = False) -> list[dict[str, Any]]:
    """Evaluate tasks by name, one line a (task, metric, filter): `value`, `stderr`, `items`, `num_fewshot`, and all `settings`, also the task's.

    limit: documents a task, or their share below 1. num_fewshot: in place of the tasks' own, but where that is 0 (a rule of the library;
    the line has what was used). out: a folder for `items.jsonl`, every answer as it comes, and `scores.json`, the lines; a second
    run there with the same settings computes only what is missing, also for other tasks or limits. folder: task files (*.yaml) beside the
    library's; manager: what `find` gave for both. max_new_tokens: in place of the tasks' own lengths. truncate: cut long prompts on the left,
    which is counted. unsafe_code: run tasks that execute what the model wrote. Raises ConfigError without the library, for unknown tasks, and
    for requests that do not fit.
    """
    manager = manager or find(tasks, folder)
    import lm_eval
    from lm_eval.api.model import LM

    if chat and not model.template:
        _no_template([])
    if system and not chat:
        raise ConfigError("a system message needs chat")

    versions = {"llada_jax": __version__, "lm_eval": importlib.metadata.version("lm_eval"), "jax": jax.__version__}
    settings = {**model.settings, "temperature": model.temperature, "template": model.template if chat else None, "system": system,
                "num_fewshot": num_fewshot, "fewshot_seed": fewshot_seed, "gen_kwargs": gen_kwargs, "max_new_tokens": max_new_tokens,
                "max_length": model.max_length, "truncate": truncate, "tokenizer": model.tokenizer.fingerprint, "versions": versions}

    items = Items(f"{out}/items.jsonl" if out else None, settings)
    try:
        adapter = type("LladaJax", (Adapter, LM), {})(model, items, batch_size, max_new_tokens, truncate)
        results = lm_eval.simple_evaluate(
            model=adapter, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, task_manager=manager, apply_chat_template=chat,
            system_instruction=system, gen_kwargs=dict(gen_kwargs) if gen_kwargs else None, fewshot_random_seed=fewshot_seed,
            torch_random_seed=None, bootstrap_iters=bootstrap_iters, log_samples=False, confirm_run_unsafe_code=unsafe_code)
    except ValueError as error:
        if "marked as unsafe" not in str(error):
            raise
        what = str(error).partition(" Set ")[0]
        raise ConfigError(f"{what} It executes what the model wrote; where that can do no harm, allow it with unsafe_code") from None
    finally:
        items.close()
    # what settles no answer, or shows only now
    asked = {"limit": limit, "batch_size": batch_size, "device": f"{jax.device_count()} {jax.devices()[0].device_kind}",
             "python": platform.python_version(), "prompts_cut": len(adapter.cut), "answers_encoded_apart": len(adapter.apart)}
    scores = _scores(results, settings | asked)
    if out:
        with open(f"{out}/scores.json.partial", "w", encoding="utf-8") as file:
            json.dump(scores, file, ensure_ascii=False, indent=1, default=str)
        os.replace(f"{out}/scores.json.partial", f"{out}/scores.json")
    return scores


def _scores(results: Mapping[str, Any], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The library's results as lines."""
    lines = []
    for task, found in results["results"].items():
        for name, value in found.items():
            metric, comma, kind = name.rpartition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = found.get(f"{metric}_stderr,{kind}")  # "N/A" where there is none
            lines.append({"task": task, "metric": metric, "filter": kind, "value": float(value),
                          "stderr": _finite(stderr) if isinstance(stderr, float) else None,
                          "higher_is_better": results["higher_is_better"].get(task, {}).get(metric), "version": results["versions"].get(task),
                          "items": results["n-samples"].get(task, {}).get("effective"), "num_fewshot": results["n-shot"].get(task),
                          "settings": {**settings, "task": results["configs"].get(task, {})}})
    return lines


def describe(scores: Sequence[Mapping[str, Any]]) -> str:
    """A table for people."""
    lines = [f"{'task':<32}{'metric':<24}{'value':>10}{'stderr':>10}{'items':>8}{'shots':>7}"]
    for s in scores:
        metric = s["metric"] if s["filter"] == "none" else f"{s['metric']} ({s['filter']})"
        number = lambda x, form: "" if x is None else format(x, form)
        lines.append(f"{s['task']:<32}{metric:<24}{s['value']:>10.4f}{number(s['stderr'], '10.4f'):>10}{number(s['items'], 'd'):>8}"
                     f"{number(s['num_fewshot'], 'd'):>7}")
    return "\n".join(lines)
