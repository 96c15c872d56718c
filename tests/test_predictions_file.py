"""Predictions into a file, and nothing lost or broken whatever happens on the way."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disk import load, refuse

from llama_infer import files
from llama_infer.errors import DataFileError, GenerationError
from llama_infer.jobs import CONFIG_NAME, PredictionsWriter, as_row
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
