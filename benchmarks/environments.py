"""A virtual environment for each peer that needs one, built when it is first asked for and kept in the cache folder."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

PEERS = Path(__file__).parent / "peers"
_NO_TILES = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
SETTINGS = {
    "llama.cpp": {
        "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF",
        "PIP_NO_CACHE_DIR": "1",  # what pip has built before may have been built otherwise
        **({"CFLAGS": _NO_TILES, "CXXFLAGS": _NO_TILES} if platform.machine() == "x86_64" else {}),
    }
}
"""The environment variables that an installation needs: llama.cpp is compiled for this processor, but without AMX: with
it llama-cpp-python 0.3.36 dies of an illegal instruction on quantised weights (Emerald Rapids, GCC 12)."""


class InstallError(RuntimeError):
    """A peer cannot be installed here; the message says why in one line."""


def python_of(peer: str, cache: Path) -> str:
    """The interpreter that runs a peer; ours when it has no requirements of its own. InstallError says why not."""
    requirements = PEERS / peer / "requirements.txt"
    if not requirements.exists():
        return sys.executable
    unwanted = requirements.with_name("unwanted.txt")
    wanted = requirements.read_bytes() + (unwanted.read_bytes() if unwanted.exists() else b"")
    folder = cache / "environments" / peer
    python, mark = folder / "bin" / "python", folder / "installed"
    digest = hashlib.sha256(wanted).hexdigest()
    if mark.exists() and mark.read_text() == digest:
        return str(python)
    print(f"{peer}: building its environment in {folder} ...", flush=True)
    _do(peer, [sys.executable, "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    _do(peer, [*pip, "install", "-r", str(requirements)], SETTINGS.get(peer, {}))
    if unwanted.exists():  # what is named as needed, is not, and does not work with this torch
        _do(peer, [*pip, "uninstall", "--yes", "-r", str(unwanted)])
    mark.write_text(digest)
    return str(python)


def _do(peer: str, command: list[str], settings: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(settings or {})})
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines or ["no reason given"]
        raise InstallError(f"{peer} cannot be installed here: {errors[-1].strip()}")
