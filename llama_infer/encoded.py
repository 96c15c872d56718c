"""Tensors that are held in 8 bits, and are what they stand for to whoever does not know it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Encoded(Tensor):
    """``steps * scale``: int8 [..., n] and a scale [..., 1] of the type that it has.

    Cutting out of all dimensions but the last leaves it encoded; any other operation of torch sees its decoded form,
    made for that operation. Who reads the two as they are asks for :attr:`steps` and :attr:`scale`.
    """

    steps: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, steps: Tensor, scale: Tensor) -> Encoded:
        made: Encoded = Tensor._make_wrapper_subclass(
            cls, steps.shape, steps.stride(), dtype=scale.dtype, device=steps.device
        )
        made.steps, made.scale = steps, scale
        return made

    def decode(self) -> Tensor:
        return self.steps.to(self.scale.dtype).mul_(self.scale)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operator: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        sliced = operator is aten.slice.Tensor and args[1] % args[0].dim() < args[0].dim() - 1
        if sliced or operator is aten.alias.default:  # the latter is a slice with everything in it
            held, *where = args
            return cls(operator(held.steps, *where), operator(held.scale, *where))
        args, kwargs = tree_map_only(cls, cls.decode, (args, dict(kwargs or {})))
        return operator(*args, **kwargs)


def decoded(states: Tensor) -> Tensor:
    """What may be encoded, as an ordinary tensor."""
    return states.decode() if isinstance(states, Encoded) else states
