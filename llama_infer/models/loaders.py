"""The loader: a folder, a hub id or the built-in demo in, a model that is ready to run out.

Everything is first brought into one folder, then checked without loading (``checks.py``), and only then handed to
transformers, which reads safetensors only and never runs code of a checkpoint unless that was asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import (
    LoadingError,
    MissingDependencyError,
    ParameterError,
    UnsupportedError,
    release,
    suggest,
)
from ..parts import LoadedModel, Source
from ..types import Value
from .adapters import Adapter, check_adapter, check_adapter_config
from .checks import (
    Checkpoint,
    check_checkpoint,
    check_config,
    check_tokenizer_config,
    check_vocabulary,
    has_tokenizer,
    read_json,
)
from .devices import default_dtype, dtype_name, pick_device
from .gguf import check_gguf, is_gguf, load_gguf_tokenizer
from .locate import locate
from .memory import check_fits
from .quantization import need_reader
from .weights import first_line, load_model, pick_policy, quiet, uncollected

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
END_TOKENS = ("<|eot_id|>", "<|end_of_text|>")
UNBOUNDED = 1 << 30
"""The context length of a model that declares none."""


class AutoLoader:
    """``"auto"``: any causal language model that transformers knows, from safetensors."""

    def __call__(self, source: Source) -> LoadedModel:
        """Load a checkpoint, its tokenizer and its generation config.

        The model comes in eval mode without gradients. ``dtype`` None is :func:`~.devices.default_dtype` of the device;
        a float16 checkpoint on the CPU becomes bfloat16 unless float16 is named. ``device`` None picks cuda, mps, cpu
        in that order. A folder without tokenizer gives ``tokenizer=None``: only token ids can be prompts then.

        Raises LoadingError (UnsafeCheckpointError when code would have to run), ParameterError, UnsupportedError or
        MissingDependencyError; all of them before the weights are read, where that is possible. What fails leaves
        nothing loaded behind.
        """
        try:
            with uncollected():
                return self._load(source)
        except BaseException as error:
            release(error)
            raise

    def _load(self, source: Source) -> LoadedModel:
        if source.device is not None and source.device_map is not None:
            raise UnsupportedError("device and device_map were both given: device_map places every part, leave device")
        name = dtype_name(source.dtype) if source.dtype is not None else None
        checkpoint = examine(source)
        if source.tp_plan is not None and checkpoint.quantization:
            raise UnsupportedError(
                f"{checkpoint.folder} is quantised ({checkpoint.quantization}), and tp_plan splits whole weights: "
                "leave it out, or make an ordinary checkpoint with llama-infer convert where that can unpack it"
            )
        adapter = _locate_adapter(source, checkpoint)
        device = pick_device(source.device)
        dtype, notes = _pick_dtype(name, checkpoint, device)
        attention = _pick_attention(source.attention, device, dtype)
        policy = pick_policy(source, checkpoint, dtype, device)
        generation = read_generation(checkpoint.folder)
        tokenizer = _tokenizer_of(source, checkpoint, adapter)
        if source.device_map is None and source.tp_plan is None:
            whole = source.quantization in (None, "none", "packed") or is_gguf(checkpoint.folder)  # unpacked before
            check_fits(checkpoint, dtype, device, whole)
        model = load_model(source, checkpoint, policy, dtype, attention, device, adapter)
        return LoadedModel(
            model=model,
            tokenizer=tokenizer,
            generation={name: value for name, value in generation.items() if name in _known_fields()},
            end_token_ids=end_token_ids(generation, model.config, tokenizer),
            context_length=context_length(model.config),
            device=_entry_device(model),
            attention=model.config._attn_implementation,
            source=source,
            notes=(*notes, *_offloaded(model)),
        )


def _offloaded(model: PreTrainedModel) -> tuple[str, ...]:
    count = sum(parameter.device.type == "meta" for parameter in model.parameters())
    return (f"{count} tensors stay on the disk or the CPU and are fetched in every step",) if count else ()


def examine(source: Source) -> Checkpoint:
    """The checkpoint that a source names, brought here and checked; nothing of it is loaded, nor is torch."""
    trust = bool(source.trust_remote_code)
    folder = _locate(source, source.model, source.revision, lambda found: check_config(found, trust))
    checkpoint = check_gguf(folder) if is_gguf(folder) else check_checkpoint(folder, trust)
    if source.quantization not in (None, "none") and checkpoint.quantization:
        raise UnsupportedError(
            f"{folder} is already quantised ({checkpoint.quantization}): leave out quantization={source.quantization!r}"
        )
    if checkpoint.quantization:
        need_reader(checkpoint.quantization)
    return checkpoint


def read_generation(folder: Path) -> dict[str, Value]:
    """The fields that a checkpoint's generation_config.json sets; {} without that file."""
    path = folder / "generation_config.json"
    found = read_json(path) if path.is_file() else {}
    return {name: value for name, value in found.items() if value is not None and not name.startswith("_")}


def end_token_ids(
    generation: Mapping[str, Value], config: Any, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int, ...]:
    """Every token that ends an answer, sorted: of the generation config (else the config), and of the tokenizer."""
    text = config.get_text_config()
    given = generation.get("eos_token_id", getattr(text, "eos_token_id", None))
    ids = set(given) if isinstance(given, (list, tuple)) else {given}
    if tokenizer is not None:
        ids.add(tokenizer.eos_token_id)
        special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        ids.update(special.get(token) for token in END_TOKENS)
    size = text.vocab_size
    return tuple(sorted(i for i in ids if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < size))


def context_length(config: Any) -> int:
    """How many tokens the positions of a model cover; :data:`UNBOUNDED` when its config does not say."""
    declared = getattr(config.get_text_config(), "max_position_embeddings", None)
    return declared if isinstance(declared, int) and declared > 0 else UNBOUNDED


def _pick_dtype(
    name: str | None, checkpoint: Checkpoint, device: torch.device
) -> tuple[torch.dtype | str, tuple[str, ...]]:
    """The dtype to load in ("auto" is left to transformers), and what the user should know of it."""
    import torch

    stored = checkpoint.dtype
    if name in (None, "auto") and stored == "float16" and device.type == "cpu":
        return torch.bfloat16, ("a float16 checkpoint runs in bfloat16 on the CPU; dtype='float16' keeps it",)
    if name == "auto":
        return (getattr(torch, stored) if stored and not checkpoint.quantization else "auto"), ()
    chosen = name or default_dtype(device)
    if name is None and stored in ("float32", "float64"):
        return getattr(torch, chosen), (f"a {stored} checkpoint runs in {chosen}; dtype={stored!r} keeps it",)
    return getattr(torch, chosen), ()


def _pick_attention(name: str | None, device: torch.device, dtype: torch.dtype | str) -> str | None:
    """The kernel that was asked for; None is sdpa, or eager for the few models that have no sdpa."""
    if name is not None and name not in ATTENTIONS:
        raise ParameterError(f"unknown attention {name!r}{suggest(name, ATTENTIONS)} Known: {', '.join(ATTENTIONS)}")
    if name == "flash_attention_2":
        if device.type != "cuda":
            raise UnsupportedError(f"attention='flash_attention_2' needs a cuda device, not {device}: use 'sdpa'")
        if importlib.util.find_spec("flash_attn") is None:
            raise MissingDependencyError(
                "attention='flash_attention_2' needs the package flash-attn: "
                "pip install flash-attn --no-build-isolation; or use attention='sdpa'"
            )
        if str(dtype) not in ("torch.bfloat16", "torch.float16", "auto"):
            raise UnsupportedError(
                f"attention='flash_attention_2' works in bfloat16 and float16, not {dtype}: use 'sdpa'"
            )
    return name


def _locate(
    source: Source, name: str, revision: str | None = None, check: Callable[[Path], object] | None = None
) -> Path:
    return locate(name, revision, bool(source.trust_remote_code), source.local_files_only, check)


def _locate_adapter(source: Source, checkpoint: Checkpoint) -> Adapter | None:
    if source.adapter is None:
        return None
    if source.merge_adapter and checkpoint.quantization and not checkpoint.unpacked:
        raise UnsupportedError(
            f"{checkpoint.folder} is quantised ({checkpoint.quantization}), nothing can be merged into its weights: "
            "merge_adapter=False keeps the adapter beside them"
        )
    return check_adapter(_locate(source, source.adapter, check=check_adapter_config))


def _tokenizer_of(source: Source, checkpoint: Checkpoint, adapter: Adapter | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was asked for, else the adapter's, else the checkpoint's."""
    own = adapter.folder if adapter and has_tokenizer(adapter.folder) else checkpoint.folder
    rows = adapter.embedding_rows if adapter and adapter.embedding_rows else checkpoint.embedding_rows
    if source.tokenizer is None and is_gguf(own):
        return load_gguf_tokenizer(checkpoint)
    return load_tokenizer(source, own, rows)


def load_tokenizer(source: Source, folder: Path, rows: int | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a source names, else that of a folder, if it has one; ``rows`` token ids have embeddings."""
    trust = bool(source.trust_remote_code)
    if source.tokenizer is not None:
        folder = _locate(source, source.tokenizer)
    check_tokenizer_config(folder, trust)
    if (folder / "config.json").is_file():  # transformers may read it to find the tokenizer's class
        check_config(folder, trust)
    if not has_tokenizer(folder):
        if source.tokenizer is None:
            return None
        raise LoadingError(f"{source.tokenizer!r} holds no tokenizer: a tokenizer.json or tokenizer.model is needed")
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust, local_files_only=True
            )
        ids = tokenizer.get_vocab()
    except Exception as error:
        raise LoadingError(f"the tokenizer in {folder} cannot be loaded: {first_line(error)}") from error
    check_vocabulary(folder, ids, rows)
    return tokenizer


def _entry_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go in: the device of the embedding, or of its computation when its weights are offloaded."""
    import torch

    embedding = model.get_input_embeddings()
    device = next(embedding.parameters()).device
    if device.type == "meta":
        device = torch.device(getattr(getattr(embedding, "_hf_hook", None), "execution_device", "cpu"))
    return device


def _known_fields() -> frozenset[str]:
    from transformers import GenerationConfig

    defaults: Any = GenerationConfig
    return frozenset(vars(defaults())) - {"transformers_version"}
