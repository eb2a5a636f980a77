"""The set-up scripts, on a copy of what they read and with a stand-in for Python: nothing is installed here."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOLS = ("bash", "cat", "dirname", "env", "grep", "mkdir", "mv", "readlink", "rm", "sleep", "tail", "touch")

# Answers as Python does, except where a variable says otherwise; environments are copies of itself; writes down every module it runs.
STAND_IN = f"""#!/usr/bin/env bash
case "$*" in
  *version_info*) [ -z "${{FAKE_VERSION:-}}" ] || {{ echo "$FAKE_VERSION"; exit; }} ;;
  *ensurepip*) exit "${{FAKE_NO_VENV:-0}}" ;;
  *disk_usage*) [ -z "${{FAKE_FREE_MB:-}}" ] || {{ echo "$FAKE_FREE_MB"; exit; }} ;;
  "-m venv "*) mkdir -p "$3/bin"; cat "$0" >"$3/bin/python"; {shutil.which("chmod")} +x "$3/bin/python"; exit ;;
  "-m llada_jax.train"*) eval "${{FAKE_TRAIN:-}}" ;;&
  "-m "*) echo "$PWD|${{*//[[:space:]]/ }}" >>"$CALLS"; [[ "$*" != "-m pip"* ]] || eval "${{FAKE_PIP:-}}"; exit ;;
esac
exec {shlex.quote(sys.executable)} "$@"
"""


class Machine:
    """A repository with blanks in its path, and a PATH on which only `pythons` and a few tools exist."""

    def __init__(self, folder, pythons=("python3.12",)):
        self.root = folder / "a clone"
        shutil.copytree(ROOT / "launch", self.root / "launch")
        for name in ("requirements.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        for python in pythons:
            (self.bin / python).write_text(STAND_IN)
            (self.bin / python).chmod(0o755)
        self.calls_file = folder / "calls"
        self.elsewhere = folder / "else where"
        self.elsewhere.mkdir()

    def start(self, *args, script="launch/demo.sh", **env):
        env = {"PATH": str(self.bin), "HOME": str(self.root), "CALLS": str(self.calls_file), **env}
        return subprocess.Popen(["bash", self.root / script, *args], cwd=self.elsewhere, env=env, text=True, start_new_session=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a job in the background ignores it

    def run(self, *args, **kwargs):
        """(exit status, stdout, stderr)."""
        process = self.start(*args, **kwargs)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def calls(self, word=""):
        """Modules that were run since the last question, as `folder|-m module arguments`."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return [line for line in lines if word in line]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_shellcheck_is_clean():
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    scripts = [*sorted((ROOT / "launch").glob("*.s*")), ROOT / ".ci/run"]
    result = subprocess.run([shutil.which("shellcheck", path=path), *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_demo_runs_from_any_folder_through_a_link(machine):
    link = machine.elsewhere / "demo link"
    link.symlink_to(machine.root / "launch/demo.sh")
    status, out, err = machine.run("my run", script=link)
    assert status == 0, err
    pip, train, *samples = machine.calls()
    assert "-m pip install" in pip
    assert train == f"{machine.root}|-m llada_jax.train --config=configs/pystdlib.py --workdir={machine.elsewhere}/my run"
    assert all(f"{machine.root}|-m llada_jax.sample --workdir={machine.elsewhere}/my run" in line for line in samples)
    assert f"{machine.elsewhere}/my run/curves.png" in out


def test_installs_once_and_again_when_the_pins_change(machine):
    assert machine.run()[0] == 0
    assert len(machine.calls("-m pip")) == 1
    assert machine.run()[0] == 0
    assert machine.calls("-m pip") == []
    with open(machine.root / "requirements.txt", "a") as file:
        file.write("something==1.0\n")
    assert machine.run()[0] == 0
    assert len(machine.calls("-m pip")) == 1


def test_ci_alone_installs_torch_by_itself_and_first(machine):
    shutil.copytree(ROOT / ".ci", machine.root / ".ci")
    (machine.bin / "shellcheck").symlink_to(shutil.which("true"))
    assert machine.run(script="launch/test.sh")[0] == 0
    packages, libtpu = machine.calls("-m pip")
    assert packages.endswith(f"-r {machine.root}/.venv/direct") and "jax[tpu]" not in (machine.root / ".venv/direct").read_text()
    assert re.search(rf"--no-deps --target {re.escape(str(machine.root))}/.venv/libtpu libtpu==[\d.*]+$", libtpu)
    status, out, err = machine.run(script=".ci/run", FAKE_VERSION="3.11")
    assert status == 0, err
    assert out.endswith("kernels under jax 0.11: left out, as there is no Python 3.12 here\n")
    modules = [line.split("|")[1].removeprefix("-m ") for line in machine.calls()]
    options = "--disable-pip-version-check --no-input"
    assert [call for call in modules if call.startswith("pip ")] == modules[-3:-1]
    assert re.fullmatch(rf"pip install {options} torch==[\d.]+", modules[-3])
    assert modules[-2] == f"pip install {options} -r {machine.root}/.venv/direct"
    assert modules[-1] == "pytest -n 2 tests/test_live_parity.py tests/test_bench.py tests/test_harness_runs.py"
    assert machine.run(script=".ci/run", FAKE_VERSION="3.11")[2] == ""
    assert machine.calls("-m pip") == []


def test_ci_runs_the_kernels_under_a_newer_jax(machine):
    shutil.copytree(ROOT / ".ci", machine.root / ".ci")
    (machine.bin / "shellcheck").symlink_to(shutil.which("true"))
    for newly in (True, False):
        status, _, err = machine.run(script=".ci/run", FAKE_VERSION="3.12")
        assert status == 0, err
        *before, tests = [line.split("|")[1] for line in machine.calls()]
        assert tests.startswith("-m pytest -n 2 -m not slow and not libtpu tests/")
        assert (before[-1] == "-m pip install -q jax==0.11.0 -r .venv-jax011/wanted") == newly
    wanted = (machine.root / ".venv-jax011/wanted").read_text()
    assert re.fullmatch(r"(numpy|pytest|pytest-xdist|hypothesis)==[\d.]+", wanted.splitlines()[0]) and wanted.count("\n") == 4


def test_two_at_once_install_once(machine):
    first, second = (machine.start(FAKE_PIP="sleep 1") for _ in range(2))
    messages = [process.communicate(timeout=60)[1] for process in (first, second)]
    assert first.returncode == second.returncode == 0, messages
    assert len(machine.calls("-m pip")) == 1
    assert sum("waiting for another installation" in message for message in messages) == 1


def test_an_interrupted_installation_is_made_anew(machine):
    process = machine.start(FAKE_PIP="touch half-done; sleep 60")
    while not (machine.elsewhere / "half-done").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (machine.root / ".venv/half-written").touch()
    status, _, err = machine.run()
    assert status == 0
    assert "did not end" in err
    assert not (machine.root / ".venv/half-written").exists()
    assert machine.run()[2] == ""


def test_an_interrupted_training_is_not_sampled(machine):
    process = machine.start(FAKE_TRAIN="trap 'touch saved' INT; touch trains; sleep 1")
    while not (machine.root / "trains").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert (machine.root / "saved").exists()
    assert machine.calls("llada_jax.sample") == []


PROBLEMS = {  # environment, words of the message
    "an old Python": ({"FAKE_VERSION": "3.10"}, ["3.10", "3.11 or 3.12", "run: "]),
    "an old Python by name": ({"FAKE_VERSION": "3.9", "PYTHON": "python3.12"}, ["PYTHON=python3.12 is 3.9", "run: env -u PYTHON bash"]),
    "a Python by name that is not there": ({"PYTHON": "python3.99"}, ["PYTHON=python3.99 is not found", "run: "]),
    "no venv module": ({"FAKE_NO_VENV": "1"}, ["no venv module", "run: apt-get install python3.1"]),
    "a small disk": ({"FAKE_FREE_MB": "100"}, ["100 MB", "4000 MB", "pip cache purge"]),
    "a disk that fills": ({"FAKE_PIP": "echo 'OSError: [Errno 28] No space left on device'; exit 1"}, ["disk", "run again: bash '"]),
    "no network": (
        {"FAKE_PIP": "echo 'WARNING: Retrying after NewConnectionError: [Errno -3] Temporary failure in name resolution'; exit 1"},
        ["no connection", "run again: bash '"],
    ),
    "another trouble of pip": ({"FAKE_PIP": "echo 'ERROR: the wheel is odd'; exit 1"}, ["the wheel is odd", "run again: bash '"]),
    "an environment that is not there": ({"LLADA_PYTHON": "/nowhere/python"}, ["/nowhere/python is not found", "run without it: "]),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("script", ["launch/demo.sh", "launch/test.sh"])
def test_a_problem_gives_one_line(machine, problem, script):
    env, words = PROBLEMS[problem]
    if problem == "an old Python":
        (machine.bin / "python3").symlink_to(machine.bin / "python3.12")
    status, out, err = machine.run(script=script, **env)
    *before, error = err.splitlines()
    assert (status, out) == (1, "")
    assert error.startswith("error: ")
    assert all(word in error for word in words), error
    assert all(line.startswith("installing ") for line in before), err
    assert machine.calls("llada_jax") == []


def test_takes_the_first_python_that_fits(tmp_path):
    machine = Machine(tmp_path, pythons=("python3.12", "python3.11"))
    stand_in = (machine.bin / "python3.12").read_text()
    (machine.bin / "python3.12").write_text(stand_in.replace("#!/usr/bin/env bash", "#!/usr/bin/env bash\nexit 127", 1))
    status, _, err = machine.run(FAKE_VERSION="3.11")
    assert status == 0, err
    assert "for Python 3.11" in err


def test_given_environment_is_used_as_it_is(machine):
    status, _, err = machine.run(LLADA_PYTHON=str(machine.bin / "python3.12"))
    assert (status, err) == (0, "")
    assert [line.split("|")[1].split()[1] for line in machine.calls()] == ["llada_jax.train", "llada_jax.sample", "llada_jax.sample"]
    assert not (machine.root / ".venv").exists()
    text = (machine.root / "pyproject.toml").read_text()
    (machine.root / "pyproject.toml").write_text(text.replace("dependencies = [", 'dependencies = [\n  "no-such-thing[x]==1.0",', 1))
    status, _, err = machine.run(LLADA_PYTHON=str(machine.bin / "python3.12"))
    assert status == 1
    assert len(err.splitlines()) == 1
    assert err.endswith("requirements.txt' 'no-such-thing[x]==1.0'\n")


def test_requirements_are_exact_and_name_no_place():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert all("==" in line and "/" not in line and not line.startswith("-") for line in lines)
