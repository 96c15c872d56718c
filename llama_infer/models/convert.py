"""Checkpoints rewritten as transformers' own: safetensors, config.json and a tokenizer in a new folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LlamaInferError, ParameterError, SavingError, UnsupportedError
from ..files import new_folder
from ..parts import Source
from ..registry import resolve
from .checks import INDEX, WEIGHTS, check_vocabulary
from .devices import dtype_name
from .loaders import AutoLoader, examine, load_tokenizer
from .meta import TOKENIZER, MetaCheckpoint, is_meta, read_tokenizer
from .saved import save_quantised
from .weights import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD_BYTES = 5_000_000_000
"""No file of weights grows larger, unless a single tensor is."""


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    dtype: Any = None,
    context_length: int | None = None,
    quantization: Any = None,
    trust_remote_code: bool = False,
) -> tuple[str, ...]:
    """Write a checkpoint as safetensors in a new folder, which appears when it is complete or not at all.

    Args:
        source: Meta's layout (params.json and consolidated.*.pth), or whatever a pipeline loads.
        target: the folder to make; it must not exist, or be empty.
        adapter: a LoRA adapter to merge into the weights.
        tokenizer: a folder or hub id, when it is not the source's.
        revision: of the hub repository.
        dtype: of the weights; by default the source's.
        context_length: for Meta's layout, whose files do not say it; see :class:`~.meta.MetaCheckpoint`.
        quantization: "int8", "int4" or another policy of this library, which alone reads the result then.
        trust_remote_code: whether the source may bring its own code.

    Returns what a user should know, such as that a tokenizer is missing. Raises LoadingError for a source that cannot
    be read, UnsafeCheckpointError for one that would run code, SavingError for a target that cannot be written.
    """
    folder, place = Path(os.path.expanduser(source)), Path(os.path.expanduser(target))
    wanted = Source(
        model=os.fspath(source),
        tokenizer=None if tokenizer is None else os.fspath(tokenizer),
        revision=revision,
        dtype=None if dtype is None else dtype_name(dtype),
        device="cpu",
        quantization="none" if quantization is None else quantization,
        adapter=None if adapter is None else os.fspath(adapter),
        trust_remote_code=trust_remote_code,
    )
    meta = is_meta(folder)
    if quantization is not None and not hasattr(resolve("quantization", quantization), "quantise"):
        raise UnsupportedError(f"quantization={quantization!r} is not one that is saved; int8 and int4 are")
    if meta and quantization is not None:
        raise UnsupportedError("Meta's layout is converted by itself: quantise the result afterwards")
    if meta and (adapter is not None or revision is not None):
        raise UnsupportedError("Meta's layout is converted by itself: merge the adapter into the result afterwards")
    if context_length is not None and not meta:
        raise ParameterError("context_length is for Meta's layout; elsewhere config.json says it")
    from safetensors import SafetensorError

    try:
        with new_folder(place) as new, quiet():
            if meta:
                return _convert_meta(MetaCheckpoint(folder, context_length), wanted, new)
            return _convert_loaded(wanted, new)
    except LlamaInferError:
        raise
    except (OSError, SafetensorError) as error:
        raise SavingError(f"{place} cannot be written, and is as it was: {error}") from error


def _convert_meta(checkpoint: MetaCheckpoint, source: Source, target: Path) -> tuple[str, ...]:
    """Tensor by tensor: no more than a file of weights is in memory."""
    import torch

    dtype = checkpoint.dtype if source.dtype in (None, "auto") else getattr(torch, str(source.dtype))
    checkpoint.config.dtype = dtype
    checkpoint.config.save_pretrained(target)
    _save_weights(checkpoint, dtype, target)
    if source.tokenizer is not None:
        tokenizer = load_tokenizer(source, target, checkpoint.config.vocab_size)
    else:
        tokenizer = read_tokenizer(checkpoint.folder, checkpoint.config)
    return _save_tokenizer(tokenizer, checkpoint.folder, checkpoint.config.vocab_size, target)


def _convert_loaded(source: Source, target: Path) -> tuple[str, ...]:
    from dataclasses import replace

    if source.quantization == "none":
        loaded = AutoLoader()(replace(source, dtype=source.dtype or examine(source).dtype))
        loaded.model.save_pretrained(target, max_shard_size=SHARD_BYTES)
    else:
        loaded = AutoLoader()(source)
        save_quantised(loaded.model, target)
    return _save_tokenizer(loaded.tokenizer, None, None, target)


def _save_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, meta: Path | None, rows: int | None, target: Path
) -> tuple[str, ...]:
    if tokenizer is not None:
        check_vocabulary(target, tokenizer.get_vocab(), rows)
        tokenizer.save_pretrained(target)
        return ()
    if meta is None or not (meta / TOKENIZER).is_file():
        return ("there is no tokenizer: give one with tokenizer= when the model is loaded",)
    (target / TOKENIZER).write_bytes((meta / TOKENIZER).read_bytes())
    (target / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    return (f"{TOKENIZER} is copied as it is; to read it transformers needs: pip install sentencepiece protobuf",)


def _save_weights(checkpoint: MetaCheckpoint, dtype: Any, target: Path) -> None:
    from safetensors.torch import save_file

    shapes = checkpoint.shapes()
    files = list(_grouped({name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}))
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = WEIGHTS if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {name: checkpoint.tensor(name).to(dtype) for name in names}
        save_file(tensors, target / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if len(files) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (target / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _grouped(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Names whose sizes make no more than :data:`SHARD_BYTES` together, in order."""
    group: list[str] = []
    for name, size in sizes.items():
        if group and sum(sizes[other] for other in group) + size > SHARD_BYTES:
            yield group
            group = []
        group.append(name)
    yield group
