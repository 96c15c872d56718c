"""Loading: what comes out of a folder, a hub id or the demo, and what is refused."""

from __future__ import annotations

import io
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import edit_header, edit_json, write_checkpoint
from oracles import greedy
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llama_infer import Pipeline
from llama_infer.errors import LoadingError, MissingDependencyError, ParameterError, UnsupportedError
from llama_infer.models import devices, loaders, locate
from llama_infer.models.loaders import AutoLoader
from llama_infer.parts import Source
from llama_infer.registry import register
from llama_infer.testing import tiny_llama


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("loaders") / "whole")


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "model"))


def load(model, **options):
    return AutoLoader()(Source(str(model), **options))


IDS = torch.tensor([[256, 72, 101, 108, 108, 111]])


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


def test_default_dtype_is_bfloat16_and_said(whole):
    loaded = load(whole)
    assert loaded.model.dtype == torch.bfloat16
    assert len(loaded.notes) == 1 and "float32" in loaded.notes[0]


@pytest.mark.parametrize(
    ("stored", "asked", "got", "notes"),
    [
        ("bfloat16", None, torch.bfloat16, 0),
        ("bfloat16", "auto", torch.bfloat16, 0),
        ("float32", "auto", torch.float32, 0),
        ("float16", None, torch.bfloat16, 1),
        ("float16", "auto", torch.bfloat16, 1),
        ("float16", "float16", torch.float16, 0),
        ("bfloat16", "fp32", torch.float32, 0),
        ("float32", "half", torch.float16, 0),
    ],
)
def test_dtypes_on_the_cpu(tmp_path, stored, asked, got, notes):
    loaded = load(write_checkpoint(tmp_path, tokenizer=False, dtype=stored), dtype=asked, device="cpu")
    assert loaded.model.dtype == got
    assert len(loaded.notes) == notes
    assert torch.isfinite(loaded.model(IDS).logits).all()


def test_dtype_names():
    assert [devices.dtype_name(n) for n in ("bf16", "fp16", "float", "torch.float32")] == [
        "bfloat16", "float16", "float32", "float32"
    ]  # fmt: skip
    with pytest.raises(ParameterError, match="did you mean 'bfloat16'"):
        load("demo", dtype="bfloat1")
    with pytest.raises(ParameterError, match="quantization"):
        load("demo", dtype="int8")


def test_default_dtype_of_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (int(device.index), 5))
    assert devices.default_dtype(torch.device("cuda:8")) == "bfloat16"
    assert devices.default_dtype(torch.device("cuda:7")) == "float16"
    assert devices.default_dtype(torch.device("cpu")) == "bfloat16"


def test_devices_are_picked_in_order(monkeypatch):
    cuda, mps = [0], [False]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda[0] > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda[0])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps[0])
    assert devices.pick_device() == torch.device("cpu")
    mps[0] = True
    assert devices.pick_device() == torch.device("mps")
    cuda[0] = 2
    assert devices.pick_device() == torch.device("cuda:1")  # the current one
    assert devices.pick_device("cuda:0") == torch.device("cuda:0")
    assert devices.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ParameterError, match="cuda:2.*cuda:0, cuda:1, mps, cpu"):
        devices.pick_device("cuda:2")
    cuda[0], mps[0] = 0, False
    for absent in ("cuda", "cuda:1", "mps", "tpu", ""):
        with pytest.raises(ParameterError, match="Here: cpu"):
            devices.pick_device(absent)


def test_device_and_device_map(whole):
    loaded = load(whole, device_map="auto", dtype="float32")
    assert loaded.device == loaded.model.get_input_embeddings().weight.device
    assert torch.allclose(loaded.model(IDS.to(loaded.device)).logits.cpu(), tiny_llama()(IDS).logits, atol=1e-4)
    assert load(whole, device_map={"": "cpu"}).device == torch.device("cpu")
    with pytest.raises(UnsupportedError, match="device_map"):
        load(whole, device="cpu", device_map="auto")


@pytest.mark.parametrize("place", [{"": "disk"}, {"model": "cpu", "lm_head": "disk"}])
def test_layers_on_the_disk(whole, place, capfd):
    """Rows in one packed forward, through layers that accelerate fetches: the tokens are those of the whole model."""
    capfd.readouterr()
    pipe = Pipeline(str(whole), device_map=place, dtype="float32", formatter="plain")
    assert "".join(capfd.readouterr()) == ""
    assert any(parameter.device.type == "meta" for parameter in pipe.loaded.model.parameters())
    assert pipe.loaded.device.type == "cpu" and "on the disk" in pipe.loaded.notes[-1]
    prompts = [[256, 72, 105], list(range(40, 70))]
    for prompt, answer in zip(prompts, pipe(prompts, temperature=0, max_new_tokens=6), strict=True):
        assert answer.token_ids == greedy(tiny_llama(), prompt, 6, eos_token_id=[257, 260])


def test_a_bar_on_a_terminal(whole, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for terminal in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", terminal)
        load(whole)
        assert ("Loading weights" in terminal.getvalue()) is terminal.isatty()


def test_only_local_files(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *ignored: pytest.fail("somebody was asked"))
    with pytest.raises(LoadingError, match="nobody/nothing.*hub cannot be reached"):
        load("nobody/nothing", local_files_only=True)


def test_attention_kernels(whole, monkeypatch):
    for name in ("sdpa", "eager"):
        loaded = load(whole, attention=name, device="cpu")
        assert loaded.attention == loaded.model.config._attn_implementation == name
    assert load(whole, device="cpu").attention == "sdpa"
    with pytest.raises(ParameterError, match="did you mean 'sdpa'"):
        load(whole, attention="spda")
    with pytest.raises(UnsupportedError, match="use 'sdpa'"):
        load(whole, attention="flash_attention_2", device="cpu")
    cuda = torch.device("cuda:0")
    monkeypatch.setattr(loaders.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install flash-attn.*sdpa"):
        loaders._pick_attention("flash_attention_2", cuda, torch.bfloat16)
    monkeypatch.setattr(loaders.importlib.util, "find_spec", lambda name: name)
    assert loaders._pick_attention("flash_attention_2", cuda, torch.bfloat16) == "flash_attention_2"
    with pytest.raises(UnsupportedError, match="float32"):
        loaders._pick_attention("flash_attention_2", cuda, torch.float32)


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_the_kernel_of_the_config_does_not_win(folder, field):
    edit_json(folder / "config.json", **{field: "flash_attention_2"})
    assert load(folder, device="cpu").attention == "sdpa"
    assert load(folder, device="cpu", attention="eager").attention == "eager"


def test_a_model_without_sdpa_falls_back_to_eager(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    assert load(tmp_path, device="cpu").attention == "eager"
    with pytest.raises(LoadingError, match="Gemma2"):
        load(tmp_path, device="cpu", attention="sdpa")


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


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "a/b/c", "~nobody/x", "", "\0", "x" * 5000, "a b"])
def test_what_is_neither_folder_nor_hub_id(model):
    with pytest.raises(LoadingError, match="no folder"):
        load(model)


def test_a_file_is_no_checkpoint(whole):
    with pytest.raises(LoadingError, match="is a file"):
        load(whole / "model.safetensors")


def test_revision_belongs_to_the_hub(whole):
    with pytest.raises(UnsupportedError, match="revision"):
        load(whole, revision="main")


def test_offline_and_absent_is_one_line(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(LoadingError, match="nobody/nothing.*'v1'.*hub cannot be reached.*folder") as caught:
        load("nobody/nothing", revision="v1")
    assert "\n" not in str(caught.value)


def test_hub_checkpoint_is_checked_before_its_weights_are_fetched(monkeypatch, folder):
    import huggingface_hub

    asked = []

    def download(model, revision, allow_patterns, **options):
        asked.append((model, revision, "*.safetensors" in allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = load("some/model", revision="v2", dtype="float32")
    assert asked == [("some/model", "v2", False), ("some/model", "v2", True)]
    assert torch.equal(loaded.model(IDS).logits, tiny_llama()(IDS).logits)
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(LoadingError, match="auto_map"):
        load("some/model")
    assert len(asked) == 3, "no weights of what is refused"


def test_demo_is_the_built_in_folder(monkeypatch, folder):
    assert locate.DEMO.name == "demo" and locate.DEMO.parent.name == "llama_infer"
    monkeypatch.setattr(locate, "DEMO", folder)
    assert load("demo").context_length == 512


def test_importing_the_rooms_loads_no_torch():
    code = (
        "import sys, llama_infer.models.loaders, llama_infer.models.checks, llama_infer.models.devices, "
        "llama_infer.models.quantization, llama_infer.prompts.auto, llama_infer.testing; "
        "print(sorted({'torch', 'transformers', 'safetensors', 'jinja2', 'bitsandbytes'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
