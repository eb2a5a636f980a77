"""Key-value recall with a 0.20 M-parameter model: 64 keys with their values, 128 tokens, after a prompt of 146 (data/puzzles.py).

    python -m llada_jax.train --config=configs/recall.py --workdir=runs/recall
    python -m llada_jax.evaluate --workdir=runs/recall --tasks=recall --batch_size=50 --decoder=low_confidence,low_confidence:steps=8

Of 1,000 held-out prompts it answered 98.8 % exactly with a token a forward, 99.7 % in 32 forwards, 99.8 % in 16, 99.9 % in 8 and in 4, 100 % in one,
after 1000 steps in 5 min 26 s, compilation included (two cores of an AMD EPYC virtual machine that other work kept busy, of which it got
331 s of one core; 2026-11-26, one seed). The tokens of an answer follow from the prompt alone, so many a forward do not contradict each other.
"""

from configs import common


def get_config(arg=None):
    common.parse_arg(arg)
    config = common.default_config()
    config.model.hidden_size = 64
    config.model.num_layers = 3
    config.model.num_heads = 4
    config.model.num_experts = 4
    config.model.experts_per_token = 2
    config.model.expert_size = 64
    config.model.max_length = 512
    config.model.init_std = 0.0
    config.data.sources = "recall"
    config.data.sequence_length = 274
    config.data.vocab_size = 53  # mask, 12 keys, 36 values, three marks, end of text
    config.data.pack = False
    config.diffusion.variable_length_rate = 0.0
    config.diffusion.weighting = "uniform"
    config.diffusion.balance_form = "per_layer"
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 8e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.decay_fraction = 0.6
    config.optimizer.final_fraction = 0.0
    config.train.steps = 1000
    config.train.batch_size = 16
    config.train.steps_per_call = 20
    config.train.log_every = 10
    config.train.checkpoint_every = 500
    config.train.eval_every = 250
    config.train.eval_batches = 4
    return config
