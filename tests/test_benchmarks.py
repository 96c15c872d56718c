"""Every suite of the benchmarks runs, compares tokens first, and ends with a line of JSON."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the models go, made once for all suites."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import run

    threads = torch.get_num_threads()
    yield run.main
    torch.set_num_threads(threads)


def _quick(main: Any, cache: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code = main(["--quick", "--threads", "1", "--cache", str(cache), *arguments])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(report, dict)
    assert code == 0 and report["agreement"] is True
    assert report["read_gb_s"] > 0 and report["tflop_s"] > 0
    assert set(report["missing"]) <= {"llama_infer:int4"}  # which is for bfloat16
    return report


def test_file(main: Any, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = _quick(main, cache, capsys, "--suite", "file", "--peers", "transformers,padded,continuous")
    assert set(report["tokens_per_second"]) == {"llama_infer", "transformers", "padded", "continuous"}
    assert set(report["ratios"]) == {"against transformers", "against padded", "against continuous"}
    assert all(ratio["median"] > 0 for ratio in report["ratios"].values())
    assert 0 < report["share_of_roofline"]["llama_infer"]
    assert all(report["float32_exact"].values())


@pytest.mark.parametrize(
    ("suite", "key"),
    [
        ("decode", "share_of_read_limit"),
        ("prefix", "seconds"),
        ("context", "contenders"),
        ("ttft", "ratios"),
        ("quant", "tokens_per_second"),
    ],
)
def test_suites(suite: str, key: str, main: Any, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = _quick(main, cache, capsys, "--suite", suite, "--no-agreement")
    assert report["suite"] == suite and report[key]


def test_many(main: Any, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = _quick(main, cache, capsys, "--suite", "many")
    assert len(report["milliseconds_per_request"]) == 10
    assert report["ratios"]["last part over first"] > 0


def test_a_process_of_its_own(tmp_path: Path) -> None:
    """As a command, with the contender in another process, which says what it took."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "run.py"), "--quick", "--isolated", "--suite", "memory", "--peers", "none"]
        + ["--threads", "1", "--cache", str(tmp_path / "cache")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    ours = json.loads(done.stdout.splitlines()[-1])["contenders"]["llama_infer"]
    assert ours["peak"] > ours["imports"] > 1 << 20
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_wrong_tokens_are_noticed(main: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import contenders

    right = contenders.Contender.generate

    def wrong(self: Any, jobs: Any, together: bool = False) -> Any:
        answer = right(self, jobs, together)
        if self.name == "llama_infer":
            answer.tokens[-1][-1] ^= 1
        return answer

    monkeypatch.setattr(contenders.Contender, "generate", wrong)
    arguments = ["--quick", "--threads", "1", "--suite", "prefix", "--cache", str(cache)]
    assert main(arguments) == 1


def test_a_peer_that_cannot_be_installed_is_one_line(
    main: Any, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import environments

    def refuse(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "first\nERROR: no wheel for this machine\n")

    monkeypatch.setattr(environments.subprocess, "run", refuse)
    arguments = ["--quick", "--threads", "1", "--suite", "ttft", "--peers", "vllm", "--no-agreement"]
    assert main([*arguments, "--cache", str(cache)]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["missing"] == {"vllm": "vllm cannot be installed here: ERROR: no wheel for this machine"}


@pytest.mark.parametrize(
    "arguments",
    [("--peers", "ollama"), ("--suite", "latency"), ("--requests", "0"), ("--repeats", "0"), ("--rows", "1,x")],
)
def test_what_it_does_not_know_is_an_error(
    arguments: tuple[str, str], main: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_runner_answers_a_line_with_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Errors come back as answers, and what a library prints does not get between them."""
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS / 'peers')!r})\n"
        "import protocol\n"
        "class Engine:\n"
        "    def generate(self, jobs, together):\n"
        "        print('noise'); return [[1]], [[0.0]]\n"
        "protocol.serve(Engine)\n"
    )
    lines = [json.dumps({"op": "generate", "jobs": [], "together": True}), json.dumps({"op": "fly"})]
    done = subprocess.run([sys.executable, "-c", code], input="\n".join(lines), capture_output=True, text=True)
    first, second = map(json.loads, io.StringIO(done.stdout))
    assert first["result"]["tokens"] == [[1]]
    assert "fly" in second["error"]
    assert "noise" in done.stderr
