"""The launchers for clouds and clusters: dry runs against recorded ones, and real runs against stand-ins for the tools (stub_tools.py).

    python -m tests.test_launch_cloud      records the dry runs in tests/data/launch anew
"""

import pathlib
import shlex
import signal
import subprocess
import time

import pytest
import yaml

from tests.stub_tools import FINISHES, GOES_ON, ROOT, Machine
from tests.test_launch import STAND_IN

RECORDED = ROOT / "tests/data/launch"
AT = ("--name=pod", "--zone=z", "--project=p")
TRAINING = ("--config=configs/a.py:x=1", "--workdir=gs://b/run", "--config.data.sources=a  b, it's \"$HOME\" & {c,d} \\ *", "")
QUEUED = ("launch/queued.sh", "run", *AT, "--type=v5p-128", "--version=v2")
GKE = ("--name=run", "--context=c", "--namespace=n", "--image=gcr.io/p/i:1", "--accelerator=tpu-v5p-slice", "--topology=4x4x4")
DESCRIBE_RESOURCE, DESCRIBE_NODE = ("queued-resources", "describe"), ("tpu-vm", "describe")


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def kinds(calls):
    """Each gcloud call in two words: `queued-resources create`, `tpu-vm ssh start`, …"""
    names = []
    for call in calls:
        if call[0] == "gcloud":
            worker = " ".join(part.split("worker.sh ")[1].split()[0] for part in call if "launch/worker.sh " in part)
            names.append(" ".join([*call[3:5], worker]).rstrip())
    return names


def wait_for(path, process=None):
    for _ in range(1000):
        if path.exists():
            return
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError(f"{path} does not come")


def dry_run(line):
    script, *arguments = shlex.split(line)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    command = ["bash", str(ROOT / script), *arguments[:at], "--dry_run", *arguments[at:]]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/", env={"PATH": "/usr/bin:/bin"}).stdout
    return out.replace(str(ROOT), "ROOT")


def record(text):
    return "".join(f"$ {line}\n{dry_run(line)}" for line in (line[2:] for line in text.splitlines() if line.startswith("$ ")))


@pytest.mark.parametrize("name", sorted(path.stem for path in RECORDED.glob("*.txt")))
def test_dry_runs_are_those_recorded(name):
    text = (RECORDED / f"{name}.txt").read_text()
    assert record(text) == text


def test_a_dry_run_prints_the_calls_that_a_run_makes(machine):
    machine.answer(*DESCRIBE_NODE, says="READY")
    for command in (("wait",), ("setup",), ("run", "--", *TRAINING), ("status",), ("stop",), ("logs",)):
        at = command.index("--") if "--" in command else len(command)
        arguments = ("launch/tpu_vm.sh", *command[:at], *AT)
        machine.answer("ssh")
        _, printed, _ = machine.run(*arguments, "--dry_run", *command[at:])
        assert machine.calls() == []
        assert machine.run(*arguments, *command[at:])[0] == 0
        assert machine.calls() == [shlex.split(line) for line in printed.splitlines()]


WRONG = {  # a command line, words of the message
    "launch/tpu_vm.sh --name=pod": ["create,wait"],
    "launch/tpu_vm.sh remove --name=pod": ["create,wait"],
    "launch/tpu_vm.sh create --zone=z --project=p": ["--name is missing", "no default"],
    "launch/tpu_vm.sh create --name=pod --project=p": ["--zone is missing"],
    "launch/tpu_vm.sh create --name=pod --zone=z": ["--project is missing"],
    "launch/tpu_vm.sh create --name=pod --zone=z --project=p --type=v5p-8": ["--version is missing"],
    "launch/tpu_vm.sh create --name=pod --zone=z --project=p --type=v5e-16 --version=v": ["v5litepod-16"],
    "launch/tpu_vm.sh create --name=pod --zone=z --project=p --type=v5p-08 --version=v": ["--type=v5p-08 is no accelerator type"],
    "launch/tpu_vm.sh status --name=pod --zone=z --project=": ["--project is missing"],
    "launch/tpu_vm.sh status --name=pod --zone=z --projekt=p": ["--projekt=p is not known", "--project=…"],
    "launch/tpu_vm.sh status --name": ["--name needs a value"],
    "launch/tpu_vm.sh delete --name=pod --yes=1": ["--yes takes no value"],
    "launch/tpu_vm.sh wait --name=pod --zone=z --project=p --timeout=1h": ["--timeout=1h"],
    "launch/tpu_vm.sh run --name=pod --zone=z --project=p": ["behind --", "--workdir=gs://"],
    "launch/tpu_vm.sh run --name=pod --zone=z --project=p -- --config=a": ["behind --"],
    "launch/queued.sh run --name=pod --zone=z --project=p --type=v6e-8 --version=v -- --config=a --workdir=/data": ["--workdir=/data would be lost"],
    "launch/queued.sh run --name=pod --zone=z --project=p --type=v6e-8 --version=v -- --config=a --workdir=gs://b/r --workdir runs/x":
        ["--workdir=runs/x would be lost"],
    "launch/gke.sh submit --name=run --namespace=n": ["--context is missing"],
    "launch/gke.sh submit --name=Run --context=c --namespace=n": ["--name=Run"],
    f"launch/gke.sh submit {' '.join(GKE)} --topology=4x4x3 --chips_per_host=5 -- --config=a --workdir=gs://b/r": ["48 chips", "--chips_per_host=5"],
    f"launch/gke.sh submit {' '.join(GKE)} -- --config=a --workdir=/data": ["--workdir=/data would be lost"],
    "launch/slurm.sbatch --config=a": ["--config=a is not known", "behind --"],
    "launch/preflight.sh --zone=z --project=p --type=v5p-8 -- --config=a --workdir=runs/x": ["not in a bucket"],
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_line_gives_one_line_and_calls_nothing(machine, line):
    status, out, err = machine.run(*shlex.split(line))
    assert (status, out, len(err.splitlines())) == (2, "", 1), err
    assert err.startswith("error: ") and all(word in err for word in WRONG[line]), err
    assert machine.calls() == []


@pytest.mark.parametrize("command", [("launch/tpu_vm.sh", "delete", *AT), ("launch/queued.sh", "delete", *AT),
                                     ("launch/gke.sh", "delete", "--name=pod", "--context=c", "--namespace=n")], ids=lambda c: c[0])
def test_nothing_is_deleted_without_the_name_or_yes(machine, command):
    for typed in ("", "y\n", "podd\n"):
        status, _, err = machine.run(*command, stdin=typed)
        assert status == 1 and "nothing was deleted" in err
        assert machine.calls() == []
    assert machine.run(*command, stdin="pod\n")[0] == machine.run(*command, "--yes")[0] == 0
    first, second = machine.calls()
    assert first == second and "delete" in first and "pod" in first


def test_the_status_is_that_of_the_tool(machine):
    machine.answer("tpu-vm create", status=7)
    machine.answer("kubectl", status=3)
    machine.answer(*DESCRIBE_NODE, status=5)
    assert machine.run("launch/tpu_vm.sh", "create", *AT, "--type=v6e-8", "--version=v")[0] == 7
    assert len(machine.calls()) == 1
    assert machine.run("launch/gke.sh", "submit", *GKE, "--", *TRAINING)[0] == 3
    assert len(machine.calls()) == 1
    assert machine.run("launch/tpu_vm.sh", "status", *AT)[0] == 5
    assert [call[1] for call in machine.calls() if call[0] == "sleep"] == ["5", "15", "45"]  # four tries
    machine.answers = []
    machine.answer("worker.sh setup", status=9)
    assert machine.run("launch/tpu_vm.sh", "setup", *AT)[0] == 9
    assert machine.run("launch/tpu_vm.sh", "status", *AT, PATH=str(machine.tools))[0] == 1  # no gcloud


def test_wait_ends_when_all_workers_answer(machine):
    machine.answer(*DESCRIBE_NODE, says=["CREATING", "CREATING", "READY"])
    machine.answer("--worker=0", status=[255, 0])
    assert machine.run("launch/tpu_vm.sh", "wait", *AT)[0] == 0
    calls = machine.calls()
    words = [call[1] if call[0] == "sleep" else call[4] for call in calls]
    assert words == ["describe", "15", "describe", "15", "describe", "ssh", "5", "ssh", "ssh"]
    assert "--worker=all" in calls[-1]


def test_wait_gives_up(machine):
    machine.answer(*DESCRIBE_NODE, says=["CREATING", "PREEMPTED"])
    status, _, err = machine.run("launch/tpu_vm.sh", "wait", *AT)
    assert status == 1 and "pod is PREEMPTED" in err
    machine.answers = []
    machine.answer("describe", says="CREATING")
    status, _, err = machine.run("launch/tpu_vm.sh", "wait", *AT, "--timeout=40")
    assert status == 1 and "--timeout=40" in err
    assert machine.calls("ssh") == []


def git(machine, *arguments):
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=machine.root, check=True, capture_output=True)


def test_a_run_on_two_workers_from_sync_to_stop(machine):
    machine.answer(*DESCRIBE_NODE, says="READY")
    tpu_vm = lambda command, *rest, **env: machine.run("launch/tpu_vm.sh", command, *AT, *rest, TRAIN=GOES_ON, **env)
    (machine.root / "old name.py").write_text("1")
    git(machine, "init", "-q")
    git(machine, "add", "-A")
    status, _, err = tpu_vm("sync")
    assert status == 0, err
    for worker in machine.workers:
        assert (worker / "llada_jax/old name.py").read_text() == "1"
        (worker / "llada_jax/.venv").mkdir()  # what setup makes there
    (machine.root / "old name.py").rename(machine.root / "new.py")
    git(machine, "add", "-A")
    (machine.root / "old name.py").write_text("untracked")
    (machine.root / "new.py").write_text("not committed")
    status, _, err = tpu_vm("sync")
    assert status == 0 and "1 untracked files are not sent" in err
    for worker in machine.workers:
        assert sorted(path.name for path in (worker / "llada_jax").iterdir()) == [".venv", "launch", "new.py"]
        assert (worker / "llada_jax/new.py").read_text() == "not committed"

    assert "no run" in tpu_vm("status")[1]
    assert tpu_vm("run", "--", *TRAINING)[0] == 0
    for worker in machine.workers:
        wait_for(worker / "task.trains")
        assert (worker / "task.arguments").read_text().split("\0")[:-1] == ["-m", "llada_jax.train", *TRAINING]
    status, out, _ = tpu_vm("status")
    assert status == 0 and out.count(": running ") == 2
    status, _, err = tpu_vm("run", "--", *TRAINING)
    assert status == 1 and "trains here already" in err

    assert tpu_vm("stop")[0] == 0
    assert all((worker / "task.saved").read_text() == "saved\n" for worker in machine.workers)
    assert tpu_vm("status")[1].splitlines() == ["pod: READY", "worker worker 0: ended 143", "worker worker 1: ended 143"]
    assert "llada_jax.train --config=configs/a.py:x=1" in tpu_vm("logs", "--worker=1")[1]


@pytest.mark.parametrize("train, ended", [("exit 0", "0"), ("exit 3", "3"), ("exit 75", "75"), ("kill -9 $$", "137")])
def test_a_worker_keeps_the_status_of_the_training(machine, train, ended):
    home = machine.workers[0]
    assert machine.run("launch/worker.sh", "start", "--", *TRAINING, TRAIN=train, home=home)[0] == 0
    wait_for(home / "llada_jax_run/status")
    assert (home / "llada_jax_run/status").read_text() == f"{ended}\n"
    assert machine.run("launch/worker.sh", "train", "--", *TRAINING, TRAIN=train, home=home)[0] == int(ended)


def test_in_the_foreground_a_stopped_training_is_no_finished_one(machine):
    for train, expected in ((GOES_ON, 143), (FINISHES, 0)):
        process = machine.start(("launch/worker.sh", "train", "--", *TRAINING), TRAIN=train)
        wait_for(machine.folder / "task.trains", process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == expected
        (machine.folder / "task.trains").unlink()
    assert (machine.folder / "task.saved").read_text() == "saved\n", "the first of them"


def test_setup_brings_a_python_where_there_is_an_old_one(machine):
    for name in ("requirements.txt", "pyproject.toml"):
        (machine.root / name).write_text((ROOT / name).read_text())
    home = machine.workers[0]
    (home / "python3.12").write_text(STAND_IN)
    (machine.tools / "python3").write_text(f"""#!/usr/bin/env bash
echo "$*" >>'{machine.folder}/uv'
case "$*" in *version_info*) echo 3.10 ;; "-m uv python find 3.12") echo '{home}/python3.12' ;; esac
""")
    for path in (home / "python3.12", machine.tools / "python3"):
        path.chmod(0o755)
    status, _, err = machine.run("launch/worker.sh", "setup", LLADA_PYTHON="", CALLS=str(machine.folder / "pip"), FAKE_VERSION="3.12")
    assert status == 0, err
    uv = (machine.folder / "uv").read_text().splitlines()[-3:]
    assert uv == ["-m pip install --quiet --user uv", "-m uv python install 3.12", "-m uv python find 3.12"]
    wanted = (machine.root / ".venv/installed").read_text()
    assert "jax[tpu]==" in wanted and "gcsfs==" in wanted
    assert "--target" in (machine.folder / "pip").read_text()  # libtpu


def worker_lines(*ends):
    return "\n".join(f"worker w{i}: {end}" for i, end in enumerate(ends))


def ready(machine, resource, training, **status):
    """Answers of a cloud in which the queued resource and the training go through these states."""
    machine.answer(*DESCRIBE_RESOURCE, says=resource)
    machine.answer(*DESCRIBE_NODE, says="READY")
    machine.answer("worker.sh status", says=training, **status)
    machine.answer("tpu-vm scp")
    machine.answer("tpu-vm ssh")
    git(machine, "init", "-q")
    git(machine, "add", "-A")


PREPARE = ["tpu-vm describe", "tpu-vm ssh", "tpu-vm ssh", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh setup", "tpu-vm ssh start"]
LOOK = ["queued-resources describe", "tpu-vm describe", "tpu-vm ssh status"]


def test_queued_trains_to_the_end(machine):
    ready(machine, ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"],
          [worker_lines("running 5", "running 6"), worker_lines("ended 0", "running 6"), worker_lines("ended 0", "ended 0")])
    status, _, err = machine.run(*QUEUED, "--yes", "--", *TRAINING)
    assert status == 0, err
    calls = machine.calls()
    assert kinds(calls) == ["queued-resources create", *["queued-resources describe"] * 3, *PREPARE, *LOOK * 3, "queued-resources delete"]
    create = next(call for call in calls if "create" in call)
    assert {"--spot", "--node-id=pod", "--runtime-version=v2", "--accelerator-type=v5p-128", "--zone=z", "--project=p"} <= set(create)
    start = next(call for call in calls if "worker.sh start" in call[-1])
    assert shlex.split(start[-1].removeprefix("--command="))[-len(TRAINING):] == list(TRAINING)


def test_queued_asks_again_when_the_tpus_are_taken_away(machine):
    ready(machine, ["ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED",  # lost while it trains
                    "FAILED",  # never came
                    "ACTIVE", "SUSPENDED",  # lost while it is prepared
                    "ACTIVE"], [worker_lines("running 5"), worker_lines("ended 0")])
    machine.answers.insert(0, [["worker.sh setup"], [], [0, 255, 0]])
    machine.answer()
    status, _, err = machine.run(*QUEUED, "--yes", "--", *TRAINING)
    assert status == 0, err
    calls = machine.calls()
    again = ["queued-resources delete", "queued-resources create"]
    assert [kind for kind in kinds(calls) if kind.split()[-1] in ("create", "delete", "start", "setup")] == [
        "queued-resources create", "tpu-vm ssh setup", "tpu-vm ssh start", *again, *again, "tpu-vm ssh setup", *again,
        "tpu-vm ssh setup", "tpu-vm ssh start", "queued-resources delete"]
    starts = [call for call in calls if "worker.sh start" in call[-1]]
    assert starts[0] == starts[1]  # the same command resumes


@pytest.mark.parametrize("stopped", [worker_lines("ended 75", "ended 75"), worker_lines("ended 0", "ended 75")])
def test_queued_goes_on_where_a_notice_stopped_the_training_and_the_tpus_stay(machine, stopped):
    ready(machine, "ACTIVE", [worker_lines("running 5"), *[stopped] * 5, worker_lines("ended 0", "ended 0")])
    status, _, err = machine.run(*QUEUED, "--yes", "--", *TRAINING)
    assert status == 0, err
    assert "stopped before its last step" in err and "finished" in err.splitlines()[-1]
    found = [kind for kind in kinds(machine.calls()) if kind.split()[-1] in ("create", "delete", "start")]
    assert found == ["queued-resources create", "tpu-vm ssh start", "tpu-vm ssh start", "queued-resources delete"]


def test_queued_resumes_on_others_when_the_tpus_go_after_a_notice(machine):
    ready(machine, ["ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDED", "ACTIVE"], [worker_lines("ended 75", "ended 75")] * 2 + [worker_lines("ended 0")])
    assert machine.run(*QUEUED, "--yes", "--", *TRAINING)[0] == 0
    assert kinds(machine.calls()).count("queued-resources create") == 2


def test_queued_gives_up_after_max_retries(machine):
    ready(machine, "SUSPENDED", "")
    status, _, err = machine.run(*QUEUED, "--max_retries=2", "--yes", "--", *TRAINING)
    assert status == 1 and "--max_retries=2" in err
    calls = machine.calls()
    assert kinds(calls).count("queued-resources create") == 3 and kinds(calls).count("queued-resources delete") == 2
    assert [call[1] for call in calls if call[0] == "sleep"] == ["60", "120"]


def test_queued_deletes_nothing_that_was_not_confirmed(machine):
    ready(machine, "SUSPENDED", "")
    status, _, err = machine.run(*QUEUED, "--", *TRAINING, stdin="no\n")
    assert status == 1 and "nothing was deleted" in err
    assert kinds(machine.calls()) == ["queued-resources create", "queued-resources describe"]
    machine.answers = [[["queued-resources create"], [], [6]]]  # the name is taken, by somebody else's perhaps
    machine.answer()
    assert machine.run(*QUEUED, "--yes", "--", *TRAINING)[0] == 6
    assert kinds(machine.calls()) == ["queued-resources create"] * 4


@pytest.mark.parametrize("training, code, expected", [
    (worker_lines("ended 3", "ended 1"), 0, 3),
    (worker_lines("ended 0", "ended 143"), 0, 143),
    (worker_lines("ended without a status", "no run"), 0, 1),
    ("", 255, 1),
    (worker_lines("ended 0", "ended without a status"), 0, 1),
    (worker_lines("ended 0", "no run"), 0, 1),
    (worker_lines("ended 75", "ended without a status"), 0, 1),
    (worker_lines("ended 75", "ended 3"), 0, 3),
])
def test_queued_ends_with_the_status_of_a_training_that_failed_and_keeps_its_tpus(machine, training, code, expected):
    ready(machine, "ACTIVE", training, status=code)
    status, _, err = machine.run(*QUEUED, "--yes", "--", *TRAINING)
    assert status == expected and "the TPUs are kept" in err
    found = kinds(machine.calls())
    assert found.count("tpu-vm ssh status") == 5 and "queued-resources delete" not in found


def test_queued_adopts_a_running_training(machine):
    ready(machine, "ACTIVE", [worker_lines("running 5"), worker_lines("running 5"), worker_lines("ended 0")])
    assert machine.run(*QUEUED, "--adopt", "--yes", "--", *TRAINING)[0] == 0
    assert kinds(machine.calls()) == ["queued-resources describe", "tpu-vm describe", "tpu-vm ssh status", *LOOK * 2, "queued-resources delete"]


def test_gke_sends_a_job_set_that_holds_what_was_asked_for(machine):
    assert machine.run("launch/gke.sh", "submit", *GKE, "--slices=2", "--max_restarts=7", "--", *TRAINING, "$(HOME) ${NAME} ü")[0] == 0
    assert machine.calls() == [["kubectl", "--context=c", "--namespace=n", "create", "--filename=-"]]
    text = (machine.folder / "manifest").read_text()
    job_set = yaml.safe_load(text)
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert job_set["metadata"]["name"] == "run" and job_set["metadata"]["namespace"] == "n"
    assert job_set["spec"]["failurePolicy"] == {"maxRestarts": 7}
    [job] = job_set["spec"]["replicatedJobs"]
    assert (job["replicas"], job["template"]["spec"]["parallelism"], job["template"]["spec"]["completions"]) == (2, 16, 16)
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice", "cloud.google.com/gke-tpu-topology": "4x4x4"}
    [container] = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert [text.replace("$$", "$") for text in container["args"]] == [*TRAINING, "$(HOME) ${NAME} ü"]  # Kubernetes reads $$ as $
    assert "${" not in text.replace("$${NAME}", "")
    script = container["command"][1].removeprefix("/llada_jax/")
    train = lambda **env: machine.run(script, *container["command"][2:], *TRAINING, **env)[0]
    assert (train(), train(TRAIN="exit 75")) == (0, 75), "a pod that stopped early fails, and JobSet starts all again"


SBATCH = ("sbatch", "--nodes=1", "--gpus-per-node=2", "--ntasks-per-node=2", "launch/slurm.sbatch")


def test_slurm_trains_and_ends_with_the_status_of_the_training(machine):
    assert machine.run(*SBATCH, "--", *TRAINING)[0] == 0
    for task in range(2):
        assert (machine.folder / f"task{task}.arguments").read_text().split("\0")[:-1] == ["-m", "llada_jax.train", *TRAINING]
    assert machine.run(*SBATCH, "--", *TRAINING, TRAIN="exit $((3 + SLURM_PROCID))")[0] == 4
    assert machine.calls("scontrol") == []
    status, _, err = machine.run(*SBATCH[:2], "--gpus-per-node=8", *SBATCH[3:], "--", *TRAINING)
    assert status == 2 and "--ntasks-per-node=8" in err
    status, _, err = machine.run("sbatch", str(machine.root / "launch/slurm.sbatch"), "--", *TRAINING, SLURM_SUBMIT_DIR="/")
    assert status == 0, err  # sbatch sets the folder
    assert machine.run("launch/slurm.sbatch", "--", *TRAINING, SLURM_SUBMIT_DIR="/")[0] == 2


def test_slurm_saves_and_queues_itself_again_on_a_signal(machine):
    for restarts, expected in ((0, 0), (4, 0), (5, 1)):
        process = machine.start((*SBATCH, "--max_restarts=5", "--", *TRAINING), TRAIN=GOES_ON, SLURM_RESTART_COUNT=str(restarts))
        for task in range(2):
            wait_for(machine.folder / f"task{task}.trains", process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == expected, err
        assert machine.calls("scontrol") == ([["scontrol", "requeue", "17"]] if expected == 0 else [])
        for task in range(2):
            assert (machine.folder / f"task{task}.saved").read_text() == "saved\n"
            (machine.folder / f"task{task}.saved").unlink()
            (machine.folder / f"task{task}.trains").unlink()


def test_slurm_queues_itself_again_after_a_notice_and_not_when_it_has_finished(machine):
    assert machine.run(*SBATCH, "--", *TRAINING, TRAIN="exit 75")[0] == 0
    assert machine.calls("scontrol") == [["scontrol", "requeue", "17"]]
    process = machine.start((*SBATCH, "--", *TRAINING), TRAIN=FINISHES)
    for task in range(2):
        wait_for(machine.folder / f"task{task}.trains", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0 and machine.calls("scontrol") == []


@pytest.mark.parametrize("value, status", [("08", 0), ("0", 0), ("-1", 2), ("0x8", 2), ("1 ", 2), ("", 2)])
def test_a_number_may_have_leading_zeros(machine, value, status):
    """But no other form."""
    machine.answer(*DESCRIBE_NODE, says="CREATING")
    found, _, err = machine.run("launch/tpu_vm.sh", "wait", *AT, f"--timeout={value}")
    assert found == (status or 1) and ("is not a whole number" if status else f"after --timeout={int(value)} s") in err, err
    assert machine.run("launch/gke.sh", "render", *GKE, "--chips_per_host=08", "--", *TRAINING)[0] == 0


def preflight(machine, *flags, **env):
    status, out, err = machine.run("launch/preflight.sh", "--zone=z", "--project=p", "--type=v5p-128", "--version=v", *flags, "--", *TRAINING, **env)
    return status, [line.split(maxsplit=1) for line in out.splitlines()], err


def test_preflight_passes_and_leaves_nothing_in_the_bucket(machine):
    git(machine, "init", "-q")
    git(machine, "add", "-A")
    git(machine, "commit", "-qm", "a")
    for words in ("auth list", "services list"):
        machine.answer(words, says="something")
    status, lines, err = preflight(machine, "--context=c", TRAIN='echo "$JAX_NUM_CPU_DEVICES" >>"$here.devices"')
    assert (status, err) == (0, "") and [line[0] for line in lines] == ["PASS"] * 12, lines
    calls = machine.calls()
    made, removed = (call for call in calls if call[:2] == ["gcloud", "storage"])
    assert made[:3] == ["gcloud", "storage", "cp"] and removed == ["gcloud", "storage", "rm", made[-1]] and made[-1].startswith("gs://b/llada_jax-")
    assert (machine.folder / "task.devices").read_text() == "64\n"
    arguments = (machine.folder / "task.arguments").read_text().split("\0")[:-1]
    assert arguments[:-2] == ["-m", "llada_jax.train", *TRAINING] and arguments[-1] == "--dry_run"
    assert arguments[-2].startswith("--workdir=/") and not pathlib.Path(arguments[-2].removeprefix("--workdir=")).parent.exists()


def test_preflight_names_every_failed_check(machine):
    git(machine, "init", "-q")
    git(machine, "add", "-A")
    git(machine, "commit", "-qm", "a")
    (machine.root / "changed").touch()
    machine.answer("services list", says="")  # prints an empty line: the API is not enabled
    for words in ("projects describe", "locations describe", "accelerator-types", "versions", "storage cp"):
        machine.answer(words, status=1)
    (machine.tools / "scp").unlink()
    status, lines, _ = preflight(machine, TRAIN="echo 'error: mesh data=7'; exit 1")
    assert status == 1 and [line[0] for line in lines] == ["FAIL"] * 10, lines
    text = "\n".join(line[1] for line in lines)
    assert all(word in text for word in ("PATH: scp", "gcloud auth login", "project p", "zone z", "v5p-128", "?? changed", "error: mesh data=7"))


if __name__ == "__main__":
    for path in RECORDED.glob("*.txt"):
        path.write_text(record(path.read_text()))
