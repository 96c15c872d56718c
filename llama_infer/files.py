"""Reading a file of prompts, and replacing a file so that it is valid at every instant."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, TypeAlias

from .errors import DataFileError, MissingFileError, SavingError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # pragma: no cover  (Windows has none: go without a lock)
    fcntl = None

AnyPath: TypeAlias = "str | os.PathLike[str]"

LONGEST_LINE = 10_000_000
"""Bytes that a line of a prompt file may have."""

_BOM = b"\xef\xbb\xbf"


def read_prompts(path: AnyPath) -> Iterator[str]:
    """The prompts of a UTF-8 text file, one a line, read as they are asked for.

    A line ends at ``\\n`` or ``\\r\\n`` and at nothing else: U+2028, ``\\x0b`` and a lone ``\\r`` are part of the
    prompt, and so are NUL and spaces at either end. A byte order mark at the start is dropped; blank lines are skipped.

    Raises :class:`MissingFileError` or :class:`DataFileError` at once when the file is absent or cannot be opened, and
    :class:`DataFileError` on the way for a line that is not UTF-8 or is longer than :data:`LONGEST_LINE`, or at the end
    when there was no prompt at all.
    """
    _check_readable(path)
    return _read_prompts(path)


def count_prompts(path: AnyPath) -> int | None:
    """How many prompts a file has, after reading all of it once; None for a pipe, which can be read only once.

    Raises what :func:`read_prompts` raises, so that a bad line is known before a model is loaded.
    """
    _check_readable(path)
    if not os.path.isfile(path):
        return None
    return sum(1 for _ in _read_prompts(path))


def _check_readable(path: AnyPath) -> None:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):  # opening and closing a pipe would end it for whoever writes to it
            open(path, "rb").close()
    except FileNotFoundError as error:
        raise MissingFileError(f"no file of prompts at {os.fspath(path)!r}: give an existing text file") from error
    except (OSError, ValueError) as error:
        raise DataFileError(f"the file of prompts {os.fspath(path)!r} cannot be opened: {error}") from error
    if stat.S_ISDIR(mode):
        raise DataFileError(f"{os.fspath(path)!r} is a folder: give a text file with one prompt a line")


def _read_prompts(path: AnyPath) -> Iterator[str]:
    found = False
    try:
        with open(path, "rb") as file:
            for line in _lines(file, os.fspath(path)):
                if line.strip():
                    found = True
                    yield line
    except OSError as error:
        raise DataFileError(f"the file of prompts {os.fspath(path)!r} cannot be read: {error}") from error
    if not found:
        raise DataFileError(f"{os.fspath(path)!r} holds no prompts: it has only blank lines, or none")


def _lines(file: BinaryIO, name: str) -> Iterator[str]:
    offset = 0
    number = 0
    while raw := file.readline(LONGEST_LINE + 8):  # room for a byte order mark, a line end, and proof of too much
        number += 1
        line = raw.removesuffix(b"\n")
        if line != raw:
            line = line.removesuffix(b"\r")
        bom = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
        line = line[bom:]
        if len(line) > LONGEST_LINE:
            raise DataFileError(f"{name!r}, line {number} is longer than {LONGEST_LINE:,} bytes: split it or remove it")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            utf16 = number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff")
            raise DataFileError(
                f"{name!r} is not UTF-8: line {number}, byte {offset + bom + error.start} of the file. Convert it, for "
                f"example: iconv -f {'UTF-16' if utf16 else 'GB18030'} -t UTF-8 {name} > utf8.txt"
            ) from error
        yield text
        offset += len(raw)


def write_atomically(path: Path, content: Iterable[bytes], temporary: Path | None = None) -> None:
    """Replaces a file so that it holds the old content or all of the new one, whenever the process or machine dies.

    Args:
        path: the file, not a symbolic link. The permissions of an old file are kept.
        content: its new content, in pieces.
        temporary: where it is prepared, in the same folder; an old file of that name is discarded.

    Raises OSError; the file is then whole all the same, and nothing else is left behind.
    """
    temporary = temporary or path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:
            file.writelines(content)
            file.flush()
            if path.exists():
                os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
            os.fsync(file.fileno())  # before the rename: else a power cut may leave the new name on an empty file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which appears under its name when all of it is on the disk, or not at all.

    Raises :class:`SavingError` when there is something of that name already, and OSError when the disk fails.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise SavingError(f"{str(path)!r} exists already: name another folder, or remove it first")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in [entry for entry in temporary.rglob("*") if entry.is_file()]:
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        _sync_folder(temporary)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # pragma: no cover  (a folder cannot be opened there)
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot, and need not
            raise
    finally:
        os.close(descriptor)


class FileLock:
    """An advisory lock by means of a small file, which goes when the lock does; the system frees it if we die.

    Raises :class:`DataFileError` when another has it, OSError when the file cannot be made. Where the system or the
    file system knows no locks, there is none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = self._acquire()

    def _acquire(self) -> int | None:
        if fcntl is None:
            return None
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(descriptor)
                raise DataFileError(
                    f"another job is writing there (it holds {str(self._path)!r}): wait for it, or choose another file"
                ) from error
            except OSError:  # a file system without locks
                return descriptor
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(self._path)):
                    return descriptor
            os.close(descriptor)  # its owner removed it between our open and our lock: take the next one

    def release(self) -> None:
        """Frees the lock and removes its file."""
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)  # while it is ours: a newcomer then makes another
            os.close(self._descriptor)
            self._descriptor = None


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a model: a config.json with a "model_type"."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config
