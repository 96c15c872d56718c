"""What the host reads of a step, in one copy, and what is wrong with a row that has no token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..batch import Batch, Output, Plan
from ..chain import EXCLUDED, NON_FINITE, OUT_OF_RANGE, part_name
from ..errors import EmptySupportError, LlamaInferError, NonFiniteLogitsError, PartError
from ..rows import log_total
from ..transfer import download
from ..types import TokenLogprob

if TYPE_CHECKING:
    from ..parts import Strategy
    from .engine import Assembly
    from .sequence import LiveSequence


@dataclass(frozen=True)
class Readout:
    """A step on the host, a value for each row after it.

    Attributes:
        tokens: chosen, or one of the chain's codes below zero; logprobs: theirs; totals: logsumexp of the raw logits.
        branches: which sample; parents: the row that each continues, None: itself.
        top: the likeliest tokens, as many as some row asked for; None when none did.
    """

    tokens: list[int]
    logprobs: list[float]
    totals: list[float]
    branches: list[int]
    parents: list[int] | None
    top: list[list[TokenLogprob]] | None


@dataclass(frozen=True)
class Reading:
    """A step on its way to the host. ``values`` float64 [4 or 5, S]: what :class:`Readout` lists, in its order."""

    values: Tensor
    top: tuple[Tensor, Tensor, Tensor] | None
    arrived: Any = None

    def wait(self) -> Readout:
        """The one synchronisation of a step."""
        if self.arrived is not None:
            self.arrived.synchronize()
        values = self.values.tolist()
        return Readout(
            tokens=[int(token) for token in values[0]],
            logprobs=values[1],
            totals=values[2],
            branches=[int(branch) for branch in values[3]],
            parents=[int(parent) for parent in values[4]] if len(values) > 4 else None,
            top=None if self.top is None else _top(*self.top),
        )


def read(plan: Plan, output: Output, rows_before: int, table: Batch) -> Reading:
    """Sends what the host needs of a step on its way. ``table`` is the one after it."""
    source = output.index(rows_before)
    source = source if plan.parents is None else source[plan.parents]
    tokens = plan.tokens[:, 0]
    logits = output.logits
    totals = log_total(logits) if output.totals is None else output.totals
    total = totals[source]
    chosen = logits[source, tokens.clamp(0, logits.shape[1] - 1)]
    columns = [tokens, chosen - total, total, table.branch]
    if plan.parents is not None:
        columns.append(plan.parents)
    sent = [torch.stack([column.double() for column in columns])]
    count = max((n for n in table.values.get("logprobs", frozenset()) if isinstance(n, int)), default=0)
    if count:
        best = logits.topk(min(count, logits.shape[1]))
        sent += [best.indices, best.values - totals[:, None], source]
    values, *top = [download(tensor) for tensor in sent]
    arrived = torch.cuda.current_stream(logits.device).record_event() if logits.is_cuda else None
    return Reading(values, (top[0], top[1], top[2]) if top else None, arrived)


def check_plan(plan: Plan, batch: Batch, strategy: Strategy, ahead: bool) -> None:
    """PartError for a plan that the engine cannot carry out; ``ahead``: nor one that moves rows."""
    rows = len(batch) if plan.parents is None else len(plan.parents)
    if plan.tokens.shape != (rows, 1) or plan.tokens.dtype != torch.int64:
        raise PartError(
            f"strategy {part_name(strategy)} planned a {plan.tokens.dtype} tensor of shape {list(plan.tokens.shape)}; "
            f"this engine takes one int64 token a row and step: [{rows}, 1]"
        )
    if ahead and plan.parents is not None:
        raise PartError(f"strategy {part_name(strategy)} moved rows of which its forks() said that they stay")


def failure(assembly: Assembly, sequence: LiveSequence, token: int, total: float) -> LlamaInferError:
    """Why a row got no token."""
    where = f"request {sequence.task.request.id!r}, step {len(sequence.token_ids)}"
    if token == OUT_OF_RANGE:
        return PartError(
            f"{where}: sampler {part_name(assembly.chain.sampler)} chose a token id outside of the vocabulary of "
            f"{assembly.vocab_size}"
        )
    if token == EXCLUDED or total == -math.inf:
        return EmptySupportError(
            f"{where}: no token is left to choose from; every logit is -inf after the processors. "
            "Loosen the bans or truncations of this request"
        )
    stage = "after the processors" if token == NON_FINITE and math.isfinite(total) else "of the model"
    return NonFiniteLogitsError(f"{where}: NaN or +inf among the logits {stage}")


def _top(ids: Tensor, logprobs: Tensor, source: Tensor) -> list[list[TokenLogprob]]:
    """The likeliest tokens of each row under the raw distribution; ``source`` is its row of logits."""
    pairs = zip(ids.tolist(), logprobs.tolist(), strict=True)
    rows = [[TokenLogprob(i, p) for i, p in zip(*pair, strict=True)] for pair in pairs]
    return [rows[at] for at in source.tolist()]
