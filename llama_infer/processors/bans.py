"""Bans and biases that depend on the history, lists of banned or allowed tokens, and forced tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ParameterError
from ..history import HISTORY_ONLY
from ..parameters import ENGINE_PARAMS
from ..parts import Context, Param
from ..types import Value
from .penalties import IN_PLACE, largest, last_tokens, numbers
from .sequences import WILDCARD, Sequences

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..batch import Batch, Column


def is_token(value: Any) -> bool:
    """Whether this can be a token id."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def are_tokens(value: Any) -> bool:
    """Whether this is a sequence of token ids."""
    return isinstance(value, (tuple, list)) and all(map(is_token, value))


def _is_sequence_bias(value: Mapping[Any, Any]) -> bool:
    return all(
        are_tokens(sequence)
        and sequence
        and isinstance(bias, (int, float))
        and not isinstance(bias, bool)
        and not math.isnan(bias)
        and bias != math.inf
        for sequence, bias in value.items()
    )


def check_vocabulary(name: str, tokens: Iterable[int], context: Context | None) -> None:
    """Raises ParameterError for a token id that the model does not have."""
    for token in tokens:
        if context is not None and token >= context.vocab_size:
            raise ParameterError(f"{name}: token {token} is not in the vocabulary of {context.vocab_size}")


def device_of(context: Context | None) -> torch.device | str:
    """Where a column of our own has to be."""
    return "cpu" if context is None else context.device


def encode(name: str, text: str, context: Context | None) -> tuple[int, ...]:
    """The tokens of a string. Raises ParameterError without a tokenizer."""
    tokenizer: Any = context.tokenizer if context else None
    if tokenizer is None:
        raise ParameterError(f"{name}: {text!r} is a string and there is no tokenizer for it: give token ids")
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


class NoRepeatNgram:
    """Bans each token that would complete an n-gram which the context, prompt included, has already.

    As transformers' ``NoRepeatNGramLogitsProcessor``. no_repeat_ngram_size: from 1; 1 bans every token of the context,
    0 is neutral.
    """

    name = "no_repeat_ngram_size"
    params = {
        "no_repeat_ngram_size": Param(
            default=0,
            neutral=0,
            check=lambda v: v >= 0,
            range="no_repeat_ngram_size >= 0",
            help="no n tokens in a row occur twice; 0 is off",
        )
    }
    traits = HISTORY_ONLY

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V], in place."""
        size = batch["no_repeat_ngram_size"][:, None]
        tokens = batch.tokens
        count = min(largest(batch, "no_repeat_ngram_size"), batch.width)
        repeats = (size > 0) & (size <= batch.width) & (tokens >= 0)
        tail = last_tokens(tokens, batch.length, max(count - 1, 0))
        for back in range(1, count):
            # One column after another: the tokens before position i must be the row's last ones.
            unasked = size <= back
            repeats[:, :back] &= unasked
            repeats[:, back:] &= (tokens[:, :-back] == tail[:, back - 1 : back]) | unasked
        return logits.scatter_add_(1, tokens.clamp(min=0), _banned(repeats, logits))


class SequenceBias:
    """Adds a number to the logit of the token that completes a given sequence: ``sequence_bias={(5, 8): -2.0}``.

    The sequence's other tokens must be the context's last ones, prompt included; a sequence of one token always counts.
    ``-inf`` bans. As transformers' ``SequenceBiasLogitsProcessor``. Neutral: ``{}``.
    """

    name = "sequence_bias"
    params = {
        "sequence_bias": Param(
            default={},
            neutral={},
            check=_is_sequence_bias,
            range="non-empty tuples of token ids (integers from 0) to numbers, -inf included",
            help="added to the logit of the token that completes a sequence of token ids",
        )
    }
    traits = IN_PLACE

    def __init__(self, context: Context | None = None) -> None:
        self._context = context

    def bind(self, context: Context) -> SequenceBias:
        """Learns how many tokens there are, to refuse ids beyond them."""
        return SequenceBias(context)

    def prepare(self, name: str, values: Sequence[Value]) -> Column:
        """The sequences of each row."""
        for value in values:
            check_vocabulary(name, (token for sequence in value for token in sequence), self._context)
        rows = [[(tuple(sequence), bias) for sequence, bias in value.items()] for value in values]
        return Sequences.of(rows).to(device_of(self._context))

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V], in place."""
        return _add_biases(logits, batch, "sequence_bias")


class BadWords:
    """Bans the token that would complete a given word.

    bad_words: strings, banned in the tokens that the tokenizer gives them with and without a leading space. The same
    letters cut into tokens differently pass: this is a ban on tokens, not on text. bad_words_ids: sequences of token
    ids, as transformers' ``NoBadWordsLogitsProcessor`` (which leaves out end tokens; here they are banned like any
    other). Neutral: ``()``.
    """

    name = "bad_words"
    params = {
        "bad_words": Param(
            default=(),
            neutral=(),
            check=lambda v: all(isinstance(word, str) and word for word in v),
            range="non-empty strings",
            help="words that the answer must not have",
        ),
        "bad_words_ids": Param(
            default=(),
            neutral=(),
            check=lambda v: all(are_tokens(word) and word for word in v),
            range="non-empty tuples of token ids",
            help="sequences of token ids that the answer must not have",
        ),
    }
    traits = IN_PLACE

    def __init__(self, context: Context | None = None) -> None:
        self._context = context

    def bind(self, context: Context) -> BadWords:
        """Learns the tokenizer and how many tokens there are."""
        return BadWords(context)

    def prepare(self, name: str, values: Sequence[Value]) -> Column:
        """The banned sequences of each row."""
        rows = [self._spellings(value) if name == "bad_words" else tuple(map(tuple, value)) for value in values]
        for row in rows:
            check_vocabulary(name, (token for word in row for token in word), self._context)
        banned = [[(word, -math.inf) for word in dict.fromkeys(row)] for row in rows]
        return Sequences.of(banned).to(device_of(self._context))

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V], in place."""
        for name in self.params:
            if not batch.all_equal(name, ()):
                logits = _add_biases(logits, batch, name)
        return logits

    def _spellings(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        spelled = [encode("bad_words", text, self._context) for word in words for text in (word, f" {word.lstrip()}")]
        return tuple(tokens for tokens in spelled if tokens)


class _TokenList:
    """A part whose parameter is a list of token ids."""

    def __init__(self, context: Context | None = None) -> None:
        self._context = context

    def bind(self, context: Context) -> Any:
        """Learns how many tokens there are, to refuse ids beyond them."""
        return type(self)(context)

    def prepare(self, name: str, values: Sequence[Value]) -> Column:
        """int64 [R, K], filled up with -1."""
        from ..batch import Padded

        for value in values:
            check_vocabulary(name, value, self._context)
        return Padded.of(values)


class AllowedTokens(_TokenList):
    """Bans every token but those of ``allowed_token_ids`` (vLLM).

    Token ids from 0, within the vocabulary. Neutral: ``()``, which allows all.
    """

    name = "allowed_token_ids"
    params = {
        "allowed_token_ids": Param(
            default=(),
            neutral=(),
            check=are_tokens,
            range="token ids (integers from 0)",
            help="the answer has no other tokens; empty allows all",
        )
    }
    traits = IN_PLACE

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V], in place."""
        ids = batch["allowed_token_ids"]
        if ids.shape[1] == 0:
            return logits
        ids = ids.where(ids >= 0, ids[:, :1].clamp(min=0))
        kept = logits.gather(1, ids)
        restricted = batch["allowed_token_ids"][:, :1] >= 0
        return logits.masked_fill_(restricted, -math.inf).scatter_(1, ids, kept)


class SuppressTokens(_TokenList):
    """Bans the tokens of ``suppress_tokens`` (transformers' ``SuppressTokensLogitsProcessor``).

    Token ids from 0, within the vocabulary. Neutral: ``()``.
    """

    name = "suppress_tokens"
    params = {
        "suppress_tokens": Param(
            default=(),
            neutral=(),
            check=are_tokens,
            range="token ids (integers from 0)",
            help="the answer does not have these tokens",
        )
    }
    traits = IN_PLACE

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V], in place."""
        ids = batch["suppress_tokens"]
        return logits.scatter_add_(1, ids.clamp(min=0), _banned(ids >= 0, logits))


class BeginSuppressTokens(_TokenList):
    """Bans the tokens of ``begin_suppress_tokens`` as the first of the answer.

    Token ids from 0, within the vocabulary. Neutral: ``()``.
    As transformers' ``SuppressTokensAtBeginLogitsProcessor`` where its ``begin_index`` is the prompt's length.
    """

    name = "begin_suppress_tokens"
    params = {
        "begin_suppress_tokens": Param(
            default=(),
            neutral=(),
            check=are_tokens,
            range="token ids (integers from 0)",
            help="the answer does not begin with these tokens",
        )
    }
    traits = IN_PLACE

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V], in place."""
        ids = batch["begin_suppress_tokens"]
        banned = (ids >= 0) & (batch.length == batch.prompt_length)[:, None]
        return logits.scatter_add_(1, ids.clamp(min=0), _banned(banned, logits))


class ForcedBos:
    """Makes ``forced_bos_token_id`` the first token of the answer: its logit becomes 0, all others -inf.

    As transformers' ``ForcedBOSTokenLogitsProcessor``, which was made for encoder-decoder models and counts from their
    first token; here it is the first one generated. Neutral: -1.
    """

    name = "forced_bos_token_id"
    params = {
        "forced_bos_token_id": Param(
            default=-1,
            neutral=-1,
            check=lambda v: v >= -1,
            range="a token id, or -1 for none",
            help="the answer begins with this token; -1: any",
        )
    }
    traits = IN_PLACE

    def __init__(self, context: Context | None = None) -> None:
        self._context = context

    def bind(self, context: Context) -> ForcedBos:
        """Learns how many tokens there are."""
        return ForcedBos(context)

    def prepare(self, name: str, values: Sequence[Value]) -> Column:
        """int64 [R]."""
        check_vocabulary(name, values, self._context)
        return numbers(values)

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V], in place."""
        token = batch["forced_bos_token_id"]
        return force(logits, token, (token >= 0) & (batch.length == batch.prompt_length))


class ForcedEos:
    """Makes ``forced_eos_token_id`` the last token of an answer that reaches its greatest length.

    That is the token with which ``max_new_tokens`` is reached or, where that is unset or larger, the model's context is
    full. Its logit becomes 0, all others -inf, as in transformers' ``ForcedEOSTokenLogitsProcessor``. Neutral: -1.
    """

    name = "forced_eos_token_id"
    params = {
        "forced_eos_token_id": Param(
            default=-1,
            neutral=-1,
            check=lambda v: v >= -1,
            range="a token id, or -1 for none",
            help="an answer that reaches max_new_tokens ends with this token; -1: any",
        ),
        "max_new_tokens": ENGINE_PARAMS["max_new_tokens"],
    }
    traits = IN_PLACE

    def __init__(self, context: Context | None = None) -> None:
        self._context = context

    def bind(self, context: Context) -> ForcedEos:
        """Learns how many tokens there are, and the context's length."""
        return ForcedEos(context)

    def prepare(self, name: str, values: Sequence[Value]) -> Column:
        """int64 [R]; an unset ``max_new_tokens`` is larger than any context."""
        if name == "max_new_tokens":
            return numbers([1 << 40 if value is None else value for value in values])
        check_vocabulary(name, values, self._context)
        return numbers(values)

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V], in place."""
        token = batch["forced_eos_token_id"]
        end = batch.prompt_length + batch["max_new_tokens"]
        if self._context is not None:
            end = end.clamp(max=self._context.context_length)
        return force(logits, token, (token >= 0) & (batch.length == end - 1))


def force(logits: Tensor, token: Tensor, forced: Tensor) -> Tensor:
    """In the rows where ``forced`` bool [R]: 0 for ``token`` int64 [R] and -inf for all others, in place."""
    if logits.device.type == "cpu" and not forced.any():
        return logits  # saves a pass; elsewhere the question would be a synchronisation
    at = token.clamp(min=0)[:, None]
    score = logits.gather(1, at).masked_fill(forced[:, None], 0.0)
    return logits.masked_fill_(forced[:, None], -math.inf).scatter_(1, at, score)


def _banned(banned: Tensor, logits: Tensor) -> Tensor:
    """-inf where ``banned``, else 0, to be added."""
    return logits.new_zeros(()).masked_fill(banned, -math.inf)


def _add_biases(logits: Tensor, batch: Batch, name: str) -> Tensor:
    """Adds the biases of the sequences that the next token can complete, in place."""
    column: Any = batch[name]
    longest = column.prefixes.shape[2]
    tail = last_tokens(batch.tokens, batch.length, longest)[:, None]
    matching = ((column.prefixes == WILDCARD) | (column.prefixes == tail)).all(-1)
    return logits.scatter_add_(1, column.last, column.biases.to(logits.dtype).masked_fill(~matching, 0.0))
