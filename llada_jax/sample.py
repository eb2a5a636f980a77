"""Write text with a trained model: continue a prompt, fill gaps, or work through a file.

    python -m llada_jax.sample --workdir=runs/first                                  continues held-out text
    python -m llada_jax.sample --workdir=runs/first --prompt='def add(a, b):' --prompt='import '
    python -m llada_jax.sample --workdir=runs/first --infill='def f(x):<|mask:24|>return y'
    python -m llada_jax.sample --workdir=runs/first --prompts=in.jsonl --out=out.jsonl
    python -m llada_jax.sample --checkpoint=GSAI-ML/LLaDA-8B-Instruct --chat --prompt='What is a mask?'

`<|mask:N|>` is a gap of N tokens, anywhere and as often as you like; a text without one is followed by decoder.gen_length
tokens. `--checkpoint` also takes a published folder as it was downloaded; with `--chat` prompts are messages of a user, put into
the family's own template. `--decoder=NAME` chooses a decoder and `--decoder.field=value` edits it: gen_length, block_length (blocks are
written left to right), temperature and others; `--cache=NAME` (none, prefix, dual, vicinity, block_causal) and `--cache.field=value` choose what
of earlier forwards is used again; `--suppress=eos,13,foo` names tokens that are never written, by id or spelling. Lines of `--prompts` hold "prompt",
or "messages" of a chat, and, if you like, "id"; lines of `--out` hold id, text, written (the text of each gap), tokens, forwards by kind, steps (of
them those that decode), wasted (that changed nothing), computed (slots of all forwards), and for each token the step that wrote it and its log
probability then. The decode page is replayed in any browser.
"""

import itertools
import json
import math
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from etils import epath

from llada_jax import command_line, partitioning
from llada_jax import config as config_lib
from llada_jax.config import ConfigError
from llada_jax.data import pipeline
from llada_jax.evaluation import decode, scoring
from llada_jax.interop import chat
from llada_jax.model import transformer
from llada_jax.sampling import canvas as canvas_lib
from llada_jax.sampling import engine, presets, viewer
from llada_jax.sampling.decoder import members
from llada_jax.training import pretrained, streaming

WORKDIR = flags.DEFINE_string("workdir", None, "Run folder of train.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "In place of --workdir: a published folder, one that convert wrote, or RUN/checkpoints/STEP.")
STEP = flags.DEFINE_integer("step", None, "Training step of the checkpoint; the newest by default.")
WEIGHTS = flags.DEFINE_enum("weights", "params", ["params", "ema"], "The trained weights, or their moving average.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; may be given several times.")
CHAT = flags.DEFINE_bool("chat", False, "Prompts are a user's messages to an instruction-tuned published model.")
SYSTEM = flags.DEFINE_string("system", None, "System message of --chat.")
INFILL = flags.DEFINE_multi_string("infill", [], "Text with gaps <|mask:N|>; may be given several times.")
PROMPTS = flags.DEFINE_string("prompts", None, "File of lines {\"id\": …, \"prompt\": …}.")
OUT = flags.DEFINE_string("out", None, "File for the results, a line of json each.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Samples of each prompt; without a prompt, held-out texts continued.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the sampling noise.", lower_bound=0, upper_bound=2**31 - 1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Requests decoded at once.", lower_bound=1)
STOP_AT_EOS = flags.DEFINE_bool("stop_at_eos", True, "A row is done when its text has ended; the forwards after that are saved.")
HTML = flags.DEFINE_string("html", None, "The decode page. Default: WORKDIR/samples/KIND_STEP.html; '' writes none.")
FSDP = flags.DEFINE_integer("fsdp", 1, "Devices that share one copy of the weights.", lower_bound=1)
EXPERT = flags.DEFINE_integer("expert", 1, "Devices over which the experts are split.", lower_bound=1)
TENSOR = flags.DEFINE_integer("tensor", 1, "Devices over which heads, hidden widths and the vocabulary are split.", lower_bound=1)
MASK_ID = flags.DEFINE_integer("mask_id", None, "The mask token's id, where a published config.json has none and the family's own does not fit.")
PICTURE = flags.DEFINE_string("picture", None, "SVG of the first decode at four moments.")
SUPPRESS = flags.DEFINE_string("suppress", "", "Tokens that are never written, apart by commas: eos, eot (the end of a chat's turn), ids, spellings.")
STREAM = flags.DEFINE_integer("stream", 0, "Show what is written every so many forwards, and give the place of a request that is done to the next.",
                              lower_bound=0)
COMPARE = flags.DEFINE_string("compare", None, "Another decoder, as NAME:field=value:cache=NAME: the page shows both side by side.")
LIST_DECODERS = flags.DEFINE_enum("list_decoders", None, ["recommended", "all"], "Print decoders and their settings, and stop.")

__doc__ = f"{__doc__}\nDecoders (`--list_decoders=all` names the rest):\n\n{presets.describe(presets.RECOMMENDED)}\n"

PAGE_ROWS = 16  # on the decode page


class Request(NamedTuple):
    """What to write, under which name."""

    id: Any
    label: str
    pieces: list[canvas_lib.Piece]


def main(chosen: presets.Flags) -> None:
    """Write what the flags ask for, by this decoder and cache. Raises ConfigError for what cannot be."""
    if LIST_DECODERS.value:
        print(presets.describe(presets.RECOMMENDED if LIST_DECODERS.value == "recommended" else presets.PRESETS))
        return
    # ---- checkpoint, tokenizer, requests ------------------------------------------------------------------------------
    trained = pretrained.open_weights(WORKDIR.value, CHECKPOINT.value, STEP.value, WEIGHTS.value, MASK_ID.value)
    folder, step, config, tokenizer = trained.folder, trained.step, trained.config, trained.tokenizer
    if config.diffusion.model_kind != "masked":
        raise ConfigError(f"{folder} was trained with diffusion.objective={config.diffusion.objective}; only masked-diffusion models write here "
                          "(evaluate gives its exact likelihood)")
    _check_chat(trained)
    default = "llada2" if trained.block_size else "low_confidence"
    decoder_name, decoder, cache = chosen.build(default, chosen.lengths(config.data.sequence_length, trained.block_size))
    engine.check_cache(decoder, cache)
    beside = _compared(decoder_name, decoder) if COMPARE.value else None
    if all(member.block_causal for member in members(decoder)) and not trained.block_size:
        print(f"note: {decoder_name} hides later blocks from earlier ones, which this model was not trained for", flush=True)
    suppressed = decode.suppressed_ids(SUPPRESS.value, tokenizer, trained.template, config.model.vocab_size)
    never = decode.describe_suppressed(suppressed, tokenizer)
    kind, requests = _requests(trained, decoder.gen_length)
    ends = {tokenizer.eos_id, *(chat.end_ids(trained.template, tokenizer) if CHAT.value else ())}  # what shows as the end of a text

    # ---- devices, model -----------------------------------------------------------------------------------------------
    weight_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(transformer.build(config.model).shapes))
    partitioning.setup_devices(len(requests) if len(requests) < partitioning.cores() else None, most=streaming.free_memory() // weight_bytes)
    command_line.use_compilation_cache()
    shared = {"fsdp": FSDP.value, "expert": EXPERT.value, "tensor": TENSOR.value}
    if jax.device_count() % math.prod(shared.values()):
        asked = " ".join(f"--{axis}={size}" for axis, size in shared.items() if size > 1)
        raise ConfigError(f"{asked} does not divide the {jax.device_count()} device(s)")
    if config.model.num_experts % EXPERT.value:
        raise ConfigError(f"--expert={EXPERT.value} does not divide the model's {config.model.num_experts} experts")
    mesh = partitioning.make_mesh(config_lib.Mesh(**shared))
    model = transformer.build(config.model, config.kernels, mesh)
    shardings = partitioning.shardings_of(mesh, model.axes, model.shapes)
    memory = pretrained.check_memory(model.shapes, shardings)
    device = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s)"
    print(f"{trained.describe} · {device}\n{memory}\n{decoder} · {cache}{never}", flush=True)
    variables = trained.load(model.shapes, shardings)

    # ---- decode, batch by batch in one compiled shape -----------------------------------------------------------------
    started, forwards, written, shown = time.perf_counter(), 0, 0, []
    with _Lines(OUT.value) as out:
        common = (model, variables, mesh, tokenizer, decoder, [request.pieces for request in requests])
        more = {"cache": cache, "seed": SEED.value, "max_length": config.model.max_length, "stop_at_eos": STOP_AT_EOS.value,
                "suppressed": suppressed}
        look = lambda i, tokens: print(f"… {requests[i].id}: {_masks_shown(tokens, tokenizer)}", flush=True)
        for batch in decode.stream(*common, **more, slots=BATCH_SIZE.value, chunk=STREAM.value, look=look) if STREAM.value else \
                decode.batches(*common, **more, batch_size=BATCH_SIZE.value):
            labels = [requests[i].label for i in batch.rows][: PAGE_ROWS - len(shown)]
            shown += viewer.rows(batch.trace, batch.canvas, tokenizer.decode, labels, {tokenizer.eos_id: "∎"})
            for b, i in enumerate(batch.rows):
                line = _result(requests[i], batch, b, tokenizer, ends)
                out.write(line)
                if line["failed"]:
                    print(f"note: {requests[i].id}: the model's output is not finite; the row ends there", file=sys.stderr, flush=True)
                forwards, written = forwards + sum(line["forwards"].values()), written + batch.written(b)
                if not OUT.value:
                    _show(requests[i], batch, b, tokenizer, ends)
    seconds = time.perf_counter() - started
    print(f"{written} tokens in {forwards} forwards ({written / max(forwards, 1):.2f} tokens a forward), {seconds:.1f} s with compilation")

    # ---- what can be looked at ----------------------------------------------------------------------------------------
    if beside:
        shown = _side_by_side(shown, decoder_name, beside, common, more)
    page = f"{folder}/samples/{kind}_{step}.html" if HTML.value is None and WORKDIR.value else HTML.value
    if page:
        title = f"{'Infilling' if kind == 'infill' else 'Continuation'} · {epath.Path(folder).name}, step {step}"
        subtitle = f"{decoder_name} · {written} tokens in {forwards} forwards · seed {SEED.value}{never}"
        command_line.write_file(page, viewer.page(shown, title, subtitle, pairs=bool(COMPARE.value)))
        print(f"decode page  {page}")
    if PICTURE.value:
        command_line.write_file(PICTURE.value, viewer.picture(shown[0]))
    if OUT.value:
        print(f"results      {OUT.value}")


def _check_chat(trained: pretrained.Trained) -> None:
    """Raise ConfigError for flags that do not go with --chat, or need it."""
    if CHAT.value and not trained.template:
        raise ConfigError(f"--chat needs an instruction-tuned published model, or a run with data.chat_template; {trained.folder} was trained here "
                          "without one")
    if CHAT.value and not (PROMPT.value or PROMPTS.value):
        raise ConfigError("--chat needs --prompt or --prompts, the user's messages")
    if CHAT.value and (INFILL.value or any(canvas_lib.GAP.search(text) for text in PROMPT.value)):
        raise ConfigError("--chat writes an answer of decoder.gen_length tokens; gaps <|mask:N|> go without --chat")
    if SYSTEM.value and not CHAT.value:
        raise ConfigError("--system needs --chat")


def _requests(trained: pretrained.Trained, gen_length: int) -> tuple[str, list[Request]]:
    """(kind, every request with its samples)."""
    tokenizer = trained.tokenizer
    given = [(text, text) for text in PROMPT.value]
    for text in INFILL.value:
        if not canvas_lib.GAP.search(text):
            raise ConfigError(f"--infill={text!r} has no gap; write one as <|mask:N|>, for example <|mask:24|>")
        given.append((text, text))
    named = list(enumerate(text for text, _ in given)) + (_read_prompts(PROMPTS.value) if PROMPTS.value else [])
    ids = [json.dumps(name) for name, _ in named]
    for name in ids:
        if ids.count(name) > 1:
            raise ConfigError(f"two prompts have the id {name}, so lines of --out could not be told apart; give each line of --prompts its own id")
    if not named:
        prompts = _heldout(trained.config, tokenizer, NUM_SAMPLES.value)
        return "continue", [Request(i, f"held-out text {i}", [prompt, gen_length]) for i, prompt in enumerate(prompts)]
    requests = []
    for name, prompt in named:
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}] if CHAT.value else None
        if messages is None:
            text, pieces = prompt, canvas_lib.parse(prompt, tokenizer, gen_length)
        elif not CHAT.value:
            raise ConfigError("messages need --chat, and a published model whose template they are put into")
        else:
            system = [{"role": "system", "content": SYSTEM.value}] if SYSTEM.value and messages[0].get("role") != "system" else []
            text, pieces = messages[-1].get("content", ""), [chat.render(trained.template, [*system, *messages], tokenizer), gen_length]
        for k in range(NUM_SAMPLES.value):
            label = text.strip().split("\n")[0][:60] or "(empty prompt)"
            requests.append(Request(name if NUM_SAMPLES.value == 1 else f"{name}/{k}", label, pieces))
    return "infill" if INFILL.value else "prompt", requests


def _read_prompts(path: str) -> list[tuple[Any, Any]]:
    """(id, text or list of messages) of each line."""
    named = []
    if not epath.Path(path).exists() or epath.Path(path).is_dir():
        raise ConfigError(f"--prompts={path} {'is a folder' if epath.Path(path).exists() else 'does not exist'}; name a file of json lines")
    try:
        text = epath.Path(path).read_text()
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompts={path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            messages = record.get("messages")
            for text in [record["prompt"]] if messages is None else [message["content"] for message in messages]:
                text.encode()  # a lone surrogate is no text
            named.append((record.get("id", number - 1), messages or record["prompt"]))
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{path}, line {number}: expected {{\"id\": …, \"prompt\": \"text\"}} or \"messages\", found {line[:60]!r}") from None
    if not named:
        raise ConfigError(f"--prompts={path} holds no line")
    return named


def _heldout(config: config_lib.Config, tokenizer: Any, count: int) -> list[list[int]]:
    """What held-out rows begin with: their prompt, or the first half of a text from the last start of a document in it.

    Rows with little left of it come last.
    """
    data = pipeline.build(config, tokenizer, split="heldout")
    half = max(config.data.sequence_length // 2, 1)
    rows = data.rows(np.arange(min(data.num_rows, 8 * count)))
    prompts = []
    for tokens, segment, maskable in zip(rows["tokens"], rows["segment"], rows["maskable"], strict=True):
        given = (segment == 1) & ~maskable  # the prompt of a pair, of the first one in the row
        if not given.any():
            given = (segment == segment[half - 1]) & (segment > 0) & (np.arange(len(tokens)) < half)
        prompts.append(tokens[given].tolist())
    if len(prompts) < count:
        raise ConfigError(f"--num_samples={count}, but there are only {data.num_rows} held-out rows")
    return sorted(prompts, key=len, reverse=True)[:count] if len(set(map(len, prompts))) > 1 else prompts[:count]


def _result(request: Request, batch: decode.Batch, b: int, tokenizer: Any, ends: set[int]) -> dict[str, Any]:
    """A line of `--out`. `tokens` is the whole row; texts end at the first end-of-text of the run that ends it."""
    spans, trace, valid_T = batch.spans(b, ends), batch.trace, batch.canvas.valid_BT[b]
    return {"id": request.id, "text": _spelled([t for _, tokens in spans for t in tokens], tokenizer),
            "written": [_spelled(tokens, tokenizer) for gap, tokens in spans if gap],
            "tokens": batch.trace.final_BT[b][valid_T].tolist(), "forwards": batch.forwards(b), "steps": int(trace.steps_B[b]),
            "wasted": int(trace.wasted_B[b]), "computed": int(trace.tokens_B[b]), "failed": bool(trace.failed_B[b]),
            "step": trace.reveal_step_BT[b][valid_T].tolist(),
            "logprob": [round(x, 6) if math.isfinite(x) else None for x in trace.reveal_logprob_BT[b][valid_T].tolist()]}


def _compared(name: str, decoder: Any) -> tuple[str, Any, Any]:
    """(label, decoder, cache) of --compare. Raises ConfigError for what it cannot be."""
    if STREAM.value:
        raise ConfigError("--compare decodes the same requests again, in their order; leave out --stream")
    made = scoring.decoders(presets.Flags(COMPARE.value), name, decoder.gen_length, decoder.block_length)
    if len(made) > 1:
        raise ConfigError(f"--compare={COMPARE.value} names {len(made)} decoders; name one")
    [(label, (other, cache))] = made.items()
    engine.check_cache(other, cache)
    return label, other, cache


def _side_by_side(shown: list[viewer.Row], name: str, beside: tuple[str, Any, Any], common: tuple[Any, ...],
                  more: dict[str, Any]) -> list[viewer.Row]:
    """The rows of the page, each followed by what the decoder of `--compare` makes of the same request."""
    (label, other, cache), (*model, _, requests) = beside, common
    rows = []
    for batch in decode.batches(*model, other, requests[:len(shown)], **{**more, "cache": cache}, batch_size=BATCH_SIZE.value):
        labels = [f"{shown[i].label} · {label}" for i in batch.rows]
        rows += viewer.rows(batch.trace, batch.canvas, model[-1].decode, labels, {model[-1].eos_id: "∎"})
    first = [row._replace(label=f"{row.label} · {name}") for row in shown]
    return [row for pair in zip(first, rows, strict=True) for row in pair]


def _masks_shown(tokens: list[int], tokenizer: Any) -> str:
    """One line of text with ░ for each mask."""
    text = _spelled(tokens, tokenizer, "░")
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else " " for c in text)


def _spelled(tokens: list[int], tokenizer: Any, mask: str = "") -> str:
    """Text, with what was left open as `mask` for each token, or as the gap that it would be in a prompt."""
    runs = ((masked, list(run)) for masked, run in itertools.groupby(tokens, lambda token: token == tokenizer.mask_id))
    return "".join(tokenizer.decode(run) if not masked else mask * len(run) or f"<|mask:{len(run)}|>" for masked, run in runs)


def _show(request: Request, batch: decode.Batch, b: int, tokenizer: Any, ends: set[int]) -> None:
    """Print one row; what was written stands out: bold on a terminal, between ⟦ ⟧ elsewhere."""
    before, after = ("\033[1;36m", "\033[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    text = ""
    for gap, tokens in batch.spans(b, ends):
        # a model may write terminal control characters: show them, do not run them
        safe = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in _spelled(tokens, tokenizer))
        text += f"{before}{safe}{after}" if gap else safe
    counts = ", ".join(f"{count} {kind} forwards" for kind, count in batch.forwards(b).items())
    print(f"\n── {request.id}: {batch.written(b)} tokens, {counts} {'─' * 30}\n{text}\n", flush=True)


class _Lines:
    """A jsonl file that stands under its name only when it is complete; nothing without a path."""

    def __init__(self, path: str | None):
        self.path, self.file = path, None

    def __enter__(self):
        if self.path:
            if epath.Path(self.path).is_dir():
                raise ConfigError(f"--out={self.path} is a folder; name a file")
            self.partial = epath.Path(f"{self.path}.partial")
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.partial.open("w")
        return self

    def write(self, line: dict[str, Any]) -> None:
        if self.file:
            self.file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def __exit__(self, failure, *_):
        if self.file:
            self.file.close()
            if failure is None:
                self.partial.replace(self.path)
            else:
                self.partial.unlink()


def run() -> None:
    """The command line."""
    command_line.run_with_decoder(main)


if __name__ == "__main__":
    run()
