"""Row i of the batch owns slot i of every layer's buffers; the only file that names transformers' Cache methods.

The layers stand in a transformers ``DynamicCache``, so the model's own forward fills them. Buffers are written in
place. On the CPU they are made as large as the requests may need, where that is known; else they grow geometrically,
layer by layer, so that no two copies of the whole cache ever exist. They are made of zeros: what a mask hides must be
finite all the same.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, DynamicLayer

from ..layout import Layout
from ..transfer import upload
from .place import place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 64
"""The least number of tokens that a slot is made for."""
_RESERVED = 1024
"""The most tokens that a slot is made for beforehand where memory is taken at once, not as it is written."""
_LARGE = 4 << 20
"""Bytes from which on memory is asked of the system."""


class SlotCache:
    """All rows in one packed forward. ``past`` is the ``DynamicCache`` that the model sees."""

    packed = True

    def __init__(self) -> None:
        self.past: DynamicCache | None = None
        self.lengths: list[int] = []
        self._layers: list[SlotLayer] = []
        self._room = 0
        self._device = torch.device("cpu")

    def bind(self, model: PreTrainedModel) -> SlotCache:
        """A new empty cache for the model."""
        cache = type(self)()
        cache._layers = [self._layer() for _ in range(model.config.get_text_config().num_hidden_layers)]
        cache._device = model.device
        cache.past = DynamicCache()
        cache.past.layers, cache.past.layer_class_to_replicate = list(cache._layers), None
        return cache

    def extend(self, count: int, room: int = 0) -> None:
        """Gives the next ``count`` rows an empty slot. ``room``: tokens that one of them may come to hold, if known."""
        self.lengths += [0] * count
        most = room if self._device.type == "cpu" else _RESERVED
        self._room = max(self._room, min(room, most))

    def calls(self, layout: Layout, tokens: Tensor) -> Iterator[dict[str, Any]]:
        """The arguments of one forward over all rows; what it feeds counts as held from here on."""
        self._make_room(len(layout.spans), layout.width)
        self.lengths = [span.end for span in layout.spans]
        yield self.call(layout, tokens)

    def call(self, layout: Layout, tokens: Tensor) -> dict[str, Any]:
        """The arguments of one forward, for which there is room."""
        for layer in self._layers:
            layer.layout = layout
        return {
            "input_ids": tokens[None],
            "position_ids": layout.positions[None],
            # Any 4-D mask is passed on as it is: none is built for our calls, whose attention reads the layout.
            "attention_mask": torch.empty(1, 1, 1, 1, device=tokens.device),
            "past_key_values": self.past,
            "use_cache": True,
            "logits_to_keep": layout.last,
            "layout": layout,
        }

    def reserve(self, layout: Layout, rows: int) -> tuple[int, int] | None:
        """Makes room for a step in which ``rows`` slots are written, and counts what it feeds as held. Returns how many
        slots of how many tokens the buffers have, or None while they still have to grow, as they do when written."""
        self._make_room(max(rows, len(layout.spans)), layout.width)
        self.lengths = [span.end for span in layout.spans]
        return self._layers[-1].size if self._layers[-1].fits else None

    def select(self, index: Sequence[int]) -> None:
        """Row i becomes what row ``index[i]`` was. Only rows that change place and hold something are copied: one that
        joined just now may have no slot yet. Without rows, memory is held on a GPU only, for what comes next."""
        before, self.lengths = self.lengths, [self.lengths[row] for row in index]
        if not index:
            self._room = 0
            if self._device.type == "cpu":
                self._reset()
            return
        moved = [row for row, source in enumerate(index) if row != source and before[source]]
        width = max((self.lengths[row] for row in moved), default=0)
        if width:
            self._make_room(len(index), width)
            targets, sources = (
                upload(torch.tensor(rows), self._device) for rows in (moved, [index[row] for row in moved])
            )
            for layer in self._layers:
                layer.move(targets, sources, width, before)

    def copy(self, row: int, start: int, end: int) -> list[tuple[Tensor, ...]]:
        """What is held of a row's tokens ``start``..``end`` (exclusive), layer by layer, for :meth:`paste`."""
        return [layer.copy(row, start, end) for layer in self._layers]

    def paste(self, row: int, at: int, kept: Sequence[tuple[Tensor, ...]], count: int) -> None:
        """Gives a row, from token ``at`` on, the first ``count`` tokens of a copy; that much counts as held."""
        self._make_room(row + 1, at + count)
        for layer, states in zip(self._layers, kept, strict=True):
            layer.paste(row, at, states, count, self.lengths)
        self.lengths[row] = at + count

    def erase(self, rows: Sequence[int]) -> None:
        """Empties slots for good: NaN left behind would reach the slot's next owner through masked attention."""
        for layer in self._layers:
            layer.erase([(row, self.lengths[row]) for row in rows if self.lengths[row]])

    def _layer(self) -> SlotLayer:
        make: Callable[[], SlotLayer] = SlotLayer
        return make()

    def _reset(self) -> None:
        for layer in self._layers:
            layer.reset()

    def _make_room(self, slots: int, tokens: int) -> None:
        """Says how large the buffers have to be; each layer grows when it is next written."""
        held = self._layers[0].size
        if (slots > held[0] or tokens > held[1]) and not any(self.lengths):
            self._reset()  # nothing is in them: new ones need not be as large in both ways as any have ever been
            held = 0, 0
        slots = held[0] if slots <= held[0] else max(slots, 2 * held[0])
        tokens = held[1] if tokens <= held[1] else max(tokens, 2 * held[1], _TOKENS, self._room)
        for layer in self._layers:
            layer.size = slots, tokens


class SlotLayer(DynamicLayer):
    """One layer's buffers [slots, kv heads, capacity, n]; ``keys`` and ``values`` are views of them.

    A layer that stores something else than keys and values [..., head_dim] says what in :meth:`encode` and
    :meth:`decode`.
    """

    layout: Layout
    size: tuple[int, int] = (0, 0)
    _keys: tuple[Tensor, ...] = ()
    _values: tuple[Tensor, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the buffers are as large as :attr:`size` says."""
        return bool(self._keys) and (self._keys[0].shape[0], self._keys[0].shape[2]) == self.size

    def encode(self, states: Tensor) -> tuple[Tensor, ...]:
        """What is stored of [..., tokens, head_dim]: tensors [..., tokens, n]."""
        return (states,)

    def decode(self, stored: tuple[Tensor, ...]) -> Tensor:
        """The way back."""
        return stored[0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the packed tokens [1, kv heads, N, head_dim] where they belong; returns all rows up to the width."""
        layout = self.layout.on(key_states.device)
        rows, width = len(layout.spans), layout.width
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.encode(key_states[0].transpose(0, 1)), self.encode(value_states[0].transpose(0, 1))
        if not self.fits:
            self._fit(keys, values, [span.old for span in layout.spans])
        for buffer, states in zip(self._keys + self._values, keys + values, strict=True):
            place(buffer, layout.rows, layout.positions, states)
        self.keys, self.values = (
            self.decode(tuple(buffer[:rows, :, :width] for buffer in buffers)) for buffers in (self._keys, self._values)
        )
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.layout.width if self.is_initialized else 0

    def reset(self) -> None:
        """Gives all memory back."""
        self.size, self._keys, self._values = (0, 0), (), ()
        self.keys = self.values = None
        self.is_initialized = False

    def move(self, targets: Tensor, sources: Tensor, width: int, lengths: Sequence[int]) -> None:
        """Slots ``targets`` get the first ``width`` tokens of ``sources``; slots hold ``lengths`` so far."""
        self._fit(self._keys, self._values, lengths)
        for buffer in self._keys + self._values:
            to, of = targets.to(buffer.device), sources.to(buffer.device)
            buffer[to, :, :width] = buffer[of, :, :width]

    def copy(self, row: int, start: int, end: int) -> tuple[Tensor, ...]:
        return tuple(buffer[row, :, start:end].clone() for buffer in self._keys + self._values)

    def paste(self, row: int, at: int, states: tuple[Tensor, ...], count: int, lengths: Sequence[int]) -> None:
        like = tuple(held.transpose(0, 1) for held in states)  # [tokens, heads, n], as what a forward brings
        self._fit(like[: len(like) // 2], like[len(like) // 2 :], lengths)
        for buffer, held in zip(self._keys + self._values, states, strict=True):
            buffer[row, :, at : at + count] = held[:, :count]

    def erase(self, rows: Sequence[tuple[int, int]]) -> None:
        for row, length in rows:
            for buffer in self._keys + self._values:
                buffer[row, :, :length] = 0

    def _fit(self, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], lengths: Sequence[int]) -> None:
        """Makes the buffers as large as :attr:`size` says, for what is like the given [tokens, heads, n]; what the
        slots hold stays."""
        if not self._keys:
            self._keys, self._values = (tuple(_zeros(self.size, t) for t in part) for part in (keys, values))
        elif not self.fits:
            self._keys = tuple(_grown(buffer, self.size, lengths) for buffer in self._keys)
            self._values = tuple(_grown(buffer, self.size, lengths) for buffer in self._values)


def _zeros(size: tuple[int, int], like: Tensor) -> Tensor:
    """[slots, heads, capacity, n] for what is like [tokens, heads, n]. On the CPU the system hands out large memory,
    zeroed, as it is first written: what a slot does not use yet costs neither time nor memory. Elsewhere the heads of a
    token lie side by side, as flash attention wants them."""
    shape = size[0], like.shape[1], size[1], like.shape[2]
    if not like.is_cpu:
        return like.new_zeros(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)
    count = math.prod(shape) * like.element_size()
    if count < _LARGE:
        return like.new_zeros(shape)
    try:
        memory = mmap.mmap(-1, count, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise MemoryError(f"no room for {size[0]} x {size[1]} tokens in the cache: {error}") from error
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


def _grown(buffer: Tensor, size: tuple[int, int], lengths: Sequence[int]) -> Tensor:
    grown = _zeros(size, buffer[0].transpose(0, 1))
    for slot, length in enumerate(lengths):
        if length:
            grown[slot, :, :length] = buffer[slot, :, :length]
    return grown
