"""Weights that stay in their file: rows are read without its pages becoming this process's memory."""

from __future__ import annotations

import copy
import gc
import mmap
import os
import shutil
import struct
import sys

import pytest
import torch
import torch.nn.functional as F
from checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file

from llama_infer.errors import InsufficientMemoryError
from llama_infer.models import memory
from llama_infer.models.loaders import AutoLoader
from llama_infer.models.mapped import MappedEmbedding, _FileRows, is_mapped, mapped_bytes, release, rows_of
from llama_infer.models.native import tiled
from llama_infer.models.packed import refusal
from llama_infer.parts import Source
from llama_infer.testing import tiny_llama

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what is mapped")
HERE = refusal(torch.device("cpu"), torch.bfloat16)


def load(folder, quantization):
    return AutoLoader()(Source(str(folder), quantization=quantization, device="cpu")).model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_come_from_the_file_and_leave_no_pages(tmp_path, dtype):
    path = tmp_path / "with a space.safetensors"
    save_file({"a": torch.zeros(3, dtype=dtype), "b": torch.randn(700, 1024).to(dtype)}, path)
    held = load_file(path)["b"]
    ids = torch.tensor([699, 0, 5, 5, 350])
    expected = held[ids].clone()
    rows = rows_of(held)
    assert isinstance(rows, _FileRows) and isinstance(copy.deepcopy(rows), _FileRows)
    release(held)
    assert torch.equal(rows(ids), expected) and rows(ids[:0]).shape == (0, 1024)
    address, size = held.data_ptr(), held.numel() * held.element_size()
    with open("/proc/self/pagemap", "rb") as file:
        file.seek((address // mmap.PAGESIZE + 1) * 8)
        inside = file.read((size // mmap.PAGESIZE - 2) * 8)
    assert not any(entry >> 63 for entry in struct.unpack(f"{len(inside) // 8}Q", inside)), "pages are present"
    for bad in (-1, 700):
        with pytest.raises(IndexError, match="700 rows"):
            rows(torch.tensor([bad]))
    path.write_bytes(b"")  # as a sudden truncation would
    with pytest.raises(OSError, match="shorter"):
        rows(ids)


def test_rows_of_a_file_that_was_replaced_come_from_memory(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(4096.0).view(64, 64)}, path)
    held = load_file(path)["a"]
    other = held.clone()
    other[1:63] = 0  # a tuned model often has the first and the last rows of the one it was made of
    save_file({"a": other}, tmp_path / "y.safetensors")
    (tmp_path / "y.safetensors").replace(path)
    rows = rows_of(held)
    assert not isinstance(rows, _FileRows)
    assert torch.equal(rows(torch.tensor([62])), torch.arange(62 * 64.0, 63 * 64.0)[None])


def test_rows_of_a_file_that_is_replaced_at_that_moment_come_from_memory(tmp_path, monkeypatch):
    """Between the look at what is mapped and the opening of its path."""
    save_file({"a": torch.arange(4096.0).view(64, 64)}, tmp_path / "x.safetensors")
    shutil.copy(tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    held, opened = load_file(tmp_path / "x.safetensors")["a"], os.open
    monkeypatch.setattr(
        os, "open", lambda path, *rest: opened(str(path).replace("x.safetensors", "y.safetensors"), *rest)
    )
    assert not isinstance(rows_of(held), _FileRows)
    monkeypatch.undo()
    assert isinstance(rows_of(held), _FileRows)


@pytest.mark.skipif(HERE is not None, reason=f"packing {HERE}")
def test_a_tied_embedding_reads_the_file_and_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(tiled, "available", lambda: False)  # with tiles the head reads the file too, as it lies
    write_checkpoint(tmp_path, hidden_size=128, dtype="bfloat16", tie_word_embeddings=True)
    model = load(tmp_path, None)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, MappedEmbedding) and is_mapped(embedding.weight)
    ids = torch.tensor([[3, 0, 263], [7, 7, 1]])
    assert torch.equal(embedding(ids), F.embedding(ids, embedding.weight))
    assert torch.equal(embedding.weight, load(tmp_path, "none").lm_head.weight)


def test_mapped_weights_are_not_free_memory(tmp_path, monkeypatch):
    """The system would drop a file's pages for others; the model reads them in every step."""
    write_checkpoint(tmp_path, hidden_size=128, dtype="bfloat16", tie_word_embeddings=True)
    model = load(tmp_path, "none")
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert mapped_bytes(model) == size and mapped_bytes(tiny_llama()) == 0
    monkeypatch.setattr(memory, "free_memory", lambda device: size + 1000)
    with pytest.raises(InsufficientMemoryError, match="0.0 MB are free"):
        memory.plan_batch(model, 4, 4096)


def test_cycles_are_collected_again_after_loading(tmp_path):
    write_checkpoint(tmp_path, hidden_size=64)
    load(tmp_path, "none")
    assert gc.isenabled()
    gc.disable()
    try:
        load(tmp_path, "none")
        assert not gc.isenabled()
    finally:
        gc.enable()
