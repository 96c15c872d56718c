"""One forward: whatever the cache lacks, of all rows end to end, through the model's own ``forward``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..batch import Batch, Output
from ..rows import widened
from .graphs import DecodeGraphs, can_record

if TYPE_CHECKING:
    from ..layout import Layout
    from ..parts import LoadedModel


class Runner:
    """Feeds a batch's missing tokens to a loaded model, or to a ``compiled`` form of it in recorded steps."""

    def __init__(self, loaded: LoadedModel, compiled: Any = None) -> None:
        self._model = loaded.model
        self._graphs = DecodeGraphs(loaded.model, compiled) if can_record(loaded) else None

    def forward(self, batch: Batch, cache: Any, layout: Layout) -> Output:
        """Of the last token of each ready row."""
        logits = self._graphs.forward(batch, cache, layout) if self._graphs and hasattr(cache, "reserve") else None
        if logits is None:
            logits = self._call(batch, cache, layout)
        wide, totals = widened(logits)
        return Output(wide, layout.ready, totals)

    def _call(self, batch: Batch, cache: Any, layout: Layout) -> Tensor:
        # A row that has failed and whose failure nobody has read yet has a code where its token would be.
        tokens = batch.history.values[layout.rows, layout.positions].clamp(min=0)
        calls = [self._model(**call).logits[0] for call in cache.calls(layout, tokens)]
        return calls[0] if len(calls) == 1 else torch.cat(calls)
