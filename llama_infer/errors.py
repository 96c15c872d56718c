"""Every error that this library raises on purpose.

    LlamaInferError
    ├── ParameterError (ValueError)            a value out of range, of the wrong type, or in conflict with another
    │   └── UnknownParameterError              no part of the pipeline declares that name
    ├── PromptError (ValueError)               not a prompt: empty, of the wrong type, an unknown role, ids out of range
    │   └── PromptTooLongError                 more tokens than the model's context holds
    ├── UnsupportedError (ValueError)          a combination that cannot be honoured, refused up front
    ├── PartError (TypeError)                  a part broke its contract: wrong shape, dtype, device or token id
    │   └── UnknownPartError (+ ValueError)    no part of that kind has that name
    ├── LoadingError (OSError)                 a checkpoint that cannot be loaded
    │   └── UnsafeCheckpointError              a checkpoint that would have to run code
    ├── DataFileError (ValueError)             a file of prompts or predictions that cannot be read or written
    │   └── MissingFileError (FileNotFoundError)
    ├── SavingError (OSError)                  a converted checkpoint that cannot be written
    ├── MissingDependencyError (ImportError)   an optional package is needed: the message holds the pip line
    └── GenerationError (RuntimeError)         a request failed while it was decoded
        ├── NonFiniteLogitsError               NaN or +inf among the logits
        ├── EmptySupportError                  no token is left to choose from
        └── InsufficientMemoryError            too little memory, even for one request alone

A message says what was given, what is known, and what to do.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable


class LlamaInferError(Exception):
    """The root of all errors of this library."""


class ParameterError(LlamaInferError, ValueError):
    """A parameter's value is out of range, of the wrong type, or in conflict with another."""


class UnknownParameterError(ParameterError):
    """No part of the pipeline declares a parameter of that name."""


class PromptError(LlamaInferError, ValueError):
    """Something that cannot be a prompt was given as one."""


class PromptTooLongError(PromptError):
    """A prompt has more tokens than the model's context holds."""


class UnsupportedError(LlamaInferError, ValueError):
    """A combination that cannot be honoured; refused before any work is done."""


class PartError(LlamaInferError, TypeError):
    """A part broke its contract."""


class UnknownPartError(PartError, ValueError):
    """No part of that kind is known by that name."""


class LoadingError(LlamaInferError, OSError):
    """A checkpoint or tokenizer cannot be loaded."""


class UnsafeCheckpointError(LoadingError):
    """A checkpoint would have to execute code to be loaded (pickles, remote code)."""


class DataFileError(LlamaInferError, ValueError):
    """A file of prompts or predictions cannot be read or written."""


class MissingFileError(DataFileError, FileNotFoundError):
    """A file that was named does not exist."""


class SavingError(LlamaInferError, OSError):
    """A converted checkpoint cannot be written."""


class MissingDependencyError(LlamaInferError, ImportError):
    """An optional package is needed and absent."""


class GenerationError(LlamaInferError, RuntimeError):
    """A request failed while it was being decoded."""


class NonFiniteLogitsError(GenerationError):
    """NaN or +inf among the logits of a row."""


class EmptySupportError(GenerationError):
    """Every token of a row was excluded: nothing is left to choose from."""


class InsufficientMemoryError(GenerationError):
    """There is too little memory, even for one request alone."""


def suggest(given: str, known: Iterable[str]) -> str:
    """How a sentence ends: ``"; did you mean 'top_p'?"`` when a known name is close to the given one, else ``"."``."""
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else "."


def release(error: BaseException | None) -> None:
    """Empties the frames that an exception and its causes passed through, which else keep what was half loaded alive
    for as long as somebody holds the exception (a notebook, a debugger, a test)."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)  # those that still run are left as they are
        error = error.__cause__ or error.__context__
