"""Sweeps and what is said of them: the runs of an ablation, going on, intervals, differences by seed, tokens a forward at equal rates."""

import functools
import json
import random
import shlex
import subprocess
import sys

import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax.config import ConfigError
from llada_jax.evaluation import paired
from llada_jax.training import metrics, presets, sweep
from tests import tiny_run

ABLATIONS = sorted((presets.FOLDER / "ablations").glob("*.py"))


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_every_ablation_says_what_it_runs(path):
    module = presets.module_of(path)
    text = module.__doc__ or ""
    assert all(f"\n{word}: " in text for word in ("Hypothesis", "Metric", "Budget")) and f"--config=configs/ablations/{path.name} --sweep" in text
    runs = sweep.runs(str(path), module, "W")
    assert [run.name for run in runs] == [f"{variant}-{seed}" for seed in range(module.SEEDS) for variant in module.VARIANTS]
    assert module.SEEDS >= 5 or "bootstrap" in text, "five seeds for a paired interval, fewer where laws are fitted to a grid"
    starts = getattr(module, "FROM", {})
    for i, run in enumerate(runs):
        before = [other.folder for other in runs[:i]]
        if run.variant in starts:
            start = f"W/{starts[run.variant]}-{run.seed}"
            assert start in before and any(start in word for word in run.commands[0])
        assert run.trained in (*before, run.folder)


TINY = {"steps": 8, "checkpoint_every": 2, "keep_every": 2, "eval_every": 4, "eval_batches": 1}
CONFIG = '''
from configs import common
from tests import tiny_run
VARIANTS, SEEDS = ("a", "b", "mean"), 2
FROM = {{"b": "a", "mean": "a"}}
COMMANDS = {{"mean": "-m llada_jax.convert average --workdir={{start}} --top=2 --out={{folder}}"}}
EVALUATE = {{"mean": "--max_rows=4"}}

def get_config(arg=None):
    arg = common.parse_arg(arg, variant="a", seed=0)
    config = tiny_run.get_config()
    config.data.sources = {texts!r}
    config.train.seed = arg.seed
    config.train.steps = 8
    config.train.checkpoint_every = config.train.eval_every = config.train.keep_every = 4
    config.optimizer.learning_rate = 1e-2 if arg.variant == "a" else 5e-3
    return config
'''


@pytest.mark.slow
def test_a_sweep_runs_goes_on_and_refuses_other_settings(tmp_path):
    path, work = tmp_path / "tiny.py", tmp_path / "sweep"
    path.write_text(CONFIG.format(texts=tiny_run.write_texts(tmp_path / "texts")))

    def call(program, *more):
        return subprocess.run([sys.executable, "-m", f"llada_jax.{program}", *more], capture_output=True, text=True, cwd=presets.FOLDER.parent,
                              env=tiny_run.environment())
    train = functools.partial(call, "train", f"--config={path}", f"--workdir={work}")
    one = train("--sweep=0")
    assert one.returncode == 0, one.stderr
    done = train("--sweep")
    assert done.returncode == 0, done.stderr
    assert "a-0: done before" in done.stdout
    lines = metrics.read_jsonl(work / "results.jsonl")
    assert [line["name"] for line in lines] == ["a-0", "b-0", "mean-0", "a-1", "b-1", "mean-1"]
    assert lines[0]["tokens"] == 8 * 4 * 32 and lines[0]["heldout"]["bits_per_byte"] > 0 and lines[2]["evaluate"]["heldout"]["rows"] == 4
    assert lines[0]["settings"]["train.seed"] == 0 and lines[3]["settings"]["train.seed"] == 1
    before = (work / "results.jsonl").read_text()
    again = train("--sweep", "--config.train.steps=9")
    assert again.returncode == 1 and "a-0 of other commands" in again.stderr
    assert (work / "results.jsonl").read_text() == before
    assert "0 to 5" in train("--sweep=6").stderr
    told = call("plot", str(work))
    assert told.returncode == 0, told.stderr
    rows = json.loads(told.stdout.splitlines()[-1])["rows"]
    values = [line["heldout"]["bits_per_byte"] for line in lines if line["variant"] in "ab"]
    found = next(row for row in rows if row["variant"] == "b" and row["difference"])
    np.testing.assert_allclose(found["difference"]["mean"], np.mean([values[1] - values[0], values[3] - values[2]]), rtol=1e-6)
    assert (work / "plot.png").stat().st_size > 10_000
    folders = [str(work / name) for name in ("a-0", "a-1", "b-0")]
    curves = call("plot", *folders, f"--out={tmp_path / 'curves.png'}")
    assert [len(group["runs"]) for group in json.loads(curves.stdout.splitlines()[-1])["groups"]] == [2, 1], curves.stderr
    assert "go alone" in call("plot", str(work), folders[0]).stderr
    (tmp_path / "twice.jsonl").write_text(before + before.splitlines()[0])
    assert "holds a-0 twice" in call("plot", str(tmp_path / "twice.jsonl")).stderr
    assert "there is no" in call("plot", str(tmp_path / "none.jsonl")).stderr
    assert "no results of a sweep" in call("plot", str(work / "a-0" / "metrics.jsonl")).stderr


def results_of(path, edits, names):
    """What a sweep would have written of these runs."""
    module = presets.module_of(str(path))
    made = {run.name: run for run in sweep.runs(str(path), module, "WORKDIR", edits)}
    return [{"name": name, "commands": [shlex.join(words) for words in made[name].commands], "settings": sweep.settings_of(module, made[name], edits)}
            for name in names]


def test_what_a_sweep_refuses_before_its_first_run(tmp_path, capsys):
    path, work = presets.FOLDER / "ablations" / "noise.py", tmp_path / "work"
    for key, value in (("train.seed", 5), ("diffusion.weighting", "uniform")):
        with pytest.raises(ConfigError, match=rf"config.{key} would make base-0 and .* the same run"):
            sweep.sweep(str(path), str(work), {key: value})
    assert not work.exists()
    work.mkdir()
    [line] = results_of(path, {"train.steps": 6}, ["uniform-1"])
    assert line["settings"]["train.steps"] == 6 and line["settings"]["train.seed"] == 1
    (work / "results.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ConfigError, match=r"uniform-1 of other commands or settings .train.steps 6, now 200"):
        sweep.sweep(str(path), str(work))
    sweep.sweep(str(path), str(work), {"train.steps": 6}, dry=True)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 25 and [("done before" in text) for text in told].index(True) == [run.name for run in sweep.runs(
        str(path), presets.module_of(str(path)), "W")].index("uniform-1")
    assert "--config.train.steps=6" in told[0] and not (work / "base-0").exists()
    with pytest.raises(ConfigError, match=r"uniform-1, which is no run of .*repeats.py"):
        sweep.sweep(str(presets.FOLDER / "ablations" / "repeats.py"), str(work))
    with pytest.raises(ConfigError, match=r"mean-0 begins with .*last-0, which is not there"):
        sweep.sweep(str(presets.FOLDER / "ablations" / "averaging.py"), str(tmp_path), only=1)


def test_a_line_cut_short_is_replaced_and_any_other_broken_one_is_told(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"name": "a-0", "x": 0.1}\n{"name": "a-1", "x')
    assert [line["name"] for line in metrics.read_jsonl(path)] == ["a-0"]
    sweep._append(path, {"name": "b-0"})
    assert path.read_text() == '{"name": "a-0", "x": 0.1}\n{"name": "b-0"}\n'
    for broken in ('{"name"', "[1, 2]"):
        path.write_text(f'{{"name": "a-0"}}\n{broken}\n{{"name": "b-0"}}\n')
        with pytest.raises(ConfigError, match="line 2 of 3 is no json object"):
            metrics.read_jsonl(path)


@pytest.mark.parametrize("path", [path for path in ABLATIONS if path.with_suffix(".jsonl").exists()], ids=lambda path: path.stem)
def test_recorded_lines_are_of_the_settings_and_commands_of_their_file(path):
    module, defaults = presets.module_of(str(path)), config_lib.flatten(config_lib.Config())
    runs = sweep.runs(str(path.relative_to(presets.FOLDER.parent)), module, "WORKDIR")
    made = {run.name: [shlex.join(words) for words in run.commands] for run in runs}
    for line in metrics.read_jsonl(path.with_suffix(".jsonl")):
        settings = config_lib.from_config_dict(module.get_config(f"variant={line['variant']},seed={line['seed']}"))
        assert json.loads(json.dumps(defaults | line["settings"])) == json.loads(json.dumps(config_lib.flatten(settings))), line["name"]
        assert line["commands"] == made[line["name"]]


def shape_of(value):
    """Keys and kinds, without the figures: lists are as long as a run, mappings of settings and versions grow with the project."""
    if isinstance(value, dict):
        return {key: shape_of(x) for key, x in value.items() if key not in ("settings", "versions")}
    return "number" if isinstance(value, int | float) else type(value).__name__


@pytest.mark.slow
def test_a_recorded_line_lands_in_its_form_again(tmp_path):
    """Any line of the results that are kept, drawn anew each time, made by its command at eight steps."""
    path = random.choice([path for path in ABLATIONS if path.with_suffix(".jsonl").exists()])
    recorded = random.choice(metrics.read_jsonl(path.with_suffix(".jsonl")))
    print(path.stem, recorded["name"])
    module, edits = presets.module_of(str(path)), [f"--config.train.{key}={value}" for key, value in TINY.items()]
    runs = sweep.runs(str(path.relative_to(presets.FOLDER.parent)), module, "WORKDIR")
    names, number = [run.name for run in runs], [run.name for run in runs].index(recorded["name"])
    before = [names.index(f"{module.FROM[run.variant]}-{run.seed}") for run in [runs[number]] if run.variant in getattr(module, "FROM", {})]
    for i in (*before, number):
        done = subprocess.run([sys.executable, "-m", "llada_jax.train", f"--config={path}", f"--sweep={i}", f"--workdir={tmp_path}", *edits],
                              capture_output=True, text=True, cwd=presets.FOLDER.parent, env=tiny_run.environment())
        assert done.returncode == 0, done.stderr
    line = metrics.read_jsonl(tmp_path / "results.jsonl")[-1]
    newer = {key: line[key] for key in ("epochs", "curve")}  # which the first results do not have
    assert shape_of(line) == shape_of({**newer, **recorded}) and line["name"] == recorded["name"]
    assert line["settings"].keys() >= recorded["settings"].keys()


def test_students_interval_covers():
    """Of 1,000 means of five draws about 95 % of the intervals hold the true one; those of normal theory, 1.96 s.e., would hold 88 %."""
    draws = np.random.default_rng(0).normal(3.0, 2.0, (1000, 5))
    held = np.mean([found.low <= 3.0 <= found.high for found in map(paired.t_interval, draws)])
    assert 0.93 < held < 0.97
    assert paired.t_interval([1.0]).high == float("inf")
    assert paired.t_interval([1.0, float("inf")])[1:3] == (-float("inf"), float("inf"))


def test_bootstrap_interval_covers():
    draws = np.random.default_rng(1).exponential(1.0, (300, 40))
    found = [paired.bootstrap_interval(values, draws=500) for values in draws]
    assert 0.88 < np.mean([one.low <= 1.0 <= one.high for one in found]) < 0.98


def test_differences_are_by_seed():
    """A large spread over seeds that both variants share leaves a narrow interval; a seed without a partner is left out."""
    line = lambda variant, seed, bits, **more: {"variant": variant, "seed": seed, "heldout": {"bits_per_byte": bits, "block_size": 0}, **more}
    lines = [line("a", seed, 10.0 * seed) for seed in range(4)] + [line("b", seed, 10.0 * seed - 1 + 0.1 * (-1) ** seed) for seed in (3, 1, 2, 7)]
    rows = {row["variant"]: row for row in paired.comparison(lines)}
    assert rows["a"]["difference"] is None and rows["b"]["difference"].count == 3
    assert -1.4 < rows["b"]["difference"].low < rows["b"]["difference"].mean < rows["b"]["difference"].high < -0.7
    assert paired.comparison(lines, "b")[0]["difference"].mean == -rows["b"]["difference"].mean
    with pytest.raises(ConfigError, match="no variant 'c'"):
        paired.comparison(lines, "c")
    diverged = {"variant": "b", "seed": 3, "heldout": {"bits_per_byte": None, "block_size": 0}}
    assert not np.isfinite(paired.comparison([*lines[:6], diverged])[-1]["difference"].high), "a run without a finite bound is not left out"


def test_the_lowest_of_a_text_read_again_and_again():
    """Epochs are even over the steps; the rise is told where the run is long enough."""
    line = {"heldout": {"bits_per_byte": 5.0, "block_size": 0}, "steps": 100, "epochs": 50.0,
            "curve": [[0, 8.0], [20, 3.0], [40, 4.0], [80, 6.0], [100, 5.0]]}
    assert paired.metrics_of(line) == {"bits a byte": 5.0, "lowest bits a byte": 3.0, "epoch of the lowest": 10.0,
                                       "rise after three times as many epochs": 2.0}
    late = paired.metrics_of({**line, "curve": [[0, 8.0], [100, 5.0]]})
    assert late == {"bits a byte": 5.0, "lowest bits a byte": 5.0, "epoch of the lowest": 50.0}
    assert paired.metrics_of({**line, "epochs": 0.9}) == {"bits a byte": 5.0}


def test_tokens_a_forward_at_equal_rates():
    """Twice as fast at every rate; a setting that another beats in both is left out; curves without a common rate are refused."""
    base = [(0.8, 4.0), (0.9, 2.0), (1.0, 1.0), (0.85, 1.5)]
    assert paired.frontier(base) == [(0.8, 4.0), (0.9, 2.0), (1.0, 1.0)]
    assert paired.gain_at_equal_rate([(rate, 2 * speed) for rate, speed in base], base) == pytest.approx(2)
    assert paired.gain_at_equal_rate([(0.9, 6.0), (1.0, 3.0)], base) == pytest.approx(3)
    with pytest.raises(ConfigError, match="none in common"):
        paired.gain_at_equal_rate([(0.1, 9.0), (0.2, 8.0)], base)
