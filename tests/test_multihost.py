"""Several processes on the loopback interface (gloo): one run's noise, losses and weights; they start, stop and end together."""

import http.server
import importlib.util
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import psutil
import pytest
from jax.experimental import multihost_utils

from llada_jax import config as config_lib
from llada_jax import distributed, partitioning
from llada_jax import tokenizer as tokenizer_lib
from llada_jax.config import ConfigError
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


def test_compare_names_who_differs_in_what():
    first = ("a", {"x": 1, "y": 2, "z": 3, "u": 4})
    assert distributed.compare([first, ("b", dict(first[1]))]) is None
    assert distributed.compare([first, ("b", {**first[1], "x": 5}), first, ("c", {**first[1], "x": 5})]) == (
        "process 1 on b, 3 on c differs from process 0 on a in x (1 there, 5 here)")
    text = distributed.compare([first, *(("b", {"v": 0}),) * 6])
    assert "1 on b, 2 on b, 3 on b, 4 on b and 2 more" in text and text.endswith("and 2 more") and "x (1 there, None here)" in text


@pytest.mark.parametrize("given", [("host:1", None, None), (None, 2, 0), ("host:1", 2, 2), ("host", 2, 0), ("host:1", 2, -1)])
def test_flags_that_do_not_fit_together(given):
    with pytest.raises(ConfigError, match="give all three"):
        distributed.start(*given, 30)


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}
TWO_TASKS = {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}


@pytest.mark.parametrize("variables, several, devices", [
    ({}, False, None),
    ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, False, None),  # the batch script, not what srun starts
    (TWO_TASKS, True, None),
    ({**TWO_TASKS, "SLURM_GPUS_ON_NODE": "4"}, True, [0, 1, 2, 3]),
    ({**TWO_TASKS, "SLURM_STEP_NUM_TASKS": "8", "SLURM_GPUS_ON_NODE": "4"}, True, None),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False, None),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, None),
    ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True, None),
])  # fmt: skip
def test_where_several_processes_are_found(variables, several, devices, monkeypatch):
    """Nothing is started, and nobody asked, where there is one; whole nodes keep their devices under SLURM."""
    calls = []
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *given, **named: calls.append((given, named)))
    monkeypatch.setattr(distributed.jax, "config", types.SimpleNamespace(jax_platforms=None, update=lambda *_: None))
    monkeypatch.setattr(distributed, "_has_metadata", lambda: False)
    for name in set(os.environ):
        if name.startswith(("SLURM_", "TPU_", "MEGASCALE_")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    distributed.start(None, None, None, 30)
    assert len(calls) == several
    if several:
        assert calls[0][0] == (None, None, None, devices) and calls[0][1]["heartbeat_timeout_seconds"] == 30


@pytest.fixture()
def metadata(monkeypatch):
    """A stand-in for a cloud's metadata server: {key: value}, and the keys that it was asked for."""
    values, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            key = self.path.removeprefix("/instance/")
            asked.append((key, self.headers["Metadata-Flavor"]))
            self.send_response(200 if key in values else 404)
            self.end_headers()
            self.wfile.write(values.get(key, "").encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(distributed, "METADATA", f"http://127.0.0.1:{server.server_port}/instance/")
    monkeypatch.setattr(distributed, "_has_metadata", lambda: True)
    yield values, asked
    server.shutdown()
    server.server_close()


def test_hosts_of_a_tpu_vm(metadata, monkeypatch):
    values, asked = metadata
    monkeypatch.setattr(distributed.jax, "config", types.SimpleNamespace(jax_platforms=None))
    for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)
    assert distributed._tpu_hosts() == 1, "no such keys"
    values["attributes/worker-network-endpoints"] = "a:b:10.0.0.1"
    assert distributed._tpu_hosts() == 1
    values["attributes/worker-network-endpoints"] = "a:b:10.0.0.1,a:b:10.0.0.2"
    values["attributes/tpu-env"] = "ACCELERATOR_TYPE: 'v5litepod-8'\nMEGASCALE_NUM_SLICES: '2'\n"
    assert distributed._tpu_hosts() == 4 and asked[0][1] == "Google"
    monkeypatch.setattr(distributed.jax, "config", types.SimpleNamespace(jax_platforms="cpu"))
    assert distributed._tpu_hosts() == 1, "on CPUs by choice"


# ---- shares, stops, watching ------------------------------------------------------------------------------------------


def fake_mesh(processes, devices, **axes):
    grid = [types.SimpleNamespace(process_index=i // devices) for i in range(processes * devices)]
    shape = [axes.get(axis, 1) for axis in partitioning.AXES]
    return types.SimpleNamespace(devices=np.array(grid, object).reshape(shape), shape=dict(zip(partitioning.AXES, shape, strict=True)),
                                 size=processes * devices)


@pytest.mark.parametrize("processes, devices, axes, shares", [
    (1, 4, dict(data=4), [(0, 1)]),
    (2, 2, dict(data=2, fsdp=2), [(0, 2), (1, 2)]),
    (4, 1, dict(fsdp=2, expert=2), [(0, 4), (1, 4), (2, 4), (3, 4)]),
    (2, 4, dict(data=4, tensor=2), [(0, 2), (1, 2)]),
    (2, 1, dict(tensor=2), [(0, 1), (0, 1)]),
    (4, 2, dict(data=2, tensor=4), [(0, 2), (0, 2), (1, 2), (1, 2)]),
])  # fmt: skip
def test_processes_that_hold_the_same_rows_provide_the_same(processes, devices, axes, shares):
    mesh = fake_mesh(processes, devices, **axes)
    assert [partitioning.batch_share(mesh, i) for i in range(processes)] == shares


def test_rows_that_overlap_are_refused():
    with pytest.raises(ConfigError, match=r"2 parts of the batch .* 3 processes of 2 devices"):
        partitioning.batch_share(fake_mesh(3, 2, data=2, tensor=3), 0)


def test_a_mesh_is_shared_among_processes(monkeypatch):
    asked = {}
    monkeypatch.setattr(jax.config, "update", asked.__setitem__)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    partitioning.setup_devices(8, mesh=config_lib.Mesh(data=2, fsdp=4), processes=4)
    assert asked["jax_num_cpu_devices"] == 2
    with pytest.raises(ConfigError, match="8 devices is not divisible by 3 processes"):
        partitioning.setup_devices(8, mesh=config_lib.Mesh(data=2, fsdp=4), processes=3)


@pytest.mark.parametrize("notice", [{"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}, {"maintenance-event": "NONE", "preempted": "TRUE"}])
def test_a_notice_of_the_cloud_stops_as_a_signal_does(notice, metadata, capsys):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    values, _ = metadata
    values.update(notice)
    stop = distributed.Stop()
    try:
        assert not stop.between_calls()
        stop.begin()
        assert stop._wanted.wait(20) and stop.between_calls() and stop.now() and stop.agreed
    finally:
        signal.signal(signal.SIGTERM, handlers[0]), signal.signal(signal.SIGINT, handlers[1])
    assert "notice of the cloud" in capsys.readouterr().out


def test_notices_are_asked_for_again_after_a_failed_answer(monkeypatch):
    """Nobody who answers the first time is no metadata server; later the next answer counts."""
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    answers = {"maintenance-event": ["NONE", None, "NONE", None, "TERMINATE_ON_HOST_MAINTENANCE"], "preempted": ["FALSE", None, None, "FALSE", None]}
    monkeypatch.setattr(distributed, "_has_metadata", lambda: True)
    monkeypatch.setattr(distributed, "_metadata", lambda key: answers[key].pop(0))
    monkeypatch.setattr(distributed, "ASK_EVERY", 0.01)
    try:
        stop = distributed.Stop()
        stop.begin()
        assert stop._wanted.wait(20) and answers == {"maintenance-event": [], "preempted": []}
        answers |= {"maintenance-event": [None, "TERMINATE_ON_HOST_MAINTENANCE"]}
        distributed.Stop()._watch_notices()
        assert len(answers["maintenance-event"]) == 1
    finally:
        signal.signal(signal.SIGTERM, handlers[0]), signal.signal(signal.SIGINT, handlers[1])


def test_a_lost_connection_is_said_in_one_line_and_nothing_else_is(monkeypatch):
    broken = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:1\nmore")
    distributed.explain_loss(broken)  # a process alone has no other
    monkeypatch.setattr(distributed.runtime.global_state, "client", object())
    with pytest.raises(config_lib.StoppedError, match=r"another process of this run is gone .*Connection closed by peer") as raised:
        distributed.explain_loss(broken)
    assert "\n" not in str(raised.value)
    distributed.explain_loss(jax.errors.JaxRuntimeError("INTERNAL: Gloo all-reduce failed: shapes differ"))
    distributed.explain_loss(jax.errors.JaxRuntimeError("INTERNAL: Connection closed by peer"))


def test_stacks_are_written_once_a_period_until_there_is_progress(capfd):
    dog = distributed.Watchdog(0.3)
    dog.progress("step 5")
    seen = ""
    while seen.count("no progress for 0.3 s after step 5; still waiting") < 2:
        time.sleep(0.05)
        seen += capfd.readouterr().err
    dog.close()
    assert "test_stacks_are_written_once_a_period" in seen, "this thread's stack"


def launcher():
    """launch/local_multiprocess.py as a module."""
    described = importlib.util.spec_from_file_location("local_multiprocess", ROOT / "launch/local_multiprocess.py")
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    return module


def test_the_launcher_says_how_it_is_called():
    for arguments, words in (["--processes=2"], "-- --config="), (["--processes=2", "--heartbeat_seconds=0", "--", "--config=a"], "at least 1"):
        done = subprocess.run([sys.executable, "launch/local_multiprocess.py", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and words in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("rest", [["--workdir={}"], ["--workdir", "{}"], ["--workdir=other", "-workdir={}", "--config=a"]])
def test_the_launcher_finds_the_run_folder(rest, tmp_path):
    assert f"{tmp_path} holds no complete checkpoint" in launcher().checkpoint([word.format(tmp_path) for word in rest])


class Child:
    """A process that ends with this status when it is asked for the n-th time, or is killed."""

    def __init__(self, status, after=0):
        self.returncode, self.status, self.after = None, status, after

    def poll(self):
        self.returncode = self.status if self.after <= 0 and self.returncode is None else self.returncode
        self.after -= 1
        return self.returncode

    def kill(self):
        self.returncode = -9 if self.returncode is None else self.returncode


def test_the_launcher_tells_a_stop_from_a_failure():
    stopped, module = distributed.STOPPED, launcher()
    assert stopped == module.STOPPED
    assert module.wait([Child(0), Child(0, 2)], 60) is None
    assert module.wait([Child(stopped), Child(stopped, 2), Child(0, 1)], 60) is None
    assert module.wait([Child(stopped), Child(1, 2), Child(3, 3)], 60) == 1
    assert module.wait([Child(stopped), Child(None, 10**9)], 0.2) == 1, "one that hangs is killed"


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
