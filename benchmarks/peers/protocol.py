"""One engine in a process of its own: a JSON object a line in, one out. Standard library only: every peer has another
environment.

An engine is a class with

    load(model, dtype, threads, rows, context, **options)
    generate(jobs, together) -> (tokens of each job, when each of them came, in ``time.perf_counter`` seconds)

and, where it can, further methods that a suite asks for by name. ``jobs`` are pairs (prompt ids, new tokens), decoded
greedily to exactly that length; ``together`` says that they are to be decoded as one batch.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any


class Caller:
    """Calls an engine's methods by name, with what every engine is asked for: times and memory."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __call__(self, op: str, **arguments: Any) -> Any:
        if op == "generate":
            start = time.perf_counter()
            tokens, times = self._engine.generate(**arguments)
            seconds = time.perf_counter() - start
            return {"tokens": tokens, "times": [[t - start for t in row] for row in times], "seconds": seconds}
        if op == "memory":
            return memory()
        return getattr(self._engine, op)(**arguments)


def memory() -> dict[str, int]:
    """Bytes of this process: the most that was ever resident, and what is now."""
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10, "now": resident}


def serve(make: Any) -> None:
    """Answers calls until the input ends. What a library prints goes to the error output."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    call = Caller(make())
    for line in sys.stdin:
        try:
            answer = {"result": call(**json.loads(line))}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=out, flush=True)
