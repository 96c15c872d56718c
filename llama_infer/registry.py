"""Three doors for plug-ins: an object in the slot, :func:`register`, or an entry point.

A name is resolved among the built-in parts, then those registered in this process, then entry points of installed
distributions; an entry point's module is imported only when its name is asked for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar, get_args

from .errors import LlamaInferError, PartError, UnknownPartError, suggest
from .parts import Kind

T = TypeVar("T")

BUILTIN: dict[Kind, dict[str, str]] = {
    "processor": {
        "logit_bias": "llama_infer.processors.bias:LogitBias",
        "sequence_bias": "llama_infer.processors.bans:SequenceBias",
        "bad_words": "llama_infer.processors.bans:BadWords",
        "no_repeat_ngram_size": "llama_infer.processors.bans:NoRepeatNgram",
        "suppress_tokens": "llama_infer.processors.bans:SuppressTokens",
        "begin_suppress_tokens": "llama_infer.processors.bans:BeginSuppressTokens",
        "allowed_token_ids": "llama_infer.processors.bans:AllowedTokens",
        "min_new_tokens": "llama_infer.processors.bias:MinNewTokens",
        "repetition_penalty": "llama_infer.processors.penalties:RepetitionPenalty",
        "presence_penalty": "llama_infer.processors.penalties:PresencePenalty",
        "frequency_penalty": "llama_infer.processors.penalties:FrequencyPenalty",
        "dry": "llama_infer.processors.dry:Dry",
        "exponential_decay_length_penalty": "llama_infer.processors.length:ExponentialDecayLengthPenalty",
        "watermark": "llama_infer.processors.watermark:Watermark",
        "forced_bos_token_id": "llama_infer.processors.bans:ForcedBos",
        "forced_eos_token_id": "llama_infer.processors.bans:ForcedEos",
        "reasoning_budget": "llama_infer.processors.reasoning:ReasoningBudget",
        "quadratic_smoothing": "llama_infer.processors.dynamic:QuadraticSmoothing",
        "dynamic_temperature": "llama_infer.processors.dynamic:DynamicTemperature",
        "edt": "llama_infer.processors.adaptive:EntropyTemperature",
        "temperature": "llama_infer.processors.temperature:Temperature",
        "top_h": "llama_infer.processors.cutoffs:TopH",
        "top_k": "llama_infer.processors.truncation:TopK",
        "top_p": "llama_infer.processors.truncation:TopP",
        "min_p": "llama_infer.processors.truncation:MinP",
        "typical_p": "llama_infer.processors.shapes:TypicalP",
        "epsilon_cutoff": "llama_infer.processors.cutoffs:EpsilonCutoff",
        "eta_cutoff": "llama_infer.processors.cutoffs:EtaCutoff",
        "top_n_sigma": "llama_infer.processors.cutoffs:TopNSigma",
        "top_a": "llama_infer.processors.cutoffs:TopA",
        "tfs": "llama_infer.processors.shapes:TailFree",
        "p_less": "llama_infer.processors.cutoffs:PLess",
        "p_less_norm": "llama_infer.processors.cutoffs:PLessNorm",
        "mirostat": "llama_infer.processors.mirostat:Mirostat",
        "xtc": "llama_infer.processors.xtc:XTC",
        "adaptive_p": "llama_infer.processors.adaptive:AdaptiveP",
    },
    "sampler": {
        "categorical": "llama_infer.samplers:Categorical",
        "greedy": "llama_infer.samplers:Greedy",
    },
    "stopping": {
        "end": "llama_infer.stopping:EndTokens",
        "length": "llama_infer.stopping:Length",
        "text": "llama_infer.stopping:StopStrings",
        "regex": "llama_infer.stopping:StopRegex",
        "max_time": "llama_infer.stopping:MaxTime",
        "loops": "llama_infer.stopping:Loops",
    },
    "strategy": {"sample": "llama_infer.strategies.sample:Sample"},
    "cache": {
        "slots": "llama_infer.cache.slots:SlotCache",
        "slots-int8": "llama_infer.cache.int8:Int8SlotCache",
        "plain": "llama_infer.cache.plain:PlainCache",
    },
    "loader": {"auto": "llama_infer.models.loaders:AutoLoader"},
    "quantization": {
        "none": "llama_infer.models.quantization:Unchanged",
        "packed": "llama_infer.models.packed:Packed",
        "int8": "llama_infer.models.int8:Int8",
        "int4": "llama_infer.models.int4:Int4",
        "bnb-int8": "llama_infer.models.quantization:BitsAndBytesInt8",
        "bnb-nf4": "llama_infer.models.quantization:BitsAndBytesNF4",
        "bnb-fp4": "llama_infer.models.quantization:BitsAndBytesFP4",
        "torchao": "llama_infer.models.torchao:TorchAO",
    },
    "formatter": {
        "auto": "llama_infer.prompts.auto:AutoFormatter",
        "chat": "llama_infer.prompts.chat:ChatFormatter",
        "plain": "llama_infer.prompts.plain:PlainFormatter",
    },
    "backend": {"local": "llama_infer.backends.local:LocalBackend"},
}

KINDS: tuple[Kind, ...] = get_args(Kind)
_GROUPS: dict[Kind, str] = {
    "processor": "llama_infer.processors",
    "sampler": "llama_infer.samplers",
    "stopping": "llama_infer.stopping",
    "strategy": "llama_infer.strategies",
    "cache": "llama_infer.caches",
    "loader": "llama_infer.loaders",
    "quantization": "llama_infer.quantizations",
    "formatter": "llama_infer.formatters",
    "backend": "llama_infer.backends",
}
_registered: dict[tuple[Kind, str], Callable[..., Any]] = {}


@dataclass(frozen=True, slots=True)
class Installed:
    """A part that can be named: its kind and name, the distribution that brings it, and where its code is."""

    kind: Kind
    name: str
    package: str
    version: str
    location: str


def register(kind: Kind, name: str) -> Callable[[T], T]:
    """Class decorator that makes a part known by name in this process.

    The class is called without arguments when the name is used in a pipeline. Registering the same class again (a
    module reloaded, a notebook cell run twice) replaces it; a name that belongs to another part is a PartError.
    """
    _check_kind(kind)

    def decorate(factory: T) -> T:
        known = _registered.get((kind, name))
        same = known is not None and _location(known) == _location(factory)
        if name in BUILTIN[kind] or (known is not None and not same):
            owner = BUILTIN[kind].get(name) or _location(known)
            raise PartError(f"the {kind} {name!r} exists already, from {owner}: choose another name")
        _registered[kind, name] = factory  # type: ignore[assignment]
        return factory

    return decorate


def resolve(kind: Kind, given: Any) -> Any:
    """The part for a slot: a name is looked up and instantiated; a class is instantiated; an object is itself.

    A part with a method ``named`` is called with what follows a colon: ``"torchao:int8_weight_only"``.
    """
    if isinstance(given, str):
        name, colon, argument = given.partition(":")
        if colon and (kind, given) not in _registered and hasattr(factory := _lookup(kind, name), "named"):
            return factory.named(argument)
        return _lookup(kind, given)()
    if isinstance(given, type):
        return given()
    if given is None or callable(given) or kind in ("strategy", "cache", "quantization", "backend", "loader"):
        return given
    raise PartError(f"{given!r} is no {kind}: give a name, an object with __call__, or a function")


def installed() -> list[Installed]:
    """Every part that can be named, built-in, registered and from entry points, without importing any of them."""
    from . import __version__

    rows = [
        Installed(kind, name, "llama-infer", __version__, location)
        for kind, names in BUILTIN.items()
        for name, location in names.items()
    ]
    rows += [Installed(kind, name, "(this process)", "", _location(f)) for (kind, name), f in _registered.items()]
    for kind in KINDS:
        for point in _entry_points(kind):
            package = point.dist.name if point.dist else "?"
            version = point.dist.version if point.dist else ""
            rows.append(Installed(kind, point.name, package, version, point.value))
    return rows


def _lookup(kind: Kind, name: str) -> Callable[..., Any]:
    points = [point for point in _entry_points(kind) if point.name == name]
    owners = [f"{p.dist.name if p.dist else '?'} ({p.value})" for p in points]
    if name in BUILTIN[kind]:
        owners.insert(0, f"llama-infer ({BUILTIN[kind][name]})")
    if (kind, name) in _registered:
        owners.insert(0, f"this process ({_location(_registered[kind, name])})")
    if len(owners) > 1:
        raise PartError(f"several parts claim the {kind} name {name!r}: {'; '.join(owners)}. Uninstall or rename one")
    if name in BUILTIN[kind]:
        module, _, attribute = BUILTIN[kind][name].partition(":")
        return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]
    if (kind, name) in _registered:
        return _registered[kind, name]
    if points:
        try:
            return points[0].load()  # type: ignore[no-any-return]
        except LlamaInferError:
            raise
        except Exception as error:
            raise PartError(f"the {kind} {name!r} of {owners[0]} cannot be imported: {error!r}") from error
    known = sorted({part.name for part in installed() if part.kind == kind})
    raise UnknownPartError(f"unknown {kind} {name!r}{suggest(name, known)} Known: {', '.join(known)}")


def _entry_points(kind: Kind) -> tuple[importlib.metadata.EntryPoint, ...]:
    if os.environ.get("LLAMA_INFER_PLUGINS") == "0":
        return ()
    try:
        return _read_entry_points(_GROUPS[kind], _search_path())
    except Exception as error:  # a distribution with unreadable metadata must not hide the others
        warnings.warn(f"entry points of group {_GROUPS[kind]} cannot be read: {error!r}", stacklevel=2)
        return ()


@lru_cache(maxsize=16)
def _read_entry_points(group: str, path: Hashable) -> tuple[importlib.metadata.EntryPoint, ...]:
    """Those of a group; kept while ``path`` stays, because a look takes milliseconds and a pipeline names 40 parts."""
    return tuple(importlib.metadata.entry_points(group=group))


def _search_path() -> Hashable:
    """What changes when a distribution is installed or removed: where they are looked for, and when that changed."""
    return tuple((place, _modified(place or ".")) for place in sys.path)


def _modified(place: str) -> int:
    try:
        return os.stat(place).st_mtime_ns
    except OSError:  # it need not exist
        return 0


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise PartError(f"unknown kind of part {kind!r}{suggest(kind, KINDS)} Kinds: {', '.join(KINDS)}")


def _location(factory: Any) -> str:
    return f"{getattr(factory, '__module__', '?')}:{getattr(factory, '__qualname__', factory)}"
