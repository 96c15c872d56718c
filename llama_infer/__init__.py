"""Own the decoding loop of a Llama-3-family model.

Public names are bound on first use, so that ``import llama_infer`` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "types": ("Chunk", "Completion", "Message", "Request", "TokenLogprob"),
    "parts": ("Context", "Param", "Stop"),
    "registry": ("installed", "register"),
    "batch": ("Batch", "Output", "Plan"),
    "pipeline": ("DEFAULT_PROCESSORS", "DEFAULT_STOPPING", "Pipeline", "transform_logits"),
    "chat": ("Chat",),
    "errors": ("LlamaInferError",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [  # noqa: F822  (bound by __getattr__)
    "DEFAULT_PROCESSORS",
    "DEFAULT_STOPPING",
    "Batch",
    "Chat",
    "Chunk",
    "Completion",
    "Context",
    "LlamaInferError",
    "Message",
    "Output",
    "Param",
    "Pipeline",
    "Plan",
    "Request",
    "Stop",
    "TokenLogprob",
    "installed",
    "register",
    "transform_logits",
]

if TYPE_CHECKING:
    from .batch import Batch, Output, Plan
    from .chat import Chat
    from .errors import LlamaInferError
    from .parts import Context, Param, Stop
    from .pipeline import DEFAULT_PROCESSORS, DEFAULT_STOPPING, Pipeline, transform_logits
    from .registry import installed, register
    from .types import Chunk, Completion, Message, Request, TokenLogprob


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llama_infer' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
