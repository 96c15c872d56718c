"""8-bit weights: the only file that names torch's private operators for them."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .quantised import QuantisedLinear, Tensors, quantise_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MIDDLE = 128
"""The byte that stands for an activation of zero: the processor multiplies unsigned activations with signed weights."""


class Int8:
    """``"int8"``: 8-bit weights with a scale for each output channel, the head and a tied embedding included.

    Args:
        activations: whether activations are quantised too, on the fly, each token with a scale of its own. The products
            are then exact in integers, so a token's result does not depend on its neighbours, and the processor's
            8-bit instructions do the work: about twice as fast as bfloat16 for any number of rows. Without, the weights
            alone are rounded: half the error, and slow for more than a few rows.
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
        """float32 [n, in] -> int8 [n, in], whose largest is 127, and float32 scales [n]."""
        scale = (weight.abs().amax(-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        return {"int8": (weight / scale[:, None]).round_().to(torch.int8), "scale": scale}

    def dequantise(self, tensors: Tensors) -> Tensor:
        """float32 [n, in]."""
        return tensors["int8"].float() * tensors["scale"][:, None]

    def layer(self, tensors: Tensors, bias: Tensor | None, dtype: torch.dtype) -> QuantisedLinear:
        """A layer that computes in integers, or in ``dtype`` when activations stay whole."""
        return (Int8Linear if self.activations else Int8WeightLinear)(self, tensors, bias, dtype)

    def settings(self) -> Mapping[str, Any]:
        """The arguments that make this policy again."""
        return {"activations": self.activations, "keep": list(self.keep)}

    def __repr__(self) -> str:
        return f"Int8(activations={self.activations}" + (f", keep={self.keep})" if self.keep else ")")


class Int8Linear(QuantisedLinear):
    """8-bit weights times activations that are quantised token by token."""

    def __init__(self, form: Int8, tensors: Tensors, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(form, tensors["int8"].shape, bias, dtype)
        self._packed = torch.ops.onednn.qlinear_prepack(tensors["int8"], None)
        self._scale = tensors["scale"].clone()
        self._zeros = torch.zeros(len(self._scale), dtype=torch.int64)

    def tensors(self) -> Tensors:
        """The weights, out of the processor's layout, and their scales."""
        return {"int8": self._packed.to_dense().t(), "scale": self._scale}

    def forward(self, x: Tensor) -> Tensor:
        """float [..., in] -> [..., out]."""
        largest = x.abs().amax(-1, keepdim=True).float()
        # Rounded to the dtype of x, so that the result is scaled in that dtype: mixed products are slow. 127 stays 127.
        step = (largest / 127).clamp_min_(torch.finfo(torch.float32).tiny).to(x.dtype)
        rounded = x.to(torch.float32, copy=True).div_(step.float()).round_().add_(_MIDDLE).to(torch.uint8)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            rounded, 1.0, _MIDDLE, self._packed, self._scale, self._zeros, None, 1.0, 0, x.dtype, "none", [], ""
        )
        y = y.mul_(step)
        return y if self.bias is None else y.add_(self.bias)


class Int8WeightLinear(QuantisedLinear):
    """8-bit weights times whole activations."""

    def __init__(self, form: Int8, tensors: Tensors, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(form, tensors["int8"].shape, bias, dtype)
        self._int8, self._scale = tensors["int8"], tensors["scale"]
        if self._int8.data_ptr() % 64:  # a mapped file's tensors begin anywhere, and the operator's do not
            self._int8 = self._int8.clone()
        self._rounded = self._scale.to(dtype)

    def tensors(self) -> Tensors:
        """The weights and their scales."""
        return {"int8": self._int8, "scale": self._scale}

    def forward(self, x: Tensor) -> Tensor:
        """float [..., in] -> [..., out]."""
        rows = x.reshape(-1, self.in_features).contiguous()
        y = torch._weight_int8pack_mm(rows, self._int8, self._rounded).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def _exact_products() -> bool:
    """Whether four 8-bit products add up in 32 bits: older processors add two of them in 16, which may overflow."""
    known = getattr(torch.cpu, "_is_vnni_supported", None)
    return platform.machine().lower() in ("x86_64", "amd64") and known is not None and bool(known())
