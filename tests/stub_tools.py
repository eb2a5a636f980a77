"""Stand-ins for gcloud, kubectl, Slurm's commands and sleep on a PATH of their own: they record their calls and answer as told.

`gcloud compute tpus tpu-vm ssh` runs its --command, and `scp` copies, in a home folder for each of two workers, unless an answer
is set for the call; `sbatch` runs a copy of the script as Slurm does, `srun` two tasks, which
`scancel --signal=TERM` stops gently, and SIGTERM to `srun` by SIGKILL, as in Slurm 22.05.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
STUBS = ("gcloud", "kubectl", "sbatch", "scancel", "scontrol", "sleep", "srun")
TOOLS = ("bash", "cat", "cp", "date", "dirname", "env", "git", "grep", "gzip", "head", "mkdir", "mktemp", "mv", "nohup", "paste", "ps",
         "readlink", "rm", "scp", "sed", "setsid", "sort", "ssh", "tail", "tar", "touch", "wc", "xargs")

# Stands for the Python of an environment: writes down its arguments, "saves" on SIGTERM and does what TRAIN says.
PYTHON = """#!/usr/bin/env bash
here=$HOME/task${SLURM_PROCID:-}
printf '%s\\0' "$@" >"$here.arguments"
trap 'echo saved >>"$here.saved"; kill "$!"; exit 75' TERM
eval "$TRAIN"
"""
FINISHES = 'trap : TERM; touch "$here.trains"; /bin/sleep 60 & wait; kill "$!"; exit 0'  # as the signal comes
GOES_ON = 'touch "$here.trains"; /bin/sleep 60 & wait'


class Machine:
    """A clone with blanks in its path, `workers` with a home each, and a PATH of stubs."""

    def __init__(self, folder):
        self.folder, self.root = folder, folder / "a clone"
        self.bin, self.tools, self.calls_file = folder / "bin", folder / "tools", folder / "calls"
        self.workers = [folder / "worker 0", folder / "worker 1"]
        self.spool = folder / "spool"
        shutil.copytree(ROOT / "launch", self.root / "launch")
        for made in (self.bin, self.tools, self.spool, *self.workers):
            made.mkdir()
        for tool in TOOLS:
            (self.tools / tool).symlink_to(shutil.which(tool) or shutil.which("true"))
        for stub in STUBS:
            (self.bin / stub).write_text(f"#!{sys.executable} -SE\n{pathlib.Path(__file__).read_text()}")
            (self.bin / stub).chmod(0o755)
        self.python = folder / "python"
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)
        self.answers = []
        self.answer()

    def answer(self, *words, says=(), status=0):
        """Calls with all of `words` in them print the next of `says` (the last one for ever), or end with `status`, or, of a list, with the next."""
        if words:
            says, status = [says] if isinstance(says, str) else list(says), status if isinstance(status, list) else [status]
            self.answers.append([list(words), says, status])
        (self.folder / "answers").write_text(json.dumps(self.answers))

    def start(self, command, stdin="", home=None, **env):
        env = {"PATH": f"{self.bin}:{self.tools}", "HOME": str(home or self.folder), "STUBS": str(self.folder), "WORKER_PATH": str(self.tools),
               "LLADA_PYTHON": str(self.python), "TRAIN": "", "SPOOL": str(self.spool), **env}
        process = subprocess.Popen(["bash", *command] if command[0] not in STUBS else [str(self.bin / command[0]), *command[1:]],
                                   cwd=self.root, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdin.write(stdin)
        process.stdin.close()
        process.stdin = None
        return process

    def run(self, *command, **kwargs):
        """(exit status, stdout, stderr)."""
        process = self.start(command, **kwargs)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def calls(self, *words):
        """Calls since the last question that hold all of `words`, each a list of arguments."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return [call for call in map(json.loads, lines) if all(word in " ".join(call) for word in words)]


def stub(call, folder):
    """Play the tool `call[0]`; returns its exit status."""
    text = " ".join(call)
    with open(folder / "calls", "a") as file:
        file.write(json.dumps(call) + "\n")
    for number, (words, says, status) in enumerate(json.loads((folder / "answers").read_text())):
        if all(word in text for word in words):
            counter = folder / f"answered {number}"
            before = len(counter.read_text()) if counter.exists() else 0
            counter.write_text("." * (before + 1))
            if says:
                print(says[min(before, len(says) - 1)], flush=True)
            return status[min(before, len(status) - 1)]
    if call[:4] == ["gcloud", "compute", "tpus", "tpu-vm"] and call[4] in ("ssh", "scp"):
        flags = dict(part.split("=", 1) for part in call if part.startswith("--") and "=" in part)
        workers = sorted(folder.glob("worker *"))
        for worker in workers if flags["--worker"] == "all" else [workers[int(flags["--worker"])]]:
            if call[4] == "scp":
                shutil.copy(call[5], worker / call[6].split(":", 1)[1])
                continue
            env = {**os.environ, "PATH": os.environ["WORKER_PATH"] + ":/usr/bin:/bin", "HOME": str(worker), "HOSTNAME": worker.name}
            done = subprocess.run(["bash", "-c", flags["--command"]], cwd=worker, env=env, stdin=subprocess.DEVNULL)
            if done.returncode:
                return done.returncode
    elif call[0] == "sbatch":
        at = next(i for i, part in enumerate(call) if part.endswith(".sbatch"))
        script = shutil.copy(call[at], os.environ["SPOOL"] + "/slurm_script")
        options = dict(part.removeprefix("--").split("=", 1) for part in call[1:at])
        env = {**os.environ, "SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": os.getcwd(), "SLURM_GPUS_ON_NODE": options.get("gpus-per-node", "0"),
               "SLURM_NTASKS_PER_NODE": options.get("ntasks-per-node", "1")}
        os.chdir("/")
        os.execve(shutil.which("bash"), ["bash", script, *call[at + 1:]], env)
    elif call[0] == "srun":
        command = call[next(i for i, part in enumerate(call) if i and not part.startswith("-")):]
        tasks = [subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(i)}) for i in range(2)]
        signal.signal(signal.SIGTERM, lambda *_: [task.kill() for task in tasks])
        (folder / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
        return max(task.wait() for task in tasks)
    elif call[:2] == ["scancel", "--signal=TERM"]:
        for task in (folder / "tasks").read_text().split():
            os.kill(int(task), signal.SIGTERM)
    elif call[0] == "kubectl" and "--filename=-" in call:
        (folder / "manifest").write_text(sys.stdin.read())
    return 0


if __name__ == "__main__":
    sys.exit(stub([os.path.basename(sys.argv[0]), *sys.argv[1:]], pathlib.Path(os.environ["STUBS"])))
