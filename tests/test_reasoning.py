"""The reasoning budget against a reading of the history from left to right, and in a decoding loop."""

from __future__ import annotations

import math

import pytest
import torch
from history_oracles import MODEST, Case, cases, check, refuses, scores
from hypothesis import given
from hypothesis import strategies as st

from llama_infer.errors import ParameterError
from llama_infer.processors.reasoning import ReasoningBudget


def ends_with(history, marker):
    return len(history) >= len(marker) and tuple(history[len(history) - len(marker) :]) == tuple(marker)


def budgeted(logits, history, prompt_length, params):
    """Walk through the context; remember where thinking began."""
    start, end, budget = params["reasoning_start"], params["reasoning_end"], params["reasoning_budget"]
    begun = None
    for at in range(1, len(history) + 1):
        if ends_with(history[:at], start):
            begun = at
        if ends_with(history[:at], end):
            begun = None
    if begun is None or budget < 0 or len(history) - max(begun, prompt_length) < budget:
        return logits
    thought = history[begun:]
    done = max(count for count in range(len(end)) if count == 0 or ends_with(thought, end[:count]))
    return [0.0 if token == end[done] else -math.inf for token in range(len(logits))]


@MODEST
@given(cases(largest_vocabulary=4), st.data())
def test_budget(case, data):
    marker = st.lists(st.integers(0, case.logits.shape[1] - 1), min_size=1, max_size=3).map(tuple)
    params = []
    for _ in case.histories:
        start, end = data.draw(st.tuples(marker, marker).filter(lambda pair: pair[0] != pair[1]))
        budget = data.draw(st.sampled_from([-1, 0, 1, 2, 5]))
        params.append({"reasoning_budget": budget, "reasoning_start": start, "reasoning_end": end})
    check(ReasoningBudget(), case, params, budgeted)


@pytest.mark.parametrize(("budget", "thoughts"), [(0, 0), (4, 4), (50, 30)])
def test_thinking_ends_in_the_loop(tokenizer, budget, thoughts):
    """A model that only ever says "x" for 30 tokens: the end is forced, letter by letter, once; then it is free."""
    tokens = list(b"Q <think>")
    prompt = len(tokens)
    params = {"reasoning_budget": budget}
    for _ in range(30):
        logits = torch.zeros(1, 264).index_fill(1, torch.tensor([ord("x")]), 1.0)
        got = scores(ReasoningBudget(), Case(logits, [tokens], [prompt]), [params], tokenizer=tokenizer)
        tokens.append(int(got.argmax()))
    answer = "".join(map(chr, tokens[prompt:]))
    end = "</think>" if budget < 30 else ""
    assert answer == ("x" * thoughts + end).ljust(30, "x")


def test_an_end_begun_by_the_model_is_completed(tokenizer):
    tokens = list(b"<think>hm </th")
    case = Case(torch.zeros(1, 264), [tokens], [0])
    got = scores(ReasoningBudget(), case, [{"reasoning_budget": 2}], tokenizer=tokenizer)
    assert int(got.argmax()) == ord("i") and (got == -math.inf).sum() == 263


def test_an_end_is_not_begun_by_the_start():
    """Start 1 2, end 2 3: the 2 belongs to the start, so that the end is forced from its own 2 on."""
    params = {"reasoning_budget": 0, "reasoning_start": (1, 2), "reasoning_end": (2, 3)}
    case = Case(torch.zeros(2, 5), [[1, 2], [1, 2, 2]], [0, 0])
    assert scores(ReasoningBudget(), case, [params] * 2).argmax(1).tolist() == [2, 3]


def test_each_span_has_the_whole_budget_and_the_prompt_costs_none():
    """Start 1, end 2. The last row thinks since its prompt, of which nothing counts."""
    histories = [[1, 5, 5, 2, 1, 5], [1, 5, 5, 2, 1, 5, 5], [1, 5, 5, 2], [1, 5, 5, 5, 5]]
    case = Case(torch.ones(4, 6), histories, [0, 0, 0, 4])
    params = {"reasoning_budget": 2, "reasoning_start": (1,), "reasoning_end": (2,)}
    forced = (scores(ReasoningBudget(), case, [params] * 4) == -math.inf).any(1)
    assert forced.tolist() == [False, True, False, False]


def test_strings_need_a_tokenizer_and_ids_a_vocabulary():
    case = Case(torch.zeros(1, 4), [[1]], [0])
    with pytest.raises(ParameterError, match="reasoning_start='<think>' is a string and there is no tokenizer"):
        ReasoningBudget().check({name: param.default for name, param in ReasoningBudget.params.items()})
    with pytest.raises(ParameterError, match="reasoning_end: token 4 is not in the vocabulary of 4"):
        scores(ReasoningBudget(), case, [{"reasoning_end": (4,)}])


@MODEST
@given(cases(smallest_vocabulary=4))
def test_neutral_is_identity(case):
    is_neutral_with_ids = [{"reasoning_start": (1,), "reasoning_end": (2, 3)}] * len(case)
    assert scores(ReasoningBudget(), case, is_neutral_with_ids) is case.logits


def test_neutral_without_a_tokenizer():
    assert scores(ReasoningBudget(), (case := Case(torch.zeros(1, 4), [[1]], [0])), [{}]) is case.logits


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reasoning_budget", -2),
        ("reasoning_start", ()),
        ("reasoning_start", ("",)),
        ("reasoning_end", ("a", "b")),
        ("reasoning_end", (1, -1)),
        ("reasoning_end", 7),
    ],
)
def test_bad_values_are_refused(name, value):
    refuses(ReasoningBudget(), name, value)
