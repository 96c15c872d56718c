"""Quality of a quantization: the numbers are those of their definitions, the unquantised model agrees with itself."""

from __future__ import annotations

import json
import math

import pytest
import torch
from checkpoints import write_checkpoint

from llama_infer import Pipeline, quality
from llama_infer.cli import main
from llama_infer.errors import ParameterError, PromptError
from llama_infer.models.int8 import _exact_products
from llama_infer.models.loaders import AutoLoader
from llama_infer.models.size import weight_bytes
from llama_infer.parts import Source
from llama_infer.quality import compare, table

TEXT = "Why must we reduce pollution? Because the air belongs to all of us. " * 2
pytestmark = pytest.mark.skipif(not _exact_products(), reason="needs VNNI")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    return write_checkpoint(folder, hidden_size=128, vocab_size=320, dtype="bfloat16", tie_word_embeddings=True)


def test_numbers_are_their_definitions(folder):
    window = 50
    rows = compare(str(folder), ("packed", "int8", "int4"), text=TEXT, window=window, device="cpu")
    assert [row.quantization for row in rows] == ["none", "packed", "int8", "int4"]
    models = {
        row.quantization: AutoLoader()(Source(str(folder), quantization=row.quantization, device="cpu")).model
        for row in rows
    }
    ids = [256, *TEXT.encode()]
    for row in rows:
        losses, divergences, same = [], [], []
        for start in range(0, len(ids) - 1, window):
            part = torch.tensor(ids[start : start + window])
            mine, theirs = (
                models[name](part[None]).logits[0].double().log_softmax(-1) for name in (row.quantization, "none")
            )
            for at in range(len(part) - 1):
                losses.append(-mine[at, part[at + 1]].item())
                divergences.append(
                    sum(math.exp(q) * (q - p) for q, p in zip(theirs[at].tolist(), mine[at].tolist(), strict=True))
                )
                same.append(mine[at].argmax() == theirs[at].argmax())
        assert row.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
        assert row.divergence == pytest.approx(sum(divergences) / len(divergences), rel=1e-3, abs=1e-6)
        assert row.agreement == pytest.approx(sum(map(int, same)) / len(same))
        assert row.decode > 0 and row.prefill > 0
    none, packed, int8, int4 = rows
    assert none.divergence == 0 and none.agreement == 1
    assert 0 < int8.divergence < int4.divergence
    assert int4.megabytes < int8.megabytes < packed.megabytes == pytest.approx(none.megabytes, rel=0.01)


def test_size_counts_every_weight_once(folder):
    def size(policy, **options):
        return weight_bytes(AutoLoader()(Source(str(folder), quantization=policy, device="cpu", **options)).model)

    numbers = sum(
        p.numel() for p in AutoLoader()(Source(str(folder), quantization="none", device="cpu")).model.parameters()
    )
    assert 0 <= size("none") - 2 * numbers < 1024  # a rope's frequencies
    assert 0 <= size("none", dtype="float32") - 4 * numbers < 1024
    assert 0.5 < size("int8") / size("none") < 0.56
    assert 0.27 < size("int4") / size("none") < 0.285


def test_the_default_text_is_the_models_own(folder):
    first, second = (compare(str(folder), "int8", tokens=64, device="cpu") for _ in range(2))
    assert [row.perplexity for row in first] == [row.perplexity for row in second]
    assert first[0].perplexity > 1


def test_of_the_models_own_text_the_answers_alone_are_scored(folder, monkeypatch):
    """Token by token, from one forward for each, of the answers that the same request gives."""
    monkeypatch.setattr(quality, "PROMPTS", ("Hi", "A longer prompt"))
    (row,) = compare(str(folder), (), tokens=24, window=6, device="cpu")
    pipe = Pipeline(str(folder), quantization="none", device="cpu")
    losses = []
    for answer in pipe(["Hi", "A longer prompt"], temperature=1.0, seed=1, max_new_tokens=6, n=2):
        for sample in (answer, *answer.alternatives):
            for at, token in enumerate(sample.token_ids):
                before = torch.tensor([[*sample.prompt_token_ids, *sample.token_ids[:at]]])
                losses.append(-pipe.loaded.model(before).logits[0, -1].double().log_softmax(-1)[token].item())
    assert len(losses) > 12
    assert math.log(row.perplexity) == pytest.approx(sum(losses) / len(losses), rel=0.02)  # sums in bfloat16 differ


def test_bad_values(folder):
    with pytest.raises(ParameterError, match="tokens=1"):
        compare(str(folder), tokens=1)
    with pytest.raises(PromptError, match="predicts nothing"):
        compare(str(folder), text="", device="cpu")


def test_command(folder, tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    words = ["quality", "--base-model", str(folder), "--quantization", "int8", "--data-file", str(tmp_path / "text")]
    assert main([*words, "--device", "cpu"]) == 0
    head, none, int8 = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["quantization", "MB"] and none.startswith("none ") and int8.startswith("int8 ")
    assert main([*words, "--json", "--device", "cpu"]) == 0
    assert [row["quantization"] for row in json.loads(capsys.readouterr().out)] == ["none", "int8"]
    assert main(["quality", "--data-file", str(tmp_path / "absent")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_table_is_aligned(folder):
    lines = table(compare(str(folder), "int8", text=TEXT, tokens=32, device="cpu")).splitlines()
    assert len({len(line) for line in lines}) == 1
