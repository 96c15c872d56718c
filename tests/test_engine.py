"""The engine: whose tokens they are, whoever else is in the batch and whenever they came."""

from __future__ import annotations

import itertools
import random
import threading

import pytest
import torch
from oracles import completions, drain, greedy, open_engine, random_prompts, requests, streamed, tokens_of

from llama_infer import Chunk, Completion, Pipeline, Request
from llama_infer.errors import ParameterError
from llama_infer.testing import tiny_llama

SAMPLED = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1}


def one_by_one(pipe, asked):
    """The completions when nobody else is there."""
    return [next(iter(pipe.run([request]))) for request in asked]


@pytest.mark.parametrize("heads, kv_heads, seed", [(4, 4, 1), (4, 2, 2), (4, 1, 3), (8, 2, 4)])
def test_greedy_equals_transformers_for_rows_that_come_and_go(heads, kv_heads, seed):
    """1 to 16 rows of unequal length, each joining at a step of its own, against ``generate`` on one row at a time."""
    shape = {"num_heads": heads, "num_kv_heads": kv_heads, "hidden_size": 8 * heads, "seed": seed}
    ends = list(range(seed, 256, 17))
    model, oracle = tiny_llama(**shape), tiny_llama(**shape)
    model.generation_config.eos_token_id = ends
    engine = open_engine(Pipeline(model, batch_size=11))
    draw = random.Random(seed)
    expected, arrivals = {}, []
    for at, prompt in enumerate(random_prompts(16, seed, longest=24)):
        longest = draw.randint(1, 10)
        asked = draw.choice([{}, {"repetition_penalty": 1.3}, {"min_new_tokens": longest // 2}])
        asked = {"max_new_tokens": longest, **asked}
        expected[str(at)] = greedy(oracle, prompt, eos_token_id=ends, **asked)
        arrivals.append((draw.randrange(12), Request(prompt, {"temperature": 0, **asked}, id=str(at))))
    arrivals.sort(key=lambda arrival: arrival[0])
    events = []
    for step in itertools.count():
        while arrivals and arrivals[0][0] <= step:
            engine.add(arrivals.pop(0)[1])
        events += engine.step()
        if not arrivals and not engine.busy:
            break
    done = completions(events)
    assert {id: answer.token_ids for id, answer in done.items()} == expected
    for id, answer in done.items():
        assert answer.finish_reason == ("stop" if answer.token_ids[-1] in ends else "length")
        assert streamed(events, id) == (answer.text, answer.token_ids)
    assert {answer.finish_reason for answer in done.values()} == {"stop", "length"}


def test_a_request_does_not_depend_on_its_company(pipe):
    """64 others, any order, any batch size: the tokens are those of the request alone."""
    asked = requests(random_prompts(65, seed=5), max_new_tokens=8, **SAMPLED)
    alone = dict(zip("01234567", tokens_of(one_by_one(pipe, asked[:8])), strict=True))
    together = {c.request.id: c.token_ids for c in pipe.replace(batch_size=65).run(asked)}
    assert len(set(together.values())) == 65
    assert {id: together[id] for id in alone} == alone
    for size in (6, 31):
        shuffled = random.Random(size).sample(asked, len(asked))
        answers = pipe.replace(batch_size=size).run(shuffled)
        assert {answer.request.id: answer.token_ids for answer in answers} == together


def test_parameters_of_a_batch_are_each_requests_own(pipe):
    """Rows that differ in every parameter give what each gives alone."""
    settings = [
        {"temperature": 0.0},
        {"temperature": 0.3, "top_k": 3},
        {"temperature": 1.5, "top_p": 0.8, "logprobs": 3},
        {"temperature": 1.0, "min_p": 0.1, "presence_penalty": 1.0},
        {"temperature": 1e-9, "frequency_penalty": 0.7},
        {"temperature": 1.0, "logit_bias": {7: 5.0, 9: float("-inf")}, "n": 2},
    ]
    asked = [Request([65, at], {"seed": 3, **setting}, id=str(at)) for at, setting in enumerate(settings)]
    together = list(pipe.run(asked))
    for alone, answer in zip(one_by_one(pipe, asked), together, strict=True):
        assert answer.token_ids == alone.token_ids
        assert tokens_of(answer.alternatives) == tokens_of(alone.alternatives)
        assert [len(top) for top in answer.top_logprobs] == [len(top) for top in alone.top_logprobs]


def test_seeds_replay_and_differ(pipe):
    """The same seed draws the same; a dealt seed is reported and replays; other seeds draw otherwise."""
    first = pipe([1, 2, 3], seed=11)
    assert pipe([1, 2, 3], seed=11).token_ids == first.token_ids != pipe([1, 2, 3], seed=12).token_ids
    dealt = pipe([[1, 2, 3]] * 2)
    assert dealt[0].seed != dealt[1].seed and dealt[0].token_ids != dealt[1].token_ids
    assert [pipe([1, 2, 3], seed=answer.seed).token_ids for answer in dealt] == tokens_of(dealt)


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_a_run_resumes_in_mid_sequence(pipe, cut):
    """The prompt with the first tokens of its answer draws the rest of the answer."""
    whole = pipe([9, 8, 7], seed=5, **SAMPLED).token_ids
    assert len(whole) == 12
    rest = pipe([9, 8, 7, *whole[:cut]], seed=5, max_new_tokens=12 - cut, **SAMPLED).token_ids
    assert rest == whole[cut:]


def count_fed(pipe):
    """A list that grows by the number of tokens of each forward, and the hook to remove."""
    fed = []
    hook = pipe.loaded.model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return fed, hook


@pytest.mark.parametrize("chunk", [None, 4])
def test_samples_share_the_prefill(pipe, chunk):
    """n samples feed the prompt once; the first is what n=1 gives, the others are others; so in company."""
    prompt, neighbours = list(range(40, 60)), random_prompts(5, seed=6)
    pipe = pipe.replace(prefix_cache=0)
    fed, hook = count_fed(pipe)
    try:
        alone = pipe(prompt, n=4, seed=2)
    finally:
        hook.remove()
    assert sum(fed) == len(prompt) + 4 * (12 - 1)
    samples = tokens_of([alone, *alone.alternatives])
    assert samples[0] == pipe(prompt, seed=2).token_ids and len(set(samples)) == 4
    engine = open_engine(pipe, chunk)
    for request in requests(neighbours, n=2):
        engine.add(request)
    engine.step()
    engine.add(Request(prompt, {"n": 4, "seed": 2}, id="it"))
    events = drain(engine)
    answer = completions(events)["it"]
    assert tokens_of([answer, *answer.alternatives]) == samples
    assert [streamed(events, "it", index)[1] for index in range(4)] == samples


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunked_prefill_equals_whole(pipe, chunk):
    """However the prompts are cut, the tokens are the same."""
    asked = requests(random_prompts(9, seed=8), **SAMPLED)
    engine = open_engine(pipe, chunk)
    for request in asked:
        engine.add(request)
    done = completions(drain(engine))
    assert [done[request.id].token_ids for request in asked] == tokens_of(one_by_one(pipe, asked))


def test_cancel_ends_one_request_and_no_other(pipe):
    """A running one keeps what it has, a waiting one has nothing, and the others do not notice."""
    asked = requests(random_prompts(5, seed=9))
    expected = tokens_of(one_by_one(pipe, asked))
    engine = open_engine(pipe.replace(batch_size=4))
    for request in asked:
        engine.add(request)
    events = engine.step() + engine.step() + engine.step()
    for id in ("1", "4", "nobody"):
        engine.cancel(id)
    events += drain(engine)
    done = completions(events)
    assert sorted(done) == ["0", "1", "2", "3", "4"]
    for at in (0, 2, 3):
        assert done[str(at)].token_ids == expected[at] and done[str(at)].finish_reason == "length"
    assert done["1"].token_ids == expected[1][:3] and done["1"].finish_reason == "abort"
    assert done["4"].token_ids == () and done["4"].finish_reason == "abort"
    assert streamed(events, "1") == (done["1"].text, done["1"].token_ids)


class Failing:
    """A processor that raises when told to."""

    broken = False

    def __call__(self, logits, batch):
        if self.broken and int(batch.length.max()) > 6:
            raise RuntimeError("a bug of the user's")
        return logits


@pytest.mark.parametrize("call", ["call", "run", "stream"])
def test_an_exception_leaves_the_pipeline_usable(pipe, call):
    """A plug-in raises in the middle of a run: the next run is as if nothing had been."""
    failing = Failing()
    own = pipe.replace(processors=(failing, *pipe.processors))
    prompts = [[1, 2, 3], [4, 5], [6]]
    expected = tokens_of(own(prompts, seed=1))
    failing.broken = True
    with pytest.raises(RuntimeError, match="a bug of the user's"):
        {
            "call": lambda: own(prompts, seed=1),
            "run": lambda: list(own.run(requests(prompts))),
            "stream": lambda: list(own.stream([1, 2, 3])),
        }[call]()
    failing.broken = False
    assert tokens_of(own(prompts, seed=1)) == expected


def test_leaving_an_iterator_early_leaves_the_pipeline_usable(pipe):
    """Closing a stream or a run in the middle forgets it."""
    expected = pipe([1, 2], seed=1).token_ids
    stream = pipe.stream([1, 2], seed=1)
    assert next(stream).token_ids == expected[:1]
    stream.close()
    run = pipe.run(requests(random_prompts(9)))
    next(run)
    run.close()
    assert pipe([1, 2], seed=1).token_ids == expected


def test_ids_are_unique_while_they_are_served(pipe):
    """A second request of a live id is refused; afterwards the id is free."""
    engine = open_engine(pipe)
    engine.add(Request([1], id="a"))
    with pytest.raises(ParameterError, match="'a'"):
        engine.add(Request([2], id="a"))
    drain(engine)
    engine.add(Request([2], id="a"))
    assert completions(drain(engine))["a"].prompt_token_ids == (2,)
    answers = list(pipe.run([Request([1], id="a"), Request([2], id="a"), Request([3], id="b")]))
    assert [answer.finish_reason == "error" for answer in answers] == [False, True, False]


def test_dealt_ids_do_not_clash_with_given_ones(pipe):
    """A request without an id is served whatever ids others chose."""
    names = ["request-2", "", "request-4", "", "request-3", ""]
    answers = list(pipe.run(Request([at], {"max_new_tokens": 2}, id=name) for at, name in enumerate(names)))
    assert [answer.error for answer in answers] == [None] * 6


def test_no_new_tokens_is_an_empty_completion(pipe):
    """``max_new_tokens=0`` runs nothing and says so; neighbours are served."""
    empty, other = pipe([[1, 2], [3]], max_new_tokens=[0, 2], temperature=0)
    assert (empty.token_ids, empty.text, empty.finish_reason) == ((), "", "length")
    assert len(other.token_ids) == 2
    chunks = list(pipe.stream([1, 2], max_new_tokens=0))
    assert [(chunk.text, chunk.token_ids, chunk.finish_reason) for chunk in chunks] == [("", (), "length")]


def test_observers_see_every_event(pipe):
    """Each chunk and each completion, once, in order."""
    seen = []
    answers = pipe.replace(observers=(seen.append,))([[1], [2]], max_new_tokens=3, temperature=0)
    assert [event for event in seen if isinstance(event, Completion)] == answers
    for answer in answers:
        chunks = [event for event in seen if isinstance(event, Chunk) and event.id == answer.request.id]
        assert tuple(token for chunk in chunks for token in chunk.token_ids) == answer.token_ids
        assert [chunk.finish_reason for chunk in chunks] == [None, None, "length"]


@pytest.mark.parametrize("ordered", [True, False])
def test_an_endless_iterator_is_read_in_bounds(pipe, ordered):
    """Never more than four batches ahead of what was delivered, however long the first one takes."""
    size, taken, furthest = 3, 0, 0

    def endless():
        nonlocal taken
        for taken in itertools.count(1):
            long = 40 if taken == 1 else 1
            yield Request([taken % 250], {"max_new_tokens": long, "min_new_tokens": long}, id=str(taken))

    run = pipe.replace(batch_size=size).run(endless(), ordered=ordered)
    for delivered, answer in enumerate(itertools.islice(run, 40)):
        furthest = max(furthest, taken - delivered)
        assert not ordered or answer.request.id == str(delivered + 1)
    run.close()
    assert furthest == 4 * size if ordered else furthest <= 4 * size


def test_ordered_holds_back_and_unordered_does_not(pipe):
    """A long first request: in order the others wait for it, out of order they do not."""
    lengths = [60] + [2] * 19
    asked = [Request([at], {"max_new_tokens": n, "min_new_tokens": n}, id=str(at)) for at, n in enumerate(lengths)]
    small = pipe.replace(batch_size=2)
    assert [answer.request.id for answer in small.run(asked)] == [str(at) for at in range(20)]
    loose = [answer.request.id for answer in small.run(asked, ordered=False)]
    assert sorted(loose, key=int) == [str(at) for at in range(20)] and loose[-1] == "0"


def test_a_bad_request_does_not_stop_a_run(pipe):
    """``run`` yields it with its error, in its place, and goes on; whatever is wrong with it."""
    bad = [{"top_pp": 1}, {"top_p": 2.0}, {"logit_bias": {10**6: 1.0}}, {"stop": [""]}]
    fine = {"max_new_tokens": 2, "temperature": 0}
    asked = [Request([1], fine)]
    for params in bad:
        asked += [Request([1], params), Request([2], fine)]
    answers = list(pipe.run(asked))
    assert [answer.finish_reason for answer in answers] == ["length"] + ["error", "length"] * len(bad)
    assert all(isinstance(answer.error, ParameterError) for answer in answers[1::2])


def test_two_threads_on_one_pipeline(pipe):
    """They take turns; each gets its own."""
    prompts = random_prompts(8, seed=10)
    expected = tokens_of(pipe(prompts, seed=3))
    answers = {}

    def work(name):
        answers[name] = tokens_of(pipe(prompts if name else prompts[::-1], seed=3))

    threads = [threading.Thread(target=work, args=(name,)) for name in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {0: expected[::-1], 1: expected}


def test_more_samples_than_rows(pipe):
    """A request wider than the batch is served alone, and the others after it."""
    small = pipe.replace(batch_size=2)
    asked = [Request([1], {"seed": 1}), Request([2], {"n": 5, "seed": 1}), Request([3], {"seed": 1})]
    one, many, last = small.run(asked)
    assert tokens_of([one, many, last]) == tokens_of(pipe([[1], [2], [3]], seed=1))
    assert tokens_of(many.alternatives) == tokens_of(pipe([2], n=5, seed=1).alternatives)


def test_the_global_random_state_is_untouched(pipe):
    """Neither torch's nor Python's generator moves, sampling or not."""
    before = torch.get_rng_state(), random.getstate()
    pipe([[1], [2]], seed=[None, 4], n=2)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_requests_with_and_without_an_optional_parameter_share_a_batch(pipe) -> None:
    """``max_new_tokens`` unset has no number: rows with and without one join the same table at different times."""
    engine = open_engine(pipe.replace(params={}))
    engine.add(Request("abc", {"max_new_tokens": 30, "temperature": 0}))
    engine.step()
    engine.add(Request("de", {"max_new_tokens": None, "temperature": 0, "stop": ["\x00"]}))
    for _ in range(5):
        engine.step()
    engine.close()
