"""4-bit weights: the only file that names torch's private operators for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ParameterError, UnsupportedError
from .int8 import Int8
from .quantised import QuantisedLinear, Tensors, blockwise, quantise_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUPS = (32, 64, 128, 256)
_SHRINK = (1.0, 0.93, 0.86)
"""Fractions of a group's range that are tried: the ends of a range are rare, and its middle gains what they lose."""
_BLOCK = 64
"""Rows that the operator's layout interleaves."""
_FEW = 4
"""Rows up to which the 4-bit operator is as fast as 8-bit arithmetic; its time grows with every row."""


class Int4:
    """``"int4"``: 4-bit weights in groups with a scale and an offset each, the head and a tied embedding included.

    The fastest for one sequence, and the smallest. Its operator computes row after row: from about 8 rows on, in a
    batch or a long prompt, bfloat16 is faster; ``batched=True`` is not slower there.

    Args:
        group_size: how many weights of a row share a scale and an offset: 32, 64, 128 or 256. Larger is smaller
            (5 bits a weight at 32, 4.25 at 128) and less accurate.
        batched: keep an 8-bit copy of the 4-bit weights, which serves forwards of more than a few rows; three times
            the memory, four fifths of bfloat16's.
        keep: names of layers that stay whole, such as ``("lm_head",)``; a name is the end of a module's name. So do
            layers whose inputs are no whole groups, or whose outputs are no multiple of 64.
    """

    name = "int4"

    def __init__(self, group_size: int = 32, batched: bool = False, keep: Sequence[str] = ()) -> None:
        if group_size not in GROUPS:
            raise ParameterError(f"group_size={group_size!r} is out of range: {', '.join(map(str, GROUPS))}")
        self.group_size, self.batched, self.keep = int(group_size), bool(batched), tuple(keep)

    def check(self, device: torch.device, dtype: torch.dtype | str) -> None:
        """Raises UnsupportedError off the CPU and for other numbers than bfloat16."""
        if device.type != "cpu":
            raise UnsupportedError(f"quantization='int4' is for the CPU, not {device}: use 'bnb-nf4' there")
        if dtype != torch.bfloat16:
            raise UnsupportedError(f"quantization='int4' works in bfloat16, not {dtype}")
        if self.batched:
            Int8().check(device, dtype)

    def convert(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with its linear layers quantised, one after the other."""
        return quantise_layers(model, self)

    def fits(self, weight: Tensor) -> bool:
        """Whether the rows are whole groups, in bfloat16 on the CPU, and as many as the operator takes at a time."""
        rows, width = weight.shape
        whole: bool = not rows % _BLOCK and not width % self.group_size
        return whole and bool(weight.dtype == torch.bfloat16 and weight.device.type == "cpu")

    def quantise(self, weight: Tensor) -> Tensors:
        """float32 [n, in] -> two weights a byte [n, in / 2], and bfloat16 scales and offsets [n, groups].

        A group's weights are ``(number - 8) * scale + offset`` with numbers from 0 to 15; of three ranges the one with
        the least square error is taken.
        """
        groups = weight.unflatten(1, (-1, self.group_size))
        _, numbers, scale, offset = reduce(_better, (_round(groups, part) for part in _SHRINK))
        nibbles = (numbers + 8).to(torch.uint8).flatten(1)
        return {
            "int4": nibbles[:, 1::2] << 4 | nibbles[:, ::2],
            "scale": scale.squeeze(-1).bfloat16(),
            "offset": offset.squeeze(-1).bfloat16(),
        }

    def dequantise(self, tensors: Tensors) -> Tensor:
        """float32 [n, in]."""
        numbers = _numbers(tensors["int4"]).float().sub_(8).unflatten(1, (-1, self.group_size))
        scale, offset = (tensors[name].float().unsqueeze(-1) for name in ("scale", "offset"))
        weight: Tensor = (numbers * scale).add_(offset).flatten(1)
        return weight

    def layer(self, tensors: Tensors, bias: Tensor | None, dtype: torch.dtype) -> QuantisedLinear:
        """A layer that computes with them."""
        return Int4Linear(self, tensors, bias, dtype)

    def settings(self) -> Mapping[str, Any]:
        """The arguments that make this policy again."""
        return {"group_size": self.group_size, "batched": self.batched, "keep": list(self.keep)}

    def __repr__(self) -> str:
        more = (", batched=True" if self.batched else "") + (f", keep={self.keep}" if self.keep else "")
        return f"Int4(group_size={self.group_size}{more})"


class Int4Batched(Int4):
    """``"int4-batched"``: the same, with an 8-bit copy for more than a few rows."""

    def __init__(self) -> None:
        super().__init__(batched=True)


class Int4Linear(QuantisedLinear):
    """4-bit weights times whole activations; for many rows 8-bit ones, where there is a copy of that kind."""

    def __init__(self, form: Int4, tensors: Tensors, bias: Tensor | None, dtype: torch.dtype) -> None:
        rows, width = len(tensors["int4"]), 2 * tensors["int4"].shape[1]
        super().__init__(form, (rows, width), bias, dtype)
        self._group = form.group_size
        self._packed = blockwise(_pack, {"int4": tensors["int4"]})["int4"]
        known = torch.equal(_unpack({"int4": self._packed[:_BLOCK]})["int4"], tensors["int4"][:_BLOCK])
        self._original = None if known else tensors["int4"]  # another processor, another layout
        self._scales = torch.stack([tensors["scale"], tensors["offset"]], -1).transpose(0, 1).contiguous()
        self._many = None
        if form.batched:
            eight = Int8()
            again = blockwise(lambda part: eight.quantise(form.dequantise(part)), tensors)
            self._many = eight.layer(again, bias, dtype)

    def tensors(self) -> Tensors:
        """The weights, out of the operator's layout, their scales and offsets."""
        scale, offset = self._scales.transpose(0, 1).unbind(-1)
        numbers = self._original
        if numbers is None:
            numbers = blockwise(_unpack, {"int4": self._packed})["int4"]
        return {"int4": numbers, "scale": scale.contiguous(), "offset": offset.contiguous()}

    def forward(self, x: Tensor) -> Tensor:
        """bfloat16 [..., in] -> [..., out]."""
        rows = x.reshape(-1, self.in_features).contiguous()
        if self._many is not None and len(rows) > _FEW:
            many: Tensor = self._many(x)
            return many
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self._packed, self._group, self._scales)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def _round(groups: Tensor, part: float) -> tuple[Tensor, ...]:
    """(square error, numbers from -8 to 7, scale, offset) of each group, for that part of its range."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) * (part / 15)).clamp_min_(1e-30).bfloat16().float()
    offset = ((high + low + scale) / 2).bfloat16().float()
    numbers = ((groups - offset) / scale).round_().clamp_(-8, 7)
    error = (numbers * scale).add_(offset).sub_(groups).square_().sum(-1, keepdim=True)
    return error, numbers, scale, offset


def _better(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Group by group, the one with the smaller error."""
    less = new[0] < old[0]
    return tuple(torch.where(less, b, a) for a, b in zip(old, new, strict=True))


def _numbers(nibbles: Tensor) -> Tensor:
    """uint8 [n, in / 2] -> uint8 [n, in]: the low half of a byte comes first."""
    return torch.stack([nibbles & 15, nibbles >> 4], -1).flatten(1)


def _pack(tensors: Tensors) -> Tensors:
    """Two neighbours a byte -> the operator's layout; both [n, in / 2], n a multiple of 64."""
    return {"int4": torch.ops.aten._convert_weight_to_int4pack_for_cpu(_numbers(tensors["int4"]).int(), 1)}


def _unpack(tensors: Tensors) -> Tensors:
    """The way back. With AVX-512, 64 rows are interleaved: a byte holds an input's weights in rows j and j + 32."""
    packed = tensors["int4"]
    blocks = packed.view(-1, 2 * packed.shape[1], 32)
    numbers = torch.cat([blocks & 15, blocks >> 4], -1).transpose(1, 2).flatten(0, 1)
    return {"int4": numbers[:, 1::2] << 4 | numbers[:, ::2]}
