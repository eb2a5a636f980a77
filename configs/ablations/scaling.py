"""How large a model is best for a given compute, and what does it reach: masked diffusion, its autoregressive twin, experts against a dense model?

    python -m llada_jax.train --config=configs/ablations/scaling.py --sweep --workdir=runs/scaling
    python -m llada_jax.plot runs/scaling

Hypothesis: at equal compute each kind has a best size, which grows as a power of compute with about equal exponents; masked diffusion needs several
times the compute of its autoregressive twin for an equal loss (SMDM, arXiv 2410.18514, found 16), experts need less than a dense model.
Metric: held-out bits a byte of the standard library, all held-out rows; a bound where masked, exact where autoregressive. Parabolas over log size
and laws over compute with bootstrap intervals: notebooks/02_scaling_laws.
Budget: three kinds, three budgets of compute, five sizes each: 45 runs, two seeds. Compute is FLOPs of training, 2 a multiply-add, backward twice
the forward, of active parameters, attention and the rows of the head that the loss reads (`llada_jax/model/count.py`): half of them where masked.
Found (scaling.jsonl, 2026-11-27): the best size grows with compute to the power 0.87 (0.72, 1.05) masked, 0.70 (0.62, 0.77) autoregressive, 0.84
(0.66, 1.09) dense. For the loss that it reaches at 3.6e12 FLOPs masked needs 37 (28, 53) times the compute of its twin, whose law is extrapolated
to so high a loss; dense needs 1.35 (1.03, 1.78) times that of experts. One learning rate for all sizes, 2.5 epochs at most.
"""

from configs import common, pystdlib
from llada_jax import config as config_lib
from llada_jax.model import count

KINDS = ("masked", "autoregressive", "dense")  # dense: masked diffusion with one feed-forward layer as wide as a token's experts
GRID = {"4e11": (16, 24, 32, 48, 64), "1.2e12": (24, 32, 48, 64, 96), "3.6e12": (32, 48, 64, 96, 128)}  # FLOPs: widths
LAYERS = {16: 2, 24: 2, 32: 2, 48: 3, 64: 3, 96: 4, 128: 4}
VARIANTS = [f"{kind}-{budget}-{width}" for budget, widths in GRID.items() for kind in KINDS for width in widths]
SEEDS = 2
PRESETS = [f"variant={kind}-1.2e12-32" for kind in KINDS]


def get_config(arg=None):
    """ConfigDict of `variant=KIND-FLOPS-WIDTH,seed=N`; as many steps as the compute allows."""
    arg = common.parse_arg(arg, variant="masked-1.2e12-32", seed=0)
    common.one_of("variant", arg.variant, VARIANTS)
    kind, budget, width = arg.variant.split("-")
    config = pystdlib.get_config()
    config.model.hidden_size = config.model.expert_size = width = int(width)
    config.model.num_layers, config.model.num_heads = LAYERS[width], 2
    if kind == "dense":
        config.model.dense_layers = tuple(range(config.model.num_layers))
        config.model.dense_size = config.model.experts_per_token * width
    if kind == "autoregressive":
        config.diffusion.objective = kind
    config.data.vocab_size = 512
    config.train.batch_size = 16
    known = config_lib.with_vocab_size(config_lib.from_config_dict(config), config.data.vocab_size)
    common.short(config, round(float(budget) / count.train_flops(known) / config.train.batch_size / config.data.sequence_length), arg.seed)
    config.optimizer.warmup_steps = max(10, config.train.steps // 20)
    return config
