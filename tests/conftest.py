"""One tiny model for most tests, and a second copy of it that nobody touches: the oracle."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from llama_infer.testing import byte_tokenizer, tiny_llama

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported: tiny tensors gain nothing by threads


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Single bytes and Llama-3's control tokens."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def reference() -> Any:
    """The tiny Llama as transformers made it."""
    return tiny_llama()


@pytest.fixture(scope="session")
def pipe(tokenizer: Any) -> Any:
    """The tiny Llama in a pipeline; sampling by default, plain text as it is."""
    from llama_infer import Pipeline

    return Pipeline(tiny_llama(), tokenizer=tokenizer, formatter="plain", params={"max_new_tokens": 12})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that nobody changes."""
    from checkpoints import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "whole")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "model"))
