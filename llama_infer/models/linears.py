"""Replacing a model's linear layers one by one, which leaves its ``forward`` as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn
from tqdm import tqdm

from ..errors import ParameterError
from .mapped import release

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SMALLEST = 64
"""Layers with fewer inputs or outputs stay as they are: adapters of low rank, gates of experts."""

Model = TypeVar("Model", bound="PreTrainedModel")


def replace_linears(
    model: Model, make: Callable[[nn.Linear, Model], nn.Module | None], keep: Sequence[str] = ()
) -> Model:
    """The model with each of its linear layers replaced by ``make(layer, model)``, where that is not None.

    One layer at a time, the largest first, and each original is freed before the next is made: memory peaks at the
    result, or at twice the largest layer. ``keep`` names layers that stay: a module's name or the end of one, such as
    ``"lm_head"`` or ``"mlp.down_proj"``. Raises ParameterError for a name that no linear layer has.
    """
    sizes = {name: module.weight.numel() for name, module in model.named_modules() if type(module) is nn.Linear}
    for wanted in keep:
        if not any(_named(name, wanted) for name in sizes):
            ends = sorted({name.rpartition(".")[2] for name in sizes})
            raise ParameterError(f"keep: no linear layer is called {wanted!r}. There are: {', '.join(ends)}")
    names = [name for name in sizes if not any(_named(name, wanted) for wanted in keep)]
    total = sum(sizes[name] for name in names)
    with tqdm(total=total, desc="Converting layers", unit="", unit_scale=True, disable=None) as bar:  # on a terminal
        for name in sorted(names, key=lambda name: -sizes[name]):
            _replace(model, name, make)
            bar.update(sizes[name])
    return model


def _replace(model: Model, name: str, make: Callable[[nn.Linear, Model], nn.Module | None]) -> None:
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    linear: nn.Linear = getattr(owner, child)
    replaced = make(linear, model) if min(linear.weight.shape) >= _SMALLEST else None
    if replaced is not None:
        setattr(owner, child, replaced.train(linear.training))
        release(linear.weight)


def embedding_of(model: PreTrainedModel, weight: Tensor) -> nn.Module | None:
    """The model's input embedding when that weight is its weight too (a tied head); else None."""
    embedding = model.get_input_embeddings()
    return embedding if any(parameter is weight for parameter in embedding.parameters(recurse=False)) else None


def _named(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith("." + wanted)
