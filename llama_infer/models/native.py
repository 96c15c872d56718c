"""Attention of single new tokens on the CPU in a C++ kernel of ours, where the machine has a compiler.

torch's fused kernel pads rows of unequal length, and with one query a row it reads keys and values at a fraction of the
memory's speed. ``native.cpp`` is compiled once on a machine, for its processor, in a second or two, and kept in the
user's cache folder. Without a compiler or a folder of one's own, or with ``LLAMA_INFER_NATIVE=0``, torch's serves.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..layout import Layout

logger = logging.getLogger("llama_infer")

_SOURCE = Path(__file__).with_name("native.cpp")
# Sums may be reordered, which makes vectors of them; NaN and infinity keep their meaning. OpenMP is torch's: a second
# one would compete with it, so none is linked.
_COMPILE = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC"]
_COMPILE += ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"]
_TYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
_DIMS = (8, 16, 32, 64, 96, 128, 256)


def kernel(query: Tensor, key: Tensor, value: Tensor) -> Callable[..., None] | None:
    """The kernel for keys and values [rows, kv heads, width, d] as they lie in the cache; None where there is none."""
    dim = key.shape[3]
    if not key.is_cpu or key.dtype not in _TYPES or dim not in _DIMS or {query.dtype, value.dtype} != {key.dtype}:
        return None
    if key.shape != value.shape or key.stride() != value.stride() or key.stride()[2:] != (dim, 1):
        return None
    library = _library()
    return None if library is None else getattr(library, f"{_TYPES[key.dtype]}_{dim}")


def attend(
    run: Callable[..., None],
    q: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    layout: Layout,
    window: int | None,
    scaling: float | None,
) -> None:
    """Fills ``out`` [N, heads, d] for the rows that feed one token, from q [N, heads, d]."""
    where = layout.singles
    if where is None:
        return
    q = q.contiguous()
    heads, dim = key.shape[1], key.shape[3]
    run(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (q, key, value, out, where)),
        ctypes.c_int64(where.shape[1]),
        ctypes.c_int64(heads),
        ctypes.c_int64(q.shape[1] // heads),
        ctypes.c_int64(key.stride(0)),
        ctypes.c_int64(key.stride(1)),
        ctypes.c_int64(layout.width if window is None else window),
        ctypes.c_float(dim**-0.5 if scaling is None else scaling),
    )


@functools.cache
def _library() -> Any:
    """The compiled kernels; None where they cannot be had."""
    if os.environ.get("LLAMA_INFER_NATIVE") == "0" or os.name != "posix":
        return None
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    folder = _folder()
    if compiler is None or folder is None:
        return None
    key = "\0".join([_SOURCE.read_text(encoding="utf-8"), *_COMPILE, compiler, torch.__version__, _processor()])
    built = folder / f"native-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    try:
        if not built.exists():
            _build(compiler, built)
        return ctypes.CDLL(str(built))
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("no attention kernel of our own, torch's serves: %s", error)
        return None


def _build(compiler: str, built: Path) -> None:
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        compiled, linked = f"{folder}/native.o", f"{folder}/native.so"
        for command in ([*_COMPILE, "-c", str(_SOURCE), "-o", compiled], ["-shared", compiled, "-o", linked]):
            subprocess.run([compiler, *command], check=True, capture_output=True, timeout=60)
        os.replace(linked, built)


def _folder() -> Path | None:
    """A folder that nobody else can write to; None when there is none: what lies there is run."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama_infer"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):
        return None
    shared = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return None if shared or found.st_uid != os.getuid() or not os.access(folder, os.W_OK) else folder


def _processor() -> str:
    """What the code is compiled for: a home may be shared by machines."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), platform.processor())
    except OSError:
        return platform.processor() + platform.machine()
