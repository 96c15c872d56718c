"""GGUF files, llama.cpp's format, through transformers' reader; quantised blocks are unpacked as they are read."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoadingError, MissingDependencyError
from .checks import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_BEGINS = ("llama-bpe", "llama3", "llama-v3")
"""Vocabularies whose files may leave out that a text begins with a token of its own; llama.cpp knows them by name."""


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, by its name."""
    return path.suffix == ".gguf" and path.is_file()


def check_gguf(path: Path) -> Checkpoint:
    """Examine a GGUF file: its metadata, and that every tensor lies inside of it.

    Raises MissingDependencyError without the package gguf, LoadingError for a damaged or truncated file.
    """
    if (path.parent / "adapter_config.json").is_file():
        # With peft installed transformers would load the adapter unasked, from files that were not checked.
        raise LoadingError(f"{path.parent} holds an adapter (adapter_config.json): move the GGUF file elsewhere")
    reader = _read(path)
    kinds = [tensor.tensor_type.name for tensor in reader.tensors]
    if not kinds:
        raise LoadingError(f"{path} holds no tensors: is it a vocabulary only?")
    common = max(set(kinds), key=kinds.count)
    rows = [int(tensor.shape[-1]) for tensor in reader.tensors if tensor.name == "token_embd.weight"]
    metadata = {name: field.contents() for name, field in reader.fields.items() if _is_small(field)}
    numbers = sum(int(tensor.n_elements) for tensor in reader.tensors)
    return Checkpoint(path, metadata, (path,), _DTYPES.get(common), rows[0] if rows else None, numbers)


def load_gguf_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a GGUF file holds; None when it holds none.

    transformers adds tokens that the file has not, beyond the end of the embedding: those are taken out again.
    """
    path, metadata = checkpoint.folder, checkpoint.config
    if "tokenizer.ggml.model" not in metadata:
        return None
    from tokenizers import Tokenizer, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    made: Any = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, trust_remote_code=False, local_files_only=True
    )
    state = json.loads(made.backend_tokenizer.to_str())
    rows = checkpoint.embedding_rows
    state["added_tokens"] = [token for token in state["added_tokens"] if rows is None or token["id"] < rows]
    backend = Tokenizer.from_str(json.dumps(state))
    begin = made.bos_token
    if begin and "tokenizer.ggml.add_bos_token" not in metadata and metadata.get("tokenizer.ggml.pre") in _BEGINS:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, made.bos_token_id)]
        )
    known = backend.get_vocab()
    special = {f"{name}_token": getattr(made, f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    wrap: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerBase = wrap(
        tokenizer_object=backend,
        **{name: token for name, token in special.items() if token in known},
        chat_template=made.chat_template,
        clean_up_tokenization_spaces=False,
    )
    return wrapped


def gguf_options(path: Path) -> dict[str, Any]:
    """Keyword arguments for ``from_pretrained``. Left to itself it would fetch native code from the hub, which computes
    on quantised blocks."""
    from transformers import GgufConfig

    configure: Any = GgufConfig
    return {"gguf_file": path.name, "quantization_config": configure(dequantize=True)}


@contextlib.contextmanager
def quiet_bar() -> Iterator[None]:
    """transformers' bar of unpacking, on a terminal only."""
    module: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    bar = module.tqdm
    module.tqdm = functools.partial(bar, disable=None)
    try:
        yield
    finally:
        module.tqdm = bar


def _read(path: Path) -> Any:
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError("a GGUF file needs the package gguf: pip install 'llama-infer[gguf]'")
    from gguf import GGUFReader

    try:
        return GGUFReader(str(path))
    except Exception as error:  # it reads what the file says it holds, and stumbles over what is not there
        raise LoadingError(f"{path} is damaged, truncated or no GGUF file: download it again") from error


def _is_small(field: Any) -> bool:
    """No array: vocabularies are long."""
    from gguf import GGUFValueType

    return bool(field.types) and field.types[0] != GGUFValueType.ARRAY
