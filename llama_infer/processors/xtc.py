"""XTC: exclude top choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ParameterError
from ..parts import Context, Param, Trait
from ..types import Value

if TYPE_CHECKING:
    from torch import Tensor

    from ..batch import Batch, Column
    from ..candidates import Candidates


class XTC:
    """With chance ``xtc_probability``, removes every token of probability ``xtc_threshold`` at least but the least
    likely of them (and its equals); 0 is off.

    One coin a row and step, from the stream "xtc". Nothing happens while fewer than two tokens reach the threshold, nor
    if a token of ``xtc_protected`` would go: then the row stays as it is. Unless said otherwise those are the end
    tokens and the last token of an encoded newline; ``xtc_protected=()`` protects none. 0 <= xtc_probability <= 1,
    0 <= xtc_threshold <= 1; a threshold above 0.5 has no effect. text-generation-webui PR 6335 (llama.cpp protects no
    token). Put it behind the truncations: it judges the probabilities that they leave.
    """

    name = "xtc"
    params = {
        "xtc_probability": Param(
            default=0.0,
            neutral=0.0,
            check=lambda v: 0 <= v <= 1,
            range="0 <= xtc_probability <= 1",
            help="the chance, each step, that the top choices are excluded",
        ),
        "xtc_threshold": Param(
            default=0.1,
            check=lambda v: 0 <= v <= 1,
            range="0 <= xtc_threshold <= 1",
            help="what probability makes a token a top choice",
        ),
        "xtc_protected": Param(
            default=None,
            kind=tuple,
            check=lambda v: all(type(token) is int and token >= 0 for token in v),
            range="token ids (integers from 0)",
            help="rows in which one of these would go stay as they are; unset: end tokens, newline",
        ),
    }
    traits: frozenset[Trait] = frozenset({"pure", "row_independent"})
    truncates = False

    def __init__(self, protected: Sequence[int] = (), vocab_size: int | None = None) -> None:
        self.protected = tuple(protected)
        self._vocab_size = vocab_size

    def bind(self, context: Context) -> XTC:
        """Learns the end tokens and the newline's."""
        newline: list[int] = []
        if context.tokenizer is not None:
            newline = context.tokenizer.encode("\n", add_special_tokens=False)[-1:]
        protected = dict.fromkeys((*context.end_token_ids, *newline))
        return XTC([token for token in protected if token < context.vocab_size], context.vocab_size)

    def prepare(self, name: str, values: Sequence[Value]) -> Column:
        """Protected tokens int64 [R, P], -1 behind their end; the others float32 [R]."""
        import torch

        from ..batch import Padded

        if name != "xtc_protected":
            return torch.tensor(list(values), dtype=torch.float32)
        rows = [self.protected if value is None else value for value in values]
        if self._vocab_size is not None:
            for token in (token for row in rows for token in row if token >= self._vocab_size):
                raise ParameterError(f"xtc_protected: token {token} is not in the vocabulary of {self._vocab_size}")
        return Padded.of(rows)

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V]."""
        from ..rows import likeliest
        from .moments import total

        values, ids = likeliest(logits, self._most(batch, logits.shape[1]))
        excluded = self._excluded(values, ids, total(logits)[1], self._falls(batch), batch)
        return logits.clone().scatter_(1, ids, values.masked_fill(excluded, -math.inf))

    def narrow(self, candidates: Candidates, batch: Batch) -> Candidates:
        """The same on candidates: what is excluded goes to their end. Rows whose coin falls need all that is left."""
        import numpy as np
        import torch

        from .moments import total

        window, ids, falls = candidates.tensor(), torch.from_numpy(candidates.ids), self._falls(batch)
        excluded = self._excluded(window, ids, total(window)[1], falls, batch).numpy()
        places = np.arange(excluded.shape[1]) + excluded.sum(-1, keepdims=True)
        places %= excluded.shape[1]
        values = np.take_along_axis(np.where(excluded, -np.inf, candidates.values), places, 1)
        moved = candidates._replace(values=values, ids=np.take_along_axis(candidates.ids, places, 1))
        return moved.need(~falls.numpy())

    def _most(self, batch: Batch, vocab_size: int) -> int:
        """How many tokens may reach the threshold."""
        known = batch.values.get("xtc_threshold") or batch["xtc_threshold"].tolist()
        least = max(min(value for value in known if isinstance(value, (int, float))), 1 / vocab_size)
        return min(math.floor(1 / least) + 1, vocab_size)

    def _falls(self, batch: Batch) -> Tensor:
        """The coin, bool [R, 1]: whether something may happen."""
        return (batch.uniform("xtc") < batch["xtc_probability"])[:, None]

    def _excluded(self, values: Tensor, ids: Tensor, log_total: Tensor, falls: Tensor, batch: Batch) -> Tensor:
        """Which of the likeliest tokens [R, K] go where the coin falls, bool [R, K]; ``log_total`` [R, 1] tells their
        probabilities."""
        from .moments import wide

        reach = (values >= log_total + wide(batch["xtc_threshold"]).log()[:, None]) & (values > -math.inf)
        least = values.masked_fill(~reach, math.inf).amin(-1, keepdim=True)
        excluded = (values > least) & falls
        protected = batch["xtc_protected"]
        if protected.shape[1]:
            of_them = (ids[:, :, None] == protected[:, None]).any(-1)
            excluded &= ~(excluded & of_them).any(-1, keepdim=True)
        return excluded
