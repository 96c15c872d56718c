"""How much memory the weights of a loaded model take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .mapped import is_mapped
from .packed import PackedLinear
from .quantised import QuantisedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of every weight once, in whatever layout; rows of an embedding that stay in the file of a model whose head
    has a layout of its own count nothing."""
    ours = (QuantisedLinear, PackedLinear)
    embedding = model.get_input_embeddings()
    apart = isinstance(model.get_output_embeddings(), ours)
    seen: dict[int, int] = {}
    for module in model.modules():
        held = list(vars(module).values()) if isinstance(module, ours) else []
        held += [part for value in held if isinstance(value, list) for part in value]
        tensors = [value for value in held if isinstance(value, Tensor)]
        whole = (*module.parameters(recurse=False), *module.buffers(recurse=False), *tensors)
        for tensor in (part for each in whole for part in _parts(each)):
            if not (apart and module is embedding and is_mapped(tensor)):
                seen[id(tensor) if tensor.is_mkldnn else tensor.data_ptr()] = _bytes(tensor)
    return sum(seen.values())


def _parts(tensor: Any) -> Iterator[Tensor]:
    """The tensors that one of a library's own kind, such as torchao's, is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor


def _bytes(tensor: Tensor) -> int:
    if tensor.is_mkldnn:
        return int(torch.ops.mkldnn._nbytes(tensor))
    return tensor.numel() * tensor.element_size()
