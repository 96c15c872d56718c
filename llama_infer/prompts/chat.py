"""Conversations, by the template that comes with the tokenizer."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import PromptError, UnsafeCheckpointError, UnsupportedError, suggest
from ..types import Message, Prompt
from .common import ENCODING, check_ids, check_text, require_tokenizer, single_begin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant. 你是一个乐于助人的助手。"

ROLES = ("system", "user", "assistant")


class ChatFormatter:
    """``"chat"``: messages through the tokenizer's template, up to where the assistant begins to speak.

    A text becomes a user's message after ``system``; messages are used as they are given, and get no system prompt
    added. Control tokens typed in a message are encoded as the characters that they are made of, never as the tokens.

    Args:
        system: the system prompt before a text; None or "" for none.
    """

    def __init__(self, system: str | None = DEFAULT_SYSTEM_PROMPT) -> None:
        if system is not None:
            check_text(system, "the system prompt")
        self.system = system

    def __call__(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
        """Token ids of a text or a conversation; token ids pass through.

        Raises PromptError for a conversation that cannot be continued or a template that fails, and
        UnsafeCheckpointError for a template that reaches for Python's internals.
        """
        if isinstance(prompt, str):
            opening = [Message("system", self.system)] if self.system else []
            messages: Sequence[Message] = [*opening, Message("user", prompt)]
        elif prompt and isinstance(prompt[0], Message):
            messages = prompt
        else:
            return check_ids(prompt)  # type: ignore[arg-type]
        tokenizer = require_tokenizer(tokenizer)
        check_messages(messages)
        if not tokenizer.chat_template:
            raise PromptError("the tokenizer has no chat template: give text and formatter='plain'")
        ids = _apply_template(tokenizer, [{"role": m.role, "content": m.content} for m in messages])
        return check_ids(single_begin(ids, tokenizer))

    def __repr__(self) -> str:
        return f"ChatFormatter(system={self.system!r})"


def check_messages(messages: Sequence[Message]) -> None:
    """Refuse a conversation with an unknown role, a late system prompt, or no user at its end."""
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            known = ", ".join(ROLES)
            raise PromptError(
                f"message {index} has the unknown role {message.role!r}{suggest(message.role, ROLES)} Known: {known}"
            )
        if message.role == "system" and index:
            raise PromptError(f"message {index} is from the system: only the first may be")
        check_text(message.content, f"message {index}, from the {message.role},")
    if not messages or messages[-1].role != "user":
        last = f"from the {messages[-1].role}" if messages else "missing"
        raise PromptError(f"the last message is {last}: it must be from the user, whom the answer is for")


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    import jinja2

    if "sanitize_control_tokens" not in inspect.signature(tokenizer.apply_chat_template).parameters:
        # Older transformers would swallow the argument, and a user could then end his turn and open the system's.
        raise UnsupportedError(
            f"{type(tokenizer).__name__} cannot neutralise control tokens typed in messages: upgrade transformers, or "
            "format the prompt yourself and use formatter='plain'"
        )
    try:
        with ENCODING:
            ids: Any = tokenizer.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=True, sanitize_control_tokens=True, return_dict=False
            )
    except jinja2.exceptions.SecurityError as error:
        raise UnsafeCheckpointError(
            f"the chat template reaches for Python's internals and was stopped: {error}"
        ) from error
    except Exception as error:  # a template can fail in any way that Python can
        raise PromptError(f"the chat template does not take these messages: {type(error).__name__}: {error}") from error
    return list(ids)
