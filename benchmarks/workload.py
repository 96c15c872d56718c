"""Workload W1, a file of prompts: short and long prompts, short and long answers, every length known beforehand."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

PROMPT_TOKENS = (16, 256)
NEW_TOKENS = (8, 128)


@dataclass(frozen=True)
class Job:
    """One request: token ids in, exactly ``new_tokens`` tokens out."""

    prompt: tuple[int, ...]
    new_tokens: int


def w1(
    count: int,
    vocab_size: int,
    *,
    seed: int = 0,
    prompt_tokens: tuple[int, int] = PROMPT_TOKENS,
    new_tokens: tuple[int, int] = NEW_TOKENS,
) -> list[Job]:
    """``count`` jobs of random token ids; both lengths are log-uniform in their ranges, ends included."""
    rng = random.Random(seed)
    jobs = []
    for _ in range(count):
        length, answer = _log_uniform(rng, *prompt_tokens), _log_uniform(rng, *new_tokens)
        jobs.append(Job(tuple(rng.randrange(vocab_size) for _ in range(length)), answer))
    return jobs


def useful_tokens(jobs: Sequence[Job]) -> int:
    """Tokens that were asked for; what a padded batch decodes beyond them does not count."""
    return sum(job.new_tokens for job in jobs)


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return min(high, int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))
