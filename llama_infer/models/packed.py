"""Linear layers as the processor wants them: the only file that names torch's private operators of oneDNN.

``torch.nn.functional.linear`` on row-major weights costs half of the memory bandwidth in bfloat16 on x86, and a third
of the arithmetic of a batch. Where the processor multiplies tiles (AMX), a kernel of ours reads the same weights
without that cost (``native/tiled.py``). Elsewhere they are packed in oneDNN's own layout; few rows are then computed by
another kernel of ours (``native/linear.py``), where there is one, and many by oneDNN.
"""

from __future__ import annotations

import platform
import struct
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .fused import fuse
from .linears import embedding_of, replace_linears
from .mapped import MappedEmbedding, is_mapped
from .native import tiled
from .native.linear import Packing
from .native.linear import kernel as native_kernel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

_BFLOAT16, _BLOCKED = 2, 2  # oneDNN's dnnl_bf16 and dnnl_blocked

_ROWS = 16
"""How many rows the layout is chosen for; one layout serves 1 to 512 rows equally well (measured)."""
_STEP = 32
"""Above so many rows, oneDNN is asked for multiples of them only: it compiles a kernel for every number of rows that it
meets, which takes 4-14 ms, several times the product itself."""


class Packed:
    """``"packed"``: every linear layer as the processor computes it fastest; the same numbers, 16 bits each, no loss.
    The default on x86 processors in bfloat16.

    With AMX weights stay where they are, in the file that is mapped; elsewhere each is copied into oneDNN's layout.

    Args:
        keep: names of layers that stay as they are, such as ``("lm_head",)``; a name is the end of a module's name.
    """

    def __init__(self, keep: Sequence[str] = ()) -> None:
        self.keep = tuple(keep)

    def check(self, device: torch.device, dtype: torch.dtype | str) -> None:
        """Raises UnsupportedError where there is no such layout: not on x86, not on the CPU, not in bfloat16."""
        reason = refusal(device, dtype)
        if reason is not None:
            raise UnsupportedError(f"quantization='packed' {reason}; quantization='none' leaves the layers as they are")

    def convert(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with its linear layers replaced, one after the other, each original freed, and what lies between
        them fused."""
        return fuse(replace_linears(model, replacement, self.keep))

    def __repr__(self) -> str:
        return f"Packed(keep={self.keep})" if self.keep else "Packed()"


def replacement(linear: nn.Linear, model: PreTrainedModel) -> nn.Module | None:
    """A layer of that model for this processor; None for what is not bfloat16 on the CPU."""
    if linear.weight.dtype != torch.bfloat16 or linear.weight.device.type != "cpu":
        return None
    return TiledLinear(linear) if tiled.available() else PackedLinear.of(linear, model)


def refusal(device: torch.device, dtype: torch.dtype | str) -> str | None:
    """Why linear layers cannot be packed there; None when they can."""
    if device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return f"is for x86 processors, not {device} on {platform.machine()}"
    if dtype != torch.bfloat16:
        return f"works in bfloat16, not {dtype}"
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "needs a processor with AVX-512 and a torch that is built with oneDNN"
    return None


class TiledLinear(nn.Linear):
    """``nn.Linear`` in bfloat16 on the processor's tiles, on the very weights of another one; for inference only."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """bfloat16 [..., in] -> [..., out]."""
        y = tiled.linear(x, self.weight, self.bias)
        return super().forward(x) if y is None else y


class PackedLinear(nn.Module):
    """``nn.Linear`` in bfloat16 on a packed weight [out, in]; for inference only.

    ``weight`` unpacks a copy, and ``state_dict`` holds what the original's held, so a packed model saves as the plain
    one would.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, tied: nn.Module | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self._tied = (tied,)  # in a tuple, because the embedding is no part of this module
        shape, lies = (self.out_features, self.in_features), packing(self._packed)
        address = torch.ops.mkldnn.data_ptr(self._packed)
        self.kernel = None if lies is None else native_kernel(address, shape, lies, bias)

    @classmethod
    def of(cls, linear: nn.Linear, model: PreTrainedModel) -> PackedLinear:
        """The packed form of a layer of that model."""
        weight = linear.weight
        tied = embedding_of(model, weight)
        if type(tied) is nn.Embedding and is_mapped(weight):
            tied = MappedEmbedding(weight)
            model.set_input_embeddings(tied)
        return cls(weight, linear.bias, tied)

    @property
    def weight(self) -> Tensor:
        """The weight [out, in], unpacked: a copy, or the embedding that it is tied to."""
        (tied,) = self._tied
        return self._packed.to_dense() if tied is None else tied.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """bfloat16 [..., in] -> [..., out]."""
        y = None if self.kernel is None else self.kernel(x)
        if y is not None:
            return y
        rows = x.numel() // self.in_features
        spare = -rows % _STEP if rows > _STEP else 0
        if not spare:
            return self._product(x)
        padded = nn.functional.pad(x.reshape(rows, self.in_features), (0, 0, 0, spare))
        return self._product(padded)[:rows].view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return y

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def packing(packed: Tensor) -> Packing | None:
    """How a packed weight [out, in] lies; None when that is not by blocks of outputs and pairs of inputs.

    Read from oneDNN's own description (``dnnl_memory_desc``, written out). It is documented nowhere and may change, so
    what is not exactly as expected counts as unknown.
    """
    try:
        described = torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy().tobytes()
        rank, *dims = struct.unpack_from("<i2q", described, 4)
        dtype, *held = struct.unpack_from("<i4x2q", described, 104)
        form, *strides = struct.unpack_from("<i4x2q", described, 312)
        count, *sizes = struct.unpack_from("<i4x3q", described, 416)
        order = list(struct.unpack_from("<3q", described, 520))
        size = torch.ops.mkldnn._nbytes(packed)
    except (AttributeError, RuntimeError, struct.error):
        return None
    pairs, outputs, two = sizes
    inputs = held[1]
    expected = [pairs * 2 * outputs, [1, 0, 1], 2, (2, _BFLOAT16, _BLOCKED, 3), 2 * held[0] * inputs]
    found = [strides[1], order, two, (rank, dtype, form, count), size]
    if found != expected or dims != list(packed.shape) or strides[0] != inputs * outputs:
        return None
    return Packing(outputs, inputs)
