"""Stopping criteria: asked on the host after every single token.

Each reads its parameters from ``sequence.params`` and returns at once where they are unset. A criterion that cuts text
says by ``hold`` how much of the text's end it may still cut; that much is not sent yet. What is cut does not depend on
how the text was divided into tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from .parts import Context, Param, SequenceView, Stop
from .patterns import Pattern, State
from .types import Value

INCLUDE = Param(default=False, help="keep the stop string or match at the end of the text")
"""Shared by what cuts the text."""


class EndTokens:
    """Stops at any of the checkpoint's end tokens. The token stays in ``token_ids``; the text does not have it."""

    name = "end"

    def __init__(self, end_token_ids: tuple[int, ...] = ()) -> None:
        self.end_token_ids = frozenset(end_token_ids)

    def bind(self, context: Context) -> EndTokens:
        """Learns the end tokens."""
        return EndTokens(context.end_token_ids)

    def __call__(self, sequence: SequenceView) -> Stop | None:
        if sequence.token_ids[-1] not in self.end_token_ids:
            return None
        # Special tokens have no text; for one that has, the text ends before it.
        has_text = len(sequence.text) > sequence.text_before
        return Stop("stop", sequence.text_before if has_text else None)


class Length:
    """Stops after ``max_new_tokens``, or where the model's context ends."""

    name = "length"

    def __init__(self, context_length: int = 1 << 30) -> None:
        self.context_length = context_length

    def bind(self, context: Context) -> Length:
        """Learns the context's length."""
        return Length(context.context_length)

    def __call__(self, sequence: SequenceView) -> Stop | None:
        limit = self.context_length - len(sequence.prompt_token_ids)
        asked = sequence.params.get("max_new_tokens")
        return Stop("length") if len(sequence.token_ids) >= min(limit, limit if asked is None else asked) else None


class StopStrings:
    """Stops where one of the strings in ``stop`` appears, also across tokens.

    The string that is complete first counts, of several with the same end the longest. The text ends before it, or
    behind it with ``include_stop_str_in_output`` (vLLM's name); nothing needs to be held back then.
    """

    name = "text"
    params = {"include_stop_str_in_output": INCLUDE}

    def __call__(self, sequence: SequenceView) -> Stop | None:
        stops = sequence.params.get("stop") or ()
        found = [place for stop in stops if (place := _first_end(sequence, stop)) is not None]
        if not found:
            return None
        end, start = min(found)
        return Stop("stop", end if sequence.params.get("include_stop_str_in_output") else start)

    def hold(self, sequence: SequenceView) -> int:
        """How many characters at the end of the text may be the beginning of a stop string."""
        stops = sequence.params.get("stop") or ()
        if not stops or sequence.params.get("include_stop_str_in_output"):
            return 0
        return max(_overlap(sequence.text, stop) for stop in stops)


def _first_end(sequence: SequenceView, stop: str) -> tuple[int, int] | None:
    """Where the first occurrence that the last token completed ends and starts."""
    at = sequence.text.find(stop, max(0, sequence.text_before - len(stop) + 1))
    return (at + len(stop), at) if at >= 0 else None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of ``stop`` that ``text`` ends with."""
    tail = text[-(len(stop) - 1) :] if len(stop) > 1 else ""
    return next((n for n in range(len(tail), 0, -1) if tail.endswith(stop[:n])), 0)


class _Patterns(Param):
    """A parameter whose message says what is wrong with a pattern, and where."""

    __slots__ = ()

    def validate(self, name: str, value: Value) -> Value:
        patterns = super().validate(name, value)
        for pattern in patterns:
            Pattern.of(pattern)
        return patterns


class StopRegex:
    """Stops where one of the patterns in ``stop_regex`` matches, also across tokens.

    As soon as some piece of the text matches a pattern completely, the text ends before that piece, or behind it with
    ``include_stop_str_in_output``; of several pieces with the same end the one that starts first. So ``x+`` stops at
    the first ``x``. Exactly the text that may still become a match is held back; a pattern with an open end such as
    ``<a>(?s:.)*</a>`` may hold back a lot, one with a bound (``.{0,80}``) no more than that.

    The syntax is that of :mod:`re` without anchors, lookarounds, back references and possessive forms (lazy and greedy
    are the same here). The time for a character is bounded for every pattern.
    """

    name = "regex"
    params = {
        "stop_regex": _Patterns(
            default=(),
            neutral=(),
            range="patterns that match some text, and not the empty one",
            help="patterns that end the answer",
        ),
        "include_stop_str_in_output": INCLUDE,
    }

    def __init__(self) -> None:
        self._runs: WeakKeyDictionary[SequenceView, _Run] = WeakKeyDictionary()

    def __call__(self, sequence: SequenceView) -> Stop | None:
        patterns = sequence.params.get("stop_regex") or ()
        if not patterns:
            return None
        found = self._run(sequence, patterns).found
        if found is None:
            return None
        end, start = found
        return Stop("stop", end if sequence.params.get("include_stop_str_in_output") else start)

    def hold(self, sequence: SequenceView) -> int:
        """How many characters at the end of the text may be the beginning of a match."""
        patterns = sequence.params.get("stop_regex") or ()
        if not patterns or sequence.params.get("include_stop_str_in_output"):
            return 0
        run = self._run(sequence, patterns)
        return len(sequence.text) - min((min(s.values()) for s in run.states if s), default=len(sequence.text))

    def __deepcopy__(self, memo: dict[int, Any]) -> StopRegex:
        return StopRegex()

    def __reduce__(self) -> tuple[type[StopRegex], tuple[()]]:
        return StopRegex, ()

    def _run(self, sequence: SequenceView, patterns: tuple[str, ...]) -> _Run:
        """Where the sequence's matches stand, brought up to its text; begun anew for a sequence not seen before."""
        run = self._runs.get(sequence)
        if run is None or not sequence.text.startswith(run.tail, max(0, run.read - len(run.tail))):
            run = self._runs[sequence] = _Run([Pattern.of(pattern) for pattern in patterns])
        run.feed(sequence.text)
        return run


class _Run:
    """The matches under way in one text: for each pattern, its states and where the earliest match in each began."""

    def __init__(self, patterns: list[Pattern]) -> None:
        self.patterns = patterns
        self.states: list[State] = [{} for _ in patterns]
        self.read = 0
        self.tail = ""
        self.found: tuple[int, int] | None = None

    def feed(self, text: str) -> None:
        for at in range(self.read, len(text)):
            if self.found is not None:
                return
            steps = [
                pattern.step(state, text[at], at) for pattern, state in zip(self.patterns, self.states, strict=True)
            ]
            self.states = [state for state, _ in steps]
            starts = [start for _, start in steps if start is not None]
            self.read = at + 1
            if starts:
                self.found = self.read, min(starts)
        self.tail = text[max(0, self.read - 8) : self.read]


class MaxTime:
    """Stops once ``max_time`` seconds, from 0, have passed since the request was admitted (transformers' MaxTime).

    Asked after each token, so that at least one comes and the last may come late by a step. The clock is monotonic.
    Used alone, outside of an engine, the time runs from the first question.
    """

    name = "max_time"
    stateful = True
    params = {
        "max_time": Param(
            default=None,
            kind=float,
            check=lambda v: v >= 0,
            range="max_time >= 0 (seconds)",
            help="seconds after which the answer ends; unset: no limit",
        )
    }

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start: float | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> MaxTime:
        """A sequence's own; the engine takes it when it admits the request, and that starts the time."""
        own = MaxTime(self._clock)
        own._start = self._clock() if self._start is None else self._start
        return own

    def __call__(self, sequence: SequenceView) -> Stop | None:
        limit = sequence.params.get("max_time")
        if limit is None or limit == math.inf:
            return None
        now = self._clock()
        if self._start is None:
            self._start = now
        return Stop("length") if now - self._start >= limit else None


class Loops:
    """Stops when the answer goes round in circles: its last tokens are one piece repeated ``loop_repeats`` times.

    The piece has 1 to ``loop_max_period`` tokens and the whole loop at least ``loop_min_tokens``: with a piece of p
    tokens, the last max(p * loop_repeats, loop_min_tokens) tokens of the answer have the period p. 0 turns it off. The
    text keeps the loop.
    """

    name = "loops"
    params = {
        "loop_repeats": Param(
            default=0,
            neutral=0,
            check=lambda v: v == 0 or 2 <= v <= 10_000,
            range="0 (off) or 2 <= loop_repeats <= 10000",
            help="stop when the last tokens are one piece so many times; 0: never",
        ),
        "loop_min_tokens": Param(
            default=16,
            check=lambda v: 0 <= v <= 1_000_000,
            range="0 <= loop_min_tokens <= 1000000",
            help="a loop has at least so many tokens",
        ),
        "loop_max_period": Param(
            default=64,
            check=lambda v: 1 <= v <= 1024,
            range="1 <= loop_max_period <= 1024",
            help="the repeated piece has at most so many tokens",
        ),
    }

    def __call__(self, sequence: SequenceView) -> Stop | None:
        repeats = sequence.params.get("loop_repeats") or 0
        if not repeats:
            return None
        tokens = sequence.token_ids
        shortest = _value(sequence.params, "loop_min_tokens")
        last = tokens[-1]
        for period in range(1, min(_value(sequence.params, "loop_max_period"), len(tokens) // repeats) + 1):
            length = max(period * repeats, shortest)
            # The two looks at single tokens tell nearly always; slices are compared for the rest.
            if length > len(tokens) or tokens[-1 - period] != last or tokens[-length] != tokens[period - length]:
                continue
            if tokens[-length:-period] == tokens[period - length :]:
                return Stop("stop")
        return None


def _value(params: Mapping[str, Value], name: str) -> int:
    return int(params.get(name, Loops.params[name].default))
