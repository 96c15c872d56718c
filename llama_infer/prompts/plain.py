"""Text as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import PromptError
from ..types import Message, Prompt
from .common import ENCODING, check_ids, check_text, require_tokenizer, single_begin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PlainFormatter:
    """``"plain"``: the text and nothing else, for base models and for prompts that are formatted by hand.

    Control tokens written in the text **are** parsed, so text of strangers belongs in ``"chat"``. The tokenizer's own
    rule adds a begin-of-text; a text that starts with one does not get a second.
    """

    def __call__(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
        """Token ids of a text; token ids pass through. PromptError for messages and for what has no tokens."""
        if not isinstance(prompt, str):
            if prompt and isinstance(prompt[0], Message):
                raise PromptError("the formatter 'plain' takes text, and messages were given: use formatter='chat'")
            return check_ids(prompt)  # type: ignore[arg-type]
        tokenizer = require_tokenizer(tokenizer)
        check_text(prompt)
        with ENCODING:
            ids = tokenizer(prompt, add_special_tokens=True, split_special_tokens=False, verbose=False)["input_ids"]
        return check_ids(single_begin(list(ids), tokenizer))

    def __repr__(self) -> str:
        return "PlainFormatter()"
