"""The host side of a row: ids become text, text may stop, chunks go out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import LlamaInferError
from ..parts import Stop
from ..types import Chunk, Completion, FinishReason, Request, TokenLogprob, Value
from .detokenize import TextStream

if TYPE_CHECKING:
    from ..batch import Batch


@dataclass
class Task:
    """A request while it is being served.

    Attributes:
        number: equal for all rows of the request and for no other live one.
        width: rows that it may hold at once.
        running: how many of its sequences are live; finished: the others.
        kept: whether the prefix cache has had its prompt.
        parked: its sequences and their rows of the table while it waits to go on after it had to give way.
    """

    request: Request
    number: int
    params: Mapping[str, Value]
    prompt_token_ids: tuple[int, ...]
    seed: int
    width: int
    running: int = 1
    finished: list[LiveSequence] = field(default_factory=list)
    kept: bool = False
    parked: tuple[list[LiveSequence], Batch] | None = None


def own_criteria(criteria: Sequence[Any]) -> list[Any]:
    """The criteria for one more sequence: a copy of those with a memory."""
    return [copy.deepcopy(c) if getattr(c, "stateful", False) else c for c in criteria]


class LiveSequence:
    """One sample of a request: what stopping criteria see, and what becomes a completion."""

    def __init__(self, task: Task, stream: TextStream, criteria: Sequence[Any]) -> None:
        self.task = task
        self.branch = 0
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[tuple[TokenLogprob, ...]] = []
        self.text = ""
        self.text_before = 0
        self.finish_reason: FinishReason | None = None
        self.error: LlamaInferError | None = None
        self.cached = 0  # tokens taken over from the prefix cache
        self.frontier: Any = None  # the first block that it did not know
        self.ahead = 0  # tokens that are chosen on the device and that the host has not read yet
        self._stream = stream
        self._criteria = criteria
        self._emitted = 0
        self._unsent: list[int] = []

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The prompt's tokens."""
        return self.task.prompt_token_ids

    @property
    def params(self) -> Mapping[str, Value]:
        """Every parameter's effective value."""
        return self.task.params

    @property
    def known(self) -> int:
        """How many tokens there are, prompt and answer, those included that the host has not read yet."""
        return len(self.task.prompt_token_ids) + len(self.token_ids) + self.ahead

    def ends_unread(self, context_length: int) -> bool:
        """Whether a token that the host has not read is the last one that there is room for."""
        limit = self.params.get("max_new_tokens")
        full = limit is not None and len(self.token_ids) + self.ahead >= int(limit)
        return self.ahead > 0 and (full or self.known >= context_length)

    def tokens(self) -> tuple[int, ...]:
        """Prompt and answer."""
        return (*self.task.prompt_token_ids, *self.token_ids)

    def fork(self) -> LiveSequence:
        """A sibling with the same past."""
        twin = copy.copy(self)
        twin.token_ids, twin.logprobs = list(self.token_ids), list(self.logprobs)
        twin.top_logprobs, twin._unsent = list(self.top_logprobs), list(self._unsent)
        twin._stream = self._stream.fork()
        twin._criteria = own_criteria(self._criteria)
        return twin

    def append(self, token_id: int, logprob: float, top: tuple[TokenLogprob, ...]) -> Chunk:
        """Takes a token, asks the criteria, and returns what can be sent."""
        self.token_ids.append(token_id)
        self._unsent.append(token_id)
        self.logprobs.append(logprob)
        if top:
            self.top_logprobs.append(top)
        self.text_before = len(self.text)
        self.text += self._stream.push(token_id)
        stop = self._ask()
        if stop is not None:
            return self.finish(stop.reason, stop.text_end)
        held = max((c.hold(self) for c in self._criteria if hasattr(c, "hold")), default=0)
        return self._chunk(len(self.text) - held)

    def finish(self, reason: FinishReason, text_end: int | None = None, error: LlamaInferError | None = None) -> Chunk:
        """Ends the sequence and returns its last chunk."""
        self.text = self.text + self._stream.flush() if text_end is None else self.text[:text_end]
        self.finish_reason, self.error = reason, error
        return self._chunk(len(self.text))

    def completion(self, request: Request, alternatives: tuple[Completion, ...] = ()) -> Completion:
        """The sequence as a result."""
        return Completion(
            request=request,
            text=self.text,
            prompt_token_ids=self.prompt_token_ids,
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            top_logprobs=tuple(self.top_logprobs),
            seed=self.task.seed,
            finish_reason=self.finish_reason or "abort",
            error=self.error,
            cached_tokens=min(self.cached, len(self.prompt_token_ids)),
            alternatives=alternatives,
        )

    def _ask(self) -> Stop | None:
        """What the criteria say: "stop" before "length", and of several the one that keeps the least text."""
        answers = [criterion(self) for criterion in self._criteria]
        stops = [answer if isinstance(answer, Stop) else Stop() for answer in answers if answer]
        whole = len(self.text)
        return min(stops, key=lambda s: (s.reason != "stop", whole if s.text_end is None else s.text_end), default=None)

    def _chunk(self, end: int) -> Chunk:
        start, self._emitted = self._emitted, max(end, self._emitted)
        tokens, self._unsent = tuple(self._unsent), []
        return Chunk(self.task.request.id, self.branch, self.text[start : self._emitted], tokens, self.finish_reason)
