"""Many short requests through ``run``: whether a request costs the same in the end as in the beginning."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from models import SHAPES, checkpoint
from peers.protocol import memory
from session import Session
from table import show
from workload import equal

PARTS = 10


def run(session: Session) -> None:
    """A tiny model, prompts of 8 tokens and answers of 4, ten parts of equal size after one to warm up."""
    from llama_infer import Pipeline, Request

    options = session.options
    total = (options.requests or (40 if session.quick else 10_000)) // PARTS * PARTS
    size = total // PARTS
    folder = checkpoint("tiny", options.dtype, session.cache)
    pipe = Pipeline(str(folder), stopping=("length",), batch_size=options.batch_size, dtype=options.dtype)
    session.look()

    def requests() -> Iterator[Any]:
        for at in range(total + size):
            (job,) = equal(1, 8, 4, SHAPES["tiny"]["vocab_size"], str(at))
            yield Request(job.prompt, {"max_new_tokens": job.new_tokens, "temperature": 0})

    list(pipe.run(Request((1, 2, 3), {"max_new_tokens": 4}) for _ in range(options.batch_size)))  # kernels are compiled
    marks, resident = [], []
    for done, _ in enumerate(pipe.run(requests()), 1):
        if done % size == 0:
            marks.append(time.perf_counter())
            resident.append(memory()["now"])
    each = [1e3 * (b - a) / size for a, b in zip(marks, marks[1:], strict=False)]
    session.report["milliseconds_per_request"] = [round(value, 4) for value in each]
    session.report["ratios"]["last part over first"] = round(each[-1] / each[0], 3)
    session.report["memory_growth_mb"] = round((resident[-1] - resident[0]) / 1e6, 2)
    rows = [
        [f"{at * size + 1} - {(at + 1) * size}", f"{ms:.3f}", f"{resident[at + 1] / 1e6:.0f}"]
        for at, ms in enumerate(each)
    ]
    show(
        f"{total} requests, tiny {options.dtype}; last part over first {each[-1] / each[0]:.3f}, "
        f"memory {session.report['memory_growth_mb']:+.1f} MB",
        ["requests", "ms each", "resident MB"],
        rows,
    )
