"""Our own policies: a linear layer at several numbers of rows, and the decoding and prefill of a whole model.

python benchmarks/quantization.py --model 1b
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from models import SHAPES, checkpoint

from llama_infer.models.int4 import Int4
from llama_infer.models.int8 import Int8
from llama_infer.models.loaders import AutoLoader
from llama_infer.models.native import tiled
from llama_infer.models.packed import PackedLinear, TiledLinear
from llama_infer.models.size import weight_bytes
from llama_infer.parts import Source

ROWS = (1, 4, 16, 32, 128, 512)
POLICIES = ("none", "packed", "int8", "int4")
COPIES = 6
"""Layers that take turns, so that none is still in the processor's cache."""


def seconds(calls: list[Callable[[], Any]], repeats: int = 3) -> float:
    """The best time of one call, each of them in turn."""
    best = float("inf")
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        for call in calls:
            call()
        best = min(best, (time.perf_counter() - begun) / len(calls))
    return best


def layers(inputs: int, outputs: int) -> dict[str, dict[int, float]]:
    """Milliseconds a call of one layer, by policy and number of rows."""
    weights = [torch.randn(outputs, inputs) * 0.02 for _ in range(COPIES)]
    plain = [torch.nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16) for _ in weights]
    for linear, weight in zip(plain, weights, strict=True):
        linear.weight.data.copy_(weight)
    forms: dict[str, Any] = {"int8": Int8(), "int4": Int4()}
    packed = [TiledLinear(linear) if tiled.available() else PackedLinear(linear.weight) for linear in plain]
    made: dict[str, list[Any]] = {"none": list(plain), "packed": packed}
    for name, form in forms.items():
        made[name] = [form.layer(form.quantise(weight), None, torch.bfloat16) for weight in weights]
    times: dict[str, dict[int, float]] = {name: {} for name in made}
    for rows in ROWS:
        x = torch.randn(1, rows, inputs).bfloat16()
        for name, copies in made.items():
            times[name][rows] = 1000 * seconds([partial(layer, x) for layer in copies])
    return times


def decode(model: Any, rows: int, steps: int = 8) -> float:
    """Tokens a second of single-token forwards at the beginning of a context."""
    ids = torch.zeros(rows, 1, dtype=torch.long)
    past = model(ids, use_cache=True).past_key_values
    times = []
    for _ in range(steps):
        begun = time.perf_counter()
        past = model(ids, past_key_values=past, use_cache=True).past_key_values
        times.append(time.perf_counter() - begun)
    return rows / sorted(times)[steps // 2]


def models(shape: str) -> dict[str, dict[str, float]]:
    """What a model of that shape does under each policy."""
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        folder = str(checkpoint(shape, "bfloat16", Path(cache)))
        for policy in POLICIES:
            begun = time.perf_counter()
            model: Any = AutoLoader()(Source(folder, quantization=policy, device="cpu")).model
            load = time.perf_counter() - begun
            prompt = torch.zeros(1, 512, dtype=torch.long)
            model(prompt, logits_to_keep=1)
            found[policy] = {
                "load_s": load,
                "MB": weight_bytes(model) / 1e6,
                "decode 1": decode(model, 1),
                "decode 32": decode(model, 32),
                "prefill 512": 512 / seconds([partial(model, prompt, logits_to_keep=1)], 1),
            }
            del model
    return found


def main() -> None:
    """Read the options, print two tables and a JSON line."""
    parser = argparse.ArgumentParser(description="Our own quantization policies, measured.")
    parser.add_argument("--model", choices=sorted(SHAPES), default="100m", help="shape of the model")
    parser.add_argument("--output", type=Path, help="file for the JSON")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    shape = SHAPES[options.model]
    inputs, outputs = shape["hidden_size"], shape["intermediate_size"]
    times = layers(inputs, outputs)
    print(f"ms a layer of {outputs} x {inputs}, rows: {', '.join(map(str, ROWS))}")
    for name, row in times.items():
        print(f"{name:13}" + "".join(f"{row[rows]:9.3f}" for rows in ROWS))
    whole = models(options.model)
    print(f"model {options.model}: tokens a second")
    for name, numbers in whole.items():
        print(f"{name:13}" + "".join(f"{key} {value:9.1f}  " for key, value in numbers.items()))
    line = json.dumps({"model": options.model, "layers_ms": times, "models": whole})
    print(line)
    if options.output:
        options.output.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
