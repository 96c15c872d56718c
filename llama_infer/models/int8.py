"""8-bit weights: by a kernel of ours, or torch's private operators, which only this file names."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UnsupportedError
from .integers import IntegerLinear
from .native.integer import PART, SPAN, kernel
from .quantised import QuantisedLinear, Tensors, quantise_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MIDDLE = 128
"""The byte that stands for an activation of zero: torch multiplies unsigned activations with signed weights."""
_TINY = torch.finfo(torch.bfloat16).tiny
_AT_A_TIME = 32
"""Rows of which torch's sums stay in the processor's cache."""


class Int8:
    """``"int8"``: 8-bit weights with a scale for every 256 inputs, the head and a tied embedding included.

    Args:
        activations: whether activations are quantised too, on the fly, each token's with scales of their own. The
            products are then exact in integers, so a token's result does not depend on its neighbours, and the
            processor's 8-bit instructions do the work: about twice as fast as bfloat16 for any number of rows. Without,
            the weights alone are rounded, with one scale for each output, and more than a few rows are slow.
        keep: names of layers that stay whole, such as ``("lm_head",)``; a name is the end of a module's name.
    """

    name = "int8"

    def __init__(self, activations: bool = True, keep: Sequence[str] = ()) -> None:
        self.activations = bool(activations)
        self.keep = tuple(keep)

    def check(self, device: torch.device, dtype: torch.dtype | str) -> None:
        """Raises UnsupportedError off the CPU, for float16, and where the 8-bit instructions are missing."""
        if device.type != "cpu":
            raise UnsupportedError(f"quantization='int8' is for the CPU, not {device}: use 'bnb-int8' there")
        if dtype not in (torch.bfloat16, torch.float32):
            raise UnsupportedError(f"quantization='int8' works in bfloat16 and float32, not {dtype}")
        if self.activations and not _exact_products():
            raise UnsupportedError(
                "quantization='int8' needs an x86 processor with VNNI for 8-bit activations; "
                "llama_infer.models.int8.Int8(activations=False) quantises the weights alone"
            )

    def convert(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with its linear layers quantised, one after the other."""
        return quantise_layers(model, self)

    def fits(self, weight: Tensor) -> bool:
        """Any shape does."""
        return weight.dtype.is_floating_point and weight.device.type == "cpu"

    def quantise(self, weight: Tensor) -> Tensors:
        """float32 [n, in] -> int8 [n, in], whose furthest from 0 is -128, and bfloat16 scales [n, spans]."""
        width = weight.shape[1]
        parts = in_spans(weight, SPAN if self.activations else width)
        scale = _steps(parts, _TINY).bfloat16()
        numbers = (parts / scale.unsqueeze(-1).float()).round_().clamp_(-128, 127)
        return {"int8": numbers.to(torch.int8).flatten(1)[:, :width], "scale": scale}

    def dequantise(self, tensors: Tensors) -> Tensor:
        """float32 [n, in]."""
        numbers, scale = tensors["int8"], tensors["scale"]
        width = numbers.shape[1]
        parts = in_spans(numbers.float(), SPAN if self.activations else width)
        weight: Tensor = parts.mul_(scale.unsqueeze(-1).float()).flatten(1)[:, :width]
        return weight

    def layer(self, tensors: Tensors, bias: Tensor | None, dtype: torch.dtype) -> QuantisedLinear:
        """A layer that computes in integers, or in ``dtype`` when activations stay whole."""
        if not self.activations:
            return Int8WeightLinear(self, tensors, bias, dtype)
        return (Int8TorchLinear if kernel("int8", dtype) is None else Int8Linear)(self, tensors, bias, dtype)

    def settings(self) -> Mapping[str, Any]:
        """The arguments that make this policy again."""
        return {"activations": self.activations, "keep": list(self.keep)}

    def __repr__(self) -> str:
        return f"Int8(activations={self.activations}" + (f", keep={self.keep})" if self.keep else ")")


class Int8Linear(IntegerLinear):
    """8-bit weights times 8-bit activations, in a kernel of ours."""

    def __init__(self, form: Int8, tensors: Tensors, bias: Tensor | None, dtype: torch.dtype) -> None:
        numbers = tensors["int8"]
        held = {"int8": numbers, "scale": tensors["scale"]}
        super().__init__(form, (len(numbers), numbers.shape[1]), held, ((torch.int8, PART, 4),), "int8", bias, dtype)


class Int8TorchLinear(QuantisedLinear):
    """The same by torch's operators, which know one scale a row: a product for every 256 inputs."""

    def __init__(self, form: Int8, tensors: Tensors, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(form, tensors["int8"].shape, bias, dtype)
        prepack = torch.ops.onednn.qlinear_prepack
        self._packed = [prepack(part.contiguous(), None) for part in tensors["int8"].split(SPAN, 1)]
        self._scale = tensors["scale"].float().t().contiguous()
        self._zeros = torch.zeros(self.out_features, dtype=torch.int64)

    def tensors(self) -> Tensors:
        """The weights, out of the processor's layout, and their scales."""
        numbers = torch.cat([part.to_dense().t() for part in self._packed], 1)
        return {"int8": numbers, "scale": self._scale.t().bfloat16()}

    def forward(self, x: Tensor) -> Tensor:
        """float [..., in] -> [..., out]."""
        y = torch.cat([self._rows(some) for some in x.reshape(-1, self.in_features).float().split(_AT_A_TIME)])
        y = y if self.bias is None else y.add_(self.bias)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _rows(self, x: Tensor) -> Tensor:
        parts = in_spans(x, SPAN)
        step = _steps(parts, torch.finfo(torch.float32).tiny)
        rounded = (parts / step.unsqueeze(-1)).round_().clamp_max_(127).add_(_MIDDLE)
        rounded = rounded.to(torch.uint8).flatten(1)[:, : self.in_features]
        y = x.new_zeros(len(x), self.out_features)
        for i, part in enumerate(rounded.split(SPAN, 1)):
            product = torch.ops.onednn.qlinear_pointwise(
                part.contiguous(), 1.0, _MIDDLE, self._packed[i], self._scale[i], self._zeros,
                None, 1.0, 0, torch.float32, "none", [], "",
            )  # fmt: skip
            y.addcmul_(product, step[:, i : i + 1])
        return y


class Int8WeightLinear(QuantisedLinear):
    """8-bit weights times whole activations."""

    def __init__(self, form: Int8, tensors: Tensors, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(form, tensors["int8"].shape, bias, dtype)
        self._int8, self._scale = tensors["int8"], tensors["scale"]
        if self._int8.data_ptr() % 64:  # a mapped file's tensors begin anywhere, and the operator's do not
            self._int8 = self._int8.clone()
        self._rounded = self._scale[:, 0].to(dtype)

    def tensors(self) -> Tensors:
        """The weights and their scales."""
        return {"int8": self._int8, "scale": self._scale}

    def forward(self, x: Tensor) -> Tensor:
        """float [..., in] -> [..., out]."""
        rows = x.reshape(-1, self.in_features).contiguous()
        y = torch._weight_int8pack_mm(rows, self._int8, self._rounded).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def _steps(spans: Tensor, least: float) -> Tensor:
    """[n, spans, span] -> [n, spans]: what makes -128 of the number furthest from 0, below 0 where that is above."""
    above, below = spans.amax(-1), spans.amin(-1)
    step = torch.where(above >= -below, above, below) / -128
    return torch.where(step.abs() < least, least, step)


def in_spans(rows: Tensor, span: int) -> Tensor:
    """[n, in] -> [n, spans, span], with zeros behind the end."""
    spans: Tensor = F.pad(rows, (0, -rows.shape[1] % span)).unflatten(1, (-1, span))
    return spans


def _exact_products() -> bool:
    """Whether four 8-bit products add up in 32 bits: older processors add two of them in 16, which may overflow."""
    known = getattr(torch.cpu, "_is_vnni_supported", None)
    return platform.machine().lower() in ("x86_64", "amd64") and known is not None and bool(known())
