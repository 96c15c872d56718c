"""Tokens a second of this package and of its peers, on the same work, in one run.

    python benchmarks/run.py --suite file --model 100m --requests 64 --peers loop,padded

Machines differ and are shared, so only ratios within one run mean something: the contenders take turns, and every
repeat gives a ratio of its own. The last line printed is a JSON object with all figures.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import agreement
import torch
import transformers
from contenders import PEERS, Contender, ours
from models import SHAPES, build
from workload import Job, useful_tokens, w1

import llama_infer

OURS = "llama_infer"


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    report: dict[str, Any] = {**vars(args), "environment": _environment()}

    print("agreement: float32 tokens against generate ...", flush=True)
    exact = agreement.exact_in_float32(4 if args.quick else 16)
    print(f"agreement: float32 tokens {'equal' if exact else 'DIFFER'}", flush=True)

    reference = build(args.model, dtype)
    contenders: dict[str, Contender] = {OURS: ours(build(args.model, dtype), args.batch_size)}
    contenders |= {name: PEERS[name](reference) for name in args.peers}
    jobs = _jobs(args, reference.config.vocab_size)

    checked = jobs[:8]
    share = agreement.teacher_forced(reference, checked, contenders[OURS](checked))
    print(f"agreement: {share:.1%} of our {args.dtype} tokens are the reference's likeliest", flush=True)

    seconds, cpu_seconds, bandwidth = measure(contenders, jobs, args.repeats)
    tokens = useful_tokens(jobs)
    report["agreement"] = bool(exact and share >= agreement.LEAST_TEACHER_FORCED)
    report["agreement_float32_exact"] = exact
    report["agreement_teacher_forced"] = round(share, 4)
    report["weights_gb"] = round(sum(p.numel() * p.element_size() for p in reference.parameters()) / 1e9, 3)
    report["read_bandwidth_gb_s"] = round(bandwidth, 1)
    report["useful_tokens"] = tokens
    report["tokens_per_second"] = {name: [round(tokens / s, 1) for s in times] for name, times in seconds.items()}
    report["ratios"] = {name: _ratios(seconds[OURS], times) for name, times in seconds.items() if name != OURS}
    report["cpu_ratios"] = {name: _ratios(cpu_seconds[OURS], cpu_seconds[name]) for name in report["ratios"]}
    _print_table(report)
    print(json.dumps(report))
    return 0 if report["agreement"] else 1


def measure(
    contenders: Mapping[str, Contender], jobs: Sequence[Job], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], float]:
    """Seconds of each contender in each repeat, after a warm-up: by the clock, and of processor time, which counts on
    a busy machine when there is one thread; and the best read bandwidth seen (GB/s)."""
    for contender in contenders.values():
        contender(jobs[:4])
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in contenders}
    bandwidth = 0.0
    for repeat in range(repeats):
        bandwidth = max(bandwidth, read_bandwidth())
        for name, contender in contenders.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            answers = contender(jobs)
            seconds[name].append(time.perf_counter() - start)
            cpu_seconds[name].append(time.process_time() - cpu_start)
            if [len(answer) for answer in answers] != [job.new_tokens for job in jobs]:
                raise RuntimeError(f"{name} did not return as many tokens as were asked for")
            print(f"repeat {repeat + 1}/{repeats}: {name} {seconds[name][-1]:.1f} s", flush=True)
    return seconds, cpu_seconds, bandwidth


def read_bandwidth(megabytes: int = 512) -> float:
    """GB/s of a sum over a buffer larger than the caches, the best of five."""
    buffer = torch.ones(megabytes << 18)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        buffer.sum()
        times.append(time.perf_counter() - start)
    return buffer.nbytes / min(times) / 1e9


def _jobs(args: argparse.Namespace, vocab_size: int) -> list[Job]:
    if args.quick:
        return w1(args.requests, vocab_size, seed=args.seed, prompt_tokens=(4, 16), new_tokens=(2, 8))
    return w1(args.requests, vocab_size, seed=args.seed)


def _ratios(mine: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """How many times our speed is theirs: one ratio a repeat."""
    each = [b / a for a, b in zip(mine, theirs, strict=True)]
    return {
        "median": round(statistics.median(each), 2),
        "least": round(min(each), 2),
        "most": round(max(each), 2),
    }


def _print_table(report: Mapping[str, Any]) -> None:
    print(f"\n{'':<12}  {'tokens/s':>9}  {OURS} against it (least - most), by processor time")
    for name, speeds in report["tokens_per_second"].items():
        ratio = report["ratios"].get(name)
        against = ""
        if ratio:
            against = f"{ratio['median']:.2f}x ({ratio['least']:.2f} - {ratio['most']:.2f})"
            against += f", {report['cpu_ratios'][name]['median']:.2f}x"
        print(f"{name:<12}  {statistics.median(speeds):>9.1f}  {against}".rstrip())
    print(
        f"{report['model']} {report['dtype']}, {report['requests']} requests, {report['useful_tokens']} useful tokens, "
        f"read bandwidth {report['read_bandwidth_gb_s']} GB/s\n"
    )


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "llama_infer": llama_infer.__version__,
        "machine": platform.machine(),
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0] if __doc__ else None, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--suite", choices=["file"], default="file", help="file: workload W1 (see README.md)")
    parser.add_argument("--model", choices=list(SHAPES), default="100m", help="shape of the random model")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of its weights")
    parser.add_argument("--requests", type=int, default=64, help="how many")
    parser.add_argument("--peers", type=_peers, default="loop,padded", help=f"out of {', '.join(PEERS)}; or none")
    parser.add_argument("--repeats", type=int, default=3, help="turns that each contender gets")
    parser.add_argument("--batch-size", type=int, default=None, help="rows that we decode at once; None: our default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for all: leave out busy cores")
    parser.add_argument("--seed", type=int, default=0, help="of the workload")
    parser.add_argument("--quick", action="store_true", help="a tiny model, a few short requests: does it run?")
    args = parser.parse_args(argv)
    if min(args.requests, args.repeats, args.threads) < 1:
        parser.error("--requests, --repeats and --threads are at least 1")
    if args.quick:
        args.model, args.dtype, args.requests, args.repeats = "tiny", "float32", min(args.requests, 8), 1
    return args


def _peers(text: str) -> list[str]:
    names = [name for name in text.split(",") if name and name != "none"]
    unknown = sorted(set(names) - set(PEERS))
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown peer {', '.join(unknown)}; known: {', '.join(PEERS)}")
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    sys.exit(main())
