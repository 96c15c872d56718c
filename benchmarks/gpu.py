"""This package and transformers on a CUDA device, in one process.

    python benchmarks/gpu.py --model 1b --rows 1 32 128

Decoding after a prompt of 64 tokens, greedy, with steps recorded as CUDA graphs and without, against ``generate`` of
transformers and against the time that reading the weights takes at the speed of a copy on the device; then workload W1.
The last line printed is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from models import CONTEXT, SHAPES
from workload import useful_tokens, w1

from llama_infer import Pipeline, Request
from llama_infer.engine import graphs

_PROMPT = 64


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="1b")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--tokens", type=int, default=256, help="of an answer (%(default)s)")
    parser.add_argument("--requests", type=int, default=256, help="of W1, none: 0 (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="try compiled steps too")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument("--profile", action="store_true", help="where the time of twenty steps goes")
    options = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("llama_infer").setLevel(logging.INFO)  # which of two recorded steps was faster
    model = random_model(options.model)
    read = read_limit()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "model": options.model, "read_gb_s": read / 1e9}
    print(f"{found['device']}, weights {weights / 1e9:.2f} GB, {read / 1e12:.2f} TB/s", flush=True)
    pipe = Pipeline(model, batch_size=max(options.rows), prefix_cache=0, compile=options.compile)
    for rows in options.rows:
        rates = {"recorded": decode(pipe, rows, options.tokens)}
        patience, graphs._PATIENCE = graphs._PATIENCE, 1 << 60
        rates["not recorded"] = decode(pipe.replace(), rows, options.tokens // 2)
        graphs._PATIENCE = patience
        if not options.no_peers:
            rates["generate"] = generate(model, rows, options.tokens // 2)
        share = rates["recorded"] / rows * weights / read
        print(rows, "rows:", {name: round(rate) for name, rate in rates.items()}, f"{share:.2f} of the read limit")
        found[f"decode_{rows}"] = {**rates, "share": share}
    if options.requests:
        found["w1"] = file(pipe, options.requests)
        print(f"W1, {options.requests} requests: {found['w1']:.0f} tokens/s")
    if options.profile:
        profile(pipe, options.rows[0])
    print(json.dumps(found))


def random_model(shape: str) -> Any:
    """A Llama with random weights, made on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=CONTEXT, tie_word_embeddings=True, eos_token_id=None)
    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def read_limit() -> float:
    """Bytes a second that a copy on the device reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source))


def decode(pipe: Pipeline, rows: int, tokens: int) -> float:
    """Tokens a second of steps in which all rows decode."""
    backend: Any = pipe._backend
    engine = backend.open(pipe._assembly)
    for at in range(rows):
        engine.add(Request((3 + at % 1000,) * _PROMPT, {"max_new_tokens": tokens, "temperature": 0}))
    for _ in range(tokens // 4):
        engine.step()
    torch.cuda.synchronize()
    start, steps = time.perf_counter(), 0
    while engine.busy:
        engine.step()
        steps += 1
    rate = rows * (steps - 1) / (time.perf_counter() - start)
    engine.close()
    return rate


def generate(model: Any, rows: int, tokens: int) -> float:
    """The same of transformers' own loop and attention, its prefill taken off."""
    ours, seconds = model.config._attn_implementation, []
    model.set_attn_implementation("sdpa")
    ids = torch.full((rows, _PROMPT), 3, device="cuda")
    for count in (2, tokens // 4, tokens):
        torch.cuda.synchronize()
        start = time.perf_counter()
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    model.set_attn_implementation(ours)
    return rows * (tokens - tokens // 4) / (seconds[2] - seconds[1])


def file(pipe: Pipeline, count: int) -> float:
    """Useful tokens a second of workload W1; the second time, when all that there is to record has been."""
    for repeat in range(2):
        jobs = w1(count, int(pipe.loaded.model.config.vocab_size), repeat=repeat)
        requests = [Request(job.prompt, {"max_new_tokens": job.new_tokens, "temperature": 0}) for job in jobs]
        start = time.perf_counter()
        done = list(pipe.run(requests))
        seconds = time.perf_counter() - start
    if sum(len(answer.token_ids) for answer in done) != useful_tokens(jobs):
        raise RuntimeError("not all that was asked for was decoded")
    return useful_tokens(jobs) / seconds


def profile(pipe: Pipeline, rows: int) -> None:
    """Prints what took the GPU and the host longest in twenty steps."""
    backend: Any = pipe._backend
    engine = backend.open(pipe._assembly)
    for at in range(rows):
        engine.add(Request((3 + at,) * _PROMPT, {"max_new_tokens": 100, "temperature": 0}))
    for _ in range(20):
        engine.step()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(20):
            engine.step()
        torch.cuda.synchronize()
    for by in ("self_cuda_time_total", "self_cpu_time_total"):
        print(profiler.key_averages().table(sort_by=by, row_limit=18, max_name_column_width=60))
    engine.close()


def _seconds(call: Callable[[], object], repeats: int = 10) -> float:
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


if __name__ == "__main__":
    main()
