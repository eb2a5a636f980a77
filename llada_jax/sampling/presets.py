"""Decoders and caches by name, with the settings that their systems publish, and how a command line edits them."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from llada_jax.config import ConfigError, nearest
from llada_jax.sampling import block_decoders, decoders
from llada_jax.sampling import cache as cache_lib
from llada_jax.sampling.cache import Cache
from llada_jax.sampling.decoder import Decoder

NONE: Mapping[str, Any] = MappingProxyType({})


class Preset(NamedTuple):
    """A decoder with settings, and the cache that goes with it unless another is named."""

    decoder: type[Decoder]
    settings: Mapping[str, Any] = NONE
    cache: str = "none"
    note: str = ""  # where the settings come from

    @property
    def summary(self) -> str:
        """The first sentence of what the decoder does."""
        return (self.decoder.__doc__ or "").split("\n")[0]


_DINFER = {"block_length": 64, "eos_at_block": True}
PRESETS: dict[str, Preset] = {
    # LLaDA, arXiv 2502.09992
    "low_confidence": Preset(decoders.LowConfidence, note="LLaDA"),
    "random": Preset(decoders.Random, note="LLaDA"),
    "margin": Preset(decoders.Margin),
    "entropy": Preset(decoders.Entropy),
    "left_to_right": Preset(decoders.LeftToRight, note="a baseline"),
    # EOSER-ASS-RL
    "eoser": Preset(decoders.EosRejection, {"block_length": 128}, note="EOSER-ASS-RL: gen_length 256, steps 128"),
    "ass": Preset(decoders.Ascending, note="EOSER-ASS-RL: gen_length 256, so 8 forwards"),
    "eoser_ass": Preset(decoders.Ascending, {"gamma": 0.01}, note="EOSER-ASS-RL"),
    # dllm, Dream
    "scheduled": Preset(decoders.Scheduled, note="dllm"),
    "dream_confidence": Preset(decoders.Scheduled, {"block_length": 128, "order": "confidence"}, note="Dream's maskgit_plus"),
    "dream_margin": Preset(decoders.Scheduled, {"block_length": 128, "order": "margin"}, note="Dream's topk_margin"),
    "dream_entropy": Preset(decoders.Scheduled, {"block_length": 128, "order": "entropy", "temperature": 0.2, "top_p": 0.95}, note="Dream's README"),
    "dream_origin": Preset(decoders.DreamOrigin, {"block_length": 128}, note="Dream"),
    # Fast-dLLM, arXiv 2505.22618
    "threshold": Preset(decoders.Threshold, note="Fast-dLLM without a cache"),
    "factor": Preset(decoders.Factor, note="Fast-dLLM without a cache"),
    "fast_dllm_prefix": Preset(decoders.Threshold, cache="prefix", note="Fast-dLLM with its prefix cache"),
    "fast_dllm": Preset(decoders.Threshold, cache="dual", note="Fast-dLLM with its dual cache"),
    # dInfer's settings for LLaDA-MoE
    "dinfer_threshold": Preset(decoders.Threshold, {**_DINFER, "threshold": 0.8, "slack": 1e-5}, "vicinity", "dInfer"),
    "dinfer_hierarchical": Preset(decoders.Hierarchical, _DINFER, "vicinity", "dInfer"),
    "dinfer_credit": Preset(decoders.Credit, _DINFER, "vicinity", "dInfer"),
    "dinfer_smoothed": Preset(decoders.Smoothed, _DINFER, "vicinity", "dInfer"),
    # entropies
    "med": Preset(decoders.Med, note="arXiv 2510.19990; its own settings were not at hand"),
    "contiguous_med": Preset(decoders.ContiguousMed),
    "entropy_threshold": Preset(decoders.Med, {"most": 0}, note="d3LLM, SGLang"),
    "eb": Preset(decoders.EntropyBounded, note="arXiv 2505.24857; diffusers' setting"),
    # block-causal models: LLaDA2.0, LLaDA2.1
    "llada2": Preset(block_decoders.BlockThreshold, cache="block_causal", note="LLaDA2.0"),
    "llada2_eb": Preset(block_decoders.BlockEntropyBounded, {"entropy": 0.15}, "block_causal", "SGLang"),
    "llada21": Preset(block_decoders.Editing, cache="block_causal", note="LLaDA2.1, quality"),
    "llada21_joint": Preset(block_decoders.Editing, {"threshold": 0.5, "edit_threshold": 0.0}, "block_causal", "SGLang's JointThreshold"),
}
RECOMMENDED = ("low_confidence", "threshold", "factor", "fast_dllm", "dinfer_hierarchical", "dinfer_credit", "eb", "llada2", "llada21")


def build(name: str, settings: Mapping[str, Any], defaults: Mapping[str, Any] = NONE) -> Decoder:
    """The decoder called `name` with `settings`, {field: value or its text}; `defaults` of the caller stand behind the preset's, but where a preset's
    block is longer than gen_length, it is that long.

    Raises ConfigError for an unknown name or field, naming the nearest, or a value of another type.
    """
    preset = _preset(name)
    known = {field.name for field in _fields(preset.decoder)}
    values = {key: value for key, value in defaults.items() if key in known} | dict(preset.settings)
    values |= _parsed(preset.decoder, settings, "decoder", name)
    if "block_length" in preset.settings and "block_length" not in settings and "gen_length" in values:
        values["block_length"] = min(preset.settings["block_length"], values["gen_length"])
    if issubclass(preset.decoder, decoders.Ascending) and "block_length" not in settings:
        values.pop("block_length", None)
    return preset.decoder(**values)


def build_cache(name: str | None, settings: Mapping[str, Any], decoder_name: str) -> Cache:
    """The cache called `name`, by default the one of the decoder's preset, with `settings`. Raises ConfigError likewise."""
    name = name or _preset(decoder_name).cache
    if name not in cache_lib.CACHES:
        raise ConfigError(f"unknown cache '{name}'{nearest(name, cache_lib.CACHES)}")
    cls = cache_lib.CACHES[name]
    return cls(**_parsed(cls, settings, "cache", name))


def describe(names: Any) -> str:
    """A line a preset: its name, what it does, its cache and source."""
    lines = []
    for name in names:
        preset = PRESETS[name]
        cache = f" [cache {preset.cache}]" if preset.cache != "none" else ""
        lines.append(f"{name:<20} {preset.summary}{cache}" + (f" ({preset.note})" if preset.note else ""))
        fields = {field.name: preset.settings.get(field.name, field.default) for field in _fields(preset.decoder)}
        own = {key: value for key, value in fields.items() if key not in COMMON or key in preset.settings}
        lines.append(" " * 21 + "  ".join(f"{key}={value}" for key, value in own.items()))
    return "\n".join(lines)


COMMON = ("gen_length", "block_length", "temperature", "top_k", "top_p", "guidance", "eos_at_block", "answer_entropy")


def fields_of(name: str, cache: str | None) -> set[tuple[str, str]]:
    """("decoder" or "cache", field) of all that can be set. Raises ConfigError for an unknown decoder."""
    preset = _preset(name)
    found = {("decoder", field.name) for field in _fields(preset.decoder)}
    cls = cache_lib.CACHES.get(cache or preset.cache)
    return found | ({("cache", field.name) for field in _fields(cls)} if cls else set())


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise ConfigError(f"unknown decoder '{name}'{nearest(name, PRESETS)}; sample --list_decoders=all tells what they do")
    return PRESETS[name]


def _fields(cls: Any) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(cls) if field.init]


def _parsed(cls: Any, settings: Mapping[str, Any], prefix: str, name: str) -> dict[str, Any]:
    """Values of the types of the fields. Raises ConfigError for what is no field of `cls`, or of another type."""
    fields = {field.name: field.default for field in _fields(cls)}
    values = {}
    for key, value in settings.items():
        if key not in fields:
            ignored = f", so it would be ignored; {name} has {', '.join(fields) or 'none'}"
            raise ConfigError(f"{prefix} {name} has no setting '{key}'{ignored if _somewhere(key) else nearest(key, fields, f'--{prefix}.')}")
        kind = type(fields[key])
        try:
            if kind is bool and isinstance(value, str):
                value = {"true": True, "1": True, "false": False, "0": False}[value.lower()]
            values[key] = kind(value)
        except (ValueError, KeyError):
            raise ConfigError(f"--{prefix}.{key}={value!r} is not a {kind.__name__} such as {fields[key]!r}") from None
    return values


def _somewhere(key: str) -> bool:
    """Whether any decoder or cache has this setting."""
    classes = [preset.decoder for preset in PRESETS.values()] + [*cache_lib.CACHES.values()]
    return any(field.name == key for cls in classes for field in _fields(cls))


class Flags(NamedTuple):
    """What a command line says of decoder and cache."""

    decoder: str | None = None
    decoder_settings: Mapping[str, str] = NONE
    cache: str | None = None
    cache_settings: Mapping[str, str] = NONE

    @property
    def given(self) -> str | None:
        """The first flag that was given, of none None."""
        given = ("decoder", self.decoder or self.decoder_settings), ("cache", self.cache or self.cache_settings)
        return next((name for name, value in given if value), None)

    def lengths(self, sequence_length: int, block_size: int = 0) -> dict[str, int]:
        """Unless told otherwise, write at most half of the length that the model was trained on, in blocks that divide it, or in its own."""
        told = self.decoder_settings.get("block_length", "")
        block = int(told) if told.isdecimal() else block_size or min(32, max(sequence_length // 2, 1))
        return {"block_length": block, "gen_length": max(min(128, sequence_length // 2) // max(block, 1), 1) * block}

    def build(self, default: str = "low_confidence", defaults: Mapping[str, Any] = NONE) -> tuple[str, Decoder, Cache]:
        """(name, decoder, cache), where nothing is named the decoder called `default`; raises what `build` and `build_cache` do."""
        name = self.decoder or default
        return name, build(name, self.decoder_settings, defaults), build_cache(self.cache, self.cache_settings, name)


def split_flags(argv: list[str]) -> tuple[Flags, list[str]]:
    """Take `--decoder=NAME`, `--decoder.field=value` and the same of `--cache` out of a command line: (flags, the rest).

    Raises ConfigError for a decoder's field under a wrong prefix or none, naming the right flag.
    """
    names: dict[str, str | None] = {"decoder": None, "cache": None}
    settings: dict[str, dict[str, str]] = {"decoder": {}, "cache": {}}
    rest: list[str] = []
    known = {field.name: "decoder" for preset in PRESETS.values() for field in _fields(preset.decoder)}
    known |= {field.name: "cache" for cls in cache_lib.CACHES.values() for field in _fields(cls)}
    words = iter(argv)
    for word in words:
        flag, has_value, value = word.partition("=")
        dashless = flag.lstrip("-")
        prefix, _, field = dashless.partition(".")
        if word == "--":
            return Flags(names["decoder"], settings["decoder"], names["cache"], settings["cache"]), [*rest, word, *words]
        if flag.startswith("-") and prefix in names:
            value = value if has_value else next(words, None)
            if value is None:
                example = {"decoder": "--decoder=low_confidence or --decoder.steps=64", "cache": "--cache=dual or --cache.refresh_every=8"}[prefix]
                raise ConfigError(f"--{dashless} needs a value, for example {example}")
            if not field:
                names[prefix] = value
            else:
                settings[prefix][field] = value
        elif flag.startswith("-") and dashless.removeprefix("config.") in known:
            field = dashless.removeprefix("config.")
            raise ConfigError(f"unknown flag '{flag}'; did you mean --{known[field]}.{field}?")
        else:
            rest.append(word)
    return Flags(names["decoder"], settings["decoder"], names["cache"], settings["cache"]), rest
