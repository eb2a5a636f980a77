"""The architecture, read from the source: who imports whom, and who alone may name what."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = sorted(path for package in ("llada_jax", "pallas_kernels", "configs") for path in (ROOT / package).rglob("*.py"))
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in FILES}

ENTRY_POINTS = ("train", "sample", "evaluate", "prepare", "convert", "compile", "bench", "plot")
LAYERS = (  # from the top; a module imports from its own layer and from those below
    ("configs", "llada_jax.command_line", *(f"llada_jax.{name}" for name in ENTRY_POINTS)),
    ("llada_jax.training", "llada_jax.evaluation", "llada_jax.model"),
    ("llada_jax.sampling", "llada_jax.diffusion", "llada_jax.interop", "llada_jax.data", "llada_jax.partitioning",
     "llada_jax.distributed"),
    ("llada_jax.config", "llada_jax.settings", "llada_jax.tokenizer", "llada_jax.shapes"),
    ("pallas_kernels",),
)
ALONE = {  # the files that alone import a package
    "orbax": ("llada_jax/training/checkpoint.py", "llada_jax/training/streaming.py"),
    "grain": ("llada_jax/data/pipeline.py",),
    "tensorboardX": ("llada_jax/training/metrics.py",),
    "wandb": ("llada_jax/training/metrics.py",),
    "tokamax": ("pallas_kernels/shapes.py",),  # a rival to time beside, where it is installed
}
NEVER_AT_TOP = {"torch", "transformers", "tensorflow", "lm_eval", "tokenizers", "tokamax"}
AXES = {"data", "fsdp", "expert", "tensor"}
TAKES_AXES = {"P", "PartitionSpec", "Mesh", "make_mesh", "shard_map", "psum", "pmean", "pmax", "pmin", "psum_scatter",
              "all_gather", "all_to_all", "ppermute", "axis_index", "axis_size"}  # fmt: skip


def imports(tree):
    """(module, inside a function) of each import; `from a import b` gives a.b, as b may be a module."""

    def visit(node, deferred):
        if isinstance(node, ast.Import):
            yield from ((alias.name, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((f"{node.module}.{alias.name}", deferred) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    return visit(tree, False)


def layer(module):
    """The index in LAYERS, None for a module of another library or the bare package."""
    return next((i for i, names in enumerate(LAYERS) for name in names if f"{module}.".startswith(f"{name}.")), None)


def module_name(file):
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@pytest.mark.parametrize("file", TREES)
def test_imports(file):
    own = layer(module_name(file))
    assert own is not None or file == "llada_jax/__init__.py", f"{file} is in no layer: add it to LAYERS"
    for module, deferred in imports(TREES[file]):
        package = module.split(".")[0]
        other = layer(module)
        named = other is not None or module == "llada_jax.__version__"
        assert package not in ("llada_jax", "configs") or named, f"{file} imports {module}, which is in no layer"
        assert other is None or own is None or other >= own, f"{file} imports {module}, which is above it"
        assert file in ALONE.get(package, (file,)), f"{file} imports {package}; only {', '.join(ALONE[package])} may"
        assert deferred or package not in NEVER_AT_TOP, f"{file} imports {package} at its top"
        flags_allowed = own == 0 or file in ALONE["grain"]  # grain's workers read flags, also where none were parsed
        assert not module.startswith("absl.flags") or flags_allowed, f"{file} uses flags; only entry points may"
        if own == len(LAYERS) - 1:
            assert package in {"jax", "jaxlib", "numpy", "pallas_kernels", "tokamax", *sys.stdlib_module_names}, f"{file} imports {package}"


def test_only_partitioning_names_mesh_axes():
    for file, tree in TREES.items():
        if file == "llada_jax/partitioning.py":
            continue
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
            if name in TAKES_AXES:
                constants = {node.value for node in ast.walk(call) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
                assert not constants & AXES, f"{file}:{call.lineno} names {constants & AXES}"


def test_at_most_five_flax_modules():
    classes = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    modules = [node.name for node in classes if any(ast.unparse(base).split(".")[-1] == "Module" for base in node.bases)]
    assert len(modules) <= 5, modules


def test_import_touches_no_device_and_parses_no_flag():
    # Entry points define flags of the same names, so each is imported in a fork of its own.
    program = """
import importlib, os, sys
from absl import flags
from jax._src import xla_bridge
before, entries = sys.argv[1].split(","), sys.argv[2].split(",")
def load(name):
    importlib.import_module(name)
    assert not xla_bridge.backends_are_initialized(), f"{name} starts a backend"
    assert not flags.FLAGS.is_parsed(), f"{name} parses flags"
    heavy = {"torch", "transformers", "tensorflow", "lm_eval"} & set(sys.modules)
    assert not heavy, f"{name} imports {heavy}"
for name in before:
    load(name)
for name in filter(None, entries):
    if not os.fork():
        load(name)
        os._exit(0)
    assert os.wait()[1] == 0, name
"""
    names = [module_name(file) for file in TREES]
    entries = [name for name in names if layer(name) == 0]
    others = [name for name in names if name not in entries]
    result = subprocess.run([sys.executable, "-c", program, ",".join(others), ",".join(entries)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
