"""A Llama of transformers' (config.json, model.safetensors, no tokenizer) as a GGUF file."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants

FORMATS = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(folder: Path, path: Path, format: str) -> None:
    """Every matrix in one format, the embedding (which is the head, when tied) included; the norms in float32."""
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config
    part = path.with_suffix(".part")
    out = GGUFWriter(part, "llama")
    out.add_name(folder.name)
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_key_length(width)
    out.add_value_length(width)
    out.add_rope_dimension_count(width)
    out.add_rope_freq_base(rope["rope_theta"])
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_vocab_size(config["vocab_size"])
    out.add_tokenizer_model("none")
    kind, file_type = FORMATS[format]
    out.add_file_type(file_type)
    for name, values in _tensors(folder / "model.safetensors"):
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # transformers rotates halves, llama.cpp neighbours
            count = heads if "q_proj" in name else kv_heads
            values = values.reshape(count, 2, width // 2, -1).swapaxes(1, 2).reshape(values.shape)
        chosen = kind if values.ndim == 2 else GGMLQuantizationType.F32
        out.add_tensor(_rename(name), quants.quantize(np.ascontiguousarray(values), chosen), raw_dtype=chosen)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    part.rename(path)


def _rename(name: str) -> str:
    name = name.removesuffix(".weight")
    if name.startswith("model.layers."):
        _, _, number, rest = name.split(".", 3)
        return f"blk.{number}.{NAMES[rest]}.weight"
    return f"{NAMES[name]}.weight"


def _tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and float32 values of a safetensors file, whose bfloat16 numpy does not know."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    raw = np.memmap(path, np.uint8, "r", 8 + size)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        data = raw[slice(*entry["data_offsets"])]
        if entry["dtype"] == "BF16":
            values = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = data.view({"F32": np.float32}[entry["dtype"]])
        yield name, values.reshape(entry["shape"])
