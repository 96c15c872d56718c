"""A quantised model on disk: its own tensors as safetensors, and in config.json how to read them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import LlamaInferError, LoadingError, UnsupportedError
from ..registry import resolve
from .checks import WEIGHTS, Checkpoint, read_json
from .fused import fuse
from .mapped import release
from .packed import PackedLinear
from .quantised import Format, QuantisedEmbedding, QuantisedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "llama_infer"
"""What config.json calls the quantization of a model that :func:`save_quantised` wrote."""
_VERSION = 3
"""Of what the policies write; the first had one scale for every output in 8 bits, and two numbers a group in 4;
the second one scale for 128 inputs."""


def save_quantised(model: PreTrainedModel, folder: Path) -> None:
    """Write a model that a policy of ours quantised into an empty folder; loading it gives the same numbers.

    Only this library reads it. Raises UnsupportedError for a model without such layers.
    """
    from safetensors.torch import save_file

    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}
    layers = {name: layer for name, layer in layers.items() if not _inside(name, layers)}
    if not layers:
        raise UnsupportedError(f"{type(model).__name__} is not quantised by a policy of ours: use its save_pretrained")
    (form,) = {repr(layer.form): layer.form for layer in layers.values()}.values()
    tied = any(layer.tied for layer in layers.values())
    save_file(_tensors(model, layers), str(folder / WEIGHTS), metadata={"format": "pt"})
    config: Any = model.config
    described: dict[str, Any] = {"quant_method": METHOD, "version": _VERSION, "policy": form.name, "tied": tied}
    described["settings"] = dict(form.settings())
    before = getattr(config, "quantization_config", None)
    config.quantization_config = described
    try:
        config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
    finally:
        if before is None:
            del config.quantization_config
        else:
            config.quantization_config = before


def load_saved(checkpoint: Checkpoint, dtype: Any, attention: str | None, device: torch.device) -> PreTrainedModel:
    """A model that :func:`save_quantised` wrote. Raises LoadingError for one that is damaged."""
    if device.type != "cpu":
        raise UnsupportedError(f"{checkpoint.folder} was quantised for the CPU, not for {device}")
    described = checkpoint.config["quantization_config"]
    if described.get("version") != _VERSION:
        raise LoadingError(
            f"{checkpoint.folder} was quantised by another version of this library, in a format that this one does not "
            "read: llama-infer convert the original again"
        )
    try:
        form = type(resolve("quantization", str(described["policy"])))(**described["settings"])
    except (KeyError, TypeError) as error:
        raise LoadingError(f"{checkpoint.folder / 'config.json'}: quantization_config is damaged: {error}") from error
    form.check(device, dtype)
    model = _empty(checkpoint, dtype, attention)
    try:
        _fill(model, form, _read(checkpoint), bool(described.get("tied")))
    except LlamaInferError:
        raise
    except Exception as error:  # whatever shapes that do not fit may lead to
        raise LoadingError(f"the weights in {checkpoint.folder} do not fit its config.json: {error}") from error
    model.eval().requires_grad_(False)
    return fuse(model)


def _inside(name: str, layers: Mapping[str, Any]) -> bool:
    return any(name.startswith(other + ".") for other in layers)


def _tensors(model: PreTrainedModel, layers: Mapping[str, QuantisedLinear]) -> dict[str, Tensor]:
    """By name: the tensors of quantised layers, and whatever else the model keeps, once each."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        prefix = name + "." if name else ""
        if name in layers:
            found.update({prefix + key: tensor.contiguous() for key, tensor in layers[name].tensors().items()})
        if isinstance(module, (QuantisedEmbedding, PackedLinear)) or _inside(name, layers):
            continue
        persistent = {
            n: b for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set
        }
        for key, tensor in {**dict(module.named_parameters(recurse=False)), **persistent}.items():
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                found[prefix + key] = tensor.detach().contiguous()
    return found


def _empty(checkpoint: Checkpoint, dtype: Any, attention: str | None) -> PreTrainedModel:
    """The model without weights: buffers that are computed, such as a rope's frequencies, are there."""
    from accelerate.big_modeling import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    auto: Any = AutoModelForCausalLM
    config: Any = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False, local_files_only=True)
    del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = auto.from_config(config, dtype=dtype, attn_implementation=attention)
    path = checkpoint.folder / "generation_config.json"
    if path.is_file():
        configure: Any = GenerationConfig
        model.generation_config = configure.from_dict(read_json(path))
    return model


def _read(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """Mapped tensors by module, then by their own name."""
    from safetensors.torch import load_file

    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for path in checkpoint.weights:
        for name, tensor in load_file(str(path)).items():
            module, _, own = name.rpartition(".")
            found[module][own] = tensor
    return found


def _fill(model: PreTrainedModel, form: Format, held: Mapping[str, Mapping[str, Tensor]], tied: bool) -> None:
    dtype = model.dtype
    head = model.get_output_embeddings()
    for name, tensors in held.items():
        module = model.get_submodule(name)
        if type(module) is nn.Linear and "weight" not in tensors:
            own = {key: tensor for key, tensor in tensors.items() if key != "bias"}
            layer = form.layer(own, tensors.get("bias"), dtype)
            if (layer.out_features, layer.in_features) != tuple(module.weight.shape):
                raise LoadingError(f"{name} is {layer.out_features} x {layer.in_features} in the file")
            if tied and module is head:
                model.set_input_embeddings(QuantisedEmbedding(form, own, dtype))
                layer.tied = True
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
            for tensor in own.values():
                release(tensor)
        else:
            _set(module, name, tensors)
    if not tied:
        model.tie_weights()
    empty = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if empty:
        raise LoadingError(f"{len(empty)} tensors are missing ({', '.join(empty[:3])})")


def _set(module: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        expected = getattr(module, key)
        if expected.shape != tensor.shape:
            raise LoadingError(f"{name}.{key} is {tuple(tensor.shape)} in the file, not {tuple(expected.shape)}")
        if key in dict(module.named_buffers(recurse=False)):
            setattr(module, key, tensor)
        else:
            setattr(module, key, nn.Parameter(tensor.to(expected.dtype), requires_grad=False))
