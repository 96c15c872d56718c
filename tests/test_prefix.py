"""The prefix cache: what is fed, what is kept, and that nobody notices but the clock."""

from __future__ import annotations

import math
import random
import threading

import pytest
from oracles import completions, drain, open_engine, random_prompts, requests, tokens_of
from test_engine import count_fed
from test_packed import make

from llama_infer import Pipeline, Request
from llama_infer.engine.prefix import BLOCK, RUN, PrefixCache
from llama_infer.errors import NonFiniteLogitsError, ParameterError
from llama_infer.testing import tiny_llama

SYSTEM = [(7 * at) % 251 for at in range(70)]


@pytest.fixture
def fresh(pipe):
    """A pipeline that has seen nothing, and one that never remembers."""
    return pipe.replace(prefix_cache=4096), pipe.replace(prefix_cache=0)


def fed_by(pipe, work):
    """The tokens that each forward of the work was fed."""
    fed, hook = count_fed(pipe)
    try:
        work()
    finally:
        hook.remove()
    return fed


def test_the_tree_knows_the_longest_beginning():
    """Against a list of everything kept, in a capacity that holds it all."""
    draw, store, kept = random.Random(1), PrefixCache(1 << 20), [()]
    for _ in range(300):
        base = draw.choice(kept)
        tokens = base[: draw.randint(0, len(base))] + tuple(draw.randrange(2) for _ in range(draw.randint(0, 60)))
        best = max(shared(tokens, other) // BLOCK * BLOCK for other in kept)
        match = store.match(tokens)
        taken = [token for (start, piece), count in match.pieces for token in piece[:count]]
        assert (match.tokens, tuple(taken)) == (best, tokens[:best])
        starts = [start for (start, _), _ in match.pieces]
        assert starts == sorted(starts)
        assert (match.frontier is None) == (len(tokens) < best + BLOCK)
        store.keep(tokens, lambda start, end, tokens=tokens: (start, tokens[start:end]))
        kept.append(tokens)


def shared(one, other):
    """Length of the common beginning."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_the_tree_is_bounded_and_forgets_what_was_used_least_recently():
    store = PrefixCache(4 * RUN)
    keep = lambda tokens: store.keep(tokens, lambda start, end: tokens[start:end])  # noqa: E731
    one, two = tuple(range(1000, 1000 + 2 * RUN)), tuple(range(2000, 2000 + 2 * RUN))
    keep(one)
    keep(two)
    assert store.tokens == 4 * RUN
    assert store.match(one).tokens == 2 * RUN  # now two is the older, and its end goes first
    keep(tuple(range(RUN)))
    assert (store.match(one).tokens, store.match(two).tokens) == (2 * RUN, RUN)
    keep(tuple(range(9 * RUN)))  # more than there is room for: its beginning
    assert store.match(tuple(range(9 * RUN))).tokens == store.tokens == 4 * RUN
    assert store.match(one).tokens == store.match(two).tokens == 0
    draw = random.Random(2)
    for _ in range(500):
        keep(tuple(draw.randrange(2) for _ in range(draw.randrange(100))) * draw.randint(1, 30))
        assert store.tokens == sum(run.tokens for run in store._runs) <= 4 * RUN
        assert BLOCK * len(store._blocks) == store.tokens
        numbers = {block.number for block in store._blocks.values()}
        assert all(before in numbers | {0} for before, _ in store._blocks), "a block without its beginning"
    store.clear()
    assert (store.tokens, store.match(one).tokens) == (0, 0)


@pytest.mark.parametrize("chunk", [None, 5])
def test_the_same_tokens_with_and_without(fresh, chunk):
    """Prompts that begin alike in several ways, twice over, in mixed batches with samples and penalties."""
    prefixed, plain = fresh
    draw = random.Random(3)
    prompts = [SYSTEM[: draw.randint(0, 70)] + tail for tail in random_prompts(24, seed=3)]
    asked = requests(prompts, temperature=0.9, top_p=0.9, repetition_penalty=1.2, max_new_tokens=6)
    asked = [Request(r.prompt, {**r.params, "n": 1 + at % 3 % 2}, id=r.id) for at, r in enumerate(asked)]
    expected = list(plain.run(asked))
    for size in (5, 24):
        engine = open_engine(prefixed.replace(batch_size=size), chunk)
        for _ in range(2):
            for request in asked:
                engine.add(request)
            done = completions(drain(engine))
            for answer in expected:
                found = done[answer.request.id]
                assert found.token_ids == answer.token_ids
                assert tokens_of(found.alternatives) == tokens_of(answer.alternatives)
                assert found.logprobs == pytest.approx(answer.logprobs, abs=1e-4)
        assert all(done[r.id].cached_tokens >= (len(r.prompt) - 1) // BLOCK * BLOCK for r in asked)


@pytest.mark.parametrize("kind", ["mistral", "gemma3", "llama3 rope"])
def test_windows_and_scaled_ropes(kind):
    """A prefix longer than the window, float64."""
    prefixed = Pipeline(make(kind), params={"max_new_tokens": 8, "temperature": 0})
    plain = prefixed.replace(cache="plain")
    assert plain._assembly.prefixes is None  # the reference has no store
    prompts = [[*SYSTEM, at] for at in range(4)]
    expected = tokens_of(plain(prompts))
    assert tokens_of(prefixed(prompts)) == expected
    again = prefixed(prompts)
    assert tokens_of(again) == expected and [answer.cached_tokens for answer in again] == [64] * 4


def test_only_what_is_new_is_fed(fresh):
    prefixed, _ = fresh
    fed = fed_by(prefixed, lambda: prefixed([*SYSTEM, 1], max_new_tokens=1))
    assert fed == [71]
    fed = fed_by(prefixed, lambda: prefixed([*SYSTEM, 2], max_new_tokens=1))
    assert fed == [71 - 64]
    answer = prefixed([*SYSTEM, 2], max_new_tokens=1)
    assert answer.cached_tokens == 64
    fed = fed_by(prefixed, lambda: prefixed(SYSTEM[:64], max_new_tokens=1))
    assert fed == [16], "the last token is fed always"
    fed = fed_by(prefixed, lambda: prefixed([2, *SYSTEM], max_new_tokens=1))
    assert fed == [71], "only at the beginning"


def test_prompts_that_come_together_wait_for_the_first(fresh):
    """One row is fed what all begin with; the others take it over in the next step."""
    prefixed, plain = fresh
    prompts = [[*SYSTEM, at, at] for at in range(8)]
    fed = fed_by(prefixed, lambda: prefixed(prompts, max_new_tokens=1, temperature=0))
    assert fed == [72, 7 * 8]
    assert tokens_of(prefixed(prompts, temperature=0)) == tokens_of(plain(prompts, temperature=0))


def test_a_waiting_row_goes_on_when_its_leader_is_cancelled(fresh):
    prefixed, plain = fresh
    engine = open_engine(prefixed, chunk=16)
    for at in range(3):
        engine.add(Request([*SYSTEM, at], {"temperature": 0}, id=str(at)))
    engine.step()
    engine.cancel("0")
    done = completions(drain(engine))
    expected = tokens_of(plain([[*SYSTEM, at] for at in range(3)], temperature=0))
    assert [done[str(at)].token_ids for at in (1, 2)] == expected[1:]


def test_a_chat_feeds_only_the_new_turn(tokenizer):
    """Each turn feeds what the last one did not, up to a block."""
    pipe = Pipeline(tiny_llama(), tokenizer=tokenizer, params={"max_new_tokens": 9, "temperature": 0})
    plain = pipe.replace(prefix_cache=0)
    chat, other = pipe.chat(), plain.chat()
    before = 0
    for turn in range(5):
        text = f"turn number {turn} of a talk"
        answer, expected = chat(text), other(text)
        assert answer.token_ids == expected.token_ids and expected.cached_tokens == 0
        if turn:
            assert answer.cached_tokens >= before - BLOCK
        before = len(answer.prompt_token_ids)


def test_a_failed_row_leaves_nothing_behind(tokenizer):
    """The model answers NaN to one token; what was fed in that row is never taken over."""
    model = tiny_llama()
    pipe = Pipeline(model, tokenizer=tokenizer, params={"max_new_tokens": 4, "temperature": 0})
    model.get_input_embeddings().weight[200] = math.nan
    assert isinstance(pipe([*SYSTEM, 200]).error, NonFiniteLogitsError)
    assert pipe._assembly.prefixes.tokens == 0
    for prompts in ([[*SYSTEM, 200], [*SYSTEM, 3]], [[*SYSTEM, 4], [200] * 40]):
        answers = pipe(prompts)
        assert [isinstance(answer.error, NonFiniteLogitsError) for answer in answers] == [200 in p for p in prompts]
    model.get_input_embeddings().weight[200] = 0.0
    again = pipe([*SYSTEM, 200])
    assert again.error is None and again.cached_tokens == 64
    assert again.token_ids == pipe.replace(prefix_cache=0)([*SYSTEM, 200]).token_ids


def test_pipelines_do_not_share(pipe):
    one = pipe.replace()
    assert one([*SYSTEM, 1]).cached_tokens == 0 != one([*SYSTEM, 1]).cached_tokens
    assert one.replace()([*SYSTEM, 1]).cached_tokens == 0


@pytest.mark.parametrize("capacity", [16, 48, 300])
def test_a_small_store_is_exact_too(fresh, capacity):
    prefixed, plain = fresh[0].replace(prefix_cache=capacity, batch_size=3), fresh[1]
    prompts = [SYSTEM[: 10 * (at % 7)] + tail for at, tail in enumerate(random_prompts(20, seed=9, longest=60))]
    expected = tokens_of(plain.run(requests(prompts)))
    for _ in range(2):
        assert tokens_of(prefixed.run(requests(prompts))) == expected
        assert prefixed._assembly.prefixes.tokens <= capacity


def test_threads_share_one_store(fresh):
    prefixed, plain = fresh
    prompts = [[*SYSTEM, *tail] for tail in random_prompts(8, seed=11)]
    expected = tokens_of(plain(prompts, seed=1))
    found = {}
    threads = [
        threading.Thread(target=lambda name=name: found.update({name: tokens_of(prefixed(prompts, seed=1))}))
        for name in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [expected] * 3


@pytest.mark.parametrize("value", [-1, 1.5, None, "8192"])
def test_a_bad_size_is_refused(pipe, value):
    with pytest.raises(ParameterError, match="prefix_cache"):
        pipe.replace(prefix_cache=value)
