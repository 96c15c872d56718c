"""Cutoffs, typical and tail-free sampling against their definitions written out, and against transformers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from part_oracles import (
    agrees_with,
    at_least,
    check_truncation,
    entropy,
    logit_rows,
    probabilities,
    table,
    tolerance,
    wide_rows,
)
from transformers.generation import logits_process as theirs

from llama_infer.candidates import Candidates
from llama_infer.errors import ParameterError
from llama_infer.processors import cutoffs, shapes


def epsilon(row, epsilon_cutoff):
    return at_least(row, epsilon_cutoff)


def eta(row, eta_cutoff):
    return at_least(row, min(eta_cutoff, math.sqrt(eta_cutoff) * math.exp(-entropy(row))))


def top_a(row, top_a):
    return at_least(row, top_a * probabilities(row).max() ** 2)


def top_n_sigma(row, top_n_sigma):
    if top_n_sigma == 0:
        return np.ones(len(row), bool), np.zeros(len(row), bool)
    limit = row.max() - top_n_sigma * row[np.isfinite(row)].std()
    return row >= limit, (np.abs(row - limit) < tolerance(row) * (1 + top_n_sigma)) & (row < row.max())


def p_less(row, p_less):
    return at_least(row, (probabilities(row) ** 2).sum() if p_less else 0)


def p_less_norm(row, p_less_norm):
    size = len(row)
    agreement = (probabilities(row) ** 2).sum()
    limit = (size * agreement - 1) / (size - 1)
    kept, near = at_least(row, max(0.0, limit) if p_less_norm else 0)
    # The difference of two nearly equal numbers: on rows that are almost flat rounding is all there is.
    p = probabilities(row)
    return kept, near | (p_less_norm & (np.abs(p - limit) < 1e-6 * agreement))


def top_h(row, top_h):
    if top_h == 1:
        return np.ones(len(row), bool), np.zeros(len(row), bool)
    best = np.sort(row)[::-1][:100]
    p = probabilities(best)
    parts = np.array([-x * math.log(x) if x > 0 else 0.0 for x in p])
    cumulative = np.cumsum(parts)
    bound = top_h * parts.sum()
    last = best[max(1, int((cumulative <= bound).sum())) - 1]
    unclear = np.abs(cumulative - bound).min() < 1e-9 and bound > 0
    return row >= last, np.full(len(row), unclear)


def typical(row, typical_p):
    if typical_p == 1:
        return np.ones(len(row), bool), np.zeros(len(row), bool)
    p = probabilities(row)
    with np.errstate(divide="ignore"):
        distance = np.abs(-np.log(p) - entropy(row))
    order = np.argsort(distance, kind="stable")
    cumulative = np.cumsum(p[order])
    limit = distance[order[min(int((cumulative < typical_p).sum()), len(row) - 1)]]
    unclear = np.abs(cumulative - typical_p).min() < 1e-6
    with np.errstate(invalid="ignore"):
        return distance <= limit, (np.abs(distance - limit) < 2 * tolerance(row)) | unclear


def tail_free(row, tfs):
    finite = np.sort(row[np.isfinite(row)])[::-1]
    bends = np.abs(np.diff(probabilities(finite), 2))
    if tfs == 1 or bends.sum() <= 1e-9 * probabilities(finite).max():
        return np.ones(len(row), bool), np.zeros(len(row), bool)
    shares = np.cumsum(bends) / bends.sum()
    last = finite[max(1, int((shares <= tfs).sum())) - 1]
    return row >= last, np.full(len(row), np.abs(shares - tfs).min() < 1e-9)


CASES = {
    "epsilon_cutoff": (cutoffs.EpsilonCutoff(), epsilon, st.sampled_from([0.0, 1e-6, 3e-4, 0.01, 0.3, 0.999])),
    "eta_cutoff": (cutoffs.EtaCutoff(), eta, st.sampled_from([0.0, 1e-6, 3e-4, 0.01, 0.3, 0.999])),
    "top_a": (cutoffs.TopA(), top_a, st.floats(0, 1, width=32)),
    "top_n_sigma": (cutoffs.TopNSigma(), top_n_sigma, st.sampled_from([0.0, 1e-3, 0.5, 1.0, 2.5, 100.0])),
    "p_less": (cutoffs.PLess(), p_less, st.booleans()),
    "p_less_norm": (cutoffs.PLessNorm(), p_less_norm, st.booleans()),
    "top_h": (cutoffs.TopH(), top_h, st.floats(0, 1, width=32)),
    "typical_p": (shapes.TypicalP(), typical, st.floats(2**-20, 1, width=32)),
    "tfs": (shapes.TailFree(), tail_free, st.floats(0, 1, width=32)),
}


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_keeps_what_its_definition_keeps(name, data):
    part, definition, values = CASES[name]
    logits = data.draw(logit_rows())
    rows = [{name: data.draw(values)} for _ in logits]
    out = check_truncation(part, logits, rows, definition)
    if "keeps_argmax" in part.traits:
        likeliest = logits == logits.amax(-1, keepdim=True)
        assert (out > -math.inf)[likeliest].all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon_cutoff", 3e-4),
        ("epsilon_cutoff", 8e-6),  # among thousands of tokens that are about as likely
        ("eta_cutoff", 3e-4),
        ("eta_cutoff", 8e-6),
        ("top_a", 0.2),
        ("top_n_sigma", 1.0),
        ("top_n_sigma", 4.5),
        ("p_less", True),
        ("p_less_norm", True),
        ("top_h", 0.4),
        ("typical_p", 0.2),
        ("typical_p", 0.9),
        ("tfs", 0.95),
    ],
)
def test_on_a_real_vocabulary(name, value):
    part, definition, _ = CASES[name]
    out = check_truncation(part, wide_rows(), [{name: value}] * 3, definition)
    assert (out > -math.inf).sum() < 3 * 128256


def test_typical_histogram_reaches_every_mass():
    """Flat rows, whose kept set no window holds, at masses up to the last token's."""
    logits = wide_rows()[1:2, :5000]
    for mass in (0.5, 0.999, 1 - 1e-7):
        check_truncation(shapes.TypicalP(), logits, [{"typical_p": mass}], typical)


@pytest.mark.parametrize("name", [name for name, (part, _, _) in CASES.items() if hasattr(part, "narrow")])
def test_a_window_is_enough_on_peaked_rows(name):
    """Else the chain would do every row in full."""
    value = {"p_less": True, "top_n_sigma": 1.0, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01}.get(name, 0.5)
    logits = wide_rows()[:1]
    narrowed = CASES[name][0].narrow(Candidates.of(logits, 256), table(CASES[name][0], [{name: value}]))
    assert (narrowed.fits & narrowed.complete).all()
    assert (narrowed.values == -math.inf).any()


def test_typical_tokens_may_all_be_outside_of_the_window():
    """600 likely tokens, but more of the mass, and of what is typical, in thousands of less likely ones."""
    generator = torch.Generator().manual_seed(4)
    logits = 0.01 * torch.randn(1, 5000, generator=generator)
    logits[0, :600] = torch.linspace(1.1, 0.9, 600)
    out = check_truncation(shapes.TypicalP(), logits, [{"typical_p": 0.05}], typical)
    assert (out[0, :600] == -math.inf).all()


def test_tail_free_by_hand():
    """Bends |.5 - .6 + .1| = 0, |.3 - .2 + .06| = .16, |.1 - .12 + .04| = .02: their shares sum to 0, .889, 1."""
    logits = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]]).log()
    expected = {0.0: 1, 0.5: 1, 0.85: 1, 0.9: 2, 0.99: 2}
    for tfs, kept in expected.items():
        out = check_truncation(shapes.TailFree(), logits, [{"tfs": tfs}], None)
        assert int((out > -math.inf).sum()) == kept, tfs


def smooth(seed, size=1000):
    return 3 * torch.randn(4, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CASES)
def test_float64_and_equal_logits(name):
    """Where all tokens are equal a limit may be exactly theirs, and rounding must not drop them."""
    part, definition, _ = CASES[name]
    value = {"p_less": True, "p_less_norm": True}.get(name, 0.5)
    for size in (2, 3, 7, 40, 150, 1200):
        for level in (0.0, 0.1, -7.3):
            logits = torch.full((2, size), level, dtype=torch.float64)
            logits[1, 1:] -= torch.arange(1, size)
            out = check_truncation(part, logits, [{name: value}] * 2, definition)
            assert torch.equal(out[0], logits[0])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("value", [3e-4, 0.01, 0.3])
def test_agrees_with_transformers_cutoffs(seed, value):
    agrees_with(theirs.EpsilonLogitsWarper(value), cutoffs.EpsilonCutoff(), smooth(seed), {"epsilon_cutoff": value})
    agrees_with(theirs.EtaLogitsWarper(value), cutoffs.EtaCutoff(), smooth(seed), {"eta_cutoff": value})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("value", [0.05, 0.4, 0.95])
def test_agrees_with_transformers_top_h_and_typical(seed, value):
    agrees_with(theirs.TopHLogitsWarper(value), cutoffs.TopH(), smooth(seed), {"top_h": value})
    logits = smooth(seed)
    near = torch.stack([torch.from_numpy(typical(row.double().numpy(), value)[1]) for row in logits])
    agrees_with(theirs.TypicalLogitsWarper(value), shapes.TypicalP(), logits, {"typical_p": value}, near)


@pytest.mark.parametrize("name", CASES)
def test_rows_without_a_finite_token_or_with_nan_pass(name):
    part, _, _ = CASES[name]
    value = {"p_less": True, "p_less_norm": True}.get(name, 0.5)
    logits = torch.stack([torch.full((6000,), -math.inf), torch.zeros(6000)])
    logits[1, 3] = math.nan
    out = part(logits, table(part, [{name: value}] * 2))
    assert torch.equal(out[0], logits[0])
    assert out[1].isnan().sum() == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon_cutoff", 1.0),
        ("eta_cutoff", -0.1),
        ("top_a", 1.5),
        ("top_n_sigma", -1.0),
        ("p_less", 1.0),
        ("top_h", 1.01),
        ("typical_p", 0.0),
        ("tfs", -0.1),
    ],
)
def test_refuses_what_is_out_of_range(name, value):
    param = CASES[name][0].params[name]
    with pytest.raises(ParameterError, match=name):
        param.validate(name, value)


def test_importing_loads_no_torch():
    import subprocess
    import sys

    modules = ", ".join(f"llama_infer.processors.{m}" for m in "cutoffs shapes xtc mirostat adaptive dynamic".split())
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
