"""A file of prompts in, predictions out."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from disk import load, refuse
from fake_pipeline import FakePipeline

from llama_infer.errors import DataFileError, MissingFileError, ParameterError
from llama_infer.jobs import CONFIG_NAME, PredictionsWriter, Summary, as_row, run_file
from llama_infer.types import Completion


def test_a_file_in_a_file_out(tmp_path: Path) -> None:
    data, out = tmp_path / "prompts.txt", tmp_path / "out" / "p.json"
    data.write_text("one\n\nFAIL\n two \n", encoding="utf-8")
    shown: list[Completion] = []
    pipe: Any = FakePipeline()
    summary = run_file(pipe, data, out, {"temperature": 0.5, "seed": 4}, shown.append)
    rows = load(out)
    assert [row["Input"] for row in rows] == ["one", "FAIL", " two "]
    assert [row["Output"] for row in rows] == ["echo one", "", "echo  two "]
    assert rows[0]["seed"] == 4 and rows[1]["Error"] == "GenerationError: it\nbroke" and "Error" not in rows[2]
    assert [as_row(completion) for completion in shown] == rows
    assert (summary.prompts, summary.failed, summary.tokens) == (3, 1, 18)
    assert summary.predictions_file == out and summary.tokens_per_second > 0
    assert pipe.closed == 1
    config = json.loads((out.parent / CONFIG_NAME).read_text())
    assert config["temperature"] == 0.5 and config["top_k"] == 0 and config["run"]["model"] == "demo"
    assert set(config["run"]["versions"]) == {"llama_infer", "torch", "transformers"}


def test_prompts_of_any_iterable(tmp_path: Path) -> None:
    pipe: Any = FakePipeline()
    summary = run_file(pipe, iter(["a", [{"role": "user", "content": "b"}], [1, 2]]), tmp_path / "p.jsonl", {"n": 2})
    assert [row["Input"] for row in load(tmp_path / "p.jsonl")] == ["a", [{"role": "user", "content": "b"}], [1, 2]]
    assert load(tmp_path / "p.jsonl")[0]["Alternatives"][0]["Output"] == "echo a"
    assert summary.prompts == 3
    assert Summary(0, 0, 0, 0.0, tmp_path).tokens_per_second == 0


def test_nothing_is_touched_when_the_parameters_are_wrong(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text("old")
    pipe: Any = FakePipeline()
    for params in ({"temperature": -1}, {"temprature": 1}):
        with pytest.raises(ParameterError):
            run_file(pipe, ["a"], tmp_path / "p.json", params)
    with pytest.raises(MissingFileError):
        run_file(pipe, tmp_path / "absent", tmp_path / "p.json")
    with pytest.raises(DataFileError, match="is the file of prompts"):
        run_file(pipe, str(tmp_path / "p.json"), tmp_path / "p.json")
    assert (tmp_path / "p.json").read_text() == "old" and os.listdir(tmp_path) == ["p.json"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_job_keeps_what_is_done(tmp_path: Path, kind: type[BaseException]) -> None:
    def prompts() -> Iterator[str]:
        yield from ("a", "b")
        raise kind

    pipe: Any = FakePipeline()
    with pytest.raises(kind):
        run_file(pipe, prompts(), tmp_path / "p.json")
    assert [row["Input"] for row in load(tmp_path / "p.json")] == ["a", "b"]
    assert pipe.closed == 1


def test_a_listener_that_fails_ends_the_job_and_closes_the_run(tmp_path: Path) -> None:
    pipe: Any = FakePipeline()
    with pytest.raises(BrokenPipeError):
        run_file(pipe, ["a", "b"], tmp_path / "p.json", on_result=refuse(errno.EPIPE))
    assert len(load(tmp_path / "p.json")) == 1 and pipe.closed == 1


def test_what_json_has_no_word_for_is_written_as_text(tmp_path: Path) -> None:
    with PredictionsWriter(tmp_path / "p.json") as writer:
        writer.describe({"bias": {5: float("-inf")}, "kind": SimpleNamespace, "stop": ("a",), "none": None, "on": True})
    config = json.loads((tmp_path / CONFIG_NAME).read_text(), parse_constant=refuse(errno.EINVAL))
    assert config == {"bias": {"5": "-inf"}, "kind": str(SimpleNamespace), "stop": ["a"], "none": None, "on": True}
