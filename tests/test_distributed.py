"""Where several processes are found, what they agree on, how they stop and are watched: in one process, with stand-ins for the others."""

import http.server
import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax import distributed, partitioning
from llada_jax.config import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]


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
