"""Many short requests through ``run``: whether a request costs the same in the end as in the beginning.

Once in some 15,000 requests Python looks through all objects that torch's and transformers' modules consist of; the
part in which it does says so.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    marks, resident, collecting = [], [], []
    with _collections() as spent:
        for done, _ in enumerate(pipe.run(requests()), 1):
            if done % size == 0:
                marks.append(time.perf_counter())
                resident.append(memory()["now"])
                collecting.append(sum(spent))
    each = [1e3 * (b - a) / size for a, b in zip(marks, marks[1:], strict=False)]
    looking = [1e3 * (b - a) for a, b in zip(collecting, collecting[1:], strict=False)]
    session.report["milliseconds_per_request"] = [round(value, 4) for value in each]
    session.report["milliseconds_of_full_collections"] = [round(value, 1) for value in looking]
    session.report["ratios"]["last part over first"] = round(each[-1] / each[0], 3)
    session.report["memory_growth_mb"] = round((resident[-1] - resident[0]) / 1e6, 2)
    rows = [
        [f"{at * size + 1} - {(at + 1) * size}", f"{ms:.3f}", f"{full:.0f}", f"{resident[at + 1] / 1e6:.0f}"]
        for at, (ms, full) in enumerate(zip(each, looking, strict=True))
    ]
    show(
        f"{total} requests, tiny {options.dtype}; last part over first {each[-1] / each[0]:.3f}, "
        f"memory {session.report['memory_growth_mb']:+.1f} MB",
        ["requests", "ms each", "full collections ms", "resident MB"],
        rows,
    )


@contextmanager
def _collections() -> Iterator[list[float]]:
    """The seconds of each full pass of Python's collector of cycles while this is open."""
    spent: list[float] = []
    start = 0.0

    def look(phase: str, info: dict[str, int]) -> None:
        nonlocal start
        if info["generation"] == 2 and phase == "start":
            start = time.perf_counter()
        elif info["generation"] == 2:
            spent.append(time.perf_counter() - start)

    gc.callbacks.append(look)
    try:
        yield spent
    finally:
        gc.callbacks.remove(look)
