"""Samplers: frequencies are the distribution's, and how many candidates were looked at does not matter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_infer import DEFAULT_PROCESSORS, Batch, Context, registry, transform_logits
from llama_infer.candidates import Candidates
from llama_infer.chain import EXCLUDED, NON_FINITE, Chain
from llama_infer.columns import make_batch
from llama_infer.noise import gumbel
from llama_infer.pipeline import declared_params
from llama_infer.samplers import Categorical, Greedy


def table(rows, temperature=1.0, **values):
    """Rows with a seed each; the host knows ``values``."""
    known = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **values}
    return Batch.of(
        [[1]] * rows,
        seeds=range(rows),
        columns={"temperature": torch.full((rows,), temperature, dtype=torch.float64)},
        values={name: frozenset({value}) for name, value in known.items()},
    )


@pytest.mark.parametrize("params", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.05}])
def test_frequencies_match_the_distribution(params):
    """Chi-square over 2,500 seeds."""
    rows, vocabulary = 2500, 8
    generator = torch.Generator().manual_seed(1)
    logits = 1.5 * torch.randn(1, vocabulary, generator=generator)
    scores = transform_logits(logits, **params)
    probabilities = scores.double().softmax(-1)[0]
    drawn = Categorical()(scores.expand(rows, -1), table(rows, **params))
    counts = torch.bincount(drawn, minlength=vocabulary).double()
    support = probabilities > 0
    assert not counts[~support].any()
    chi_square = ((counts - rows * probabilities)[support] ** 2 / (rows * probabilities[support])).sum().item()
    freedom = int(support.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 4


def chain_of(rows, tokens, vocabulary=4096):
    """The default chain, and a table in which each row has its own parameters and history."""
    parts = [registry.resolve("processor", name) for name in DEFAULT_PROCESSORS]
    chain = Chain(parts, Categorical()).bind(Context(None, vocabulary))
    declared = declared_params()
    full = [{**{name: param.default for name, param in declared.items()}, **row} for row in rows]
    return chain, make_batch(chain, declared, full, tokens, prompt_lengths=[0] * len(rows), seeds=range(len(rows)))


def choices(logits, rows):
    """What the chain chooses, on candidates where it can, and what its parts choose from all of the vocabulary."""
    chain, batch = chain_of(rows, [[1, 2]] * len(rows), logits.shape[1])
    before = logits.clone()
    chosen = chain(logits, batch).tokens
    assert torch.equal(logits.nan_to_num(7.5), before.nan_to_num(7.5))
    return chosen, Categorical()(chain.scores(logits, batch), batch)


ROW = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-50, 1e-5, 0.7, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 2, 5, 40, 10**6]),
        "top_p": st.sampled_from([0.0, 0.3, 0.9, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    }
)


@settings(deadline=None, max_examples=30)
@given(st.lists(ROW, min_size=1, max_size=6), st.sampled_from([2, 7, 1024, 4096, 5000]), st.sampled_from([0, 1, 5]))
def test_the_window_changes_nothing(rows, vocabulary, digits):
    """Candidates looked at first, or all of the vocabulary: the same tokens, also where logits tie."""
    generator = torch.Generator().manual_seed(len(rows) * vocabulary + digits)
    logits = (3 * torch.randn(len(rows), vocabulary, generator=generator)).round(decimals=digits)
    chosen, expected = choices(logits, rows)
    assert torch.equal(chosen, expected) and (chosen >= 0).all()


@pytest.mark.parametrize("params", [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 40, "top_p": 0.9}])
def test_the_window_serves_many_seeds(params):
    logits = 2 * torch.randn(1, 4096, generator=torch.Generator().manual_seed(2)).expand(200, -1)
    chosen, expected = choices(logits, [params] * 200)
    assert torch.equal(chosen, expected) and len(set(chosen.tolist())) > 3


def test_a_row_that_keeps_more_than_the_window_is_drawn_from_all():
    """The bound on candidates is a guess (equal logits all stay): a wrong guess must not cut the support."""
    chosen, expected = choices(torch.zeros(400, 4096), [{"top_k": 2}] * 400)
    assert torch.equal(chosen, expected) and len(set(chosen.tolist())) > 300


TRUNCATIONS = {
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.4},
    "min_p": {"min_p": 0.3},
    "top_h": {"top_h": 0.6},
    "epsilon_cutoff": {"epsilon_cutoff": 1e-3},
    "eta_cutoff": {"eta_cutoff": 1e-2},
    "top_n_sigma": {"top_n_sigma": 1.0},
    "top_a": {"top_a": 0.3},
    "tfs": {"tfs": 0.9},
    "p_less": {"p_less": True},
    "xtc": {"xtc_probability": 0.5, "xtc_threshold": 0.01},
}
"""Parts that narrow a window, and values that mostly leave few tokens of most rows and many of some."""
LEVELS = {
    "a few, then many equals": [(1, 1.0), (1, 0.5), (100, 0.01), (4000, 3e-5)],
    "many equals": [(400, 1.0), (4000, 0.1)],
    "one, then a plateau": [(1, 1.0), (3000, 0.5)],
    "few": [(2, 1.0), (3, 0.4), (4000, 1e-9)],
}
"""Rows of 4,096 as (tokens, weight) from the likeliest down; the rest weighs nothing."""


@settings(deadline=None, max_examples=70)
@given(
    st.lists(st.sampled_from(sorted(TRUNCATIONS)), min_size=2, max_size=3, unique=True),
    st.lists(st.sampled_from(sorted(LEVELS)), min_size=1, max_size=3),
    st.sampled_from([0.7, 1.0]),
)
def test_a_truncation_behind_another_knows_what_that_left(names, kinds, temperature):
    """In any order, also where the first one keeps more than the window holds."""
    rows = torch.full((len(kinds), 5000), 1e-12)
    for row, kind in zip(rows, kinds, strict=True):
        levels = torch.cat([torch.full((count,), weight) for count, weight in LEVELS[kind]])
        row[: len(levels)] = levels
    rows = rows[:, :4096].log().repeat(16, 1)
    order = torch.randperm(4096, generator=torch.Generator().manual_seed(1))
    parts = [registry.resolve("processor", name) for name in ("temperature", *names)]
    params = {"temperature": temperature, **{key: value for name in names for key, value in TRUNCATIONS[name].items()}}
    declared = declared_params()
    row = {**{name: param.default for name, param in declared.items()}, **params}
    chain = Chain(parts, Categorical()).bind(Context(None, 4096))
    batch = make_batch(chain, declared, [row] * len(rows), [[1]] * len(rows), seeds=range(len(rows)))
    logits = rows[:, order]
    chosen = chain(logits, batch).tokens
    assert torch.equal(chosen, Categorical()(chain.scores(logits, batch), batch))


@pytest.mark.parametrize("bad, code", [(math.nan, NON_FINITE), (math.inf, NON_FINITE), (-math.inf, EXCLUDED)])
@settings(deadline=None, max_examples=12)
@given(ROW, st.booleans(), st.sampled_from([9, 4096]))
def test_faults_are_found_on_candidates_too(bad, code, row, everywhere, vocabulary):
    """NaN, +inf, or nothing left, in one row of two; the other gets its token."""
    logits = torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    if everywhere or bad == -math.inf:
        logits[1] = bad
    else:
        logits[1, 5] = bad
    chosen, expected = choices(logits, [row, row])
    assert chosen[1] == code and chosen[0] == expected[0] >= 0


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([2, 9, 4096, 20_000]),
    st.sampled_from([0.0, 0.1, 1.0, 5.0, 80.0, 1e6]),
    st.sampled_from([0.0, 1e4, -1e4]),
    st.integers(0, 2**53),
    st.booleans(),
)
def test_noise_is_spared_where_it_cannot_win(vocabulary, spread, shift, seed, double):
    """Drawing from all tokens is the argmax of logits plus the noise of each, removed tokens or not."""
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread + shift
    logits[1, ::2] = -math.inf
    logits[2, :-1] = -math.inf
    if double:
        logits = logits.double()
    batch = Batch.of([[1], [2], [3]], seeds=[seed, seed + 1, seed], columns={"temperature": torch.ones(3)})
    noisy = logits + gumbel(batch.uniform("categorical", torch.arange(vocabulary)))
    assert torch.equal(Categorical()(logits, batch), noisy.argmax(-1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("further", [{}, {"top_k": 3}, {"logit_bias": {7: 2.0}}, {"mirostat": 2}])
def test_penalties_borrow_the_raw_logits(temperature, further):
    """They are written to while the chain runs, and are afterwards what they were; the choice is the plain one's."""
    logits = torch.randn(4, 4096, generator=torch.Generator().manual_seed(4))
    tokens = logits.topk(9).indices.tolist()
    penalties = {"repetition_penalty": 3.0, "presence_penalty": 2.0, "frequency_penalty": 1.0, "dry_multiplier": 1.0}
    chain, batch = chain_of(
        [{**penalties, **further, "temperature": temperature, "dry_sequence_breakers": ()}] * 4, tokens
    )
    before = logits.clone()
    chosen = chain(logits, batch).tokens
    assert torch.equal(logits, before)
    assert torch.equal(chosen, Categorical()(chain.scores(logits, batch), batch))
    assert not any(token in row for token, row in zip(chosen.tolist(), tokens, strict=True))


def test_borrowed_logits_are_given_back_after_an_error():
    logits = torch.randn(1, 4096, generator=torch.Generator().manual_seed(5))
    chain, batch = chain_of([{"repetition_penalty": 3.0}], [[1, 2, 3]])

    def fail(scores, batch):
        raise ZeroDivisionError

    fail.traits = frozenset({"pure"})
    broken = Chain([*chain.processors, fail], chain.sampler)
    before = logits.clone()
    with pytest.raises(ZeroDivisionError):
        broken(logits, batch)
    assert torch.equal(logits, before)


def test_the_best_of_a_window_is_the_lowest_id_among_equals():
    """Whatever their order in it."""
    window = Candidates.of(torch.zeros(2, 4), 4)._replace(ids=np.array([[3, 2, 0, 1], [0, 3, 1, 2]]))
    assert window.index_of_best(np.array([[5.0, 5, 1, 5], [0, 2, 2, 2]])).tolist() == [3, 2]


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0], [-math.inf, -math.inf, 0.0, 0.0]])
    assert Greedy()(logits, table(3)).tolist() == [1, 0, 2]
    assert Categorical()(logits, table(3, temperature=0.0)).tolist() == [1, 0, 2]
    wide = torch.zeros(2, 4096).index_fill(1, torch.tensor([1234, 4000]), 1.0)
    chosen, expected = choices(wide, [{"temperature": 0.0, "top_k": 2}, {"temperature": 0.0, "top_k": 1, "top_p": 0.1}])
    assert chosen.tolist() == expected.tolist() == [1234, 1234]


def test_rows_of_temperature_0_are_greedy_among_others():
    logits = torch.randn(40, 30, generator=torch.Generator().manual_seed(3))
    batch = table(40)
    cold = torch.arange(40) % 2 == 0
    columns = {"temperature": torch.where(cold, 0.0, 1.0).double()}
    mixed = Batch.of([[1]] * 40, seeds=range(40), columns=columns, values={"temperature": frozenset({0.0, 1.0})})
    drawn = Categorical()(logits, mixed)
    assert torch.equal(drawn[cold], logits.argmax(-1)[cold])
    assert torch.equal(drawn[~cold], Categorical()(logits, batch)[~cold])
    assert not torch.equal(drawn[~cold], logits.argmax(-1)[~cold])


@pytest.mark.parametrize("sampler", [Greedy(), Categorical()])
def test_one_finite_token_is_chosen(sampler):
    logits = torch.full((20, 9), -math.inf)
    logits[:, 4] = -1e9
    assert sampler(logits, table(20)).tolist() == [4] * 20


def test_greedy_sampler_ignores_temperature(pipe):
    """``sampler="greedy"`` is temperature 0, whatever the request says."""
    greedy = pipe.replace(sampler="greedy")
    assert greedy([5, 6], temperature=1.7, seed=3).token_ids == pipe([5, 6], temperature=0).token_ids
