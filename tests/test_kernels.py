"""Every way to attend against the definition, a query at a time, in float64; and in bfloat16 as near as its digits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_infer.layout import Layout, Span
from llama_infer.models import kernels

spans = st.lists(
    st.builds(Span, st.integers(0, 70), st.sampled_from([0, 1, 1, 1, 1, 2, 40]), st.just(True)), min_size=1, max_size=7
).filter(lambda spans: any(span.new for span in spans))


def make(given_spans, kv_heads, group, dtype=torch.float64, dim=8):
    """A layout, and random queries [N, kv heads, group, d], keys and values [rows, kv heads, width, d]."""
    layout = Layout(tuple(given_spans), torch.device("cpu"))
    draw = torch.Generator().manual_seed(len(given_spans) + kv_heads)
    tokens, rows = sum(span.new for span in given_spans), len(given_spans)
    q = torch.randn(tokens, kv_heads, group, dim, generator=draw, dtype=torch.float64)
    k, v = torch.randn(2, rows, kv_heads, layout.width, dim, generator=draw, dtype=torch.float64)
    return layout, q.to(dtype), k.to(dtype), v.to(dtype)


def attend(kernel, layout, q, k, v, window, scaling):
    """All pieces; [N, kv heads, group, d]."""
    outs = []
    for piece in layout.pieces:
        rows = slice(piece.first, piece.last)
        ends = layout.spans[rows]
        count, width = sum(span.new for span in ends), max(span.end for span in ends)
        queries = q[piece.start : piece.start + count].unflatten(0, (len(ends), -1)).permute(0, 2, 3, 1, 4)
        out = kernel(queries, k[rows, :, :width], v[rows, :, :width], layout, piece, window, scaling)
        outs.append(out.permute(0, 3, 1, 2, 4).flatten(0, 1))
    return torch.cat(outs)


def definition(layout, q, k, v, window, scaling):
    """softmax(q k^T) v of each token and head by itself."""
    out, start = torch.zeros_like(q), 0
    for row, span in enumerate(layout.spans):
        for at in range(span.old, span.end):
            first = 0 if window is None else max(0, at + 1 - window)
            for head in range(q.shape[1]):
                keys, values = k[row, head, first : at + 1], v[row, head, first : at + 1]
                weights = (q[start, head] @ keys.T * (q.shape[-1] ** -0.5 if scaling is None else scaling)).softmax(-1)
                out[start, head] = weights @ values
            start += 1
    return out


@pytest.mark.parametrize("name", ["eager", "sdpa", "products"])
@settings(deadline=None, max_examples=40)
@given(spans, st.sampled_from([(1, 1), (2, 3), (2, 4)]), st.none() | st.integers(1, 90), st.sampled_from([None, 0.7]))
def test_every_kernel_is_the_definition(name, given_spans, heads, window, scaling):
    """Ragged rows, chunks on top of cached tokens, windows, groups of heads."""
    layout, q, k, v = make(given_spans, *heads)
    found = attend(getattr(kernels, name), layout, q, k, v, window, scaling)
    torch.testing.assert_close(found, definition(layout, q, k, v, window, scaling), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(spans, st.none() | st.integers(1, 90))
def test_products_keep_the_digits_of_bfloat16(given_spans, window):
    """What the CPU runs by default."""
    layout, q, k, v = make(given_spans, 2, 4, torch.bfloat16)
    found = attend(kernels.products, layout, q, k, v, window, None)
    exact = definition(layout, q.double(), k.double(), v.double(), window, None)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=0.05)


def test_blocks_longer_than_one_block_of_queries():
    """A prompt of many blocks, and one on top of cached tokens."""
    for span in (Span(0, 300, True), Span(50, 290, True)):
        layout, q, k, v = make([span], 1, 2)
        for window in (None, 70):
            found = attend(kernels.products, layout, q, k, v, window, None)
            torch.testing.assert_close(found, attend(kernels.eager, layout, q, k, v, window, None), rtol=0, atol=1e-12)


def test_rows_of_like_length_share_a_call():
    """Neighbours are grouped unless padding costs more than a call and than a quarter of the work."""

    def pieces(*lengths):
        layout = Layout(tuple(Span(length, 1, True) for length in lengths), torch.device("cpu"))
        return [(piece.first, piece.last) for piece in layout.pieces]

    assert pieces(10, 60, 30, 90) == [(0, 4)]
    assert pieces(900, 20, 30, 25, 1000) == [(0, 1), (1, 4), (4, 5)]
    assert pieces(*[500] * 8, 550, *[500] * 8) == [(0, 17)]
    assert pieces(*[500] * 8, 900, *[500] * 8) == [(0, 8), (8, 9), (9, 17)]
