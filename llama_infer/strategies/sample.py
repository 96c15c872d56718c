"""One token a row and step; ``n`` samples of a prompt share its prefill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..parts import SequenceView
from ..types import Value

if TYPE_CHECKING:
    from torch import Tensor

    from ..batch import Batch, Column, Output, Plan
    from ..chain import Chain


class Sample:
    """The chain's choice in each row: greedy or sampling, as the sampler has it."""

    name = "sample"

    def width(self, params: Mapping[str, Value]) -> int:
        """A row for each of the ``n`` samples."""
        return int(params["n"])

    def forks(self, sequence: SequenceView) -> bool:
        """Whether its row may become several in the next step."""
        return sequence.params["n"] != 1 and not sequence.token_ids

    def step(self, output: Output, batch: Batch, chain: Chain) -> Plan:
        """Forks a row into its ``n`` samples when its prompt has been fed, then chooses a token in each."""
        import torch

        from ..batch import Output, Plan

        parents = _forks(output, batch)
        if parents is not None:
            source = output.index(len(batch))[parents]
            batch = batch.fork(parents)
            ready = None if output.rows is None else (source >= 0).nonzero()[:, 0]
            output = Output(output.logits[source if ready is None else source[ready]], ready)
        tokens, columns = chain(output.logits, batch.at(output))
        if output.rows is None:
            return Plan(tokens[:, None], parents, columns)
        # Rows that are still being fed get no token and keep their state.
        everything = torch.full((len(batch), 1), -1, dtype=torch.int64, device=tokens.device)
        everything[output.rows, 0] = tokens
        merged = {
            name: _merge(batch.columns[name], column, output.rows, len(batch)) for name, column in columns.items()
        }
        return Plan(everything, parents, merged)

    def rank(self, sequences: Sequence[SequenceView]) -> Sequence[SequenceView]:
        """In the order of their branches, which is the order given."""
        return sequences


def _forks(output: Output, batch: Batch) -> Tensor | None:
    """Parents of the next table when some prompt has just been fed that wants several samples: the rows as they are,
    then the further samples (so that nobody else changes place)."""
    import torch

    if batch.all_equal("n", 1):
        return None
    fed = (batch.length == batch.prompt_length) & (output.index(len(batch)) >= 0)
    further = (batch["n"] - 1).where(fed, 0)
    rows = torch.arange(len(batch), device=batch.device)
    extra = rows.repeat_interleave(further)
    return torch.cat([rows, extra]) if len(extra) else None


def _merge(old: Column, new: Column, rows: Tensor, count: int) -> Column:
    """The old column of ``count`` rows with the values of ``rows`` replaced."""
    import torch

    from ..batch import extend, select

    index = torch.arange(count, device=rows.device)
    index[rows] = torch.arange(count, count + len(rows), device=rows.device)
    return select(extend(old, new), index)
