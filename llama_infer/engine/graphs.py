"""Decode steps as CUDA graphs: what a forward asks of the GPU is recorded once and then asked for in one go.

A step in which every row feeds one token launches hundreds of small kernels, which takes the host longer than the GPU.
What differs between two such steps, tokens and positions, is copied to where the recorded kernels read it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..layout import Layout, Span

if TYPE_CHECKING:
    from ..batch import Batch
    from ..parts import LoadedModel

logger = logging.getLogger("llama_infer")

_PATIENCE = 4
"""Steps of a number of rows before a graph is recorded for it, which takes as long as some ten steps."""
_ROWS = (1, 2, 4, 8, 16, 24, 32)
"""Numbers of rows that graphs are recorded for; above, multiples of the last."""


@dataclass(frozen=True)
class _Recorded:
    """A graph, and where it reads and writes: tokens int64 [R], logits [R, V]; positions are the layout's."""

    graph: torch.cuda.CUDAGraph
    layout: Layout
    tokens: Tensor
    logits: Tensor


class DecodeGraphs:
    """The recorded steps of one model on one cache."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._size: tuple[int, int] | None = None
        self._recorded: dict[int, _Recorded] = {}
        self._wanted: dict[int, int] = {}
        self._pool: Any = None
        self._off = False

    def forward(self, batch: Batch, cache: Any, layout: Layout) -> Tensor | None:
        """Logits [R, V] of a step in which every row feeds one token; None where the model has to be called. They are
        overwritten by the next step."""
        rows = len(layout.spans)
        if self._off or not layout.decodes:
            return None
        padded = next((count for count in _ROWS if count >= rows), -(-rows // _ROWS[-1]) * _ROWS[-1])
        size = cache.reserve(layout, padded)
        if size != self._size:  # the buffers are others than those that the graphs know
            self._size = size
            self._recorded.clear()
        if size is None:
            return None
        self._wanted[padded] = self._wanted.get(padded, 0) + 1
        step = self._recorded.get(padded)
        if step is None and self._wanted[padded] > _PATIENCE:
            step = self._record(batch, cache, padded, size[1])
        if step is None:
            step = min((s for count, s in self._recorded.items() if count > rows), key=_rows, default=None)
        if step is None:
            return None
        _fill(step.layout, step.tokens, batch)
        step.graph.replay()
        return step.logits[:rows]

    def _record(self, batch: Batch, cache: Any, rows: int, width: int) -> _Recorded | None:
        """Slots behind the last row belong to nobody: what is written there is of no account."""
        device = batch.device
        layout = Layout((Span(width - 1, 1, True),) * rows, device, recorded=True)
        tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        _fill(layout, tokens, batch)
        graph = torch.cuda.CUDAGraph()
        try:
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                self._model(**cache.call(layout, tokens))  # once for real: libraries make what they need
            torch.cuda.current_stream(device).wait_stream(side)
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits = self._model(**cache.call(layout, tokens)).logits[0]
        except Exception as error:
            logger.info("steps are not recorded as CUDA graphs: %s", error)
            self._off = True
            return None
        self._pool = graph.pool()
        self._recorded[rows] = _Recorded(graph, layout, tokens, logits)
        return self._recorded[rows]


def _rows(step: _Recorded) -> int:
    return len(step.tokens)


def _fill(layout: Layout, tokens: Tensor, batch: Batch) -> None:
    """Each row's last token, and where it stands. A row whose failure nobody has read yet has a code for a token."""
    rows = len(batch)
    last = batch.length - 1
    if rows < len(tokens):
        layout.positions[rows:].zero_()
        layout.ends[rows:].fill_(1)
    tokens[:rows].copy_(batch.history.values.gather(1, last[:, None])[:, 0].clamp_(min=0))
    layout.positions[:rows].copy_(last)
    layout.ends[:rows].copy_(batch.length)


def can_record(loaded: LoadedModel) -> bool:
    """Whether the model is in one piece on a GPU; what else there is in the way shows when a step is recorded."""
    placed = set(getattr(loaded.model, "hf_device_map", {"": loaded.device}).values())
    split = any(hasattr(parameter, "device_mesh") for parameter in loaded.model.parameters())
    return loaded.device.type == "cuda" and len(placed) == 1 and not split
