"""The command line with the model that ships with the package, as a stranger runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_infer import Pipeline
from llama_infer.cli import main
from llama_infer.commands.run import SAMPLES
from llama_infer.jobs import CONFIG_NAME, run_file

COMMAND = [sys.executable, "-m", "llama_infer"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONIOENCODING": "utf-8"}


def predictions(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """``llama-infer run`` and nothing else."""
    folder = tmp_path_factory.mktemp("first")
    result = subprocess.run(
        [*COMMAND, "run"], cwd=folder, env=ENVIRONMENT, capture_output=True, encoding="utf-8", check=True
    )
    return folder, result.stdout


def test_the_samples_are_answered(first_run: tuple[Path, str]) -> None:
    folder, printed = first_run
    rows = predictions(folder / "predictions.json")
    assert [row["Input"] for row in rows] == list(SAMPLES)
    for row in rows:
        assert row["Output"] and row["Output"] in printed
        assert row["finish_reason"] == "stop" and row["tokens"] > 1
    assert sorted(os.listdir(folder)) == [CONFIG_NAME, "predictions.json"]


def test_a_run_can_be_repeated_from_what_it_wrote(first_run: tuple[Path, str]) -> None:
    folder, _ = first_run
    config = json.loads((folder / CONFIG_NAME).read_text())
    run = config.pop("run")
    pipe = Pipeline(run["model"], params=config, dtype=run["dtype"])
    for row in predictions(folder / "predictions.json"):
        assert pipe(row["Input"], seed=row["seed"]).text == row["Output"]


def test_the_same_from_python(tmp_path: Path) -> None:
    pipe = Pipeline("demo", dtype="float32")
    summary = run_file(pipe, list(SAMPLES), tmp_path / "p.json", {"temperature": 0, "max_new_tokens": 8})
    rows = predictions(tmp_path / "p.json")
    assert [row["Output"] for row in rows] == [pipe(p, temperature=0, max_new_tokens=8).text for p in SAMPLES]
    assert summary.tokens == sum(row["tokens"] for row in rows)


def test_a_row_that_cannot_be_answered_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "d.txt", tmp_path / "p.jsonl"
    data.write_text("hello\n" + "too long " * 20_000 + "\nhello\n")
    words = ["--data_file", str(data), "--predictions_file", str(out), "--max_new_tokens", "4", "--temperature", "0"]
    assert main(["run", *words]) == 1
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["finish_reason"] == "error" for row in rows] == [False, True, False]
    assert rows[1]["Error"].startswith("PromptTooLongError: ") and rows[0]["Output"] == rows[2]["Output"] != ""
    assert "(1 failed)" in capsys.readouterr().out


def test_a_folder_that_is_no_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    words = ["--base_model", str(tmp_path / "empty"), "--predictions_file", str(tmp_path / "p.json")]
    assert main(["run", *words]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert os.listdir(tmp_path) == ["empty"]


def test_a_conversation_survives_ctrl_c(tmp_path: Path) -> None:
    command = [*COMMAND, "chat", "--min_new_tokens", "390", "--max_new_tokens", "400"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, encoding="utf-8", **pipes) as talk:
        assert talk.stdin is not None and talk.stdout is not None and talk.stderr is not None
        while "/help lists" not in talk.stdout.readline():
            pass
        talk.stdin.write("hello\n")
        talk.stdin.flush()
        talk.stdout.read(1)
        talk.send_signal(signal.SIGINT)
        talk.stdin.write("/set min_new_tokens 0\n/set max_new_tokens 5\nhello\n/save talk.json\n")
        talk.stdin.close()
        printed, errors = talk.stdout.read(), talk.stderr.read()
    assert (talk.returncode, errors) == (0, "") and "[stopped]" in printed
    messages = predictions(tmp_path / "talk.json")
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert all(message["content"] for message in messages)
