"""Attention of many new tokens by the processor's tiles: the definition, and the same in any company."""

from __future__ import annotations

import pytest
import torch
from checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import completions, drain, open_engine, random_prompts, requests
from test_kernels import definition, make

from llama_infer import Pipeline
from llama_infer.cache.int8 import encode_plainly
from llama_infer.encoded import Encoded
from llama_infer.layout import Layout, Span
from llama_infer.models import kernels
from llama_infer.models.native import attention as native

SOME = torch.zeros(1, 1, 1, 32, dtype=torch.bfloat16)
tiled = pytest.mark.skipif(not native.prefills(SOME, SOME, SOME, None), reason="no C++ compiler, or no tiles")
spans = st.lists(
    st.builds(Span, st.sampled_from([0, 1, 63, 70, 127, 200]), st.sampled_from([0, 1, 2, 9, 40, 140]), st.just(True)),
    min_size=1,
    max_size=5,
).filter(lambda spans: any(span.new for span in spans))


def attend(layout, q, k, v, window=None, scaling=None):
    """q [N, kv heads, group, d]; the same, with zeros where a row feeds one token."""
    out = torch.zeros_like(q)
    native.prefill(q.flatten(1, 2), k, v, out.view(len(q), -1, q.shape[-1]), layout, window, scaling)
    return out


@tiled
@settings(deadline=None, max_examples=40)
@given(
    spans,
    st.sampled_from([(1, 1), (2, 3), (2, 4), (1, 11), (1, 32)]),
    st.none() | st.integers(1, 250),
    st.sampled_from([None, 0.7]),
    st.sampled_from([32, 64, 96, 128, 256]),
)
def test_every_token_is_the_definition(given_spans, heads, window, scaling, dim):
    """Chunks on top of cached tokens, windows, groups; what lies behind the end of a row does not reach it."""
    layout, q, k, v = make(given_spans, *heads, torch.bfloat16, dim)
    exact = every_piece(layout, *(t.double() for t in (q, k, v)), window, scaling)
    for row, span in enumerate(layout.spans):
        k[row, :, span.end :] = v[row, :, span.end :] = torch.nan
    found = attend(layout, q, k, v, window, scaling)
    several = torch.tensor([at for at, row in enumerate(layout.rows.tolist()) if layout.spans[row].new > 1], dtype=int)
    torch.testing.assert_close(found[several].double(), exact[several], rtol=0, atol=0.03)
    others = torch.ones(len(q), dtype=torch.bool)
    others[several] = False
    assert not found[others].any()


def every_piece(layout, q, k, v, window, scaling):
    """``kernels.eager``, itself held against :func:`definition`, which is slow."""
    out = torch.zeros_like(q)
    for piece in layout.pieces:
        new = [span.new for span in layout.spans[piece.first : piece.last]]
        width = max(span.end for span in layout.spans[piece.first : piece.last])
        queries = q[piece.start : piece.start + sum(new)].unflatten(0, (len(new), -1)).permute(0, 2, 3, 1, 4)
        keys, values = (t[piece.first : piece.last, :, :width] for t in (k, v))
        found = kernels.eager(queries, keys, values, layout, piece, window, scaling)
        out[piece.start : piece.start + sum(new)] = found.permute(0, 3, 1, 2, 4).flatten(0, 1)
    return out


@tiled
def test_scores_as_far_apart_as_attention_ever_has_them():
    layout, q, k, v = make([Span(100, 60, True)], 2, 3, torch.bfloat16, 64)
    for spread in (1, 30, 1000):
        far = spread * q
        exact = definition(layout, far.double(), k.double(), v.double(), None, None)
        torch.testing.assert_close(attend(layout, far, k, v).double(), exact, rtol=0, atol=0.03)


@tiled
@pytest.mark.parametrize("window", [None, 37])
def test_a_token_is_the_same_in_any_company(window):
    """Bit for bit: in chunks, beside other rows, in another place."""
    layout, q, k, v = make([Span(0, 300, True)], 2, 3, torch.bfloat16, 64)
    whole = attend(layout, q, k, v, window)
    for cuts in ([0, 128, 300], [0, 5, 77, 205, 298, 300]):
        for start, end in zip(cuts, cuts[1:], strict=False):
            spans = Span(3, 9, True), Span(start, end - start, True), Span(0, 2, True)
            chunk = Layout(spans, torch.device("cpu"))
            queries = torch.cat([q[:9], q[start:end], q[:2]])
            keys, values = (torch.cat([t, t, t])[:, :, : max(end, 12)] for t in (k, v))
            assert torch.equal(attend(chunk, queries, keys, values, window)[9:-2], whole[start:end])


@tiled
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
def test_eight_bits_are_read_as_they_are_held(dim):
    """As if they had become bfloat16 before, bit for bit; what lies behind the end of a row does not reach it."""
    layout, q, k, v = make([Span(0, 150, True), Span(120, 9, True), Span(30, 1, True)], 2, 3, torch.bfloat16, dim)
    k, v = (Encoded(*encode_plainly(t)) for t in (k, v))
    expected = attend(layout, q, k.decode(), v.decode())
    for row, span in enumerate(layout.spans):
        k.scale[row, :, span.end :] = v.scale[row, :, span.end :] = torch.nan
    assert torch.equal(attend(layout, q, k, v), expected)


@tiled
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_what_is_not_finite_stays_so_and_in_its_row(bad, where):
    """As in torch's kernel, so that the engine finds it among the logits."""
    layout, q, k, v = make([Span(20, 9, True)] * 2, 1, 2, torch.bfloat16, 32)
    clean = attend(layout, q, k, v)
    if where == "query":
        q[9, 0, 0, 0] = bad
    else:
        {"key": k, "value": v}[where][1, 0, 0, 0] = bad
    found = attend(layout, q, k, v)
    expected = every_piece(layout, *(t.double() for t in (q, k, v)), None, None)
    assert torch.equal(found[:9], clean[:9])
    torch.testing.assert_close(found[9:].double(), expected[9:], rtol=0, atol=0.03, equal_nan=True)


def test_what_it_does_not_take():
    """Other types, other sizes of heads, groups that are too large, scores that are turned round."""
    cases = (SOME.float(), 1, None), (SOME[..., :24], 1, None), (SOME, 513, None), (SOME, 1, 0.0), (SOME, 1, -0.5)
    for key, heads, scaling in cases:
        query = key.expand(1, heads, 1, key.shape[3])
        assert not native.prefills(query, key, key, scaling)


@tiled
@pytest.mark.parametrize("quantization", ["packed", "int8"])
def test_an_answer_in_bfloat16_is_the_same_in_any_batch(tmp_path, quantization):
    """Tokens and logprobs, to the bit: layers, norms, attention and the sums over the vocabulary each treat a row by
    itself, whatever is fed beside it."""
    write_checkpoint(tmp_path, hidden_size=128, dtype="bfloat16")
    pipe = Pipeline(str(tmp_path), quantization=quantization, device="cpu", stopping=("length",), prefix_cache=0)
    prompts = [[7] * 3, *random_prompts(11, seed=1, longest=90), [5] * 150]
    asked = requests(prompts, max_new_tokens=9, temperature=0.8)
    alone = [next(iter(pipe.run([request]))) for request in asked]
    for rows in (13, 5):
        engine = open_engine(pipe.replace(batch_size=rows))
        for request in asked:
            engine.add(request)
        found = completions(drain(engine))
        for one in alone:
            assert found[one.request.id].token_ids == one.token_ids
            assert len(one.logprobs) == 9 and found[one.request.id].logprobs == one.logprobs
