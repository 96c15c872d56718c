"""The slot caches against a dictionary of lists, and the 8-bit one against the exact one."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import completions, drain, open_engine, random_prompts, requests, tokens_of

from llama_infer import Pipeline
from llama_infer.cache.int8 import Int8SlotCache, encode, encode_plainly
from llama_infer.cache.place import place
from llama_infer.cache.slots import SlotCache
from llama_infer.encoded import Encoded
from llama_infer.layout import Layout, Span
from llama_infer.models.native import attention, elementwise, tiled
from llama_infer.testing import tiny_llama

HEADS, DIM, LAYERS = 2, 4, 2


def bound(kind, device="cpu"):
    config = SimpleNamespace(num_hidden_layers=LAYERS)
    return kind().bind(
        SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config), device=torch.device(device))
    )


def feed(cache, news, draw):
    """Feeds ``news[row]`` random tokens to each row; what went in, row by row and layer by layer, and what came out."""
    spans = tuple(Span(old, new, True) for old, new in zip(cache.lengths, news, strict=True))
    layout = Layout(spans, torch.device("cpu"))
    next(iter(cache.calls(layout, torch.zeros(sum(news), dtype=torch.int64))))
    fed, out = [], []
    for layer in cache.past.layers:
        states = torch.randn(2, 1, HEADS, sum(news), DIM, generator=draw)
        out.append(layer.update(*states))
        fed.append(states[:, 0])
    return [[states[..., sum(news[:row]) : sum(news[: row + 1]), :] for states in fed] for row in range(len(news))], out


commands = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), st.integers(1, 3), st.sampled_from([0, 0, 30, 200])),
        st.tuples(st.just("feed"), st.lists(st.sampled_from([0, 1, 1, 1, 7, 70]), min_size=8, max_size=8)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 99), max_size=6)),
        st.tuples(st.just("paste"), st.integers(0, 99), st.integers(0, 99), st.integers(1, 90)),
        st.tuples(st.just("erase"), st.integers(0, 99)),
    ),
    max_size=14,
)


@pytest.mark.parametrize("kind", [SlotCache, Int8SlotCache])
@settings(deadline=None, max_examples=60)
@given(commands)
@example([("extend", 2, 0), ("feed", [1, 0, 0, 0, 0, 0, 0, 0]), ("extend", 1, 0), ("select", [2, 0])])
def test_rows_keep_what_is_theirs(kind, given_commands):
    """Whatever joins, leaves, moves, forks, takes over from others and grows: every row has its own past."""
    cache, draw = bound(kind), torch.Generator().manual_seed(1)
    rows: list[list[torch.Tensor]] = []  # of each row, layer by layer, [2, heads, tokens, d]
    empty = [torch.zeros(2, HEADS, 0, DIM)] * LAYERS
    for name, *values in given_commands:
        if name == "extend":
            cache.extend(values[0], values[1])
            rows += [empty] * values[0]
        elif name == "select" and rows:
            index = [row % len(rows) for row in values[0]]
            cache.select(index)
            rows = [rows[row] for row in index]
        elif name == "paste" and rows:
            source, target = values[0] % len(rows), values[1] % len(rows)
            held = cache.lengths[source]
            if held and source != target:
                kept, count = cache.copy(source, 0, held), min(values[2], held)
                cache.paste(target, cache.lengths[target], kept, count)
                rows[target] = [
                    torch.cat([a, b[:, :, :count]], 2) for a, b in zip(rows[target], rows[source], strict=True)
                ]
        elif name == "erase" and rows:
            cache.erase([values[0] % len(rows)])
            rows[values[0] % len(rows)] = [torch.zeros_like(held) for held in rows[values[0] % len(rows)]]
        elif name == "feed" and rows and sum((values[0] * len(rows))[: len(rows)]):
            fed, out = feed(cache, (values[0] * len(rows))[: len(rows)], draw)
            rows = [[torch.cat(pair, 2) for pair in zip(*both, strict=True)] for both in zip(rows, fed, strict=True)]
            for layer, both in enumerate(out):
                for part, found in enumerate(both):
                    assert found.isfinite().all()
                    for row, held in enumerate(rows):
                        expected = held[layer][part]
                        tolerance = (
                            expected.abs().max().item() / 250 if kind is Int8SlotCache and expected.numel() else 0
                        )
                        got = found[row, :, : expected.shape[1]]
                        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
        assert cache.lengths == [held[0].shape[2] for held in rows]


def test_rows_that_say_how_long_they_get_are_never_copied():
    """One making of the buffers serves until the end; without a word they double."""
    draw = torch.Generator().manual_seed(2)
    for room, sizes in ((500, 1), (0, 4)):
        cache = bound(SlotCache)
        cache.extend(3, room)
        seen = set()
        for _ in range(10):
            feed(cache, [50, 1, 50], draw)
            seen.add(cache.past.layers[0].size)
        assert len(seen) == sizes


@pytest.mark.parametrize("room, made", [(0, 64), (100, 100), (10_000, 1024)])
def test_little_is_reserved_on_other_devices(room, made):
    """Their memory is taken at once, not as it is written."""
    cache = bound(SlotCache, "meta")
    cache.extend(1, room)
    cache._make_room(1, 5)
    assert cache.past.layers[0].size == (1, made)


def test_what_holds_nothing_is_made_anew():
    """Many short rows and then a long one: never as many as once and as long as now."""
    cache = bound(SlotCache, "meta")
    cache.extend(64, 10)
    cache._make_room(64, 10)
    assert cache.past.layers[0].size == (64, 64)
    cache.select([])
    cache.extend(1, 1000)
    cache._make_room(1, 100)
    assert cache.past.layers[0].size == (1, 1000)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_room_that_is_not_used_takes_no_memory():
    """Ten tokens in each of 64 slots made for 100,000 (0.8 GB): few pages; without rows, none."""

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    cache, before = bound(SlotCache), resident()
    cache.extend(64, 100_000)
    feed(cache, [10] * 64, torch.Generator().manual_seed(3))
    assert sum(t.untyped_storage().nbytes() for t in (cache.past.layers[0].keys, cache.past.layers[0].values)) > 4e8
    assert resident() - before < 30e6
    cache.select([])
    assert cache.past.layers[0].size == (0, 0) and cache.past.layers[0].keys is None


def answers(pipe, asked):
    """Every sample of requests that join in two lots."""
    engine = open_engine(pipe)
    for request in asked[:3]:
        engine.add(request)
    events = engine.step() + engine.step()
    for request in asked[3:]:
        engine.add(request)
    done = completions(events + drain(engine))
    return [sample for request in asked for sample in (done[request.id], *done[request.id].alternatives)]


def test_int8_is_close_and_the_same_in_company():
    """Log-probabilities of the exact cache's own tokens stay within a few hundredths; a request alone, in company,
    forked and behind a known beginning gives the same tokens."""
    asked = requests(random_prompts(6, seed=1, longest=40), n=2, max_new_tokens=10, temperature=0.8)
    exact = Pipeline(tiny_llama(dtype="float64"), batch_size=9)
    rounded = exact.replace(cache="slots-int8")
    found = answers(rounded, asked)
    alone = [sample for request in asked for one in rounded.run([request]) for sample in (one, *one.alternatives)]
    assert tokens_of(found) == tokens_of(alone)
    differences, same = [], 0
    for one, other in zip(found, answers(exact, asked), strict=True):
        same += one.token_ids[0] == other.token_ids[0]
        for mine, its, a, b in zip(one.token_ids, other.token_ids, one.logprobs, other.logprobs, strict=False):
            if mine != its:
                break
            differences.append(abs(a - b))
    assert same >= len(found) - 1 and 0 < sum(differences) / len(differences) < 0.03


def test_int8_takes_half_the_memory():
    """Of bfloat16 with heads of 64: 64 + 2 bytes a vector instead of 128."""
    sizes = {}
    for kind in (SlotCache, Int8SlotCache):
        cache = bound(kind)
        cache.extend(1, 100)
        next(iter(cache.calls(Layout((Span(0, 5, True),), torch.device("cpu")), torch.zeros(5, dtype=torch.int64))))
        layer = cache.past.layers[0]
        layer.update(*torch.randn(2, 1, HEADS, 5, 64).bfloat16())
        sizes[kind] = sum(buffer.nbytes for buffer in layer._keys + layer._values)
    assert sizes[Int8SlotCache] == sizes[SlotCache] * 66 / 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1, 1e-30, 1e-38, 1e-40, 1e30])
def test_eight_bits_are_found_as_plainly(dtype, size):
    """However tokens and heads lie; of what is not finite, the scale is not."""
    states = (size * torch.randn(300, 4, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).to(dtype)
    states[3], states[5, 0, 0], states[6, 1, 3] = 0, torch.nan, -torch.inf
    for given_states in (states, states.transpose(0, 1).contiguous().transpose(0, 1), states[..., ::2], states[:0]):
        steps, scale = encode(given_states)
        expected_steps, expected_scale = encode_plainly(given_states)
        finite = expected_scale.isfinite().expand_as(steps)
        torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(steps[finite], expected_steps[finite]) and steps.dtype == torch.int8


@pytest.mark.skipif(not elementwise.available(), reason="no C++ compiler, or no cache folder of one's own")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_reads_eight_bits_as_they_are_held(monkeypatch, dtype):
    """Nothing becomes what it was while rows feed one token each, and of a prompt its own row at most; and what comes
    out is what comes out where everything does."""
    shapes, decode = [], Encoded.decode
    monkeypatch.setattr(Encoded, "decode", lambda held: shapes.append(tuple(held.shape)) or decode(held))
    monkeypatch.setattr(tiled, "available", lambda: False)
    pipe = Pipeline(tiny_llama(dtype=dtype), cache="slots-int8", batch_size=4, stopping=("length",), prefix_cache=0)
    asked = requests(random_prompts(5, seed=2, longest=40), max_new_tokens=9, temperature=0)
    found = list(pipe.run(asked))
    prompts = {len(one.prompt_token_ids) for one in found}
    assert shapes and all(shape[0] == 1 and shape[2] in prompts for shape in shapes)
    monkeypatch.setattr(attention, "kernel", lambda *given: None)
    shapes.clear()
    tolerance = 1e-4 if dtype == "float32" else 0.1
    for one, other in zip(found, pipe.run(asked), strict=True):
        for mine, its, a, b in zip(one.token_ids, other.token_ids, one.logprobs, other.logprobs, strict=True):
            assert abs(a - b) < tolerance
            if mine != its:
                break
    assert any(shape[2] not in prompts for shape in shapes)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5),
    st.sampled_from([1, 2, 64]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    st.sampled_from(["dense", "by head", "every other number"]),
    st.integers(0, 40),
)
def test_tokens_are_placed_as_indexing_would(heads, dim, dtype, how, count):
    """Into some of the slots and positions, however states and buffer lie."""
    draw = torch.Generator().manual_seed(count)
    buffer = torch.randint(-99, 99, (6, heads, 50, dim), generator=draw).to(dtype)
    places = torch.randperm(6 * 50, generator=draw)[:count]
    slots, positions = places // 50, places % 50
    states = torch.randint(-99, 99, (count, heads, dim), generator=draw).to(dtype)
    if how == "by head":
        states = states.transpose(0, 1).contiguous().transpose(0, 1)
    elif how == "every other number":
        states = states.repeat_interleave(2, -1)[..., ::2]
        buffer = buffer.transpose(1, 2).contiguous().transpose(1, 2)
    expected = buffer.clone()
    expected[slots, :, positions] = states
    place(buffer, slots, positions, states)
    assert torch.equal(buffer, expected)
