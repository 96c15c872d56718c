"""LoRA adapters by peft, from safetensors only: merged into the weights, or kept live beside them."""

from __future__ import annotations

import importlib.util
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LlamaInferError, LoadingError, MissingDependencyError, UnsafeCheckpointError, UnsupportedError
from .checks import names_of_pickles, read_header, read_json
from .quantization import prepare_bitsandbytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_EMBEDDINGS = re.compile(r"(embed_tokens|lm_head)(\.base_layer)?\.weight$")


@dataclass(frozen=True)
class Adapter:
    """A folder that passed the checks.

    Attributes:
        folder: where it is.
        tensors: the names that its weights are saved under.
        embedding_rows: how many token ids its own embedding has; None when it brings none.
    """

    folder: Path
    tensors: frozenset[str]
    embedding_rows: int | None


def check_adapter_config(folder: Path) -> None:
    """Refuse what is no LoRA adapter, or whose configuration names code."""
    if not (folder / CONFIG).is_file():
        raise LoadingError(f"{folder} has no {CONFIG}: it is no adapter of peft")
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(f"{folder} is an adapter of type {config.get('peft_type')!r}: only LORA is supported")
    for name in ("megatron_config", "auto_map"):  # peft would import the module that is named beside the first
        if config.get(name):
            raise UnsafeCheckpointError(f"{folder / CONFIG} sets {name!r}, which names code to run: remove that line")


def check_adapter(folder: Path) -> Adapter:
    """Examine a folder that is to be loaded as an adapter.

    Raises MissingDependencyError without peft, UnsafeCheckpointError for pickled weights or a configuration that names
    code, UnsupportedError for an adapter that is not LoRA, LoadingError for what is missing or damaged.
    """
    check_adapter_config(folder)
    if not (folder / WEIGHTS).is_file():
        pickles = names_of_pickles(folder)
        if pickles:
            raise UnsafeCheckpointError(
                f"{folder} has only pickled weights ({pickles[0]}), which can execute code and are never loaded: "
                f"save the adapter as safetensors ({WEIGHTS})"
            )
        raise LoadingError(f"{folder} has no weights: {WEIGHTS} is not there")
    if importlib.util.find_spec("peft") is None:
        raise MissingDependencyError("an adapter needs peft: pip install 'llama-infer[peft]'")
    tensors = read_header(folder / WEIGHTS)
    rows = {shape[0] for name, (_, shape) in tensors.items() if _EMBEDDINGS.search(name)}
    if len(rows) > 1:
        raise LoadingError(f"{folder / WEIGHTS} has embeddings and a head of different sizes: {sorted(rows)} tokens")
    return Adapter(folder, frozenset(tensors), next(iter(rows), None))


def apply_adapter(model: PreTrainedModel, adapter: Adapter, merge: bool) -> PreTrainedModel:
    """The model with an adapter merged into its weights, or live in its layers; embeddings grow to the adapter's.

    A model whose embedding and head were one, and to which the adapter gives two, is no longer tied. Raises
    LoadingError when the adapter belongs to another model.
    """
    if importlib.util.find_spec("bitsandbytes") is not None:
        prepare_bitsandbytes()  # peft imports it
    import peft

    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise UnsupportedError("an adapter cannot be added to weights on the disk: merge it with llama-infer convert")
    rows, embedding = adapter.embedding_rows, model.get_input_embeddings().weight
    if rows is not None and rows != len(embedding):  # type: ignore[arg-type]
        model.resize_token_embeddings(rows, mean_resizing=False)
    load: Any = peft.PeftModel.from_pretrained
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters is checked below
            wrapped = load(model, adapter.folder, torch_device=str(model.device))
            expected = set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
            merged = wrapped.merge_and_unload() if merge else model
    except LlamaInferError:
        raise
    except Exception as error:
        raise _misfit(adapter, str(error).strip().splitlines()[0] if str(error) else type(error).__name__) from error
    odd = expected ^ {name for name in adapter.tensors if name in expected or not _EMBEDDINGS.search(name)}
    if odd:
        raise _misfit(adapter, f"{len(odd)} tensors do not match ({sorted(odd)[0]})")
    _untie(merged)
    return merged.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _misfit(adapter: Adapter, reason: str) -> LoadingError:
    return LoadingError(f"the adapter in {adapter.folder} does not fit the model: {reason}")


def _untie(model: PreTrainedModel) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and model.config.tie_word_embeddings and head.weight is not embedding.weight:
        model.config.tie_word_embeddings = False
