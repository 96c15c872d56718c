"""Which parameters exist, what they may be, and whose value counts: call > pipeline > checkpoint > default."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ParameterError, UnknownParameterError, UnsupportedError, suggest
from .parts import Param
from .types import Value

ENGINE_PARAMS: dict[str, Param] = {
    "max_new_tokens": Param(
        default=None,
        kind=int,
        check=lambda v: v >= 0,
        range="max_new_tokens >= 0",
        help="the longest answer; unset: to the end of the context",
    ),
    "seed": Param(
        default=None,
        kind=int,
        check=lambda v: 0 <= v < 1 << 63,
        range="0 <= seed < 2**63",
        help="the same seed gives the same answer; unset: dealt, and reported",
    ),
    "n": Param(default=1, check=lambda v: 1 <= v <= 1024, range="1 <= n <= 1024", help="samples of each prompt"),
    "logprobs": Param(
        default=0,
        check=lambda v: 0 <= v <= 1000,
        range="0 <= logprobs <= 1000",
        help="report that many likeliest tokens at each position",
    ),
    "stop": Param(
        default=(),
        check=lambda v: all(isinstance(s, str) and s for s in v),
        range="non-empty strings",
        help="strings that end the answer",
    ),
}
"""The engine's own; every other parameter exists because a part declares it."""

_RENAMED = {"num_return_sequences": "n", "stop_strings": "stop"}
_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    # Fields of a GenerationConfig that say nothing about a decoding loop of ours, at these values.
    "use_cache": (True,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "return_dict_in_generate": (True, False),
    "output_scores": (False,),
    "output_logits": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "early_stopping": (False,),
    "max_length": (20,),
    "min_length": (0,),
    "length_penalty": (1.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "diversity_penalty": (0.0,),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
}
_SKIPPED = ("_from_model_config", "_commit_hash", "transformers_version", "do_sample")
_TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@dataclass(frozen=True, slots=True)
class Setting:
    """An effective value and where it comes from: "call", "pipeline", "checkpoint" or "default"."""

    value: Value
    origin: str


def declare(parts: Iterable[Any]) -> dict[str, Param]:
    """Every parameter of the parts and the engine's own. Parts may share one if they declare it alike."""
    declared = dict(ENGINE_PARAMS)
    for part in parts:
        for name, param in getattr(part, "params", {}).items():
            known = declared.setdefault(name, param)
            if known != param:
                raise ParameterError(
                    f"two parts declare the parameter {name!r} differently: {known} and {param}; rename one of them"
                )
    return declared


def validate(declared: Mapping[str, Param], given: Mapping[str, Value] | Any) -> dict[str, Value]:
    """The given values (a mapping or a transformers ``GenerationConfig``) checked against what is declared.

    Raises UnknownParameterError with the nearest name, ParameterError for a value out of range.
    """
    values = given if isinstance(given, Mapping) else from_generation_config(given, declared)
    for name in values:
        if name not in declared:
            raise UnknownParameterError(
                f"unknown parameter {name!r}{suggest(name, declared)} This pipeline knows: {', '.join(declared)}."
            )
    return {name: declared[name].validate(name, value) for name, value in values.items()}


def from_checkpoint(fields: Mapping[str, Any], declared: Mapping[str, Param]) -> dict[str, Value]:
    """Values from a checkpoint's generation_config.json: what nobody declares is ignored, ``do_sample=False`` is
    temperature 0."""
    renamed = {_RENAMED.get(name, name): value for name, value in fields.items() if value is not None}
    values = {name: value for name, value in renamed.items() if name in declared and name not in ("n", "seed")}
    if fields.get("do_sample") is False and "temperature" in declared:
        values["temperature"] = 0.0
    return {name: declared[name].validate(name, value) for name, value in values.items()}


def from_generation_config(config: Any, declared: Mapping[str, Param]) -> dict[str, Value]:
    """A transformers ``GenerationConfig`` as parameters. A field that is set to what we cannot honour is an error."""
    if not hasattr(config, "to_diff_dict"):
        raise ParameterError(f"parameters are a mapping or a GenerationConfig, not a {type(config).__name__}")
    values: dict[str, Value] = {}
    for name, value in config.to_dict().items():
        if value is None or name in _SKIPPED or name in _TOKEN_FIELDS:
            continue
        target = _RENAMED.get(name, name)
        if target in declared:
            values[target] = value
        elif value not in _NO_EFFECT.get(name, ()):
            raise UnsupportedError(
                f"GenerationConfig.{name}={value!r} is not supported by this pipeline; it knows: {', '.join(declared)}."
            )
    if config.do_sample is False:
        values["temperature"] = 0.0
    return values


def resolve(declared: Mapping[str, Param], *layers: tuple[str, Mapping[str, Value]]) -> dict[str, Setting]:
    """Every parameter's effective value; earlier layers count more than later ones."""
    settings = {}
    for name, param in declared.items():
        found = next((Setting(values[name], origin) for origin, values in layers if name in values), None)
        settings[name] = found or Setting(param.default, "default")
    return settings
