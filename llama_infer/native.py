"""Compiles our C++ at first use, where the machine has a compiler; without one torch's operators serve.

Each ``.cpp`` lies beside the Python that calls it. It is compiled once on a machine, for its processor, in one to ten
seconds, and kept in the user's cache folder. Without a compiler or a folder of one's own, or with
``LLAMA_INFER_NATIVE=0``, there are no kernels of ours.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("llama_infer")

# NaN and infinity keep their meaning. OpenMP is torch's: a second one would compete with it, so none is linked.
_COMPILE = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-trapping-math", "-fno-math-errno"]
if platform.machine().lower() in ("x86_64", "amd64"):
    _COMPILE.append("-mprefer-vector-width=512")  # compilers stop at half of it where the processor has all
_FAST = [*_COMPILE, "-fassociative-math", "-fno-signed-zeros"]  # sums may be reordered, which makes vectors of them
_EXACT = [*_COMPILE, "-ffp-contract=off"]
_PATIENCE = 60  # seconds for a step


@functools.cache
def library(name: str, exact: bool = False) -> Any:
    """The compiled kernels of ``name``.cpp in this package ("models/native/linear"); None where they cannot be had.
    ``exact``: every operation as it is written, for what has to equal torch's to the last bit."""
    if os.environ.get("LLAMA_INFER_NATIVE") == "0" or os.name != "posix":
        return None
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    folder = _folder()
    if compiler is None or folder is None:
        return None
    source = Path(__file__).parent / f"{name}.cpp"
    texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(Path(__file__).parent.rglob("*.h")))]
    flags = _EXACT if exact else _FAST
    key = "\0".join([*texts, *flags, compiler, torch.__version__, _processor()])
    built = folder / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    try:
        if not built.exists():
            _build([compiler, *flags], source, built)
        return ctypes.CDLL(str(built))
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("no %s kernels of our own, torch's operators serve: %s", name, error)
        return None


def function(name: str, function: str, arguments: Sequence[Any], returns: Any = None, exact: bool = False) -> Any:
    """One function of a :func:`library`, whose types are declared at the first call; None where it cannot be had."""
    found = getattr(library(name, exact), function, None)
    if found is not None and found.argtypes is None:
        found.restype = returns
        found.argtypes = tuple(arguments)  # the last, because it tells other threads that both are there
    return found


def _build(command: list[str], source: Path, built: Path) -> None:
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        compiled, linked = f"{folder}/{source.stem}.o", f"{folder}/{source.stem}.so"
        for step in ([*command, "-c", str(source), "-o", compiled], [command[0], "-shared", compiled, "-o", linked]):
            _run(step)
        os.replace(linked, built)


def _run(command: list[str]) -> None:
    """Raises where it fails or takes too long; what it has started itself ends with it."""
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True) as process:
        try:
            status = process.wait(_PATIENCE)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if status:
        raise subprocess.CalledProcessError(status, command)


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
