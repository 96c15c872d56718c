"""Layers with weights of 8 or 4 bits and activations of 8, in a kernel of ours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .native.integer import Part, linear, pack, unpack
from .quantised import Format, QuantisedLinear, Tensors


class IntegerLinear(QuantisedLinear):
    """A layer whose tensors lie in the kernel's layout.

    Args:
        form: what wrote the tensors.
        shape: of the weight, (out, in).
        tensors: one for each of ``parts``, and the scale last.
        parts: how each lies in a record.
        kernel: its name.
        bias: [out].
        dtype: of what the layer takes and gives.
    """

    def __init__(
        self,
        form: Format,
        shape: tuple[int, int],
        tensors: Tensors,
        parts: Sequence[Part],
        kernel: str,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(form, shape, bias, dtype)
        self._kernel, self._names, self._parts = kernel, tuple(tensors), tuple(parts)
        *numbers, scale = tensors.values()
        self._packed = pack(numbers, scale, self._parts, self.in_features)

    def tensors(self) -> Tensors:
        """The weights, out of the kernel's layout, and what scales them."""
        found = unpack(self._packed, self._parts, self.out_features, self.in_features)
        return dict(zip(self._names, found, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """float [..., in] -> [..., out]."""
        return linear(self._kernel, x, self._packed, self.bias, (self.out_features, self.in_features))
