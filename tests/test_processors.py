"""The chain's distribution: transformers' processors and warpers on the same logits, definitions where it has none."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_infer import transform_logits
from llama_infer.errors import ParameterError

VOCABULARY = 300
BOUNDS = {
    "temperature": [0.0, 5e-324, 1e-50, 1e-9, 1e-3, 1e30],
    "top_k": [0, 1, VOCABULARY - 1, VOCABULARY, VOCABULARY + 1, 2**40],
    "top_p": [0.0, 1e-50, 1 - 2**-50, 1.0],
    "min_p": [0.0, 1e-50, 1.0],
    "repetition_penalty": [1e-6, 1.0, 1e6],
    "presence_penalty": [-1e6, 0.0, 1e6],
    "frequency_penalty": [-1e6, 0.0, 1e6],
}
"""The ends of each parameter's range."""


def random_rows(rows, vocabulary=VOCABULARY, seed=0, dtype=torch.float32):
    """Logits and ragged histories with repeated tokens."""
    draw = random.Random(seed)
    logits = 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    tokens = [[draw.randrange(min(vocabulary, 25)) for _ in range(draw.randint(1, 30))] for _ in range(rows)]
    return logits, tokens, [draw.randint(0, len(row)) for row in tokens]


def theirs(logits, tokens, prompt_length, ends=(), **params) -> torch.Tensor:
    """One row through transformers' processors, in the order of its ``generate``."""
    from transformers import generation as hf

    row = torch.tensor([tokens])
    chain: list[Any] = []
    if params.get("repetition_penalty", 1.0) != 1.0:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(params["repetition_penalty"]))
    if params.get("min_new_tokens", 0):
        chain.append(hf.MinNewTokensLengthLogitsProcessor(prompt_length, params["min_new_tokens"], list(ends)))
    if params.get("temperature", 1.0) != 1.0:
        chain.append(hf.TemperatureLogitsWarper(params["temperature"]))
    if params.get("top_k", 0):
        chain.append(hf.TopKLogitsWarper(params["top_k"]))
    if params.get("top_p", 1.0) < 1.0:
        chain.append(hf.TopPLogitsWarper(params["top_p"]))
    if params.get("min_p", 0.0):
        chain.append(hf.MinPLogitsWarper(params["min_p"]))
    scores = logits[None]
    for processor in chain:
        scores = processor(row, scores)
    return scores[0].double().softmax(-1)


def difference(scores, expected):
    """Largest difference of probabilities."""
    return (scores.double().softmax(-1) - expected).abs().max().item()


GRID = [
    {"temperature": t, "top_k": k, "top_p": p, "min_p": m, "repetition_penalty": r}
    for t, k, p, m, r in itertools.product([1.0, 0.3, 2.0], [0, 1, 40], [1.0, 0.9, 0.35], [0.0, 0.07], [1.0, 1.3, 0.8])
]


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 2500])
def test_the_chain_equals_transformers(vocabulary):
    """Over a grid of parameters, each row with its own, beyond and within the windows of the truncations."""
    logits, tokens, prompts = random_rows(len(GRID), vocabulary)
    params = {name: [row[name] for row in GRID] for name in GRID[0]}
    scores = transform_logits(logits, tokens=tokens, prompt_lengths=prompts, **params)
    for row, setting in enumerate(GRID):
        assert difference(scores[row], theirs(logits[row], tokens[row], prompts[row], **setting)) < 1e-6, setting


def test_truncations_fall_back_beyond_their_window():
    """Nearly flat logits over a large vocabulary: the nucleus has thousands of tokens."""
    logits = 0.1 * torch.randn(4, 6000, generator=torch.Generator().manual_seed(1))
    scores = transform_logits(logits, top_p=[0.9, 0.05, 1.0, 0.6])
    for row, top_p in enumerate([0.9, 0.05, 1.0, 0.6]):
        assert difference(scores[row], theirs(logits[row], [0], 0, top_p=top_p)) < 1e-6


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 10**6),
    st.sampled_from([2, 3, 50, 1100]),
    st.floats(0.05, 5),
    st.integers(0, 60),
    st.floats(0.02, 1),
    st.floats(0, 1),
    st.floats(0.5, 2),
)
def test_the_chain_equals_transformers_anywhere(seed, vocabulary, temperature, top_k, top_p, min_p, repetition):
    """In float64, where the boundary of a nucleus is the same on both sides."""
    logits, tokens, prompts = random_rows(2, vocabulary, seed, torch.float64)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    setting = dict(zip(names, (temperature, top_k, top_p, min_p, repetition), strict=True))
    scores = transform_logits(logits, tokens=tokens, prompt_lengths=prompts, **setting)
    for row in range(2):
        assert difference(scores[row], theirs(logits[row], tokens[row], prompts[row], **setting)) < 1e-6


def test_min_new_tokens_equals_transformers():
    logits, tokens, prompts = random_rows(40, seed=2)
    ends, least = (5, 17), [row % 12 for row in range(40)]
    scores = transform_logits(logits, tokens=tokens, prompt_lengths=prompts, end_token_ids=ends, min_new_tokens=least)
    for row in range(40):
        new = len(tokens[row]) - prompts[row]
        expected = theirs(logits[row], tokens[row], prompts[row], ends, min_new_tokens=least[row])
        assert difference(scores[row], expected) == 0
        assert torch.isinf(scores[row, list(ends)]).tolist() == [new < least[row]] * 2


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_penalties_of_the_answer_by_definition(name):
    """Once, or once for each occurrence, and the prompt does not count."""
    logits, tokens, prompts = random_rows(30, seed=3)
    values = [(row - 15) / 10 for row in range(30)]
    scores = transform_logits(logits, tokens=tokens, prompt_lengths=prompts, **{name: values})
    for row in range(30):
        expected = logits[row].clone()
        answer = tokens[row][prompts[row] :]
        for token in set(answer):
            expected[token] -= values[row] * (1 if name == "presence_penalty" else answer.count(token))
        torch.testing.assert_close(scores[row], expected, rtol=0, atol=1e-5)


def test_logit_bias_by_definition():
    """Rows with several, one and no biases; -inf bans."""
    logits, _, _ = random_rows(4, seed=4)
    biases = [{3: 1.5, 299: -2}, {}, {0: -math.inf}, {0: 100.0, 7: -0.25, 8: 3}]
    scores = transform_logits(logits, logit_bias=biases)
    for row, bias in enumerate(biases):
        expected = logits[row].clone()
        for token, number in bias.items():
            expected[token] += number
        torch.testing.assert_close(scores[row], expected, rtol=0, atol=1e-6)
    assert scores[2, 0] == -math.inf


def test_logit_bias_knows_the_vocabulary():
    logits = torch.zeros(1, 5)
    assert transform_logits(logits, logit_bias={4: 1.0}).tolist() == [[0, 0, 0, 0, 1]]
    with pytest.raises(ParameterError, match="logit_bias: token 5 is not in the vocabulary of 5"):
        transform_logits(logits, logit_bias={5: 1.0})


def mixed_settings(seed):
    """A row's parameters, each at a default, in its range or at an end of it."""
    draw = random.Random(seed)
    middle = {"temperature": 0.7, "top_k": 9, "top_p": 0.6, "min_p": 0.1, "repetition_penalty": 1.2}
    middle |= {"presence_penalty": 0.5, "frequency_penalty": -0.3}
    setting = {name: draw.choice([*ends, middle[name], middle[name]]) for name, ends in BOUNDS.items()}
    bias = draw.choice([{}, {4: 2.0}, {1: -math.inf, 2: 1.0}])
    return {**setting, "logit_bias": bias, "min_new_tokens": draw.choice([0, 20])}


def test_mixed_rows_equal_rows_alone():
    """Whatever the neighbours ask for, and at the ends of every range: the same scores, and never an empty row."""
    rows = 40
    logits, tokens, prompts = random_rows(rows, seed=5)
    settings_ = [mixed_settings(seed) for seed in range(rows)]
    columns = {name: [setting[name] for setting in settings_] for name in settings_[0]}
    together = transform_logits(logits, tokens=tokens, prompt_lengths=prompts, end_token_ids=[9], **columns)
    assert not together.isnan().any() and (together.amax(-1) > -math.inf).all()
    for row, setting in enumerate(settings_):
        alone = transform_logits(
            logits[row : row + 1], tokens=[tokens[row]], prompt_lengths=[prompts[row]], end_token_ids=[9], **setting
        )
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-50, 1e-40, 1e-30, 1e-9, 1e-4])
def test_tiny_temperatures_are_nearly_greedy_and_finite(temperature):
    logits = torch.tensor(
        [
            [1.0, 5.0, 4.999, -80.0],
            [-1e30, -1e31, -math.inf, 0.0],
            [1e4, 1e4 + 1, 0.0, 0.0],
            [0.0, 1e8, 9.9e9, 1e10],
            [-1e20, -1e19, -1e18, -1e21],
        ]
    )
    scores = transform_logits(logits, temperature=temperature)
    probabilities = scores.double().softmax(-1)
    assert not probabilities.isnan().any() and (scores.amax(-1) < math.inf).all()
    best = [1, 3, 1, 3, 2]
    assert all(probabilities[row, token] > 0.999 for row, token in enumerate(best))


def test_temperature_0_leaves_the_order():
    logits, _, _ = random_rows(3)
    assert torch.equal(transform_logits(logits, temperature=0), logits)
    assert torch.equal(transform_logits(logits, temperature=[0, 1, 0]), logits)


@pytest.mark.parametrize("name, values", BOUNDS.items())
def test_the_ends_of_each_range(name, values):
    """Alone: a row is left with something, nothing is NaN, and a token's rank does not rise out of nothing."""
    logits, tokens, _ = random_rows(len(values), seed=6)
    scores = transform_logits(logits, tokens=tokens, **{name: values})
    assert not scores.isnan().any() and (scores.amax(-1) > -math.inf).all()
    keeps_all = {"top_k": [0, VOCABULARY, VOCABULARY + 1, 2**40], "top_p": [1.0], "min_p": [0.0, 1e-50]}
    keeps_one = {"top_k": [1], "top_p": [0.0, 1e-50], "min_p": [1.0]}
    for row, value in enumerate(values):
        if value in keeps_all.get(name, []):
            assert torch.equal(scores[row], logits[row])
        if value in keeps_one.get(name, []):
            assert scores[row].isfinite().nonzero()[:, 0].tolist() == [logits[row].argmax().item()]


def test_ties_stay_together():
    """The truncations keep tokens that are as likely as the last one kept."""
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    for params in ({"top_k": 2}, {"top_p": 0.6}):
        assert transform_logits(logits, **params).isfinite().tolist() == [[True, True, True, False]]


FULL = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2}
FULL |= {"presence_penalty": 0.3, "frequency_penalty": 0.3, "logit_bias": {0: 1.0}}


@pytest.mark.parametrize("only", [0, 1, 299])
def test_one_finite_token_stays(only):
    """All else banned: the whole chain leaves it."""
    logits = torch.full((1, VOCABULARY), -math.inf)
    logits[0, only] = -3.0
    scores = transform_logits(logits, tokens=[[only, 1]], **FULL)
    assert scores.softmax(-1)[0, only] == 1 and scores.isfinite().sum() == 1


def test_banned_tokens_stay_banned():
    """-inf among the logits passes every part."""
    logits, tokens, prompts = random_rows(8, seed=7)
    banned = torch.rand(8, VOCABULARY, generator=torch.Generator().manual_seed(8)) < 0.7
    scores = transform_logits(logits.masked_fill(banned, -math.inf), tokens=tokens, prompt_lengths=prompts, **FULL)
    assert not scores.isnan().any() and (scores[banned] == -math.inf).all()
    assert (scores.isfinite().sum(-1) >= 1).all()


def test_a_vocabulary_of_two():
    logits = torch.tensor([[0.0, 1.0], [3.0, -1.0]])
    scores = transform_logits(logits, tokens=[[0], [1, 0]], **FULL)
    assert scores.isfinite().any(-1).all()
    torch.testing.assert_close(transform_logits(logits, temperature=2.0), logits / 2)
    assert transform_logits(logits, top_k=1).isfinite().tolist() == [[False, True], [True, False]]


def test_given_logits_are_left_as_they_are():
    """Also by a plug-in that writes into what it is given; half precision comes out as float32."""
    logits, tokens, prompts = random_rows(3, seed=9)
    before = logits.clone()
    transform_logits(logits, tokens=tokens, prompt_lengths=prompts, **FULL)
    transform_logits(logits, processors=lambda scores, batch: scores.zero_())
    assert torch.equal(logits, before)
    half = transform_logits(logits.bfloat16(), temperature=0.5)
    assert half.dtype == torch.float32 and torch.equal(half, logits.bfloat16().float() / 0.5)
    assert transform_logits(logits.double(), temperature=0.5).dtype == torch.float64


def test_the_example_of_the_documentation():
    logits, _, _ = random_rows(2, seed=10)
    scores = transform_logits(logits, top_k=[3, 0], temperature=0.7)
    assert scores.isfinite().sum(-1).tolist() == [3, VOCABULARY]
    torch.testing.assert_close(scores[1], logits[1] / 0.7)
