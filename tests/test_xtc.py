"""XTC: which tokens go, how often, and what is protected."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from part_oracles import check_truncation, logit_rows, neutral, probabilities, table, tolerance, wide_rows

from llama_infer.candidates import Candidates
from llama_infer.errors import ParameterError
from llama_infer.parts import Context
from llama_infer.processors.xtc import XTC
from llama_infer.testing import byte_tokenizer


def definition(row, xtc_probability, xtc_threshold=0.1, xtc_protected=None):
    """With certainty (a probability of 1): all that reach the threshold but the least likely of them."""
    everything = np.ones(len(row), bool)
    if xtc_probability == 0:
        return everything, ~everything
    p = probabilities(row)
    top = (p >= xtc_threshold) & (p > 0)
    if top.sum() < 2:
        kept = everything
    else:
        kept = ~top | (p == p[top].min())
    if xtc_protected and not kept[list(xtc_protected)].all():
        kept = everything
    with np.errstate(divide="ignore"):
        edge = np.abs(np.log(p) - np.log(xtc_threshold)) < tolerance(row) if xtc_threshold else np.zeros(len(row), bool)
    # A token on the edge decides about others too.
    return kept, np.full(len(row), bool(edge.any()))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_removes_what_its_definition_removes(data):
    logits = data.draw(logit_rows())
    ids = st.lists(st.integers(0, logits.shape[1] - 1), max_size=3).map(tuple)
    rows = [
        {
            "xtc_probability": data.draw(st.sampled_from([0.0, 1.0])),
            "xtc_threshold": data.draw(st.sampled_from([0.0, 1e-3, 0.05, 0.1, 0.3, 0.5, 0.7, 1.0])),
            "xtc_protected": data.draw(ids),
        }
        for _ in logits
    ]
    check_truncation(XTC(), logits, rows, definition)


def test_on_a_real_vocabulary():
    out = check_truncation(XTC(), wide_rows(), [{"xtc_probability": 1.0, "xtc_threshold": 0.02}] * 3, definition)
    assert (out[0] == -math.inf).sum() > 3
    assert torch.equal(out[1], wide_rows()[1])


def test_by_hand():
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log()
    for threshold, gone in {0.05: [0, 2, 3], 0.15: [0, 2], 0.25: [0], 0.35: [], 0.5: []}.items():
        out = XTC()(logits, table(XTC(), [{"xtc_probability": 1.0, "xtc_threshold": threshold}]))
        assert (out[0] == -math.inf).nonzero()[:, 0].tolist() == gone, threshold


def test_the_coin_falls_as_often_as_asked():
    rows, chance = 4000, 0.3
    logits = torch.zeros(rows, 5)
    logits[:, 0] = 1.0
    batch = table(XTC(), [{"xtc_probability": chance, "xtc_threshold": 0.1}] * rows, seeds=range(rows))
    fell = (XTC()(logits, batch)[:, 0] == -math.inf).double()
    assert abs(float(fell.mean()) - chance) < 5 * math.sqrt(chance * (1 - chance) / rows)
    assert torch.equal(fell > 0, batch.uniform("xtc") < chance)


def test_protects_end_tokens_and_newline_unless_told():
    """A row in which one of them would go stays as it is; one in which none would loses its top choices."""
    context = Context(byte_tokenizer(), 264, end_token_ids=(257, 260))
    part = XTC().bind(context)
    assert set(part.protected) == {257, 260, 10}
    logits = torch.full((4, 264), -20.0)
    for row, token in enumerate((257, 10, 65, 260)):
        logits[row, [token, 66, 67]] = torch.tensor([2.0, 1.0, 0.5])
    batch = table(part, [{"xtc_probability": 1.0}] * 4)
    out = part(logits, batch)
    assert torch.equal(out[[0, 1, 3]], logits[[0, 1, 3]])
    assert (out[2] == -math.inf).nonzero()[:, 0].tolist() == [65, 66]
    free = part(logits, table(part, [{"xtc_probability": 1.0, "xtc_protected": ()}] * 4))
    assert ((free == -math.inf).sum(-1) == 2).all()
    other = part(logits, table(part, [{"xtc_probability": 1.0, "xtc_protected": (66,)}] * 4))
    assert torch.equal(other, logits)
    kept = part(logits, table(part, [{"xtc_probability": 1.0, "xtc_protected": (67,)}] * 4))
    assert ((kept == -math.inf).sum(-1) == 2).all()


def test_rows_keep_their_protected_tokens_when_selected_and_extended():
    rows = [{"xtc_probability": 1.0, "xtc_protected": ids} for ids in ((1,), (0, 2, 3), ())]
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log().expand(3, -1)
    batch = table(XTC(), rows)
    moved = batch.select(torch.tensor([2, 0])).extend(table(XTC(), rows[1:2]))
    expected = XTC()(logits, batch)[[2, 0, 1]]
    assert torch.equal(XTC()(logits, moved), expected)
    assert len({tuple(row) for row in expected.tolist()}) > 1


def test_refuses_tokens_that_do_not_exist():
    part = XTC().bind(Context(None, 10))
    assert part.protected == ()
    with pytest.raises(ParameterError, match="token 10 is not in the vocabulary of 10"):
        part.prepare("xtc_protected", [(10,)])
    for bad in ((-1,), ("a",), (True,), (1.0,)):
        with pytest.raises(ParameterError, match="xtc_protected"):
            part.params["xtc_protected"].validate("xtc_protected", bad)


def test_neutral_needs_the_switch_alone():
    off = {**neutral(XTC()), "xtc_threshold": 0.01, "xtc_protected": (1,)}
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(XTC()(logits, table(XTC(), [off] * 2)), logits)
    assert [name for name, param in XTC.params.items() if param.neutral is not None] == ["xtc_probability"]


def test_a_token_right_at_the_threshold_counts():
    """Also on equals of the likeliest, whose probability is exact."""
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, -math.inf, 1.0]])
    batch = table(XTC(), [{"xtc_probability": 1.0, "xtc_threshold": 0.25}, {"xtc_probability": 1.0}])
    assert torch.equal(XTC()(logits, batch), torch.tensor([[0.0] * 4, [-math.inf, 0.0, -math.inf, -math.inf]]))


def test_candidates_stay_in_descending_order():
    """What was excluded lies behind the others, where the parts behind expect it."""
    logits = 2 * torch.randn(64, 5000, generator=torch.Generator().manual_seed(4))
    batch = table(XTC(), [{"xtc_probability": 0.5, "xtc_threshold": 0.01}] * 64, seeds=range(64))
    inside = Candidates.of(logits.where(logits >= logits.topk(99).values[:, -1:], -math.inf), 256)
    narrowed = XTC().narrow(inside, batch)
    assert narrowed.fits.all() and (narrowed.values[:, 1:] <= narrowed.values[:, :-1]).all()
    fallen = (batch.uniform("xtc") < 0.5).numpy()
    assert ((narrowed.values > -math.inf).sum(-1) < 99).tolist() == fallen.tolist()
    unsure = XTC().narrow(Candidates.of(logits, 256), batch)
    assert unsure.fits[:, 0].tolist() == (~fallen).tolist()
