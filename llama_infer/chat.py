"""A conversation with memory, on top of a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .errors import PromptError
from .types import Chunk, Completion, Message, Value

if TYPE_CHECKING:
    from .pipeline import Pipeline


class Chat:
    """Turns of a user and the model. Answers that were cut short or cancelled stay in the history as far as they got.

    Args:
        pipeline: decodes; its formatter must take messages.
        system: the system prompt; None is the default one, an empty string none.
    """

    def __init__(self, pipeline: Pipeline, system: str | None = None) -> None:
        from .prompts.chat import DEFAULT_SYSTEM_PROMPT

        self.pipeline = pipeline
        self.system = DEFAULT_SYSTEM_PROMPT if system is None else system
        self._turns: list[Message] = []

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far, the system prompt first."""
        return (*([Message("system", self.system)] if self.system else []), *self._turns)

    def __call__(self, text: str, **params: Value) -> Completion:
        """The model's answer to the next turn.

        Raises as a pipeline does, and when decoding fails; the turn is forgotten then.
        """
        completion: Completion = self.pipeline(self._with(text), **params)
        if completion.error is not None:
            raise completion.error
        self._remember(text, completion.text)
        return completion

    def stream(self, text: str, **params: Value) -> Iterator[Chunk]:
        """The answer piece by piece; closing the iterator keeps what was said so far."""
        chunks = self.pipeline.stream(self._with(text), **params)  # a bad request raises here, not at the first chunk
        return self._follow(text, chunks)

    def reset(self) -> None:
        """Forgets all turns; the system prompt stays."""
        self._turns.clear()

    def _follow(self, text: str, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        answer = ""
        try:
            for chunk in chunks:
                answer += chunk.text if chunk.index == 0 else ""
                yield chunk
        except (GeneratorExit, KeyboardInterrupt):  # the listener has heard enough; after any other error we forget
            self._remember(text, answer)
            raise
        else:
            self._remember(text, answer)
        finally:
            getattr(chunks, "close", lambda: None)()

    def _with(self, text: str) -> list[Message]:
        if not isinstance(text, str):
            raise PromptError(f"a turn is a string; given: {type(text).__name__}")
        return [*self.messages, Message("user", text)]

    def _remember(self, text: str, answer: str) -> None:
        self._turns += [Message("user", text), Message("assistant", answer)]
