"""The time of a step of many rows as their context grows, against the bytes of keys and values that it has to read."""

from __future__ import annotations

import statistics

import numpy as np
from contenders import Contender
from models import kv_bytes
from session import Session
from table import show, times
from workload import equal

NEW = 17


def run(session: Session) -> None:
    """Rows of equal context; the median step of sixteen at each length."""
    options = session.options
    rows = (options.rows or [2 if session.quick else 32])[0]
    contexts = options.contexts or ([8, 32] if session.quick else [64, 256, 512, 1024, 2048])
    peers = options.peers if options.peers is not None else ["transformers"]
    new = 5 if session.quick else NEW

    def turn(contender: Contender, repeat: int) -> list[float]:
        steps = []
        for context in contexts:
            jobs = equal(rows, context, new, session.vocab_size, f"{context} {repeat}")
            answer = contender.generate(jobs, together=True)
            steps.append(rows / answer.decode())
        return steps

    room = {"kv_bytes": int(1.2 * rows * (max(contexts) + 256) * kv_bytes(options.model, options.dtype)) + (64 << 20)}
    with session.contenders([session.ours, *peers], rows=rows, context=max(contexts) + 64, **room) as found:
        for contender in found.values():
            contender.generate(equal(2, 8, 4, session.vocab_size, "warm"))
        steps = session.take_turns(found, turn)
    slopes = {name: [float(np.polyfit(contexts, turn, 1)[0]) for turn in each] for name, each in steps.items()}
    lines = []
    for name, each in steps.items():
        step = [statistics.median(turn[at] for turn in each) for at in range(len(contexts))]
        fit = np.polyfit(contexts, step, 1)
        bend = float(np.abs(np.polyval(fit, contexts) - step).max() / step[-1])
        slope = statistics.median(slopes[name])
        speed = rows * kv_bytes(options.model, options.dtype) / slope if slope > 0 else 0.0
        session.report.setdefault("contenders", {})[name] = {
            "step_ms": {c: round(1e3 * s, 2) for c, s in zip(contexts, step, strict=True)},
            "kv_gb_s": round(speed / 1e9, 2),
            "largest_distance_from_line": round(bend, 3),
        }
        against = ""
        if name != session.ours:
            against = times(session.ratio(f"slope against {name}", slopes[session.ours], slopes[name]))
        lines.append([name, *(f"{1e3 * s:.1f}" for s in step), f"{speed / 1e9:.1f}", f"{bend:.1%}", against])
    show(
        f"{options.model} {options.dtype}, {rows} rows, milliseconds a step by context; {session.limits}",
        ["", *map(str, contexts), "GB/s of KV", "off the line", "slope: flatter than it"],
        lines,
    )
