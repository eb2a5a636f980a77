"""Train a masked-diffusion (or autoregressive) language model from scratch, or go on with a run.

    python -m llada_jax.train --config=configs/pystdlib.py --workdir=runs/first
    python -m llada_jax.train --config=configs/sudoku.py --config.train.steps=500 --workdir=runs/sudoku

The same command resumes a run that was stopped or killed, at its last complete checkpoint. `:name=value` behind the config
file picks a preset, `--config.group.key=value` edits one setting, `--print_config` shows all of them.

`--init_from=RUN` starts from the weights of another run, and with its tokenizer, unless data.tokenizer or the data bring one. It may stay in the
command that resumes.

Exit status: 0 when the run has all its steps; 75 when a signal or a notice of the cloud stopped it before, on this process or another: it saved
(unless it had not begun), and the same command goes on; 1 for an error, after one line that says which; 130 for a second Ctrl-C.

`--sweep` runs all variants and seeds of an ablation, one after the other, each as a run of its own, and keeps a line of results for each;
the same command goes on where it was stopped:

    python -m llada_jax.train --config=configs/ablations/moe.py --sweep --workdir=runs/moe

On several machines the same command is started on each of them; under srun and on a TPU pod the processes find each other, elsewhere
--coordinator, --num_processes and --process_id say where they are. `launch/local_multiprocess.py` starts several on one machine.
"""

import functools
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from ml_collections import config_flags

from llada_jax import command_line, distributed, partitioning
from llada_jax import config as config_lib
from llada_jax import tokenizer as tokenizer_lib
from llada_jax.data import baselines, pipeline
from llada_jax.data import sources as sources_lib
from llada_jax.diffusion import blocks
from llada_jax.evaluation import footprint, heldout
from llada_jax.model import count, lora, transformer
from llada_jax.training import checkpoint, combine, curves, metrics, optimizer, presets, pretrained, state, step, sweep
from llada_jax.training.metrics import Announce, say

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with an optional preset: configs/x.py:name=value,…")
WORKDIR = flags.DEFINE_string("workdir", None, "Run folder, local or gs://. Default: runs/<config>-<date>.")
INIT_FROM = flags.DEFINE_string("init_from", None, "Start at step 0 with the parameters, and by default the tokenizer, of DIR or DIR@step.")
OVERRIDE = flags.DEFINE_bool("override_saved_config", False, "Resume although settings differ from the run's.")
PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Print all settings and exit.")
LIST_CONFIGS = flags.DEFINE_bool("list_configs", False, "List the configs with parameters, memory and expected time, and exit.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Build data and shapes, print them, and exit.")
PROFILE = flags.DEFINE_string("profile_steps", None, "FIRST:LAST steps to trace with jax.profiler into <workdir>/profile.")
SWEEP = flags.DEFINE_flag(flags.Flag(command_line.Number(), None, "sweep", None, "Run all variants and seeds of a file under configs/ablations/, or, "
                                     "as --sweep=N, the N-th run; lines go to <workdir>/results.jsonl. --dry_run prints the commands.", boolean=True))
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 of several. Default: what SLURM or a TPU pod says.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: the number of this process, from 0.")
HEARTBEAT = flags.DEFINE_integer("heartbeat_seconds", 30, "A process that is silent for so long is dead; the runtime ends the others.", lower_bound=1)
STALL = flags.DEFINE_float("stall_seconds", 600, "Without progress for so long a process writes the stacks of its threads.", lower_bound=1)
ORIGIN = "init_from.txt"  # in the run folder: what --init_from was


def main() -> int | None:
    """Train or resume as the flags say; the recipe from top to bottom. Raises ConfigError, StoppedError when a run diverges."""
    # ---- settings -----------------------------------------------------------------------------------------------------
    if LIST_CONFIGS.value:
        return presets.print_table()
    if CONFIG.value is None:
        raise config_lib.ConfigError("--config is missing; for example --config=configs/pystdlib.py (--list_configs lists them)")
    if SWEEP.value is not None:
        return _sweep()
    config = config_lib.from_config_dict(CONFIG.value)
    if PRINT_CONFIG.value:
        return print("\n".join(f"--config.{key}={value!r}" for key, value in config_lib.flatten(config).items()))
    if config.model.param_dtype != "float32" and not config.model.lora_rank:
        raise config_lib.ConfigError(f"model.param_dtype={config.model.param_dtype}: training keeps float32 weights; "
                                     "model.compute_dtype may be bfloat16, or train adapters alone (model.lora_rank)")
    train = config.train
    metrics.check_writers(train.wandb)
    workdir = WORKDIR.value or f"runs/{presets.name_of(flags.FLAGS['config'].config_filename)}-{time.strftime('%Y%m%d-%H%M%S')}"
    started = time.perf_counter()

    # ---- processes ----------------------------------------------------------------------------------------------------
    processes = distributed.start(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, HEARTBEAT.value)
    stop = distributed.Stop()
    workdir = distributed.from_first("workdir", workdir)
    distributed.first_alone("run folder", lambda: _check_writable(workdir))
    distributed.divert_output(workdir)
    settings = config_lib.flatten(config) | {"--init_from": INIT_FROM.value, "--profile_steps": PROFILE.value}
    distributed.check_same("start", settings | distributed.source_hashes() | checkpoint.versions())

    # ---- devices and mesh ---------------------------------------------------------------------------------------------
    partitioning.setup_devices(train.batch_size // train.accumulate, mesh=config.mesh, processes=processes)
    command_line.use_compilation_cache()
    mesh = partitioning.make_mesh(config.mesh)
    partitioning.check_batch(train.batch_size, train.accumulate, mesh)
    part, parts = partitioning.batch_share(mesh)
    device = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s) in {jax.process_count()} process(es)"
    say(f"run folder {workdir} · {device} · mesh {' '.join(f'{axis}={size}' for axis, size in mesh.shape.items())}")

    # ---- the run folder -----------------------------------------------------------------------------------------------
    saved_step = _check_workdir(workdir, config)
    if config.diffusion.objective == "preference" and saved_step is None and not INIT_FROM.value:
        raise config_lib.ConfigError("diffusion.objective=preference compares with the weights that it begins with: name them in --init_from")
    profile = _profile_range(PROFILE.value, saved_step or 0, train.steps)

    # ---- tokenizer and data -------------------------------------------------------------------------------------------
    with Announce("tokenizer and data"):
        sources = sources_lib.load(config.data)
        tokenizer = distributed.first_alone("tokenizer", lambda: _first_tokenizer(config, workdir, saved_step, sources, processes))
        tokenizer = tokenizer or pipeline.build_tokenizer(config, workdir, sources)
        config = config_lib.with_vocab_size(config, tokenizer.vocab_size)
        data = pipeline.build(config, tokenizer, "train", sources)
        held_out = pipeline.build(config, tokenizer, "heldout", sources)
    distributed.check_same("data", {"rows to train on": data.num_rows, "held-out rows": held_out.num_rows, "tokenizer": tokenizer.fingerprint,
                                    f"the newest checkpoint of {workdir}": saved_step})
    say(f"data: {data.describe()}; held out: {held_out.describe()}; vocabulary {tokenizer.vocab_size}")
    wanted = min(train.eval_batches * train.batch_size or held_out.num_rows, held_out.num_rows) if train.eval_every else 0
    rows = held_out.rows(np.arange(wanted)) if wanted else None
    if rows is not None and config.diffusion.objective == "preference":
        pairs = pipeline.build(config, tokenizer, "heldout_pairs", sources)
        pairs = pairs.rows(np.arange(min(2 * wanted, pairs.num_rows)))
    else:
        pairs = None

    # ---- model and optimizer ------------------------------------------------------------------------------------------
    model = transformer.build(config.model, config.kernels, mesh)
    update = optimizer.make(config.optimizer, train.steps, model.shapes["params"])
    size = count.parameters(config.model)
    tokens_per_step = train.batch_size * config.data.sequence_length
    say(f"model: {size.total:,} parameters, {size.active:,} active a token; {train.steps} steps of {tokens_per_step:,} tokens; "
        f"weights, gradients and moments{', reference' * config.keeps_reference} {count.state_bytes(config) / 2**20:,.0f} MiB")
    create, seed = functools.partial(state.create, model, update, config), jnp.uint32(train.seed)  # traced: all seeds share their programs
    like = jax.eval_shape(create, seed)
    shardings = state.shardings(model, like, mesh)
    if DRY_RUN.value:
        for path, leaf in jax.tree_util.tree_leaves_with_path(like.variables):
            say(f"  {optimizer.path_of(path)}  {leaf.dtype}{list(leaf.shape)}")
        return say("dry run: data and shapes are fine; nothing was trained")

    # ---- state: own checkpoint → --init_from → scratch ----------------------------------------------------------------
    stop.begin()
    open_checkpoints = lambda: checkpoint.Checkpointer(workdir, train.keep_last, train.keep_every)  # makes the folder
    with footprint.explained(config, mesh):
        if saved_step is None:
            run = jax.jit(create, out_shardings=shardings)(seed)
            if INIT_FROM.value:
                run = _init_from(INIT_FROM.value, run, config, tokenizer)
            checkpoints = open_checkpoints()
        else:
            checkpoints = open_checkpoints()
            place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            run = checkpoints.restore(jax.tree.map(place, like, shardings), saved_step)
            say(f"resumed at step {saved_step}")
        first = int(run.step)  # waits until the state is there
    if jax.process_index() == 0:
        if saved_step is None:
            _keep_tokenizer(tokenizer, workdir)
            (epath.Path(workdir) / ORIGIN).unlink(missing_ok=True)
            if INIT_FROM.value:
                metrics.write_whole(epath.Path(workdir) / ORIGIN, INIT_FROM.value)
        metrics.write_whole(epath.Path(workdir) / "config.json", config_lib.to_json(config))

    # ---- compile ------------------------------------------------------------------------------------------------------
    schedule = blocks.Schedule.of(config)
    plan = step.calls(first, train, (*schedule.switches(), *(profile or ())))
    stream = data.batches(train.seed, plan, train.batch_size, part, parts)
    calls: dict[bool, Any] = {}  # one program, or two where the clean half of block diffusion comes and goes
    for clean_half in dict.fromkeys(schedule.clean_half(steps[0]) for steps in plan):
        with Announce("compiling the training step" + " with the clean half" * clean_half), footprint.explained(config, mesh):
            gradients = functools.partial(step.gradients, clean_half=clean_half)
            call = step.make_call(step.make_step(model, update, config, tokenizer.mask_id, gradients), shardings)
            example = next(data.batches(train.seed, [max(plan, key=len)], train.batch_size, part, parts))
            calls[clean_half] = call.lower(run, partitioning.put_batch(mesh, example, 1, parts), jnp.int32(1), seed).compile()
    evaluate = heldout.make(model, config, mesh, tokenizer.mask_id)
    rewards = heldout.make_rewards(model, config, mesh, tokenizer.mask_id) if pairs is not None and len(pairs["tokens"]) else None
    peak, peak_name = metrics.device_peak()

    # ---- the loop -----------------------------------------------------------------------------------------------------
    writer = metrics.Writers(workdir, first, train.tensorboard, train.wandb)
    evaluated = distributed.from_first("evaluated", first > 0 and any(
        line["step"] == first and "heldout_bits_per_byte" in line for line in metrics.read_jsonl(epath.Path(workdir) / "metrics.jsonl")))
    trace, watchdog = metrics.Profile(profile, workdir), distributed.Watchdog(STALL.value)
    pending: tuple[int, int, Any] | None = None  # first step, number and metrics of the call under way
    clock = last_said = time.perf_counter()
    unsaid_steps, unsaid_seconds = 0, 0.0  # since the last progress line, without evaluations and checkpoints
    now = first

    def report() -> None:
        """Fetch and write the metrics of the pending call; the device already works on the next one."""
        nonlocal pending, clock, last_said, unsaid_steps, unsaid_seconds
        if pending is None:
            return
        begin, number, values = pending
        pending = None
        values = jax.tree.map(np.asarray, values)
        watchdog.progress(f"step {begin + number}")
        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        unsaid_steps, unsaid_seconds = unsaid_steps + number, unsaid_seconds + seconds
        for i in range(number):
            at = begin + i + 1
            line = metrics.summarize(jax.tree.map(lambda x, i=i: x[i], values))
            diverged = values["skipped_in_a_row"][i] >= train.max_skipped
            if at % train.log_every == 0 or at == train.steps or diverged:
                epoch = round(data.epochs(at * train.batch_size), 4)
                writer.write(at, line | {"epoch": epoch, "tokens_per_second": round(number * tokens_per_step / seconds)})
            if diverged:
                raise config_lib.StoppedError(_diverged(begin + i, config, checkpoints))
        if clock - last_said > 5 or begin == first or begin + number == train.steps:
            rate = unsaid_steps / unsaid_seconds
            last_said, unsaid_steps, unsaid_seconds = clock, 0, 0.0
            left = metrics.duration((train.steps - begin - number) / rate)
            flops = count.train_flops(config, schedule.clean_half(begin)) * tokens_per_step
            skipped = f"  skipped {line['skipped']}" if line["skipped"] else ""
            say(f"step {begin + number:>6}/{train.steps}  loss {line['loss'] if line['loss'] is not None else 'not finite'}  "
                f"{rate * tokens_per_step:,.0f} tokens/s  {rate * flops / peak:.1%} of {peak_name}  ETA {left}{skipped}")

    def evaluate_now() -> None:
        nonlocal clock
        report()
        if rows is None or stop.now():
            return
        with Announce(f"held-out evaluation of {wanted} rows"):
            figures = evaluate(run.variables, rows, train.eval_draws)
            if rewards:
                figures |= rewards(run.variables, run.reference, pairs)
        writer.write(now, {f"heldout_{key}": metrics.clean(value) for key, value in figures.items()})
        say(f"held out at step {now}: {heldout.describe(figures)}")
        curves.draw(workdir)
        watchdog.progress(f"the evaluation at step {now}")
        clock = time.perf_counter()

    try:
        if train.eval_every and not evaluated and (first % train.eval_every == 0 or first == train.steps):
            evaluate_now()  # at the start, and where a kill came between a checkpoint and its evaluation
        for steps, batches in zip(plan, stream, strict=True):
            if stop.between_calls():
                break
            number = len(steps)
            trace.before(now, run)
            run, values = calls[schedule.clean_half(now)](run, partitioning.put_batch(mesh, batches, 1, parts), jnp.int32(number), seed)
            report()
            checkpoints.check()
            pending, now = (now, number, values), now + number
            if (now % train.checkpoint_every == 0) or now == train.steps:
                report()
                checkpoints.save(run, config)
                clock = time.perf_counter()
            if train.eval_every and (now % train.eval_every == 0 or now == train.steps):
                evaluate_now()
        report()
        trace.stop(run)
        if stop.agreed:
            checkpoints.save(run, config)
        checkpoints.wait()
    except jax.errors.JaxRuntimeError as error:
        distributed.explain_loss(error)
        footprint.reraise(error, config, mesh)
    finally:
        watchdog.close()
        writer.close()
        checkpoints.close()

    # ---- closing lines ------------------------------------------------------------------------------------------------
    curves.draw(workdir)
    if stop.agreed and now < train.steps:
        say(f"stopped by a signal at step {now}; checkpoint saved; the same command goes on")
        return distributed.STOPPED
    weights = checkpoint.tree_hash(run.variables)[:16]
    say(f"finished {now} steps in {metrics.duration(time.perf_counter() - started)}; weights sha256 {weights}")
    if jax.process_index() == 0 and rows is not None and not rewards and config.data.sources != "sudoku" and baselines.comparable(rows):
        simple = baselines.measure(data.stream(), held_out.stream(wanted), tokenizer)
        say("on the same held-out files, bits a byte: " + ", ".join(f"{name} {bits:.2f}" for name, bits in simple.items()))
    say(f"curves: {epath.Path(workdir) / 'curves.png'}")
    return None


def _sweep() -> int | None:
    """Every run in a process of its own, with the edits of the config that stand in this command line. The exit status."""
    for flag in (INIT_FROM, PRINT_CONFIG, PROFILE, OVERRIDE):
        if flag.value:
            raise config_lib.ConfigError(f"--{flag.name} is for one run and not for --sweep, whose runs --dry_run lists"
                                         + "; what they begin with stands in FROM of the config file" * (flag is INIT_FROM))
    path = flags.FLAGS["config"].config_filename
    if not epath.Path(path).exists():
        raise config_lib.ConfigError(f"no config file {path}; a sweep takes one without a preset, since it runs all variants and seeds")
    edits = config_flags.get_override_values(flags.FLAGS["config"])
    only = None if SWEEP.value == command_line.ALL else int(SWEEP.value)
    return sweep.sweep(path, WORKDIR.value or f"runs/{presets.name_of(path)}", edits, only, DRY_RUN.value)


def _check_writable(workdir: str) -> None:
    """Raise ConfigError where a local run folder is none, or may not be made or written."""
    folder = epath.Path(workdir)
    if "://" not in workdir:
        present = next(path for path in (folder, *folder.parents) if path.exists())
        if not present.is_dir():
            raise config_lib.ConfigError(f"--workdir={workdir}: {present} is a file")
        if not os.access(present, os.W_OK):
            raise config_lib.ConfigError(f"--workdir={workdir}: {present} may not be written")


def _check_workdir(workdir: str, config: config_lib.Config) -> int | None:
    """The step to resume from, or None for a new run. Raises ConfigError when the folder belongs to another config."""
    folder = epath.Path(workdir)
    if not checkpoint.steps_of(workdir):
        if (folder / "config.json").exists():
            say(f"{workdir} holds no checkpoint yet: starting afresh")
        return None
    if INIT_FROM.value and not ((folder / ORIGIN).exists() and (folder / ORIGIN).read_text() == INIT_FROM.value):
        raise config_lib.ConfigError(f"--init_from={INIT_FROM.value} starts a new run, but {workdir} already holds checkpoints of one that did not "
                                     "start so; use another --workdir")
    saved_step, saved = checkpoint.read_config(workdir)
    allowed, forbidden = checkpoint.differences(saved, config_lib.with_vocab_size(config, saved.model.vocab_size))
    for line in allowed:
        say(f"resuming with {line}")
    if forbidden and not OVERRIDE.value:
        raise config_lib.ConfigError(f"{workdir} is a run of another config: {'; '.join(forbidden)}; "
                                     "use another --workdir, or --override_saved_config")
    if not any(folder.glob("tokenizer.*")):
        raise config_lib.ConfigError(f"{workdir} holds checkpoints but no tokenizer.*; put back the one that it was trained with")
    if saved_step > config.train.steps:
        raise config_lib.ConfigError(f"{workdir} is at step {saved_step}, beyond train.steps={config.train.steps}")
    return saved_step


def _first_tokenizer(config: config_lib.Config, workdir: str, saved_step: int | None, sources: Any, processes: int) -> tokenizer_lib.Tokenizer:
    """That of process 0; the others of a new run read it from the run folder."""
    origin = _origin(INIT_FROM.value)[0] if INIT_FROM.value and saved_step is None else ""
    tokenizer = pipeline.build_tokenizer(config, "" if saved_step is None else workdir, sources, origin)
    if processes > 1 and saved_step is None:
        _keep_tokenizer(tokenizer, workdir)
    return tokenizer


def _keep_tokenizer(tokenizer: tokenizer_lib.Tokenizer, workdir: str) -> None:
    """Put it into the run folder, in place of that of a run that ended before its first checkpoint."""
    for left_over in epath.Path(workdir).glob("tokenizer.*"):
        left_over.unlink()
    tokenizer.save(workdir)


def _origin(source: str) -> tuple[str, int | None]:
    """Folder and step of `DIR` or `DIR@step`. Raises ConfigError for a folder that no run of ours has finished writing."""
    named = re.fullmatch(r"(.+)@(\d+)", source)
    folder, at = (named[1], int(named[2])) if named else (source, None)
    if pretrained.is_published(folder):
        raise config_lib.ConfigError(f"{folder} is a published folder; import it first: python -m llada_jax.convert import --hf_dir={folder} --out=…")
    pretrained.check_finished(folder)
    return folder, at


def _init_from(source: str, run: state.TrainState, config: config_lib.Config, tokenizer: Any) -> state.TrainState:
    """Parameters of `DIR` or `DIR@step`, at step 0; prints what the checkpoint lacks, what it has besides, and what it was trained with."""
    folder, at = _origin(source)
    found, theirs = checkpoint.read_config(folder, at)
    leaves, adapters = checkpoint.read_leaves(folder, found), lambda model: [getattr(model, key) for key in lora.OFF]
    others = adapters(theirs.model) != adapters(config.model) or config.diffusion.objective == "preference"
    merged = theirs.model.lora_rank and others
    if merged:  # else they would be lost, go on as other adapters, or be missing in what they are compared with
        leaves = combine.plain(leaves, theirs.model)
    variables, missing, extra = checkpoint.load_matching(folder, found, run.variables, leaves)
    same = tokenizer_lib.load(folder).fingerprint == tokenizer.fingerprint
    say(f"parameters from {folder} step {found}{', its adapters merged into its weights' if merged else ''}: "
        f"{len(jax.tree.leaves(variables)) - len(missing)} tensors; "
        f"missing (kept at their initial values): {', '.join(missing) or 'none'}; extra (ignored): {', '.join(extra) or 'none'}"
        + "; its tokenizer" * same)
    free = ("init_std", "compute_dtype", "param_dtype", "remat", "scan_layers", *lora.OFF)  # not the architecture
    changes = [change for group in checkpoint.differences(theirs, config) for change in group]
    other = [change for change in changes if change.startswith("model.") and not change.startswith(tuple(f"model.{key}:" for key in free))]
    if not same:
        other.append(f"the tokenizer (--config.data.tokenizer={folder} takes theirs)")
    if other:
        say(f"note: these weights were trained with other settings: {'; '.join(other)}")
    copies = {name: jax.tree.map(jnp.copy, variables["params"]) for name in checkpoint.COPIES if getattr(run, name) is not None}
    return run._replace(variables=variables, **copies)


def _diverged(at: int, config: config_lib.Config, checkpoints: checkpoint.Checkpointer) -> str:
    first = at * config.train.batch_size
    checkpoints.wait()
    good = checkpoints.latest_step()
    return (f"stopped at step {at + 1}: {config.train.max_skipped} steps in a row had a non-finite loss or gradient (train.max_skipped); "
            f"the last batch held samples {first}..{first + config.train.batch_size - 1}; "
            f"the last good checkpoint is {'none' if good is None else f'step {good}'}; "
            f"try a smaller optimizer.learning_rate={config.optimizer.learning_rate}")


def _profile_range(text: str | None, start: int, steps: int) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise config_lib.ConfigError(f"--profile_steps={text!r} is not FIRST:LAST, for example 20:25")
    if not start <= int(first) < steps:
        raise config_lib.ConfigError(f"--profile_steps={text} lies outside this run, which goes from step {start} to {steps}")
    return int(first), int(last)


if __name__ == "__main__":
    command_line.run(lambda: distributed.end_together(main()))
