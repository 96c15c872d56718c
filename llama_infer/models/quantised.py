"""What the policies of our own share: a format for weights, layers made of it, and an embedding that reads its rows.

A format turns rows of weights into tensors and back; every one of those has a row for each row of weights, so rows can
be quantised block by block, and read one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .fused import fuse
from .linears import embedding_of, replace_linears
from .mapped import is_mapped, release, rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BLOCK = 1 << 19
"""Weights that are quantised at a time: what is computed on the way stays in the processor's caches."""

Tensors = Mapping[str, Tensor]
Model = TypeVar("Model", bound="PreTrainedModel")


class Format(Protocol):
    """How weights are written in fewer bits."""

    name: str
    keep: tuple[str, ...]

    def settings(self) -> Mapping[str, Any]:
        """The arguments, as JSON has them, that make this policy again; ``name`` is what it is registered as."""

    def check(self, device: torch.device, dtype: torch.dtype | str) -> None:
        """Raises UnsupportedError for a device or a dtype that it cannot serve."""

    def fits(self, weight: Tensor) -> bool:
        """Whether weights [out, in] of that shape can be written so; the others stay whole."""

    def quantise(self, weight: Tensor) -> Tensors:
        """float32 [n, in] -> tensors of n rows each. Row by row: what a row becomes depends on nothing else."""

    def dequantise(self, tensors: Tensors) -> Tensor:
        """The float32 [n, in] that they stand for."""

    def layer(self, tensors: Tensors, bias: Tensor | None, dtype: torch.dtype) -> QuantisedLinear:
        """A layer that computes with them."""


class QuantisedLinear(nn.Module):
    """``nn.Linear`` on quantised weights; for inference only.

    ``weight`` is a dequantised copy, and ``state_dict`` holds it (a tied head leaves that to the embedding), so
    ``save_pretrained`` writes an ordinary checkpoint of the dequantised weights.
    """

    def __init__(self, form: Format, shape: Sequence[int], bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.form, self.dtype = form, dtype
        self.tied = False
        """Whether an embedding reads these weights too, and is the one that saves them."""
        self.out_features, self.in_features = shape
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    def tensors(self) -> Tensors:
        """What the layer was made of."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The weights [out, in] that the layer stands for: a copy in the dtype of its inputs."""
        return blockwise(lambda rows: {"weight": self.form.dequantise(rows).to(self.dtype)}, self.tensors())["weight"]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.tied:
            destination[prefix + "weight"] = self.weight

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.form}"


class QuantisedEmbedding(nn.Module):
    """``nn.Embedding`` with the numbers of the quantised head that it is tied to.

    Its rows are kept as the head's tensors, or, while the checkpoint is mapped, quantised anew from the file when they
    are read: the same numbers, and no memory.
    """

    def __init__(self, form: Format, tensors: Tensors, dtype: torch.dtype) -> None:
        super().__init__()
        self.form, self.dtype = form, dtype
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
        self._rows = {name: rows_of(tensor) for name, tensor in tensors.items()}

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., in]."""
        return self._numbers(ids.flatten()).unflatten(0, ids.shape) if ids.ndim != 1 else self._numbers(ids)

    def _numbers(self, ids: Tensor) -> Tensor:
        rows = {name: read(ids) for name, read in self._rows.items()}
        if "original" in rows:
            rows = dict(self.form.quantise(rows["original"].float()))
        return self.form.dequantise(rows).to(self.dtype)

    @property
    def weight(self) -> Tensor:
        """All of its numbers: a copy."""
        count = len(next(self.parameters()))
        return torch.cat([self._numbers(ids) for ids in torch.arange(count).split(1024)])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight

    def extra_repr(self) -> str:
        return f"{', '.join(self._parameters)}, {self.form}"


def quantise_layers(model: Model, form: Format) -> Model:
    """The model with its linear layers quantised, an embedding that is tied to one of them with it, and what lies
    between them fused."""

    def make(linear: nn.Linear, model: PreTrainedModel) -> nn.Module | None:
        weight, dtype = linear.weight.detach(), linear.weight.dtype
        if not form.fits(weight):
            return None
        tensors = blockwise(lambda rows: form.quantise(rows["weight"].float()), {"weight": weight})
        layer = form.layer(tensors, linear.bias, dtype)
        if type(embedding_of(model, linear.weight)) is nn.Embedding:
            rows = {"original": weight} if is_mapped(weight) else tensors
            model.set_input_embeddings(QuantisedEmbedding(form, rows, dtype))
            layer.tied = True
        return layer

    return fuse(replace_linears(model, make, form.keep))


def blockwise(function: Callable[[Tensors], Tensors], tensors: Tensors) -> dict[str, Tensor]:
    """``function`` of some rows at a time, put together. What was read of a mapped file is given back on the way."""
    count, width = len(next(iter(tensors.values()))), max(t.numel() // len(t) for t in tensors.values())
    step = max(1, _BLOCK // width // 64) * 64  # whole blocks of the layouts that interleave rows
    whole: dict[str, Tensor] = {}
    for start in range(0, count, step):
        rows = {name: tensor[start : start + step] for name, tensor in tensors.items()}
        for name, part in function(rows).items():
            if name not in whole:
                whole[name] = part.new_empty(count, *part.shape[1:])
            whole[name][start : start + step] = part
        for tensor in rows.values():
            release(tensor)
    return whole
