"""``llama-infer chat``, with a pipeline that needs no model."""

from __future__ import annotations

import builtins
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from fake_pipeline import FakePipeline

from llama_infer.cli import main
from llama_infer.commands.options import DEFAULTS

HERE = Path(__file__).parent
Talk: TypeAlias = Callable[..., "tuple[str, str]"]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Types lines into a session; what came out after its greeting, and the errors."""
    monkeypatch.setattr("llama_infer.pipeline.Pipeline", FakePipeline)
    monkeypatch.chdir(tmp_path)

    def say(*lines: str, command: tuple[str, ...] = ("chat",)) -> tuple[str, str]:
        typed = io.TextIOWrapper(io.BytesIO("\n".join(lines).encode()), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", typed)
        assert main(command) == 0
        printed, errors = capsys.readouterr()
        head, greeting, said = printed.partition("/help lists the commands; Ctrl-D leaves\n")
        assert "device: cpu, dtype: float32\nnote: a note" in head and greeting
        return said, errors

    return say


CUT = "[cut: no room for more tokens; /set max_new_tokens allows longer answers]\n"


def test_turns_are_answered_and_remembered(talk: Talk) -> None:
    said, errors = talk("你好", "", "  ", "again", "/save talk.json")
    path = Path("talk.json")
    assert said == f"echo 你好\n{CUT}echo again\n{CUT}5 messages are saved in {path.resolve()}\n"
    assert errors == ""
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {"role": "system", "content": "the default"},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "echo 你好"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "echo again"},
    ]
    pipe = FakePipeline.made[-1]
    assert pipe.seen == [dict(DEFAULTS)] * 2 and pipe.options["formatter"] == "chat"


@pytest.mark.parametrize("command", [("chat",), ("run", "--interactive"), ("run", "--interactive", "--with_prompt")])
def test_two_names_for_a_conversation(talk: Talk, command: tuple[str, ...]) -> None:
    said, _ = talk("/system", command=(*command, "--temperature", "0", "--system", "be brief"))
    assert said == "be brief\n"


def test_reset_and_system(talk: Talk) -> None:
    said, errors = talk(
        "a",
        "/reset",
        "/save 1.json",
        "b",
        "/system",
        "/system Be kind.",
        "/save 2.json",
        "/system",
        "c",
        "/save 3.json",
    )
    assert errors == ""
    assert [len(json.loads(Path(f"{n}.json").read_text())) for n in (1, 2, 3)] == [1, 1, 3]
    assert "the default\na new conversation, with that system prompt\n" in said and "\nBe kind.\necho c" in said


def test_no_system_prompt(talk: Talk) -> None:
    assert talk("/system", command=("chat", "--system=")) == ("no system prompt\n", "")


def test_set_is_typed_and_forgiving(talk: Talk) -> None:
    said, errors = talk(
        "/set temperature 0.5",
        "/set top-k=7",
        "/set stop 'two words' end",
        "/set logit_bias 5=-1 6=2",
        "/set temperature hot",
        "/set temperature -1",
        "/set temprature 1",
        "/set stop 'open",
        "/set xyz",
        "hi",
        "/set temperature",
        "/set min_p",
    )
    assert FakePipeline.made[-1].seen == [
        {**DEFAULTS, "temperature": 0.5, "top_k": 7, "stop": ("two words", "end"), "logit_bias": {5: -1.0, 6: 2.0}}
    ]
    assert said.endswith("temperature = 0.5\nmin_p = the default\n") and "stop = ('two words', 'end')\n" in said
    lines = errors.splitlines()
    assert len(lines) == 5 and all(line.startswith("error: ") for line in lines)
    assert "temperature takes float" in lines[0] and "temperature=-1.0 is out of range" in lines[1]
    assert "unknown parameter 'temprature'; did you mean 'temperature'? Known: " in lines[2]
    assert "No closing quotation" in lines[3] and "unknown parameter 'xyz'. Known: " in lines[4]


def test_set_alone_shows_everything(talk: Talk) -> None:
    said, _ = talk("/set")
    assert "temperature = 0.2\n" in said and "seed = the default\n" in said


def test_unknown_commands_suggest_and_slashes_can_be_said(talk: Talk) -> None:
    said, errors = talk("/rest", "/etc", "//etc/passwd?")
    assert "unknown command '/rest'; did you mean '/reset'? Known: /reset, /system," in errors
    assert "unknown command '/etc'" in errors
    assert said == f"echo /etc/passwd?\n{CUT}"


def test_leaving_and_help(talk: Talk) -> None:
    said, _ = talk("/help", "/exit", "never said")
    assert "/set NAME VALUE" in said and "echo" not in said
    assert talk("/quit", "never said") == ("", "")
    assert talk() == ("", "")


def test_an_answer_that_fails_or_is_stopped_leaves_the_session(talk: Talk) -> None:
    said, errors = talk("FAIL", "CTRL-C", "hi", "/save s.json")
    assert errors == "error: it broke\n"
    assert "echo\n[stopped]\necho hi\n" in said
    contents = [message["content"] for message in json.loads(Path("s.json").read_text())]
    assert contents == ["the default", "CTRL-C", "echo", "hi", "echo hi"]


def test_a_file_that_cannot_be_saved(talk: Talk) -> None:
    Path("folder").mkdir()
    said, errors = talk("/save", "/save folder", "/save absent/x.json", "hi")
    assert [line.split(":")[0] for line in errors.splitlines()] == ["error"] * 3
    assert "/save needs the name of a file" in errors and "'folder' cannot be written" in errors
    assert said.startswith("echo hi") and os.listdir() == ["folder"]


def test_without_a_template_each_text_is_continued(talk: Talk) -> None:
    said, errors = talk("a", "/reset", "/system", "/save s.json", command=("chat", "--no_with_prompt"))
    assert said.startswith("echo a\n") and "no system prompt" in said and errors == ""
    assert FakePipeline.made[-1].options["formatter"] == "plain"
    assert json.loads(Path("s.json").read_text()) == []


def test_at_a_terminal(talk: Talk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed: Iterator[Any] = iter(["hi", KeyboardInterrupt, "again", EOFError])

    def ask(prompt: str) -> str:
        line = next(typed)
        if not isinstance(line, str):
            raise line
        return line

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(builtins, "input", ask)
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert main(["chat"]) == 0
    assert f"echo hi\n{CUT}\n(Ctrl-D or /exit leaves)\necho again\n" in capsys.readouterr().out


def test_bytes_that_are_no_text_do_not_end_the_session(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    command = [sys.executable, "-W", "error", str(HERE / "fake_cli.py"), "chat"]
    result = subprocess.run(command, env=environment, input=b"\xff\xfe\r\nok\r\n", capture_output=True, cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == b""
    assert "echo ok\n" in result.stdout.decode()
