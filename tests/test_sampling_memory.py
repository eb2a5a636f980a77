"""Memory of the compiled decoder with bf16 weights on a CPU, read from XLA's own analysis; no weight is made."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from llada_jax import config as config_lib
from llada_jax import partitioning
from llada_jax.model import transformer
from llada_jax.sampling import cache, decoders, engine
from llada_jax.sampling import canvas as canvas_lib

MEDIUM = dict(vocab_size=32_768, hidden_size=256, num_layers=6, num_heads=4, num_experts=16, experts_per_token=4, expert_size=512)


def temporaries(settings, options=None):
    """Bytes of temporaries over bytes of one layer, for a prompt of 8 tokens and 16 to write."""
    model = transformer.build(config_lib.Model(**settings, param_dtype="bfloat16", compute_dtype="bfloat16"))
    V = settings["vocab_size"]
    canvas = canvas_lib.build([[list(range(8)), 16]], block_length=16, mask_id=V - 1, pad_id=V - 2, max_length=64)
    rules = engine.Rules(engine.Denoiser.of(model), decoders.LowConfidence(16, 16), cache.NoCache(), V - 1, V - 2, suppressed=(V - 1,))
    options = partitioning.compiler_options(model.shapes) if options is None else options
    canvas = canvas_lib.Canvas(*map(jnp.asarray, canvas))
    lowered = engine.compiled(**options).lower(rules, model.shapes, canvas, jax.random.key(0), *[jnp.zeros(1, jnp.int32)] * 2)
    layer = sum(leaf.size // leaf.shape[0] * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.shapes["params"]["stack_0"]))
    return lowered.compile().memory_analysis().temp_size_in_bytes / layer


def as_entry_points_run(program):
    """What a program prints in a process of its own, with the devices and XLA flags of the entry points, as json."""
    start = "import json; from llada_jax import partitioning; partitioning.setup_devices(1); from tests.test_sampling_memory import *\n"
    done = subprocess.run([sys.executable, "-c", start + program], cwd=pathlib.Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_temporaries_stay_under_one_and_a_half_layers():
    ours, without_options, whole_head = as_entry_points_run("""
found = [temporaries(MEDIUM), temporaries(MEDIUM, options={})]
from llada_jax.model import functional
functional.HEAD_COLUMNS = 1 << 30
print(json.dumps([*found, temporaries(MEDIUM)]))""")
    assert ours < 1.5
    assert without_options > 6  # float32 copies of all layers
    assert whole_head > 1.5  # a float32 copy of the vocabulary head


@pytest.mark.slow
def test_temporaries_of_llada_moe_7b_stay_under_one_and_a_half_layers():
    assert as_entry_points_run("from configs import llada_moe; print(temporaries({**llada_moe.VARIANTS['7b_a1b'], 'vocab_size': 157_184}))") < 1.5
