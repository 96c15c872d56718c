"""Tokens a second of rows that decode together after a short prompt, against the read limit and against peers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from contenders import Contender
from machine import Machine
from models import weight_bytes
from session import Session
from table import show, times
from workload import equal

PROMPT = 16
NEW = 33
"""A first token, and 32 whose time counts."""


def run(session: Session) -> None:
    """Every number of rows in every repeat."""
    options = session.options
    counts = options.rows or ([1, 2] if session.quick else [1, 4, 32])
    peers = options.peers if options.peers is not None else ["transformers"]
    with session.contenders([session.ours, *peers], rows=max(counts), context=512) as found:
        speeds, limits = measure(session, found, counts)
    weights = weight_bytes(options.model, options.dtype)
    session.report["share_of_read_limit"] = {}
    lines = []
    for rows in counts:
        for name in found:
            mine, its = speeds[session.ours][rows], speeds[name][rows]
            shares = [s * weights / m.read / rows for s, m in zip(its, limits[name][rows], strict=True)]
            share = statistics.median(shares)
            line = [f"{rows} rows: {name}", f"{statistics.median(its):.1f}", f"{share:.0%}"]
            against = "" if name == session.ours else times(session.ratio(f"{rows} rows against {name}", its, mine))
            lines.append([*line, against])
            session.report["share_of_read_limit"][f"{rows} rows: {name}"] = round(share, 3)
    session.report["tokens_per_second"] = {
        name: {rows: [round(s, 1) for s in each] for rows, each in found.items()} for name, found in speeds.items()
    }
    show(
        f"{options.model} {options.dtype}, decode; {session.limits}",
        ["", "tokens/s", "of the read limit", "ours against it"],
        lines,
    )


def measure(
    session: Session, found: Mapping[str, Contender], counts: list[int]
) -> tuple[dict[str, dict[int, list[float]]], dict[str, dict[int, list[Machine]]]]:
    """Tokens a second by contender and number of rows, one a repeat, and the limits of the machine meanwhile."""
    speeds: dict[str, dict[int, list[float]]] = {name: {} for name in found}
    limits: dict[str, dict[int, list[Machine]]] = {name: {} for name in found}
    for rows in counts:

        def turn(contender: Contender, repeat: int, rows: int = rows) -> float:
            jobs = equal(rows, PROMPT, 5 if session.quick else NEW, session.vocab_size, f"{rows} {repeat}")
            return contender.generate(jobs, together=True).decode

        for contender in found.values():
            turn(contender, -1)
        for name, each in session.take_turns(found, turn).items():
            speeds[name][rows], limits[name][rows] = each, session.turns[name]
    return speeds, limits
