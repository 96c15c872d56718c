"""Who runs a workload: this package, and transformers in two ways. Each has a model of its own, with the same weights.

A contender takes jobs and returns the tokens of each job's answer, in order, greedily, ``new_tokens`` of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from workload import Job

from llama_infer import Pipeline, Request

Contender: TypeAlias = Callable[[Sequence[Job]], list[list[int]]]

PADDED_BATCH = 16


def ours(model: Any, batch_size: int | None = None) -> Contender:
    """This package: ``Pipeline.run`` with nothing but a length to stop at."""
    pipe = Pipeline(model, stopping=("length",), batch_size=batch_size, params={"temperature": 0})

    def run(jobs: Sequence[Job]) -> list[list[int]]:
        requests = (Request(job.prompt, {"max_new_tokens": job.new_tokens}) for job in jobs)
        return [list(completion.token_ids) for completion in pipe.run(requests)]

    return run


def loop(model: Any) -> Contender:
    """transformers' ``generate``, one prompt at a time."""

    def run(jobs: Sequence[Job]) -> list[list[int]]:
        return [_generate(model, [job])[0] for job in jobs]

    return run


def padded(model: Any) -> Contender:
    """transformers' ``generate`` on left-padded batches of 16, the prompts sorted by length so that little is padded.

    How long an answer will be is nobody's to know in advance, so it is not sorted by.
    """

    def run(jobs: Sequence[Job]) -> list[list[int]]:
        order = sorted(range(len(jobs)), key=lambda at: len(jobs[at].prompt))
        answers: list[list[int]] = [[] for _ in jobs]
        for start in range(0, len(order), PADDED_BATCH):
            rows = order[start : start + PADDED_BATCH]
            for at, answer in zip(rows, _generate(model, [jobs[row] for row in rows]), strict=True):
                answers[at] = answer
        return answers

    return run


PEERS: dict[str, Callable[[Any], Contender]] = {"loop": loop, "padded": padded}


def _generate(model: Any, jobs: Sequence[Job]) -> list[list[int]]:
    """One call of ``generate``, left-padded, as far as the longest answer goes; each job's share of it."""
    width = max(len(job.prompt) for job in jobs)
    ids = torch.zeros(len(jobs), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, job in enumerate(jobs):
        ids[row, width - len(job.prompt) :] = torch.tensor(job.prompt)
        mask[row, width - len(job.prompt) :] = 1
    found = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max(job.new_tokens for job in jobs),
        do_sample=False,
        pad_token_id=0,
    )
    return [row[width : width + job.new_tokens].tolist() for row, job in zip(found, jobs, strict=True)]
