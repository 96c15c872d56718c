"""Attention over packed rows, handed to transformers' models; the only file that registers with transformers.

Each name ``llama_infer_<kernel>`` is registered as an attention *and* as a mask function. In our own calls the keyword
``layout`` is present, the rows' keys and values come from our cache layers, and the mask is ignored. In anybody else's
call on the same model transformers' own function of that kernel runs with the mask it asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..encoded import decoded
from ..errors import UnsupportedError
from ..layout import Layout, Piece, Span
from . import kernels
from .kernels import Kernel
from .native import attention as native

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "llama_infer_"
KERNELS = ("sdpa", "eager", "flash_attention_2")
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def install(model: PreTrainedModel, kernel: str = "sdpa") -> None:
    """Makes the model's attention ours. Raises UnsupportedError when the model has no replaceable attention."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = PREFIX + kernel
    AttentionInterface.register(name, partial(_packed_attention, kernel))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[kernel])
    try:
        model.set_attn_implementation(name)
    except Exception as error:
        raise UnsupportedError(f"{type(model).__name__} does not let its attention be replaced: {error}") from error


def takes_cache(model: PreTrainedModel) -> bool:
    """Whether the model's forward takes ``past_key_values``; a few keep their state in something else."""
    inner: Any = getattr(model, "get_base_model", lambda: model)()  # what peft wraps
    return "past_key_values" in inspect.signature(inner.forward).parameters


def own_state(model: PreTrainedModel) -> str | None:
    """What a module of the model remembers from one forward to the next, beside the cache, by name; None: nothing."""
    own = (module for module in model.modules() if type(module).__module__.startswith("transformers"))
    names = (name for module in own for name in vars(module) if name.endswith(("_state", "_states")))
    return next(names, None)


def refusal(model: PreTrainedModel) -> str | None:
    """Why rows of this model cannot be packed into one forward; None when they can."""
    config: Any = model.config.get_text_config()
    for rope in rope_types(config):
        if rope in ("longrope", "dynamic"):
            return f"rope type {rope!r} chooses its frequencies by the longest row of a batch"
    known = {"full_attention", "sliding_attention"}
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - known)
    if odd:
        return f"it has layers of type {', '.join(map(repr, odd))}; known: {', '.join(sorted(known))}"
    for name in ("attn_logit_softcapping", "attention_sink", "num_kv_shared_layers"):
        if getattr(config, name, None):
            return f"its attention uses {name}"
    if any(hasattr(module, "sinks") for module in model.modules()):
        return "its attention uses sinks"
    if not getattr(model, "_supports_attention_backend", False):  # what transformers says of those that it converted
        return f"{type(model).__name__} has an attention of its own, which ignores the row map"
    return None


def rope_types(config: Any) -> set[str]:
    """Every rope type that a configuration names; layers may have different ones."""
    found = set()
    for rope in (getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)):
        if isinstance(rope, dict):
            nested = [value for value in rope.values() if isinstance(value, dict)]
            found |= {str(r.get("rope_type", r.get("type", "default"))) for r in (rope, *nested)}
    return found


def _packed_attention(
    kernel: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query [1, heads, N, d], key and value [rows, kv heads, width, d] of the cache -> [1, N, heads, d]."""
    if layout is None:
        theirs = _transformers_attention(kernel, module)
        options = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, **kwargs}
        result: tuple[Tensor, Tensor | None] = theirs(module, query, key, value, attention_mask, **options)
        return result
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"{type(module).__name__} uses {name}: run it with cache='plain'")
    layout = layout.on(query.device)
    tokens = query[0].transpose(0, 1)
    if kernel == "sdpa" and kernels.ragged_serves(tokens, key, value):
        return kernels.ragged(tokens, key, value, layout, sliding_window, scaling)[None], None
    if layout.recorded:
        raise UnsupportedError("the attention of this step depends on numbers of the host, it cannot be recorded")
    out = query.new_empty(*tokens.shape[:2], value.shape[-1])
    pieces: Sequence[Piece] = layout.pieces
    run = native.kernel(query, key, value) if kernel == "sdpa" else None
    if run is not None:
        native.attend(run, tokens, key, value, out, layout, sliding_window, scaling)
        pieces = [piece for piece in pieces if layout.spans[piece.first].new > 1]
    if pieces and kernel == "sdpa" and native.prefills(query, key, value, scaling):
        native.prefill(tokens, key, value, out, layout, sliding_window, scaling)
        pieces = ()
    for piece in pieces:
        spans = layout.spans[piece.first : piece.last]
        at = slice(piece.start, piece.start + sum(span.new for span in spans))
        rows, width = slice(piece.first, piece.last), max(span.end for span in spans)
        k, v = (decoded(t[rows, :, :width]) for t in (key, value))
        if kernel == "flash_attention_2":
            out[at] = _flash(module, query[0, :, at], k, v, spans, scaling, sliding_window)
        else:  # the heads of each token in groups that share a KV head
            q = tokens[at].unflatten(0, (len(spans), -1)).unflatten(2, (k.shape[1], -1)).permute(0, 2, 3, 1, 4)
            found = _kernel(kernel, q, k)(q, k, v, layout, piece, sliding_window, scaling)
            out[at] = found.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)
    return out[None], None


def _kernel(name: str, q: Tensor, k: Tensor) -> Kernel:
    if name == "eager":
        return kernels.eager
    return kernels.products if kernels.products_pay(q, k) else kernels.sdpa


def _flash(
    module: torch.nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Sequence[Span],
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Row by row through transformers' own flash attention, which is causal from the end of the keys."""
    attend = _transformers_attention("flash_attention_2", module)
    outs, start = [], 0
    for row, span in enumerate(spans):
        keys, values = (t[row : row + 1, :, : span.end] for t in (k, v))
        queries = q[None, :, start : start + span.new]
        outs.append(attend(module, queries, keys, values, None, scaling=scaling, sliding_window=window)[0][0])
        start += span.new
    return torch.cat(outs)


def _transformers_attention(kernel: str, module: torch.nn.Module) -> Callable[..., Any]:
    """transformers' own function; the eager one lives in the model's file."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if kernel == "eager":
        import sys

        return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]
    return ALL_ATTENTION_FUNCTIONS[kernel]  # type: ignore[no-any-return]
