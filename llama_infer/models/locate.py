"""Where a checkpoint is: the built-in demo, a folder here, or a repository of the model hub."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from ..errors import LoadingError, UnsupportedError
from .checks import CONFIG
from .weights import first_line

logger = logging.getLogger("llama_infer")

DEMO = Path(__file__).resolve().parent.parent / "demo"
"""The folder that ``model="demo"`` stands for."""

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.txt")


def locate(
    model: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    local_files_only: bool = False,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """The folder of a checkpoint: "demo", a path, or a hub id, which is downloaded into the hub's cache.

    A GGUF file stands for itself, and so does a folder that has one and no config.json.

    Args:
        model: what was asked for.
        revision: of a hub repository.
        trust_remote_code: whether Python files are fetched too.
        local_files_only: take what is in the hub's cache, and ask nobody for more.
        check: looks at the folder before gigabytes are fetched, and raises for what may not be loaded; without it
            weights are not fetched at all (for a tokenizer).

    Raises LoadingError, in one line, for what is not there.
    """
    if model == "demo":
        return DEMO
    path = os.path.expanduser(model)
    if os.path.isdir(path):  # unlike Path.is_dir it says no to names that no file can have
        if revision is not None:
            raise UnsupportedError(f"revision={revision!r} belongs to a hub id, and {model!r} is a folder")
        return _only_gguf(Path(path)) or Path(path)
    if os.path.isfile(path):
        if path.endswith(".gguf"):
            return Path(path)
        raise LoadingError(f"{model!r} is a file: give the folder of a transformers checkpoint that holds it")
    if not _HUB_ID.match(model):
        raise LoadingError(f"there is no folder {model!r}, and it is no hub id either ('org/name')")
    texts = [*_TEXT_FILES, "*.py"] if trust_remote_code else [*_TEXT_FILES]
    folder = _download(model, revision, texts, local_files_only)
    if check is None:
        return folder
    check(folder)
    return _download(model, revision, [*texts, "*.safetensors"], local_files_only)


def _only_gguf(folder: Path) -> Path | None:
    found = sorted(folder.glob("*.gguf"))
    return found[0] if len(found) == 1 and not (folder / CONFIG).is_file() else None


def _download(model: str, revision: str | None, patterns: list[str], local: bool) -> Path:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                model,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*", "consolidated*"],
                local_files_only=local,
            )
        )
    except Exception as error:  # whatever the hub or the network may answer
        logger.debug("the hub's answer for %r:", model, exc_info=True)
        reason = _reason(model, revision, error)
    raise LoadingError(reason)  # here, where nothing is being handled: the hub's own traceback has a hundred lines


def _reason(model: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        at = f" at revision {revision!r}" if revision else ""
        return (
            f"{model!r}{at} is no folder here, is not in the hub's cache, and the hub cannot be reached: check the "
            "name, go online once, or copy the checkpoint here and give its folder"
        )
    if isinstance(error, errors.GatedRepoError):
        return f"{model!r} is gated: accept its terms on the hub, then `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{model!r} is no folder here, nor known to the hub: check the name; if it is private, `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{model!r} has no revision {revision!r} on the hub: check the name of the branch"
    return f"{model!r} is no folder here, and the hub does not give it: {first_line(error)}"
