"""What is to be decoded: jobs of random token ids whose lengths are known beforehand."""

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
    repeat: int = 0,
    prompt_tokens: tuple[int, int] = PROMPT_TOKENS,
    new_tokens: tuple[int, int] = NEW_TOKENS,
) -> list[Job]:
    """Workload W1, a file of prompts: both lengths are log-uniform in their ranges, ends included.

    Each ``repeat`` has other tokens, so that nobody remembers a prompt, and the same lengths.
    """
    lengths, tokens = random.Random(seed), random.Random(f"{seed} {repeat}")
    jobs = []
    for _ in range(count):
        length, answer = _log_uniform(lengths, *prompt_tokens), _log_uniform(lengths, *new_tokens)
        jobs.append(Job(_ids(tokens, length, vocab_size), answer))
    return jobs


def equal(count: int, prompt_tokens: int, new_tokens: int, vocab_size: int, seed: str) -> list[Job]:
    """``count`` jobs of equal lengths."""
    tokens = random.Random(seed)
    return [Job(_ids(tokens, prompt_tokens, vocab_size), new_tokens) for _ in range(count)]


def useful_tokens(jobs: Sequence[Job]) -> int:
    """Tokens that were asked for; what a padded batch decodes beyond them does not count."""
    return sum(job.new_tokens for job in jobs)


def _ids(tokens: random.Random, length: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(tokens.randrange(vocab_size) for _ in range(length))


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return min(high, int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))
