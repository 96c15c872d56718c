"""The command line as a process of its own: pipes, terminals, interrupts, and what is imported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_infer import __version__
from llama_infer.commands.run import SAMPLES
from llama_infer.jobs import CONFIG_NAME

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
FAKE_CLI = [sys.executable, "-W", "error", str(HERE / "fake_cli.py")]


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def predictions() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(Path("predictions.json").read_text(encoding="utf-8"))
    return rows


def test_no_torch_before_a_model_is_needed() -> None:
    for words in (["--help"], ["--version"], ["parts"], ["parts", "--json"], ["run", "--help"], ["chat", "--help"], []):
        result = subprocess.run([*FAKE_CLI, *words], env=ENVIRONMENT, capture_output=True, text=True)
        assert result.returncode == (0 if words else 2), result.stderr
        assert (result.stderr == "") == bool(words)


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "llama_infer", "--version"]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.stdout == f"llama-infer {__version__}\n" and result.returncode == 0


def test_a_reader_that_leaves_is_no_error() -> None:
    Path("d.txt").write_text("".join(f"{number} {'x' * 999}\n" for number in range(500)))
    command = [*FAKE_CLI, "run", "--data_file", "d.txt"]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as job:
        assert job.stdout is not None and job.stderr is not None
        while b"[2]" not in job.stdout.readline():
            pass
        job.stdout.close()
        assert job.stderr.read() == b""
    assert job.returncode == 141
    rows = predictions()
    assert 0 < len(rows) < 500 and [row["Input"].split()[0] for row in rows] == [str(n) for n in range(len(rows))]


def test_a_terminal_without_chinese() -> None:
    for encoding in ("ascii", "latin-1", "gbk"):
        environment = {**ENVIRONMENT, "PYTHONIOENCODING": encoding}
        result = subprocess.run([*FAKE_CLI, "run"], env=environment, capture_output=True)
        assert result.returncode == 0 and result.stderr == b""
        assert (SAMPLES[0] if encoding == "gbk" else "?" * 13) in result.stdout.decode(encoding)
    assert [row["Input"] for row in predictions()] == list(SAMPLES)


def test_prompts_through_a_pipe() -> None:
    command = [*FAKE_CLI, "run", "--data_file", "/dev/stdin"]
    lines = "".join(f"{number}\n" for number in range(12)).encode()
    result = subprocess.run(command, env=ENVIRONMENT, input=lines, capture_output=True)
    assert result.returncode == 0 and result.stderr == b""
    assert b"an unknown number of prompts, the first 10:\n  1. 0\n" in result.stdout
    assert [row["Input"] for row in predictions()] == [str(number) for number in range(12)]


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_progress_only_where_someone_watches() -> None:
    import fcntl
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    result = subprocess.run([*FAKE_CLI, "run"], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=follower, text=True)
    os.close(follower)
    shown = os.read(leader, 100_000)
    os.close(leader)
    assert b"2/2" in shown and result.returncode == 0
    assert "2/2" not in result.stdout and "echo" in result.stdout


def test_an_interrupt_from_outside() -> None:
    Path("d.txt").write_text("".join(f"{number}\n" for number in range(1_000_000)))
    command = [*FAKE_CLI, "run", "--data_file", "d.txt"]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None and job.stderr is not None
        while "[2]" not in job.stdout.readline():
            pass
        job.send_signal(signal.SIGINT)
        job.stdout.read()
        errors = job.stderr.read()
    assert job.returncode == 130 and errors.startswith("\ninterrupted: ")
    assert len(predictions()) == int(errors.split()[1])
    assert sorted(os.listdir()) == ["d.txt", CONFIG_NAME, "predictions.json"]
