"""What the machine can do, measured in the same run as everything else, and what that allows at most."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from models import head_parameters, layer_parameters, weight_bytes
from workload import Job


@dataclass(frozen=True)
class Machine:
    """``read``: bytes a second read from memory; ``arithmetic``: operations a second of matrix products."""

    read: float = 0.0
    arithmetic: float = 0.0

    def __str__(self) -> str:
        return f"read limit {self.read / 1e9:.1f} GB/s, matrix products {self.arithmetic / 1e12:.2f} TFLOP/s"

    def best(self, other: Machine) -> Machine:
        """The better of two measurements in each respect."""
        return Machine(max(self.read, other.read), max(self.arithmetic, other.arithmetic))


def measure(dtype: str, quick: bool = False) -> Machine:
    """The best of a few tries of each."""
    return Machine(_read_limit(16 if quick else 512), _matrix_rate(dtype, 128 if quick else 2048))


def file_seconds(jobs: Sequence[Job], shape: str, dtype: str, machine: Machine) -> float:
    """The least time for the jobs, all of them decoded at once: every prompt token and every step's rows pay their
    arithmetic, or the step pays for reading the weights, whichever is more."""
    layers, head = layer_parameters(shape), head_parameters(shape)
    prompts = sum(len(job.prompt) for job in jobs)
    prefill = (2 * layers * prompts + 2 * head * len(jobs)) / machine.arithmetic
    ends = Counter(job.new_tokens for job in jobs)
    decode, rows, at = 0.0, len(jobs), 1  # the first token comes with the prefill
    for length in sorted(ends):
        step = max(weight_bytes(shape, dtype) / machine.read, 2 * (layers + head) * rows / machine.arithmetic)
        decode += (length - at) * step
        rows, at = rows - ends[length], length
    return prefill + decode


def _read_limit(megabytes: int) -> float:
    """Bytes a second, of a sum over a buffer larger than the caches."""
    buffer = _buffer(megabytes)
    return buffer.nbytes / _least(buffer.sum, 7)


def _matrix_rate(dtype: str, size: int) -> float:
    """Of a layer with ``size`` inputs and four times as many outputs on 512 tokens, packed where that is possible."""
    least = min(_least(product, 4) for product in _products(dtype, size))
    return 2 * 512 * size * 4 * size / least


@functools.cache
def _buffer(megabytes: int) -> torch.Tensor:
    return torch.ones(megabytes << 18)


@functools.cache
def _products(dtype: str, size: int) -> list[Callable[[], object]]:
    inputs = torch.randn(512, size).to(getattr(torch, dtype))
    weight = torch.randn(4 * size, size).to(getattr(torch, dtype))
    found: list[Callable[[], object]] = [lambda: torch.nn.functional.linear(inputs, weight)]
    if dtype == "bfloat16" and torch.backends.mkldnn.is_available():
        ops = torch.ops.mkldnn
        packed = ops._reorder_linear_weight(weight, 512)
        found.append(lambda: ops._linear_pointwise(inputs, packed, None, "none", [], ""))
    return found


def _least(step: Callable[[], object], tries: int) -> float:
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)
