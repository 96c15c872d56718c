"""Time to first token: ours over one bare call of the model that we loaded, and against peers' prefill."""

from __future__ import annotations

import statistics

from contenders import Contender
from session import Session
from table import show, times
from workload import equal

TRIES = 5


def run(session: Session) -> None:
    """Ours and the bare forward in turn, the least of five in every repeat."""
    options = session.options
    lengths = options.contexts or ([8, 32] if session.quick else [32, 128, 512])
    peers = options.peers if options.peers is not None else ["transformers"]
    tries = 2 if session.quick else TRIES

    def turn(contender: Contender, repeat: int) -> list[tuple[float, float]]:
        found = []
        for length in lengths:
            first, bare = [], [0.0]
            for at in range(tries if contender.name == session.ours else 2):
                (job,) = equal(1, length, 1, session.vocab_size, f"{length} {repeat} {at}")
                first.append(contender.generate([job]).first)
                if contender.name == session.ours:
                    bare.append(contender.call("forward", prompt=list(job.prompt)))
            found.append((min(first), min(bare[1:], default=0.0)))
        return found

    with session.contenders([session.ours, *peers], rows=4, context=max(lengths) + 64) as found:
        for contender in found.values():
            turn(contender, -1)
        seconds = session.take_turns(found, turn)
    lines = []
    for at, length in enumerate(lengths):
        mine = [turn[at][0] for turn in seconds[session.ours]]
        for name, each in seconds.items():
            its = [turn[at][1 if name == session.ours else 0] for turn in each]
            label = "bare forward" if name == session.ours else name
            key = f"{length} tokens: {'over a bare forward' if name == session.ours else 'against ' + name}"
            ratio = session.ratio(key, *((its, mine) if name == session.ours else (mine, its)))
            middle = statistics.median(its)
            lines.append([f"{length} tokens: {label}", f"{1e3 * middle:.1f}", f"{length / middle:.0f}", times(ratio)])
        lines.append([f"{length} tokens: ours", f"{1e3 * statistics.median(mine):.1f}", "", ""])
    show(
        f"{options.model} {options.dtype}, one prompt; {session.limits}",
        ["", "ms", "tokens/s", "ours over the bare forward; faster than a peer"],
        lines,
    )
