"""Loading: what comes out of a folder, a hub id or the demo, and what is refused."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from checkpoints import IDS, edit_header, edit_json, load, write_checkpoint
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llama_infer.errors import LoadingError, UnsupportedError
from llama_infer.models import loaders
from llama_infer.parts import Source
from llama_infer.registry import register
from llama_infer.testing import tiny_llama


@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": True}, {"max_shard_size": "40KB"}])
def test_float32_checkpoint_loads_exactly(tmp_path, shape, capfd):
    tiny = {name: value for name, value in shape.items() if name != "max_shard_size"}
    write_checkpoint(tmp_path, **shape)
    capfd.readouterr()
    loaded = load(tmp_path, dtype="float32")
    assert torch.equal(loaded.model(IDS).logits, tiny_llama(**tiny)(IDS).logits)
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.tokenizer.decode([72, 105]) == "Hi"
    assert loaded.generation == {
        "temperature": 0.6, "top_p": 0.9, "do_sample": True, "bos_token_id": 256, "eos_token_id": [257, 260]
    }  # fmt: skip
    assert loaded.end_token_ids == (257, 260)
    assert (loaded.context_length, loaded.device, loaded.attention) == (512, torch.device("cpu"), "sdpa")
    assert loaded.notes == ()
    assert loaded.source == Source(str(tmp_path), dtype="float32")
    assert "".join(capfd.readouterr()) == "", "loading is silent"


def test_advice_of_transformers_is_not_shown(folder):
    said = []
    handler = logging.Handler()
    handler.emit = said.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        edit_json(folder / "config.json", bos_token_id=9998)  # out of range; each value is said once a process
        load(folder)
        assert said == []
        edit_json(folder / "config.json", bos_token_id=9999)
        AutoConfig.from_pretrained(folder)
        assert said, "others hear it again"
    finally:
        logging.getLogger("transformers").removeHandler(handler)


@pytest.mark.parametrize(("trust", "passed"), [(None, False), (False, False), (1, True), (True, True)])
def test_trust_is_always_a_plain_answer(whole, monkeypatch, trust, passed):
    """None would make transformers ask on standard input."""
    asked = []
    for kind in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
        original = kind.from_pretrained

        def spy(*args, name=kind.__name__, original=original, **options):
            asked.append((name, options["trust_remote_code"], options["local_files_only"]))
            return original(*args, **options)

        monkeypatch.setattr(kind, "from_pretrained", spy)
    load(whole, trust_remote_code=trust)
    assert {name for name, *_ in asked} == {"AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"}
    assert all(answer is passed and local for _, answer, local in asked)


def test_a_bar_on_a_terminal(whole, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for terminal in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", terminal)
        load(whole, quantization="int8")
        for words in "Loading weights", "Converting layers":
            assert (words in terminal.getvalue()) is terminal.isatty()


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": [257, 3]}, 5, (3, 257, 260)),
        ({"eos_token_id": 7}, 5, (7, 257, 260)),
        ({}, 5, (5, 257, 260)),
        (None, [5, 6], (5, 6, 257, 260)),
        ({"eos_token_id": [9999, -1, True]}, 5, (257, 260)),
    ],
)
def test_end_tokens_are_all_found(folder, generation, config, ends):
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    edit_json(folder / "config.json", eos_token_id=config)
    assert load(folder).end_token_ids == ends


def test_an_ordinary_token_of_that_name_ends_nothing(whole):
    loaded = load(whole)
    tokenizer = loaded.tokenizer
    assert loaders.end_token_ids({"eos_token_id": 1}, loaded.model.config, tokenizer) == (1, 257, 260)
    assert loaders.end_token_ids({"eos_token_id": 1}, loaded.model.config, None) == (1,)
    ordinary = AddedToken("<|eot_id|>", special=False)
    impostor = SimpleNamespace(eos_token_id=None, added_tokens_decoder={260: ordinary})
    assert loaders.end_token_ids({"eos_token_id": 1}, loaded.model.config, impostor) == (1,)


def test_generation_config_keeps_what_the_file_sets(folder):
    (folder / "generation_config.json").write_text(
        json.dumps(
            {"top_k": None, "temperature": 0.6, "_from_model_config": True, "transformers_version": "5", "zap": 1}
        )
    )
    assert load(folder).generation == {"temperature": 0.6}
    (folder / "generation_config.json").unlink()
    assert load(folder).generation == {}


def test_folder_without_tokenizer_and_tokenizer_from_elsewhere(tmp_path, whole):
    bare = write_checkpoint(tmp_path / "bare", tokenizer=False)
    loaded = load(bare)
    assert loaded.tokenizer is None and loaded.end_token_ids == (257, 260)
    assert load(bare, tokenizer=str(whole)).tokenizer.decode([72, 105]) == "Hi"
    with pytest.raises(LoadingError, match="no tokenizer"):
        load(whole, tokenizer=str(bare))
    (bare / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(LoadingError, match="tokenizer in .*bare"):
        load(bare)


def test_context_length(folder):
    edit_json(folder / "config.json", max_position_embeddings=77)
    assert load(folder).context_length == 77
    config = type("Config", (), {"get_text_config": lambda self: object()})()
    assert loaders.context_length(config) == loaders.UNBOUNDED


def test_tensors_missing_unknown_or_of_another_shape(folder):
    path = folder / "model.safetensors"
    intact = path.read_bytes()
    edit_header(path, lambda header: header.update({"model.extra": header.pop("model.norm.weight")}))
    with pytest.raises(LoadingError, match=r"1 tensors are missing \(model.norm.weight\).*model.extra"):
        load(folder)
    path.write_bytes(intact)
    edit_json(folder / "config.json", intermediate_size=128)
    with pytest.raises(LoadingError, match=r"another shape.*down_proj.weight: \(32, 64\) for \(32, 128\)"):
        load(folder)


def test_untied_head_that_is_absent(tmp_path):
    write_checkpoint(tmp_path, tie_word_embeddings=True)
    load(tmp_path)
    edit_json(tmp_path / "config.json", tie_word_embeddings=False)
    with pytest.raises(LoadingError, match="lm_head.weight"):
        load(tmp_path)


def test_other_failures_of_transformers_become_ours(folder):
    edit_json(folder / "config.json", model_type="no-such-model")
    with pytest.raises(LoadingError, match="no-such-model") as caught:
        load(folder)
    assert caught.value.__cause__ is not None and "\n" not in str(caught.value)


def test_quantization_policies_are_asked(whole):
    seen = []

    class Policy:
        def options(self, source):
            seen.append(source)
            return {"dtype": torch.float64}

        def convert(self, model):
            seen.append(model)
            return model

    loaded = load(whole, quantization=Policy())
    assert seen[0] == loaded.source and seen[1] is loaded.model
    assert loaded.model.dtype == torch.float64
    register("quantization", "test-only-convert")(type("Only", (), {"convert": lambda self, model: model.double()}))
    assert load(whole, quantization="test-only-convert").model.dtype == torch.float64


def test_a_checkpoint_is_not_quantised_twice(folder):
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedError, match="gptq.*quantization='bnb-int8'"):
        load(folder, quantization="bnb-int8")


def test_importing_the_rooms_loads_no_torch():
    code = (
        "import sys, llama_infer.models.loaders, llama_infer.models.checks, llama_infer.models.devices, "
        "llama_infer.models.quantization, llama_infer.prompts.auto, llama_infer.testing; "
        "print(sorted({'torch', 'transformers', 'safetensors', 'jinja2', 'bitsandbytes'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
