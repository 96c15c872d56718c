"""What lies between a model's products, in one pass each: norms, rotary positions and the gates of its layers.

transformers computes each in several passes of torch's operators, which costs a small model a quarter of its step. The
modules stay where they are, with their weights; the ``forward`` of an instance is exchanged, and only where a sample
shows that ours computes what theirs does. Tensors that our kernels do not take go the old way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import FunctionType, MethodType, SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from .native import elementwise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")

_ROTATE = "apply_rotary_pos_emb"


@torch.no_grad()
def fuse(model: Model) -> Model:
    """The model, in bfloat16 on the CPU, with our kernels between its products; as it was where there are none."""
    known: dict[tuple[type, tuple[str, ...]], Callable[..., Any] | None] = {}
    for module in model.modules() if elementwise.available() else ():
        if "forward" in vars(module):  # somebody else was there before
            continue
        kind = type(module), tuple(name for name, _ in module.named_parameters())
        if kind not in known:
            known[kind] = _norm(module) or _rotating(module) or _gated(module)
        forward = known[kind]
        if forward is not None:
            module.forward = MethodType(forward, module)
    return model


def _norm(module: nn.Module) -> Callable[..., Any] | None:
    """For root mean square norms with a weight of their own."""
    weights = dict(module.named_parameters())
    if set(weights) != {"weight"} or weights["weight"].ndim != 1 or not _eps(module):
        return None
    plain: Any = type(module).forward

    def forward(self: Any, x: Tensor) -> Any:
        y = elementwise.rms_norm(x, self.weight, _eps(self))
        return plain(self, x) if y is None else y

    return forward if _same(module, forward, _sample(3, len(weights["weight"])) * 0.01) else None


def _eps(module: nn.Module) -> Any:
    held = vars(module)
    return held.get("variance_epsilon", held.get("eps"))


def _rotating(module: nn.Module) -> Callable[..., Any] | None:
    """For attentions: their own ``forward``, in which the function for rotary positions is ours."""
    forward: Any = type(module).forward
    if not isinstance(forward, FunctionType) or _ROTATE not in forward.__code__.co_names:
        return None
    plain = forward.__globals__.get(_ROTATE)
    if plain is None or not _rotates(plain):
        return None

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = None if args or kwargs else elementwise.rotate(q, k, cos, sin)
        return plain(q, k, cos, sin, *args, **kwargs) if found is None else found

    names = {**forward.__globals__, _ROTATE: rotate}
    ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return ours


def _rotates(plain: Callable[..., Any]) -> bool:
    q, k = (_sample(3, heads * 8).view(1, 3, heads, 8).transpose(1, 2) for heads in (4, 2))
    cos, sin = _sample(3, 8), _sample(3, 8).flip(1)
    ours = elementwise.rotate(q, k, cos, sin)
    with contextlib.suppress(Exception):
        theirs = plain(q, k, cos, sin)
        return ours is not None and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    return False


def _gated(module: nn.Module) -> Callable[..., Any] | None:
    """For layers in which SiLU of one product is a gate for another: down(silu(gate(x)) * up(x))."""
    if {name for name, _ in module.named_children()} != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return None
    plain: Any = type(module).forward

    def forward(self: Any, x: Tensor) -> Any:
        gate, up = self.gate_proj(x), self.up_proj(x)
        product = elementwise.gated(gate, up)
        return self.down_proj(self.act_fn(gate) * up if product is None else product)

    gate, up = _sample(3, 64), _sample(3, 64).flip(1)
    sample = SimpleNamespace(
        gate_proj=lambda x: gate, up_proj=lambda x: up, down_proj=lambda x: x, act_fn=module.act_fn
    )
    with contextlib.suppress(Exception):
        found = elementwise.gated(gate, up)
        return forward if found is not None and torch.allclose(found, plain(sample, gate), rtol=2**-6, atol=0) else None
    return None


def _same(module: nn.Module, forward: Callable[..., Any], x: Tensor) -> bool:
    """Whether a forward gives what the module's own does, but for a rounding."""
    with contextlib.suppress(Exception):
        return torch.allclose(forward(module, x), module(x), rtol=2**-7, atol=0)
    return False


def _sample(tokens: int, size: int) -> Tensor:
    """bfloat16 [1, tokens, size], normal."""
    draw = torch.Generator().manual_seed(size)
    return torch.randn(1, tokens, size, generator=draw).bfloat16()
