"""Recorded decode steps, with a recorder that needs no GPU: it calls the model again with what it was recorded with."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from oracles import drain, open_engine, random_prompts, tokens_of

from llama_infer import Completion, Pipeline, Request
from llama_infer.engine import graphs
from llama_infer.engine.graphs import DecodeGraphs
from llama_infer.errors import UnsupportedError
from llama_infer.models import kernels
from llama_infer.testing import tiny_llama


class Replayer:
    """Writes into one and the same result whenever it is asked to."""

    def __call__(self, forward, device):
        result = forward().clone()

        def replay():
            result.copy_(forward())

        return replay, result


def ragged(q, k, v, layout, window, scaling):
    """Flash attention's contract, written out: all that it knows of rows are ``starts`` and ``ends``."""
    out, starts = torch.zeros_like(q), layout.starts.tolist()
    group = q.shape[1] // k.shape[1]
    for row, end in enumerate(layout.ends.tolist()):
        new = starts[row + 1] - starts[row]
        for at in range(new):
            seen = end - new + at + 1
            keys, values = (t[row, :, :seen].repeat_interleave(group, 0) for t in (k, v))
            weights = (keys @ q[starts[row] + at, :, :, None])[..., 0] * scaling
            out[starts[row] + at] = (weights.softmax(-1)[:, None] @ values)[:, 0]
    return out


@pytest.fixture
def recording(monkeypatch):
    """An engine whose steps are recorded after two of their kind."""
    monkeypatch.setattr(kernels, "ragged_serves", lambda *tensors: True)
    monkeypatch.setattr(kernels, "ragged", ragged)
    monkeypatch.setattr(graphs, "_PATIENCE", 2)

    def make(compiled=None, recorder=Replayer, model=None, **parts):
        pipe = Pipeline(model or tiny_llama(), **parts)
        engine = open_engine(pipe)
        engine._runner._graphs = DecodeGraphs(pipe.loaded.model, compiled, recorder)
        return engine

    return make


def answers(engine, prompts, **params):
    for at, prompt in enumerate(prompts):
        engine.add(Request(prompt, {"max_new_tokens": 6 + 5 * (at % 4), "seed": at, **params}, id=str(at)))
    done = {event.request.id: event for event in drain(engine) if isinstance(event, Completion)}
    return [tokens_of([done[str(at)], *done[str(at)].alternatives]) for at in range(len(prompts))]


@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.9}, {"n": 3}])
def test_tokens_are_those_of_the_model(recording, params):
    """Rows join and leave, graphs have more rows than there are, buffers grow and make the graphs void."""
    prompts = random_prompts(13, seed=6)
    expected = answers(open_engine(Pipeline(tiny_llama(), batch_size=5)), prompts, **params)
    engine = recording(batch_size=5)
    assert answers(engine, prompts, **params) == expected
    assert engine._runner._graphs._recorded and not engine._runner._graphs._off


def test_the_model_is_called_where_nothing_can_be_recorded(recording):
    """Once tried, not again."""
    tried = []

    class Broken:
        def __call__(self, forward, device):
            tried.append(1)
            raise RuntimeError("operation not permitted when stream is capturing")

    prompts = random_prompts(5, seed=6)
    expected = answers(open_engine(Pipeline(tiny_llama())), prompts)
    assert answers(recording(recorder=Broken), prompts) == expected and len(tried) == 1


def test_an_attention_that_the_host_has_a_say_in_is_not_recorded(recording, monkeypatch):
    """Masks are made on the host: a recorded step would keep those of the step that it was recorded in."""
    monkeypatch.setattr(kernels, "ragged_serves", lambda *tensors: False)
    prompts = random_prompts(5, seed=6)
    engine = recording()
    assert answers(engine, prompts) == answers(open_engine(Pipeline(tiny_llama())), prompts)
    assert engine._runner._graphs._off


def test_compiling_is_refused_on_the_cpu():
    with pytest.raises(UnsupportedError, match="compile=True is for a model in one piece on a CUDA device"):
        Pipeline(tiny_llama(), compile=True)


@pytest.mark.parametrize("slow", ["model", "compiled"])
def test_of_two_forms_the_faster_one_is_kept(recording, monkeypatch, slow):
    """By a clock of its own."""
    model = tiny_llama()
    calls, seconds = {"model": 0, "compiled": 0}, [0.0]
    monkeypatch.setattr(graphs, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))

    def form(name):
        def call(**arguments):
            calls[name] += 1
            seconds[0] += 2 if name == slow else 1
            return model(**arguments)

        return call

    engine = recording(form("compiled"), model=model)
    engine._runner._graphs._models[0] = form("model")
    answers(engine, random_prompts(4, seed=7), max_new_tokens=40)
    assert calls["model" if slow == "compiled" else "compiled"] > calls[slow]
