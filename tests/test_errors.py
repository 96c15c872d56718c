"""Bad input and broken parts: each with its error, and nobody else harmed."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from oracles import completions, drain, open_engine, raw_logits, requests

from llama_infer import Completion, LlamaInferError, Pipeline, Request, errors, transform_logits
from llama_infer.errors import (
    EmptySupportError,
    NonFiniteLogitsError,
    ParameterError,
    PartError,
    PromptError,
    PromptTooLongError,
    UnknownParameterError,
    UnsupportedError,
)
from llama_infer.testing import tiny_llama

POISON = 200
"""A token whose embedding is NaN in ``poisoned``."""


def test_every_error_is_ours_and_in_the_drawing():
    """And is the standard exception that the docstring names beside it."""
    members = inspect.getmembers(errors, inspect.isclass)
    classes = [cls for _, cls in members if cls.__module__ == errors.__name__]
    assert len(classes) >= 14 and all(issubclass(cls, LlamaInferError) for cls in classes)
    drawn = {}
    for line in errors.__doc__.splitlines():
        name = line.strip("│├└─ ").split(" ")[0]
        if name.endswith("Error"):
            drawn[name] = line.partition("(")[2].partition(")")[0].strip("+ ")
    assert set(drawn) == {cls.__name__ for cls in classes}
    for cls in classes:
        standard = drawn[cls.__name__]
        assert not standard or issubclass(cls, getattr(__import__("builtins"), standard))


@pytest.mark.parametrize(
    "name, value",
    [
        *(("temperature", bad) for bad in (-0.1, math.nan, math.inf, "hot", True, None)),
        *(("top_p", bad) for bad in (-0.01, 1.01, math.nan)),
        *(("top_k", bad) for bad in (-1, 2.5, "40")),
        *(("min_p", bad) for bad in (-0.1, 1.5)),
        *(("repetition_penalty", bad) for bad in (0, -1, math.inf)),
        *(("presence_penalty", bad) for bad in (math.inf, math.nan)),
        *(("frequency_penalty", bad) for bad in (-math.inf, "x")),
        *(("logit_bias", bad) for bad in ({-1: 1.0}, {"a": 1.0}, {1: math.inf}, {1: math.nan}, 3, {10**6: 1.0})),
        *(("min_new_tokens", bad) for bad in (-1, 1.5)),
        *(("max_new_tokens", bad) for bad in (-1, "many", True)),
        *(("seed", bad) for bad in (-1, 2**63, 0.5)),
        *(("n", bad) for bad in (0, -1, 10**9)),
        *(("logprobs", bad) for bad in (-1, 10**6)),
        *(("stop", bad) for bad in ([""], [3], 7, [b"x"])),
    ],
)
def test_a_value_out_of_range_is_named(pipe, name, value):
    """With its name; in a call, as a pipeline's default, and in ``explain`` where that can know."""
    with pytest.raises(ParameterError, match=name):
        pipe([1, 2], **{name: value})
    with pytest.raises(ParameterError, match=name):
        pipe.stream([1, 2], **{name: value})


def test_a_message_says_value_and_range(pipe):
    with pytest.raises(ParameterError, match=r"top_p=1\.5 is out of range: 0 <= top_p <= 1"):
        pipe.explain(top_p=1.5)
    with pytest.raises(ParameterError, match=r"top_k=-1 is out of range: top_k >= 0"):
        Pipeline(pipe.loaded, params={"top_k": -1})


@pytest.mark.parametrize("given, nearest", [("top_pp", "top_p"), ("temprature", "temperature"), ("max_tokens", None)])
def test_an_unknown_parameter_suggests_the_nearest(pipe, given, nearest):
    known = "This pipeline knows: max_new_tokens, seed"
    for call in (pipe, pipe.stream, pipe.explain):
        arguments = () if call == pipe.explain else ([1],)
        with pytest.raises(UnknownParameterError, match=known) as caught:
            call(*arguments, **{given: 1})
        assert nearest is None or f"unknown parameter '{given}'; did you mean '{nearest}'?" in str(caught.value)
    with pytest.raises(UnknownParameterError, match=given):
        Pipeline(pipe.loaded, params={given: 1})
    with pytest.raises(UnknownParameterError, match=given):
        transform_logits(torch.zeros(1, 4), **{given: 1})


@pytest.mark.parametrize(
    "prompt",
    [[], [[]], [1, "a"], [[1], None], None, 3, b"bytes", "", [-1], [264], [[1], [2**70]], [True], [1.5], "\ud800"],
)
def test_what_is_no_prompt(pipe, prompt):
    """Nothing is decoded, and the error is a PromptError; ids out of the vocabulary among them."""
    plain = pipe if prompt != "" else pipe.replace(tokenizer=None)
    with pytest.raises(PromptError):
        plain(prompt)


def test_a_prompt_longer_than_the_context(pipe):
    with pytest.raises(PromptTooLongError, match="600 tokens.*512"):
        pipe([1] * 600)
    long, good = pipe.run([Request([1] * 600), Request([1])])
    assert long.finish_reason == "error" and isinstance(long.error, PromptTooLongError)
    assert good.finish_reason != "error"


@pytest.mark.parametrize("thing", ["text", [1, 2], {"prompt": "text"}, None])
def test_run_takes_requests_only(pipe, thing):
    """Anything else is a clear error, not an AttributeError."""
    with pytest.raises(LlamaInferError, match="Request"):
        list(pipe.run([thing]))


def test_lists_of_values_fit_the_prompts(pipe):
    for bad in ([0.1], [0.1, 0.2, 0.3]):
        with pytest.raises(ParameterError, match="temperature has . values? for 2 prompts"):
            pipe([[1], [2]], temperature=bad)
    with pytest.raises(ParameterError, match="seed"):
        pipe([1, 2], seed=[1, 2])


@pytest.fixture(scope="module")
def poisoned():
    """A model that says NaN after token POISON."""
    model = tiny_llama()
    model.get_input_embeddings().weight[POISON] = math.nan
    return Pipeline(model, params={"max_new_tokens": 6, "logit_bias": {POISON: -math.inf}}, batch_size=4)


@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.5, "min_p": 0.1}])
def test_nan_in_one_row_ends_that_row(poisoned, params):
    """It names request and step; the others finish as they would alone, and so does the slot's next owner."""
    prompts = [[1, 2, 3], [4, POISON, 6], [7], [8, 9]]
    asked = requests(prompts, **params)
    good = [next(poisoned.run([request])) for at, request in enumerate(asked) if at != 1]
    longer = [Request([at], {"seed": at, **params}, id=f"later {at}") for at in range(20, 26)]
    expected = [next(poisoned.run([request])) for request in longer]
    engine = open_engine(poisoned)
    for request in (*asked, *longer):
        engine.add(request)
    done = completions(drain(engine))
    with pytest.raises(NonFiniteLogitsError, match="request '1', step 0.*of the model"):
        raise done["1"].error
    assert done["1"].finish_reason == "error" and done["1"].token_ids == ()
    assert [done[id].token_ids for id in "023"] == [answer.token_ids for answer in good]
    assert [done[request.id].token_ids for request in longer] == [answer.token_ids for answer in expected]


def test_nan_does_not_outlive_a_cancelled_prefill(poisoned):
    """A request is cancelled with NaN in the cache: the slot's next owner, shorter than its neighbour, is clean."""
    asked = requests([[1], list(range(30))])
    expected = [next(poisoned.run([request])).token_ids for request in asked]
    engine = open_engine(poisoned, chunk=8)
    engine.add(Request([1, 2, *[POISON] * 30], id="bad"))
    engine.step()
    engine.cancel("bad")
    for request in asked:
        engine.add(request)
    done = completions(drain(engine))
    assert [done[id].token_ids for id in "01"] == expected


def set_logits(row_values):
    """A processor that overwrites some logits of the row whose first token is 9 from its third token on."""

    def processor(logits, batch):
        hit = (batch.tokens[:, 0] == 9) & (batch.length - batch.prompt_length == 2)
        return torch.where(hit[:, None], row_values(logits), logits)

    return processor


@pytest.mark.parametrize(
    "values, error, words",
    [
        (lambda x: torch.full_like(x, -math.inf), EmptySupportError, "no token is left"),
        (lambda x: torch.full_like(x, math.nan), NonFiniteLogitsError, "after the processors"),
        (lambda x: x.index_fill(1, torch.tensor([3]), math.inf), NonFiniteLogitsError, "after the processors"),
        (lambda x: x.index_fill(1, torch.tensor([3]), math.nan), NonFiniteLogitsError, "after the processors"),
    ],
)
@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"top_p": 0.5}, {"top_k": 2, "temperature": 1e-5}])
def test_a_processor_that_spoils_a_row_ends_that_row(pipe, values, error, words, params):
    own = pipe.replace(processors=(set_logits(values), *pipe.processors))
    asked = requests([[9, 1], [8, 1], [7]], **params)
    expected = [next(pipe.run([request])).token_ids for request in asked]
    spoilt, *others = own.run(asked)
    assert isinstance(spoilt.error, error) and words in str(spoilt.error) and "'0', step 2" in str(spoilt.error)
    assert spoilt.token_ids == expected[0][:2]
    assert [other.token_ids for other in others] == expected[1:]


def test_infinity_among_the_models_logits_is_found_wherever_it_is(pipe):
    """Also where a processor hides it from the sampler."""
    model = tiny_llama(eos_token_id=3)
    model.lm_head.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor([3]), math.inf))
    own = Pipeline(model, params={"max_new_tokens": 3})
    for params in ({}, {"min_new_tokens": 5}, {"logit_bias": {3: -math.inf}}):
        answer = own([1, 2], **params)
        assert isinstance(answer.error, NonFiniteLogitsError), params


def test_banning_everything_is_an_empty_support(pipe):
    bans = dict.fromkeys(range(264), -math.inf)
    bad, good = pipe([[1], [2]], logit_bias=[bans, {}])
    assert isinstance(bad.error, EmptySupportError) and good.error is None


def shape(logits, batch):
    return logits[:, :-1]


def kind(logits, batch):
    return logits.double()


def nothing(logits, batch):
    return None


@pytest.mark.parametrize("broken", [shape, kind, nothing])
def test_a_processor_that_breaks_its_contract_is_named(pipe, broken):
    with pytest.raises(PartError, match=rf"processor {broken.__name__} returned"):
        pipe.replace(processors=(*pipe.processors, broken))([1])
    with pytest.raises(PartError, match=broken.__name__):
        transform_logits(torch.zeros(2, 5), processors=broken)
    assert pipe([1], seed=1).error is None


@pytest.mark.parametrize(
    "choose",
    [
        lambda logits, batch: logits.argmax(-1)[:, None],
        lambda logits, batch: logits.argmax(-1).float(),
        lambda logits, batch: logits.argmax(-1).int(),
        lambda logits, batch: 3,
    ],
)
def test_a_sampler_that_breaks_its_contract_is_named(pipe, choose):
    def picky(logits, batch):
        return choose(logits, batch)

    with pytest.raises(PartError, match="sampler picky returned"):
        pipe.replace(sampler=picky)([1])


@pytest.mark.parametrize("bad", [264, 10**9, -1, -2, -3, -(2**40)])
def test_an_id_out_of_range_ends_its_row(pipe, bad):
    def wild(logits, batch):
        return torch.where(batch.tokens[:, 0] == 9, bad, logits.argmax(-1))

    spoilt, other = pipe.replace(sampler=wild)([[9], [8]])
    assert isinstance(spoilt.error, PartError) and "wild" in str(spoilt.error)
    assert other.token_ids == pipe([8], temperature=0).token_ids


def test_a_part_that_writes_into_its_logits_changes_no_logprobs(pipe, reference):
    """A processor and a sampler of a user's: what is reported is the model's own."""

    def scribble(logits, batch):
        return logits.mul_(0).add_(torch.arange(264) == 77)

    def scrawl(logits, batch):
        chosen = logits.argmax(-1)
        logits.fill_(3.0)
        return chosen

    answer = pipe.replace(processors=scribble, sampler=scrawl)([1, 2, 3], logprobs=2, max_new_tokens=3)
    assert answer.token_ids == (77, 77, 77)
    logprobs = raw_logits(reference, [1, 2, 3, 77, 77, 77])[2:5].log_softmax(-1)
    assert answer.logprobs == pytest.approx(logprobs[:, 77].tolist(), abs=1e-4)
    assert [[top.token_id for top in tops] for tops in answer.top_logprobs] == logprobs.topk(2).indices.tolist()
    bare = pipe.replace(processors=(), sampler=scrawl)([1, 2, 3], max_new_tokens=1)
    assert bare.logprobs == pytest.approx([logprobs[0].max().item()], abs=1e-4)


def test_a_strategy_that_breaks_its_contract_is_named(pipe):
    from llama_infer import Plan

    class Greedy2:
        name = "greedy2"

        def width(self, params):
            return 1

        def step(self, output, batch, chain):
            return Plan(output.logits.argmax(-1))

    with pytest.raises(PartError, match="strategy greedy2"):
        pipe.replace(strategy=Greedy2())([1])


def test_arguments_that_do_not_fit_a_model_in_memory(reference):
    with pytest.raises(UnsupportedError, match="dtype"):
        Pipeline(reference, dtype="bfloat16")
    with pytest.raises(UnsupportedError, match="float"):
        Pipeline(3.5)
    with pytest.raises(ParameterError, match="batch_size"):
        Pipeline(tiny_llama(), batch_size=0)


def test_a_failed_request_of_a_list_comes_back_in_its_place(poisoned):
    answers = poisoned([[1], [POISON], [2]], seed=1)
    assert [type(answer) for answer in answers] == [Completion] * 3
    assert [answer.finish_reason == "error" for answer in answers] == [False, True, False]
    with pytest.raises(NonFiniteLogitsError):
        list(poisoned.stream([POISON]))
