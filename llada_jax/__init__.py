"""LLaDA-MoE and its relatives in JAX: masked-diffusion language models with mixture-of-experts."""

__version__ = "0.1.0"
