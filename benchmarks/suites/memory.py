"""Fresh processes: seconds to import and load a checkpoint, and the most memory that decoding ever took.

Whoever maps a checkpoint's file has read nothing of it when loading ends; the seconds up to a first token count that
too.
"""

from __future__ import annotations

import statistics
from typing import Any

from contenders import Contender
from models import checkpoint, kv_bytes, weight_bytes
from session import Session
from table import show, times
from workload import equal


def run(session: Session) -> None:
    """A process in every repeat for each: loads, decodes 32 rows, says what it took."""
    options = session.options
    rows, prompt, new = (2, 8, 4) if session.quick else (32, 128, 17)
    peers = options.peers if options.peers is not None else ["transformers"]
    names = [session.ours, *peers]
    folder = checkpoint(options.model, options.dtype, session.cache)
    for file in folder.iterdir():  # from memory, for everybody
        file.read_bytes()
    needed = weight_bytes(options.model, options.dtype) + rows * (prompt + new) * kv_bytes(options.model, options.dtype)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for repeat in range(options.repeats):
        session.look()
        for name in names:
            with session.contender(name, rows=rows, context=prompt + new + 64) as contender:
                if contender is not None:
                    first = equal(1, prompt, 1, session.vocab_size, f"first {repeat}")
                    jobs = equal(rows, prompt, new, session.vocab_size, f"memory {repeat}")
                    found[name].append(_look(contender, first, jobs, needed))
    found = {name: each for name, each in found.items() if each}
    lines = []
    for name, each in found.items():
        middle = {key: statistics.median(turn[key] for turn in each) for key in each[0]}
        against = ["", ""]
        if name != session.ours:
            against = []
            for what, key in (("import and load", "seconds"), ("import to first token", "first_token")):
                mine, theirs = ([turn[key] for turn in turns] for turns in (found[session.ours], each))
                against.append(times(session.ratio(f"{what} against {name}", mine, theirs)))
        session.report.setdefault("contenders", {})[name] = {key: round(value, 3) for key, value in middle.items()}
        share, less = f"{middle['peak_over_needed']:.2f}", f"{middle['peak_less_imports_over_needed']:.2f}"
        seconds = [f"{middle[key]:.2f}" for key in ("seconds", "first_token")]
        lines.append([name, *seconds, f"{middle['peak'] / 1e9:.2f}", share, less, *against])
    show(
        f"{options.model} {options.dtype}, {rows} rows; weights and KV {needed / 1e9:.2f} GB",
        [
            "",
            "load s",
            "first token s",
            "peak GB",
            "over weights + KV",
            "less imports",
            "ours to load",
            "ours to token",
        ],
        lines,
    )


def _look(contender: Contender, first: Any, jobs: Any, needed: int) -> dict[str, float]:
    token = contender.start_seconds + contender.generate(first).seconds
    contender.generate(jobs, together=True)
    peak, imports = contender.call("memory")["peak"], contender.loaded.get("imports", 0)
    return {
        "seconds": contender.start_seconds,
        "first_token": token,
        "peak": peak,
        "imports": imports,
        "peak_over_needed": peak / needed,
        "peak_less_imports_over_needed": (peak - imports) / needed,
    }
