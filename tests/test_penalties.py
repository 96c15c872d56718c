"""Repetition, presence and frequency penalties against their definitions and transformers."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from history_oracles import MODEST, Case, cases, check, close, foreign, is_neutral, refuses, scores
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from llama_infer.processors.penalties import FrequencyPenalty, PresencePenalty, RepetitionPenalty

# Parameters are float32 columns, also beside float64 logits: these are exact in both.
PENALTIES = st.sampled_from([2.0**-10, 0.5, 1.0, 1.25, 20.0]) | st.floats(0.0625, 10, width=32)
STRENGTHS = st.sampled_from([-5.0, 0.0, 0.75, 100.0]) | st.floats(-4, 4, width=32)


def repetition(logits, history, prompt_length, params):
    penalty, window = params["repetition_penalty"], params["penalty_last_n"]
    seen = set(history if window < 0 else history[len(history) - window :] if window < len(history) else history)
    seen = set() if window == 0 else seen
    return [(x * penalty if x < 0 else x / penalty) if i in seen else x for i, x in enumerate(logits)]


def presence(logits, history, prompt_length, params):
    answer = set(history[prompt_length:])
    return [x - params["presence_penalty"] if i in answer else x for i, x in enumerate(logits)]


def frequency(logits, history, prompt_length, params):
    count = Counter(history[prompt_length:])
    return [x - params["frequency_penalty"] * count[i] for i, x in enumerate(logits)]


@MODEST
@given(cases(), st.data())
def test_repetition_penalty(case, data):
    windows = st.sampled_from([-1, 0, 1, 2, 5, 1000])
    params = [
        {"repetition_penalty": data.draw(PENALTIES), "penalty_last_n": data.draw(windows)} for _ in range(len(case))
    ]
    check(RepetitionPenalty(), case, params, repetition)


@MODEST
@given(cases(), PENALTIES)
def test_repetition_penalty_is_that_of_transformers(case, penalty):
    got = scores(RepetitionPenalty(), case, [{"repetition_penalty": penalty}] * len(case))
    for row, history in enumerate(case.histories):
        if history:
            close(got[row], foreign(RepetitionPenaltyLogitsProcessor(penalty), case, row).tolist())


@MODEST
@given(cases(), st.data())
@pytest.mark.parametrize(("part", "define"), [(PresencePenalty(), presence), (FrequencyPenalty(), frequency)])
def test_penalties_on_the_answer(part, define, case, data):
    check(part, case, [{part.name: data.draw(STRENGTHS)} for _ in range(len(case))], define)


def test_the_prompt_only_counts_for_the_repetition_penalty():
    """Token 1 is in the prompt, 2 in both, 3 twice in the answer."""
    case = Case(torch.full((1, 5), 8.0), [[1, 2, 2, 3, 3]], [2])
    assert scores(RepetitionPenalty(), case, [{"repetition_penalty": 2.0}])[0].tolist() == [8, 4, 4, 4, 8]
    assert scores(PresencePenalty(), case, [{"presence_penalty": 1.5}])[0].tolist() == [8, 8, 6.5, 6.5, 8]
    assert scores(FrequencyPenalty(), case, [{"frequency_penalty": 1.5}])[0].tolist() == [8, 8, 6.5, 5, 8]


@MODEST
@given(cases())
@pytest.mark.parametrize("part", [RepetitionPenalty(), PresencePenalty(), FrequencyPenalty()])
def test_neutral_is_identity(part, case):
    is_neutral(part, case)


def test_wide():
    """A vocabulary of 128,256 and a long history, all three penalties in one row."""
    generator = torch.Generator().manual_seed(5)
    history = torch.randint(0, 128256, (600,), generator=generator).tolist() * 2
    case = Case(3 * torch.randn(1, 128256, generator=generator), [history], [500])
    for part, define in (
        (RepetitionPenalty(), repetition),
        (PresencePenalty(), presence),
        (FrequencyPenalty(), frequency),
    ):
        params = {part.name: 1.7, **({"penalty_last_n": 64} if part.name == "repetition_penalty" else {})}
        close(scores(part, case, [params])[0], define(case.logits[0].tolist(), history, 500, params))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        (RepetitionPenalty(), "repetition_penalty", 0.0),
        (RepetitionPenalty(), "repetition_penalty", math.inf),
        (RepetitionPenalty(), "repetition_penalty", math.nan),
        (RepetitionPenalty(), "penalty_last_n", -2),
        (RepetitionPenalty(), "penalty_last_n", 1.5),
        (PresencePenalty(), "presence_penalty", math.inf),
        (FrequencyPenalty(), "frequency_penalty", -math.inf),
        (FrequencyPenalty(), "frequency_penalty", "much"),
    ],
)
def test_bad_values_are_refused(part, name, value):
    refuses(part, name, value)
