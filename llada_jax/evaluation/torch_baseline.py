"""The same computations in PyTorch, for `bench` to time: the stock Qwen3-MoE class of transformers, made bidirectional, with our weights.

Needs the extra [parity]; torch and transformers are imported when asked for. Float32 on the CPU, without a key/value cache.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from llada_jax import config as config_lib
from llada_jax.config import ConfigError
from llada_jax.interop import hf_config, hf_weights

FAMILY = "qwen3_moe"  # the stock class that equals LLaDA-MoE when every position sees all others
COMPARABLE = {  # settings that the training step below stands for
    "diffusion.objective": "masked", "diffusion.schedule": "linear", "diffusion.time_sampling": "stratified", "diffusion.noise_unit": "sequence",
    "diffusion.corruption": "bernoulli", "diffusion.weighting": "elbo", "diffusion.normalization": "token", "diffusion.variable_length_rate": 0.0,
    "diffusion.block_schedule": "", "diffusion.mask_noise_std": 0.0, "diffusion.anneal_steps": 0, "diffusion.max_noise": 1.0,
    "diffusion.complementary": False, "diffusion.confidence_coefficient": 0.0, "model.lora_rank": 0, "optimizer.router_bias_rate": 0.0,
    "optimizer.name": "adamw", "optimizer.trainable": ".*", "optimizer.ema_decay": 0.0, "train.accumulate": 1,
}


def check(config: config_lib.Config, train: bool) -> None:
    """Raise ConfigError when PyTorch is missing, or stands for other settings than these."""
    try:
        for package in ("torch", "transformers"):
            importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"the comparison with PyTorch needs packages that are not here ({error}); "
                          "run: pip install -c requirements.txt -e '.[parity]'") from error
    wanted = {"model.compute_dtype": "float32", "model.param_dtype": "float32"} | (COMPARABLE if train else {})
    flat = config_lib.flatten(config)
    for key, value in wanted.items():
        if flat[key] != value:
            raise ConfigError(f"{key}={flat[key]!r}: the PyTorch side computes {value!r}; set it, or leave out --baseline")
    hf_config.write(FAMILY, config.model, None, 0)  # raises for what the class cannot express


def build(model: config_lib.Model, variables: Any, threads: int, experts: str | None = None) -> Any:
    """The stock model with our weights; `experts` names its implementation of the experts, None takes the default of transformers."""
    import torch
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    fields = hf_config.write(FAMILY, model, None, 0)
    config = transformers.Qwen3MoeConfig(**{key: value for key, value in fields.items() if key not in ("architectures", "model_type")})
    config.is_causal = False  # read where masks are made
    config.use_cache = False
    tensors = {name: torch.from_numpy(x) for name, x in hf_weights.to_theirs(FAMILY, variables).items()}
    chosen = {"experts_implementation": experts} if experts else {}
    stock, report = transformers.Qwen3MoeForCausalLM.from_pretrained(
        None, config=config, state_dict=tensors, output_loading_info=True, dtype=torch.float32, **chosen)
    if any(report.values()):
        raise RuntimeError(f"weights did not fit the stock class: {report}")
    return stock.eval()


def describe(stock: Any) -> str:
    """Versions and implementations."""
    import torch
    import transformers
    return (f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), transformers {transformers.__version__} "
            f"(experts {stock.config._experts_implementation}, attention {stock.config._attn_implementation})")


def forward(stock: Any, tokens_BT: np.ndarray) -> Callable[[], Any]:
    """A call gives the logits (B, T, V) of every position."""
    import torch
    tokens_BT = torch.from_numpy(tokens_BT).long()

    def call():
        with torch.inference_mode():
            return stock(tokens_BT).logits
    return call


def train(stock: Any, config: config_lib.Config, tokens_KBT: np.ndarray, mask_id: int) -> Callable[[], float]:
    """A call takes K steps of masked-diffusion training (LLaDA, arXiv 2502.09992, equation 3) and gives the loss of the last.

    As training codes in PyTorch write it: logits of all positions, cross entropy where a mask stands, weighted by 1/p, clipped gradient,
    fused AdamW. Without router losses and metrics.
    """
    import torch
    settings, min_noise = config.optimizer, config.diffusion.min_noise
    tokens_KBT = torch.from_numpy(tokens_KBT).long()
    _, B, T = tokens_KBT.shape
    stock.train()
    update = torch.optim.AdamW(stock.parameters(), settings.learning_rate, (settings.b1, settings.b2), settings.eps, settings.weight_decay,
                               fused=True)

    def step(tokens_BT):
        t_B = (torch.rand(()) + torch.arange(B) / B) % 1
        p_BT = (min_noise + (1 - min_noise) * t_B)[:, None].expand(B, T)
        masked_BT = torch.rand(B, T) < p_BT
        logits_BTV = stock(torch.where(masked_BT, mask_id, tokens_BT)).logits
        nll = torch.nn.functional.cross_entropy(logits_BTV[masked_BT], tokens_BT[masked_BT], reduction="none")
        loss = (nll / p_BT[masked_BT]).sum() / (B * T)
        update.zero_grad()
        loss.backward()
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(stock.parameters(), settings.clip_norm)
        update.step()
        return loss

    return lambda: [step(tokens_BT) for tokens_BT in tokens_KBT][-1].item()


class Forward(NamedTuple):
    """One forward of a decode: its logits, what it wrote and what it left, and the row after it."""

    logits_TV: Any  # float32
    chosen: Any  # indices of the slots written
    left: Any  # indices of the open slots of the block that were not
    confidence_T: Any  # float64
    tokens_T: Any

    def margins(self) -> tuple[float, float]:
        """The smallest leads by which a token (in logits) and a slot (in probability) were chosen."""
        best = self.logits_TV[self.chosen].topk(2).values
        slot = self.confidence_T[self.chosen].min() - self.confidence_T[self.left].max() if len(self.left) else float("inf")
        return float((best[:, 0] - best[:, 1]).min()), float(slot)


def decode(stock: Any, prompt: np.ndarray, decoder: Any, mask_id: int) -> Iterator[Forward]:
    """LLaDA's published sampler at temperature 0 (arXiv 2502.09992, algorithm 5, in blocks), forward by forward.

    Each one computes the logits of the whole row, a float64 softmax over them for the confidence, and writes the surest slots of the
    block. The mask token is never written, as in ours; the published loop leaves that to the model.
    """
    import torch
    C, steps, infinity = decoder.block_length, decoder.steps_per_block, float("inf")
    tokens_T = torch.cat([torch.from_numpy(prompt).long(), torch.full((decoder.gen_length,), mask_id)])
    for end in range(len(prompt) + C, len(tokens_T) + 1, C):
        for i in range(steps):
            with torch.inference_mode():
                logits_TV = stock(tokens_T[None]).logits[0]
                logits_TV[:, mask_id] = -infinity
                best_T = logits_TV.argmax(-1)
                prob_TV = torch.softmax(logits_TV.double(), -1)
                open_T = tokens_T == mask_id
                open_T[end:] = False
                confidence_T = prob_TV.gather(-1, best_T[:, None])[:, 0].where(open_T, -infinity)
                chosen = confidence_T.topk(C // steps + (i < C % steps)).indices
                tokens_T = tokens_T.index_copy(0, chosen, best_T[chosen])
                open_T[chosen] = False
            yield Forward(logits_TV, chosen, open_T.nonzero()[:, 0], confidence_T, tokens_T)


def sample(stock: Any, prompt: np.ndarray, decoder: Any, mask_id: int) -> Callable[[], np.ndarray]:
    """A call decodes one row; its tokens (T,)."""
    def call():
        for forward in decode(stock, prompt, decoder, mask_id):
            tokens_T = forward.tokens_T
        return tokens_T.numpy()
    return call
