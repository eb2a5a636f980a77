"""Training by several processes on this machine, over the loopback interface: to try out what several hosts will do.

    python launch/local_multiprocess.py --processes=2 [--devices_per_process=1] -- --config=configs/pystdlib.py --workdir=runs/two

Starts N processes of `python -m llada_jax.train` with the arguments behind `--`, waits, and exits with 1 when one of them failed,
after one line: which, how it ended, the last complete checkpoint. Ctrl-C and SIGTERM are passed on: the run saves and ends, this with
status 75 as the training does, and the same command goes on; a second one kills. CPU devices unless JAX_PLATFORMS says otherwise.
Process 0 has the screen.
"""

import argparse
import ctypes
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
STOPPED = 75  # status of a training that saved and stopped before its last step (llada_jax.distributed, not imported for its time)
GRACE = 10  # seconds beyond the heartbeat that the runtime has to end the others


def main() -> int:
    """Start the processes, wait for their end and say how it was; the exit status."""
    args, rest = parse(sys.argv[1:])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children, outputs = [], []
    signal.signal(signal.SIGTERM, lambda *_: forward(children))
    signal.signal(signal.SIGINT, lambda *_: forward(children))
    for i in range(args.processes):
        outputs.append(None if i == 0 else tempfile.TemporaryFile())  # until it writes to its own log
        command = [sys.executable, "-m", "llada_jax.train", f"--coordinator=127.0.0.1:{port}", f"--num_processes={args.processes}",
                   f"--process_id={i}", f"--heartbeat_seconds={args.heartbeat_seconds}", *rest]
        children.append(subprocess.Popen(command, env=environment(args.devices_per_process), stdout=outputs[i], stderr=outputs[i],
                                         preexec_fn=follow_parent, start_new_session=True))
    first = wait(children, args.heartbeat_seconds + GRACE)
    if first is None:
        return max(child.returncode for child in children)  # process 0 has said it
    status = children[first].returncode
    if first and children[0].returncode != status:  # else process 0 has said it
        outputs[first].seek(0)
        sys.stderr.write(outputs[first].read().decode(errors="replace"))
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
    alike = status > 0 and all(child.returncode == status for child in children)
    who = f"each of {args.processes} processes {how}" if alike else f"process {first} of {args.processes} {how} before the others"
    print(f"error: {who}; {checkpoint(rest)}", file=sys.stderr, flush=True)
    return 1


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(own options, arguments of every process: what stands behind `--`)."""
    own, rest = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--devices_per_process", type=int, default=1, help="CPU devices of each process (default 1)")
    parser.add_argument("--heartbeat_seconds", type=int, default=30, help="a process that is silent for so long is dead (default 30)")
    args = parser.parse_args(own)
    if args.processes < 1 or args.devices_per_process < 1 or args.heartbeat_seconds < 1:
        parser.error("--processes, --devices_per_process and --heartbeat_seconds are at least 1")
    if not rest:
        parser.error("the arguments of training follow behind --, for example: -- --config=configs/pystdlib.py --workdir=runs/two")
    return args, rest


def environment(devices: int) -> dict[str, str]:
    """This one, with so many CPU devices a process, and the repository on Python's path."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {"JAX_PLATFORMS": "cpu", **os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": path}


def follow_parent() -> None:
    """In a child: SIGTERM when this launcher dies, so that no process is left behind (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def forward(children: list[subprocess.Popen]) -> None:
    """Ask all to save and end; kill them when asked again."""
    again = getattr(forward, "asked", False)
    forward.asked = True
    for child in children:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL if again else signal.SIGTERM)


def wait(children: list[subprocess.Popen], seconds: float) -> int | None:
    """Wait until all are gone; the first that failed, or None. The others are killed when the runtime has not ended them `seconds` after one
    ended before its last step."""
    first, deadline = None, float("inf")
    while True:
        states = [child.poll() for child in children]
        if first is None:
            first = next((i for i, state in enumerate(states) if state not in (None, 0, STOPPED)), None)
        if any(states):
            deadline = min(deadline, time.monotonic() + seconds)
        if None not in states:
            return first
        if time.monotonic() > deadline:
            for child in children:
                child.kill()
        time.sleep(0.05)


def checkpoint(rest: list[str]) -> str:
    """What is there to go on from, in words."""
    workdir = None
    for i, arg in enumerate(rest):
        name, given, value = arg.partition("=")
        if name in ("--workdir", "-workdir"):
            workdir = value if given else next(iter(rest[i + 1:]), None)
    if workdir is None:
        return "without --workdir this does not know the run folder"
    sys.path.insert(0, str(ROOT))
    from llada_jax.training.checkpoint import steps_of
    steps = steps_of(workdir)
    logs = f"; logs of processes 1 and up: {workdir}/logs" if (pathlib.Path(workdir) / "logs").exists() else ""
    return (f"the last complete checkpoint of {workdir} is step {steps[-1]}, where the same command goes on" if steps
            else f"{workdir} holds no complete checkpoint") + logs


if __name__ == "__main__":
    sys.exit(main())
