"""What every formatter does: checks of text and ids, and encoding under a lock."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..errors import PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SURROGATE = re.compile("[\ud800-\udfff]")

ENCODING = threading.Lock()
"""Held while a tokenizer encodes: whether it parses control tokens is a setting of the tokenizer, not of the call."""


def check_text(text: str, where: str = "the prompt") -> None:
    """Refuse text that is no Unicode: half a surrogate pair. PromptError names the place."""
    found = _SURROGATE.search(text)
    if found:
        raise PromptError(
            f"{where} has half a surrogate pair (U+{ord(found[0]):04X}) at character {found.start()}: it was cut or "
            "decoded wrongly; read the text as UTF-8"
        )


def check_ids(ids: Iterable[int], vocab_size: int | None = None) -> list[int]:
    """Token ids as a list; PromptError when there are none, or one is not in 0 to ``vocab_size - 1``."""
    checked = list(ids)
    if not checked:
        raise PromptError("the prompt has no tokens: give at least one")
    for index, token in enumerate(checked):
        if isinstance(token, bool) or not isinstance(token, int):
            raise PromptError(f"token {index} of the prompt is {token!r}: token ids are integers")
        if token < 0 or (vocab_size is not None and token >= vocab_size):
            known = "0 or more" if vocab_size is None else f"0 to {vocab_size - 1}"
            raise PromptError(f"token {index} of the prompt is {token}: the ids of this model are {known}")
    return checked


def require_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The tokenizer, or PromptError when there is none and a text was given."""
    if tokenizer is None:
        raise PromptError("the model has no tokenizer, so a prompt is a list of token ids; or name one: tokenizer=...")
    return tokenizer


def single_begin(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids with one begin-of-text at the start where text and tokenizer both brought one."""
    begin = tokenizer.bos_token_id
    while begin is not None and ids[:2] == [begin, begin]:
        ids = ids[1:]
    return ids
