"""LLaDA2.0 mini and flash: the published architectures (sigmoid router with groups, selecting bias and shared expert), as a masked model.

    python -m llada_jax.train --config=configs/llada2.py:variant=mini --dry_run --config.data.limit=24

builds data and shapes and stops; without `--dry_run` it trains, on a pod: `mesh=v5p-128` and its like (`common.MESHES`) set mesh and batch.
`blocks=wsd` is LLaDA2.0's way from autoregressive weights (`--init_from`, of a run or an imported model) to block diffusion: blocks of 1, 4, 32, 64
tokens, whole rows, then down to 32, and noise on the embeddings of masks at first. `blocks=32` has one size throughout. At the end the checkpoints
with the best held-out bounds are averaged. `variant=tiny` does it on Python's standard library, to blocks of 8 in rows of 128:

    python -m llada_jax.train --config=configs/llada2.py:variant=tiny,objective=autoregressive --workdir=runs/ling
    python -m llada_jax.train --config=configs/llada2.py:variant=tiny,blocks=wsd --init_from=runs/ling --workdir=runs/llada2
    python -m llada_jax.convert average --workdir=runs/llada2 --top=4 --out=runs/llada2_mean
    python -m llada_jax.evaluate --workdir=runs/llada2_mean --block_size=1,4,8,32,0
    python -m llada_jax.convert export --checkpoint=runs/llada2_mean --out=runs/llada2_published
    python -m llada_jax.convert check --hf_dir=runs/llada2_published --finite

Held out, the autoregressive model needs 1.641 ± 0.028 bits a byte, exactly. The conversion ends with bounds of 2.054, 2.238, 2.299, 2.388 and 2.890
in blocks of 1, 4, 8, 32 tokens and whole rows, the mean of its last four checkpoints (those with the best bounds) with 1.976, 2.201, 2.269, 2.359 and
2.736 (± 0.03 over rows, on the same rows and masks). So 300 steps do not win back in blocks of 1 what the model knew before, and the mean is
better than the last checkpoint at every size. They took 4 min 56 s and 7 min 9 s of processor time, compilation included; the second was killed after
60 steps and resumed, so it compiled twice (two cores of an AMD EPYC virtual machine that other work kept busy; 2026-11-26, one seed). Neither other
orders of sizes nor a start from scratch were compared.

Fine-tuning in blocks comes after: `configs/sft.py`.

Not published, so ours, and none of it swept: how long each size lasts and the sizes between 2048 and 32 (1 % of the steps for each one of the
warm-up, 80 % for whole rows, halves of 2 % each on the way down); the noise (as large as the embeddings at first, gone after 1 % of the steps); how
many checkpoints are averaged; learning rate and batch, which are those of `llada_moe.py`. LLaDA2.0 began from Ling-2.0, whose own training is not
this file's: `objective=autoregressive` stands in for it at a small size. Load is balanced as in Ling 2.0 (arXiv 2510.22115): no balance loss, a bias
step of 1e-3, a z-loss of 3.5e-6.
"""

from configs import common, pystdlib

VARIANTS = {
    "tiny": dict(
        vocab_size=0, hidden_size=96, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=24, dense_size=192, expert_size=48, shared_expert_size=48,
        num_experts=16, experts_per_token=4, router_groups=4, router_groups_kept=2, max_length=512),
    "mini": dict(hidden_size=2048, num_layers=20, num_heads=16, dense_size=5120, expert_size=512, shared_expert_size=512),
    "flash": dict(hidden_size=4096, num_layers=32, num_heads=32, dense_size=9216, expert_size=1024, shared_expert_size=1024),
}
SHARED = dict(
    vocab_size=157_184, num_kv_heads=4, head_dim=128, num_experts=256, experts_per_token=8, dense_layers=(0,), router_score="sigmoid",
    router_renormalize=True, router_bias=True, router_bias_in_weight=False, router_groups=8, router_groups_kept=4, router_scale=2.5,
    rotary_fraction=0.5, rope_theta=600_000.0, norm_eps=1e-6, max_length=32_768)
PRESETS = [f"variant={name}" for name in VARIANTS]
WSD = ((1, 0.01), (4, 0.01), (32, 0.01), (64, 0.01), (0, 0.8), (2048, 0.02), (1024, 0.02), (512, 0.02), (256, 0.02), (128, 0.02), (64, 0.02))
FINAL, NOISE = 32, 0.01  # the last size; share of the steps with noise on masks
TINY_WSD = ((1, 0.05), (4, 0.05), (8, 0.05), (16, 0.05), (0, 0.4), (64, 0.05), (32, 0.05), (16, 0.05))
TINY_FINAL, TINY_NOISE = 8, 0.1


def get_config(arg=None):
    """ConfigDict of `variant=tiny|mini|flash,mesh=…,blocks=wsd|SIZE,objective=masked|autoregressive`."""
    arg = common.parse_arg(arg, variant="mini", mesh="", blocks="", objective="masked")
    variant, tiny = arg.variant, arg.variant == "tiny"
    common.one_of("variant", variant, VARIANTS)
    config = pystdlib.get_config() if tiny else common.default_config()
    config.model.update(SHARED | VARIANTS[variant])
    if tiny:
        _tiny(config, converted=bool(arg.blocks))
    else:
        common.on_a_pod(config, sequence_length=4096, batch_size=1280, steps=100_000, learning_rate=4e-4)
    config.optimizer.router_bias_rate = 1e-3
    config.diffusion.balance_coefficient = 0.0
    config.diffusion.z_coefficient = 3.5e-6
    common.on_mesh(config, arg.mesh)
    config.diffusion.objective = arg.objective
    config.diffusion.block_schedule = arg.blocks
    if arg.blocks == "wsd":
        stages, final, noise = (TINY_WSD, TINY_FINAL, TINY_NOISE) if tiny else (WSD, FINAL, NOISE)
        config.diffusion.block_schedule = ",".join(f"{size}:{round(share * config.train.steps)}" for size, share in stages) + f",{final}"
        config.diffusion.mask_noise_std = 1.0
        config.diffusion.mask_noise_steps = round(noise * config.train.steps)
    return config


def _tiny(config, converted):
    """Autoregressive 400 steps; converted in 300 with a constant learning rate, checkpoints kept to average."""
    config.data.sequence_length = 128
    config.train.batch_size = 32
    config.train.steps = 400
    config.train.checkpoint_every = config.train.eval_every = 200
    if converted:
        config.train.steps = 300
        config.optimizer.learning_rate = 8e-3
        config.optimizer.schedule = "constant"
        config.train.checkpoint_every = config.train.keep_every = config.train.eval_every = 15
        config.train.eval_batches = 2
