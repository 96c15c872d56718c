"""The watermark against its hash written out in Python's integers, and its detector against the statistics."""

from __future__ import annotations

import math

import pytest
import torch
from history_oracles import MODEST, Case, cases, check, is_neutral, refuses, scores
from hypothesis import given
from hypothesis import strategies as st
from oracles import GAMMA, MASK, split_mix

from llama_infer.errors import ParameterError
from llama_infer.processors.watermark import Watermark, WatermarkDetector

KEY = 15485863


def is_green(token, before, ratio=0.25, key=KEY):
    """``before``: the tokens that count, oldest first."""
    state = split_mix((key + GAMMA) & MASK)
    for known in before:
        state = split_mix((state + (known + 1) * GAMMA) & MASK)
    bits = split_mix((state + (token // 4 + 1) * GAMMA) & MASK) >> 16 * (token % 4) & 0xFFFF
    signed = bits - (1 << 16) if bits >= 1 << 15 else bits
    return signed + 32768 < min(max(round(ratio * 65536), 1), 65535)


def watermarked(logits, history, prompt_length, params):
    width = params["watermark_context_width"]
    if len(history) < width:
        return logits
    settings = params["watermark_greenlist_ratio"], params["watermark_key"]
    return [
        x + params["watermark_bias"] * is_green(token, history[len(history) - width :], *settings)
        for token, x in enumerate(logits)
    ]


@MODEST
@given(cases(largest_vocabulary=23), st.data())
def test_green_tokens_are_raised(case, data):
    params = [
        {
            "watermark_bias": data.draw(st.sampled_from([-2.0, 0.0, 2.0, 50.0])),
            "watermark_greenlist_ratio": data.draw(st.sampled_from([1e-9, 0.25, 0.5, 1 - 1e-9])),
            "watermark_key": data.draw(st.sampled_from([0, KEY, (1 << 63) - 1])),
            "watermark_context_width": data.draw(st.integers(1, 4)),
        }
        for _ in case.histories
    ]
    check(Watermark(), case, params, watermarked)


def test_the_green_share_of_a_wide_vocabulary():
    """Within four standard deviations of the ratio, other tokens for another context or key."""
    case = Case(torch.zeros(4, 128256), [[5], [6], [5], [5, 5]], [0] * 4)
    params = [{"watermark_bias": 1.0, "watermark_greenlist_ratio": ratio} for ratio in (0.25, 0.25, 0.1, 0.25)]
    green = scores(Watermark(), case, params)
    for share, wanted in zip(green.mean(1).tolist(), (0.25, 0.25, 0.1, 0.25), strict=True):
        assert abs(share - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / 128256)
    assert torch.equal(green[0], green[3])
    both = (green[0] * green[1]).mean().item()
    assert abs(both - 0.25**2) < 4 * math.sqrt(0.0625 * 0.9375 / 128256)


def generated(bias, steps=150, vocabulary=400, **settings):
    """Tokens drawn from flat noise, with the watermark."""
    generator = torch.Generator().manual_seed(3)
    tokens = [7, 8, 9]
    for _ in range(steps):
        logits = torch.randn(1, vocabulary, generator=generator)
        case = Case(logits, [tokens], [3])
        got = scores(Watermark(), case, [{"watermark_bias": bias, **settings}])
        tokens.append(int(torch.multinomial(got.softmax(-1), 1, generator=generator)))
    return tokens


def test_the_detector_finds_the_watermark_and_nothing_else():
    settings = {"watermark_greenlist_ratio": 0.5, "watermark_key": 42, "watermark_context_width": 2}
    tokens = generated(3.0, **settings)
    marked = WatermarkDetector(**settings)(tokens, prompt_length=3)
    assert marked.scored == 150 and marked.z_score > 6 and marked.p_value < 1e-9
    for other in ({"watermark_key": 43}, {"watermark_context_width": 1}):
        assert abs(WatermarkDetector(**{**settings, **other})(tokens, prompt_length=3).z_score) < 4
    plain = WatermarkDetector(**settings)(generated(0.0), prompt_length=3)
    assert abs(plain.z_score) < 4 and plain.p_value > 1e-5


@MODEST
@given(st.lists(st.integers(0, 30), max_size=40), st.integers(1, 3), st.integers(0, 10), st.booleans())
def test_the_detector_counts(tokens, width, prompt_length, ignore_repeats):
    found = WatermarkDetector(0.3, 11, width, ignore_repeats)(tokens, prompt_length)
    grams = [tuple(tokens[at - width : at + 1]) for at in range(max(width, prompt_length), len(tokens))]
    grams = list(set(grams)) if ignore_repeats else grams
    green = sum(is_green(gram[-1], gram[:-1], 0.3, 11) for gram in grams)
    assert (found.scored, found.green) == (len(grams), green)
    if not grams:
        assert (found.z_score, found.p_value) == (0.0, 1.0)
        return
    z_score = (green - 0.3 * len(grams)) / math.sqrt(len(grams) * 0.3 * 0.7)
    assert found.z_score == pytest.approx(z_score, abs=1e-3)
    assert found.p_value == pytest.approx(0.5 * math.erfc(z_score / math.sqrt(2)), abs=1e-3)


@MODEST
@given(cases())
def test_neutral_is_identity(case):
    is_neutral(Watermark(), case)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("watermark_bias", math.inf),
        ("watermark_greenlist_ratio", 0.0),
        ("watermark_greenlist_ratio", 1.0),
        ("watermark_key", -1),
        ("watermark_key", 1 << 63),
        ("watermark_context_width", 0),
        ("watermark_context_width", 17),
    ],
)
def test_bad_values_are_refused(name, value):
    refuses(Watermark(), name, value)
    if name != "watermark_bias":
        with pytest.raises(ParameterError, match=name):
            WatermarkDetector(**{name: value})


def test_the_detector_refuses_what_is_no_token():
    with pytest.raises(ParameterError, match="integers from 0"):
        WatermarkDetector()([3, -1])
