"""Shardings and collectives of the named meshes, kept as small files that a change shows up in.

    python -m tests.named_meshes [NAME …]      # writes tests/data/compiled/NAME.json anew

Layers are scanned, so two of them (one of each kind for LLaDA2) tell what all of them do.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import jax

from configs import common, llada2, llada_moe
from llada_jax import config as config_lib
from llada_jax import partitioning
from llada_jax.model import transformer
from llada_jax.training import optimizer
from tests import tiny_run

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "data" / "compiled"
MOE, MINI = "llada_moe.py:variant=7b_a1b", "llada2.py:variant=mini"
TRAINED = {  # name: config, what `compile` gets besides
    "v5e-256": (f"{MOE},mesh=v5e-256", ["--topology=v5e-256"]),
    "2xv5e-256": (f"{MOE},mesh=2xv5e-256", ["--topology=v5e-256", "--num_slices=2"]),
    "v5p-128": (f"{MOE},mesh=v5p-128", ["--topology=v5p-128"]),
    "v6e-256": (f"{MOE},mesh=v6e-256", ["--topology=v6e-256"]),
    "mini-v5p-128": (f"{MINI},mesh=v5p-128", ["--topology=v5p-128"]),
}
KEPT = ("kind", "axes", "count", "bytes", "asynchronous", "usual", "largest")


def config_of(name: str) -> config_lib.Config:
    """The config of a name, with its two layers."""
    file, _, arg = TRAINED[name][0].partition(":")
    config = {"llada_moe.py": llada_moe, "llada2.py": llada2}[file].get_config(arg)
    config.model.num_layers = 2
    return config_lib.from_config_dict(config)


def shardings(model: config_lib.Model, mesh: config_lib.Mesh) -> dict[str, str]:
    """{weight: mesh axes of its dimensions}."""
    grid = partitioning.described_mesh(mesh)
    built = transformer.build(model)
    specs = partitioning.shardings_of(grid, built.axes, built.shapes)
    return {optimizer.path_of(path): str(tuple(leaf.spec)) for path, leaf in jax.tree_util.tree_leaves_with_path(specs)}


def report(name: str) -> dict:
    """What `python -m llada_jax.compile --json` says of two layers on this mesh."""
    config, options = TRAINED[name]
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        done = subprocess.run([sys.executable, "-m", "llada_jax.compile", f"--config=configs/{config}", *options, "--config.model.num_layers=2",
                               f"--json={file.name}"], cwd=ROOT, env=tiny_run.environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.load(file)


def golden(name: str, found: dict) -> dict:
    """What is kept of a report. A conditional's number is the compiler's own: branches are told apart by what is in them."""
    config = config_of(name)
    table = sorted(([row[key] for key in KEPT] for row in found["collectives"]), key=str)
    return {"versions": found["versions"], "mesh": found["mesh"], "rows": found["rows"], "length": found["length"], "kernels": found["kernels"],
            "shardings": shardings(config.model, config.mesh), "collectives": [dict(zip(KEPT, row, strict=True)) for row in table]}


def text(kept: dict) -> str:
    """One collective a line, so that a difference is one too."""
    lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in kept["collectives"])
    rest = json.dumps({key: value for key, value in kept.items() if key != "collectives"}, indent=1, ensure_ascii=False)
    return f"{rest[:-2]},\n \"collectives\": [\n  {lines}]\n}}\n"


def main() -> None:
    for name in sys.argv[1:] or TRAINED:
        common.one_of("name", name, TRAINED)
        (FOLDER / f"{name}.json").write_text(text(golden(name, report(name))))
        print(f"wrote {FOLDER / name}.json")


if __name__ == "__main__":
    main()
