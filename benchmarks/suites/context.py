"""The time of a step of many rows as their context grows, against the bytes of keys and values that it has to read."""

from __future__ import annotations

import statistics

from contenders import Contender
from models import kv_bytes
from session import Session
from table import show, times
from workload import equal

NEW = 17
CHUNK = 512
"""Tokens of a prompt that an engine may feed in a step: so many steps pass before the last row has its first token."""


def run(session: Session) -> None:
    """Rows of equal context, which all decode for at least sixteen steps at each length."""
    options = session.options
    rows = (options.rows or [2 if session.quick else 32])[0]
    contexts = options.contexts or ([8, 32] if session.quick else [64, 256, 512, 1024, 2048])
    peers = options.peers if options.peers is not None else ["transformers"]

    def new_tokens(context: int) -> int:
        return 5 if session.quick else NEW + rows * context // CHUNK

    def turn(contender: Contender, repeat: int) -> list[tuple[float, float]]:
        found = []
        for context in contexts:
            jobs = equal(rows, context, new_tokens(context), session.vocab_size, f"{context} {repeat}")
            answer = contender.generate(jobs, together=True)
            found.append((context + answer.held, rows / answer.decode))
        return found

    longest = max(context + new_tokens(context) for context in contexts)
    room = {"kv_bytes": int(1.2 * rows * (longest + 128) * kv_bytes(options.model, options.dtype)) + (64 << 20)}
    with session.contenders([session.ours, *peers], rows=rows, context=longest + 16, **room) as found:
        for contender in found.values():
            contender.generate(equal(2, 8, 4, session.vocab_size, "warm"))
        turns = session.take_turns(found, turn)
    fits = {
        name: [statistics.linear_regression(*zip(*turn, strict=True)) for turn in each] for name, each in turns.items()
    }
    slopes = {name: [fit.slope for fit in each] for name, each in fits.items()}
    lines = []
    for name, each in turns.items():
        step = [statistics.median(turn[at][1] for turn in each) for at in range(len(contexts))]
        pairs = zip(fits[name], each, strict=True)
        bend = max(abs(fit.slope * x + fit.intercept - y) / y for fit, turn in pairs for x, y in turn)
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
