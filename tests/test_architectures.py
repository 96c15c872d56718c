"""Any causal language model of transformers, read from disk: greedy tokens are those of its own ``generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracles import greedy, random_prompts

from llama_infer import Pipeline
from llama_infer.errors import LoadingError, UnsupportedError
from llama_infer.models import attention

SMALL: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0, "original_max_position_embeddings": 32}
BOTH = ["sliding_attention", "full_attention"]


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


PACKED: dict[str, dict[str, Any]] = {
    "Llama": {},  # 2
    "Llama tied": {"tie_word_embeddings": True},
    "Llama biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "Llama linear": rope("linear", factor=2.0),
    "Llama llama3": rope("llama3", **LLAMA3),  # 3.1 and 3.2
    "Llama yarn": rope("yarn", factor=4.0, original_max_position_embeddings=32),
    "Qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "Qwen3": {"head_dim": 8},
    "Qwen3Moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "Mistral": {"sliding_window": 5},
    "Mixtral": {"num_local_experts": 3},
    "Gemma": {"head_dim": 8},
    "Gemma3": {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8, "layer_types": BOTH},
    "Phi": {},
    "Phi3": {},
    "GPTNeoX": {},
    "SmolLM3": {"no_rope_layers": [1, 0]},
}
PLAIN: dict[str, tuple[dict[str, Any], str]] = {
    "Llama dynamic": (rope("dynamic", factor=2.0), "rope type 'dynamic'"),
    "Llama longrope": (rope("longrope", **LONG), "rope type 'longrope'"),
    "Phi3 longrope": ({**rope("longrope", **LONG), "original_max_position_embeddings": 32}, "rope type 'longrope'"),
    "Gemma2": ({"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}, "attn_logit_softcapping"),
    "GptOss": ({"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "layer_types": BOTH}, "sinks"),
    "StableLm": ({}, "StableLmForCausalLM has an attention of its own"),
    "Falcon": ({"new_decoder_architecture": True, "num_kv_heads": 2}, "FalconForCausalLM has an attention of its own"),
    "Bloom": ({}, "BloomForCausalLM has an attention of its own"),
    "Lfm2": ({"layer_types": ["conv", "full_attention"]}, "layers of type 'conv'"),
}


def write(kind: str, settings: dict[str, Any], folder: Path) -> Any:
    """A small random model of transformers, saved in the folder in two or more shards."""
    name = kind.split()[0]
    configure = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = getattr(transformers, f"{name}ForCausalLM")(configure(**{**SMALL, **settings}))
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
    model.eval().save_pretrained(folder, max_shard_size="30KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return model


def load(folder: Path, **options: Any) -> Pipeline:
    return Pipeline(str(folder), dtype="float32", device="cpu", formatter="plain", **options)


PROMPTS = [[token % 117 + 3 for token in prompt] for prompt in random_prompts(3, seed=4, longest=40)]


def check_tokens(pipe: Pipeline, oracle: Any) -> None:
    for prompt, answer in zip(PROMPTS, pipe(PROMPTS, temperature=0, max_new_tokens=8), strict=True):
        assert answer.token_ids == greedy(oracle, prompt, 8, eos_token_id=2)


@pytest.mark.parametrize("kind", PACKED)
def test_tokens_equal_generate(kind, tmp_path):
    oracle = write(kind, PACKED[kind], tmp_path)
    check_tokens(load(tmp_path), oracle)


@pytest.mark.parametrize("kind", PLAIN)
def test_what_cannot_be_packed_is_refused_by_name_and_runs_plain(kind, tmp_path):
    settings, reason = PLAIN[kind]
    oracle = write(kind, settings, tmp_path)
    with pytest.raises(UnsupportedError, match=f"{reason}.*cache='plain'"):
        load(tmp_path)
    check_tokens(load(tmp_path, cache="plain"), oracle)


@pytest.mark.parametrize("cache", ["slots", "plain"])
def test_a_model_without_past_key_values_is_refused(cache, tmp_path):
    write("Mamba", {"state_size": 4}, tmp_path)
    with pytest.raises(UnsupportedError, match="MambaForCausalLM takes no past_key_values"):
        load(tmp_path, cache=cache)


@pytest.mark.parametrize("cache", ["slots", "plain"])
def test_a_model_that_remembers_in_its_modules_is_refused(cache, tmp_path):
    write("RecurrentGemma", {"lru_width": 32, "attention_window_size": 16, "num_hidden_layers": 3}, tmp_path)
    with pytest.raises(UnsupportedError, match="RecurrentGemmaForCausalLM keeps .*_state.* in its modules"):
        load(tmp_path, cache=cache)


def test_what_is_refused_would_go_wrong(tmp_path, monkeypatch):
    """GPT-J ignores the row map without a word: other tokens than its own, were it packed."""
    oracle = write("GPTJ", {"rotary_dim": 4, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}, tmp_path)
    with pytest.raises(UnsupportedError, match="GPTJForCausalLM has an attention of its own"):
        load(tmp_path)
    check_tokens(load(tmp_path, cache="plain"), oracle)
    monkeypatch.setattr(attention, "refusal", lambda model: None)
    with pytest.raises(AssertionError):
        check_tokens(load(tmp_path), oracle)


def test_an_unknown_rope_type_is_named(tmp_path):
    from checkpoints import edit_json

    write("Llama", {}, tmp_path)
    edit_json(tmp_path / "config.json", rope_parameters={"rope_type": "spiral", "rope_theta": 1e4})
    with pytest.raises(LoadingError, match="'spiral'"):
        load(tmp_path)
