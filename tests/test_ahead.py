"""Steps that are launched before the last one is read, as on a GPU: what comes out is the same."""

from __future__ import annotations

import random

import pytest
import torch
from oracles import completions, drain, greedy, open_engine, random_prompts, requests, streamed, tokens_of

from llama_infer import Pipeline, Request, assembly
from llama_infer.errors import NonFiniteLogitsError, PartError
from llama_infer.strategies.sample import Sample
from llama_infer.testing import tiny_llama

SAMPLED = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1}


@pytest.fixture
def ahead(monkeypatch):
    """Makes a pipeline whose engines run ahead."""

    def make(**parts):
        monkeypatch.setattr(assembly, "_works_beside_the_host", lambda device: True)
        found = Pipeline(parts.pop("model", None) or tiny_llama(), **parts)
        monkeypatch.undo()
        assert found._assembly.runs_ahead
        return found

    return make


def test_rows_that_come_and_go_equal_transformers(ahead):
    """Rows of unequal length that join and end while a later step is under way."""
    ends = list(range(1, 256, 17))
    model, oracle = tiny_llama(), tiny_llama()
    model.generation_config.eos_token_id = ends
    engine = open_engine(ahead(model=model, batch_size=5))
    draw = random.Random(1)
    expected, arrivals = {}, []
    for at, prompt in enumerate(random_prompts(16, 1, longest=24)):
        longest = draw.randint(1, 10)
        expected[str(at)] = greedy(oracle, prompt, longest, eos_token_id=ends)
        arrivals.append(Request(prompt, {"temperature": 0, "max_new_tokens": longest}, id=str(at)))
    events = []
    while arrivals or engine.busy:
        if arrivals:
            engine.add(arrivals.pop(0))
        events += engine.step()
    done = completions(events)
    assert {id: answer.token_ids for id, answer in done.items()} == expected
    assert all(streamed(events, id) == (answer.text, answer.token_ids) for id, answer in done.items())


@pytest.mark.parametrize("asked", [SAMPLED, {**SAMPLED, "n": 3}, {**SAMPLED, "logprobs": 2}])
def test_answers_are_those_of_an_engine_that_reads_every_step(ahead, asked):
    """Samples fork, prompts share a beginning, prefills are cut in pieces."""
    prompts = [[7] * 40 + prompt for prompt in random_prompts(9, seed=2)]
    plain = [answer for answer in Pipeline(tiny_llama(), batch_size=6).run(requests(prompts, **asked))]
    pipe = ahead(batch_size=6)
    engine = open_engine(pipe, 16)
    for request in requests(prompts, **asked):
        engine.add(request)
    done = completions(drain(engine))
    for answer in plain:
        found = done[answer.request.id]
        assert tokens_of([found, *found.alternatives]) == tokens_of([answer, *answer.alternatives])
        ids = [[[top.token_id for top in tops] for tops in one.top_logprobs] for one in (found, answer)]
        assert ids[0] == ids[1] and found.text == answer.text


def test_the_host_is_one_step_behind_and_asks_for_no_step_too_many(ahead):
    forwards = []
    model = tiny_llama()
    model.register_forward_hook(lambda *args: forwards.append(1))
    engine = open_engine(ahead(model=model))
    engine.add(Request([1, 2], {"max_new_tokens": 4, "temperature": 0}))
    assert engine.step() == [] and len(forwards) == 1
    assert len(engine.step()) == 1 and len(forwards) == 2
    drain(engine)
    assert len(forwards) == 4


def test_samples_that_have_been_forked_are_asked_about_no_more(ahead):
    """Their prompt's ``n`` would have the strategy look at the device in every step."""
    engine = open_engine(ahead())
    for at in (3, 1):
        engine.add(Request([1, 2], {"max_new_tokens": 6, "n": at}))
    counts = []
    while engine.busy:
        engine.step()
        counts.append(engine._batch.all_equal("n", 1) if engine._rows else None)
    assert counts[0] is True and set(counts[:-1]) == {True}


def test_a_failure_is_found_a_step_later_and_ends_its_row_only(ahead):
    """The row's last token is a code, and was fed before anybody looked."""

    def spoil(logits, batch):
        return logits.masked_fill(((batch.request == 2) & (batch.length == 5))[:, None], torch.nan)

    pipe = ahead(processors=(spoil,))
    expected = Pipeline(tiny_llama(), processors=(spoil,))
    for found, plain in zip(
        *(p([[1, 2], [3, 4], [5]], max_new_tokens=9, seed=1) for p in (pipe, expected)), strict=True
    ):
        assert (found.token_ids, found.finish_reason) == (plain.token_ids, plain.finish_reason)
        assert type(found.error) is type(plain.error)
    assert isinstance(pipe([[3, 4], [3, 4]], max_new_tokens=9, seed=1)[1].error, NonFiniteLogitsError)


def test_cancelled_while_a_step_is_under_way(ahead):
    pipe = ahead(batch_size=4)
    asked = requests(random_prompts(4, seed=9))
    expected = [answer.token_ids for answer in Pipeline(tiny_llama()).run(asked)]
    engine = open_engine(pipe)
    for request in asked:
        engine.add(request)
    events = engine.step() + engine.step() + engine.step()
    engine.cancel("1")
    done = completions(events + drain(engine))
    assert done["1"].token_ids == expected[1][:2] and done["1"].finish_reason == "abort"
    assert [done[str(at)].token_ids for at in (0, 2, 3)] == [expected[at] for at in (0, 2, 3)]


def test_memory_that_runs_out_when_all_have_ended(ahead):
    """In the step after the last one that was needed."""
    first, second = greedy(tiny_llama(), [1, 2, 3], 2)
    model = tiny_llama()
    model.generation_config.eos_token_id = second
    engine = open_engine(ahead(model=model))
    runner, calls = engine._runner.forward, []

    def scarce(*args):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return runner(*args)

    engine._runner.forward = scarce
    engine.add(Request([1, 2, 3], {"max_new_tokens": 9, "temperature": 0}, id="a"))
    done = completions(drain(engine))
    assert done["a"].token_ids == (first, second) and done["a"].finish_reason == "stop" and len(calls) == 3


def test_prompts_join_together(ahead):
    """A step that feeds prompts is dear there: of 16 rows two have to be free, unless fewer wait."""
    engine = open_engine(ahead(batch_size=16))
    for at in range(20):
        engine.add(Request([1, at], {"max_new_tokens": 3 + at, "min_new_tokens": 3 + at}))
    joined, before = [], set()
    while engine.busy:
        engine.step()
        rows = {row.task.number for row in engine._rows}
        joined += [len(rows - before)] if rows - before else []
        before |= rows
    assert joined[0] == 16 and sum(joined) == 20 and set(joined[1:-1]) <= {2} and joined[-1] in (1, 2)


def test_a_strategy_that_moves_rows_must_say_so(ahead):
    class Liar(Sample):
        def forks(self, sequence):
            return False

    with pytest.raises(PartError, match="moved rows"):
        ahead(strategy=Liar())([1, 2], n=2, max_new_tokens=3)
