"""Several processes on the loopback interface (gloo): one run's noise, losses and weights; they start, stop and end together."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import psutil
import pytest
from jax.experimental import multihost_utils

from llada_jax import config as config_lib
from llada_jax import distributed, partitioning
from llada_jax import tokenizer as tokenizer_lib
from llada_jax.data import pipeline
from llada_jax.diffusion import corrupt
from tests import tiny_run

ROOT = pathlib.Path(__file__).resolve().parents[1]
HEARTBEAT = 10  # seconds


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return tiny_run.write_texts(tmp_path_factory.mktemp("multihost") / "texts")


def environment(devices):
    return tiny_run.environment() | {"JAX_NUM_CPU_DEVICES": str(devices)}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(processes, devices, *args):
    """The launcher of so many processes with so many devices each."""
    command = [sys.executable, "launch/local_multiprocess.py", f"--processes={processes}", f"--devices_per_process={devices}",
               f"--heartbeat_seconds={HEARTBEAT}", "--", *args]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(devices))


def finish(process, status=0):
    output, errors = process.communicate()
    assert process.returncode == status, output + errors
    return output


def one_process(devices, *args):
    done = subprocess.run([sys.executable, "-m", "llada_jax.train", *args], cwd=ROOT, capture_output=True, text=True, env=environment(devices))
    assert done.returncode == 0, done.stderr
    return done.stdout


def same_within_rounding(lines, expected):
    """Equal steps and fields, and losses within 1e-5."""
    assert [(line["step"], line.keys()) for line in lines] == [(line["step"], line.keys()) for line in expected]
    for key in ("loss", "grad_norm", "heldout_nats_per_token"):
        values, wanted = ([line[key] for line in found if key in line] for found in (lines, expected))
        np.testing.assert_allclose(values, wanted, rtol=1e-5, err_msg=key)


# ---- one run, however many processes ----------------------------------------------------------------------------------


def test_two_processes_train_as_one(texts, tmp_path):
    """With a tokenizer that is trained for the run, by one of them."""
    short = "--config.train.steps=6", "--config.train.eval_every=6", "--config.data.tokenizer=", "--config.data.vocab_size=300"
    output = finish(launch(2, 1, *tiny_run.arguments(texts, tmp_path / "two", *short)))
    one_process(2, *tiny_run.arguments(texts, tmp_path / "one", *short))
    same_within_rounding(tiny_run.lines(tmp_path / "two"), tiny_run.lines(tmp_path / "one"))
    assert output.count("step      6/6") == 1 and "in 2 process(es)" in output, "process 0 alone has the screen"
    log = (tmp_path / "two/logs/host_1.txt").read_text()
    assert "step      6/6" in log and tiny_run.weights(log) == tiny_run.weights(output)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()} | {"logs"}
    assert (tmp_path / "two/tokenizer.model").read_bytes() == (tmp_path / "one/tokenizer.model").read_bytes()


def noise(mesh, part, parts, texts):
    """Batches of five steps in two calls and their noise, all rows on this host."""
    config = tiny_run.get_config()
    config.data.sources, config.train.batch_size = texts, 8
    config = config_lib.from_config_dict(config)
    data = pipeline.build(config, tokenizer_lib.Bytes(), "train")
    process = corrupt.Noise.of(config.diffusion, 7)

    @jax.jit
    def draw(step, batch):
        key, unit_BT = (3, step, 0), batch["segment"] * 0
        t_BU = corrupt.times(key, batch["index"], 1, 8, config.diffusion.time_sampling)
        return corrupt.corrupt(key, batch["index"], batch["tokens"], batch["maskable"], unit_BT, process, t_BU)

    found, step = {}, 0
    for steps, stacked in zip((range(3), range(3, 5)), data.batches(3, [range(3), range(3, 5)], 8, part, parts), strict=True):
        batches = partitioning.put_batch(mesh, stacked, 1, parts)
        for k, step in enumerate(steps):
            batch = {key: x[k] for key, x in batches.items()}
            for name, x in {**batch, **dict(zip(("noisy", "masked", "p"), draw(step, batch), strict=True))}.items():
                found[f"{step} {name}"] = multihost_utils.process_allgather(x, tiled=True)
    return found


CHILD = """
import sys
import jax, numpy as np
from llada_jax import config, distributed, partitioning
from tests.test_multihost import noise
port, processes, process, texts, out = sys.argv[1:]
distributed.start(f"127.0.0.1:{port}", int(processes), int(process), 10)
partitioning.setup_devices()
mesh = partitioning.make_mesh(config.Mesh())
found = noise(mesh, *partitioning.batch_share(mesh), texts)
if int(process) == 0:
    np.savez(out, devices=mesh.size, **found)
distributed.end_together()
"""


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_batches_and_noise_are_those_of_one_process(processes, texts, tmp_path):
    port, here = str(free_port()), {"XLA_FLAGS": " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)}
    children = [subprocess.Popen([sys.executable, "-c", CHILD, port, str(processes), str(i), texts, str(tmp_path / "found.npz")],
                                 cwd=ROOT, env=environment(1) | here, stderr=subprocess.PIPE, text=True) for i in range(processes)]
    errors = [child.communicate()[1] for child in children]
    assert not any(child.returncode for child in children), errors
    found = np.load(tmp_path / "found.npz")
    assert found["devices"] == processes
    expected = noise(partitioning.make_mesh(config_lib.Mesh(), jax.devices()[:1]), 0, 1, texts)
    assert set(found) - {"devices"} == set(expected) and 0 < expected["0 masked"].mean() < 1
    for name, x in expected.items():
        assert x.dtype == found[name].dtype and (x == found[name]).all(), name


@pytest.mark.slow
def test_two_processes_share_each_row(texts, tmp_path):
    """The tensor axis crosses them: both are given the whole batch, and hold parts of the weights, also those that a run starts from."""
    axes = "--config.mesh.data=1", "--config.mesh.tensor=2", "--config.train.steps=8"
    output = finish(launch(2, 1, *tiny_run.arguments(texts, tmp_path / "two", *axes)))
    one_process(2, *tiny_run.arguments(texts, tmp_path / "one", *axes))
    same_within_rounding(tiny_run.lines(tmp_path / "two"), tiny_run.lines(tmp_path / "one"))
    start = tiny_run.arguments(texts, tmp_path / "third", *axes, f"--init_from={tmp_path / 'two'}", "--config.optimizer.learning_rate=0",
                               "--config.train.eval_every=0")
    third = finish(launch(2, 1, *start))
    assert "missing (kept at their initial values): none" in third
    assert tiny_run.weights(third) == tiny_run.weights(output), "the weights that it started from, gathered from both"


# ---- ends and restarts ------------------------------------------------------------------------------------------------


def wait_for_step(launcher, workdir, step):
    while not (workdir / f"checkpoints/{step}").exists():
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.05)


def rank(launcher, number):
    return next(child for child in psutil.Process(launcher.pid).children() if f"--process_id={number}" in child.cmdline())


@pytest.mark.slow
def test_a_killed_and_a_stopped_run_go_on_bit_for_bit(texts, tmp_path):
    """kill -9 of one of four processes; the same command, and SIGTERM to one of them; the rest on two processes of two devices."""
    settings = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.train.steps=300", "--config.train.checkpoint_every=20",
                "--config.train.eval_every=0", "--config.optimizer.schedule=constant"]
    reference = finish(launch(2, 2, *tiny_run.arguments(texts, tmp_path / "reference", *settings)))
    arguments = tiny_run.arguments(texts, tmp_path / "run", *settings)

    launcher = launch(4, 1, *arguments)
    wait_for_step(launcher, tmp_path / "run", 40)
    others = psutil.Process(launcher.pid).children()
    rank(launcher, 2).kill()
    gone, alive = psutil.wait_procs(others, timeout=HEARTBEAT + 10)
    assert len(gone) == 4 and not alive, "the runtime ends the others"
    output, errors = launcher.communicate()
    assert launcher.returncode == 1 and "error: process 2 of 4 was ended by SIGKILL" in errors.splitlines()[-1], errors
    assert "Traceback" not in errors and all("another process of this run is gone" in line for line in errors.splitlines()[:-1]), errors
    assert f"the last complete checkpoint of {tmp_path / 'run'} is step " in errors.splitlines()[-1]

    launcher = launch(4, 1, *arguments)
    wait_for_step(launcher, tmp_path / "run", 140)
    rank(launcher, 3).send_signal(signal.SIGTERM)
    output = finish(launcher, distributed.STOPPED)
    stopped = int(output.split("stopped by a signal at step ")[1].split(";")[0])
    logs = [path.read_text() for path in sorted((tmp_path / "run/logs").iterdir())]
    assert len(logs) == 3 and all(f"stopped by a signal at step {stopped};" in log for log in logs), "all of them, at the same step"
    assert (tmp_path / f"run/checkpoints/{stopped}").exists() and 140 <= stopped < 300

    resumed = finish(launch(2, 2, *arguments))
    assert f"resumed at step {stopped}" in resumed and "in 2 process(es)" in resumed
    assert tiny_run.weights(resumed) == tiny_run.weights(reference)
    assert tiny_run.lines(tmp_path / "run") == tiny_run.lines(tmp_path / "reference")

    one_process(4, *tiny_run.arguments(texts, tmp_path / "one", *settings, "--config.train.steps=20"))
    same_within_rounding(tiny_run.lines(tmp_path / "run")[:20], tiny_run.lines(tmp_path / "one"))


@pytest.mark.slow
def test_ctrl_c_reaches_all_and_a_hang_is_written_down(texts, tmp_path):
    """The launcher passes the signal on; process 1 hangs (SIGSTOP of the other) longer than it waits for progress."""
    launcher = launch(2, 1, *tiny_run.arguments(texts, tmp_path / "run", "--config.train.steps=100000", "--config.train.eval_every=0",
                                                "--stall_seconds=2"))
    wait_for_step(launcher, tmp_path / "run", 20)
    first = rank(launcher, 0)
    first.suspend()
    log = tmp_path / "run/logs/host_1.txt"
    while "no progress for 2 s after step" not in log.read_text():
        time.sleep(0.1)
        assert launcher.poll() is None
    first.resume()
    launcher.send_signal(signal.SIGINT)
    assert "stopped by a signal at step" in finish(launcher, distributed.STOPPED)
    assert "train.py" in log.read_text().split("no progress for")[1], "where the main thread is"


# ---- the start --------------------------------------------------------------------------------------------------------


def test_other_settings_and_other_code_are_refused_by_all(texts, tmp_path):
    for folder in ("llada_jax", "pallas_kernels", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / "copy" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "copy/llada_jax/shapes.py", "a") as file:
        file.write("# another version\n")
    common = [sys.executable, "-m", "llada_jax.train", f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2",
              f"--heartbeat_seconds={HEARTBEAT}", *tiny_run.arguments(texts, tmp_path / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment(1)}
    start = lambda cwd, *more: subprocess.Popen([*common, *more], cwd=cwd, **pipes)
    first = start(ROOT, "--process_id=0")
    other = start(tmp_path / "copy", "--process_id=1", "--config.train.seed=5", "--config.mesh.data=2")
    errors = first.communicate()[1]
    other.communicate()
    assert first.returncode == other.returncode == 1, errors
    log = (tmp_path / "run/logs/host_1.txt").read_text().splitlines()
    assert log[1] == errors.splitlines()[-1] and errors.count("\n") == 1
    assert "process 1 on " in errors and "mesh.data (-1 there, 2 here), train.seed (0 there, 5 here), llada_jax/shapes.py (" in errors


def test_a_run_folder_that_cannot_be_is_refused_by_all_at_once(texts, tmp_path):
    """By process 0, and where another alone may not write, in its name."""
    taken = tmp_path / "taken"
    taken.write_text("")
    first = launch(2, 1, *tiny_run.arguments(texts, taken))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/logs").write_text("")
    other = launch(2, 1, *tiny_run.arguments(texts, tmp_path / "run"))
    for process, words in (first, f"error: --workdir={taken}: {taken} is a file"), (other, f"cannot write {tmp_path / 'run/logs/host_1.txt'}: "):
        errors = process.communicate()[1].splitlines()
        assert process.returncode == 1 and len(errors) == 2 and words in errors[0], errors
        assert "each of 2 processes ended with exit status 1" in errors[1], errors
