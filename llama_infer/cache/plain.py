"""The plain reference: each row has a ``DynamicCache`` of its own and is fed alone; no attention of ours."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..layout import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PlainCache:
    """One forward a row. Slow and simple; also for models that cannot be packed (long rope, unusual layers)."""

    packed = False

    def __init__(self, config: Any = None) -> None:
        self.lengths: list[int] = []
        self._config = config
        self._rows: list[DynamicCache] = []

    def bind(self, model: PreTrainedModel) -> PlainCache:
        """A new empty cache for the model."""
        return PlainCache(model.config)

    def extend(self, count: int, room: int = 0) -> None:
        """Gives the next ``count`` rows an empty cache, which grows as it is fed whatever its ``room`` may be."""
        self.lengths += [0] * count
        self._rows += [DynamicCache(config=self._config) for _ in range(count)]

    def calls(self, layout: Layout, tokens: Tensor) -> Iterator[dict[str, Any]]:
        """The arguments of a forward for each row that has something to feed."""
        self.lengths = [span.end for span in layout.spans]
        start = 0
        for past, span in zip(self._rows, layout.spans, strict=True):
            if span.new:
                yield {
                    "input_ids": tokens[None, start : start + span.new],
                    "position_ids": layout.positions[None, start : start + span.new],
                    "past_key_values": past,
                    "use_cache": True,
                    "logits_to_keep": torch.arange(
                        span.new - 1, span.new if span.ready else span.new - 1, device=layout.device
                    ),
                }
            start += span.new

    def select(self, index: Sequence[int]) -> None:
        """Row i becomes what row ``index[i]`` was."""
        taken: set[int] = set()
        rows = []
        for source in index:
            rows.append(copy.deepcopy(self._rows[source]) if source in taken else self._rows[source])
            taken.add(source)
        self._rows = rows
        self.lengths = [self.lengths[source] for source in index]

    def erase(self, rows: Sequence[int]) -> None:
        """Nothing to do: rows share no memory."""
