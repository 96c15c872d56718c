"""What README.md shows is run: its Python blocks in order, in one namespace, and its ``llama-infer`` commands."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from llama_infer import registry

README = Path(__file__).parent.parent / "README.md"
SKIP = re.compile(r"<!--\s*not run:\s*(?P<reason>\S.*?)\s*-->")
FILES = {"prompts.txt": "17+25=?\nSay hello\n"}
"""What the reader of README.md is taken to have in the folder where the commands are run."""
MOST_SKIPPED = 2
"""Blocks that may be left out: those that need a model from a hub, or another package."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line that its text begins at, why it is not run ("" if it is)."""

    language: str
    text: str
    line: int
    skipped: str


def blocks(markdown: str) -> Iterator[Block]:
    """Every fenced block. Raises when a fence is left open or a "not run" comment stands before no block."""
    fence, language, start, skipped = "", "", 0, ""
    lines: list[str] = []
    for number, line in enumerate(markdown.splitlines(), 1):
        mark = re.match(r"\s*(`{3,}|~{3,})\s*([\w+-]*)", line)
        if fence:
            if line.strip() == fence:
                yield Block(language, "\n".join(lines) + "\n", start, skipped)
                fence, skipped = "", ""
            else:
                lines.append(line)
        elif mark:
            fence, language, start, lines = mark[1], mark[2].lower(), number + 1, []
        elif comment := SKIP.search(line):
            skipped = comment["reason"]
        elif line.strip() and skipped:
            raise ValueError(f"line {number}: 'not run: {skipped}' stands before no block")
    if fence or skipped:
        raise ValueError("a fence is left open, or a 'not run' comment stands before no block")


def commands(block: Block) -> list[list[str]]:
    """The ``llama-infer`` commands of a shell block: continued lines joined, prompts, output and comments left out."""
    lines = block.text.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        shown = line.strip()
        prompted = shown.startswith("$ ")
        if block.language == "console" and not prompted:
            continue
        for part in shown.removeprefix("$ ").split("&&"):
            words = shlex.split(part, comments=True)
            if words and words[0] == "llama-infer":
                found.append(words)
    return found


def run_python(markdown: str, name: str) -> str:
    """Executes the Python blocks in one namespace; tracebacks name the file and its lines. Returns what they print."""
    module = types.ModuleType("__main__")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks(markdown):
            if block.language in ("python", "py") and not block.skipped:
                source = "\n" * (block.line - 1) + block.text
                exec(compile(source, name, "exec"), module.__dict__)
    return printed.getvalue()


def run_command(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A ``llama-infer`` command, in ``folder``, with nothing on standard input."""
    return subprocess.run(
        [sys.executable, "-m", "llama_infer", *words[1:]],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )


def _all_commands() -> list[list[str]]:
    shell = [b for b in blocks(README.read_text(encoding="utf-8")) if b.language in ("bash", "sh", "shell", "console")]
    return [words for block in shell if not block.skipped for words in commands(block)]


def test_python_blocks_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_registered", {})
    run_python(README.read_text(encoding="utf-8"), str(README))


@pytest.mark.parametrize("words", _all_commands(), ids=shlex.join)
def test_command_succeeds(words: list[str], tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    done = run_command(words, tmp_path)
    assert done.returncode == 0, done.stderr


def test_hardly_a_block_is_skipped() -> None:
    skipped = [block for block in blocks(README.read_text(encoding="utf-8")) if block.skipped]
    assert len(skipped) <= MOST_SKIPPED
    for block in skipped:
        assert block.language in ("python", "py", "bash", "sh", "shell", "console")


# What runs the README is itself held to what it promises.

SAMPLE = """
```python
value = 2
```
Prose.

<!-- not run: needs a model from a hub -->
```python
value = undefined
```
```console
$ llama-infer parts
kind  name
$ pip install something && llama-infer --version
```
~~~bash
llama-infer run --top_k 5 \\
    --seed 3   # a comment
ls
~~~
```python
print(value + 1)
```
"""


def test_blocks_share_a_namespace_and_skipped_ones_do_not_run() -> None:
    assert run_python(SAMPLE, "sample") == "3\n"


def test_commands_are_found() -> None:
    found = [words for block in blocks(SAMPLE) for words in commands(block) if block.language in ("bash", "console")]
    assert found == [
        ["llama-infer", "parts"],
        ["llama-infer", "--version"],
        ["llama-infer", "run", "--top_k", "5", "--seed", "3"],
    ]


def test_a_failing_block_fails() -> None:
    with pytest.raises(ZeroDivisionError):
        run_python("```python\n1 / 0\n```\n", "sample")


@pytest.mark.parametrize("markdown", ["```python\nopen", "<!-- not run: why -->\nprose\n", "<!-- not run: why -->\n"])
def test_broken_markdown_is_refused(markdown: str) -> None:
    with pytest.raises(ValueError):
        list(blocks(markdown))
