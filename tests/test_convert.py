"""Meta's layout, written as transformers' own: the oracle is the model that was taken apart."""

from __future__ import annotations

import base64
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_json, write_checkpoint

from llama_infer import Pipeline
from llama_infer.cli import main
from llama_infer.errors import LoadingError, SavingError, UnsafeCheckpointError, UnsupportedError
from llama_infer.models import convert as converting
from llama_infer.models.convert import convert
from llama_infer.testing import tiny_llama

IDS = torch.tensor([[256, 72, 101, 108, 108, 111, 3, 9]])
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
NAMES = {
    "self_attn.q_proj": ("attention.wq", 0), "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0), "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0), "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0), "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None), "embed_tokens": ("tok_embeddings", 1), "norm": ("norm", None),
    "lm_head": ("output", 0),
}  # fmt: skip


def interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Meta's order, row by row: channel 2i of a head is transformers' channel i, and 2i + 1 is i + head_dim / 2."""
    rows = []
    for head in range(weight.shape[0] // head_dim):
        for channel in range(head_dim):
            rows.append(weight[head * head_dim + channel // 2 + channel % 2 * head_dim // 2])
    return torch.stack(rows)


def write_meta(folder: Path, model: Any, shards: int = 1, embedding_axis: int = 1, **params: Any) -> Path:
    """A Llama in Meta's layout, split over model-parallel ranks as Meta's own code did."""
    config = model.config
    pieces: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for name, tensor in model.state_dict().items():
        parts = name.removeprefix("model.").removesuffix(".weight").split(".")
        layer, rest = (f"layers.{parts[1]}.", ".".join(parts[2:])) if parts[0] == "layers" else ("", ".".join(parts))
        meta, axis = NAMES[rest]
        axis = embedding_axis if meta == "tok_embeddings" else axis
        if meta in ("attention.wq", "attention.wk"):
            tensor = interleaved(tensor, config.head_dim)
        split = [tensor] * shards if axis is None else tensor.chunk(shards, axis)
        for piece, part in zip(pieces, split, strict=True):
            piece[f"{layer}{meta}.weight"] = part.clone()
    folder.mkdir(parents=True)
    for rank, piece in enumerate(pieces):
        torch.save({**piece, "rope.freqs": torch.ones(4)}, folder / f"consolidated.{rank:02}.pth")
    known = {"dim": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads}
    known |= {"n_kv_heads": config.num_key_value_heads, "norm_eps": config.rms_norm_eps, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps({**known, "multiple_of": 256, **params}))
    return folder


def logits(folder: Path, **options: Any) -> torch.Tensor:
    return Pipeline(str(folder), dtype="float32", quantization="none", **options).loaded.model(IDS).logits


@pytest.mark.parametrize(
    ("tiny", "params", "layout"),
    [
        ({}, {}, {}),
        ({}, {}, {"shards": 2}),
        ({"num_kv_heads": 4}, {}, {"shards": 2, "embedding_axis": 0}),
        ({"rope_parameters": LLAMA3}, {"rope_theta": 5e5, "use_scaled_rope": True}, {"shards": 2, "embedding_axis": 0}),
        ({"tie_word_embeddings": True}, {}, {}),
    ],
)
def test_metas_layout_there_and_back(tmp_path, tiny, params, layout):
    model = tiny_llama(**tiny)
    notes = convert(write_meta(tmp_path / "meta", model, **layout, **params), tmp_path / "new" / "model")
    assert len(notes) == 1 and "no tokenizer" in notes[0]
    assert torch.equal(logits(tmp_path / "new" / "model"), model(IDS).logits)
    config = json.loads((tmp_path / "new" / "model" / "config.json").read_text())
    assert config["tie_word_embeddings"] is model.config.tie_word_embeddings
    assert config["max_position_embeddings"] == (131072 if params else 4096)
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["model"], "nothing else is left there"


def test_dtype_context_length_and_files_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(converting, "SHARD_BYTES", 20_000)
    source = write_meta(tmp_path / "meta", tiny_llama())
    convert(source, tmp_path / "model", dtype="bf16", context_length=777)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 25_000 for file in files)
    pipe = Pipeline(str(tmp_path / "model"), dtype="auto", quantization="none")
    assert pipe.loaded.context_length == 777 and pipe.loaded.model.dtype == torch.bfloat16
    expected = tiny_llama(dtype="bfloat16").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pipe.loaded.model.state_dict().items())


def write_tiktoken(folder: Path) -> None:
    tokens = [bytes([byte]) for byte in range(256)] + [b"he", b"ll", b"hell", b"hello", b" hello"]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("newer", "control"), [(False, "<|reserved_special_token_2|>"), (True, "<|finetune_right_pad_id|>")]
)
def test_the_tokenizer_of_llama_3(tmp_path, newer, control):
    model = tiny_llama(vocab_size=261 + 256, rope_parameters=LLAMA3)
    source = write_meta(tmp_path / "meta", model, rope_theta=5e5, use_scaled_rope=newer)
    write_tiktoken(source)
    assert convert(source, tmp_path / "model") == ()
    tokenizer = Pipeline(str(tmp_path / "model"), dtype="float32").loaded.tokenizer
    assert tokenizer("hello hello, 你").input_ids == [261, 259, 260, ord(","), 32, *"你".encode()]
    assert tokenizer.decode([259, 260, *"你".encode()]) == "hello hello你"
    assert tokenizer.convert_ids_to_tokens([261, 262, 265, 267, 268, 270, 516]) == [
        "<|begin_of_text|>", "<|end_of_text|>", control, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
        f"<|reserved_special_token_{247 if newer else 250}|>",
    ]  # fmt: skip
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (261, 262)


def test_a_sentencepiece_tokenizer_is_copied(tmp_path):
    source = write_meta(tmp_path / "meta", tiny_llama())
    (source / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15")
    (note,) = convert(source, tmp_path / "model")
    assert "sentencepiece" in note
    assert (tmp_path / "model" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()


class Bomb:
    """A pickle that calls something as it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (Path.touch, (self.canary,))


def test_a_pickle_of_more_than_tensors_is_refused_and_not_executed(tmp_path):
    source, canary = write_meta(tmp_path / "meta", tiny_llama()), tmp_path / "executed"
    state = torch.load(source / "consolidated.00.pth")
    for content in ({**state, "x": Bomb(canary)}, {**state, "x": 3}, [1], {}):
        torch.save(content, source / "consolidated.00.pth")
        with pytest.raises(UnsafeCheckpointError, match="consolidated.00.pth.*refused"):
            convert(source, tmp_path / "model")
    torch.save(Bomb(canary), source / "consolidated.00.pth")
    with pytest.raises(UnsafeCheckpointError):
        convert(source, tmp_path / "model")
    (source / "consolidated.00.pth").write_bytes(pickle.dumps(Bomb(canary)))  # no zip archive
    with pytest.raises(LoadingError, match="damaged"):
        convert(source, tmp_path / "model")
    assert not canary.exists() and not (tmp_path / "model").exists()
    pickle.loads(pickle.dumps(Bomb(canary)))
    assert canary.exists(), "the canary must be able to sing"


def test_damaged_and_foreign_sources(tmp_path):
    source = write_meta(tmp_path / "meta", tiny_llama(), shards=2)
    shard = source / "consolidated.01.pth"
    whole = shard.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(LoadingError, match=match):
            convert(source, tmp_path / "model")
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["meta"]

    shard.write_bytes(whole[:-300])
    refused("consolidated.01.pth is damaged")
    shard.unlink()
    refused("a shard is missing")
    state = torch.load(source / "consolidated.00.pth")
    torch.save({**state, "vision_model.x.weight": torch.ones(2)}, shard)
    refused("consolidated.01.pth does not belong")
    shard.write_bytes(whole)
    edit_json(source / "params.json", n_layers=3)
    refused("lacks 'model.layers.2")
    edit_json(source / "params.json", n_layers="two")
    refused("n_layers='two'")
    shard.unlink()
    edit_json(source / "params.json", n_layers=2)
    torch.save({**state, "vision_model.x.weight": torch.ones(2)}, source / "consolidated.00.pth")
    refused("vision_model.x.weight")


def test_loading_metas_layout_says_what_to_do(tmp_path):
    source = write_meta(tmp_path / "meta", tiny_llama())
    with pytest.raises(LoadingError, match=f"llama-infer convert {source}"):
        Pipeline(str(source))


def test_what_exists_is_left_alone(tmp_path):
    source = write_meta(tmp_path / "meta", tiny_llama())
    old = tmp_path / "old"
    old.mkdir()
    convert(source, old)  # an empty folder is as good as none
    before = {entry.name: entry.read_bytes() for entry in old.iterdir()}
    with pytest.raises(SavingError, match="exists already"):
        convert(source, old)
    assert {entry.name: entry.read_bytes() for entry in old.iterdir()} == before
    with pytest.raises(UnsupportedError, match="afterwards"):
        convert(source, tmp_path / "model", adapter="x")


FULL = """
import os, resource, sys
from llama_infer.errors import SavingError
from llama_infer.models.convert import convert
for source in sys.argv[1:]:
    for room in (0, 400, 60_000):  # for no file at all, for no config, for a part of the weights
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        try:
            convert(source, "model")
        except SavingError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            print("cannot be written, and is as it was" in str(error), os.listdir())
"""


def test_a_disk_that_is_full_leaves_nothing(tmp_path):
    """The system refuses to write a file beyond so many bytes."""
    (tmp_path / "here").mkdir()
    write_meta(tmp_path / "meta", tiny_llama())
    write_checkpoint(tmp_path / "whole")
    command = [sys.executable, "-c", FULL, str(tmp_path / "meta"), str(tmp_path / "whole")]
    done = subprocess.run(command, cwd=tmp_path / "here", capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["True []"] * 6, done.stderr


def test_the_command(tmp_path, capsys):
    source = write_meta(tmp_path / "meta", tiny_llama())
    assert main(["convert", str(source), str(tmp_path / "model"), "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert str(tmp_path / "model") in out and "no tokenizer" in out
    assert main(["convert", str(source), str(tmp_path / "model")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", str(source)]) == 2
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 2
    assert "no folder" in capsys.readouterr().err
