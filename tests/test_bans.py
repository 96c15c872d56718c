"""Bans, biases on sequences, lists of tokens and forced tokens, against definitions and transformers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from history_oracles import MODEST, Case, cases, check, close, foreign, is_neutral, refuses, scores
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from llama_infer.errors import ParameterError
from llama_infer.processors import bans

PARTS = [
    bans.NoRepeatNgram(),
    bans.SequenceBias(),
    bans.BadWords(),
    bans.AllowedTokens(),
    bans.SuppressTokens(),
    bans.BeginSuppressTokens(),
    bans.ForcedBos(),
    bans.ForcedEos(),
]


def tokens_below(vocabulary, **sizes):
    return st.lists(st.integers(0, vocabulary - 1), **sizes).map(tuple)


def without(logits, banned):
    return [-math.inf if token in banned else x for token, x in enumerate(logits)]


def only(logits, token):
    return [0.0 if other == token else -math.inf for other in range(len(logits))]


def ngrams(logits, history, prompt_length, params):
    size = params["no_repeat_ngram_size"]
    if not size:
        return logits
    known = {tuple(history[at : at + size]) for at in range(len(history) - size + 1)}
    end = history[len(history) - size + 1 :]
    return without(logits, {token for token in range(len(logits)) if (*end, token) in known})


def biased(logits, history, prompt_length, params):
    out = list(logits)
    for sequence, bias in params["sequence_bias"].items():
        *before, last = sequence
        if before == history[len(history) - len(before) :]:
            out[last] += bias
    return out


def no_bad_words(logits, history, prompt_length, params):
    return biased(logits, history, 0, {"sequence_bias": {tuple(w): -math.inf for w in params["bad_words_ids"]}})


def suppressed(logits, history, prompt_length, params):
    return without(logits, set(params["suppress_tokens"]))


def allowed(logits, history, prompt_length, params):
    ids = set(params["allowed_token_ids"])
    return without(logits, set(range(len(logits))) - ids) if ids else logits


@MODEST
@given(cases(largest_vocabulary=4), st.data())
def test_no_repeat_ngram_size(case, data):
    sizes = st.sampled_from([0, 1, 2, 3, 4, 7, 100])
    check(bans.NoRepeatNgram(), case, [{"no_repeat_ngram_size": data.draw(sizes)} for _ in case.histories], ngrams)


@MODEST
@given(cases(largest_vocabulary=4), st.integers(1, 6))
def test_no_repeat_ngram_size_is_that_of_transformers(case, size):
    got = scores(bans.NoRepeatNgram(), case, [{"no_repeat_ngram_size": size}] * len(case))
    for row, history in enumerate(case.histories):
        if len(history) >= size:
            close(got[row], foreign(NoRepeatNGramLogitsProcessor(size), case, row).tolist())


def sequence_biases(vocabulary):
    bias = st.sampled_from([-math.inf, 0.0, 2.5]) | st.floats(-9, 9)
    return st.dictionaries(tokens_below(vocabulary, min_size=1, max_size=4), bias, max_size=6)


@MODEST
@given(cases(largest_vocabulary=3), st.data())
def test_sequence_bias(case, data):
    strategy = sequence_biases(case.logits.shape[1])
    check(bans.SequenceBias(), case, [{"sequence_bias": data.draw(strategy)} for _ in case.histories], biased)


@MODEST
@given(cases(largest_vocabulary=3), st.data())
def test_sequence_bias_is_that_of_transformers(case, data):
    bias = data.draw(sequence_biases(case.logits.shape[1]).filter(bool))
    got = scores(bans.SequenceBias(), case, [{"sequence_bias": bias}] * len(case))
    for row in range(len(case)):
        close(got[row], foreign(SequenceBiasLogitsProcessor(bias), case, row).tolist())


@MODEST
@given(cases(largest_vocabulary=3), st.data())
def test_bad_words_ids(case, data):
    words = st.lists(tokens_below(case.logits.shape[1], min_size=1, max_size=4), max_size=5).map(tuple)
    params = [{"bad_words_ids": data.draw(words)} for _ in case.histories]
    check(bans.BadWords(), case, params, no_bad_words)
    got = scores(bans.BadWords(), case, params)
    for row, given_words in enumerate(params):
        if given_words["bad_words_ids"]:
            theirs = NoBadWordsLogitsProcessor([list(word) for word in given_words["bad_words_ids"]])
            close(got[row], foreign(theirs, case, row).tolist())


WIDE = 128_256


@pytest.mark.parametrize(
    ("part", "params", "define"),
    [
        (bans.NoRepeatNgram(), [{"no_repeat_ngram_size": 2}, {}, {"no_repeat_ngram_size": 1}], ngrams),
        (bans.SequenceBias(), [{"sequence_bias": {(WIDE - 2, WIDE - 1): 2.5, (7,): -math.inf}}, {}, {}], biased),
        (bans.BadWords(), [{"bad_words_ids": ((9, WIDE - 1), (5,))}, {}, {"bad_words_ids": ((3,),)}], no_bad_words),
        (bans.SuppressTokens(), [{"suppress_tokens": (0, WIDE - 1)}, {}, {"suppress_tokens": (4,)}], suppressed),
        (bans.AllowedTokens(), [{"allowed_token_ids": (1, WIDE - 1)}, {}, {"allowed_token_ids": (2,)}], allowed),
    ],
)
def test_on_a_real_vocabulary(part, params, define):
    logits = torch.randn(3, WIDE, generator=torch.Generator().manual_seed(3))
    check(part, Case(logits, [[9, WIDE - 1, 9], [WIDE - 2], [3, 3, WIDE - 2]], [1, 1, 0]), params, define)


def test_bad_words_are_banned_with_and_without_a_space(tokenizer):
    """Bytes: the word's last letter is banned behind its others, and " x" behind a space."""
    histories = [list(b"this is ba"), list(b"this is x"), list(b"y "), list(b"bb")]
    words = [
        {"bad_words": ("bad", "y")},
        {"bad_words": "bad"},
        {"bad_words": ("y",)},
        {"bad_words_ids": ((98, 98, 7),)},
    ]
    got = scores(bans.BadWords(), Case(torch.zeros(4, 264), histories, [0] * 4), words, tokenizer=tokenizer)
    banned = [set((row == -math.inf).nonzero()[:, 0].tolist()) for row in got]
    assert banned == [{ord("d"), ord("y")}, set(), {ord("y")}, {7}]


def test_bad_words_are_spelled_with_a_space_of_their_own():
    """A tokenizer in which a word behind a space is another token, and a space by itself is none."""
    known = {"bad": [1], " bad": [2, 3], "": [], " ": []}
    tokenizer = lambda text, add_special_tokens: SimpleNamespace(input_ids=known[text])  # noqa: E731
    case = Case(torch.zeros(2, 5), [[2], [4]], [0, 0])
    for words in ("bad", " bad"):
        got = scores(bans.BadWords(), case, [{"bad_words": (words, " ")}] * 2, tokenizer=tokenizer)
        banned = [set((row == -math.inf).nonzero()[:, 0].tolist()) for row in got]
        assert banned == ([{1, 3}, {1}] if words == "bad" else [{3}, set()])


def test_bad_words_need_a_tokenizer():
    with pytest.raises(ParameterError, match="bad_words: 'bad' is a string and there is no tokenizer"):
        scores(bans.BadWords(), Case(torch.zeros(1, 4), [[1]], [0]), [{"bad_words": ("bad",)}])


@MODEST
@given(cases(), st.data())
def test_lists_of_tokens(case, data):
    lists = tokens_below(case.logits.shape[1], max_size=5)
    drawn = [data.draw(lists) for _ in case.histories]

    def suppressed_first(logits, history, prompt_length, params):
        return without(logits, params["begin_suppress_tokens"]) if len(history) == prompt_length else logits

    for part, define in (
        (bans.AllowedTokens(), allowed),
        (bans.SuppressTokens(), suppressed),
        (bans.BeginSuppressTokens(), suppressed_first),
    ):
        check(part, case, [{part.name: ids} for ids in drawn], define)
    all_rows = scores(bans.SuppressTokens(), case, [{"suppress_tokens": ids} for ids in drawn])
    first = scores(bans.BeginSuppressTokens(), case, [{"begin_suppress_tokens": ids} for ids in drawn])
    for row, ids in enumerate(drawn):
        if ids:
            close(all_rows[row], foreign(SuppressTokensLogitsProcessor(list(ids)), case, row).tolist())
            theirs = SuppressTokensAtBeginLogitsProcessor(list(ids), case.prompt_lengths[row])
            close(first[row], foreign(theirs, case, row).tolist())


@MODEST
@given(cases(), st.data())
def test_forced_bos(case, data):
    tokens = [data.draw(st.integers(-1, case.logits.shape[1] - 1)) for _ in case.histories]

    def define(logits, history, prompt_length, params):
        token = params["forced_bos_token_id"]
        return only(logits, token) if token >= 0 and len(history) == prompt_length else logits

    check(bans.ForcedBos(), case, [{"forced_bos_token_id": token} for token in tokens], define)
    for row, token in enumerate(tokens):
        if len(case.histories[row]) == case.prompt_lengths[row] == 1 and token >= 0:
            got = scores(bans.ForcedBos(), case, [{"forced_bos_token_id": other} for other in tokens])[row]
            close(got, foreign(ForcedBOSTokenLogitsProcessor(token), case, row).tolist())


@MODEST
@given(cases(longest=6), st.data())
def test_forced_eos(case, data):
    """With the token that fills max_new_tokens, or the context (of 6 here) where that comes first."""
    longest = st.none() | st.integers(1, 8)
    params = [
        {
            "forced_eos_token_id": data.draw(st.integers(-1, case.logits.shape[1] - 1)),
            "max_new_tokens": data.draw(longest),
        }
        for _ in case.histories
    ]

    def define(logits, history, prompt_length, params):
        token, asked = params["forced_eos_token_id"], params["max_new_tokens"]
        end = min(6, prompt_length + (100 if asked is None else asked))
        return only(logits, token) if token >= 0 and len(history) + 1 == end else logits

    check(bans.ForcedEos(), case, params, define, context_length=6)
    got = scores(bans.ForcedEos(), case, params)
    for row, values in enumerate(params):
        if values["forced_eos_token_id"] >= 0 and values["max_new_tokens"] is not None:
            total = case.prompt_lengths[row] + values["max_new_tokens"]
            theirs = ForcedEOSTokenLogitsProcessor(total, values["forced_eos_token_id"])
            close(got[row], foreign(theirs, case, row).tolist())


@MODEST
@given(cases())
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_neutral_is_identity(part, case):
    is_neutral(part, case)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        (bans.NoRepeatNgram(), "no_repeat_ngram_size", -1),
        (bans.SequenceBias(), "sequence_bias", {(): 1.0}),
        (bans.SequenceBias(), "sequence_bias", {(1, -2): 1.0}),
        (bans.SequenceBias(), "sequence_bias", {(1,): math.inf}),
        (bans.SequenceBias(), "sequence_bias", {(1,): math.nan}),
        (bans.SequenceBias(), "sequence_bias", {3: 1.0}),
        (bans.BadWords(), "bad_words", ("",)),
        (bans.BadWords(), "bad_words", (3,)),
        (bans.BadWords(), "bad_words_ids", ((),)),
        (bans.BadWords(), "bad_words_ids", (3,)),
        (bans.AllowedTokens(), "allowed_token_ids", (-1,)),
        (bans.SuppressTokens(), "suppress_tokens", (1.5,)),
        (bans.BeginSuppressTokens(), "begin_suppress_tokens", (True,)),
        (bans.ForcedBos(), "forced_bos_token_id", -2),
        (bans.ForcedEos(), "forced_eos_token_id", -2),
    ],
)
def test_bad_values_are_refused(part, name, value):
    refuses(part, name, value)


@pytest.mark.parametrize(
    ("part", "params"),
    [
        (bans.SequenceBias(), {"sequence_bias": {(1, 4): 1.0}}),
        (bans.BadWords(), {"bad_words_ids": ((4,),)}),
        (bans.AllowedTokens(), {"allowed_token_ids": (4,)}),
        (bans.SuppressTokens(), {"suppress_tokens": (4,)}),
        (bans.ForcedBos(), {"forced_bos_token_id": 4}),
        (bans.ForcedEos(), {"forced_eos_token_id": 4}),
    ],
)
def test_tokens_beyond_the_vocabulary_are_refused(part, params):
    with pytest.raises(ParameterError, match=f"{next(iter(params))}: token 4 is not in the vocabulary of 4"):
        scores(part, Case(torch.zeros(1, 4), [[1]], [0]), [params])
