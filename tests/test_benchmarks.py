"""The benchmark runs, and ends with a line of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent.parent / "benchmarks" / "run.py"


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(RUN), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )


def test_quick(tmp_path: Path) -> None:
    done = _run(tmp_path, "--quick", "--threads", "1")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["agreement"] is True
    assert report["agreement_float32_exact"] is True
    assert report["read_bandwidth_gb_s"] > 0
    assert set(report["tokens_per_second"]) == {"llama_infer", "loop", "padded"}
    assert set(report["ratios"]) == {"loop", "padded"}
    assert all(ratio["median"] > 0 for ratio in report["ratios"].values())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [("--peers", "vllm"), ("--suite", "decode"), ("--requests", "0")])
def test_what_it_does_not_know_is_an_error(
    arguments: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(RUN.parent))
    import run

    with pytest.raises(SystemExit) as exit:
        run.main(arguments)
    assert exit.value.code == 2
    assert arguments[0] in capsys.readouterr().err
