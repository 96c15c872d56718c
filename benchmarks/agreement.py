"""Whether two implementations compute the same thing, asked before anybody's speed is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from contenders import loop, ours
from models import build
from workload import Job, w1

LEAST_TEACHER_FORCED = 0.95
"""Two correct bfloat16 implementations differ in the likeliest token at 2-3 % of the positions on random weights."""


def exact_in_float32(count: int) -> bool:
    """On a small model in float32: our tokens are those of ``generate`` one row at a time, all of them."""
    mine, theirs = build("tiny", torch.float32), build("tiny", torch.float32)
    jobs = w1(count, mine.config.vocab_size, seed=1, new_tokens=(8, 64))
    return ours(mine)(jobs) == loop(theirs)(jobs)


@torch.no_grad()
def teacher_forced(model: Any, jobs: Sequence[Job], answers: Sequence[Sequence[int]]) -> float:
    """Share of the answers' tokens that ``model``, fed prompt and answer, finds the likeliest at their positions."""
    same = total = 0
    for job, answer in zip(jobs, answers, strict=True):
        ids = torch.tensor([[*job.prompt, *answer[:-1]]])
        best = model(input_ids=ids).logits[0, len(job.prompt) - 1 :].argmax(-1).tolist()
        same += sum(a == b for a, b in zip(best, answer, strict=True))
        total += len(answer)
    return same / total
