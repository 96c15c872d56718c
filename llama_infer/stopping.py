"""Stopping criteria: asked on the host after every single token."""

from __future__ import annotations

from .parts import Context, SequenceView, Stop


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
    """Stops where one of the strings in ``stop`` appears, also across tokens. The text ends before it."""

    name = "text"

    def __call__(self, sequence: SequenceView) -> Stop | None:
        stops = sequence.params.get("stop") or ()
        if not stops:
            return None
        start = max(0, sequence.text_before - max(map(len, stops)) + 1)
        found = [at for at in (sequence.text.find(stop, start) for stop in stops) if at >= 0]
        return Stop("stop", min(found)) if found else None

    def hold(self, sequence: SequenceView) -> int:
        """How many characters at the end of the text may be the beginning of a stop string."""
        return max((_overlap(sequence.text, stop) for stop in sequence.params.get("stop") or ()), default=0)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of ``stop`` that ``text`` ends with."""
    tail = text[-(len(stop) - 1) :] if len(stop) > 1 else ""
    return next((n for n in range(len(tail), 0, -1) if tail.endswith(stop[:n])), 0)
