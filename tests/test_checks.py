"""Damaged and dangerous checkpoints are refused before anything is loaded, with an error that names the file."""

from __future__ import annotations

import gc
import io
import json
import pickle
import shutil
import struct
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from checkpoints import edit_header, edit_json, write_checkpoint

from llama_infer import Pipeline
from llama_infer.errors import LoadingError, UnsafeCheckpointError
from llama_infer.models.checks import check_checkpoint, check_vocabulary
from llama_infer.models.loaders import AutoLoader
from llama_infer.parts import Source


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checks") / "sharded", max_shard_size="40KB")


@pytest.fixture
def shards(sharded, tmp_path):
    return Path(shutil.copytree(sharded, tmp_path / "shards"))


def refusal(folder: Path, kind: type[Exception] = LoadingError) -> str:
    """The message with which the loader (not only the check) refuses a folder."""
    with pytest.raises(kind) as caught:
        AutoLoader()(Source(str(folder)))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_sound_checkpoint_is_described(whole, sharded):
    one, many = check_checkpoint(whole), check_checkpoint(sharded)
    assert one.embedding_rows == many.embedding_rows == 264
    assert one.dtype == many.dtype == "float32"
    assert [path.name for path in one.weights] == ["model.safetensors"]
    assert len(many.weights) > 1
    assert one.quantization is None


def test_missing_folder(tmp_path):
    with pytest.raises(LoadingError, match="no folder .*nowhere"):
        check_checkpoint(tmp_path / "nowhere")
    assert "nowhere" in refusal(tmp_path / "nowhere")


def test_folder_without_config(tmp_path):
    assert "config.json" in refusal(tmp_path)


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "no weights" in refusal(folder)
    (folder / "training_args.bin").touch()  # every trainer leaves one; it never held weights
    with pytest.raises(LoadingError) as caught:
        check_checkpoint(folder)
    assert not isinstance(caught.value, UnsafeCheckpointError)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_and_not_executed(folder, tmp_path, name):
    canary = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (canary,))

    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    assert name in refusal(folder, UnsafeCheckpointError)
    assert not canary.exists()
    pickle.loads((folder / name).read_bytes())
    assert canary.exists(), "the canary must be able to sing"


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused_without_a_question(folder, monkeypatch, file):
    edit_json(folder / file, auto_map={"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.Tokenizer", None]})
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    message = refusal(folder, UnsafeCheckpointError)
    assert str(folder / file) in message and "trust_remote_code" in message
    assert sys.stdin.read() == "y\n", "nobody may read the answer to a question that is not asked"
    check_checkpoint(folder, trust_remote_code=True)


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("value", ["somebody/kernel", {"": "sdpa", "text_config": "somebody/kernel:forward"}])
def test_kernels_from_the_hub_are_refused(folder, field, value):
    edit_json(folder / "config.json", **{field: value})
    assert "somebody/kernel" in refusal(folder, UnsafeCheckpointError)
    edit_json(folder / "config.json", **{field: None}, text_config={field: value})
    assert "somebody/kernel" in refusal(folder, UnsafeCheckpointError)


def test_remote_code_of_a_tokenizer_from_elsewhere(folder, whole):
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    with pytest.raises(UnsafeCheckpointError, match="tokenizer_config.json"):
        AutoLoader()(Source(str(whole), tokenizer=str(folder)))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["{not json", "[1]", "[" * 100_000])
def test_damaged_json_is_named(folder, file, text):
    (folder / file).write_text(text)
    assert str(folder / file) in refusal(folder)


def test_config_of_no_model(folder):
    edit_json(folder / "config.json", model_type=None)
    assert "model_type" in refusal(folder)


@pytest.mark.parametrize("described", ["gptq", ["gptq"]])
def test_a_quantization_that_is_no_object(folder, described):
    edit_json(folder / "config.json", quantization_config=described)
    assert "'quantization_config' is no JSON object" in refusal(folder)


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 10), struct.pack("<Q", 1 << 62) + b"{}"])
def test_damaged_or_oversized_header(folder, content):
    path = folder / "model.safetensors"
    path.write_bytes(content)
    assert str(path) in refusal(folder)


def test_overlapping_tensors(folder):
    def overlap(header):
        first, second = [name for name in header if name != "__metadata__"][:2]
        header[second]["data_offsets"] = header[first]["data_offsets"]
        header[second]["shape"] = header[first]["shape"]

    edit_header(folder / "model.safetensors", overlap)
    assert str(folder / "model.safetensors") in refusal(folder)


def test_missing_shard(shards):
    victim = sorted(shards.glob("model-*.safetensors"))[1]
    victim.unlink()
    assert victim.name in refusal(shards)


def test_truncated_shard(shards):
    victim = sorted(shards.glob("model-*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-1])
    assert str(victim) in refusal(shards)


@pytest.mark.parametrize(
    "name", ["../whole/model.safetensors", "/etc/model.safetensors", "a/../../b.safetensors", "..\\b.safetensors", 7]
)
def test_shard_that_leaves_the_folder(shards, name):
    index = shards / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, next(iter(weight_map)): name})
    assert str(index) in refusal(shards, UnsafeCheckpointError)


def test_pickled_shard(shards):
    index = shards / "model.safetensors.index.json"
    edit_json(index, weight_map={"x": "pytorch_model.bin"})
    assert "pytorch_model.bin" in refusal(shards, UnsafeCheckpointError)


def test_index_that_promises_what_its_shard_lacks(shards):
    index = shards / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "model.ghost.weight": sorted(weight_map.values())[0]})
    assert "model.ghost.weight" in refusal(shards)
    edit_json(index, weight_map=[])
    assert "weight_map" in refusal(shards)


def test_weights_named_by_the_config_stay_in_the_folder(folder):
    edit_json(folder / "config.json", transformers_weights="../other.safetensors")
    assert "config.json" in refusal(folder, UnsafeCheckpointError)


def test_distributed_checkpoint_is_refused(folder):
    shutil.copy(folder / "model.safetensors", folder / "shard-00001-model-00001-of-00001.safetensors")
    assert "save_pretrained" in refusal(folder)


def test_adapter_is_refused(folder):
    edit_json(folder / "adapter_config.json", base_model_name_or_path="somebody/else")
    assert "adapter" in refusal(folder)
    (folder / "config.json").unlink()
    assert "adapter" in refusal(folder)


def test_vocabulary_larger_than_the_embedding(folder):
    edit_json(folder / "config.json", vocab_size=300)
    assert "vocabulary of 300 tokens" in refusal(folder)


def test_tokenizer_of_another_model(tmp_path, whole):
    small = write_checkpoint(tmp_path / "small", tokenizer=False, vocab_size=200)
    with pytest.raises(LoadingError, match="reserved_special_token_0.*263.*0 to 199"):
        AutoLoader()(Source(str(small), tokenizer=str(whole)))
    check_vocabulary(small, {"a": 199}, 200)
    check_vocabulary(small, {"a": 999}, None)
    check_vocabulary(small, {}, 1)


def test_refusals_need_no_torch(folder, tmp_path):
    """What is refused costs no time: neither torch nor transformers is loaded, and nobody is asked."""
    remote = Path(shutil.copytree(folder, tmp_path / "remote"))
    edit_json(remote / "config.json", auto_map={"AutoConfig": "evil.Config"})
    kernel = Path(shutil.copytree(folder, tmp_path / "kernel"))
    edit_json(kernel / "config.json", _attn_implementation_internal="somebody/kernel")
    pickled = Path(shutil.copytree(folder, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    code = (
        "import sys\nfrom llama_infer import Pipeline\n"
        "from llama_infer.errors import UnsafeCheckpointError\n"
        "for folder in sys.argv[1:]:\n"
        "    try:\n        Pipeline(folder)\n"
        "    except UnsafeCheckpointError as error:\n        print(error)\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    run = [sys.executable, "-c", code, str(remote), str(kernel), str(pickled)]
    done = subprocess.run(run, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    *refused, loaded = done.stdout.splitlines()
    for reason, line in zip(("auto_map", "somebody/kernel", "pickled weights"), refused, strict=True):
        assert reason in line
    assert loaded == "[]"


class Watch:
    """Remembers the models that came into being while something was loaded."""

    def __init__(self, monkeypatch):
        from transformers import LlamaForCausalLM

        self.seen: list[weakref.ref] = []
        original = LlamaForCausalLM.__init__

        def spy(model, *args, **options):
            original(model, *args, **options)
            self.seen.append(weakref.ref(model))

        monkeypatch.setattr(LlamaForCausalLM, "__init__", spy)

    def assert_gone(self):
        gc.collect()
        assert self.seen and not any(reference() is not None for reference in self.seen)


def lacks_a_tensor(folder):
    edit_header(folder / "model.safetensors", lambda header: header.update({"x": header.pop("model.norm.weight")}))
    return {}


def cannot_be_packed(folder):
    edit_json(folder / "config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    return {}


def fails_in_transformers(folder):
    return {"device_map": {"": "cuda:7"}}


def fails_in_a_policy(folder):
    class Policy:
        def convert(self, model):
            raise RuntimeError("no room")

    return {"quantization": Policy()}


@pytest.mark.parametrize("damage", [lacks_a_tensor, cannot_be_packed, fails_in_transformers, fails_in_a_policy])
def test_what_fails_to_load_leaves_no_memory_behind(folder, monkeypatch, damage):
    """Not even while the exception is held, as a notebook does."""
    watch = Watch(monkeypatch)
    with pytest.raises(Exception) as caught:  # noqa: B017
        Pipeline(str(folder), **damage(folder))
    watch.assert_gone()
    assert caught.value is not None
