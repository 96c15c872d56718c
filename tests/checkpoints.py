"""Tiny random checkpoints on disk, and ways to damage them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch

from llama_infer.models.loaders import AutoLoader
from llama_infer.parts import LoadedModel, Source
from llama_infer.testing import byte_tokenizer, tiny_llama

GENERATION = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "bos_token_id": 256, "eos_token_id": [257, 260]}


IDS = torch.tensor([[256, 72, 101, 108, 108, 111]])


def load(model: Path | str, **options: Any) -> LoadedModel:
    """What the loader makes of it."""
    return AutoLoader()(Source(str(model), **options))


def write_checkpoint(folder: Path, *, tokenizer: bool = True, max_shard_size: str = "1GB", **tiny: Any) -> Path:
    """Save a ``tiny_llama`` (whose keywords are taken) as a user would have it: weights, configs, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_llama(**tiny).save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON object; None removes a field."""
    found = json.loads(path.read_text()) if path.exists() else {}
    found.update(changes)
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


def edit_header(path: Path, change: Any) -> None:
    """Rewrite the header of a safetensors file after ``change(header)``; the data stay where they are."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + size :])
