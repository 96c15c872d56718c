"""Where a checkpoint comes from: folders, files, hub ids, the demo; and what is none of them."""

from __future__ import annotations

import traceback

import huggingface_hub
import pytest
import torch
from checkpoints import IDS, edit_json, load
from huggingface_hub import errors

from llama_infer import Pipeline
from llama_infer.errors import LoadingError, UnsupportedError
from llama_infer.models import locate
from llama_infer.testing import tiny_llama


def test_only_local_files(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *ignored: pytest.fail("somebody was asked"))
    with pytest.raises(LoadingError, match="nobody/nothing.*hub cannot be reached"):
        load("nobody/nothing", local_files_only=True)


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
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(LoadingError, match="nobody/nothing.*'v1'.*hub cannot be reached.*folder") as caught:
        load("nobody/nothing", revision="v1")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            errors.RepositoryNotFoundError,
            r"'some/model' is no folder here, nor known to the hub: check the name",
        ),
        (errors.GatedRepoError, r"'some/model' is gated: accept its terms"),
        (errors.RevisionNotFoundError, r"'some/model' has no revision 'v3' on the hub"),
        (
            errors.LocalEntryNotFoundError,
            r"'some/model' at revision 'v3' .* cannot be reached: check the name",
        ),
        (ConnectionError, r"'some/model' is no folder here, and the hub does not give it: ConnectionError: the answer"),
    ],
)
def test_what_the_hub_refuses_is_one_error_without_the_hubs_own_traceback(monkeypatch, answer, expected):
    def download(*ignored, **options):
        error = answer.__new__(answer)
        Exception.__init__(error, "the answer\nof a server")
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(LoadingError, match=expected) as caught:
        Pipeline("some/model", revision="v3")
    shown = "".join(traceback.format_exception(caught.value))
    assert "in download" not in shown and "During handling" not in shown
    assert shown.strip().splitlines()[-1].endswith(str(caught.value))


def test_hub_checkpoint_is_checked_before_its_weights_are_fetched(monkeypatch, folder):
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
