"""README.md says what is true of the repository: commands, flags, files, configs."""

import functools
import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from llada_jax import config as config_lib
from llada_jax.data import sudoku
from llada_jax.evaluation import scoring
from llada_jax.model import count
from llada_jax.sampling import presets as decoder_presets
from llada_jax.tokenizer import Characters
from llada_jax.training import presets
from tests import test_parity, tiny_run

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```", TEXT, re.S | re.M) for line in block.splitlines() if line.strip()]
SPANS = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"```.*?```|<!--.*?-->", "", TEXT, flags=re.S))
TRAIN, PREPARE, CONVERT, BENCH, EVALUATE = (f"llada_jax.{name}" for name in ("train", "prepare", "convert", "bench", "evaluate"))
ENTRY_POINTS = "train", "sample", "evaluate", "prepare", "convert", "compile", "bench"
ONE_AXIS = [f"--config.mesh.{size}" for size in ("data=-1", "expert=1", "tensor=1")]  # whatever the config splits
SMALL = ["--config.data.limit=24", "--config.data.vocab_size=512"]  # texts of seconds in place of the whole library


def words(command):
    return shlex.split(command, comments=True)


def module(command):
    parts = words(command)
    return parts[2] if parts[:2] == ["python", "-m"] else None


def of(name):
    return [command for command in COMMANDS if module(command) == name]


def python(*arguments):
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, cwd=ROOT, env=tiny_run.environment())


@functools.cache
def flags_of(name):
    """{flag} of an entry point, from its own help."""
    done = python(name, "--help")
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"^\s+--(?:\[no\])?(\w+):", done.stdout, re.M))


def test_there_are_commands():
    assert {module(command) for command in COMMANDS} >= {f"llada_jax.{name}" for name in ENTRY_POINTS}
    assert COMMANDS[:2] and all(words(command)[0] == "bash" for command in COMMANDS[:2])


@pytest.mark.parametrize("command", COMMANDS)
def test_programs_flags_and_files_exist(command):
    parts, name = words(command), module(command)
    if parts[0] == "bash":
        assert (ROOT / parts[1]).is_file()
    elif name is None:
        assert command == "source .venv/bin/activate" or (parts[:2] == ["pip", "install"] and parts[-1] == ".[hub]" and "\nhub = " in PYPROJECT)
    else:
        assert importlib.util.find_spec(name)
        decodes = name in ("llada_jax.sample", EVALUATE)
        chosen, rest = decoder_presets.split_flags(parts[3:]) if decodes else (decoder_presets.Flags(), parts[3:])
        scoring.decoders(chosen, "low_confidence", 16)
        if name in (CONVERT, BENCH):
            assert f'"{rest.pop(0)}": ' in (ROOT / f"{name.replace('.', '/')}.py").read_text().partition("COMMANDS = ")[2]
        for word in rest:
            flag, _, value = word.partition("=")
            if not flag.startswith("--"):
                assert name.startswith("tests.") and (ROOT / word).is_dir()
                continue
            assert flag.removeprefix("--").split(".")[0] in flags_of(name)
            assert flag != "--config" or (ROOT / value.partition(":")[0]).is_file()


def test_folders_are_made_before_they_are_read():
    made = {"runs/demo"}  # by launch/demo.sh
    assert "workdir=$ROOT/runs/demo" in (ROOT / "launch" / "demo.sh").read_text()
    for command in filter(module, COMMANDS):
        given = dict(word.removeprefix("--").split("=", 1) for word in words(command) if word.startswith("--") and "=" in word)
        makes = {TRAIN: "workdir", PREPARE: "out", CONVERT: "out"}.get(module(command))
        for flag in ("workdir", "init_from", "config.data.sources", "checkpoint", "hf_dir"):
            assert flag == makes or given.get(flag, "runs/demo") in made, command
        made.add(given.get(makes, "runs/demo"))


def test_train_commands_are_accepted(tmp_path, monkeypatch):
    """Settings of all of them; data and shapes of those that need nothing made before."""
    monkeypatch.chdir(ROOT)
    commands = [words(command)[3:] for command in of(TRAIN)]
    cases = [[*command, "--print_config"] for command in commands]
    alone = [command for command in commands if "--config.data.sources=runs/shards" not in command]
    cases += [[*command, *SMALL, "--dry_run", f"--workdir={tmp_path / 'run'}"] for command in alone]
    for done in tiny_run.train_each(cases):
        assert done.returncode == 0, (done.args, done.stderr)
        assert "nothing was trained" in done.stdout or "--config.train.steps=" in done.stdout
    assert not (tmp_path / "run").exists()


def test_shards_fit_the_config_that_reads_them():
    (command,) = of(PREPARE)
    data = dict(presets.all_presets())["pystdlib.py"].data
    assert {f"--sequence_length={data.sequence_length}", f"--vocab_size={data.vocab_size}"} <= set(words(command))


def test_flags_in_the_text_exist():
    known = set().union(*(flags_of(f"llada_jax.{name}") for name in ENTRY_POINTS))
    known |= {"decoder", "cache", "kernels", "tune", "markdown"}  # whose fields are flags; of tests.parity; of pallas_kernels.bench
    for span in SPANS:
        for flag in re.findall(r"(?:^| )--(\w+)", span):
            assert flag in known, span


def test_settings_in_the_text_exist():
    known = set(config_lib.flatten(config_lib.Config()))
    groups = {key.split(".")[0] for key in known}
    for span in SPANS:
        found = re.fullmatch(r"(?:--config\.)?(\w+)\.(\w+|\*)(?:=.*)?", span)
        if found and found[1] in groups and found[2] != "py":
            assert found[2] == "*" or f"{found[1]}.{found[2]}" in known, span


def test_links_and_files_exist():
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert target.startswith(("https://", "#")) or (ROOT / target).exists(), target
    folders = ("llada_jax", "pallas_kernels", "configs", "launch", "tests", "notebooks")
    paths = [path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.*")]
    paths += [path.name for path in ROOT.iterdir() if path.is_file()]
    names = {path.rsplit("/", 1)[-1] for path in paths} | set(paths)
    for span in SPANS:
        if re.fullmatch(r"[\w/]+\.(py|sh|ipynb|toml)", span):
            assert span in names, span
        elif re.fullmatch(rf"({'|'.join(folders)})/[\w/]*", span):
            assert any(path.startswith(span) for path in paths), span


def test_every_config_is_in_the_table():
    """With its parameters, total and active; of ablations there is a list of results instead."""
    def millions(number):
        m = number / 1e6
        return (f"{m:,.0f}" if m >= 100 else f"{m:.3g}" if m >= 1 else f"{m:.2f}") + " M"
    rows = dict(re.findall(r"^\| `(\w+\.py[\w:=,]*)` \| [^|]+ \| ([^|]+) \|", TEXT, re.M))
    expected = {}
    for name, config in presets.all_presets():
        if name.startswith("ablations/"):
            assert f"| `configs/{name.partition(':')[0]}` |" in TEXT
            continue
        vocabulary = Characters(sudoku.ALPHABET).vocab_size if config.data.sources == "sudoku" else config.data.vocab_size
        size = count.parameters(config_lib.with_vocab_size(config, config.model.vocab_size or vocabulary).model)
        expected[name] = f"{millions(size.total)} ({millions(size.active)})"
    assert rows == expected


def test_recorded_cases_are_counted():
    cases = test_parity.CASES
    assert f"`{sum(cases.values())} passed, 0 failed`" in TEXT
    assert f"`{len(list((ROOT / 'tests' / 'data' / 'decoding').glob('*.json')))} passed, 0 failed, 0 skipped`" in TEXT


def test_everything_is_measured():
    """No cell is left to fill in."""
    assert "MEASURE" not in TEXT


@pytest.mark.slow
def test_commands_run_as_printed(tmp_path):
    """All commands on runs, in order, with small models and few texts, in a folder of their own."""
    small = [*SMALL, "--config.model.hidden_size=16", "--config.model.expert_size=16", "--config.train.steps=2", "--config.train.steps_per_call=2",
             "--config.train.batch_size=8", "--config.train.eval_every=0"]
    tiny = [f"--config.model.{setting}" for setting in ("vocab_size=512", "hidden_size=32", "num_heads=2", "num_layers=2", "expert_size=16")]
    extra = {TRAIN: small, PREPARE: ["--limit=24", "--vocab_size=512"], f"{CONVERT} make": tiny,
             EVALUATE: ["--limit=4"], BENCH: [*tiny, *ONE_AXIS, "--pairs=1", "--baseline=none"]}
    demo = f"python -m {TRAIN} --config=configs/pystdlib.py --workdir=runs/demo"
    for command in [demo, *COMMANDS]:
        name = module(command) or ""
        if name.startswith("llada_jax."):
            arguments = [re.sub(r"=runs/", f"={tmp_path}/runs/", word) for word in words(command)[3:]]
            done = python(name, *arguments, *extra.get(name, []), *extra.get(f"{name} {arguments[0]}", []))
            assert done.returncode == 0, (command, done.stderr)
    made = {path.relative_to(tmp_path / "runs").as_posix() for path in (tmp_path / "runs").rglob("*")}
    assert {"demo/random.jsonl", "first/curves.png", "first/metrics.jsonl", "first/config.json", "shards/card.json"} <= made
    for file in (tmp_path / "runs" / "published").iterdir():
        assert (tmp_path / "runs" / "exported" / file.name).read_bytes() == file.read_bytes()
    assert any(re.fullmatch(r"demo/samples/\w+\.html", path) for path in made)
