"""The command line, with a pipeline that needs no model."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_pipeline import FakePipeline

from llama_infer import __version__, registry
from llama_infer.cli import main
from llama_infer.commands.options import DEFAULTS, parse_value
from llama_infer.commands.run import SAMPLES
from llama_infer.errors import ParameterError
from llama_infer.jobs import CONFIG_NAME
from llama_infer.parts import Param
from llama_infer.pipeline import declared_params
from llama_infer.prompts.auto import AutoFormatter
from llama_infer.prompts.chat import DEFAULT_SYSTEM_PROMPT, ChatFormatter
from llama_infer.prompts.plain import PlainFormatter

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
FAKE_CLI = [sys.executable, "-W", "error", str(HERE / "fake_cli.py")]


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr("llama_infer.pipeline.Pipeline", FakePipeline)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "as it was")
    monkeypatch.chdir(tmp_path)
    FakePipeline.made.clear()
    yield


def run(*words: str) -> FakePipeline:
    assert main(["run", *words]) == 0
    return FakePipeline.made[-1]


def predictions(path: str = "predictions.json") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(Path(path).read_text(encoding="utf-8"))
    return rows


# --- run: what goes in ------------------------------------------------------------------------------------------------


def test_without_any_option(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = run()
    assert [row["Input"] for row in predictions()] == list(SAMPLES)
    assert pipe.loaded.source.model == "demo"
    assert pipe.seen == [dict(DEFAULTS)] * 2
    assert DEFAULTS == {
        "temperature": 0.2,
        "top_k": 40,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "max_new_tokens": 400,
    }
    assert isinstance(pipe.options["formatter"], AutoFormatter)
    assert pipe.options["formatter"].system == DEFAULT_SYSTEM_PROMPT
    assert json.loads(Path(CONFIG_NAME).read_text())["repetition_penalty"] == 1.1
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "as it was"
    printed, errors = capsys.readouterr()
    assert "device: cpu, dtype: float32\nnote: a note\n2 prompts:\n" in printed
    assert f"[1] {SAMPLES[0]}\necho {SAMPLES[0]}\n" in printed
    assert re.search(r"2 prompts, \d+ tokens in [\d.]+ s, [\d.]+ tokens a second\n", printed)
    assert errors == ""


def test_every_option_of_the_original_script() -> None:
    Path("d.txt").write_text("hello\n")
    flags = {
        "--base_model": "models/a_b",
        "--tokenizer_path": "t_k",
        "--data_file": "d.txt",
        "--predictions_file": "out/p_p.json",
        "--gpus": "0, 1",
    }
    given = [word for pair in flags.items() for word in pair]
    pipe = run(*given, "--with_prompt", "--load_in_8bit", "--use_flash_attention_2")
    assert pipe.loaded.source.model == "models/a_b"
    assert pipe.options["tokenizer"] == "t_k"
    assert pipe.options["quantization"] == "bnb-int8"
    assert pipe.options["attention"] == "flash_attention_2"
    assert pipe.options["device_map"] == "auto"
    assert isinstance(pipe.options["formatter"], ChatFormatter)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert [row["Input"] for row in predictions("out/p_p.json")] == ["hello"]
    pipe = run("--load_in_4bit", "--only_cpu", "--gpus", "0,1")
    assert pipe.options["quantization"] == "bnb-nf4"
    assert pipe.options["device"] == "cpu" and "device_map" not in pipe.options
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert pipe.options["adapter"] is None and pipe.options["merge_adapter"] is True
    pipe = run("--adapter", "a_b", "--no_merge_adapter", "--local_files_only")
    assert pipe.options["adapter"] == "a_b"
    assert pipe.options["merge_adapter"] is False and pipe.options["local_files_only"] is True


@pytest.mark.parametrize("dash", ["-", "_"])
@pytest.mark.parametrize("sign", ["=", None])
def test_hyphens_and_underscores_are_alike(dash: str, sign: str | None) -> None:
    given = {"--predictions_file": "a_b.json", "--top_p": "0.5", "--base_model": "x_y"}
    words: list[str] = []
    for flag, value in given.items():
        flag = "--" + flag[2:].replace("_", dash)
        words += [f"{flag}={value}"] if sign else [flag, value]
    pipe = run(*words)
    assert Path("a_b.json").exists() and pipe.seen[0]["top_p"] == 0.5 and pipe.loaded.source.model == "x_y"


def test_every_declared_parameter_is_an_option() -> None:
    typed: list[tuple[list[str], Any]] = [
        *((["3"], 3), (["1"], 1), (["0.5"], 0.5), (["1.5"], 1.5), (["text"], "text"), (["true"], True)),
        *((["text"], ("text",)), (["3"], (3,)), (["1", "1.5"], (1, 1.5)), (["1,2"], ((1, 2),))),
        *((["5=-1.5"], {5: -1.5}), (["1,2=-1.5"], {(1, 2): -1.5})),
    ]
    words, expected = [], {}
    for name, param in declared_params().items():
        texts, expected[name] = next(pair for pair in typed if type(pair[1]) is param.type and accepts(param, pair[1]))
        words += [word for text in texts for word in (f"--{name}", text)]
    assert run(*words).seen[0] == expected


def accepts(param: Param, value: Any) -> bool:
    try:
        return bool(param.validate("x", value) is not None)
    except ParameterError:
        return False


def test_several_values() -> None:
    pipe = run(
        "--stop", "a b", "--stop=--c_d", "--logit_bias", "5=-inf", "--logit-bias", "6=1", "--top_k", "1", "--top_k=2"
    )
    assert pipe.seen[0]["stop"] == ("a b", "--c_d")
    assert pipe.seen[0]["logit_bias"] == {5: -float("inf"), 6: 1.0}
    assert pipe.seen[0]["top_k"] == 2
    assert run("--max_new_tokens", "none").seen[0]["max_new_tokens"] is None


def test_the_other_options_reach_the_pipeline() -> None:
    pipe = run(*"--dtype float16 --device cuda:1 --quantization mine --revision v1 --attention eager".split())
    wanted = {"dtype": "float16", "device": "cuda:1", "quantization": "mine", "revision": "v1", "attention": "eager"}
    assert wanted.items() <= pipe.options.items()
    assert pipe.options["batch_size"] is None and pipe.options["trust_remote_code"] is False
    pipe = run("--batch_size", "8", "--trust_remote_code", "--gpus", "1,2", "--device", "cuda:1")
    assert pipe.options["batch_size"] == 8 and pipe.options["trust_remote_code"] is True
    assert "device_map" not in pipe.options


def test_how_a_line_becomes_a_prompt() -> None:
    assert isinstance(run("--no_with_prompt").options["formatter"], PlainFormatter)
    assert run("--system", "be brief").options["formatter"].system == "be brief"
    formatter = run("--with-prompt", "--system=").options["formatter"]
    assert isinstance(formatter, ChatFormatter) and formatter.system == ""


def test_vllm_once_there_is_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BUILTIN["backend"], "vllm", "somewhere:VLLM")
    assert run("--use_vllm").options["backend"] == "vllm"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run --tempurature 1", "unknown option --tempurature; did you mean '--temperature'?"),
        ("run --tempurature=1", "unknown option --tempurature; did you mean '--temperature'?"),
        ("run --temp 1", "unknown option --temp"),
        ("run prompts.txt", "unexpected argument 'prompts.txt'"),
        ("run --temperature", "expected one argument"),
        ("run --temperature hot", "temperature='hot' cannot be read: temperature takes float"),
        ("run --temperature -1", "temperature=-1.0 is out of range"),
        ("run --temperature nan", "temperature=nan"),
        ("run --top_k 1.5", "top_k='1.5' cannot be read: top_k takes int"),
        ("run --logit_bias 5", "logit_bias='5' cannot be read"),
        ("run --stop=", "non-empty strings"),
        ("run --batch_size 0", "'0' is not a whole number above 0"),
        ("run --load_in_8bit --load_in_4bit", "--load-in-8bit and --load-in-4bit contradict each other"),
        ("run --load_in_8bit --quantization x", "--load-in-8bit and --quantization contradict"),
        ("run --use_flash_attention_2 --attention eager", "contradicts --attention eager"),
        ("run --only_cpu --device cuda", "contradicts --device cuda"),
        ("run --gpus=,", "names no GPU"),
        ("run --use_vllm", "no vLLM backend yet"),
        ("run --with_prompt --no_with_prompt", "not allowed with argument"),
        ("run --no_with_prompt --system x", "--system has no place"),
        ("chat --no_with_prompt --system x", "--system has no place"),
        ("chat --n 2", "one answer a turn: drop --n"),
        ("run --interactive --data_file x", "--data-file has no use with --interactive"),
        ("run --interactive --predictions_file x", "--predictions-file has no use with --interactive"),
        ("run --data_file absent.txt", "no file of prompts at 'absent.txt'"),
        ("run --data_file .", "'.' is a folder"),
        ("run --data_file empty.txt", "holds no prompts"),
        ("run --data_file latin.txt", "is not UTF-8: line 2, byte 5"),
        ("run --predictions_file .", "'.' is a folder"),
        ("run --predictions_file latin.txt/p.json", "predictions cannot be written"),
        ("run --predictions_file latin.txt --data_file good.txt", None),
        ("run --predictions_file good.txt --data_file good.txt", "is the file of prompts"),
        ("run --predictions_file checkpoint/p.json", "holds a checkpoint"),
        ("rnu", "unknown command 'rnu'; did you mean 'run'? Commands: run, chat, convert, quality, parts"),
        ("--base_model x", "llama-infer run --base-model x"),
        ("--version_", "llama-infer run --version-"),
        ("parts --jsn", "did you mean '--json'"),
    ],
)
def test_mistakes_are_one_line_and_exit_2_before_a_model_is_loaded(
    words: str, message: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.txt").write_text("\n \n")
    Path("latin.txt").write_bytes(b"abc\nd\xe9f\n")
    Path("good.txt").write_text("hi\n")
    Path("checkpoint").mkdir()
    Path("checkpoint/config.json").write_text('{"model_type": "llama"}')
    before = sorted(os.listdir())
    code = main(words.split())
    printed, errors = capsys.readouterr()
    if message is None:
        assert code == 0
        return
    assert code == 2 and printed == ""
    assert errors.startswith("error: ") and errors.count("\n") == 1 and message in errors
    assert not FakePipeline.made and sorted(os.listdir()) == before


def test_a_value_that_is_wrong_for_the_loaded_model_is_exit_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: FakePipeline, **params: Any) -> None:
        raise ParameterError("not\nhere")

    monkeypatch.setattr(FakePipeline, "explain", refuse)
    assert main(["run"]) == 2
    assert capsys.readouterr().err == "error: not here\n" and os.listdir() == []


def test_values_of_plug_ins() -> None:
    ids = Param(default=(), check=lambda v: all(isinstance(i, int) for i in v), range="token ids")
    assert parse_value("ids", ids, ["1", "2"]) == (1, 2)
    positive = Param(default=(), check=lambda v: all(i > 0 for i in v), range="above 0")
    assert parse_value("positive", positive, ["1", "2"]) == (1, 2)
    with pytest.raises(ParameterError, match="positive=.*'x'.* is out of range: above 0"):
        parse_value("positive", positive, ["x"])
    weights = Param(default=(), check=lambda v: all(isinstance(i, float) for i in v), range="numbers")
    assert parse_value("weights", weights, ["1", "2.5"]) == (1.0, 2.5)
    with pytest.raises(ParameterError, match="out of range: token ids"):
        parse_value("ids", ids, ["x"])
    on = Param(default=False)
    assert [parse_value("on", on, [text]) for text in ("true", "No", "1")] == [True, False, True]
    with pytest.raises(ParameterError, match="on='maybe' cannot be read: on takes bool"):
        parse_value("on", on, ["maybe"])
    assert parse_value("name", Param(default=""), ["none"]) == "none"
    assert parse_value("map", Param(default={}), ["a=b=1", "c=x"]) == {"a=b": 1.0, "c": "x"}


def test_a_plug_in_with_a_switch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    params = {"fast": Param(default=False, help="100% faster"), "level": Param(default=1, kind=int)}
    monkeypatch.setattr("llama_infer.pipeline.declared_params", lambda: params)
    monkeypatch.setattr("fake_pipeline.declared_params", lambda: params)
    assert run("--fast").seen[0] == {"fast": True}
    assert run("--fast", "false", "--level", "2").seen[0] == {"fast": False, "level": 2}
    assert main(["run", "--help"]) == 0
    assert "100% faster" in capsys.readouterr().out


# --- run: what comes out ----------------------------------------------------------------------------------------------


def test_failed_rows_are_written_and_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    Path("d.txt").write_text("one\nFAIL\ntwo\n")
    assert main(["run", "--data_file", "d.txt"]) == 1
    assert [row.get("Error") for row in predictions()] == [None, "GenerationError: it\nbroke", None]
    printed = capsys.readouterr().out
    assert "[2] FAIL\nerror: it broke\n" in printed and "3 prompts (1 failed), " in printed


def test_ctrl_c_saves_what_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    Path("d.txt").write_text("one\nCTRL-C\ntwo\n")
    assert main(["run", "--data_file", "d.txt"]) == 130
    assert [row["Input"] for row in predictions()] == ["one"]
    errors = capsys.readouterr().err
    assert "interrupted: 1 results are saved in" in errors and "Traceback" not in errors
    Path("d.txt").write_text("CTRL-C\n")
    assert main(["run", "--data_file", "d.txt"]) == 130
    assert [row["Input"] for row in predictions()] == ["one"]
    assert "nothing was done yet" in capsys.readouterr().err


def test_ctrl_c_elsewhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("llama_infer.cli.parts", interrupt)
    assert main(["parts"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_disk_that_fills_up_is_exit_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert main(["run"]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and "No space left" in errors and "results were done" in errors
    assert os.listdir() == []


def test_the_first_ten_prompts_and_samples(capsys: pytest.CaptureFixture[str]) -> None:
    Path("d.txt").write_text("".join(f"prompt {number} {'x' * 300}\n" for number in range(12)))
    run("--data_file", "d.txt", "--n", "2", "--predictions_file", "p.json")
    printed = capsys.readouterr().out
    assert "12 prompts, the first 10:\n  1. prompt 0 x" in printed
    assert "  10. prompt 9" in printed and "  11. prompt 10" not in printed
    assert "(1 of 2) echo prompt 11" in printed and "(2 of 2) echo prompt 11" in printed
    assert "x" * 250 not in printed.split("[1]")[0]
    assert [row["Input"].split()[1] for row in predictions("p.json")] == [str(number) for number in range(12)]


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, value in DEFAULTS.items():
        assert "--" + name.replace("_", "-") in text and f"default: {value}" in text
    assert "an instruct model answers badly without" in text and "exit code:" in text
    assert main(["--help"]) == 0
    assert "llama-infer run --data_file" in capsys.readouterr().out


def test_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parts"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["kind", "name", "package", "version"]
    assert ["sampler", "categorical", "llama-infer", __version__] in [line.split() for line in lines]
    assert main(["parts", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"kind": "backend", "name": "local", "package": "llama-infer", "version": __version__} in rows
    assert len(rows) == len(lines) - 1
