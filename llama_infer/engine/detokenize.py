"""Token ids to text, one token at a time, never cutting a character.

Byte-level vocabularies (Llama 3) map each token to bytes, which an incremental UTF-8 decoder joins. Others are decoded
by the tokenizer in a short window that moves on whenever its text ends in a whole character.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"


class TextStream(Protocol):
    """The text of one sequence as it grows."""

    def push(self, token_id: int) -> str:
        """The new text that can no longer change, possibly empty."""

    def flush(self) -> str:
        """What is left at the end: one U+FFFD for a character that was cut."""

    def fork(self) -> TextStream:
        """An independent copy."""


class Detokenizer:
    """Makes the text streams of one tokenizer. Special tokens have no text. Without a tokenizer, no token has."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids) if tokenizer is not None else frozenset()
        if tokenizer is not None:
            added = getattr(tokenizer, "added_tokens_decoder", {})
            self._special |= {number for number, token in added.items() if getattr(token, "special", False)}
        self._pieces: dict[int, bytes] = {}
        self._byte_level = _is_byte_level(tokenizer)

    def stream(self) -> TextStream:
        """A stream for a new sequence."""
        if self._tokenizer is None or self._byte_level:
            return _ByteStream(self)
        return _WindowStream(self)

    def piece(self, token_id: int) -> bytes:
        """The bytes of a token of a byte-level vocabulary; none for special tokens and ids without a token."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._bytes(token_id)
        return piece

    def decode(self, token_ids: list[int]) -> str:
        """The tokenizer's own decoding of a few tokens, special ones skipped."""
        kept = [token for token in token_ids if token not in self._special]
        if self._tokenizer is None or not kept:
            return ""
        return str(self._tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _bytes(self, token_id: int) -> bytes:
        if self._tokenizer is None or token_id in self._special:
            return b""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        try:
            return bytes(_BYTE_OF[character] for character in token)
        except KeyError:  # an added token, written as plain text
            return str(token).encode()


class _ByteStream:
    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._detokenizer.piece(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)

    def fork(self) -> TextStream:
        copy = _ByteStream(self._detokenizer)
        copy._decoder.setstate(self._decoder.getstate())
        return copy


class _WindowStream:
    """Keeps the tokens since the last but one boundary: the first of them give a decoder its context (a leading space
    that it would strip), the rest is what is new."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self._context: list[int] = []
        self._new: list[int] = []

    def push(self, token_id: int) -> str:
        self._new.append(token_id)
        text = self._pending()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._context, self._new = self._new, []
        return text

    def flush(self) -> str:
        text = self._pending()
        self._context, self._new = self._new, []
        cut = len(text) - len(text.rstrip(_REPLACEMENT))
        return text[: len(text) - cut] + _REPLACEMENT if cut > 1 else text

    def fork(self) -> TextStream:
        copy = _WindowStream(self._detokenizer)
        copy._context, copy._new = list(self._context), list(self._new)
        return copy

    def _pending(self) -> str:
        known = self._detokenizer.decode(self._context)
        return self._detokenizer.decode(self._context + self._new)[len(known) :]


def _is_byte_level(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return type(getattr(backend, "decoder", None)).__name__ == "ByteLevel"


def _byte_characters() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 is itself, the rest counts up from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_characters()
