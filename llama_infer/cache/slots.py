"""Row i of the batch owns slot i of every layer's buffers; the only file that names transformers' Cache methods.

The layers stand in a transformers ``DynamicCache``, so the model's own forward fills them. Buffers grow geometrically
and are written in place. They are made of zeros: what a mask hides must still be finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, DynamicLayer

from ..layout import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 64
"""The least number of tokens that a slot is made for."""


class SlotCache:
    """All rows in one packed forward. ``past`` is the ``DynamicCache`` that the model sees."""

    packed = True

    def __init__(self) -> None:
        self.past: DynamicCache | None = None
        self.lengths: list[int] = []
        self._layers: list[SlotLayer] = []

    def bind(self, model: PreTrainedModel) -> SlotCache:
        """A new empty cache for the model."""
        cache = SlotCache()
        make: Callable[[], SlotLayer] = SlotLayer
        cache._layers = [make() for _ in range(model.config.get_text_config().num_hidden_layers)]
        cache.past = DynamicCache()
        cache.past.layers, cache.past.layer_class_to_replicate = list(cache._layers), None
        return cache

    def extend(self, count: int) -> None:
        """Gives the next ``count`` rows an empty slot."""
        self.lengths += [0] * count

    def calls(self, layout: Layout, tokens: Tensor) -> Iterator[dict[str, Any]]:
        """The arguments of one forward over all rows; what it feeds counts as held from here on."""
        for layer in self._layers:
            layer.layout = layout
        self.lengths = [span.end for span in layout.spans]
        yield {
            "input_ids": tokens[None],
            "position_ids": layout.positions[None],
            # Any 4-D mask is passed on as it is: none is built for our calls, whose attention reads the layout.
            "attention_mask": torch.empty(1, 1, 1, 1, device=tokens.device),
            "past_key_values": self.past,
            "use_cache": True,
            "logits_to_keep": layout.last,
            "layout": layout,
        }

    def select(self, index: Sequence[int]) -> None:
        """Row i becomes what row ``index[i]`` was. Only rows that change place are copied."""
        width = max(self.lengths, default=0)
        self.lengths = [self.lengths[row] for row in index]
        moved = [row for row, source in enumerate(index) if row != source]
        if moved and width:
            for layer in self._layers:
                layer.move(moved, [index[row] for row in moved], width)

    def copy(self, row: int, start: int, end: int) -> list[tuple[Tensor, Tensor]]:
        """A row's keys and values of the tokens ``start``..``end`` (exclusive), layer by layer, for :meth:`paste`."""
        return [layer.copy(row, start, end) for layer in self._layers]

    def paste(self, row: int, at: int, kept: Sequence[tuple[Tensor, Tensor]], count: int) -> None:
        """Gives a row, from token ``at`` on, the first ``count`` tokens of a copy; that much counts as held."""
        for layer, states in zip(self._layers, kept, strict=True):
            layer.paste(row, at, states, count)
        self.lengths[row] = at + count

    def erase(self, rows: Sequence[int]) -> None:
        """Empties slots for good: NaN left behind would reach the slot's next owner through masked attention."""
        for layer in self._layers:
            layer.erase(rows)


class SlotLayer(DynamicLayer):
    """One layer's buffers [slots, kv heads, capacity, head_dim]; ``keys`` and ``values`` are views of them."""

    layout: Layout

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the packed tokens [1, kv heads, N, head_dim] where they belong; returns all rows up to the width."""
        layout = self.layout
        rows, width = len(layout.spans), layout.width
        self._make(key_states, value_states)
        self._reserve(rows, width)
        for buffer, states in ((self._keys, key_states), (self._values, value_states)):
            buffer[layout.rows, :, layout.positions] = states[0].transpose(0, 1)
        self.keys, self.values = self._keys[:rows, :, :width], self._values[:rows, :, :width]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.layout.width if self.is_initialized else 0

    def move(self, targets: list[int], sources: list[int], width: int) -> None:
        """Slots ``targets`` get the first ``width`` tokens of ``sources``."""
        if self.is_initialized:
            self._reserve(max(targets) + 1, width)
            for buffer in (self._keys, self._values):
                buffer[targets, :, :width] = buffer[sources, :, :width]

    def copy(self, row: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        return self._keys[row, :, start:end].clone(), self._values[row, :, start:end].clone()

    def paste(self, row: int, at: int, states: tuple[Tensor, Tensor], count: int) -> None:
        self._make(states[0][None], states[1][None])
        self._reserve(row + 1, at + count)
        for buffer, held in zip((self._keys, self._values), states, strict=True):
            buffer[row, :, at : at + count] = held[:, :count]

    def erase(self, rows: Sequence[int]) -> None:
        if self.is_initialized:
            for buffer in (self._keys, self._values):
                buffer[list(rows)] = 0

    def _make(self, keys: Tensor, values: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self._keys, self._values = (t.new_zeros(0, t.shape[1], 0, t.shape[3]) for t in (keys, values))

    def _reserve(self, slots: int, tokens: int) -> None:
        held = self._keys.shape
        if slots > held[0] or tokens > held[2]:
            slots = held[0] if slots <= held[0] else max(slots, 2 * held[0])
            tokens = held[2] if tokens <= held[2] else max(tokens, 2 * held[2], _TOKENS)
            self._keys, self._values = (_grow(t, slots, tokens) for t in (self._keys, self._values))


def _grow(buffer: Tensor, slots: int, tokens: int) -> Tensor:
    grown = buffer.new_zeros(slots, buffer.shape[1], tokens, buffer.shape[3])
    grown[: buffer.shape[0], :, : buffer.shape[2]] = buffer
    return grown
