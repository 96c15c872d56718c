"""This package and its peers on the same work, in one run.

    python benchmarks/run.py --suite file --model 100m --peers transformers,padded,continuous,vllm

Machines differ and are shared, so only ratios within one run mean something: the contenders take turns, and every
repeat gives a ratio of its own. The last line printed is a JSON object with all figures.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import agreement
import torch
import transformers
from contenders import OURS, RUNNERS, PeerError
from environments import InstallError
from models import SHAPES, WIDTHS
from session import Session

import llama_infer

SUITES = {
    "decode": "tokens a second of 1, 4 and 32 rows, against the read limit and peers",
    "file": "workload W1, a file of prompts, against the roofline and peers",
    "prefix": "time to first token behind 2,048 cached tokens against a cold start",
    "context": "the time of a step of 32 rows as their context grows",
    "memory": "import and load of a checkpoint, and the most memory it takes",
    "ttft": "time to first token over one bare forward",
    "many": "10,000 short requests: does a request cost the same in the end?",
    "quant": "the policies for weights against packed ones and llama.cpp's formats",
}


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    torch.set_num_threads(options.threads)
    options.cache.mkdir(parents=True, exist_ok=True)
    session = Session(options)
    try:
        importlib.import_module(f"suites.{options.suite}").run(session)
    except (InstallError, PeerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    limits = {"read_gb_s": round(session.limits.read / 1e9, 1), "tflop_s": round(session.limits.arithmetic / 1e12, 3)}
    agreed = agreement.holds(session.report, OURS)
    print(json.dumps({**given, "environment": _environment(), **limits, "agreement": agreed, **session.report}))
    return 0 if agreed else 1


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "llama_infer": llama_infer.__version__,
        "machine": platform.machine(),
    }


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="\n".join(f"{name:8} {text}" for name, text in SUITES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cache = Path(tempfile.gettempdir()) / "llama_infer_benchmarks"
    parser.add_argument("--suite", choices=list(SUITES), default="file")
    parser.add_argument("--model", choices=list(SHAPES), default="100m", help="shape of the random model (%(default)s)")
    parser.add_argument("--dtype", choices=list(WIDTHS), default="bfloat16", help="of its weights (%(default)s)")
    parser.add_argument("--peers", type=_peers, default=None, help=f"out of {', '.join(RUNNERS)}; none: only ours")
    parser.add_argument("--policy", default=None, help="quantization of ours; None: as it comes")
    parser.add_argument("--requests", type=int, default=None, help="of the suites file (64) and many (10,000)")
    parser.add_argument("--rows", type=_numbers, default=None, help="of the suites decode and context, such as 1,32")
    parser.add_argument("--contexts", type=_numbers, default=None, help="of the suites context and ttft")
    parser.add_argument("--repeats", type=int, default=3, help="turns that each contender gets (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="rows decoded at once (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of everybody (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the workload (%(default)s)")
    parser.add_argument("--cache", type=Path, default=cache, help="models and environments (%(default)s)")
    parser.add_argument("--no-agreement", action="store_true", help="do not compare tokens before speed")
    parser.add_argument("--isolated", action="store_true", help="with --quick: a process for each, as always else")
    parser.add_argument("--quick", action="store_true", help="a tiny model, little work, one process: does it run?")
    options = parser.parse_args(argv)
    if min(options.requests or 1, options.repeats, options.threads, options.batch_size) < 1 or options.requests == 0:
        parser.error("--requests, --repeats, --threads and --batch-size are at least 1")
    if options.quick:
        options.model, options.dtype, options.repeats = "tiny", "float32", 1
    return options


def _peers(text: str) -> list[str]:
    names = [name for name in text.split(",") if name and name != "none"]
    unknown = sorted(set(names) - set(RUNNERS))
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown peer {', '.join(unknown)}; known: {', '.join(RUNNERS)}")
    return list(dict.fromkeys(names))


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive numbers, such as 1,32")
    return found


if __name__ == "__main__":
    sys.exit(main())
