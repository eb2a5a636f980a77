"""Parameters and FLOPs in closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from configs import llada_moe
from llada_jax import config as config_lib
from llada_jax.model import count, transformer
from llada_jax.training import optimizer, state

DENSE = config_lib.Model(vocab_size=512, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, dense_layers=(0, 1), dense_size=192,
                         max_length=48, scan_layers=False)


def test_published_size():
    config = config_lib.from_config_dict(llada_moe.get_config("variant=7b_a1b"))
    size = count.parameters(config.model)
    assert (size.total, size.active) == (7_356_880_896, 1_719_736_320)
    assert size.input_embedding == 157_184 * 2048 and size.experts == 16 * 64 * 3 * 2048 * 1024


def test_tied_embeddings_count_once():
    tied = count.parameters(dataclasses.replace(DENSE, tie_embeddings=True))
    assert count.parameters(DENSE).total - tied.total == 512 * 64 and tied.input_embedding == 0
    assert count.forward_flops(dataclasses.replace(DENSE, tie_embeddings=True), 48) == count.forward_flops(DENSE, 48)


def test_forward_flops_match_the_compiler():
    """XLA's count of a whole dense forward with head also holds norms, softmax and rotary: at most 4 % more than the matmuls."""
    model, B, T = transformer.build(DENSE), 2, 48

    def forward(variables, tokens):
        return model.head(variables, model.apply(variables, tokens, jnp.broadcast_to(jnp.arange(T), (B, T)))[0])
    found = jax.jit(forward).lower(model.shapes, jax.ShapeDtypeStruct((B, T), jnp.int32)).cost_analysis()["flops"]
    expected = count.forward_flops(DENSE, T) * B * T
    assert expected < found < 1.04 * expected


def test_a_mixture_costs_its_active_experts_and_the_router():
    mixture = dataclasses.replace(DENSE, dense_layers=(), num_experts=16, experts_per_token=3, expert_size=64)  # 3 · 64 = 192 active
    assert count.forward_flops(mixture, 48) - count.forward_flops(DENSE, 48) == 2 * DENSE.num_layers * 64 * 16


def test_training_costs_three_forwards_and_half_the_head():
    for objective, share in (("masked", 0.5), ("autoregressive", 1.0)):
        config = config_lib.Config(model=DENSE, diffusion=config_lib.Diffusion(objective=objective), data=config_lib.Data(sequence_length=48))
        assert np.isclose(count.train_flops(config), 3 * (count.forward_flops(DENSE, 48) - 2 * (1 - share) * 512 * 64))
    compared = dataclasses.replace(config, diffusion=config_lib.Diffusion(objective="preference", preference_draws=2))
    assert np.isclose(count.train_flops(compared), 8 * (count.forward_flops(DENSE, 48) - 512 * 64))  # of each draw, the reference's forward too


def test_state_bytes_are_those_of_the_state():
    model = transformer.build(DENSE)
    for name, ema, objective in (("adamw", 0.0, "masked"), ("adamw", 0.9, "masked"), ("muon", 0.0, "masked"), ("adamw", 0.0, "preference")):
        config = config_lib.Config(DENSE, config_lib.Diffusion(objective=objective), optimizer=config_lib.Optimizer(name=name, ema_decay=ema))
        update = optimizer.make(config.optimizer, 10, model.shapes["params"])
        leaves = jax.tree.leaves(jax.eval_shape(lambda update=update, config=config: state.create(model, update, config)))
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) + 4 * count.parameters(DENSE).total  # and the gradients
        assert abs(count.state_bytes(config) / held - 1) < (0.01 if name == "adamw" else 0.2), (name, count.state_bytes(config), held)
