"""The table against lists: a row is a list, and every operation is what it would be on a list of rows."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace as changed

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_infer import Batch, Output, Plan
from llama_infer.batch import Padded
from llama_infer.columns import known_values, make_batch

token_rows = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=6)


@dataclass
class Row:
    """A row as a list."""

    tokens: list[int]
    prompt: int
    seed: int
    branch: int
    request: int
    heat: float
    allowed: list[int]


def rows_of(token_lists, offset=0):
    """Rows whose every field tells them apart."""
    return [
        Row(tokens, len(tokens) // 2, 10 + at + offset, 0, at + offset, at / 2 + offset, list(range(at + offset)))
        for at, tokens in enumerate(token_lists)
    ]


def table_of(rows):
    """The same rows as a table."""
    return Batch.of(
        [row.tokens for row in rows],
        prompt_lengths=[row.prompt for row in rows],
        seeds=[row.seed for row in rows],
        requests=[row.request for row in rows],
        columns={"heat": torch.tensor([row.heat for row in rows]), "allowed": Padded.of([row.allowed for row in rows])},
        values={"heat": frozenset(row.heat for row in rows)},
    )


def check(table, rows):
    """The table says what the rows say."""
    assert len(table) == len(rows)
    assert table.width >= max(map(len, (row.tokens for row in rows)))
    padded = [row.tokens + [-1] * (table.width - len(row.tokens)) for row in rows]
    assert table.tokens.tolist() == padded
    assert table.length.tolist() == table.position.tolist() == [len(row.tokens) for row in rows]
    for name in ("seed", "branch", "request"):
        assert getattr(table, name).tolist() == [getattr(row, name) for row in rows]
    assert table.prompt_length.tolist() == [row.prompt for row in rows]
    assert table["heat"].tolist() == [row.heat for row in rows]
    assert [[item for item in line if item >= 0] for line in table["allowed"].tolist()] == [r.allowed for r in rows]
    generated = [[row.prompt <= at < len(row.tokens) for at in range(table.width)] for row in rows]
    assert table.generated().tolist() == generated
    assert {row.heat for row in rows} <= table.values["heat"]


def fork(rows, parents):
    """Siblings that share a branch are numbered in the order in which they stand."""
    taken = [changed(rows[parent]) for parent in parents]
    for request in {row.request for row in taken}:
        siblings = [row for row in taken if row.request == request]
        if len({row.branch for row in siblings}) < len(siblings):
            for rank, row in enumerate(siblings):
                row.branch = rank
    return taken


@settings(deadline=None, max_examples=30)
@given(token_rows, token_rows, st.data())
def test_select_extend_and_fork(first, second, data):
    rows = rows_of(first)
    table = table_of(rows)
    check(table, rows)
    index = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
    check(table.select(torch.tensor(index)), [rows[at] for at in index])
    check(table.fork(torch.tensor(index)), fork(rows, index))
    more = rows_of(second, offset=50)
    joined = table.extend(table_of(more))
    check(joined, rows + more)
    twice = data.draw(st.lists(st.integers(0, len(rows + more) - 1), min_size=1, max_size=8))
    check(joined.fork(torch.tensor(twice)).select(torch.tensor([0])), fork(rows + more, twice)[:1])
    check(table, rows)  # nothing has been written into it


@settings(deadline=None, max_examples=30)
@given(token_rows, st.data())
def test_advance(first, data):
    """Several steps, each with or without parents, rows that get no token, and state."""
    rows, table = rows_of(first), None
    table = table_of(rows)
    for step in range(data.draw(st.integers(1, 4))):
        parents = data.draw(st.none() | st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=5))
        rows = fork(rows, range(len(rows)) if parents is None else parents)
        tokens = data.draw(st.lists(st.integers(-1, 99), min_size=len(rows), max_size=len(rows)))
        before = table
        table = table.advance(
            Plan(
                torch.tensor(tokens)[:, None],
                None if parents is None else torch.tensor(parents),
                {"heat": torch.full((len(rows),), float(step))},
            )
        )
        table = changed(table, values={"heat": frozenset({float(step)})})
        rows = [
            changed(row, tokens=row.tokens + [token] * (token >= 0), heat=float(step))
            for row, token in zip(rows, tokens, strict=True)
        ]
        check(table, rows)
        assert before is not table


def test_advance_by_several_tokens():
    table = Batch.of([[1, 2], [3]]).advance(Plan(torch.tensor([[4, 5, 6], [7, 8, 9]])))
    assert [row[:length] for row, length in zip(table.tokens.tolist(), table.length.tolist(), strict=True)] == [
        [1, 2, 4, 5, 6],
        [3, 7, 8, 9],
    ]


def test_siblings_of_siblings_differ():
    """A fork of forked rows leaves branches that differ as they are."""
    table = Batch.of([[1], [2]], requests=[7, 8]).fork(torch.tensor([0, 1, 0, 0]))
    assert table.branch.tolist() == [0, 0, 1, 2]
    assert table.fork(torch.tensor([3, 1])).branch.tolist() == [2, 0]
    assert sorted(table.fork(torch.tensor([0, 2, 2, 3])).branch.tolist()) == [0, 1, 2, 3]
    draws = table.uniform("x")
    assert len(set(draws.tolist()[2:] + draws.tolist()[:1])) == 3


@settings(deadline=None, max_examples=30)
@given(token_rows, st.data())
def test_at_and_index_align_rows_with_logits(first, data):
    rows = rows_of(first)
    table = table_of(rows)
    kept = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1)))
    output = Output(torch.zeros(len(kept), 3), torch.tensor(kept))
    check(table.at(output), [rows[at] for at in kept])
    assert output.index(len(rows)).tolist() == [kept.index(at) if at in kept else -1 for at in range(len(rows))]
    everything = Output(torch.zeros(len(rows), 3))
    assert table.at(everything) is table
    assert everything.index(len(rows)).tolist() == list(range(len(rows)))


def test_what_the_host_knows():
    """``all_equal`` is true only when no row can differ."""
    table = table_of(rows_of([[1], [2]]))
    assert not table.all_equal("heat", 0.0)
    assert table_of(rows_of([[1]])).all_equal("heat", 0.0)
    assert not table.all_equal("unheard of", 0.0)
    assert known_values(["a", "m"], [{"a": 1, "m": {2: 0.5}}, {"a": 3, "m": {}}]) == {
        "a": {1, 3},
        "m": {((2, 0.5),), ()},
    }


def test_a_table_is_frozen():
    table = Batch.of([[1]])
    with pytest.raises(AttributeError):
        table.width = 3


def test_parameters_become_columns_of_their_dtype(pipe):
    """Numbers and truths are tensors; what only the host reads has no column."""
    defaults = {name: param.default for name, param in pipe.declared.items()}
    rows = [{**defaults, "temperature": 0.5, "top_k": 3}, defaults]
    table = make_batch(pipe._assembly.chain, pipe.declared, rows, [[1, 2], [3]], seeds=[4, 5], requests=[1, 2])
    assert table["temperature"].dtype == torch.float32 and table["temperature"].tolist() == [0.5, 1.0]
    assert table["top_k"].dtype == torch.int64 and table["top_k"].tolist() == [3, 0]
    assert table.values["top_k"] == {0, 3} and table.seed.tolist() == [4, 5]
    assert "stop" not in table.columns and "seed" not in table.columns
