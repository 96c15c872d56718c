"""The formatter that suits the tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..types import Prompt
from .chat import DEFAULT_SYSTEM_PROMPT, ChatFormatter
from .plain import PlainFormatter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AutoFormatter:
    """``"auto"``: "chat" where the tokenizer has a template, else "plain".

    Args:
        system: the system prompt of "chat"; None or "" for none. Without a template it has no place.
    """

    def __init__(self, system: str | None = DEFAULT_SYSTEM_PROMPT) -> None:
        self.chat = ChatFormatter(system)
        self.plain = PlainFormatter()

    @property
    def system(self) -> str | None:
        """The system prompt of "chat"."""
        return self.chat.system

    def __call__(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
        """Token ids of a prompt, as the formatter that was chosen makes them."""
        templated = bool(getattr(tokenizer, "chat_template", None))
        # Without a template messages still go to "chat", whose error says what is missing.
        return (
            self.plain(prompt, tokenizer) if isinstance(prompt, str) and not templated else self.chat(prompt, tokenizer)
        )

    def __repr__(self) -> str:
        return f"AutoFormatter(system={self.system!r})"
