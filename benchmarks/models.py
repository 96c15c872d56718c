"""Llamas with random weights: speed does not depend on what the weights say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "vocab_size": 512,
    },
    "100m": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
        "vocab_size": 32000,
    },
    "1b": {  # Llama-3.2-1B
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
    },
    "8b": {  # Llama-3.1-8B, but for its tied head; for a GPU
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    },
}
CONTEXT = 4096
WIDTHS = {"bfloat16": 2, "float32": 4}


def checkpoint(shape: str, dtype: str, cache: Path, seed: int = 0) -> Path:
    """A folder with a model of a named shape, tied embeddings, no end token and no tokenizer; made when it is not
    there. Equal arguments give equal weights."""
    folder = cache / "models" / f"{shape}-{dtype}-{seed}"
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        architectures=["LlamaForCausalLM"],
    )
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(part, max_shard_size="100GB")
    part.rename(folder)
    return folder


def layer_parameters(shape: str) -> int:
    """Weights of all layers' matrices: what every token is multiplied with."""
    s = SHAPES[shape]
    hidden, width = s["hidden_size"], s["hidden_size"] // s["num_attention_heads"]
    attention = 2 * hidden * hidden + 2 * hidden * s["num_key_value_heads"] * width
    return int(s["num_hidden_layers"] * (attention + 3 * hidden * s["intermediate_size"]))


def head_parameters(shape: str) -> int:
    """Weights of the head, which only tokens that are followed by a new one meet."""
    return int(SHAPES[shape]["hidden_size"] * SHAPES[shape]["vocab_size"])


def weight_bytes(shape: str, dtype: str) -> int:
    """Bytes of weights that one step of decoding reads."""
    return (layer_parameters(shape) + head_parameters(shape)) * WIDTHS[dtype]


def kv_bytes(shape: str, dtype: str) -> int:
    """Bytes of keys and values that one token leaves."""
    s = SHAPES[shape]
    width = s["hidden_size"] // s["num_attention_heads"]
    return int(2 * s["num_hidden_layers"] * s["num_key_value_heads"] * width * WIDTHS[dtype])
