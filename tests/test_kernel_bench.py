"""The bench of the kernels: its records and table, tile sizes that it tries and keeps; no time is asserted."""

import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bench, dispatch, shapes
from pallas_kernels.shapes import CASES, attention_case, confidence_case, cross_entropy_case, grouped_matmul_case, routing_case


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    bench.main()
    return capsys.readouterr().out


def test_every_operation_has_a_tiny_shape_and_one_of_the_7b_model():
    assert all("tiny" in shapes and {"training", "decode"} & set(shapes) for shapes in CASES.values())


def test_records_lines_and_table(monkeypatch, capsys, tmp_path):
    out = run(monkeypatch, capsys, "linear_cross_entropy", "linear_confidence", "--rounds=1", f"--out={tmp_path / 'b.json'}")
    saved = json.loads((tmp_path / "b.json").read_text())
    assert saved["machine"]["device"] == "cpu" and saved["machine"]["peak_flops_per_s"] > 0
    made = {(r["operation"], r["shape"], r["direction"], r["contender"]) for r in saved["records"]}
    assert made == {("linear_cross_entropy", "tiny", d, c) for d in ("forward", "backward") for c in ("ours", "reference")} | {
        ("linear_confidence", "tiny", "forward", c) for c in ("ours", "reference")}
    assert all(r["min_ms"] > 0 and r["ratio"] > 0 and r["flops_per_s"] > 0 for r in saved["records"])
    assert all(r["ratio"] == 1 for r in saved["records"] if r["contender"] == "ours")
    assert "linear_confidence, tiny" in out
    table = run(monkeypatch, capsys, f"--markdown={tmp_path / 'b.json'}").splitlines()
    assert len(table) == 2 + 3 and all(row.count("|") == 8 for row in table)


def test_the_tables_of_the_readme_are_the_records(monkeypatch, capsys):
    """Every row that `--markdown` makes of a file in pallas_kernels/measured stands in the README."""
    readme = (pathlib.Path(bench.__file__).parent.parent / "README.md").read_text()
    files = list((pathlib.Path(bench.__file__).parent / "measured").glob("*.json"))
    for path in files:
        assert run(monkeypatch, capsys, f"--markdown={path}") in readme
    assert files


@pytest.mark.parametrize("case, flops", [
    (attention_case(1, 64, 64, 2, 1, 8, jnp.float32), 4 * 2 * 32 * 32 * 2 * 8),  # two segments of 32
    (attention_case(1, 64, 64, 2, 1, 8, jnp.float32, block=8), 4 * (32 * 8 + 8 * 8 * 6 + 8 * 8 * 10) * 2 * 8),
    (grouped_matmul_case(16, 4, 2, 8, 4, jnp.float32), 6 * 32 * 8 * 4),
    (grouped_matmul_case(16, 4, 2, 8, 4, jnp.float32, skew=True), 6 * 32 * 8 * 4),
    (routing_case(16, 4, 2, 8, jnp.float32, skew=True), 0),
    (cross_entropy_case(16, 8, 32, jnp.float32), 2 * 8 * 8 * 32),
    (confidence_case(16, 8, 32, jnp.float32), 2 * 16 * 8 * 32),
])  # fmt: skip
def test_cases_agree_with_their_reference_and_count_their_work(case, flops):
    assert case.flops == flops
    rivals = bench.contenders(case)
    if case.libraries and case.flops == 6 * 32 * 8 * 4:
        rivals |= case.libraries
    want = jax.tree.leaves(rivals["reference"](*case.arrays))
    for name, function in rivals.items():
        for a, b in zip(jax.tree.leaves(function(*case.arrays)), want, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


def test_tile_sizes_are_tried_and_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(dispatch, "TABLES", tmp_path)
    asked = {}
    with dispatch.tiles_from({("op", "D8"): {"rows": 4}}, asked):
        assert dispatch.tiles("op", "D8", {"rows": 1, "columns": 2}) == {"rows": 4, "columns": 2}
    assert asked == {("op", "D8"): {"rows": 1, "columns": 2}}
    kind = jax.devices()[0].device_kind
    assert dispatch.tiles("op", "D8", {"rows": 1}) == {"rows": 1}
    bench.write_table({"op": {"D8": {"rows": 16}}}, kind)
    bench.write_table({"op": {"D9": {"rows": 32}}}, kind)
    assert [dispatch.tiles("op", shape, {"rows": 1}) for shape in ("D8", "D9", "D10")] == [{"rows": 16}, {"rows": 32}, {"rows": 1}]
    dispatch.forget_tables()


def test_tuning_takes_the_best_change_until_none_helps(monkeypatch, capsys):
    """A made operation whose program gives its own time: it wants 8 rows for 8 warps and 4 stages, and cannot have 2 columns."""
    def run(x):
        size = dispatch.tiles("op", "D8", {"rows": 32, "warps": 2, "columns": 4, "stages": 3})
        if size["columns"] == 2:
            raise ValueError("2 columns do not fit")
        mismatch = abs(math.log2(size["rows"] * size["warps"] / 64))  # so that rows and warps have to change at once
        return x + 100 * mismatch + abs(size["rows"] - 8) + size["columns"] + abs(size["stages"] - 4)
    monkeypatch.setitem(bench.CASES, "op", {"D8": lambda: shapes.Case(run, (jnp.zeros(()),), 0, 0.0, 0.0, {})})
    monkeypatch.setattr(bench, "rounds", lambda programs, number: {name: [float(program(*arrays))] for name, (program, arrays) in programs.items()})
    assert bench.tune("op", "D8", 1) == {"op": {"D8": {"rows": 8, "warps": 8, "columns": 4, "stages": 4}}}
    assert "2 columns do not fit" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, words", [
    (["attentoin"], "unknown operation 'attentoin'"), (["--shapes=huge"], "unknown shape 'huge'"), (["--rounds=0"], "--rounds=0"),
    (["--tune"], "needs an accelerator")])
def test_bad_arguments_give_one_line(monkeypatch, capsys, arguments, words):
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, capsys, *arguments)
    assert exit.value.code == 2 and words in capsys.readouterr().err
