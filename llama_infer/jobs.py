"""A file of prompts in, a file of predictions out.

    summary = run_file(Pipeline("demo"), "prompts.txt", "predictions.json", {"temperature": 0.2})

The predictions are saved again and again while the work goes on, each time as a whole new file put in the place of the
old one, so that a process killed at any instant leaves the old file or a valid new one. One writer works on a file at a
time; all results are kept in memory until the end.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import DataFileError
from .files import AnyPath, FileLock, count_prompts, is_checkpoint, read_prompts, write_atomically
from .types import Completion, Message, PromptLike, Request, Value, as_prompt

if TYPE_CHECKING:
    from .pipeline import Pipeline

__all__ = ["PredictionsWriter", "Summary", "as_row", "count_prompts", "read_prompts", "run_file"]

CONFIG_NAME = "generation_config.json"


class PredictionsWriter:
    """Writes completions to a file that is valid at every instant.

        with PredictionsWriter("predictions.json") as writer:
            for completion in pipe.run(requests):
                writer.add(completion)

    A name that ends in ``.jsonl`` gets one object a line, any other name one JSON list. What was added is saved by a
    thread of its own, at most once a second and in at most a twentieth of the time, and again when the block is left,
    whichever way. The file appears, or changes, when the first completion is saved. :meth:`describe` gives the contents
    of the generation_config.json beside it.

    Args:
        path: the file. Its folder is made; a symbolic link is followed; the permissions of an old file are kept.
        data_file: the file of prompts, which must not be overwritten.
        interval: least seconds between two saves.

    Raises :class:`DataFileError` on entering when the file cannot be written, when another writer works on it, or when
    its folder holds a checkpoint, whose generation_config.json would be lost; later when a save fails.
    """

    def __init__(
        self, path: AnyPath = "predictions.json", *, data_file: AnyPath | None = None, interval: float = 1.0
    ) -> None:
        self._given = os.fspath(path)
        self._data_file = data_file
        self._interval = interval
        self._rows: list[bytes] = []
        self._config: bytes | None = None
        self._fresh = threading.Event()
        self._closing = threading.Event()
        self._failure: DataFileError | None = None
        self._saver = threading.Thread(target=self._keep_saving, name="predictions", daemon=True)
        self.path = Path(self._given)

    @property
    def rows(self) -> int:
        """How many completions were added."""
        return len(self._rows)

    def describe(self, config: Mapping[str, Value]) -> None:
        """Sets what goes to generation_config.json, which is written with the first completions."""
        self._config = json.dumps(_jsonable(config), indent=2).encode() + b"\n"

    def add(self, completion: Completion) -> None:
        """Takes a completion; it is saved soon. Raises DataFileError when an earlier save failed."""
        if self._failure is not None:
            raise self._failure
        self._rows.append(_encode(as_row(completion), lines=self._as_lines))
        self._fresh.set()

    def save(self) -> None:
        """Puts everything added so far in the place of the old file."""
        rows = self._rows[:]
        if self._config is not None:
            self._write(self.path.with_name(CONFIG_NAME), [self._config])
            self._config = None
        if self._as_lines:
            self._write(self.path, (row + b"\n" for row in rows))
        else:
            self._write(self.path, _as_list(rows))

    def __enter__(self) -> PredictionsWriter:
        try:
            self.path = Path(os.path.realpath(self._given))
            self._check_target()
            self._lock = FileLock(self._beside("lock"))
            try:
                self._probe()
            except BaseException:
                self._lock.release()
                raise
        except DataFileError:
            raise
        except (OSError, ValueError) as error:
            raise DataFileError(f"predictions cannot be written to {self._given!r}: {error}") from error
        self._saver.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._closing.set()
            self._fresh.set()
            self._saver.join()
            if self._rows or error is None:  # nothing done: the old file stays
                self.save()
        except DataFileError:
            if error is None or error is not self._failure:  # else it is on its way already
                raise
        finally:
            self._lock.release()

    @property
    def _as_lines(self) -> bool:
        return self.path.suffix.lower() == ".jsonl"

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{suffix}")

    def _check_target(self) -> None:
        """Finds out before a model is loaded whether the files may be written."""
        config = self.path.with_name(CONFIG_NAME)
        if not self._given or self.path.is_dir():
            raise DataFileError(f"{self._given!r} is a folder, not a file: give a name such as 'predictions.json'")
        if self.path == config:
            raise DataFileError(f"{CONFIG_NAME} is where the parameters go: choose another name for the predictions")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if is_checkpoint(self.path.parent):
            raise DataFileError(
                f"{str(self.path.parent)!r} holds a checkpoint, whose {CONFIG_NAME} the parameters of this run would "
                "replace: choose another folder for the predictions"
            )
        for target in (self.path, config):
            if not target.exists():
                continue
            if self._data_file is not None and os.path.exists(self._data_file) and target.samefile(self._data_file):
                raise DataFileError(f"{str(target)!r} is the file of prompts: choose another name for the predictions")
            if not target.is_file() or not os.access(target, os.W_OK):
                raise DataFileError(f"{str(target)!r} cannot be overwritten: it is write-protected or no regular file")

    def _probe(self) -> None:
        temporary = self._beside("tmp")
        temporary.unlink(missing_ok=True)  # of a run that was killed
        open(temporary, "xb").close()
        temporary.unlink()

    def _write(self, path: Path, content: Iterable[bytes]) -> None:
        try:
            write_atomically(path, content, self._beside("tmp"))
        except OSError as error:
            raise DataFileError(f"{str(path)!r} cannot be written: {error}. What was saved before is intact") from error

    def _keep_saving(self) -> None:
        while True:
            self._fresh.wait()
            if self._closing.is_set():
                return
            self._fresh.clear()
            start = time.monotonic()
            try:
                self.save()
            except DataFileError as error:
                self._failure = error  # add() raises it
                return
            self._closing.wait(max(self._interval, 20 * (time.monotonic() - start)))


def as_row(completion: Completion) -> dict[str, Any]:
    """A completion as it stands in a file of predictions.

    "Input" (as it was given), "Output" (the answer only), "finish_reason", "seed" and "tokens" (how many were
    generated); "Error" where it failed, "Alternatives" when several samples were asked for, "logprobs" and
    "top_logprobs" when those were asked for.
    """
    row: dict[str, Any] = {"Input": _jsonable(completion.request.prompt), **_outcome(completion)}
    if completion.error is not None:
        row["Error"] = f"{type(completion.error).__name__}: {completion.error}"
    if completion.alternatives:
        row["Alternatives"] = [_outcome(alternative) for alternative in completion.alternatives]
    return row


def _outcome(completion: Completion) -> dict[str, Any]:
    outcome: dict[str, Any] = {
        "Output": completion.text,
        "finish_reason": completion.finish_reason,
        "seed": completion.seed,
        "tokens": len(completion.token_ids),
    }
    if completion.top_logprobs:
        outcome["logprobs"] = _jsonable(completion.logprobs)
        outcome["top_logprobs"] = [{t.token_id: _jsonable(t.logprob) for t in top} for top in completion.top_logprobs]
    return outcome


def _encode(row: Mapping[str, Any], lines: bool) -> bytes:
    def dump(ensure_ascii: bool) -> bytes:
        if lines:
            return json.dumps(row, ensure_ascii=ensure_ascii).encode()
        return json.dumps([row], ensure_ascii=ensure_ascii, indent=2)[2:-2].encode()  # indented as inside the list

    try:
        return dump(ensure_ascii=False)
    except UnicodeEncodeError:  # half a surrogate pair in a prompt: UTF-8 cannot say it, an escape can
        return dump(ensure_ascii=True)


def _as_list(rows: list[bytes]) -> Iterable[bytes]:
    yield b"[\n"
    for number, row in enumerate(rows):
        yield b",\n" if number else b""
        yield row
    yield b"\n]\n"


def _jsonable(value: Any) -> Any:
    """The value in JSON's terms; what JSON does not have (infinity, objects) as a string."""
    if isinstance(value, Message):
        return {"role": value.role, "content": value.content}
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


@dataclass(frozen=True)
class Summary:
    """What a job did.

    Attributes:
        prompts: how many were answered or failed.
        failed: how many of them failed.
        tokens: how many were generated.
        seconds: how long it took, without loading the model.
        predictions_file: where the results are.
    """

    prompts: int
    failed: int
    tokens: int
    seconds: float
    predictions_file: Path

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all prompts together."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def run_file(
    pipe: Pipeline,
    prompts: AnyPath | Iterable[PromptLike],
    predictions: AnyPath | PredictionsWriter = "predictions.json",
    params: Mapping[str, Value] | None = None,
    on_result: Callable[[Completion], None] | None = None,
) -> Summary:
    """Answers every prompt and writes the answers, in order, to a file.

    Args:
        pipe: the pipeline.
        prompts: the path of a text file with one prompt a line (see :func:`read_prompts`), or any iterable of prompts.
        predictions: the path of the file to write, or a :class:`PredictionsWriter` that is already entered.
        params: parameters of every prompt.
        on_result: called with each completion, in order, as soon as it is there.

    A prompt that fails gets an "Error" in its row and the others go on. The effective parameters are written to
    generation_config.json beside the predictions. On Ctrl-C and on any exception what is done is saved first.

    Raises :class:`DataFileError` for the files and :class:`ParameterError` for the parameters before any work is done.
    """
    params = dict(params or {})
    data_file = None
    if isinstance(prompts, (str, os.PathLike)):
        data_file = prompts
        count_prompts(data_file)  # a bad line is known before the first answer, not in the middle
        prompts = read_prompts(data_file)
    if isinstance(predictions, PredictionsWriter):
        return _run(pipe, prompts, predictions, params, on_result)
    with PredictionsWriter(predictions, data_file=data_file) as writer:
        return _run(pipe, prompts, writer, params, on_result)


def _run(
    pipe: Pipeline,
    prompts: Iterable[PromptLike],
    writer: PredictionsWriter,
    params: Mapping[str, Value],
    on_result: Callable[[Completion], None] | None,
) -> Summary:
    writer.describe(_effective(pipe, params))
    failed = tokens = 0
    start = time.monotonic()
    results = pipe.run(Request(prompt=as_prompt(prompt), params=params) for prompt in prompts)
    try:
        for completion in results:
            writer.add(completion)
            failed += completion.error is not None
            tokens += sum(len(c.token_ids) for c in (completion, *completion.alternatives))
            if on_result is not None:
                on_result(completion)
    finally:
        getattr(results, "close", lambda: None)()  # give up what is still being decoded
    return Summary(writer.rows, failed, tokens, time.monotonic() - start, writer.path)


def _effective(pipe: Pipeline, params: Mapping[str, Value]) -> dict[str, Value]:
    """Every parameter's value, and what else it takes to run this again."""
    loaded = pipe.loaded
    names = ("model", "tokenizer", "revision", "quantization")
    run = {name: getattr(loaded.source, name, None) for name in names}
    run |= {"dtype": str(loaded.model.dtype).removeprefix("torch."), "device": str(loaded.device)}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    run["versions"] = {"llama_infer": __version__, **versions}
    return {**{name: setting.value for name, setting in pipe.explain(**params).items()}, "run": run}
