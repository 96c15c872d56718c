"""Attention over one piece of a packed forward: the definition written out, torch's fused kernel, plain products.

Every kernel takes queries [rows, kv heads, group, new, d], where ``group`` query heads share a KV head, keys and values
[rows, kv heads, width, d], the row map, a sliding window or None and a scale (None: d^-0.5), and gives
[rows, kv heads, group, new, d]. A piece is several rows with one new token each, or one row with any number of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import Layout, Piece

Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, Layout, Piece, "int | None", "float | None"], Tensor]

_FEW = 1 << 17
"""Below so many scores, calling costs more than computing: one call then beats three."""
_BLOCK = 128
"""Queries of a KV head in a product: their scores stay in the processor's cache."""
_UNIT = 16
"""What numbers of queries and keys are made multiples of."""


def eager(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, piece: Piece, window: int | None, scaling: float | None
) -> Tensor:
    """The definition, written out: the reference that the others are held against."""
    scores = (q @ k[:, :, None].transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    mask = layout.mask(piece, window)
    if mask is None and q.shape[3] > 1:
        mask = torch.ones(q.shape[3], k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.softmax(scores, -1, dtype=dtype).to(q.dtype) @ v[:, :, None]


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, piece: Piece, window: int | None, scaling: float | None
) -> Tensor:
    """torch's scaled_dot_product_attention; keys and values are not copied for the heads that share them."""
    mask = layout.mask(piece, window)
    if q.shape[3] == 1:  # the heads of a group are so many queries of the KV head that they share
        return F.scaled_dot_product_attention(q[:, :, :, 0], k, v, attn_mask=mask, scale=scaling)[:, :, :, None]
    # One row: KV heads stand where rows do, so that the heads of a group can see one KV head in several places.
    k, v = (t[0, :, None].expand(-1, q.shape[2], -1, -1) for t in (k, v))
    if not k.is_cpu:
        k, v = k.contiguous(), v.contiguous()
    return F.scaled_dot_product_attention(q[0], k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)[None]


def ragged_serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether :func:`ragged` can be used for q [N, heads, d] and keys and values [rows, kv heads, width, d]."""
    if not q.is_cuda or torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return False
    if q.dtype not in (torch.bfloat16, torch.float16) or v.shape != k.shape or v.stride() != k.stride():
        return False
    dim = q.shape[2]
    side_by_side = k.stride()[1:] == (dim, k.shape[1] * dim, 1)
    return side_by_side and dim <= 256 and dim % 8 == 0 and torch.cuda.get_device_capability(q.device)[0] >= 8


def ragged(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None, scaling: float | None) -> Tensor:
    """All rows in one call of the flash attention that torch ships: q [N, heads, d] -> [N, heads, d].

    Which tokens are whose, and how far each row reaches, is read on the device. When every row feeds one token, long
    rows are split over the processor (flash decoding). The operator is private; its public form keeps changing.
    """
    rows, heads, width, dim = k.shape
    capacity = k.stride(0) // k.stride(2)
    k, v = (t.as_strided(((rows - 1) * capacity + width, heads, dim), (heads * dim, dim, 1)) for t in (k, v))
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        layout.starts,
        layout.slot_starts(capacity),
        max(span.new for span in layout.spans),
        width,
        0.0,
        True,
        False,
        scale=scaling,
        window_size_left=-1 if window is None or window >= width else window - 1,
        window_size_right=-1 if window is None or window >= width else 0,
        seqused_k=layout.ends,
    )[0]
    return out


def products_pay(q: Tensor, k: Tensor) -> bool:
    """Whether :func:`products` is the faster one: prompts in bfloat16 on the CPU. oneDNN's products beat torch's fused
    kernel there; for single tokens they do not, because keys and values are copied into a dense batch first."""
    return q.is_cpu and q.dtype == torch.bfloat16 and q.shape[3] > 1 and q[..., 0].numel() * k.shape[2] >= _FEW


def products(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, piece: Piece, window: int | None, scaling: float | None
) -> Tensor:
    """Matmul, softmax, matmul, a block of queries at a time over the keys that it sees.

    oneDNN compiles a kernel for every shape that it meets, which takes ten times as long as such a product. So a row by
    itself is given queries and keys behind its end, which nobody sees, until it has one of few shapes.
    """
    group, new, width = q.shape[2], q.shape[3], k.shape[2]
    old = width - new
    ragged = q.shape[0] > 1 or (window is not None and window < width)
    hidden = ~mask if ragged and (mask := layout.mask(piece, window)) is not None else None
    unit = 1 if ragged else _UNIT
    step = max(unit, _BLOCK // group // unit * unit)
    q = q * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    q, k, v = (F.pad(t, (0, 0, 0, -t.shape[-2] % unit)) for t in (q, k, v))
    outs = []
    for start in range(0, q.shape[3], step):
        end = min(start + step, q.shape[3])
        seen = min(-(-(old + end) // unit) * unit, k.shape[2])
        scores = q[:, :, :, start:end].flatten(2, 3) @ k[:, :, :seen].transpose(-1, -2)
        blocks = scores.unflatten(2, (group, end - start))
        if hidden is not None:
            blocks.masked_fill_(hidden[:, :, None, start:end, :seen], -torch.inf)
        elif not ragged:
            at = old + start
            blocks[..., at:].masked_fill_(_later(end - start, seen - at, q.device), -torch.inf)
        outs.append((torch.softmax(scores, -1) @ v[:, :, :seen]).unflatten(2, (group, end - start)))
    return (outs[0] if len(outs) == 1 else torch.cat(outs, 3))[:, :, :, :new]


@functools.lru_cache(maxsize=128)
def _later(queries: int, keys: int, device: torch.device) -> Tensor:
    """bool [queries, keys]: what comes after each query, the first of which is the first key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).triu(1)
