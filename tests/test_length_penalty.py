"""The exponential decay length penalty against its formula and transformers."""

from __future__ import annotations

import math

import pytest
import torch
from history_oracles import MODEST, Case, cases, check, close, foreign, is_neutral, refuses, scores
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import ExponentialDecayLengthPenalty as Theirs

from llama_infer.processors.length import ExponentialDecayLengthPenalty

NAME = "exponential_decay_length_penalty"
DECAYS = st.just(()) | st.tuples(st.integers(0, 20), st.sampled_from([0.5, 1.0, 1.01, 3.0]))


@MODEST
@given(cases(), st.data())
def test_end_tokens_are_raised(case, data):
    ends = data.draw(st.lists(st.integers(0, case.logits.shape[1] - 1), max_size=3))
    params = [{NAME: data.draw(DECAYS)} for _ in case.histories]

    def define(logits, history, prompt_length, values):
        if not values[NAME]:
            return logits
        start, factor = values[NAME]
        late = max(0, len(history) - prompt_length - start)
        return [
            x + abs(x) * (factor**late - 1) if token in ends and math.isfinite(x) else x
            for token, x in enumerate(logits)
        ]

    check(ExponentialDecayLengthPenalty(), case, params, define, end_token_ids=tuple(ends))
    got = scores(ExponentialDecayLengthPenalty(), case, params, end_token_ids=tuple(ends))
    for row, values in enumerate(params):
        if values[NAME] and ends:
            theirs = Theirs(values[NAME], ends, case.prompt_lengths[row])
            close(got[row], foreign(theirs, case, row).tolist())


def test_by_hand():
    """Three tokens past the start of 2: 4 + 4 * (2 ** 3 - 1); the prompt does not count; a negative logit rises too."""
    case = Case(torch.tensor([[4.0, -4.0, 4.0], [4.0, -4.0, 4.0]]), [[0] * 9, [0] * 9], [4, 8])
    got = scores(ExponentialDecayLengthPenalty(), case, [{NAME: (2, 2.0)}] * 2, end_token_ids=(0, 1))
    assert got.tolist() == [[32, 24, 4], [4, -4, 4]]


def test_nothing_overflows():
    case = Case(torch.tensor([[3e38, 5.0, 0.0, -math.inf]]), [[0] * 400], [0])
    got = scores(ExponentialDecayLengthPenalty(), case, [{NAME: (0, 1e300)}], end_token_ids=(0, 1, 2, 3))
    assert got[0, :3].isfinite().all() and got[0, 1] > 1e20 and got[0, 2] == 0 and got[0, 3] == -math.inf


@MODEST
@given(cases())
def test_neutral_is_identity(case):
    is_neutral(ExponentialDecayLengthPenalty(), case, end_token_ids=(0, 1))


@pytest.mark.parametrize(
    "value", [(1,), (1, 2, 3), (-1, 2.0), (1.5, 2.0), (1, 0.0), (1, math.inf), (1, "2"), (True, 2.0)]
)
def test_bad_values_are_refused(value):
    refuses(ExponentialDecayLengthPenalty(), NAME, value)
