"""LLaDA2.0 mini and flash: the published architectures (sigmoid router with groups, selecting bias and shared expert), as a masked model.

    python -m llada_jax.train --config=configs/llada2.py:variant=mini --dry_run --config.data.limit=24

builds data and shapes and stops; without `--dry_run` it trains, on a pod: `mesh=v5p-128` and its like (`common.MESHES`) set mesh and batch.
`blocks=wsd` is LLaDA2.0's way from autoregressive weights (`--init_from`, of a run or an imported model) to block diffusion: blocks of 1, 4, 32, 64
tokens, whole rows, then down to 32, and noise on the embeddings of masks at first. How long each stage lasts, the sizes between 2048 and 32 and the
noise are not published: here 1 % of the steps for each stage of the warm-up, 80 % for whole rows, halves of 2 % each, noise as large as the
embeddings in the first 1 %. `blocks=32` has one size throughout.

LLaDA2.0 began from autoregressive weights (Ling-2.0), so there is no published recipe from scratch: learning rate and batch are those of
`llada_moe.py`. Load is balanced as in Ling 2.0 (arXiv 2510.22115): no balance loss, a bias step of 1e-3, a z-loss of 3.5e-6.
"""

from configs import common

VARIANTS = {
    "mini": dict(hidden_size=2048, num_layers=20, num_heads=16, dense_size=5120, expert_size=512, shared_expert_size=512),
    "flash": dict(hidden_size=4096, num_layers=32, num_heads=32, dense_size=9216, expert_size=1024, shared_expert_size=1024),
}
SHARED = dict(
    vocab_size=157_184, num_kv_heads=4, head_dim=128, num_experts=256, experts_per_token=8, dense_layers=(0,), router_score="sigmoid",
    router_renormalize=True, router_bias=True, router_bias_in_weight=False, router_groups=8, router_groups_kept=4, router_scale=2.5,
    rotary_fraction=0.5, rope_theta=600_000.0, norm_eps=1e-6, max_length=32_768)
PRESETS = [f"variant={name}" for name in VARIANTS]
WSD = ((1, 0.01), (4, 0.01), (32, 0.01), (64, 0.01), (0, 0.8), (2048, 0.02), (1024, 0.02), (512, 0.02), (256, 0.02), (128, 0.02), (64, 0.02))


def get_config(arg=None):
    """ConfigDict of `variant=mini|flash,mesh=…,blocks=wsd|SIZE`."""
    arg = common.parse_arg(arg, variant="mini", mesh="", blocks="")
    variant = arg.variant
    common.one_of("variant", variant, VARIANTS)
    config = common.default_config()
    config.model.update(SHARED | VARIANTS[variant])
    common.on_a_pod(config, sequence_length=4096, batch_size=1280, steps=100_000, learning_rate=4e-4)
    config.optimizer.router_bias_rate = 1e-3
    config.diffusion.balance_coefficient = 0.0
    config.diffusion.z_coefficient = 3.5e-6
    common.on_mesh(config, arg.mesh)
    config.diffusion.block_schedule = arg.blocks
    if arg.blocks == "wsd":
        config.diffusion.block_schedule = ",".join(f"{size}:{round(share * config.train.steps)}" for size, share in WSD) + ",32"
        config.diffusion.mask_noise_std = 1.0
        config.diffusion.mask_noise_steps = config.train.steps // 100
    return config
