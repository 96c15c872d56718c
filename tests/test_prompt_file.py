"""Prompts out of a file, line by line: what a line is, and what is refused."""

from __future__ import annotations

import errno
import os
import threading
import tracemalloc
from pathlib import Path

import pytest
from disk import refuse
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_infer import files
from llama_infer.errors import DataFileError, MissingFileError
from llama_infer.jobs import count_prompts, read_prompts

PIECES = [
    "a",
    "é",
    "问",
    "🙂",
    "\n",
    "\r",
    "\r\n",
    "\n\n",
    " ",
    "\t",
    "\x00",
    "\x0b",
    "\x1c",
    "\x85",
    "\u2028",
    "\ufeff",
]


def by_definition(text: str) -> list[str]:
    """One character at a time: a line ends at \\n or \\r\\n and nothing else."""
    lines = [""]
    for character in text.removeprefix("\ufeff"):
        if character == "\n":
            lines[-1] = lines[-1][:-1] if lines[-1].endswith("\r") else lines[-1]
            lines.append("")
        else:
            lines[-1] += character
    return [line for line in lines if not (line == "" or line.isspace())]


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts") / "prompts.txt"


@settings(deadline=None)
@given(text=st.lists(st.sampled_from(PIECES)).map("".join))
def test_lines_are_as_defined(prompt_file: Path, text: str) -> None:
    prompt_file.write_bytes(text.encode())
    expected = by_definition(text)
    if not expected:
        for read in (count_prompts, lambda path: list(read_prompts(path))):
            with pytest.raises(DataFileError, match="holds no prompts"):
                read(prompt_file)
    else:
        assert list(read_prompts(prompt_file)) == expected
        assert count_prompts(prompt_file) == len(expected)


@settings(deadline=None)
@given(
    data=st.lists(st.sampled_from([b"a", b"\n", b"\xff", b"\xe9\x97\xae", b"\xed\xa0\x80", b"\xe9\x97"])).map(b"".join)
)
def test_what_is_not_utf8_is_found_where_it_is(prompt_file: Path, data: bytes) -> None:
    prompt_file.write_bytes(data)
    try:
        data.decode()
    except UnicodeDecodeError:
        with pytest.raises(DataFileError) as caught:
            count_prompts(prompt_file)
        before = data[: int(str(caught.value).split("byte ")[1].split()[0])]
        assert f"line {before.count(10) + 1}," in str(caught.value)
        before.decode()  # everything up to that byte is fine
        with pytest.raises(UnicodeDecodeError):
            data[len(before) : len(before) + 3].decode()


@pytest.mark.parametrize(("encoding", "advice"), [("gb18030", "iconv -f GB18030"), ("utf-16", "iconv -f UTF-16")])
def test_other_encodings_are_refused_with_advice(prompt_file: Path, encoding: str, advice: str) -> None:
    prompt_file.write_bytes("环境保护\n".encode(encoding))
    with pytest.raises(DataFileError, match=advice):
        list(read_prompts(prompt_file))


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_the_longest_line(prompt_file: Path, monkeypatch: pytest.MonkeyPatch, start: bytes, end: bytes) -> None:
    monkeypatch.setattr(files, "LONGEST_LINE", 10)
    prompt_file.write_bytes(start + b"a" * 10 + end)
    assert list(read_prompts(prompt_file)) == ["a" * 10]
    prompt_file.write_bytes(start + b"ok\n" + b"a" * 11 + end)
    with pytest.raises(DataFileError, match="line 2 is longer than 10 bytes"):
        list(read_prompts(prompt_file))


def test_a_line_without_end_takes_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "zeros"
    with open(path, "wb") as file:
        file.truncate(300_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(DataFileError, match="line 1 is longer than 10,000,000 bytes"):
            list(read_prompts(path))
        assert tracemalloc.get_traced_memory()[1] < 60_000_000
    finally:
        tracemalloc.stop()


def test_what_is_no_file_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for check in (read_prompts, count_prompts):
        with pytest.raises(MissingFileError, match="no file of prompts"):
            check(tmp_path / "absent")
        with pytest.raises(FileNotFoundError):
            check(tmp_path / "absent")
        with pytest.raises(DataFileError, match="is a folder"):
            check(tmp_path)
        with pytest.raises(DataFileError, match="cannot be opened"):
            check("a\0b")
    (tmp_path / "file").write_text("a\n")
    monkeypatch.setattr(files, "open", refuse(errno.EACCES), raising=False)
    with pytest.raises(DataFileError, match="Permission denied"):
        read_prompts(tmp_path / "file")


def test_a_disk_that_fails_while_reading(prompt_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt_file.write_text("a\n")
    prompts = read_prompts(prompt_file)
    monkeypatch.setattr(files, "open", refuse(errno.EIO), raising=False)
    with pytest.raises(DataFileError, match="cannot be read: .*Input/output"):
        next(prompts)


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert count_prompts(path) is None
    writer = threading.Thread(target=lambda: path.write_text("a\n\nb"))
    writer.start()
    assert list(read_prompts(path)) == ["a", "b"]
    writer.join()
