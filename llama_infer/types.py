"""What goes into the library and what comes out of it: plain frozen data, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from .errors import LlamaInferError, PromptError

if TYPE_CHECKING:
    from transformers import GenerationConfig

Value: TypeAlias = Any
"""A parameter's value: a number, a string, a boolean, a tuple of those, or a mapping. Never a callable."""

FinishReason: TypeAlias = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. ``role`` is ``"system"``, ``"user"`` or ``"assistant"``."""

    role: str
    content: str


Prompt: TypeAlias = str | tuple[Message, ...] | tuple[int, ...]
"""Text, a conversation, or token ids."""

PromptLike: TypeAlias = str | Sequence[Message] | Sequence[Mapping[str, str]] | Sequence[int]
"""What is accepted where a prompt is asked for; :func:`as_prompt` makes a :data:`Prompt` of it."""


def as_prompt(given: Any) -> Prompt:
    """One prompt out of a string, a list of message dicts (or :class:`Message`), or a list of token ids.

    Raises :class:`PromptError` for anything else, an empty list included.
    """
    if isinstance(given, str):
        return given
    if hasattr(given, "tolist"):  # a tensor or an array of ids
        given = given.tolist()
    if isinstance(given, Sequence) and not isinstance(given, bytes):
        if not given:
            raise PromptError("an empty list is not a prompt: give a string, message dicts or token ids")
        if all(isinstance(item, int) and not isinstance(item, bool) for item in given):
            return tuple(given)
        if all(isinstance(item, (Message, Mapping)) for item in given):
            return tuple(_as_message(item) for item in given)
    raise PromptError(
        f"{type(given).__name__} is not a prompt: give a string, a list of message dicts with 'role' and 'content', "
        "or a list of token ids (integers)"
    )


def _as_message(given: Message | Mapping[str, Any]) -> Message:
    if isinstance(given, Message):
        message = given
    else:
        if set(given) != {"role", "content"}:
            raise PromptError(f"a message has the keys 'role' and 'content'; given: {sorted(map(str, given))}")
        message = Message(given["role"], given["content"])
    if not isinstance(message.role, str) or not isinstance(message.content, str):
        raise PromptError(f"'role' and 'content' of a message are strings; given: {message!r}")
    return message


@dataclass(frozen=True)
class Request:
    """One prompt and the parameters that it overrides.

    Args:
        prompt: text, a list of messages, or a list of token ids (made a tuple here).
        params: parameter values by name, or a transformers ``GenerationConfig``. Checked when the request joins a
            pipeline, because only a pipeline knows which parameters exist.
        id: names the request in events and completions; dealt by the engine when empty.
    """

    prompt: Prompt
    params: Mapping[str, Value] | GenerationConfig = field(default_factory=dict)
    id: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", as_prompt(self.prompt))
        if isinstance(self.params, Mapping):
            object.__setattr__(self, "params", MappingProxyType(dict(self.params)))


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its natural-log probability under the model's raw distribution."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class Completion:
    """The answer to a :class:`Request`.

    Attributes:
        request: what was asked.
        text: the answer; the end token and a stop string are not part of it.
        prompt_token_ids: what the model was given.
        token_ids: what it answered, the end token included.
        logprobs: of each of ``token_ids`` under the model's raw distribution (before any processor).
        top_logprobs: for each token the ``logprobs=n`` likeliest tokens, likeliest first; empty unless asked.
        seed: replays this completion, also when the request brought none.
        finish_reason: "stop" (end token, stop string, criterion), "length" (``max_new_tokens`` or the context),
            "abort" (cancelled) or "error".
        error: why, when ``finish_reason`` is "error".
        cached_tokens: how many tokens of the prompt were not fed, because an earlier request had begun with them.
        alternatives: the further samples of ``n``, in order.
    """

    request: Request
    text: str = ""
    prompt_token_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()
    seed: int = 0
    finish_reason: FinishReason = "stop"
    error: LlamaInferError | None = None
    cached_tokens: int = 0
    alternatives: tuple[Completion, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer that can no longer change. Concatenated, the texts of a request are its final text.

    Attributes:
        id: the request's.
        index: which of the ``n`` samples, 0 for the first.
        text: new text, possibly empty (inside a character, or while it may become a stop string).
        token_ids: the tokens settled since the last chunk.
        finish_reason: set on the last chunk of a sample.
    """

    id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None


Event: TypeAlias = Chunk | Completion
"""What a step of an engine yields."""
