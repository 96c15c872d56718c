"""The policies for weights that are installed, against the default (packed bfloat16) and llama.cpp's formats."""

from __future__ import annotations

import statistics

from contenders import OURS, Contender
from session import Session
from table import show, times
from workload import equal

from suites import decode

PAIRS = {OURS: "llama.cpp", f"{OURS}:int8": "llama.cpp:q8_0", f"{OURS}:int4": "llama.cpp:q4_0"}
PREFILL = 512


def run(session: Session) -> None:
    """Decode of 1 and 32 rows and the prefill of 512 tokens."""
    from llama_infer import registry

    options = session.options
    installed = {part.name for part in registry.installed() if part.kind == "quantization"}
    names = [name for name in PAIRS if name == OURS or name.partition(":")[2] in installed]
    peers = options.peers if options.peers is not None else []
    counts = options.rows or ([1, 2] if session.quick else [1, 32])
    length = 16 if session.quick else PREFILL
    with session.contenders([*names, *peers], rows=max(counts), context=length + 64) as found:
        speeds, _ = decode.measure(session, found, counts)

        def prefill(contender: Contender, repeat: int) -> float:
            (job,) = equal(1, length, 1, session.vocab_size, f"prefill {repeat}")
            return length / contender.generate([job]).first

        first = session.take_turns(found, prefill)
    cases = {**{f"{rows} rows": {name: speeds[name][rows] for name in found} for rows in counts}, "prefill": first}
    lines = []
    for case, by_name in cases.items():
        for name, each in by_name.items():
            cells = [f"{case}: {name}", f"{statistics.median(each):.1f}", "", ""]
            if name in PAIRS and name != OURS:
                cells[2] = times(session.ratio(f"{case}: {name} against bfloat16", by_name[OURS], each))
            if PAIRS.get(name) in by_name:
                cells[3] = times(session.ratio(f"{case}: {name} against its like", by_name[PAIRS[name]], each))
            lines.append(cells)
    session.report["tokens_per_second"] = {
        case: {name: [round(s, 1) for s in each] for name, each in by_name.items()} for case, by_name in cases.items()
    }
    head = ["", "tokens/s", "against ours in bfloat16", "against llama.cpp's like"]
    show(f"{options.model}; {session.limits}", head, lines)
