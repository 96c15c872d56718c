"""The chain and its sampler against transformers' processors, on the same logits in one run.

    python benchmarks/sampling.py [--rows 1 64] [--threads 2] [--repeats 7]
    python benchmarks/sampling.py --share 1b --rows 1 32

Times are the least of the repeats, ours and theirs in turn. With ``--share``, what part of a decoding step of a random
model the chain takes under the command line's defaults (medians over the steps). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_infer.testing import sampling_step

VOCAB_SIZE = 128256
HISTORY = 2048
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature + top_k 40 + top_p 0.9": {"temperature": 0.7, "top_k": 40, "top_p": 0.9},
    "temperature + top_p 0.95": {"temperature": 0.7, "top_p": 0.95},
    "min_p 0.1": {"min_p": 0.1},
    "epsilon_cutoff 3e-4": {"epsilon_cutoff": 3e-4},
    "eta_cutoff 3e-4": {"eta_cutoff": 3e-4},
    "typical_p 0.9": {"typical_p": 0.9},
    "top_n_sigma 1": {"top_n_sigma": 1.0},
    "XTC 0.5": {"xtc_probability": 0.5, "xtc_threshold": 0.1},
    "command line defaults": {"temperature": 0.2, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1},
    "three penalties": {
        "temperature": 0.0,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
    },
    "DRY": {"temperature": 0.0, "dry_multiplier": 0.8, "dry_sequence_breakers": ()},
}
NEED_HISTORY = ("command line defaults", "three penalties", "DRY")


def logits(kind: str, rows: int) -> Tensor:
    """float32 [rows, V]: "peaked" as a model's that knows what to say, or "flat"."""
    noise = torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    if kind == "flat":
        return noise * 0.1
    head = torch.arange(1, VOCAB_SIZE + 1).log() * -2.0  # Zipf-like: a few tokens hold the mass
    order = torch.rand(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(1)).argsort(-1)
    return noise + head.expand(rows, -1).gather(1, order)


def theirs(case: dict[str, Any], values: Tensor, tokens: Tensor | None) -> Callable[[], Tensor] | None:
    """The same with transformers' processors, softmax and multinomial; None where it has not got them."""
    import transformers as t

    make: dict[str, Callable[[Any], Any]] = {
        "repetition_penalty": lambda v: t.RepetitionPenaltyLogitsProcessor(v),
        "temperature": lambda v: t.TemperatureLogitsWarper(v),
        "top_k": lambda v: t.TopKLogitsWarper(v),
        "top_p": lambda v: t.TopPLogitsWarper(v),
        "min_p": lambda v: t.MinPLogitsWarper(v),
        "typical_p": lambda v: t.TypicalLogitsWarper(v),
        "epsilon_cutoff": lambda v: t.EpsilonLogitsWarper(v),
        "eta_cutoff": lambda v: t.EtaLogitsWarper(v, device="cpu"),
    }
    if any(name not in make for name in case):
        return None
    greedy = case.get("temperature") == 0.0
    chain = [make[name](case[name]) for name in make if name in case and not (name == "temperature" and greedy)]
    ids = torch.zeros(len(values), 1, dtype=torch.int64) if tokens is None else tokens

    def step() -> Tensor:
        scores = values
        for processor in chain:
            scores = processor(ids, scores)
        return scores.argmax(-1) if greedy else torch.multinomial(scores.softmax(-1), 1)[:, 0]

    return step


def least(steps: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Milliseconds a call of each step, the least of the repeats, taken in turn; short ones are called for 20 ms."""
    times = [float("inf")] * len(steps)
    for _ in range(repeats):
        for at, step in enumerate(steps):
            start = time.perf_counter()
            step()
            calls = max(1, round(0.02 / (time.perf_counter() - start)))
            start = time.perf_counter()
            for _ in range(calls):
                step()
            times[at] = min(times[at], 1e3 * (time.perf_counter() - start) / calls)
    return times


def measure(kind: str, rows: int, repeats: int) -> list[dict[str, Any]]:
    """A line for each case."""
    values = logits(kind, rows)
    history = torch.randint(VOCAB_SIZE, (rows, HISTORY), generator=torch.Generator().manual_seed(2))
    lines = []
    for name, case in CASES.items():
        tokens = history if name in NEED_HISTORY else None
        ours = sampling_step(values, tokens=None if tokens is None else tokens.tolist(), **case)
        other = theirs(case, values, tokens)
        steps: list[Callable[[], Any]] = [lambda: values.softmax(-1), ours, *([other] if other else [])]
        softmax, mine, *rest = least(steps, repeats)
        line = {"logits": kind, "rows": rows, "case": name, "ms": mine, "softmax_passes": mine / softmax}
        lines.append({**line, "transformers_ms": rest[0] if rest else None, "ratio": rest[0] / mine if rest else None})
        shown = f"{rest[0]:10.2f} {rest[0] / mine:8.1f}x" if rest else f"{'-':>10} {'-':>9}"
        print(f"{kind:7} {rows:3} {name:36} {mine:9.3f} {mine / softmax:9.1f} {shown}", flush=True)
    return lines


def share(shape: str, rows: int) -> dict[str, Any]:
    """The chain's part of a step of ``rows`` rows, the model being run by the engine as it comes."""
    from models import checkpoint

    from llama_infer import Pipeline, Request
    from llama_infer.chain import Chain
    from llama_infer.engine.engine import LocalEngine

    times: dict[str, list[float]] = {"chain": [], "step": []}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*given: Any) -> Any:
            start = time.perf_counter()
            result = call(*given)
            times[name].append(1e3 * (time.perf_counter() - start))
            return result

        return measured

    folder = checkpoint(shape, "bfloat16", Path(tempfile.gettempdir()) / "llama_infer_benchmarks")
    pipe = Pipeline(str(folder), stopping=("length",), params={**CASES["command line defaults"], "seed": 0})
    prompts = torch.randint(1000, (rows, 64), generator=torch.Generator().manual_seed(3)).tolist()
    plain_chain, plain_step = Chain.__call__, LocalEngine.step
    try:
        setattr(Chain, "__call__", timed("chain", plain_chain))  # noqa: B010
        setattr(LocalEngine, "step", timed("step", plain_step))  # noqa: B010
        list(pipe.run([Request(tuple(prompt), {"max_new_tokens": 24}) for prompt in prompts]))
    finally:
        setattr(Chain, "__call__", plain_chain)  # noqa: B010
        setattr(LocalEngine, "step", plain_step)  # noqa: B010
    chain, step = (statistics.median(times[name][3:-1]) for name in ("chain", "step"))
    print(f"{shape}, {rows} rows: chain {chain:.2f} ms of a step of {step:.1f} ms, {chain / step:.1%}", flush=True)
    return {"model": shape, "rows": rows, "chain_ms": chain, "step_ms": step, "share": chain / step}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64], help="rows of logits")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--repeats", type=int, default=7, help="the least of so many counts")
    parser.add_argument("--share", metavar="SHAPE", help="the chain's part of a step of this model: 100m or 1b")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.share:
        print(json.dumps([share(options.share, rows) for rows in options.rows]))
        return
    print(f"{'logits':7} {'B':>3} {'case':36} {'ms':>9} {'softmaxes':>9} {'theirs ms':>10} {'ratio':>9}")
    kinds = [(kind, rows) for rows in options.rows for kind in ("peaked", "flat")]
    lines = [line for kind, rows in kinds for line in measure(kind, rows, options.repeats)]
    print(json.dumps({"threads": options.threads, "vocabulary": VOCAB_SIZE, "lines": lines}))


if __name__ == "__main__":
    main()
