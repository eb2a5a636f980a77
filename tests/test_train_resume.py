"""A run that is killed, stopped or resumed ends as if nothing had happened: same lines, same weights."""

import json
import os
import random
import signal
import time

import pytest

from llada_jax import distributed
from tests import tiny_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("resume")
    tiny_run.write_texts(path / "texts")
    return path


@pytest.fixture(scope="module")
def uninterrupted(folder):
    """(lines, hash of the weights) of a run that nobody disturbed."""
    done = tiny_run.train(*tiny_run.arguments(str(folder / "texts/*.txt"), folder / "reference"))
    assert done.returncode == 0, done.stderr
    return tiny_run.lines(folder / "reference"), tiny_run.weights(done.stdout)


@pytest.fixture()
def arguments(folder, tmp_path):
    return lambda *more: tiny_run.arguments(str(folder / "texts/*.txt"), tmp_path / "run", *more)


def read_until(process, words):
    """Read the process's stdout until it holds `words`; what was read."""
    found = ""
    while words not in found:
        part = os.read(process.stdout.fileno(), 4096).decode()
        assert part, found + process.stderr.read()
        found += part
    return found


def half_written(workdir):
    return list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def steps_saved(workdir):
    return sum(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def kill_inside_a_save(process, workdir, draw):
    """kill -9 soon after a save has begun; True if it left half a checkpoint."""
    at = draw.randint(1, 3)  # which save of this attempt, so that most attempts also get ahead
    seen = set()
    while process.poll() is None and len(seen) < at:
        seen |= {path.name for path in half_written(workdir)}
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.02))
    process.kill()
    process.communicate()
    return bool(half_written(workdir))


def kill_at_random(process, workdir, draw):
    time.sleep(draw.uniform(0, 6))
    process.kill()
    process.communicate()
    return bool(half_written(workdir))


def kill_often(arguments, kills, inside, workdir, draw):
    """Start the same command again and again and kill it, `inside` times in a save; then let it finish. (kills, of them inside a save, output)."""
    killed = found_inside = 0
    while killed < kills:
        process = tiny_run.start(*arguments)
        found_inside += (kill_inside_a_save if found_inside < inside else kill_at_random)(process, workdir, draw)
        if process.returncode != -signal.SIGKILL:
            break
        killed += 1
    done = tiny_run.train(*arguments)
    assert done.returncode == 0, done.stderr
    assert not half_written(workdir), "left-over temporary folders are removed at the start"
    return killed, found_inside, done.stdout


def test_kill_inside_a_save(arguments, uninterrupted, tmp_path):
    killed, inside, output = kill_often(arguments(), 2, 2, tmp_path / "run", random.Random(0))
    assert killed == 2 and inside >= 1
    assert (tiny_run.lines(tmp_path / "run"), tiny_run.weights(output)) == uninterrupted


@pytest.mark.slow
def test_twenty_kills_five_of_them_inside_a_save(folder, tmp_path):
    longer = lambda workdir: tiny_run.arguments(str(folder / "texts/*.txt"), workdir, "--config.train.steps=60", "--config.train.checkpoint_every=2")
    done = tiny_run.train(*longer(tmp_path / "reference"))
    expected = tiny_run.lines(tmp_path / "reference"), tiny_run.weights(done.stdout)
    assert [line["step"] for line in expected[0] if "loss" in line] == list(range(1, 61))
    killed = inside = 0
    for attempt in range(20):
        workdir = tmp_path / str(attempt)
        more, more_inside, output = kill_often(longer(workdir), max(20 - killed, 3), 3, workdir, random.Random(attempt))  # on until five hit a save
        assert (tiny_run.lines(workdir), tiny_run.weights(output)) == expected
        killed, inside = killed + more, inside + more_inside
        if killed >= 20 and inside >= 5:
            break
    assert killed >= 20 and inside >= 5, (killed, inside)


def test_sigterm_saves_and_the_same_command_goes_on(arguments, uninterrupted, tmp_path):
    process = tiny_run.start(*arguments())
    read_until(process, "step ")
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate()
    assert process.returncode == distributed.STOPPED and "stopped by a signal at step" in output, output + errors
    assert steps_saved(tmp_path / "run") and not half_written(tmp_path / "run")
    done = tiny_run.train(*arguments())
    assert "resumed at step" in done.stdout, done.stderr
    assert (tiny_run.lines(tmp_path / "run"), tiny_run.weights(done.stdout)) == uninterrupted


def test_sigterm_before_the_first_step(arguments, uninterrupted, tmp_path):
    process = tiny_run.start(*arguments())
    read_until(process, "compiling")
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate()
    assert process.returncode == distributed.STOPPED and "stopped by a signal at step 0" in output, output + errors
    done = tiny_run.train(*arguments())
    assert "resumed at step 0" in done.stdout, done.stderr
    assert (tiny_run.lines(tmp_path / "run"), tiny_run.weights(done.stdout)) == uninterrupted


def test_sigterm_while_data_is_read_leaves_nothing(arguments, tmp_path):
    process = tiny_run.start(*arguments())
    read_until(process, "run folder")
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate()
    assert process.returncode == distributed.STOPPED and errors == "", output + errors
    assert "nothing to save" in output and not (tmp_path / "run").exists()


def test_intervals_change_no_number(arguments, uninterrupted, tmp_path):
    others = "--config.train.steps_per_call=5", "--config.train.checkpoint_every=7", "--config.train.eval_every=6", "--config.train.log_every=3"
    first, resumed = tiny_run.train_each([arguments(*others), arguments("--config.train.log_every=1")])  # the second finds it finished
    assert first.returncode == resumed.returncode == 0, first.stderr + resumed.stderr
    expected, weights = uninterrupted
    assert tiny_run.weights(first.stdout) == tiny_run.weights(resumed.stdout) == weights
    lines = [line for line in tiny_run.lines(tmp_path / "run") if "loss" in line]
    assert lines == [line for line in expected if "loss" in line and line["step"] % 3 == 0]
    assert "train.log_every: 3 → 1" in resumed.stdout and "train.steps_per_call: 5 → 2" in resumed.stdout


def test_what_a_resumed_run_may_change(arguments, folder, uninterrupted):
    into = lambda *more: tiny_run.arguments(str(folder / "texts/*.txt"), folder / "reference", *more)
    changed = ["--config.model.hidden_size=32", "--config.train.seed=1", "--config.train.batch_size=8", "--config.train.accumulate=2",
               "--config.optimizer.b2=0.9", "--config.data.holdout=0.5", "--config.train.steps=8"]  # fmt: skip
    *refused, allowed, overridden, initial = tiny_run.train_each([
        *map(into, changed), into("--config.kernels.attention=reference", "--config.mesh.data=1", "--config.train.max_skipped=3"),
        into("--config.optimizer.b2=0.9", "--override_saved_config"), into(f"--init_from={folder / 'reference'}")])
    words = ["model.hidden_size: 16 → 32", "train.seed: 0 → 1", "train.batch_size: 4 → 8", "train.accumulate: 1 → 2",
             "optimizer.b2: 0.95 → 0.9", "data.holdout: 0.25 → 0.5", "at step 24, beyond train.steps=8"]  # fmt: skip
    for word, done in zip(words, refused, strict=True):
        assert done.returncode == 1 and word in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert allowed.returncode == 0 and "train.max_skipped: 20 → 3" in allowed.stdout, allowed.stderr
    assert overridden.returncode == 0 and tiny_run.weights(overridden.stdout) == uninterrupted[1], overridden.stderr
    assert initial.returncode == 1 and "already holds checkpoints" in initial.stderr


def test_a_start_from_other_weights(folder, uninterrupted, tmp_path):
    """It takes their tokenizer, says what differs, and goes on by the same command, but not by one with other weights."""
    reference = folder / "reference"
    from_reference = lambda name, *more: tiny_run.arguments(str(folder / "texts/*.txt"), tmp_path / name, f"--init_from={reference}",
                                                            "--config.train.steps=2", "--config.train.checkpoint_every=2", *more)
    trains_none = "--config.data.tokenizer="
    same, other, again, elsewhere = tiny_run.train_each([
        from_reference("same", trains_none), from_reference("other", "--config.model.rope_theta=77"), from_reference("same", trains_none),
        from_reference("same", trains_none, f"--init_from={reference}@4")])
    assert same.returncode == other.returncode == again.returncode == 0, same.stderr + other.stderr + again.stderr
    assert "trained with other settings" not in same.stdout and "extra (ignored): none; its tokenizer\n" in same.stdout
    assert [path.name for path in (tmp_path / "same").glob("tokenizer.*")] == ["tokenizer.bytes.json"]
    assert "trained with other settings: model.rope_theta: 10000.0 → 77.0\n" in other.stdout
    assert "resumed at step 2" in again.stdout and tiny_run.weights(again.stdout) == tiny_run.weights(same.stdout)
    assert elsewhere.returncode == 1 and "already holds checkpoints of one that did not start so" in elsewhere.stderr


def test_a_folder_without_a_checkpoint_starts_afresh(arguments, uninterrupted, tmp_path):
    """Killed before its first save, perhaps under another config: what it left is replaced."""
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text('{"model": {"hidd')
    (tmp_path / "run/tokenizer.model").write_text("half of one")
    (tmp_path / "run/metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 9}) + "\n")
    done = tiny_run.train(*arguments())
    assert done.returncode == 0 and "starting afresh" in done.stdout, done.stderr
    assert (tiny_run.lines(tmp_path / "run"), tiny_run.weights(done.stdout)) == uninterrupted
    assert [path.name for path in (tmp_path / "run").glob("tokenizer.*")] == ["tokenizer.bytes.json"]
    assert json.loads((tmp_path / "run/config.json").read_text())["model"]["vocab_size"] == 258


def test_a_missed_evaluation_is_made_up_for(arguments, folder, uninterrupted):
    """A kill may come between a checkpoint and the evaluation of the same step."""
    path = folder / "reference/metrics.jsonl"
    kept = [line for line in path.read_text().splitlines() if '"step": 24' not in line or "heldout" not in line]
    path.write_text("\n".join(kept) + '\n{"step": 24, "held')
    done = tiny_run.train(*tiny_run.arguments(str(folder / "texts/*.txt"), folder / "reference"))
    assert done.returncode == 0, done.stderr
    assert tiny_run.lines(folder / "reference") == uninterrupted[0]
