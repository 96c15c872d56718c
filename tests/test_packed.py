"""The packed forward against the plain reference: one row at a time, transformers' own cache and attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import completions, drain, greedy, open_engine, random_prompts, raw_logits, requests, tokens_of

from llama_infer import Pipeline, Request
from llama_infer.errors import UnsupportedError
from llama_infer.testing import tiny_llama

SMALL = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "eos_token_id": 257}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 16
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
LONG["original_max_position_embeddings"] = 16


def make(kind: str) -> Any:
    """A small random model of an architecture, float64."""
    import transformers as hf

    if kind == "llama3 rope":
        return tiny_llama(dtype="float64", rope_parameters=LLAMA3)
    config, build = {
        "qwen3": (lambda: hf.Qwen3Config(**SMALL), hf.Qwen3ForCausalLM),
        "mistral": (lambda: hf.MistralConfig(**SMALL, sliding_window=7), hf.MistralForCausalLM),
        "gemma3": (
            lambda: hf.Gemma3TextConfig(**SMALL, sliding_window=6, sliding_window_pattern=2),
            hf.Gemma3ForCausalLM,
        ),
        "phi3 longrope": (
            lambda: hf.Phi3Config(**SMALL, rope_parameters=LONG, original_max_position_embeddings=16, pad_token_id=0),
            hf.Phi3ForCausalLM,
        ),
    }[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = build(config())
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    return model.double().eval().requires_grad_(False)


def results(pipe, chunk=None):
    """Rows of unequal length with forks, joining in two lots; every completion with its samples."""
    asked = requests(random_prompts(6, seed=1, longest=30), n=2, max_new_tokens=10, temperature=0.8)
    engine = open_engine(pipe, chunk)
    for request in asked[:4]:
        engine.add(request)
    events = engine.step() + engine.step()
    for request in asked[4:]:
        engine.add(request)
    done = completions(events + drain(engine))
    return [sample for request in asked for sample in (done[request.id], *done[request.id].alternatives)]


KINDS = ["llama3 rope", "qwen3", "mistral", "gemma3"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_plain(kind, attention):
    """Tokens, and log-probabilities to 1e-6 in float64: whole, chunked, forked; and what the model says by itself."""
    expected = results(Pipeline(make(kind), cache="plain"))
    pipe = Pipeline(make(kind), attention=attention, batch_size=9)
    for chunk in (None, 5):
        packed = results(pipe, chunk)
        assert tokens_of(packed) == tokens_of(expected)
        for one, other in zip(packed, expected, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)
    oracle = make(kind)
    for answer in expected[::5]:
        prompt = len(answer.prompt_token_ids)
        logits = raw_logits(oracle, [*answer.prompt_token_ids, *answer.token_ids])[prompt - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        assert answer.logprobs == pytest.approx(logprobs.tolist(), abs=1e-6)


def test_windows_reach_beyond_a_chunk():
    """Sliding windows shorter than the prompts, fed a token at a time."""
    prompts = random_prompts(5, seed=2, longest=40)
    oracle = make("mistral")
    engine = open_engine(Pipeline(make("mistral")), chunk=1)
    for request in requests(prompts, temperature=0, max_new_tokens=9):
        engine.add(request)
    done = completions(drain(engine))
    for at, prompt in enumerate(prompts):
        assert done[str(at)].token_ids == greedy(oracle, prompt, 9, eos_token_id=257)


def test_slots_change_hands():
    """Many short and long requests through few rows: no owner sees what the last one left."""
    asked = [
        Request(prompt, {"seed": at, "max_new_tokens": 1 + 7 * at % 11, "n": 1 + at % 3})
        for at, prompt in enumerate(random_prompts(30, seed=3))
    ]
    model, plain = tiny_llama(dtype="float64"), Pipeline(tiny_llama(dtype="float64"), cache="plain")
    for packed, alone in zip(Pipeline(model, batch_size=4).run(asked), plain.run(asked), strict=True):
        assert packed.token_ids == alone.token_ids
        assert tokens_of(packed.alternatives) == tokens_of(alone.alternatives)


def test_longrope_is_refused_by_name_and_runs_plain():
    """Its frequencies depend on the longest row: one row at a time they are each row's own."""
    with pytest.raises(UnsupportedError, match="longrope.*cache='plain'"):
        Pipeline(make("phi3 longrope"))
    oracle, prompts = make("phi3 longrope"), [[1, 2, 3], list(range(30, 60))]
    pipe = Pipeline(make("phi3 longrope"), cache="plain")
    answers = pipe(prompts, temperature=0, max_new_tokens=6)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.token_ids == greedy(oracle, prompt, 6, eos_token_id=257)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_users_own_calls_on_our_model_keep_his_mask(attention):
    """Left-padded rows with a 2-D mask, in ``forward`` and in ``generate``, also after runs of ours."""
    model, untouched = tiny_llama(), tiny_llama()
    pipe = Pipeline(model, attention=attention)
    expected = pipe([5, 6, 7], seed=1, max_new_tokens=5).token_ids
    prompts = random_prompts(4, seed=4, longest=12)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    last = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
    alone = torch.stack([raw_logits(untouched, prompt)[-1] for prompt in prompts])
    torch.testing.assert_close(last, alone, rtol=0, atol=1e-4)
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": 257, "pad_token_id": 0}
    generated = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(generated, untouched.generate(ids, attention_mask=mask, **options))
    assert pipe([5, 6, 7], seed=1, max_new_tokens=5).token_ids == expected
