"""Checkpoints of GPTQ and AWQ: numbers packed in int32, unpacked to ordinary weights while transformers reads them.

A weight is (number - zero) * scale; groups of inputs share a zero and a scale. A layer [out, in] is held as:

- GPTQ (Frantar et al., 2022, arXiv 2210.17323; the layout is AutoGPTQ's): ``qweight`` [in * bits / 32, out], ``qzeros``
  [groups, out * bits / 32], ``scales`` [groups, out], ``g_idx`` [in], the group of each input. Numbers follow each
  other from the lowest bit on, 3 bits across words. The format "gptq" holds every zero less 1, "gptq_v2" does not.
- AWQ (Lin et al., 2023, arXiv 2306.00978; AutoAWQ's "gemm"): ``qweight`` [in, out / 8], ``qzeros`` [groups, out / 8],
  ``scales`` [groups, out], always 4 bits, in which outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight follow each other.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import LoadingError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

METHODS = ("gptq", "awq")
PACKED = ("qweight", "qzeros", "scales", "g_idx")
_DTYPES = {"qweight": ("I32",), "qzeros": ("I32",), "scales": ("F16", "BF16", "F32"), "g_idx": ("I32", "I64")}
_FORMATS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
_BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
_READER = "llama_infer_integers"
"""What transformers calls our reader."""
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in an AWQ word each of eight outputs lies."""
_BLOCK = 1 << 22
"""Weights that are unpacked at a time."""


def check_packed(
    folder: Path, files: Iterable[Path], described: Mapping[str, Any], tensors: Mapping[str, tuple[str, list[int]]]
) -> int:
    """How many weights a checkpoint's tensors stand for, from their dtypes and shapes.

    Raises UnsupportedError for an unknown format or number of bits, LoadingError for tensors that do not fit.
    """
    method = str(described["quant_method"])
    form, bits = _format(described), described.get("bits")
    if form not in _FORMATS[method]:
        known = ", ".join(_FORMATS[method])
        raise UnsupportedError(f"{folder} is quantised by {method} in the format {form!r}; known: {known}")
    if bits not in _BITS[method]:
        known = ", ".join(map(str, _BITS[method]))
        raise UnsupportedError(f"{folder} is quantised by {method} in {bits!r} bits; known: {known}")
    numbers = sum(math.prod(shape) for name, (_, shape) in tensors.items() if name.endswith((".weight", ".bias")))
    layers = {name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] in PACKED[:3]}
    numbers += sum(_size(described, layer, tensors) for layer in layers)
    _check_groups(files, {f"{layer}.g_idx": tensors[f"{layer}.scales"][1][0] for layer in layers})
    return numbers


def unpack(held: Mapping[str, Tensor], described: Mapping[str, Any], dtype: Any) -> Tensor:
    """[out, in] in that dtype from a layer's packed tensors; computed in float32."""
    import torch

    gptq = described["quant_method"] == "gptq"
    words, scales = held["qweight"].t(), held["scales"].float().t()
    bits = 32 * held["qzeros"].shape[1] // len(scales)
    zeros = _stream(held["qzeros"], bits).t() if gptq else _interleaved(held["qzeros"].t())
    if gptq and _format(described) == "gptq":
        zeros = (zeros + 1) & ((1 << bits) - 1)
    inputs = words.shape[1] * 32 // bits if gptq else words.shape[1]
    groups = scales.shape[1]
    in_order = torch.arange(inputs, device=words.device) // -(-inputs // groups)
    group = held.get("g_idx", in_order).long()
    if not inputs % groups and torch.equal(group, in_order):  # the usual case, in which nothing has to be gathered
        group = torch.arange(groups, device=words.device)
    weight = torch.empty(len(scales), inputs, dtype=dtype, device=words.device)
    step = max(1, _BLOCK // inputs // 8) * 8
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        some = _stream(words[rows], bits) if gptq else _interleaved(words[first // 8 : (first + step) // 8])
        whole = some.float().unflatten(1, (len(group), -1))
        whole.sub_(zeros[rows, group].float().unsqueeze(2)).mul_(scales[rows, group].unsqueeze(2))
        weight[rows] = whole.flatten(1)
    return weight


def zero_biases(files: Iterable[Path]) -> set[str]:
    """Names of biases that are all zero: early versions of AutoGPTQ wrote one for every layer of any model."""
    from safetensors import safe_open

    found = set()
    for path in files:
        with safe_open(path, framework="pt") as held:
            found |= {name for name in held.keys() if name.endswith(".bias") and not held.get_tensor(name).any()}
    return found


@functools.cache
def reader() -> str:
    """The name under which transformers finds the quantizer that unpacks; what it is given is the checkpoint's own
    ``quantization_config``, as ``described``."""
    auto: Any = importlib.import_module("transformers.quantizers.auto")
    base: Any = importlib.import_module("transformers.quantizers.base").HfQuantizer
    loading: Any = importlib.import_module("transformers.core_model_loading")
    mixin: Any = importlib.import_module("transformers.utils.quantization_config").QuantizationConfigMixin

    @auto.register_quantization_config(_READER)
    class Config(mixin):  # type: ignore[misc]
        """Says that nothing stays quantised."""

        def __init__(self, described: Mapping[str, Any], **_: Any) -> None:
            self.quant_method, self.described, self.dequantize = _READER, described, True

    class Keep(loading.ConversionOps):  # type: ignore[misc]
        """What saving does: weights stay unpacked."""

        def convert(self, input_dict: Mapping[str, Any], **_: Any) -> Any:
            return input_dict

    class Unpack(loading.ConversionOps):  # type: ignore[misc]
        """One parameter out of what the checkpoint holds of it; of many layers where experts become one parameter."""

        reverse_op = Keep()

        def __init__(self, hf_quantizer: Any) -> None:
            self.hf_quantizer = hf_quantizer

        def convert(self, input_dict: Mapping[str, Any], *, full_layer_name: str, model: Any, **_: Any) -> Any:
            dtype, described = (
                model.get_parameter(full_layer_name).dtype,
                self.hf_quantizer.quantization_config.described,
            )
            whole = _weights(input_dict, described, dtype)
            return {full_layer_name: whole["weight"][0]} if "weight" in whole else whole

    @auto.register_quantizer(_READER)
    class Quantizer(base):  # type: ignore[misc]
        requires_calibration, is_trainable = True, False
        serialized_names: ClassVar = {"weight": ["weight", *PACKED]}

        def is_serializable(self) -> bool:
            return False

        def get_weight_conversions(self) -> list[Any]:
            return [loading.WeightConverter(["weight", *PACKED], "weight", [Unpack(self)])]

        def get_load_operations(self) -> dict[str, Any]:
            return {"dequantize": Unpack}

    return _READER


def _weights(held: Mapping[str, Any], described: Mapping[str, Any], dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """The weights by name, of whatever layers transformers gathered the tensors."""
    layers: dict[str, dict[str, list[Tensor]]] = defaultdict(dict)
    for name, found in held.items():
        layer, dot, kind = name.rpartition(".")
        layers[layer + dot][kind] = found if isinstance(found, list) else [found]
    whole = {}
    for layer, kinds in layers.items():
        each = [dict(zip(kinds, tensors, strict=True)) for tensors in zip(*kinds.values(), strict=True)]
        whole[f"{layer}weight"] = [
            one["weight"].to(dtype) if "weight" in one else unpack(one, described, dtype) for one in each
        ]
    return whole


def _format(described: Mapping[str, Any]) -> str:
    """GPTQ's is called checkpoint_format or format, AWQ's version or format."""
    awq = described["quant_method"] == "awq"
    if awq and described.get("backend") == "llm-awq":
        return "llm-awq"
    found = described.get("version" if awq else "checkpoint_format") or described.get("format")
    return str(found or ("gemm" if awq else "gptq")).lower()


def _size(described: Mapping[str, Any], layer: str, tensors: Mapping[str, tuple[str, list[int]]]) -> int:
    """How many weights a layer has."""
    method = str(described["quant_method"])
    found = {kind: tensors[f"{layer}.{kind}"] for kind in ("weight", *PACKED) if f"{layer}.{kind}" in tensors}
    shapes = {kind: shape for kind, (dtype, shape) in found.items() if dtype in _DTYPES.get(kind, ())}
    words, zeros, scales = (shapes.get(kind, []) for kind in PACKED[:3])
    if shapes.keys() == found.keys() and len(words) == len(zeros) == len(scales) == 2 and words[0] and all(scales):
        bits, odd = divmod(32 * zeros[1], scales[1])
        if not odd and bits in _BITS[method] and not words[0] * 32 % bits:
            inputs, outputs = (words[0] * 32 // bits, words[1]) if method == "gptq" else (words[0], words[1] * 8)
            index = shapes.get("g_idx")
            in_order = not described.get("desc_act") and not inputs % scales[0]
            grouped = index == [inputs] if index is not None else in_order
            if grouped and outputs == scales[1] and zeros[0] == scales[0]:
                return inputs * outputs
    held = ", ".join(f"{kind} {shape} {dtype}" for kind, (dtype, shape) in found.items())
    raise LoadingError(f"{layer} is no layer of {method}: it has {held}: download the checkpoint again")


def _check_groups(files: Iterable[Path], counts: Mapping[str, int]) -> None:
    """Refuses an index of inputs, by name, that names a group beyond so many."""
    from safetensors import safe_open

    for path in files:
        with safe_open(path, framework="np") as held:
            for name in counts.keys() & set(held.keys()):
                index = held.get_tensor(name)
                if index.min() < 0 or index.max() >= counts[name]:
                    raise LoadingError(
                        f"{name} in {path} names groups from {index.min()} to {index.max()}, and the layer has "
                        f"{counts[name]}: download the checkpoint again"
                    )


def _stream(words: Tensor, bits: int) -> Tensor:
    """int32 [n, words] -> uint8 [n, numbers], of so many bits each, from the lowest bit on."""
    import torch

    count = 32 // math.gcd(32, bits)  # numbers that fill whole words
    words = words.unflatten(-1, (-1, count * bits // 32))
    numbers = torch.empty(*words.shape[:-1], count, dtype=torch.uint8, device=words.device)
    for i in range(count):
        word, bit = divmod(i * bits, 32)
        found = words[..., word] >> bit
        if bit + bits > 32:  # the rest is in the next word
            found = (found & ((1 << (32 - bit)) - 1)) | (words[..., word + 1] << (32 - bit))
        numbers[..., i] = found & ((1 << bits) - 1)
    return numbers.flatten(-2)


def _interleaved(words: Tensor) -> Tensor:
    """int32 [n / 8, m] -> uint8 [n, m]."""
    import torch

    shifts = torch.tensor(_PLACES, dtype=torch.int32, device=words.device).mul_(4).view(8, 1)
    return ((words.unsqueeze(1) >> shifts) & 15).to(torch.uint8).flatten(0, 1)
