"""The row map against its definition: what each packed token is, and what it may see."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_infer.layout import Layout, Span

spans = st.lists(
    st.builds(Span, st.integers(0, 9), st.sampled_from([0, 1, 1, 1, 2, 5]), st.booleans()), min_size=1, max_size=8
).filter(lambda spans: any(span.new for span in spans))


def layout_of(spans):
    return Layout(tuple(span._replace(ready=span.ready and span.new > 0) for span in spans), torch.device("cpu"))


def packed(layout):
    """(row, position) of each packed token."""
    return [(row, at) for row, span in enumerate(layout.spans) for at in range(span.old, span.old + span.new)]


@settings(deadline=None, max_examples=60)
@given(spans)
def test_rows_positions_and_last(given_spans):
    layout = layout_of(given_spans)
    tokens = packed(layout)
    assert list(zip(layout.rows.tolist(), layout.positions.tolist(), strict=True)) == tokens
    assert layout.width == max(span.old + span.new for span in layout.spans)
    ready = [row for row, span in enumerate(layout.spans) if span.ready]
    assert (list(range(len(layout.spans))) if layout.ready is None else layout.ready.tolist()) == ready
    ends = [(row, layout.spans[row].end - 1) for row in ready]
    assert [tokens[at] for at in layout.last.tolist()] == ends


@settings(deadline=None, max_examples=60)
@given(spans)
def test_rows_that_feed_one_token_and_those_that_feed_several(given_spans):
    layout = layout_of(given_spans)
    tokens = packed(layout)
    rows = [(row, tokens.index((row, s.old)), s.new, s.end) for row, s in enumerate(layout.spans) if s.new]
    for found, expected in (
        (layout.singles, [row for row in rows if row[2] == 1]),
        (layout.several, [row for row in rows if row[2] > 1]),
    ):
        assert ([] if found is None else list(zip(*found.tolist(), strict=True))) == expected


@settings(deadline=None, max_examples=60)
@given(spans)
def test_pieces_cover_every_token_once(given_spans):
    """In order, and each is one row or rows of one token each."""
    layout = layout_of(given_spans)
    tokens = packed(layout)
    covered = []
    for piece in layout.pieces:
        rows = layout.spans[piece.first : piece.last]
        assert len(rows) == 1 or all(span.new == 1 for span in rows)
        count = sum(span.new for span in rows)
        assert piece.start == len(covered)
        covered += tokens[piece.start : piece.start + count]
    assert covered == tokens


@settings(deadline=None, max_examples=60)
@given(spans, st.none() | st.integers(1, 12))
def test_masks_show_the_past_and_the_window(given_spans, window):
    """A token sees itself and what comes before it in its row, as far as the window reaches."""
    layout = layout_of(given_spans)
    for piece in layout.pieces:
        rows = layout.spans[piece.first : piece.last]
        width = max(span.end for span in rows)
        expected = [
            [[to <= at and (window is None or at - to < window) for to in range(width)] for at in range(s.old, s.end)]
            for s in rows
        ]
        mask = layout.mask(piece, window)
        if mask is not None:
            assert mask[:, 0].tolist() == expected
        elif len(rows) == 1:  # causal from the start of the row, or one token that sees all
            assert rows[0].old == 0 or rows[0].new == 1
            assert expected == [torch.ones(rows[0].new, width, dtype=torch.bool).tril(width - rows[0].new).tolist()]
        else:
            assert all(cell for row in expected for line in row for cell in line)
        assert layout.mask(piece, window) is mask  # made once
