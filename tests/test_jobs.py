"""A file of prompts in, predictions out, and nothing lost or broken whatever happens on the way."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_pipeline import FakePipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_infer import files
from llama_infer.errors import DataFileError, GenerationError, MissingFileError, ParameterError
from llama_infer.jobs import CONFIG_NAME, PredictionsWriter, Summary, as_row, count_prompts, read_prompts, run_file
from llama_infer.types import Completion, Message, Request, TokenLogprob

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}


def done(number: int, **changes: Any) -> Completion:
    return Completion(
        Request(f"问题 {number}"), **{"text": f"答案 {number}", "token_ids": (1, 2), "seed": 3, **changes}
    )


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# --- reading ----------------------------------------------------------------------------------------------------------

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


def refuse(code: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


# --- writing ----------------------------------------------------------------------------------------------------------


def load(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


@pytest.mark.parametrize("name", ["p.json", "p.jsonl", "P.JSONL", "no suffix"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_two_formats(tmp_path: Path, name: str, count: int) -> None:
    path = tmp_path / name
    with PredictionsWriter(path) as writer:
        for number in range(count):
            writer.add(done(number))
    rows = [
        {"Input": f"问题 {number}", "Output": f"答案 {number}", "finish_reason": "stop", "seed": 3, "tokens": 2}
        for number in range(count)
    ]
    text = path.read_text(encoding="utf-8")
    if name.lower().endswith(".jsonl"):
        assert [json.loads(line) for line in text.splitlines()] == rows
    else:
        assert json.loads(text) == rows
    assert os.listdir(tmp_path) == [name]
    assert ("问题" in text) == (count > 0)


def test_the_list_is_laid_out_as_json_does_it(tmp_path: Path) -> None:
    with PredictionsWriter(tmp_path / "p.json") as writer:
        writer.add(done(0, text='two\nlines, "quoted" \u2028'))
        writer.add(done(1))
    text = (tmp_path / "p.json").read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), ensure_ascii=False, indent=2) + "\n"


def test_rows_tell_everything_that_was_asked_for() -> None:
    failed = as_row(done(0, text="", finish_reason="error", error=GenerationError("no"), token_ids=()))
    assert failed["Error"] == "GenerationError: no" and failed["Output"] == "" and failed["tokens"] == 0
    several = as_row(done(0, alternatives=(done(0, text="another"),)))
    assert several["Alternatives"] == [{"Output": "another", "finish_reason": "stop", "seed": 3, "tokens": 2}]
    likely = ((TokenLogprob(1, -0.5),), (TokenLogprob(2, -float("inf")),))
    asked = as_row(done(0, logprobs=(-0.5, -1.0), top_logprobs=likely))
    assert asked["logprobs"] == [-0.5, -1.0] and asked["top_logprobs"] == [{1: -0.5}, {2: "-inf"}]
    assert as_row(Completion(Request([Message("user", "hi")])))["Input"] == [{"role": "user", "content": "hi"}]
    assert as_row(Completion(Request([1, 2])))["Input"] == [1, 2]


@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
def test_half_a_character_still_makes_valid_json(tmp_path: Path, name: str) -> None:
    with PredictionsWriter(tmp_path / name) as writer:
        writer.add(Completion(Request("\ud800 问"), text="ok"))
    assert load(tmp_path / name)[0]["Input"] == "\ud800 问"


def test_a_bare_name_and_a_folder_to_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x.json", "new/deep/x.json"):
        with PredictionsWriter(name) as writer:
            writer.add(done(0))
        assert len(load(tmp_path / name)) == 1


def test_permissions_and_links_are_those_of_an_ordinary_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to("real/p.json")
    old = os.umask(0o027)
    try:
        with PredictionsWriter(link):
            pass
        assert (tmp_path / "real/p.json").stat().st_mode & 0o777 == 0o640
        (tmp_path / "real/p.json").chmod(0o600)
        with PredictionsWriter(link) as writer:
            writer.add(done(0))
    finally:
        os.umask(old)
    assert link.is_symlink() and len(load(link)) == 1
    assert (tmp_path / "real/p.json").stat().st_mode & 0o777 == 0o600


def enter(path: Path | str, **options: Any) -> None:
    with PredictionsWriter(path, **options):
        pass


def test_what_cannot_be_written_is_refused_on_entering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("a\n")
    for path, message in [
        (tmp_path, "is a folder"),
        ("", "is a folder"),
        (tmp_path / CONFIG_NAME, "choose another name"),
        (tmp_path / "file" / "p.json", "cannot be written"),
        (tmp_path / ("a" * 300), "cannot be written"),
        ("a\0b", "cannot be written"),
        ("/dev/null", "no regular file"),
    ]:
        with pytest.raises(DataFileError, match=message):
            enter(path)
    with pytest.raises(DataFileError, match="is the file of prompts"):
        enter(tmp_path / "file", data_file=tmp_path / "file")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(DataFileError, match="write-protected"):
        enter(tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("where", ["open", "lock"])
def test_a_folder_that_takes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    if where == "open":
        monkeypatch.setattr("llama_infer.jobs.open", refuse(errno.EROFS), raising=False)
    else:
        monkeypatch.setattr(os, "open", refuse(errno.EROFS))
    with pytest.raises(DataFileError, match="Read-only file system"):
        enter(tmp_path / "p.json")
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_keeps_its_generation_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DataFileError, match="holds a checkpoint.*choose another folder"):
        enter(tmp_path / "p.json")
    for harmless in ('{"mine": 1}', "[]", "no json"):
        (tmp_path / "config.json").write_text(harmless)
        enter(tmp_path / "p.json")


def test_two_jobs_on_one_file(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    (tmp_path / "link.json").symlink_to(path)
    with PredictionsWriter(path):
        for name in ("p.json", "link.json"):
            with pytest.raises(DataFileError, match="another job"):
                enter(tmp_path / name)
        enter(tmp_path / "q.json")  # another file in the same folder is nobody's business
    enter(path)
    assert sorted(os.listdir(tmp_path)) == ["link.json", "p.json", "q.json"]


def test_the_lock_dies_with_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    code = f"""
import sys, time
from llama_infer.jobs import PredictionsWriter
with PredictionsWriter({str(path)!r}):
    print("locked", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None and job.stdout.readline() == "locked\n"
        with pytest.raises(DataFileError, match="another job"):
            enter(path)
        job.kill()
    (tmp_path / ".p.json.tmp").write_text("half of somethi")
    enter(path)
    assert os.listdir(tmp_path) == ["p.json"]


def test_a_lock_that_vanishes_under_us_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    lock, calls = fcntl.flock, []

    def race(descriptor: int, how: int) -> None:
        if not calls:
            (tmp_path / ".p.json.lock").unlink()  # its owner left between our open and our lock
        calls.append(how)
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", race)
    with PredictionsWriter(tmp_path / "p.json"):
        assert len(calls) == 2 and (tmp_path / ".p.json.lock").exists()


def test_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", refuse(errno.ENOLCK))
    enter(tmp_path / "p.json")
    monkeypatch.setattr(files, "fcntl", None)
    enter(tmp_path / "p.json")
    assert os.listdir(tmp_path) == ["p.json"]


def test_results_are_saved_while_the_work_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text("old")
    with PredictionsWriter(path, interval=0) as writer:
        assert path.read_text() == "old"
        for number in range(3):
            writer.add(done(number))
            wait_for(lambda: path.read_text() != "old" and len(load(path)) == writer.rows)


def test_saving_is_throttled(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    with PredictionsWriter(path, interval=3600) as writer:
        writer.add(done(0))
        wait_for(path.exists)
        for number in range(1, 100):
            writer.add(done(number))
        assert len(load(path)) == 1
    assert len(load(path)) == 100


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_what_is_done_survives_an_exception(tmp_path: Path, kind: type[BaseException]) -> None:
    path = tmp_path / "p.json"
    path.write_text("old")
    with pytest.raises(kind), PredictionsWriter(path):
        raise kind
    assert path.read_text() == "old"
    with pytest.raises(kind), PredictionsWriter(path, interval=3600) as writer:
        writer.add(done(0))
        writer.add(done(1))
        raise kind
    assert len(load(path)) == 2
    assert os.listdir(tmp_path) == ["p.json"]


# --- faults -----------------------------------------------------------------------------------------------------------


class Faults:
    """Fails the n-th operation on the disk, whichever it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int, code: int) -> None:
        self.left, self.code = fail_at, code
        for name in ("fsync", "replace", "chmod"):
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))
        monkeypatch.setattr(files, "open", self.open, raising=False)

    def tick(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(self.code, os.strerror(self.code))

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.tick()
            return function(*args, **options)

        return call

    def open(self, path: Path, mode: str) -> Any:
        self.tick()
        faults = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                faults.tick()
                return super().write(bytes(data)[:30]) or 0  # and short writes all the way

        return io.BufferedWriter(Raw(str(path), mode.replace("b", "")), 64)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
def test_the_nth_operation_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, name: str) -> None:
    path, config = tmp_path / name, tmp_path / CONFIG_NAME
    for fail_at in range(1, 500):
        path.write_text("old")
        config.write_text("old")
        with monkeypatch.context() as patched, PredictionsWriter(path, interval=3600) as writer:
            writer._rows = [b'{"row": 1}', b'{"row": 2}']
            writer.describe({"temperature": 0.5})
            faults = Faults(patched, fail_at, code)
            try:
                writer.save()
            except DataFileError as error:
                assert os.strerror(code) in str(error)
            survived, faults.left = faults.left > 0, 0
            assert sorted(os.listdir(tmp_path)) == sorted([name, CONFIG_NAME, f".{name}.lock"])
            assert path.read_text() == "old" or load(path) == [{"row": 1}, {"row": 2}]
            assert config.read_text() == "old" or json.loads(config.read_text()) == {"temperature": 0.5}
        assert load(path) == [{"row": 1}, {"row": 2}]  # the fault went away: the last save made up for it
        if survived:
            break
    assert 10 < fail_at < 500


def test_a_folder_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code in (errno.EINVAL, errno.ENOTSUP):  # some file systems do not know how
        with monkeypatch.context() as patched:
            fsync = os.fsync
            patched.setattr(
                os, "fsync", lambda d, c=code, f=fsync: refuse(c)() if os.path.isdir(f"/dev/fd/{d}") else f(d)
            )
            files.write_atomically(tmp_path / "f", [b"new"])
    assert os.listdir(tmp_path) == ["f"]


def test_the_disk_has_the_content_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = tmp_path / "f", []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        content = os.pread(descriptor, 99, 0).decode() if os.path.isfile(f"/dev/fd/{descriptor}") else "folder"
        calls.append(content)
        fsync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(files, "open", lambda name, mode: open(name, mode.replace("x", "x+")), raising=False)
    (tmp_path / f".f.{os.getpid()}.tmp").write_text("of a process with our number that was killed")
    files.write_atomically(path, [b"a", b"b"])
    assert calls == ["ab", "replace", "folder"] and os.listdir(tmp_path) == ["f"]


def test_a_save_that_fails_stops_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.json"
    path.write_text("old")
    with pytest.raises(DataFileError, match="No space left"):  # noqa: SIM117
        with PredictionsWriter(path, interval=0) as writer:
            monkeypatch.setattr(os, "replace", refuse(errno.ENOSPC))
            writer.add(done(0))
            wait_for(lambda: writer._failure is not None)
            writer.add(done(1))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["p.json"]


def test_a_last_save_that_fails_is_not_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataFileError, match="No space left") as caught:  # noqa: SIM117
        with PredictionsWriter(tmp_path / "p.json") as writer:
            monkeypatch.setattr(os, "replace", refuse(errno.ENOSPC))
            writer._rows.append(b"{}")
            raise KeyboardInterrupt
    assert isinstance(caught.value.__cause__, OSError)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
def test_killed_at_every_line(tmp_path: Path, name: str) -> None:
    command = [sys.executable, str(HERE / "crash_writer.py"), str(tmp_path), name]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 100


# --- the job ----------------------------------------------------------------------------------------------------------


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
