"""Scores at the history's tokens: the kernel against torch's operators, and logits that are lent and given back."""

from __future__ import annotations

import math

import pytest
import torch
from history_oracles import MODEST, Case, cases
from hypothesis import given
from hypothesis import strategies as st

from llama_infer import Batch, history
from llama_infer.chain import Chain
from llama_infer.history import Change, apply, restored, together
from llama_infer.native import library
from llama_infer.processors.penalties import FrequencyPenalty, PresencePenalty, RepetitionPenalty
from llama_infer.samplers import Greedy
from llama_infer.testing import make_rows, sampling_step

compiled = pytest.mark.skipif(library("history") is None, reason="no C++ compiler, or no cache folder of one's own")
BY = {"scale": [1.0, 0.3, 1.7, 1e30], "lower": [0.0, -0.7, 1.3, 1e30], "lower_each": [0.0, -0.7, 1.3, 1e30]}


@st.composite
def changes(draw, case: Case) -> list[Change]:
    """Several in any order, each kind any number of times; rows that count all tokens, some, the last one, none."""
    found = []
    for kind in draw(st.lists(st.sampled_from(sorted(BY)), min_size=1, max_size=5)):
        by = torch.tensor([draw(st.sampled_from(BY[kind])) for _ in case.histories])
        first = torch.tensor([draw(st.integers(0, len(row) + 2)) for row in case.histories])
        found.append(Change(kind, by, draw(st.sampled_from([None, first]))))
    return found


def plainly(monkeypatch: pytest.MonkeyPatch, call):
    """The result where nothing is compiled."""
    with monkeypatch.context() as patch:
        patch.setattr(history, "_compiled", dict)
        return call()


def table(case: Case) -> Batch:
    return Batch.of(case.histories, prompt_lengths=case.prompt_lengths)


def same(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


@compiled
@MODEST
@given(cases(), st.data(), st.sampled_from([None, math.nan, math.inf]))
def test_the_kernel_is_the_plain_code_to_the_bit(case, data, fault):
    """Ragged rows and empty ones, repeats, ties, -inf, NaN and +inf."""
    logits = case.logits.clone()
    if fault is not None:
        logits[:, 0] = fault
    batch, listed = table(case), data.draw(changes(case))
    with pytest.MonkeyPatch.context() as patch:
        expected = plainly(patch, lambda: apply(logits.clone(), batch, listed))
    found = apply(logits.clone(), batch, listed)
    same(found, expected)
    for change in listed:  # one after another
        logits = apply(logits, batch, [change])
    same(logits, expected)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_histories_are_shared_among_threads(monkeypatch, dtype):
    """More tokens than the processor is asked for ahead, in a table wider than what is known."""
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(7, 3000, generator=draw, dtype=dtype)
    batch = Batch.of([torch.randint(3000, (2000 + row,), generator=draw).tolist() for row in range(7)])
    batch = Batch.of([[1]]).extend(batch).select(torch.arange(1, 8))
    first = torch.tensor([0, 0, 1999, 40, 5000, 7, 2005])
    listed = [Change(kind, torch.linspace(0.5, 2.0, 7), start) for kind in BY for start in (None, first)]
    expected = plainly(monkeypatch, lambda: apply(logits.clone(), batch, listed))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        same(apply(logits.clone(), batch, listed), expected)
        lent = logits.clone()
        with restored(lent, batch):
            apply(lent, batch, listed)
            same(lent, expected)
        same(lent, logits)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("native", [pytest.param(True, marks=compiled), False])
@pytest.mark.parametrize("error", [False, True])
def test_lent_logits_are_given_back(monkeypatch, native, error):
    """To the bit, wherever in the history something was written, NaN included, also when a part fails."""
    if not native:
        monkeypatch.setattr(history, "_compiled", dict)
    tokens = [[2, 3, 3, 0], [], [8], [1, 2, 3, 4, 5, 6, 7, 8]]
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(2))
    logits[0, 3], logits[3, 8], logits[3, 1] = math.nan, -math.inf, math.inf
    before = logits.clone()
    with pytest.raises(ZeroDivisionError) if error else restored(logits, Batch.of(tokens)):
        with restored(logits, Batch.of(tokens)):
            for row, ids in enumerate(tokens):
                logits[row, ids] = 77.0
            assert (logits == 77.0).sum() == 12
            if error:
                raise ZeroDivisionError
    same(logits, before)


@pytest.mark.parametrize("native", [pytest.param(True, marks=compiled), False])
def test_tokens_beyond_the_vocabulary_are_an_error(monkeypatch, native):
    """Not a write to somebody else's memory."""
    if not native:
        monkeypatch.setattr(history, "_compiled", dict)
    batch = Batch.of([[1, 5], [2, 3]])
    with pytest.raises((IndexError, RuntimeError), match="5"):
        apply(torch.zeros(2, 5), batch, [Change("lower", torch.ones(2))])
    with pytest.raises(IndexError), restored(torch.zeros(2, 5), Batch.of([[1, 2], [99, 3]])):
        pass


ALL = [RepetitionPenalty(), PresencePenalty(), FrequencyPenalty()]
VALUES = {
    "repetition_penalty": [1.3, 0.7, 1.0],
    "penalty_last_n": [-1, 0, 2, 5],
    "presence_penalty": [0.5, -2.0, 0.0],
    "frequency_penalty": [1.0, 0.2, 0],
}


@MODEST
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=5),
    st.data(),
    st.sampled_from(["random", "peaked", "flat", "tied", "faulty"]),
    st.sampled_from([{"temperature": 0.0}, {"temperature": 0.8}, {"top_k": 3}, {"top_p": 0.8}]),
)
def test_any_order_and_number_of_penalties_gives_the_choice_of_plain_parts(order, data, kind, further):
    """Together and lent the logits, or each by itself on a copy, in torch's operators: the same tokens."""
    rows, vocabulary = 5, 1100
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randn(rows, vocabulary, generator=draw) * (0.0 if kind == "tied" else 0.1 if kind == "flat" else 3.0)
    likeliest = logits.topk(4).indices
    if kind == "peaked":
        logits.scatter_add_(1, likeliest[:, :1], torch.full((rows, 1), 9.0))
    if kind == "faulty":
        logits[0, 5], logits[1, 5], logits[2] = math.nan, math.inf, -math.inf
    some = torch.randint(vocabulary, (rows, 6), generator=draw)
    tokens = torch.cat([some, likeliest[:, [0, 0, 1, 2]]], 1).tolist()
    declared = {name for number in order for name in ALL[number].params}
    params = {name: [data.draw(st.sampled_from(VALUES[name])) for _ in range(rows)] for name in sorted(declared)}
    names = [*(ALL[number].name for number in order), "temperature", "top_k", "top_p"]

    def step():
        return sampling_step(logits, tokens=[*tokens[:4], []], processors=names, **params, **further)()

    before = logits.clone()
    found = step()
    same(logits, before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_infer.chain.together", list)
        patch.setattr("llama_infer.chain._is_writable", lambda logits: False)
        assert torch.equal(found, plainly(patch, step))


def test_neighbours_are_joined_and_others_stay_where_they_are():
    class Halved(RepetitionPenalty):
        """A user's own, of which the inherited ``change`` is not all."""

        def __call__(self, logits, batch):
            return super().__call__(logits, batch) / 2

    def user(logits, batch):
        return logits * 2

    halved, (repetition, presence, frequency) = Halved(), ALL
    parts = [repetition, frequency, user, presence, halved, frequency, frequency]
    joined = together(parts)
    assert [getattr(part, "parts", part) for part in joined] == [
        [repetition, frequency],
        user,
        presence,
        halved,
        [frequency, frequency],
    ]
    batch = make_rows(
        parts[:2], [{"repetition_penalty": 2.0, "frequency_penalty": 0.5}] * 2, [[1, 1], []], prompt_lengths=[0, 0]
    )
    logits = torch.tensor([[0.0, 8.0, 3.0]] * 2)
    assert Chain([halved], Greedy()).scores(logits, batch).tolist() == [[0, 2, 1.5], [0, 4, 1.5]]
    assert Chain([repetition, frequency], Greedy()).scores(logits, batch).tolist() == [[0, 3, 3], [0, 8, 3]]
    assert joined[0](logits.clone(), batch).tolist() == [[0, 3, 3], [0, 8, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_of_rows_that_do_not_lie_side_by_side(dtype):
    batch = Batch.of([[1, 2, 3], [4, 5], [6, 1, 1, 2]])
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    column, places = torch.full((3, 2), 1.25, dtype=dtype)[:, 0], torch.tensor([[0, 7], [1, 7], [2, 7]])[:, 0]
    for by, first in ((column, places), (column[:1].expand(3), places[:1].expand(3))):
        found = apply(logits.clone(), batch, [Change("scale", by, first)])
        assert torch.equal(found, apply(logits.clone(), batch, [Change("scale", by.clone(), first.clone())]))
