"""LLaDA-8B (arXiv 2502.09992): the published dense architecture, its pre-training.

    python -m llada_jax.train --config=configs/llada.py --dry_run --config.data.limit=24

builds data and shapes and stops; without `--dry_run` it trains, on a pod: AdamW, weight decay 0.1, warm-up, stable, linear decay,
4e-4, 1280 x 4096 tokens a step. The data are Python's standard library unless `--config.data.sources='corpus/*.jsonl'` names yours.
"""

from configs import common


def get_config(arg=None):
    common.parse_arg(arg)
    config = common.default_config()
    config.model.update(dict(vocab_size=126_464, hidden_size=4096, num_layers=32, num_heads=32, dense_layers=tuple(range(32)), dense_size=12_288,
                             qk_norm=False, rope_theta=500_000.0, max_length=4096))
    common.on_a_pod(config, sequence_length=4096, batch_size=1280, steps=440_000, learning_rate=4e-4)
    config.mesh.data, config.mesh.fsdp = 1, -1
    return config
