"""What can be known of a checkpoint before any of it is loaded: cheap, offline, and without executing anything.

transformers would find most of this too, but late, in its own words, and sometimes after a question on standard input.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..errors import LoadingError, UnsafeCheckpointError
from . import gptq

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
TOKENIZER_CONFIG = "tokenizer_config.json"

_DISTRIBUTED = re.compile(r"^shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors$")
_IMPLEMENTATION = re.compile(r"(attn|experts)_implementation(_internal)?$")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
COMPRESSED = "compressed-tensors"
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class Checkpoint:
    """A folder that passed the checks.

    Attributes:
        folder: where it is.
        config: config.json.
        weights: the safetensors files that will be read.
        dtype: of its weights ("bfloat16", "float16", "float32", "float64"), or None when it is another.
        embedding_rows: how many token ids the model has an embedding for, or None when that is not known.
        numbers: how many weights there are in memory; None when they stay packed several to a number.
    """

    folder: Path
    config: Mapping[str, Any]
    weights: tuple[Path, ...]
    dtype: str | None
    embedding_rows: int | None
    numbers: int | None = None

    @property
    def quantization(self) -> str | None:
        """The method that the checkpoint was quantised with before it was saved."""
        found = self.config.get("quantization_config")
        return method_of(found) or "unknown" if isinstance(found, Mapping) else None

    @property
    def unpacked(self) -> bool:
        """Whether quantised weights become ordinary ones as they are read."""
        return self.quantization in (COMPRESSED, *gptq.METHODS)


def method_of(described: Mapping[str, Any]) -> str | None:
    """What a 'quantization_config' says that weights are quantised by; None where it does not."""
    if described.get("load_in_4bit") or described.get("load_in_8bit"):  # older ones name no method
        return "bitsandbytes"
    method = described.get("quant_method")
    return None if method is None else str(method)


def check_checkpoint(folder: Path, trust_remote_code: bool = False) -> Checkpoint:
    """Examine a folder that is to be loaded as a model.

    Raises:
        UnsafeCheckpointError: it has pickled weights only, or brings code of its own that is not trusted.
        LoadingError: a file is missing or damaged; the message names it.
    """
    config = check_config(folder, trust_remote_code)
    weights, index = _weight_files(folder, config)
    tensors: dict[str, tuple[str, list[int]]] = {}
    for path in weights:
        held = read_header(path)
        for name, file in index.items():
            if file == path and name not in held:
                raise LoadingError(f"{path} lacks the tensor {name!r} that the index promises: download it again")
        tensors.update(held)
    dtypes = [dtype for dtype, _ in tensors.values()]
    rows = _embedding_rows(folder, config, {name: shape for name, (_, shape) in tensors.items()})
    common = max(set(dtypes), key=dtypes.count) if dtypes else ""
    checkpoint = Checkpoint(folder, config, tuple(weights), _DTYPES.get(common), rows)
    if checkpoint.quantization == "bitsandbytes" and not {"I8", "U8"} & set(dtypes):  # the first forward would fail
        raise LoadingError(
            f"{folder / CONFIG} says that bitsandbytes quantised the weights, and they are whole: take "
            "'quantization_config' out of it; quantization='bnb-nf4' or 'bnb-int8' quantises while loading"
        )
    return replace(checkpoint, numbers=_numbers(checkpoint, tensors))


def check_config(folder: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """config.json of a model's folder, refused when it asks for code that is not trusted."""
    if not folder.is_dir():
        raise LoadingError(f"there is no folder {folder}: check the path, or give a hub id such as 'org/name'")
    if not (folder / CONFIG).is_file():
        hint = "is it a checkpoint?"
        if (folder / "adapter_config.json").is_file():
            hint = "it holds an adapter: load its base model with adapter="
        elif (folder / "params.json").is_file():
            hint = f"it is in Meta's layout: llama-infer convert {folder} NEW_FOLDER"
        raise LoadingError(f"{folder} has no {CONFIG}; {hint}")
    config = read_json(folder / CONFIG)
    if (folder / "adapter_config.json").is_file():
        # With peft installed transformers would load the adapter unasked, from files that were not checked.
        raise LoadingError(f"{folder} holds an adapter (adapter_config.json): merge it into the model, or move it away")
    _refuse_remote_code(folder / CONFIG, config, trust_remote_code)
    check_tokenizer_config(folder, trust_remote_code)
    if not isinstance(config.get("quantization_config") or {}, Mapping):
        raise LoadingError(f"{folder / CONFIG}: 'quantization_config' is no JSON object: download it again")
    if not config.get("model_type") and not config.get("auto_map"):
        raise LoadingError(f"{folder / CONFIG} has no 'model_type': it does not describe a transformers model")
    return config


def check_tokenizer_config(folder: Path, trust_remote_code: bool = False) -> None:
    """Refuse a tokenizer that asks for code that is not trusted, or whose configuration is damaged."""
    path = folder / TOKENIZER_CONFIG
    if path.is_file():
        _refuse_remote_code(path, read_json(path), trust_remote_code)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def check_vocabulary(folder: Path, ids: Mapping[str, int], rows: int | None) -> None:
    """Refuse a tokenizer that produces ids for which the model has no embedding (``rows`` of them)."""
    token = max(ids, key=ids.__getitem__, default=None)
    if token is not None and rows is not None and ids[token] >= rows:
        raise LoadingError(
            f"the tokenizer in {folder} does not belong to this model: its token {token!r} has the id {ids[token]}, "
            f"and the model has embeddings for the ids 0 to {rows - 1}. Give the right one with tokenizer="
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; LoadingError that names the file when it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LoadingError(f"{path} is not JSON ({error}): download it again") from error
    except OSError as error:
        raise LoadingError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise LoadingError(f"{path} holds a JSON {type(found).__name__}, not an object: download it again")
    return found


def read_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every tensor in a safetensors file, whose layout is validated: no gap, overlap or lack.

    Raises LoadingError that names the file. No tensor is read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {name: _describe(file.get_slice(name)) for name in file.keys()}
    except SafetensorError as error:
        raise LoadingError(f"{path} is damaged ({error}): download it again") from error
    except OSError as error:
        raise LoadingError(f"{path} cannot be read: {error}") from error


def _describe(tensor: Any) -> tuple[str, list[int]]:
    return str(tensor.get_dtype()), list(tensor.get_shape())


def _refuse_remote_code(path: Path, config: Mapping[str, Any], trusted: bool) -> None:
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        if trusted:
            continue
        if part.get("auto_map"):
            raise UnsafeCheckpointError(
                f"{path} asks to run Python code of the checkpoint ('auto_map'), which is refused. If you have read "
                "that code and trust it, load with trust_remote_code=True"
            )
        for name, value in part.items():
            # A name with a slash is a repository, whose native code transformers fetches and runs when it can.
            if _IMPLEMENTATION.search(name) and "/" in json.dumps(value):
                raise UnsafeCheckpointError(
                    f"{path} asks to run code from the hub ({name}: {value!r}), which is refused: remove that line"
                )


def _weight_files(folder: Path, config: Mapping[str, Any]) -> tuple[list[Path], dict[str, Path]]:
    """The files to read, and which file the index (if there is one) promises each tensor in."""
    if any(_DISTRIBUTED.match(path.name) for path in folder.glob("shard-*.safetensors")):
        raise LoadingError(f"{folder} holds a distributed training checkpoint (shard-*): save it with save_pretrained")
    # transformers lets a configuration name another file; a checkpoint that ships with the usual names needs none.
    name = config.get("transformers_weights") or (WEIGHTS if (folder / WEIGHTS).is_file() else INDEX)
    path = _inside(folder, name, folder / CONFIG)
    if not os.path.isfile(path):
        raise _no_weights(folder)
    if not path.name.endswith(".json"):
        return [path], {}
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise LoadingError(f"{path} has no 'weight_map': download it again")
    index = {tensor: _inside(folder, file, path) for tensor, file in listed.items()}
    files = sorted(set(index.values()))
    for file in files:
        if not os.path.isfile(file):
            raise LoadingError(f"{folder} lacks {file.name}, one of {len(files)} files that {path.name} lists")
    return files, index


def _inside(folder: Path, name: Any, source: Path) -> Path:
    """A file of the folder, named by one of its files, which is not trusted to stay inside."""
    parts = (*PurePosixPath(str(name)).parts, *PureWindowsPath(str(name)).parts)
    absolute = PurePosixPath(str(name)).is_absolute() or PureWindowsPath(str(name)).drive
    if not isinstance(name, str) or absolute or ".." in parts or not name.endswith((".safetensors", ".index.json")):
        raise UnsafeCheckpointError(f"{source} names the weights file {name!r}, which is no safetensors in its folder")
    return folder / name


def _no_weights(folder: Path) -> LoadingError:
    pickles = names_of_pickles(folder)
    if pickles:
        return UnsafeCheckpointError(
            f"{folder} has only pickled weights ({', '.join(pickles[:3])}), which can execute code and are never "
            f"loaded: get the checkpoint as safetensors ({WEIGHTS})"
        )
    return LoadingError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX} is there (pickles never count)")


def _numbers(checkpoint: Checkpoint, tensors: Mapping[str, tuple[str, list[int]]]) -> int | None:
    shapes = {name: shape for name, (_, shape) in tensors.items()}
    if checkpoint.quantization is None:
        return sum(map(math.prod, shapes.values()))
    described = checkpoint.config["quantization_config"]
    if checkpoint.quantization in gptq.METHODS:
        return gptq.check_packed(checkpoint.folder, checkpoint.weights, described, tensors)
    if checkpoint.quantization != COMPRESSED:
        return None
    groups = _mapping(described.get("config_groups")).values()
    bits = [_mapping(_mapping(group).get("weights")).get("num_bits") for group in groups]
    packed = 32 // bits[0] if bits and bits[0] in (2, 4, 8) else 1  # numbers to an int32
    each = {".weight": 1, ".bias": 1, ".weight_packed": packed}  # and scales and zeros, which do not stay
    return sum(math.prod(shape) * each.get(name[name.rfind(".") :], 0) for name, shape in shapes.items())


def _mapping(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, Mapping) else {}


def names_of_pickles(folder: Path) -> list[str]:
    """The pickled files of a folder, but for what trainers leave, which never held weights."""
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(PICKLES) and p.name != "training_args.bin")


def _embedding_rows(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> int | None:
    text = config.get("text_config")
    declared = config.get("vocab_size", text.get("vocab_size") if isinstance(text, Mapping) else None)
    found = [shape[0] for name, shape in shapes.items() if name.endswith(_EMBEDDINGS) and len(shape) == 2]
    if not found:
        return declared if isinstance(declared, int) else None
    if isinstance(declared, int) and declared > min(found):
        raise LoadingError(
            f"{folder / CONFIG} declares a vocabulary of {declared} tokens, and the weights hold embeddings for "
            f"{min(found)}: the two do not belong together"
        )
    return min(found)
