"""Writers, numbers and lines for the one who watches; profiles."""

import json
import re
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.training import metrics
from tests import tiny_run


def test_numbers_become_json():
    values = [jnp.float32(jnp.nan), np.float64(1 / 3), np.int32(3), [None, np.nan, 0.25, [np.inf]], np.array([1.5, np.nan]), None]
    line = json.dumps(metrics.clean(values), allow_nan=False)
    assert json.loads(line) == [None, 0.333333, 3, [None, None, 0.25, [None]], [1.5, None], None]


def test_a_resumed_file_holds_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 1}\n{"step": 4, "lo')
    writer = metrics.Writers(str(tmp_path), 2, False, "")
    writer.write(3, {"loss": 5})
    writer.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": i, "loss": loss} for i, loss in ((1, 3), (2, 2), (3, 5))]
    metrics.Writers(str(tmp_path), 0, False, "").close()
    assert path.read_text() == "", "a new run starts an empty file"


def test_wandb_gets_scalars_and_the_run_goes_on_under_the_same_name(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finished"))
    stub = types.ModuleType("wandb")
    stub.init = lambda **named: calls.append(named) or run
    monkeypatch.setitem(sys.modules, "wandb", stub)
    metrics.check_writers("project")
    (tmp_path / "run").mkdir()
    for start in 0, 4:
        writer = metrics.Writers(str(tmp_path / "run"), start, False, "project")
        writer.write(start + 1, {"loss": 0.5, "loss_by_level": [1.0, None], "note": None})
        writer.close()
    assert calls[0] == calls[3] and calls[0]["project"] == "project" and calls[0]["resume"] == "allow" and calls[0]["id"].startswith("run-")
    assert calls[1] == (1, {"loss": 0.5, "loss_by_level/0": 1.0}) and calls[2] == "finished"


TENSORBOARD = """
import sys
sys.modules |= {"tensorflow": None, "torch": None}  # importing them fails, also where they are installed
from llada_jax.training import metrics
for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
    writer = metrics.Writers(sys.argv[1], start, True, "")
    for step in steps:
        writer.write(step, {"loss": step + start / 10, "load_by_layer": [1.0, 2.0]})
    writer.close()
"""


def test_tensorboard_without_tensorflow(tmp_path):
    done = subprocess.run([sys.executable, "-c", TENSORBOARD, str(tmp_path)], capture_output=True, text=True, env=tiny_run.environment())
    assert done.returncode == 0, done.stderr
    from tensorboardX import proto
    events = []
    for path in sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:  # length (8 bytes), its checksum (4), the event, its checksum (4)
            size = int.from_bytes(data[:8], "little")
            events.append(proto.event_pb2.Event.FromString(data[12:12 + size]))
            data = data[16 + size:]
    scalars = [(event.step, value.tag, round(value.simple_value, 3)) for event in events for value in event.summary.value]
    assert {tag for _, tag, _ in scalars} == {"loss", "load_by_layer/0", "load_by_layer/1"}
    assert [(step, value) for step, tag, value in scalars if tag == "loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (3, 3.2), (4, 4.2)]
    restarts = [event.step for event in events if event.session_log.status == proto.event_pb2.SessionLog.START]
    assert 3 in restarts, "readers drop what stood at step 3 and beyond"


@pytest.mark.parametrize("seconds, text", [(0.4, "0:00"), (90, "1:30"), (7300, "2:01:40"), (400_000, "4.6 days")])
def test_duration(seconds, text):
    assert metrics.duration(seconds) == text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, stdout) of a run with TensorBoard and a profile of its last steps."""
    folder = tmp_path_factory.mktemp("run")
    arguments = tiny_run.arguments(tiny_run.write_texts(folder / "texts"), folder / "run", "--config.train.tensorboard", "--profile_steps=21:99")
    done = tiny_run.train(*arguments)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return folder / "run", done.stdout


def test_what_a_run_says(run):
    folder, output = run
    assert re.search(r"^compiling the training step … \d+ s$", output, re.M)
    line = r"^step +(\d+)/24  loss \d+\.\d+  [\d,]+ tokens/s  \d+\.\d% of f32 GEMM measured  ETA \d+:\d\d$"
    assert re.findall(line, output, re.M)[-1] == "24"
    assert re.search(r"^held out at step 24: \d\.\d{4} ± \d\.\d{4} bits a byte \(bound\)", output, re.M)
    assert re.search(r"bits a byte: unigram \d\.\d\d, bigram \d\.\d\d, gzip \d\.\d\d$", output, re.M)
    assert output.splitlines()[-1] == f"curves: {folder / 'curves.png'}"
    assert all(line["tokens_per_second"] > 0 for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in line)


def test_a_profile_that_reaches_the_last_step_is_written(run):
    folder, output = run
    assert "profile written to" in output
    assert list((folder / "profile").rglob("*.xplane.pb"))


def test_a_run_without_a_finite_loss_stops(tmp_path):
    settings = "--config.optimizer.learning_rate=1e38", "--config.optimizer.weight_decay=1e4", "--config.train.max_skipped=5"
    done = tiny_run.train(*tiny_run.arguments(tiny_run.write_texts(tmp_path / "texts"), tmp_path / "run", *settings))
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "loss not finite" in done.stdout
    assert re.match(r"error: stopped at step 6: 5 steps in a row .* samples 20\.\.23; the last good checkpoint is step 4;", done.stderr), done.stderr
    lines = [line for line in tiny_run.lines(tmp_path / "run") if "loss" in line]
    assert [(line["step"], line["skipped"], line["loss"] is None) for line in lines] == [(1, 0, False), *((i, i - 1, True) for i in range(2, 7))]
