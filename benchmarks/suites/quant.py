"""The policies for weights that are installed, against packed weights and against llama.cpp's formats."""

from __future__ import annotations

import statistics

from contenders import OURS, Contender
from session import Session
from table import show, times
from workload import equal

from suites import decode

POLICIES = ("packed", "int8", "int4")
PAIRS = {"packed": "llama.cpp", "int8": "llama.cpp:q8_0", "int4": "llama.cpp:q4_0"}
PREFILL = 512


def run(session: Session) -> None:
    """Decode of 1 and 32 rows and the prefill of 512 tokens."""
    from llama_infer import registry

    options = session.options
    installed = {part.name for part in registry.installed() if part.kind == "quantization"}
    known = [policy for policy in POLICIES if policy in installed]
    names = [f"{OURS}:{policy}" for policy in known] or [OURS]
    peers = options.peers if options.peers is not None else []
    counts = options.rows or ([1, 2] if session.quick else [1, 32])
    length = 16 if session.quick else PREFILL
    with session.contenders([*names, *peers], rows=max(counts), context=length + 64) as found:
        speeds = decode.measure(session, found, counts)

        def prefill(contender: Contender, repeat: int) -> float:
            (job,) = equal(1, length, 1, session.vocab_size, f"prefill {repeat}")
            return length / contender.generate([job]).first

        first = session.take_turns(found, prefill)
    cases = {**{f"{rows} rows": {name: speeds[name][rows] for name in found} for rows in counts}, "prefill": first}
    lines = []
    for case, by_name in cases.items():
        for name, each in by_name.items():
            policy = name.partition(":")[2]
            packed, peer = f"{OURS}:packed", PAIRS.get(policy, "")
            ours = name.startswith(f"{OURS}:")
            cells = [f"{case}: {name}", f"{statistics.median(each):.1f}", "", ""]
            if ours and packed in by_name and name != packed:
                cells[2] = times(session.ratio(f"{case}: {policy} against packed", by_name[packed], each))
            if ours and peer in by_name:
                cells[3] = times(session.ratio(f"{case}: {policy} against {peer}", by_name[peer], each))
            lines.append(cells)
    session.report["tokens_per_second"] = {
        case: {name: [round(s, 1) for s in each] for name, each in by_name.items()} for case, by_name in cases.items()
    }
    show(f"{options.model}; {session.limits}", ["", "tokens/s", "against packed", "against llama.cpp's like"], lines)
