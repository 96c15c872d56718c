"""How much memory the weights of a loaded model take."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False), *tensors):
            if not (apart and module is embedding and is_mapped(tensor)):
                seen[id(tensor) if tensor.is_mkldnn else tensor.data_ptr()] = _bytes(tensor)
    return sum(seen.values())


def _bytes(tensor: Tensor) -> int:
    if tensor.is_mkldnn:
        return int(torch.ops.mkldnn._nbytes(tensor))
    return tensor.numel() * tensor.element_size()
