"""Whether contenders compute the same thing, asked before anybody's speed is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from contenders import Contender
from workload import w1

LEAST_TEACHER_FORCED = 0.95
"""Two correct bfloat16 implementations differ in the likeliest token at 2-3 % of the positions on random weights."""
NOISE = 0.03
"""Of a share counted over some hundred tokens."""


def exact(found: Mapping[str, Contender], vocab_size: int, count: int) -> dict[str, bool]:
    """Whose tokens are all those of "transformers", one row at a time. For a small model in float32."""
    jobs = w1(count, vocab_size, seed=1, prompt_tokens=(4, 64), new_tokens=(8, 64))
    expected = found["transformers"].generate(jobs).tokens
    return {name: contender.generate(jobs).tokens == expected for name, contender in found.items()}


def teacher_forced(found: Mapping[str, Contender], judge: Contender, vocab_size: int, count: int) -> dict[str, float]:
    """Share of each one's tokens that the judge, fed prompt and answer, finds the likeliest at their places."""
    jobs = w1(count, vocab_size, seed=2, prompt_tokens=(8, 64), new_tokens=(16, 32))
    pairs = [[list(job.prompt), job.new_tokens] for job in jobs]
    return {
        name: float(judge.call("agreement", jobs=pairs, answers=contender.generate(jobs).tokens))
        for name, contender in found.items()
    }


def holds(report: Mapping[str, Any], ours: str) -> bool:
    """Whether our tokens are exact in float32, and in bfloat16 as near to the reference as asked, or as its own are:
    fed its own answers at once, it does not find all of them the likeliest either."""
    shares = report.get("teacher_forced", {})
    asked = min(LEAST_TEACHER_FORCED, shares.get("transformers", 1.0) - NOISE)
    return bool(report.get("float32_exact", {}).get(ours, True) and shares.get(ours, 1.0) >= asked)
