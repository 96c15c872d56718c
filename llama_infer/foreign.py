"""transformers' own ``LogitsProcessor`` and ``StoppingCriteria`` objects in our slots, one unpadded row at a time."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import UnsupportedError
from .parts import SequenceView, Stop

if TYPE_CHECKING:
    from torch import Tensor

    from .batch import Batch, Column

_BOUND_TO_A_BATCH = {
    "MinNewTokensLengthLogitsProcessor": "use the parameter min_new_tokens",
    "ExponentialDecayLengthPenalty": "use the parameter exponential_decay_length_penalty",
    "SuppressTokensAtBeginLogitsProcessor": "use the parameter begin_suppress_tokens",
    "PrefixConstrainedLogitsProcessor": "write a processor that reads batch.tokens",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance needs a strategy of its own",
}


def adapt_processor(part: Any) -> Any:
    """A transformers processor as a processor of ours; anything else as it is."""
    if not _descends_from(part, "LogitsProcessor", "LogitsProcessorList"):
        return part
    for member in part if isinstance(part, list) else [part]:
        name = type(member).__name__
        if name in _BOUND_TO_A_BATCH:
            raise UnsupportedError(
                f"transformers' {name} is bound to the lengths or places of a batch, which differ by row here: "
                f"{_BOUND_TO_A_BATCH[name]}"
            )
    return TransformersProcessor(part)


def adapt_criterion(part: Any) -> Any:
    """A transformers stopping criterion as a criterion of ours; anything else as it is."""
    return TransformersCriterion(part) if _descends_from(part, "StoppingCriteria", "StoppingCriteriaList") else part


def _descends_from(part: Any, *names: str) -> bool:
    """Tells without importing transformers, which a part from there has done already."""
    return any(cls.__name__ in names and cls.__module__.startswith("transformers.") for cls in type(part).__mro__)


@dataclass(frozen=True)
class Objects:
    """A column of Python objects, a copy of its own for each row."""

    items: tuple[Any, ...]

    def select(self, index: Tensor) -> Objects:
        """The rows' objects; a row that is taken twice gets a copy."""
        taken: set[int] = set()
        items = []
        for row in index.tolist():
            items.append(copy.deepcopy(self.items[row]) if row in taken else self.items[row])
            taken.add(row)
        return Objects(tuple(items))

    def extend(self, other: Objects) -> Objects:
        """With the other's rows behind."""
        return Objects(self.items + other.items)


class TransformersProcessor:
    """Calls a transformers processor with ``input_ids`` [1, n] and scores [1, V] of one row after another.

    Each row has a deep copy of its own, so that a processor with memory keeps requests apart. ``note`` says what that
    costs, and the pipeline's notes repeat it.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.name = type(processor).__name__
        self.note = (
            f"{self.name} is transformers' own: it costs a call a row and step on the whole vocabulary, a copy a "
            "request, and one more look at the device a step; a processor of this package serves all rows at once"
        )
        self._column = f"transformers.{self.name}.{id(self)}"

    def state(self, batch: Batch) -> Mapping[str, Column]:
        """A copy of the processor for each row."""
        return {self._column: Objects(tuple(copy.deepcopy(self.processor) for _ in range(len(batch))))}

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V]."""
        import torch

        processors = batch.columns[self._column]
        items = processors.items if isinstance(processors, Objects) else ()
        rows = []
        for row, (processor, length) in enumerate(zip(items, batch.length.tolist(), strict=True)):
            rows.append(processor(batch.tokens[row : row + 1, :length], logits[row : row + 1]))
        return torch.cat(rows)


class TransformersCriterion:
    """Asks a transformers criterion about one row [1, n], prompt included. It gets no scores. A copy a sequence."""

    stateful = True

    def __init__(self, criterion: Any) -> None:
        self.criterion = criterion
        self.name = type(criterion).__name__

    def __call__(self, sequence: SequenceView) -> Stop | None:
        import torch

        ids = torch.tensor([[*sequence.prompt_token_ids, *sequence.token_ids]])
        done = self.criterion(ids, None)
        return Stop("stop") if bool(torch.as_tensor(done).all()) else None
