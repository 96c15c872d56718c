"""What the host reads of a step: the logarithm of a row's sum, on any logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_infer.engine.readout import _log_total

ROWS = {
    "usual": lambda noise: 4 * noise,
    "large": lambda noise: 4 * noise + 300,
    "small": lambda noise: 4 * noise - 300,
    "spread": lambda noise: 90 * noise,
    "one": lambda noise: torch.full_like(noise, -math.inf).index_fill(0, torch.tensor([3]), -70.0),
    "hardly any": lambda noise: noise - 86,
}


@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from(sorted(ROWS)), min_size=1, max_size=4), st.sampled_from([5, 3000]), st.integers(0, 99))
def test_the_sum_is_that_in_float64(kinds, vocabulary, seed):
    noise = torch.randn(len(kinds), vocabulary, generator=torch.Generator().manual_seed(seed))
    logits = torch.stack([ROWS[kind](row) for kind, row in zip(kinds, noise, strict=True)])
    torch.testing.assert_close(_log_total(logits).double(), logits.double().logsumexp(-1), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(("fault", "total"), [(math.nan, math.nan), (math.inf, math.inf), (-math.inf, -math.inf)])
def test_faults_show(fault, total):
    logits = torch.zeros(2, 9)
    logits[1] = fault if fault == -math.inf else logits[1].index_fill(0, torch.tensor([4]), fault)
    found = _log_total(logits).tolist()
    assert found[0] == pytest.approx(math.log(9)) and found[1:] == pytest.approx([total], nan_ok=True)
