"""From a pipeline's slots to what an engine is made of: load once, bind the parts to what was loaded."""

from __future__ import annotations

import os
import secrets
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import registry
from .chain import Chain
from .engine.detokenize import Detokenizer
from .engine.engine import Assembly
from .engine.graphs import can_record
from .engine.prefix import PrefixCache
from .errors import UnsupportedError
from .parts import Context, LoadedModel, Param, Source
from .types import Prompt, Value

if TYPE_CHECKING:
    import torch

    from .models.memory import MemoryPlan
    from .pipeline import Pipeline


@dataclass(eq=False)
class Shared:
    """A loaded model and what all pipelines on it have in common."""

    loaded: LoadedModel
    detokenizer: Detokenizer
    lock: Any = field(default_factory=threading.Lock)


_loaded: weakref.WeakValueDictionary[Any, Shared] = weakref.WeakValueDictionary()
"""What is in use in this process, so that loading the same twice shares it."""


def load(pipeline: Pipeline) -> Shared:
    """The pipeline's model, taken from another pipeline of this process when that loaded the same."""
    model = pipeline.model
    if isinstance(model, LoadedModel):
        return _share(("object", id(model)), lambda: model)
    key: tuple[Any, ...]
    if not isinstance(model, (str, os.PathLike)):
        key = ("model", id(model), id(pipeline.tokenizer), pipeline.attention)
        return _share(key, lambda: _from_model(pipeline))
    source = _source(pipeline)
    brought = pipeline.tokenizer if source.tokenizer is None else None
    key = (
        repr(pipeline.loader),
        repr(source),
        id(brought),
        _fingerprint(source.model),
        _fingerprint(source.tokenizer),
        _fingerprint(source.adapter),
    )
    return _share(key, lambda: _from_source(pipeline, source, brought))


def assemble(
    pipeline: Pipeline,
    shared: Shared,
    parts: Any,
    declared: Mapping[str, Param],
    defaults: Mapping[str, Value],
    size: int,
) -> tuple[Assembly, MemoryPlan]:
    """Binds the parts to the loaded model, and sees how many rows there is memory for."""
    from .models import parallel
    from .models.memory import plan_batch

    loaded = shared.loaded
    plan = plan_batch(loaded.model, size, loaded.context_length)
    deal_seed = partial(secrets.randbits, 53)
    if parallel.is_split(loaded):
        plan, deal_seed = parallel.agree(loaded, plan), partial(parallel.deal_seed, loaded)
        declared = parallel.without_clocks(declared, defaults)
    remembered = int(min(pipeline.prefix_cache, plan.tokens / 4))
    vocab_size = int(loaded.model.config.get_text_config().vocab_size)
    context = Context(loaded.tokenizer, vocab_size, loaded.end_token_ids, loaded.context_length, loaded.device)
    cache = registry.resolve("cache", pipeline.cache)
    formatter = registry.resolve("formatter", pipeline.formatter)

    def encode(prompt: Prompt) -> list[int]:
        if isinstance(prompt, tuple) and isinstance(prompt[0], int):
            return [token for token in prompt if isinstance(token, int)]
        return list(formatter(prompt, loaded.tokenizer))

    assembly = Assembly(
        loaded=loaded,
        chain=Chain(parts.processors, parts.sampler).bind(context),
        strategy=_bound(parts.strategy, context),
        stopping=tuple(_bound(part, context) for part in parts.stopping),
        cache=lambda: cache.bind(loaded.model),
        encode=encode,
        declared=declared,
        defaults=defaults,
        vocab_size=vocab_size,
        detokenizer=shared.detokenizer,
        batch_size=plan.batch_size,
        cache_tokens=plan.tokens,
        compiled=_compiled(loaded) if pipeline.compile else None,
        runs_ahead=_works_beside_the_host(loaded.device),
        deal_seed=deal_seed,
        lock=shared.lock,
        observers=tuple(pipeline.observers),
        prefixes=PrefixCache(remembered) if remembered and hasattr(cache, "paste") else None,
    )
    return assembly, plan


def _works_beside_the_host(device: torch.device) -> bool:
    return device.type == "cuda"


def _compiled(loaded: LoadedModel) -> Any:
    """The model's forward for torch.compile to compile, which it does when it is first called."""
    if not can_record(loaded):
        raise UnsupportedError(
            f"compile=True is for a model in one piece on a CUDA device, and this one is on {loaded.device}: "
            "layers there are kernels that torch.compile does not look into"
        )
    import torch
    from torch._dynamo import config

    compiled = torch.compile(loaded.model.forward)

    def forward(**arguments: Any) -> Any:
        with config.patch(recompile_limit=256):  # the same code is compiled for each layer: its number is a constant
            return compiled(**arguments)

    return forward


def _bound(part: Any, context: Context) -> Any:
    return part.bind(context) if hasattr(part, "bind") else part


def _share(key: Any, make: Any) -> Shared:
    shared = _loaded.get(key)
    if shared is None:
        loaded = make()
        _install_attention(loaded)
        shared = _loaded[key] = Shared(loaded, Detokenizer(loaded.tokenizer))
    return shared


def _install_attention(loaded: LoadedModel) -> None:
    """Ours, which leaves anybody else's calls on the model as they were; models that refuse it keep their own."""
    from .models import attention

    if attention.refusal(loaded.model) is None:
        attention.install(loaded.model, loaded.attention)


def _source(pipeline: Pipeline) -> Source:
    named = isinstance(pipeline.tokenizer, (str, os.PathLike))
    return Source(
        model=os.fspath(pipeline.model),
        tokenizer=os.fspath(pipeline.tokenizer) if named else None,
        revision=pipeline.revision,
        dtype=None if pipeline.dtype is None else str(pipeline.dtype).removeprefix("torch."),
        device=None if pipeline.device is None else str(pipeline.device),
        device_map=pipeline.device_map,
        tp_plan=pipeline.tp_plan,
        attention=pipeline.attention,
        quantization=pipeline.quantization,
        adapter=None if pipeline.adapter is None else os.fspath(pipeline.adapter),
        merge_adapter=bool(pipeline.merge_adapter),
        local_files_only=bool(pipeline.local_files_only),
        trust_remote_code=bool(pipeline.trust_remote_code),
    )


def _from_source(pipeline: Pipeline, source: Source, tokenizer: Any) -> LoadedModel:
    loaded = registry.resolve("loader", pipeline.loader)(source)
    if not isinstance(loaded, LoadedModel):
        raise UnsupportedError(f"the loader returned a {type(loaded).__name__}; a loader returns a LoadedModel")
    return loaded if tokenizer is None else replace(loaded, tokenizer=tokenizer)


def _from_model(pipeline: Pipeline) -> LoadedModel:
    """A transformers model that the caller brought."""
    from .models.describe import describe

    set_elsewhere = ("dtype", "device", "device_map", "quantization", "revision", "adapter", "tp_plan")
    given = [name for name in set_elsewhere if getattr(pipeline, name) is not None]
    if given:
        raise UnsupportedError(f"{', '.join(given)}: set on a model that is loaded already; load it that way yourself")
    if not hasattr(pipeline.model, "forward") or not hasattr(pipeline.model, "config"):
        raise UnsupportedError(
            f"model is a {type(pipeline.model).__name__}; give a name, a folder, or a transformers causal model"
        )
    return describe(pipeline.model, pipeline.tokenizer, pipeline.attention)


def _fingerprint(name: Any) -> Any:
    """What tells a local folder, or file, from what it was before: the files' names, sizes and times."""
    if not isinstance(name, str) or not os.path.exists(name):
        return name
    entries = [Path(name)] if os.path.isfile(name) else Path(name).iterdir()
    files = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    return name, tuple(sorted((file, stat.st_size, stat.st_mtime_ns) for file, stat in files))
