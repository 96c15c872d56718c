"""Kills a job at its n-th line of code, for every n, and looks at what is left. Run by test_jobs.py.

Prints the number of crash points. Each is a forked child that gets SIGKILL between two lines of the writer, in
whichever of its threads the n-th line falls, or in the middle of writing a buffer.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
from pathlib import Path

from llama_infer import files, jobs
from llama_infer.types import Completion, Request

OLD = '[{"Input": "old"}]'
WATCHED = (files.__file__, jobs.__file__)
ROWS = 4


class Countdown:
    """Kills the process when it reaches zero."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def trace(self, frame, event, argument):  # type: ignore[no-untyped-def]
        if frame.f_code.co_filename not in WATCHED:
            return None
        if event == "line":
            self()
        return self.trace


class Halting(io.FileIO):
    """Writes half, may die, writes the rest."""

    countdown: Countdown

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        data = bytes(data)
        half = len(data) // 2
        super().write(data[:half])
        self.countdown()
        super().write(data[half:])
        self.countdown()
        return len(data)


def work(path: Path, countdown: Countdown) -> None:
    Halting.countdown = countdown
    files.open = lambda name, mode: io.BufferedWriter(Halting(str(name), mode.replace("b", "")), 64)  # type: ignore
    os.fsync = countdown  # type: ignore[assignment]
    threading.settrace(countdown.trace)
    sys.settrace(countdown.trace)
    with jobs.PredictionsWriter(path, interval=0) as writer:
        writer.describe({"temperature": 0.2})
        for number in range(ROWS):
            writer.add(Completion(Request(f"问题 {number}"), text="答案 " * 9, token_ids=(1, 2), seed=number))


def check(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if text != OLD:
        rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
        assert [row["Input"] for row in rows] == [f"问题 {number}" for number in range(len(rows))], text
        assert all(row["Output"] == "答案 " * 9 for row in rows), text
    assert json.loads(path.with_name(jobs.CONFIG_NAME).read_text()) in ({}, {"temperature": 0.2})


def main(folder: Path, name: str) -> None:
    path = folder / name
    os.fsync = lambda descriptor: None  # SIGKILL loses nothing that the system has: spare the disk
    steps = 0
    while True:
        steps += 1
        path.write_text(OLD)
        path.with_name(jobs.CONFIG_NAME).write_text("{}")
        child = os.fork()
        if child == 0:
            work(path, Countdown(steps))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        check(path)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        with jobs.PredictionsWriter(path):  # nothing that was left is in the way of the next job
            pass
        assert sorted(os.listdir(folder)) == sorted([jobs.CONFIG_NAME, name]), os.listdir(folder)
    print(steps - 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
