"""An ablation: its variants and seeds run one after the other, each with the commands that anyone would type, and a line of json a run.

A file under `configs/ablations/` states its hypothesis, metric and budget in its docstring and holds, beside `get_config("variant=…,seed=…")`:

    VARIANTS  names, in the order in which they run; comparisons are with the first
    SEEDS     how many; equal seeds mean equal data, noise and, where the shapes agree, initial weights
    FROM      {variant: variant whose run of the same seed it begins with}, of those that do
    COMMANDS  {variant: its command in place of training}, of those that are not trained; {start} and {folder} are filled in
    EVALUATE  {variant: flags of llada_jax.evaluate, whose figures are kept too}; "" stands for all other variants

`results.jsonl` gets a line a run. A run that has one is left out, one that was stopped goes on: the same command finishes a sweep, whenever it ended
(of a run that went on, `wall_seconds` counts what came after the stop).
"""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from etils import epath

from llada_jax import config as config_lib
from llada_jax import distributed
from llada_jax.config import ConfigError
from llada_jax.diffusion import blocks
from llada_jax.evaluation import hardware
from llada_jax.model import count
from llada_jax.training import checkpoint, metrics, presets

LAST = 20  # training lines that the load of experts is averaged over


@dataclasses.dataclass(frozen=True)
class Run:
    """One line of the results: a variant with a seed."""

    variant: str
    seed: int
    folder: str
    start: str | None  # the run folder that it begins with
    trained: str  # the run folder that tells settings and cost: `folder`, or of a variant that is not trained the one it was made from
    commands: tuple[tuple[str, ...], ...]  # without Python's name

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.seed}"


def runs(path: str, module: ModuleType, workdir: str, edits: Mapping[str, Any] | None = None) -> list[Run]:
    """All runs of an ablation, seed by seed, so that a sweep ended early leaves whole pairs.

    `path` of the config file; `edits` of settings, such as {"train.steps": 100}, for each of them. Raises ConfigError for a file that is no ablation.
    """
    variants, starts, others, asked = (getattr(module, name, default) for name, default in
                                       (("VARIANTS", ()), ("FROM", {}), ("COMMANDS", {}), ("EVALUATE", {})))
    if not variants:
        raise ConfigError(f"--sweep: {path} names no VARIANTS; the files under configs/ablations/ do")
    found, edited = [], [f"--config.{key}={value}" for key, value in (edits or {}).items()]
    for seed in range(module.SEEDS):
        for variant in variants:
            folder, start = f"{workdir}/{variant}-{seed}", f"{workdir}/{starts[variant]}-{seed}" if variant in starts else None
            if variant in others:
                trained, made = start or folder, tuple(word.format(folder=folder, start=start) for word in shlex.split(others[variant]))
            else:
                made = ("-m", "llada_jax.train", f"--config={path}:variant={variant},seed={seed}", f"--workdir={folder}", *edited)
                trained, made = folder, (*made, f"--init_from={start}") if start else made
            flags, of = asked.get(variant, asked.get("")), "--checkpoint" if variant in others else "--workdir"
            evaluate = () if flags is None else (("-m", "llada_jax.evaluate", f"{of}={folder}", *shlex.split(flags)),)
            found.append(Run(variant, seed, folder, start, trained, (made, *evaluate)))
    return found


def settings_of(module: ModuleType, run: Run, edits: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Every setting of a run, by name, as json holds it."""
    config = module.get_config(f"variant={run.variant},seed={run.seed}")
    config.update_from_flattened_dict(dict(edits or {}))
    return json.loads(json.dumps(config_lib.flatten(config_lib.from_config_dict(config))))


def sweep(path: str, workdir: str, edits: Mapping[str, Any] | None = None, only: int | None = None, dry: bool = False) -> int | None:
    """Run whatever `results.jsonl` in `workdir` has no line of; if `dry`, print the commands instead. `only` is the number of one run, for an array
    of jobs; what it begins with must be there. The exit status: None, or that of a run that a signal stopped.

    Raises ConfigError where a run fails, and before the first one for edits that make two runs alike and for lines of other commands or settings.
    """
    module, results, edits = presets.module_of(path), epath.Path(workdir) / "results.jsonl", dict(edits or {})
    todo, defaults = runs(path, module, workdir, edits), config_lib.flatten(config_lib.Config())
    if only is not None and not 0 <= only < len(todo):
        raise ConfigError(f"--sweep={only}: {path} has the runs 0 to {len(todo) - 1}")
    commands = {run.name: [shlex.join(command) for command in run.commands] for run in runs(path, module, "WORKDIR", edits)}
    settings = {run.name: settings_of(module, run, edits) for run in todo}
    if only is None and (alike := _made_alike({run.name: settings_of(module, run) for run in todo}, settings)):
        raise ConfigError(f"--config.{' --config.'.join(edits)} would make {' and '.join(alike)} the same run; edit {path}")
    done = set()
    for line in metrics.read_jsonl(results):
        if line["name"] not in settings:
            raise ConfigError(f"{results} holds {line['name']}, which is no run of {path}; use another --workdir")
        kept, now = defaults | line["settings"], settings[line["name"]]  # keys that came later are as they were: at their defaults
        different = [f"{key} {kept.get(key)}, now {now[key]}" for key in now if kept.get(key) != now[key]]
        if different or line["commands"] != commands[line["name"]]:
            raise ConfigError(f"{results} holds {line['name']} of other commands or settings"
                              f" ({'; '.join(different[:3]) or line['commands'][0]}); use another --workdir")
        done.add(line["name"])
    for run in todo if only is None else [todo[only]]:
        if dry:
            metrics.say(f"{run.name}{' (done before)' * (run.name in done)}: " + "; ".join(f"python {shlex.join(words)}" for words in run.commands))
        elif run.name in done:
            metrics.say(f"{run.name}: done before")
        elif (line := _run(run)) is None:
            return distributed.STOPPED
        else:
            _append(results, line | {"commands": commands[run.name], "settings": settings[run.name]})
    return None


def _made_alike(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, str] | None:
    """Two runs whose settings differed before and do not after."""
    seen: dict[str, str] = {}
    for name, settings in after.items():
        first = seen.setdefault(json.dumps(settings, sort_keys=True), name)
        if before[first] != before[name]:
            return first, name
    return None


def _run(run: Run) -> dict[str, Any] | None:
    """The line of a run, which is made; None where a signal stopped it."""
    if run.start and not epath.Path(run.start).exists():
        raise ConfigError(f"{run.name} begins with {run.start}, which is not there; make that run first (its line in results.jsonl, if there is one, "
                          "keeps a sweep from doing so)")
    began, figures = time.perf_counter(), {}
    for command in run.commands:
        name = command[1].removeprefix("llada_jax.")
        if name not in ("train", "evaluate") and epath.Path(run.folder).exists():
            continue  # it was written whole before
        printed = _call(run, command)
        if printed is None:
            return None
        if name == "evaluate":
            figures = json.loads(printed.splitlines()[-1])
            del figures["folder"]  # of one machine
    return {"name": run.name, "variant": run.variant, "seed": run.seed, **_measured(run.trained), "evaluate": figures,
            "wall_seconds": round(time.perf_counter() - began, 1), "date": time.strftime("%Y-%m-%d"), "commit": _commit(),
            "versions": checkpoint.versions(), "machine": f"{os.cpu_count()} cores, {hardware.processor()}"}


def _append(results: epath.Path, line: dict[str, Any]) -> None:
    """Add a line, in place of a last one that a kill cut short."""
    if results.exists() and (text := results.read_text()) and not text.endswith("\n"):
        metrics.write_whole(results, "".join(json.dumps(kept) + "\n" for kept in metrics.read_jsonl(results)))
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _call(run: Run, command: Sequence[str]) -> str | None:
    """Standard output of a command, which is shown as it comes; None where a signal stopped it. Raises ConfigError where it fails."""
    metrics.say(f"{run.name}: python {shlex.join(command)}")
    lines, asked = [], []
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:

        def stop(number: int, frame: Any) -> None:
            asked.append(number)
            if number == signal.SIGTERM:  # Ctrl-C reaches all that the terminal has started
                process.send_signal(number)

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        for text in process.stdout or ():
            print(text, end="", flush=True)
            lines.append(text)
    for number, handler in before.items():
        signal.signal(number, handler)
    if process.returncode == distributed.STOPPED or asked:
        return None  # of a command that could still end in time, too: the next one is not begun
    if process.returncode:
        raise ConfigError(f"{run.name} ended with exit status {process.returncode}; the same command goes on from there, --sweep=N with the N-th run")
    return "".join(lines)


def _measured(folder: str) -> dict[str, Any]:
    """What a run folder tells: cost, the last held-out figures, the load of the experts."""
    _, config = checkpoint.read_config(folder)
    lines = metrics.read_jsonl(epath.Path(folder) / "metrics.jsonl")
    trained, held = ([line for line in lines if key in line] for key in ("loss", "heldout_bits_per_byte"))
    tokens, size = config.train.batch_size * config.data.sequence_length, count.parameters(config.model)
    schedule = blocks.Schedule.of(config)
    flops = sum(count.train_flops(config, schedule.clean_half(step)) for step in range(config.train.steps)) * tokens
    loads, levels = ([line[key] for line in trained[-LAST:] if line.get(key)] for key in ("load_by_layer", "load_by_level"))
    return {"steps": config.train.steps, "tokens": tokens * config.train.steps, "flops": flops, "parameters": size.total, "active": size.active,
            "heldout": {key.removeprefix("heldout_"): value for key, value in held[-1].items() if key != "step"} if held else None,
            "epochs": trained[-1].get("epoch"), "curve": [[line["step"], line["heldout_bits_per_byte"]] for line in held],
            "load": float(np.mean(loads)) if loads else None,  # busiest expert / mean
            "load_by_level": metrics.clean(np.array(levels, float).mean((0, 2))) if levels else None,
            "tokens_per_second": float(np.median([line["tokens_per_second"] for line in trained]))}


def _commit() -> str | None:
    git = ["git", "-C", str(epath.Path(__file__).parents[2]), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
