"""The engine on a real GPU: attention over ragged rows, recorded steps, and one wait a step."""

from __future__ import annotations

import warnings

import pytest
import torch
from oracles import drain, greedy, open_engine, random_prompts, requests, tokens_of
from test_kernels import definition, make

from llama_infer import Pipeline, Request
from llama_infer.engine import graphs
from llama_infer.layout import Layout, Span
from llama_infer.models import kernels
from llama_infer.testing import tiny_llama

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPE = {"num_heads": 8, "num_kv_heads": 2, "hidden_size": 512}


def on_gpu(dtype):
    return tiny_llama(**SHAPE).to("cuda", dtype)


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("given", [[(20, 1), (0, 30), (7, 5), (63, 1)], [(300, 1), (0, 1), (64, 1)], [(0, 200)]])
def test_ragged_rows_are_the_definition(given, window):
    """Rows that decode, begin and go on, as the cache on a GPU lays them out."""
    spans = tuple(Span(old, new, True) for old, new in given)
    _, q, k, v = make(spans, 2, 4, torch.float32, dim=64)
    expected = definition(Layout(spans, torch.device("cpu")), *(t.double() for t in (q, k, v)), window, None)
    layout = Layout(spans, torch.device("cuda"))
    q = q.flatten(1, 2).to("cuda", torch.bfloat16)
    k, v = (t.to("cuda", torch.bfloat16).transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    assert kernels.ragged_serves(q, k, v)
    found = kernels.ragged(q, k, v, layout, window, None).unflatten(1, (2, 4))
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=0.03)


def test_float32_equals_transformers():
    """Through torch's kernels with masks, which nothing is recorded of."""
    prompts = random_prompts(9, seed=3)
    oracle = tiny_llama(**SHAPE)
    answers = Pipeline(on_gpu(torch.float32))(prompts, temperature=0, max_new_tokens=12)
    for answer, prompt in zip(answers, prompts, strict=True):
        assert answer.token_ids == greedy(oracle, prompt, 12)


@pytest.mark.parametrize(
    "asked", [{"temperature": 0}, {"temperature": 0.8, "top_p": 0.9}, {"n": 4, "temperature": 1.0}]
)
def test_recorded_steps_give_what_the_model_gives(monkeypatch, asked):
    """Eight rows are a number that steps are recorded for: the same kernels, so the same tokens."""
    pipe = Pipeline(on_gpu(torch.bfloat16), prefix_cache=0)
    count = 2 if "n" in asked else 8
    given = requests([[at] * 9 for at in range(count)], max_new_tokens=40, **asked)
    monkeypatch.setattr(graphs, "_PATIENCE", 10**9)
    expected = [tokens_of([a, *a.alternatives]) for a in pipe.run(given)]
    monkeypatch.setattr(graphs, "_PATIENCE", 2)
    engine = open_engine(pipe)
    for request in given:
        engine.add(request)
    drain(engine)
    assert engine._runner._graphs._recorded and not engine._runner._graphs._off
    engine.close()
    assert open_engine(pipe) is not engine  # another backend object's
    for _ in range(2):
        assert [tokens_of([a, *a.alternatives]) for a in pipe.run(given)] == expected


def test_rows_that_leave_and_join_among_recorded_steps():
    """More rows than fit, of unequal length: each row's own logits say that its tokens were likely ones."""
    model = on_gpu(torch.bfloat16)
    pipe = Pipeline(model, batch_size=6)
    prompts = random_prompts(20, seed=4)
    given = [Request(prompt, {"max_new_tokens": 5 + 3 * at, "temperature": 0}) for at, prompt in enumerate(prompts)]
    missed = total = 0
    for answer in pipe.run(given):
        ids = torch.tensor([[*answer.prompt_token_ids, *answer.token_ids]], device="cuda")
        logits = model(input_ids=ids, use_cache=False).logits[0, len(answer.prompt_token_ids) - 1 : -1].float()
        chosen = logits.gather(1, ids[0, len(answer.prompt_token_ids) :, None])[:, 0]
        missed += int((logits.amax(-1) - chosen > 0.05).sum())
        total += len(answer.token_ids)
    assert total > 500 and missed <= total // 50


def test_a_step_waits_once():
    """torch warns of everything that waits for the GPU but an event, which is how a step is read."""
    engine = open_engine(Pipeline(on_gpu(torch.bfloat16)))
    for request in requests([[at] * 5 for at in range(8)], max_new_tokens=60, temperature=0.7, top_k=5):
        engine.add(request)
    for _ in range(12):
        engine.step()
    assert engine._runner._graphs._recorded
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")  # torch says that it may not find every wait
            torch.cuda.set_sync_debug_mode("warn")
            warnings.simplefilter("always")
            for _ in range(20):
                engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    assert not waits, waits[:3]


def test_layers_on_several_devices():
    """As accelerate places them on several GPUs: here the processor serves as the second one."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    prompts = random_prompts(7, seed=5)
    model = tiny_llama(**SHAPE, num_layers=4)
    expected = [greedy(model, prompt, 10) for prompt in prompts]
    for place, layers in (("cuda:0", model.model.layers[:2]), ("cpu", model.model.layers[2:])):
        for layer in layers:
            add_hook_to_module(layer.to(place), AlignDevicesHook(torch.device(place)))
    for module in (model.model.embed_tokens, model.model.rotary_emb):
        add_hook_to_module(module.to("cuda:0"), AlignDevicesHook(torch.device("cuda:0")))
    for module in (model.model.norm, model.lm_head):
        add_hook_to_module(module.to("cuda:0"), AlignDevicesHook(torch.device("cuda:0")))
    model.hf_device_map = {"one": 0, "other": "cpu"}
    answers = Pipeline(model, batch_size=4)(prompts, temperature=0, max_new_tokens=10)
    assert [answer.token_ids for answer in answers] == expected
