"""One run over several processes: started from flags, SLURM or a TPU pod, checked to be alike, stopped together, and watched.

Process 0 has the screen and writes the run folder; what the others print goes to logs/host_N.txt. Before the backend starts they talk
through the key-value store of `jax.distributed`, which needs no devices. A single process calls the same functions; nothing is sent then.
"""

import atexit
import faulthandler
import hashlib
import http.client
import json
import os
import pathlib
import platform
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed as runtime  # jax has no public key-value store; orbax uses this one too

from llada_jax import config as config_lib
from llada_jax import partitioning

CONNECT = 300  # seconds that processes wait for the last of them to start
WAIT = 3600  # seconds that processes wait for each other while data are read or closing lines are written; one that died ends it sooner
STOPPED = 75  # exit status of a run that saved and stopped before its last step: EX_TEMPFAIL of sysexits.h, try again later
NOTICE = 30  # seconds that clouds leave between a notice and the end of the machine
ASK_EVERY = 5  # seconds between two questions for a notice
METADATA = f"http://{os.environ.get('GCE_METADATA_IP', 'metadata.google.internal')}/computeMetadata/v1/instance/"
BROKEN = ("closed by peer", "reset by peer", "Broken pipe", "Timed out")  # connections, in the words of gloo
PACKAGE_FOLDERS = ("llada_jax", "pallas_kernels")
Result = TypeVar("Result")


# ---- start --------------------------------------------------------------------------------------------------------------


def start(coordinator: str | None, num_processes: int | None, process_id: int | None, heartbeat: int) -> int:
    """Start `jax.distributed` when this process is one of several; how many they are. Call it before anything starts the backend.

    Explicit arguments come first, all three together: HOST:PORT of process 0, the count and this one's number. Without them it is one of
    several under `srun` with more than one task, and on a TPU pod or several slices. Processes on CPUs use gloo. One that sends no
    heartbeat for so many seconds is taken for dead, and the runtime ends the others. Raises ConfigError for what does not fit
    together, and when the others do not come.
    """
    given = (coordinator, num_processes, process_id)
    if given == (None, None, None):
        if _slurm_tasks() == 1 and _tpu_hosts() == 1:
            return 1
    elif coordinator is None or num_processes is None or process_id is None or not 0 <= process_id < num_processes or ":" not in coordinator:
        raise config_lib.ConfigError(f"--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id}: give all three, "
                                     "HOST:PORT of process 0, the number of processes, and this one's number from 0 to one less")
    elif num_processes == 1:
        return 1
    # SLURM: jax would give every task the one device of its number, which is wrong for one task a node with all the node's devices
    alone_on_node = _slurm_tasks() > 1 and _slurm_tasks() == int(os.environ.get("SLURM_STEP_NUM_NODES", 0))
    devices = range(int(os.environ.get("SLURM_GPUS_ON_NODE", 0))) if alone_on_node and coordinator is None else ()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # stops are agreed on by `Stop`; the service would take SIGTERM for itself, and orbax would act on it besides
    jax.config.update("jax_enable_preemption_service", False)
    words = f"still waiting for the other processes{f' at {coordinator}' if coordinator else ''}; after {CONNECT} s the runtime gives up"
    slow = threading.Timer(20, lambda: print(words, file=sys.stderr, flush=True))  # the runtime aborts without a word that a user understands
    slow.daemon = True
    slow.start()
    try:
        jax.distributed.initialize(*given, list(devices) or None, cluster_detection_method="deactivate" if coordinator else None,
                                   initialization_timeout=CONNECT, heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=heartbeat)
    except (RuntimeError, ValueError) as error:
        raise config_lib.ConfigError(f"the processes of this run did not find each other ({str(error).splitlines()[0]}); start all of them with "
                                     "the same --coordinator=HOST:PORT --num_processes=N, each with its own --process_id") from error
    finally:
        slow.cancel()
    atexit.register(_leave_alone)
    return runtime.global_state.num_processes


def end_together(status: int | None = None) -> int | None:
    """Part in good order: all processes call it at their end, and stay until process 0 has written everything. Gives back `status`."""
    from_first("end", None)
    jax.distributed.shutdown()
    return status


def explain_loss(error: jax.errors.JaxRuntimeError) -> None:
    """Raise StoppedError, in place of a traceback, where `error` says that a connection to another process broke: that one knows why."""
    first = str(error).partition("\n")[0]
    if runtime.global_state.client is not None and "Gloo" in first and any(words in first for words in BROKEN):
        raise config_lib.StoppedError(f"another process of this run is gone ({first}); the same command goes on at the last checkpoint") from error


def _leave_alone() -> None:
    """At the exit of a process that did not end together with the others: go at once, so that they do not wait. jax would first wait for them."""
    if runtime.global_state.client is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _slurm_tasks() -> int:
    """Tasks of this job step; a batch script itself is a step of one."""
    inside = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"} <= set(os.environ)
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ["SLURM_NTASKS"])) if inside else 1


def _tpu_hosts() -> int:
    """Hosts of this machine's TPU slices, from what GKE sets, else from the metadata server of a TPU VM; 1 anywhere else."""
    if "tpu" not in (jax.config.jax_platforms or "tpu"):
        return 1
    named = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    hosts, slices = named, os.environ.get("MEGASCALE_NUM_SLICES")
    if not named and _has_metadata():
        hosts = _metadata("attributes/worker-network-endpoints")
        found = [line.partition(":")[2].strip(" '") for line in (_metadata("attributes/tpu-env") or "").splitlines()
                 if line.startswith("MEGASCALE_NUM_SLICES")]
        slices = slices or (found[0] if found else None)
    return len((hosts or "").split(",")) * int(slices or 1)


def _has_metadata() -> bool:
    """Whether this is a machine with TPUs whose metadata server may be asked: importing jax sets the variable where there are none."""
    return "TPU_SKIP_MDS_QUERY" not in os.environ


def _metadata(key: str) -> str | None:
    """A value of the cloud's metadata server; None where there is no such server or value."""
    try:
        with urllib.request.urlopen(urllib.request.Request(METADATA + key, headers={"Metadata-Flavor": "Google"}), timeout=3) as answer:
            return answer.read().decode()
    except (OSError, http.client.HTTPException):
        return None


# ---- words between processes ------------------------------------------------------------------------------------------


def from_first(name: str, value: Any) -> Any:
    """Process 0's `value` (json) on every process, which wait for it here; each name once a run."""
    client = runtime.global_state.client
    if client is None:
        return value
    if runtime.global_state.process_id == 0:
        client.key_value_set(f"llada_jax/{name}", json.dumps(value))
    return json.loads(client.blocking_key_value_get(f"llada_jax/{name}", WAIT * 1000))


def first_alone(name: str, work: Callable[[], Result]) -> Result | None:
    """What `work` gives to process 0, which alone does it while the others wait; None to them. A ConfigError is raised by all."""
    result, error = None, None
    if runtime.global_state.process_id == 0:
        try:
            result = work()
        except config_lib.ConfigError as raised:
            error = str(raised)
    _raise_together(from_first(name, error))
    return result


def _raise_together(error: str | None) -> None:
    if error is not None:
        if runtime.global_state.client is not None:
            jax.distributed.shutdown()
        raise config_lib.ConfigError(error)


def check_same(name: str, values: dict[str, Any]) -> None:
    """Raise ConfigError on every process, naming who differs from process 0 in what, unless all hold the same `values` (json)."""
    client, this = runtime.global_state.client, runtime.global_state.process_id
    if client is None:
        return
    client.key_value_set(f"llada_jax/{name}/{this}", json.dumps([platform.node(), values]))
    found = None
    if this == 0:
        found = compare([json.loads(client.blocking_key_value_get(f"llada_jax/{name}/{i}", WAIT * 1000))
                         for i in range(runtime.global_state.num_processes)])
    _raise_together(from_first(f"{name}/found", found))


def compare(all_values: list[tuple[str, dict[str, Any]]]) -> str | None:
    """What to say of processes, each (host, values), that do not hold what process 0 holds; None when all do."""
    (first_host, first), groups = all_values[0], {}
    for i, (host, values) in enumerate(all_values):
        differing = [f"{key} ({first.get(key)} there, {values.get(key)} here)" for key in dict.fromkeys((*first, *values))
                     if first.get(key) != values.get(key)]
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        groups.setdefault(", ".join(differing[:3]) + more, []).append(f"{i} on {host}")
    groups.pop("")
    shorten = lambda names: ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return "; ".join(f"process {shorten(names)} differs from process 0 on {first_host} in {what}" for what, names in groups.items()) or None


def source_hashes() -> dict[str, str]:
    """{file: start of its SHA-256} of the code that this process runs."""
    root = pathlib.Path(__file__).parents[1]
    files = sorted(path for folder in PACKAGE_FOLDERS for path in (root / folder).rglob("*.py"))
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in files}


def divert_output(workdir: str) -> None:
    """Let what processes other than 0 print, and what the runtime prints there, go to `<workdir>/logs/host_N.txt`.

    The logs of a run in an object store are kept in ./logs/<name of the run>. Raises ConfigError on all when one cannot write its own, or
    process 0 does not see it there: checkpoints need a run folder that all processes share.
    """
    client, this = runtime.global_state.client, runtime.global_state.process_id
    if client is None:
        return
    shared = "://" not in workdir
    folder = pathlib.Path(workdir, "logs") if shared else pathlib.Path("logs", pathlib.PurePosixPath(workdir).name)
    log = lambda i: folder / f"host_{i}.txt"
    if this:
        refused = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(log(this), "ab") as file:
                for number, stream in ((1, sys.stdout), (2, sys.stderr)):
                    stream.flush()
                    os.dup2(file.fileno(), number)
            print(f"---- process {this} on {platform.node()}, {time.strftime('%Y-%m-%d %H:%M:%S')}", flush=True)
        except OSError as error:
            refused = f"process {this} on {platform.node()} cannot write {log(this)}: {error.strerror}"
        client.key_value_set(f"llada_jax/log/{this}", json.dumps(refused))
    wrong = None
    if this == 0:
        others = range(1, runtime.global_state.num_processes)
        refused = [json.loads(client.blocking_key_value_get(f"llada_jax/log/{i}", WAIT * 1000)) for i in others]
        missing = ", ".join(str(log(i)) for i in others if not log(i).exists()) if shared else None
        unseen = f"process 0 does not see {missing}: give a --workdir that all hosts share, or gs://…" if missing else None
        wrong = next(filter(None, refused), unseen)
        if wrong is None:
            print(f"the other processes write to {log('N')}{'' if shared else ' on their hosts'}", flush=True)
    _raise_together(from_first("logs", wrong))


# ---- stopping together ------------------------------------------------------------------------------------------------


class Stop:
    """SIGTERM, the first Ctrl-C and a notice of the cloud, on any process, ask all to save and end at the same step.

    Before `begin` there is nothing to save: a single process ends at once on SIGTERM, one of several keeps it in mind. A second Ctrl-C
    interrupts. `agreed` is what all processes know by now.
    """

    def __init__(self) -> None:
        self.agreed = False
        self._wanted = threading.Event()
        self._several = runtime.global_state.client is not None
        self._asked: jax.Array | None = None
        self._last: float | None = None  # when `between_calls` was asked last, unless an evaluation came between
        self._warned = not (self._several or _has_metadata())
        self._on_signal(signal.SIGTERM, self._note if self._several else self._leave)

    def begin(self) -> None:
        """From here on signals end the loop."""
        self._on_signal(signal.SIGTERM, self._note)
        self._on_signal(signal.SIGINT, self._note)
        if _has_metadata():
            threading.Thread(target=self._watch_notices, daemon=True).start()

    def between_calls(self) -> bool:
        """Whether to end here; every process asks it between the same calls. Of several, each learns what was asked one call before: nobody waits."""
        self._warn_of_slow_calls()
        if self._several:
            asked, self._asked = self._asked, partitioning.on_any_process(self._wanted.is_set())
            self.agreed = self.agreed or (asked is not None and bool(np.asarray(asked)))
        else:
            self.agreed = self._wanted.is_set()
        return self.agreed

    def now(self) -> bool:
        """The same, where all processes wait for the device anyway."""
        wanted = self._wanted.is_set()
        self.agreed = self.agreed or (bool(np.asarray(partitioning.on_any_process(wanted))) if self._several else wanted)
        self._last = None
        return self.agreed

    def _warn_of_slow_calls(self) -> None:
        before, self._last = self._last, time.perf_counter()
        if not self._warned and before is not None and 3 * (self._last - before) > NOTICE:
            self._warned = True
            print(f"note: a call takes {self._last - before:.0f} s and a stop up to three, longer than the {NOTICE} s that clouds leave; "
                  "a smaller train.steps_per_call saves in time", flush=True)

    def _on_signal(self, number: int, handler: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(number, handler)

    def _leave(self, number: int, frame: Any) -> None:
        print("stopped by a signal before the first step; nothing to save", flush=True)
        sys.exit(STOPPED)

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._wanted.set()

    def _watch_notices(self) -> None:
        """Maintenance and preemption of this TPU VM, asked for again and again; ends where nobody answers the first time."""
        event = _metadata("maintenance-event")
        there = event is not None
        while there and not self._wanted.is_set():
            preempted = _metadata("preempted")
            if event not in (None, "NONE") or preempted == "TRUE":
                print(f"notice of the cloud: {'this machine is preempted' if preempted == 'TRUE' else event}", flush=True)
                self._wanted.set()
            time.sleep(ASK_EVERY)
            event = _metadata("maintenance-event")


# ---- watching ---------------------------------------------------------------------------------------------------------


class Watchdog:
    """Writes the stacks of all threads to this process's stderr whenever `seconds` pass without progress, and goes on waiting."""

    def __init__(self, seconds: float):
        self._seconds, self._what = seconds, "the start"
        self._moved, self._closed = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def progress(self, what: str) -> None:
        """`what` is done."""
        self._what = what
        self._moved.set()

    def close(self) -> None:
        self._closed = True
        self._moved.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed:
            if self._moved.wait(self._seconds):
                self._moved.clear()
            else:
                line = f"no progress for {self._seconds:g} s after {self._what}; still waiting; the stacks of all threads:"
                print(line, file=sys.stderr, flush=True)
                faulthandler.dump_traceback(2, all_threads=True)
