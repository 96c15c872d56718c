"""Run by tests/test_native.py in a process of its own: what the kernels do when there is no memory for them.

Every case is called with none but crumbs left, and with memory again; a line for each says what came.
"""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from llama_infer.layout import Layout, Span
from llama_infer.models.int4 import Int4
from llama_infer.models.int8 import Int8
from llama_infer.models.native import attention
from llama_infer.models.packed import PackedLinear

LARGE, CRUMB = 1 << 26, 1 << 17
"""Bytes: what is tried first, and what is left to everybody else; each kernel here asks for more."""


@contextmanager
def exhausted() -> Iterator[None]:
    """A process that gets no more memory, and whose free memory is taken."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before, size, taken = resource.getrlimit(resource.RLIMIT_AS), LARGE, []
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), before[1]))
    try:
        while size > CRUMB:
            block = libc.malloc(ctypes.c_size_t(size))
            if block:
                taken.append(block)
            else:
                size //= 2
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        for block in taken:
            libc.free(block)


def integers(form: Int8 | Int4, width: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Quantised layers, whose activations take half a megabyte."""
    weight = torch.randn(64, width)
    layer = form.layer(form.quantise(weight), None, torch.bfloat16)
    return layer, torch.randn(32, width).bfloat16()


def prompts() -> Callable[[], Tensor]:
    """Attention of a prompt by tiles."""
    q, (k, v) = torch.randn(64, 1, 8, 256).bfloat16(), torch.randn(2, 1, 1, 64, 256).bfloat16()
    layout, out = Layout([Span(0, 64, True)], torch.device("cpu")), torch.zeros(64, 8, 256, dtype=torch.bfloat16)

    def run() -> Tensor:
        attention.prefill(q.flatten(1, 2), k, v, out.zero_(), layout, None, None)
        return out.clone()

    return run


def cases() -> dict[str, Callable[[], Tensor | None]]:
    """What is asked, by name."""
    eight, x8 = integers(Int8(), 1 << 14)
    four, x4 = integers(Int4(32), 1 << 14)
    x4 = x4[:16]
    four(x4[:1])  # keeps memory for the activations of up to 16 rows, and has expanded no weights, which tiles need
    packed, x = PackedLinear(torch.randn(64, 8192).bfloat16()), torch.randn(32, 8192).bfloat16()
    found: dict[str, Callable[[], Tensor | None]] = {"int8": lambda: eight(x8), "int4": lambda: four(x4)}
    if packed.kernel is not None:
        found["packed"] = lambda: packed.kernel(x)  # type: ignore[misc]
    if attention.prefills(*[torch.zeros(1, 1, 1, 256, dtype=torch.bfloat16)] * 3, None):
        found["prefill"] = prompts()
    return found


def main() -> None:
    """Print a line for each case."""
    torch.manual_seed(0)
    small = PackedLinear(torch.randn(64, 64).bfloat16())
    small(torch.randn(64, 64).bfloat16())  # threads are started
    for name, call in cases().items():
        said = ""
        with exhausted():
            try:
                came = call()
            except (MemoryError, torch.OutOfMemoryError) as error:
                came, said = None, type(error).__name__
        after = call()
        assert after is not None and after.isfinite().all() and (came is None or torch.equal(came, after))
        print(name, said or ("nothing" if came is None else "the same"))


if __name__ == "__main__":
    main()
