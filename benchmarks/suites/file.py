"""Workload W1, a file of prompts: useful tokens a second, against the machine's roofline and against peers."""

from __future__ import annotations

import statistics

import machine
from contenders import Contender
from session import Session
from table import show, times
from workload import Job, useful_tokens, w1


def run(session: Session) -> None:
    """All jobs in every repeat, with other tokens each time."""
    options = session.options
    count = options.requests or (8 if session.quick else 64)
    peers = options.peers if options.peers is not None else ["transformers", "padded"]

    def jobs(repeat: int) -> list[Job]:
        short = {"prompt_tokens": (4, 16), "new_tokens": (2, 8)} if session.quick else {}
        return w1(count, session.vocab_size, seed=options.seed, repeat=repeat, **short)

    def turn(contender: Contender, repeat: int) -> float:
        return contender.generate(jobs(repeat)).seconds

    with session.contenders([session.ours, *peers], rows=options.batch_size, context=512) as found:
        for contender in found.values():
            contender.generate(jobs(-1)[:4])
        seconds = session.take_turns(found, turn)
    tokens = useful_tokens(jobs(0))

    def least(limits: machine.Machine) -> float:
        return machine.file_seconds(jobs(0), options.model, options.dtype, limits)

    lines = []
    for name, each in seconds.items():
        share = statistics.median(least(limits) / s for limits, s in zip(session.turns[name], each, strict=True))
        against = "" if name == session.ours else times(session.ratio(f"against {name}", seconds[session.ours], each))
        lines.append([name, f"{tokens / statistics.median(each):.1f}", f"{share:.0%}", against])
        session.report.setdefault("share_of_roofline", {})[name] = round(share, 3)
    session.report["useful_tokens"] = tokens
    session.report["tokens_per_second"] = {name: [round(tokens / s, 1) for s in each] for name, each in seconds.items()}
    show(
        f"{options.model} {options.dtype}, {count} requests, {tokens} useful tokens; {session.limits}, "
        f"roofline {tokens / least(session.limits):.0f} tokens/s",
        ["", "tokens/s", "of the roofline", "ours against it"],
        lines,
    )
