"""4-bit weights: by a kernel of ours, or torch's private operators, which only this file names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ParameterError, UnsupportedError
from .int8 import in_spans
from .integers import IntegerLinear
from .native.integer import PART, SPAN, kernel
from .native.quantise import quantise
from .quantised import QuantisedLinear, Tensors, blockwise, quantise_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUPS = (32, 64, 128)
_MOST = (10, 11, 12, 13, 14, 15)
"""Multipliers that are tried for the widest group of a span: the larger, the finer its offset and the fewer choices."""
_LESS = (0, 1)
"""Under each, of every group the multiplier that spans it, and one less: its ends are rare, and its middle gains."""
_STEP, _FIRST = 4, -26
"""Offsets are 16 multiples of 4, from -26: the middle of numbers from -8 to 7 times a multiplier is below 0."""
_TOP, _BOTTOM = 125.0, -122.0
"""The last of 8 bits that a multiplier and an offset give: 7 * 13 + 34 and -8 * 12 - 26."""
_NAMES = ("int4", "groups", "scale")
_BLOCK = 64
"""Rows that the layouts interleave."""


class Int4:
    """``"int4"``: 4-bit weights with 8-bit activations, the head and a tied embedding included.

    The fastest for one sequence, and the smallest. Every 256 inputs of an output share a scale; each group of them has
    a multiplier and an offset of 4 bits, so that its weights are 8-bit numbers of which 16 are used. Activations are
    quantised as those of ``"int8"`` are, and a token's result does not depend on its neighbours either. Where the
    kernel cannot be had, torch's serves: with whole activations, and slow for more than about 8 rows.

    Args:
        group_size: how many weights of a row share a multiplier and an offset: 32, 64 or 128. Larger is smaller
            (4.38 bits a weight at 32, 4.19 at 128) and less accurate.
        keep: names of layers that stay whole, such as ``("lm_head",)``; a name is the end of a module's name. So do
            layers whose inputs are no whole groups, or whose outputs are no multiple of 64.
    """

    name = "int4"

    def __init__(self, group_size: int = 32, keep: Sequence[str] = ()) -> None:
        if group_size not in GROUPS:
            raise ParameterError(f"group_size={group_size!r} is out of range: {', '.join(map(str, GROUPS))}")
        self.group_size, self.keep = int(group_size), tuple(keep)

    def check(self, device: torch.device, dtype: torch.dtype | str) -> None:
        """Raises UnsupportedError off the CPU and for other numbers than bfloat16."""
        if device.type != "cpu":
            raise UnsupportedError(f"quantization='int4' is for the CPU, not {device}: use 'bnb-nf4' there")
        if dtype != torch.bfloat16:
            raise UnsupportedError(f"quantization='int4' works in bfloat16, not {dtype}")

    def convert(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with its linear layers quantised, one after the other."""
        return quantise_layers(model, self)

    def fits(self, weight: Tensor) -> bool:
        """Whether the rows are whole groups, in bfloat16 on the CPU, and as many as the operator takes at a time."""
        rows, width = weight.shape
        whole: bool = not rows % _BLOCK and not width % self.group_size
        return whole and bool(weight.dtype == torch.bfloat16 and weight.device.type == "cpu")

    def quantise(self, weight: Tensor) -> Tensors:
        """float32 [n, in] -> two weights a byte [n, in / 2], a byte [n, groups] and bfloat16 scales [n, spans].

        A weight is ``((number - 8) * multiplier + offset) * scale`` with numbers from 0 to 15, and what is scaled is
        from -128 to 127. Of eight neighbours the first four are the low halves of four bytes. A group's byte holds its
        multiplier - 1 in the low half, and in the high one the offset. Of several the least square error is taken.
        """
        found = quantise(weight, self.group_size)
        return quantise_plainly(weight, self.group_size) if found is None else found

    def dequantise(self, tensors: Tensors) -> Tensor:
        """float32 [n, in]."""
        scale, offset = (part.unsqueeze(-1) for part in self.scales(tensors))
        numbers = _numbers(tensors["int4"]).float().sub_(8).unflatten(1, (-1, self.group_size))
        weight: Tensor = (numbers * scale).add_(offset).flatten(1)
        return weight

    def scales(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """Scale and offset of every group, float32 [n, groups]."""
        meta = tensors["groups"].float()
        scale = tensors["scale"].float().repeat_interleave(SPAN // self.group_size, 1)[:, : meta.shape[1]]
        return (meta % 16 + 1) * scale, ((meta / 16).floor() * _STEP + _FIRST) * scale

    def layer(self, tensors: Tensors, bias: Tensor | None, dtype: torch.dtype) -> QuantisedLinear:
        """A layer that computes with them."""
        name = f"int4_{self.group_size}"
        return (Int4TorchLinear if kernel(name, dtype) is None else Int4Linear)(self, tensors, bias, dtype)

    def settings(self) -> Mapping[str, Any]:
        """The arguments that make this policy again."""
        return {"group_size": self.group_size, "keep": list(self.keep)}

    def __repr__(self) -> str:
        return f"Int4(group_size={self.group_size}" + (f", keep={self.keep})" if self.keep else ")")


class Int4Linear(IntegerLinear):
    """4-bit weights times 8-bit activations, in a kernel of ours."""

    def __init__(self, form: Int4, tensors: Tensors, bias: Tensor | None, dtype: torch.dtype) -> None:
        held = {name: tensors[name] for name in _NAMES}
        parts = ((torch.uint8, PART // 2, 4), (torch.uint8, PART // form.group_size, 1))
        shape = len(held["int4"]), 2 * held["int4"].shape[1]
        super().__init__(form, shape, held, parts, f"int4_{form.group_size}", bias, dtype)


class Int4TorchLinear(QuantisedLinear):
    """4-bit weights times whole activations, in torch's operator, with scales and offsets rounded to bfloat16."""

    def __init__(self, form: Int4, tensors: Tensors, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(form, (len(tensors["int4"]), 2 * tensors["int4"].shape[1]), bias, dtype)
        self._group = form.group_size
        self._packed = blockwise(_pack, {"int4": tensors["int4"]})["int4"]
        known = torch.equal(_unpack({"int4": self._packed[:_BLOCK]})["int4"], tensors["int4"][:_BLOCK])
        self._original = None if known else tensors["int4"]  # another processor, another layout
        self._scale, self._groups = tensors["scale"].clone(), tensors["groups"].clone()
        self._scales = torch.stack(form.scales(tensors), -1).transpose(0, 1).bfloat16().contiguous()

    def tensors(self) -> Tensors:
        """The weights, out of the operator's layout, and what scales them."""
        numbers = self._original
        if numbers is None:
            numbers = blockwise(_unpack, {"int4": self._packed})["int4"]
        return {"int4": numbers, "groups": self._groups, "scale": self._scale}

    def forward(self, x: Tensor) -> Tensor:
        """bfloat16 [..., in] -> [..., out]."""
        rows = x.reshape(-1, self.in_features).contiguous()
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self._packed, self._group, self._scales)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def quantise_plainly(weight: Tensor, group_size: int) -> dict[str, Tensor]:
    """What ``native/quantise.cpp`` does, in torch: to the last bit the same, and slow."""
    width = weight.shape[1]
    groups = in_spans(weight, SPAN).unflatten(-1, (-1, group_size))
    groups = groups.permute(3, 0, 1, 2).contiguous()  # what a group shares lies side by side: long loops
    low, high = groups.amin(0), groups.amax(0)
    widest = (high - low).amax(-1, keepdim=True)
    # Whole spans far from 0 are narrow, and all of their numbers are to fit 8 bits.
    least = torch.maximum(high.amax(-1, keepdim=True) / _TOP, low.amin(-1, keepdim=True) / _BOTTOM).clamp_min(1e-30)
    scales = (torch.maximum(widest / (15 * most), least).bfloat16().float() for most in _MOST)
    _, scale, m, high = reduce(_better, (_span(groups, low, high, scale) for scale in scales))
    numbers = _round(groups * (1 / scale) - (high * _STEP + _FIRST), m, high).add_(8).nan_to_num_()
    numbers = numbers.to(torch.uint8).permute(1, 2, 3, 0).flatten(1)[:, :width]
    eights = numbers.unflatten(1, (-1, 2, 4))
    return {
        "int4": (eights[:, :, 1] << 4 | eights[:, :, 0]).flatten(1),
        "groups": (high * 16 + m - 1).nan_to_num_().to(torch.uint8).flatten(1)[:, : width // group_size].contiguous(),
        "scale": torch.where(widest.isfinite(), scale, torch.nan).flatten(1).bfloat16(),
    }


def _span(groups: Tensor, low: Tensor, high: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """(square error [n, spans, 1], scale, multipliers, high halves of the bytes) of spans from groups [group, n, spans,
    groups], for a scale [n, spans, 1]."""
    up = 1 / scale
    scaled, low, high = groups * up, low * up, high * up
    # All numbers from the lowest to the highest; with the last or the first offset, as far as it has to reach.
    reach = torch.maximum((high - (15 * _STEP + _FIRST)) / 7, (_FIRST - low) / 8)
    whole = torch.maximum(((high - low) / 15).round(), reach.ceil())
    _, error, m, high = reduce(_better, (_group(scaled, low + high, (whole - less).clamp(1, 16)) for less in _LESS))
    return _sum(error.movedim(-1, 0)).unsqueeze(-1) * (scale * scale), scale, m, high


def _group(scaled: Tensor, ends: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    """(square error, again, multiplier, high half of the byte) of groups with those ends (summed up)."""
    high = (((ends + m) / 2 - _FIRST) / _STEP).clamp_(0, 15).round_()
    above = scaled - (high * _STEP + _FIRST)
    error = _sum(_round(above, m, high).mul_(m).sub_(above).square_())
    return error, error, m, high


def _round(above: Tensor, m: Tensor, high: Tensor) -> Tensor:
    """Numbers from -8 to 7 for what lies above the offset, whose 8-bit numbers are in range."""
    o = high * _STEP + _FIRST
    least, most = ((-128 - o) / m).ceil_().clamp_min_(-8), ((127 - o) / m).floor_().clamp_max_(7)
    return (above * (1 / m)).round_().clamp_(least, most)


def _sum(x: Tensor) -> Tensor:
    """Over the first dimension, in an order that can be repeated."""
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


def _better(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One by one, what has the smaller error."""
    less = new[0] < old[0]
    return tuple(torch.where(less, b, a) for a, b in zip(old, new, strict=True))


def _numbers(nibbles: Tensor) -> Tensor:
    """uint8 [n, in / 2] -> uint8 [n, in]: of eight neighbours the first four are the low halves of four bytes."""
    fours = nibbles.unflatten(1, (-1, 1, 4))
    return torch.cat([fours & 15, fours >> 4], 2).flatten(1)


def _pack(tensors: Tensors) -> Tensors:
    """Our bytes -> the operator's layout; both [n, in / 2], n a multiple of 64."""
    return {"int4": torch.ops.aten._convert_weight_to_int4pack_for_cpu(_numbers(tensors["int4"]).int(), 1)}


def _unpack(tensors: Tensors) -> Tensors:
    """The way back. With AVX-512, 64 rows are interleaved: a byte holds an input's weights in rows j and j + 32."""
    packed = tensors["int4"]
    blocks = packed.view(-1, 2 * packed.shape[1], 32)
    numbers = torch.cat([blocks & 15, blocks >> 4], -1).transpose(1, 2).flatten(0, 1)
    eights = numbers.reshape(len(numbers), -1, 2, 4)
    return {"int4": (eights[:, :, 1] << 4 | eights[:, :, 0]).flatten(1)}
