"""Time to first token of a prompt whose first 2,048 tokens were prefilled before, against the same prompt cold."""

from __future__ import annotations

import statistics
from typing import Any

from contenders import Contender
from session import Session
from table import show, times
from workload import equal


def run(session: Session) -> None:
    """In every repeat a new beginning, then the same beginning with another end."""
    options = session.options
    shared, own = (64, 8) if session.quick else (2048, 32)
    peers = options.peers if options.peers is not None else []

    def turn(contender: Contender, repeat: int) -> tuple[float, float]:
        (cold,) = equal(1, shared + own, 1, session.vocab_size, f"cold {repeat}")
        (other,) = equal(1, own, 1, session.vocab_size, f"warm {repeat}")
        warm = type(cold)((*cold.prompt[:shared], *other.prompt), 1)
        return contender.generate([cold]).first, contender.generate([warm]).first

    with session.contenders([session.ours, *peers], rows=4, context=shared + own + 64, prefix_cache=True) as found:
        for contender in found.values():
            turn(contender, -1)
        seconds = session.take_turns(found, turn)
    lines: list[list[str]] = []
    report: dict[str, Any] = {}
    for name, each in seconds.items():
        cold, warm = [pair[0] for pair in each], [pair[1] for pair in each]
        ratio = session.ratio(f"{name}: cold over cached", warm, cold)
        report[name] = {"cold": cold, "cached": warm}
        lines.append(
            [name, f"{1e3 * statistics.median(cold):.0f}", f"{1e3 * statistics.median(warm):.0f}", times(ratio)]
        )
    session.report["seconds"] = report
    show(
        f"{options.model} {options.dtype}, {shared} tokens cached and {own} new; {session.limits}",
        ["", "cold ms", "cached ms", "faster"],
        lines,
    )
