"""Who takes part: this package under some policy, and its peers, each a process of its own that idles while others run.

A name is a peer's or "llama_infer", and may carry a variant behind a colon: ``llama_infer:int8``, ``llama.cpp:q8_0``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environments import PEERS, python_of
from workload import Job

OURS = "llama_infer"
RUNNERS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "transformers": ("transformers", {"batch": 1}),
    "padded": ("transformers", {"batch": 16}),
    "continuous": ("continuous", {}),
    "llama.cpp": ("llama.cpp", {}),
    "llama.cpp:q8_0": ("llama.cpp", {"format": "q8_0"}),
    "llama.cpp:q4_0": ("llama.cpp", {"format": "q4_0"}),
    "vllm": ("vllm", {}),
}
"""The peers by name: which runner, with which options."""


class PeerError(RuntimeError):
    """A contender that does not run; the message says why in one line."""


@dataclass(frozen=True)
class Answer:
    """What a contender answered to some jobs: the tokens of each, when each token came, and how long all of it took.

    Seconds are counted from the call. A contender that does not tell has one time for all of them.
    """

    tokens: list[list[int]]
    times: list[list[float]]
    seconds: float

    @property
    def first(self) -> float:
        """Seconds until every row had its first token."""
        return max(row[0] for row in self.times)

    @property
    def decode(self) -> float:
        """Tokens a second while all rows decode: after the last one's first token, before the first one's last."""
        start, end = self.first, min(row[-1] for row in self.times)
        count = sum(start < t <= end for row in self.times for t in row)
        return count / (end - start) if end > start else math.nan

    @property
    def held(self) -> float:
        """Tokens of a row's answer that were there in the middle of that time, on average."""
        middle = (self.first + min(row[-1] for row in self.times)) / 2
        return sum(t <= middle for row in self.times for t in row) / len(self.times)


class Contender:
    """An engine with a loaded model. ``isolated=False`` runs it in this process when its environment is ours."""

    def __init__(self, name: str, cache: Path, settings: Mapping[str, Any], isolated: bool = True) -> None:
        """``settings``: model (a folder), dtype, threads, rows, context and a runner's options. Raises PeerError."""
        self.name = name
        runner, options = _runner(name)
        isolated = isolated or (PEERS / runner / "requirements.txt").exists()
        begin = time.perf_counter()
        self._process = _Process(name, runner, cache, settings["threads"]) if isolated else None
        self._call = self._process or _in_process(runner)
        self.loaded: Mapping[str, Any] = self.call("load", **{**settings, **options}) or {}
        self.start_seconds = time.perf_counter() - begin

    def call(self, op: str, **arguments: Any) -> Any:
        """Calls the engine's method. Raises PeerError when it fails."""
        try:
            return self._call(op, **arguments)
        except PeerError:
            raise
        except Exception as error:  # of an engine in this process
            raise PeerError(f"{self.name} cannot {op}: {type(error).__name__}: {error}") from error

    def generate(self, jobs: Sequence[Job], together: bool = False) -> Answer:
        """Decodes the jobs. Raises PeerError when not as many tokens came back as were asked for."""
        pairs = [[list(job.prompt), job.new_tokens] for job in jobs]
        answer = Answer(**self.call("generate", jobs=pairs, together=together))
        if [len(row) for row in answer.tokens] != [job.new_tokens for job in jobs]:
            raise PeerError(f"{self.name} did not return as many tokens as were asked for")
        return answer

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.close()


class _Process:
    """A runner in its own environment: a JSON object a line in, one out. What it says otherwise goes to a log."""

    def __init__(self, name: str, runner: str, cache: Path, threads: int) -> None:
        self._name = name
        self._log = cache / f"{name.replace(':', '-')}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python_of(runner, cache), str(PEERS / runner / "runner.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), **_path_of(runner)},
            )

    def __call__(self, op: str, **arguments: Any) -> Any:
        process = self._process
        line = ""
        if process.stdin and process.stdout:
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps({"op": op, **arguments}), file=process.stdin, flush=True)
                line = process.stdout.readline()
        if not line:
            said = self._log.read_text(errors="replace").strip().splitlines() or ["nothing"]
            raise PeerError(f"{self._name} ended while it did {op!r}; its last words: {said[-1]}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self._name} cannot {op}: {answer['error'].splitlines()[0]}")
        return answer["result"]

    def close(self) -> None:
        try:
            self._process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


def _runner(name: str) -> tuple[str, Mapping[str, Any]]:
    ours, _, policy = name.partition(":")
    if ours == OURS:
        return OURS, {"quantization": policy} if policy else {}
    return RUNNERS[name]


def _path_of(runner: str) -> dict[str, str]:
    """Our package has to be found by our runner, also when it is not installed."""
    if runner != OURS:
        return {}
    return {"PYTHONPATH": os.pathsep.join([str(PEERS.parent.parent), os.environ.get("PYTHONPATH", "")])}


def _in_process(runner: str) -> Any:
    path = PEERS / runner / "runner.py"
    spec = importlib.util.spec_from_file_location(f"{runner}_runner", path)
    if spec is None or spec.loader is None:
        raise PeerError(f"{path} cannot be read")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(PEERS))
    spec.loader.exec_module(module)
    return module.protocol.Caller(module.Engine())
