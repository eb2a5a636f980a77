"""Measure a trained model on its held-out text, and on the tasks that its data has.

    python -m llada_jax.evaluate --workdir=runs/first
    python -m llada_jax.evaluate --workdir=runs/first --step=400 --weights=ema --draws=4
    python -m llada_jax.evaluate --checkpoint=runs/first/checkpoints/400 --max_rows=64
    python -m llada_jax.evaluate --workdir=runs/blocks --block_size=4,32,0
    python -m llada_jax.evaluate --workdir=runs/recall --tasks=recall --decoder=low_confidence,low_confidence:steps=16 --out=recall.jsonl --resume

Prints the held-out bound in bits per byte of original text with its standard error over rows, the loss by noise level, and
what unigram, bigram and gzip need on the same rows. The bound of a model of block diffusion is that of its blocks, or of each size in
`--block_size`. A model trained on sudoku also gets the table of exactly solved puzzles by number of forwards. The last line is json and holds
every figure that was printed.

With `--tasks` it answers held-out instances of tasks with exact answers instead: `--limit` of each, once by every decoder of
`--decoder=a,b:field=value:cache=dual,…`; `--decoder.field=value` and `--cache.field=value` apply to all that have such a field. An answer
is one block unless block_length says otherwise; `--suppress=eos,13,foo` names tokens that are never written, by id or spelling. The table compares
each decoder with the first, item by item. `--out` keeps a line of json an item, appended as they come; with `--resume` those that the file holds are
not decoded again.

Every other name in `--tasks` is a task of lm-evaluation-harness (the extra `[eval]`), answered by one decoder in blocks of 32 tokens unless told
otherwise: its texts are written, its likelihoods estimated with `--draws`, both with decoder.guidance. `--out` is then a folder, which holds
items.jsonl, every answer as it comes, and scores.json, the scores with all settings.

    python -m llada_jax.evaluate --checkpoint=GSAI-ML/LLaDA-8B-Base --tasks=arc_challenge,gsm8k --decoder=fast_dllm --out=runs/scores --resume
"""

import dataclasses
import json
import math
import os
from typing import Any

import jax
import numpy as np
from absl import flags

from llada_jax import command_line, partitioning
from llada_jax import config as config_lib
from llada_jax.config import ConfigError
from llada_jax.data import baselines, pipeline
from llada_jax.data import sources as sources_lib
from llada_jax.diffusion import likelihood
from llada_jax.evaluation import answers, decode, harness, heldout, scoring, tasks
from llada_jax.interop import chat
from llada_jax.model import count, transformer
from llada_jax.sampling import presets
from llada_jax.training import pretrained, streaming

WORKDIR = flags.DEFINE_string("workdir", None, "Run folder of train.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "In place of --workdir: a published folder, one that convert wrote, or RUN/checkpoints/STEP.")
STEP = flags.DEFINE_integer("step", None, "Training step of the checkpoint; the newest by default.")
WEIGHTS = flags.DEFINE_enum("weights", "params", ["params", "ema"], "The trained weights, or their moving average.")
DRAWS = flags.DEFINE_integer("draws", None, "Noise draws: of a held-out row, by default train.eval_draws; of a likelihood for lm-eval's tasks, "
                             "by default 128.", lower_bound=1)
SOURCES = flags.DEFINE_string("sources", None, "Text in place of the run's data.sources; for published models Python's standard library.")
LENGTH = flags.DEFINE_integer("sequence_length", None, "Tokens a row, in place of the run's.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Rows at once, in place of the run's train.batch_size.", lower_bound=1)
MASK_ID = flags.DEFINE_integer("mask_id", None, "The mask token's id, where a published config.json has none and the family's own does not fit.")
MAX_ROWS = flags.DEFINE_integer("max_rows", 0, "Held-out rows at most; 0 = all.", lower_bound=0)
TASKS = flags.DEFINE_list("tasks", [], f"In place of held-out text: tasks with exact answers ({', '.join(tasks.TASKS)}), or those of lm-eval.")
BLOCK_SIZE = flags.DEFINE_list("block_size", None, "Tokens of a block in the held-out bound, in place of the model's own; several are measured one "
                               "after the other; 0 = no blocks.")
LIMIT = flags.DEFINE_integer("limit", None, "Instances of each task; by default 1000 of ours, all of lm-eval's.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", tasks.SEED, "Of the instances of the tasks, and of sampling noise.", lower_bound=0, upper_bound=2**31 - 1)
OUT = flags.DEFINE_string("out", None, "File for the results of the tasks, a line of json an item; for lm-eval's tasks a folder.")
RESUME = flags.DEFINE_bool("resume", False, "Go on with what --out names.")
SUPPRESS = flags.DEFINE_string("suppress", "", "Tokens never written, apart by commas: eos, eot (the end of a chat's turn), ids, spellings.")
OF_LIBRARY = (  # what goes with tasks of lm-eval alone
    TASK_FOLDER := flags.DEFINE_string("task_folder", None, "Task files (*.yaml) beside those of lm-eval."),
    NUM_FEWSHOT := flags.DEFINE_integer("num_fewshot", None, "Examples in a prompt, in place of the tasks' own number.", lower_bound=0),
    CHAT := flags.DEFINE_bool("chat", False, "Prompts are messages to an instruction-tuned published model."),
    MAX_NEW_TOKENS := flags.DEFINE_integer("max_new_tokens", None, "Tokens of a written answer, in place of the tasks' own.", lower_bound=1),
    TRUNCATE := flags.DEFINE_bool("truncate", False, "Cut prompts that are too long on the left; the scores tell how many."),
    UNSAFE_CODE := flags.DEFINE_bool("unsafe_code", False, "Run tasks that execute what the model wrote."),
)

BLOCK = 32  # tokens of a block, where neither answers nor the model have a size of their own

Opened = tuple[transformer.LanguageModel, Any, jax.sharding.Mesh]


def main(chosen: presets.Flags) -> None:
    """Measure what the flags ask for; the last line is json. Raises ConfigError for what cannot be."""
    trained = pretrained.open_weights(WORKDIR.value, CHECKPOINT.value, STEP.value, WEIGHTS.value, MASK_ID.value)
    trained = trained._replace(config=_with_flags(trained.config))
    if TASKS.value and BLOCK_SIZE.value is not None:
        raise ConfigError("--block_size is of the held-out bound; the blocks of a task are --decoder.block_length")
    others = [name for name in dict.fromkeys(TASKS.value) if name not in tasks.TASKS]
    given = [flag.name for flag in OF_LIBRARY if flag.value != flag.default]
    if others:
        found = _library_tasks(trained, chosen, others)
    elif TASKS.value:
        if given:
            raise ConfigError(f"--{given[0]} is for tasks of lm-evaluation-harness; --tasks={','.join(TASKS.value)} are our own")
        found = _tasks(trained, chosen)
    else:
        given = [flag.name for flag in (OUT, RESUME, SUPPRESS) if flag.value] + [chosen.given] + given
        if any(given):
            raise ConfigError(f"--{next(filter(None, given))} needs --tasks={'|'.join(tasks.TASKS)}, or tasks of lm-evaluation-harness")
        found = _heldout(trained)
    print(json.dumps(found))


def _load(trained: pretrained.Trained) -> tuple[Opened, dict[str, Any]]:
    """The model, its weights and the mesh; what the last line says of them."""
    config = trained.config
    weight_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(transformer.build(config.model).shapes))
    partitioning.setup_devices(config.train.batch_size, most=streaming.free_memory() // weight_bytes)
    command_line.use_compilation_cache()
    mesh = partitioning.make_mesh()
    partitioning.check_batch(config.train.batch_size, 1, mesh)
    model = transformer.build(config.model, config.kernels, mesh)
    shardings = partitioning.shardings_of(mesh, model.axes, model.shapes)
    memory = pretrained.check_memory(model.shapes, shardings)
    variables = trained.load(model.shapes, shardings)
    device = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s)"
    size = count.parameters(config.model)
    print(f"{trained.describe} · {size.total:,} parameters, {size.active:,} active a token · {device}\n{memory}", flush=True)
    return (model, variables, mesh), {"folder": trained.folder, "step": trained.step, "weights": WEIGHTS.value, "parameters": size.total,
                                      "active": size.active, "device": device}


def _heldout(trained: pretrained.Trained) -> dict[str, Any]:
    """Held-out text, and the table of a model trained on sudoku."""
    config, tokenizer = trained.config, trained.tokenizer
    sizes = _block_sizes(trained)
    sources = sources_lib.load(config.data)
    held_out = pipeline.build(config, tokenizer, "heldout", sources)
    if not held_out.num_rows:
        raise ConfigError(f"{trained.folder} was trained with data.holdout={config.data.holdout} on {config.data.sources}, which holds nothing out")
    rows = min(MAX_ROWS.value or held_out.num_rows, held_out.num_rows)
    (model, variables, mesh), found = _load(trained)

    # ---- held-out text ------------------------------------------------------------------------------------------------
    scored = held_out.rows(np.arange(rows))
    evaluate, by_size = heldout.make(model, config, mesh, tokenizer.mask_id), []
    for size in sizes:
        by_size.append(figures := evaluate(variables, scored, DRAWS.value or config.train.eval_draws, size))
        print(f"held out: {heldout.describe(figures)}", flush=True)
        for i, loss in enumerate(levels := figures["loss_by_level"]):
            print(f"  {i / len(levels):4.0%} to {(i + 1) / len(levels):4.0%} masked: {'none' if loss is None else f'{loss:.4f} nats a masked token'}")
    simple = {}
    if config.data.sources != "sudoku" and baselines.comparable(scored):
        train = pipeline.build(config, tokenizer, "train", sources)
        simple = baselines.measure(train.stream(), held_out.stream(rows if rows < held_out.num_rows else 0), tokenizer)
        print("on the same text, bits a byte: " + ", ".join(f"{name} {bits:.4f}" for name, bits in simple.items()), flush=True)
    found |= {"heldout": by_size[0], "baselines": simple} | ({"heldout_by_block_size": by_size} if len(by_size) > 1 else {})

    # ---- sudoku -------------------------------------------------------------------------------------------------------
    if config.data.sources == "sudoku" and config.diffusion.model_kind == "masked":
        found["sudoku"] = tasks.sudoku(model, variables, mesh, tokenizer)
        print(tasks.describe_sudoku(found["sudoku"]), flush=True)
    return found


def _tasks(trained: pretrained.Trained, chosen: presets.Flags) -> dict[str, Any]:
    """Every decoder on every task."""
    config, tokenizer = trained.config, trained.tokenizer
    default, suppressed = _default_decoder(trained), _suppressed(trained)
    lines = scoring.Lines(OUT.value, RESUME.value)
    plan = []  # what is asked is checked before anything is loaded
    for name in dict.fromkeys(TASKS.value):
        task = scoring.Asked.of(name, LIMIT.value or 1000, SEED.value, tokenizer)
        for label, (decoder, cache) in scoring.decoders(chosen, default, task.items[0].length, trained.block_size).items():
            knobs = {"model": trained.describe, "seed": SEED.value, "batch_size": config.train.batch_size, "suppress": list(suppressed),
                     "decoder": dataclasses.asdict(decoder), "cache": {"name": cache.name, **dataclasses.asdict(cache)}}
            lines.check(name, label, knobs)
            plan.append((task, label, decoder, cache, knobs))
    (model, variables, mesh), found = _load(trained)

    found |= {"suppress": list(suppressed), "tasks": {task.name: {} for task, *_ in plan}}
    for task, label, decoder, cache, knobs in plan:
        rest = [i for i in range(len(task.items)) if (task.name, label, i) not in lines.found]
        print(f"{task.name} by {label}: {len(rest)} of {len(task.items)} items to decode\n  {decoder} · {cache}"
              f"{decode.describe_suppressed(suppressed, tokenizer)}", flush=True)
        for batch in decode.batches(model, variables, mesh, tokenizer, decoder, task.requests, cache=cache, rows=rest,
                                    max_length=config.model.max_length, batch_size=config.train.batch_size, seed=SEED.value, suppressed=suppressed,
                                    warm_up=True):
            lines.add(task.lines(batch, label, tokenizer, knobs))
        found["tasks"][task.name][label] = [lines.found[task.name, label, i] for i in range(len(task.items))]
    found["tasks"] = {name: scoring.summary(by_decoder) for name, by_decoder in found["tasks"].items()}
    print(scoring.describe(found["tasks"]), flush=True)
    return found


def _library_tasks(trained: pretrained.Trained, chosen: presets.Flags, names: list[str]) -> dict[str, Any]:
    """One decoder on tasks of lm-evaluation-harness."""
    config, tokenizer, out = trained.config, trained.tokenizer, OUT.value
    # what is asked is checked before anything is loaded
    manager = harness.find(names, TASK_FOLDER.value, tasks.TASKS)
    if own := [name for name in TASKS.value if name in tasks.TASKS]:
        raise ConfigError(f"--tasks: {', '.join(own)} and tasks of lm-evaluation-harness ({', '.join(names)}) go apart, in two calls")
    default, suppressed = _default_decoder(trained), _suppressed(trained)
    if "gen_length" in chosen.decoder_settings or ":gen_length=" in (chosen.decoder or ""):
        raise ConfigError("tasks of lm-evaluation-harness say themselves how much is written; --max_new_tokens=N goes in place of decoder.gen_length")
    by_label = scoring.decoders(chosen, default, MAX_NEW_TOKENS.value or harness.DEFAULT_LENGTH, trained.block_size or BLOCK)
    if len(by_label) > 1:
        raise ConfigError(f"--decoder names {', '.join(by_label)}, but tasks of lm-evaluation-harness are answered by one; call once for each, "
                          "each with its own --out")
    [(decoder, cache)] = by_label.values()
    draws = DRAWS.value or likelihood.Estimator.draws
    estimator = likelihood.Estimator(draws=draws, group=math.gcd(draws, likelihood.Estimator.group), guidance=decoder.guidance)
    template = trained.template if trained.template in chat.TEMPLATES else None
    if CHAT.value and not template:
        raise ConfigError(f"--chat needs an instruction-tuned published model, or a run with data.chat_template; {trained.folder} was trained here "
                          "without one, or its family has no chat template")
    ends = {tokenizer.eos_id, *(chat.end_ids(template, tokenizer) if template and CHAT.value else ())}
    if RESUME.value and not out:
        raise ConfigError("--resume needs --out, the folder to go on with")
    if out and ("://" in out or os.path.isfile(out)):
        raise ConfigError(f"--out={out}: for tasks of lm-evaluation-harness name a folder of this machine")
    if out and not RESUME.value and os.path.exists(f"{out}/items.jsonl"):
        raise ConfigError(f"--out={out} holds answers; --resume goes on with them, or name another folder")
    (model, variables, mesh), found = _load(trained)

    print(f"{decoder} · {cache} · {estimator}{decode.describe_suppressed(suppressed, tokenizer)}", flush=True)
    shared = {"seed": SEED.value, "batch_size": config.train.batch_size}
    score = answers.make(model, variables, mesh, tokenizer.mask_id, tokenizer.pad_id, estimator, block_size=trained.block_size, **shared)
    write = decode.writer(model, variables, mesh, tokenizer, decoder, cache=cache, max_length=config.model.max_length, suppressed=suppressed,
                          **shared)
    settings = {"checkpoint": trained.folder, "step": trained.step, "weights": WEIGHTS.value, "seed": SEED.value,
                "suppress": list(suppressed), "decoder": {"name": decoder.name, **dataclasses.asdict(decoder)},
                 "cache": {"name": cache.name, **dataclasses.asdict(cache)},
                 "likelihood": {**dataclasses.asdict(estimator), "block_size": trained.block_size}}
    render = {"render": lambda messages: chat.render(template, messages, tokenizer)} if template else {}
    asked = harness.Model(tokenizer, config.model.max_length, score, write, ends, decoder.temperature, settings, template, **render)
    scores = harness.run(asked, names, limit=LIMIT.value, num_fewshot=NUM_FEWSHOT.value, out=out, folder=TASK_FOLDER.value, manager=manager,
                         chat=CHAT.value, max_new_tokens=MAX_NEW_TOKENS.value, batch_size=config.train.batch_size, truncate=TRUNCATE.value,
                         unsafe_code=UNSAFE_CODE.value)
    print(harness.describe(scores), flush=True)
    settings = {key: value for key, value in scores[0]["settings"].items() if key != "task"}
    return found | {"scores": [{key: value for key, value in line.items() if key != "settings"} for line in scores], "settings": settings}


def _default_decoder(trained: pretrained.Trained) -> str:
    """The decoder where none is named. Raises ConfigError for a model that writes nothing."""
    if trained.config.diffusion.model_kind != "masked":
        raise ConfigError(f"{trained.folder} was trained with diffusion.objective={trained.config.diffusion.objective}; "
                          "only masked-diffusion models answer tasks")
    return "llada2" if trained.block_size else "low_confidence"


def _suppressed(trained: pretrained.Trained) -> tuple[int, ...]:
    return decode.suppressed_ids(SUPPRESS.value, trained.tokenizer, trained.template, trained.config.model.vocab_size)


def _block_sizes(trained: pretrained.Trained) -> list[int]:
    """Of the held-out bounds to measure. Raises ConfigError for what is none, and for a model that has no bound."""
    if BLOCK_SIZE.value is None:
        return [trained.block_size]
    if trained.config.diffusion.model_kind != "masked":
        raise ConfigError(f"--block_size is of masked diffusion; {trained.folder} has diffusion.objective={trained.config.diffusion.objective}")
    if not BLOCK_SIZE.value or not all(text.isdecimal() and int(text) < 2**31 for text in BLOCK_SIZE.value):
        raise ConfigError(f"--block_size={','.join(BLOCK_SIZE.value)} is not a list of whole numbers of tokens, for example 4,32,0")
    return [int(text) for text in BLOCK_SIZE.value]


def _with_flags(config: config_lib.Config) -> config_lib.Config:
    """The run's config with the text and the shape that flags name."""
    named = {"sources": SOURCES.value, "sequence_length": LENGTH.value}
    data = dataclasses.replace(config.data, **{key: value for key, value in named.items() if value is not None})
    train = dataclasses.replace(config.train, batch_size=BATCH_SIZE.value or config.train.batch_size)
    config = dataclasses.replace(config, data=data, train=train)
    config_lib.validate(config)
    return config


def run() -> None:
    """The command line."""
    command_line.run_with_decoder(main)


if __name__ == "__main__":
    run()
