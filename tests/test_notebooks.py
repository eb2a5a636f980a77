"""Every notebook: its two files say the same, it is kept without outputs, and it runs from top to bottom at a tiny scale."""

import os
import pathlib

import jax
import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "notebooks"
NAMES = sorted({path.stem for path in FOLDER.iterdir() if path.suffix in (".ipynb", ".py")})


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", NAMES)
def test_both_files_say_the_same(name):
    """Edit the .py file, then run: python -m jupytext --sync notebooks/*.ipynb"""
    cells = [[(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in (read(name), jupytext.read(FOLDER / f"{name}.py"))]
    assert cells[0] == cells[1]
    assert read(name).metadata.jupytext.formats == "ipynb,py:percent"


@pytest.mark.parametrize("name", NAMES)
def test_no_outputs_are_kept(name):
    for cell in read(name).cells:
        assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None)


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, tmp_path):
    notebook = read(name)
    # as a user has it, with one device a core, but for the cache that all tests share and Jupyter's own files
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")} | {
        "LLADA_NB_SCALE": "tiny", "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
        "IPYTHONDIR": str(tmp_path), "JUPYTER_CONFIG_DIR": str(tmp_path)}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}})
    client.execute(env=environment)  # a cell that fails raises
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
