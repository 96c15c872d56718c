"""Decode steps as CUDA graphs: what a forward asks of the GPU is recorded once and then asked for in one go.

A step in which every row feeds one token launches hundreds of small kernels, which takes the host longer than the GPU.
What differs between two such steps, tokens and positions, is copied to where the recorded kernels read it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
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
_TRIALS = 10
"""Replays that tell which of two graphs is faster."""


@dataclass(frozen=True)
class Recorded:
    """Kernels that can be launched again, where they read and where they write.

    Attributes:
        replay: launches them.
        layout: its ``positions`` and ``ends`` are read, as are tokens int64 [R].
        logits: [R, V], written.
    """

    replay: Callable[[], None]
    layout: Layout
    tokens: Tensor
    logits: Tensor


class Recorder:
    """Records a forward as a CUDA graph; all graphs of one recorder share their memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, forward: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
        """What launches it again, and its result."""
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            forward()  # once for real: libraries make what they need
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = forward()
        return graph.replay, result


class DecodeGraphs:
    """The recorded steps of one model on one cache.

    Args:
        model: as it is called for other steps.
        compiled: another form of it; of the two, every number of rows gets the one whose graph is faster.
        recorder: makes what records.
    """

    def __init__(self, model: Any, compiled: Any = None, recorder: Callable[[], Any] = Recorder) -> None:
        self._models = [model] if compiled is None else [model, compiled]
        self._make_recorder = recorder
        self._recorder: Any = None
        self._size: tuple[int, int] | None = None
        self._recorded: dict[int, Recorded] = {}
        self._wanted: dict[int, int] = {}
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
            self._recorder = None
        if size is None:
            return None
        self._wanted[padded] = self._wanted.get(padded, 0) + 1
        step = self._recorded.get(padded)
        if step is None and self._wanted[padded] > _PATIENCE:
            step = self._record(batch, cache, padded, size[1])
        if step is None:
            larger = [count for count in self._recorded if count >= rows]
            step = self._recorded[min(larger)] if larger else None
        if step is None:
            return None
        _fill(step, batch)
        step.replay()
        return step.logits[:rows]

    def _record(self, batch: Batch, cache: Any, rows: int, width: int) -> Recorded | None:
        """The fastest graph for a number of rows; None, from now on, where none can be recorded."""
        self._recorder = self._recorder or self._make_recorder()
        best: tuple[float, Recorded] | None = None
        for model in self._models:
            try:
                step = self._record_one(model, batch, cache, rows, width)
                seconds = _seconds(step) if len(self._models) > 1 else 0.0
            except Exception as error:
                logger.info("steps are not recorded as a CUDA graph: %s", error)
                continue
            logger.info("a recorded step of %d rows takes %.2f ms", rows, 1000 * seconds)
            if best is None or seconds < best[0]:
                best = seconds, step
        if best is None:
            self._off = True
            return None
        self._recorded[rows] = best[1]
        return best[1]

    def _record_one(self, model: Any, batch: Batch, cache: Any, rows: int, width: int) -> Recorded:
        """The rows of the batch are fed, which is what this step is for. Slots behind the last row belong to nobody:
        what is written there is of no account."""
        layout = Layout((Span(width - 1, 1, True),) * rows, batch.device, recorded=True)
        tokens = torch.zeros(rows, dtype=torch.int64, device=batch.device)
        step = Recorded(lambda: None, layout, tokens, tokens)
        _fill(step, batch)
        self._models[0](**cache.call(layout, tokens))  # has the layout make what it makes on the host
        replay, logits = self._recorder(lambda: model(**cache.call(layout, tokens)).logits[0], batch.device)
        return Recorded(replay, layout, tokens, logits)


def _fill(step: Recorded, batch: Batch) -> None:
    """Each row's last token, and where it stands. A row whose failure nobody has read yet has a code for a token."""
    rows, last = len(batch), batch.length - 1
    if rows < len(step.tokens):
        step.layout.positions[rows:].zero_()
        step.layout.ends[rows:].fill_(1)
    step.tokens[:rows].copy_(batch.history.values.gather(1, last[:, None])[:, 0].clamp_(min=0))
    step.layout.positions[:rows].copy_(last)
    step.layout.ends[:rows].copy_(batch.length)


def _seconds(step: Recorded) -> float:
    """What a replay takes. It writes again what it wrote."""
    step.replay()
    _wait(step)
    start = time.perf_counter()
    for _ in range(_TRIALS):
        step.replay()
    _wait(step)
    return (time.perf_counter() - start) / _TRIALS


def _wait(step: Recorded) -> None:
    if step.tokens.is_cuda:
        torch.cuda.synchronize(step.tokens.device)


def can_record(loaded: LoadedModel) -> bool:
    """Whether the model is in one piece on a GPU; what else there is in the way shows when a step is recorded."""
    if loaded.device.type != "cuda":
        return False
    placed = set(getattr(loaded.model, "hf_device_map", {"": loaded.device}).values())
    return len(placed) == 1 and not any(hasattr(parameter, "device_mesh") for parameter in loaded.model.parameters())
