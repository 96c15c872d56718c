"""One part over hypothesis-made histories, held against a definition in plain Python, one row at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from llama_infer.batch import Batch
from llama_infer.chain import Chain
from llama_infer.columns import make_batch
from llama_infer.errors import ParameterError
from llama_infer.parameters import declare, validate
from llama_infer.parts import Context
from llama_infer.samplers import Greedy

MODEST = settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck), derandomize=True)


@dataclass
class Case:
    """Rows of logits, each with a history of which the first ``prompt_lengths`` tokens are prompt."""

    logits: torch.Tensor
    histories: list[list[int]]
    prompt_lengths: list[int]

    def __len__(self) -> int:
        return len(self.histories)


@st.composite
def cases(draw: Any, longest: int = 24, largest_vocabulary: int = 9, smallest_vocabulary: int = 2) -> Case:
    """Ragged rows, empty ones too; few tokens, so that they repeat; ties and -inf among the logits."""
    vocabulary = draw(st.integers(smallest_vocabulary, largest_vocabulary))
    history = st.lists(st.integers(0, vocabulary - 1), max_size=longest)
    histories = draw(st.lists(history, min_size=1, max_size=4))
    prompts = [draw(st.integers(0, len(row))) for row in histories]
    value = st.sampled_from([-math.inf, -3.5, -1.0, 0.0, 0.25, 2.0, 7.5]) | st.floats(-30, 30, width=32)
    rows = [draw(st.lists(value, min_size=vocabulary, max_size=vocabulary)) for _ in histories]
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return Case(torch.tensor(rows, dtype=dtype), histories, prompts)


def table(part: Any, case: Case, params: Sequence[Mapping[str, Any]], **context: Any) -> tuple[Chain, Batch]:
    """The part bound, alone in a chain, and the batch of the case."""
    known = {"tokenizer": None, "vocab_size": case.logits.shape[1], **context}
    chain = Chain([part], Greedy()).bind(Context(**known))
    declared = declare([part])
    defaults = {name: param.default for name, param in declared.items()}
    rows = [{**defaults, **validate(declared, row)} for row in params]
    return chain, make_batch(chain, declared, rows, case.histories, prompt_lengths=case.prompt_lengths)


def scores(part: Any, case: Case, params: Sequence[Mapping[str, Any]], **context: Any) -> torch.Tensor:
    """What the part makes of the logits, which must stay as they are."""
    chain, batch = table(part, case, params, **context)
    before = case.logits.clone()
    after = chain.scores(case.logits, batch)
    assert torch.equal(before, case.logits), "the chain wrote into the logits that it was given"
    assert after.shape == before.shape and after.dtype == before.dtype
    return after


def check(
    part: Any,
    case: Case,
    params: Sequence[Mapping[str, Any]],
    define: Callable[[list[float], list[int], int, Mapping[str, Any]], list[float]],
    **context: Any,
) -> None:
    """A batch equals the definition in each row, its rows alone, and itself reordered, dropped, forked and admitted."""
    got = scores(part, case, params, **context)
    assert not got.isnan().any()
    defaults = {name: param.default for name, param in part.params.items()}
    for row, history in enumerate(case.histories):
        effective = {**defaults, **params[row]}
        wanted = define(case.logits[row].tolist(), history, case.prompt_lengths[row], effective)
        close(got[row], wanted)
        alone = Case(case.logits[row : row + 1], [history], case.prompt_lengths[row : row + 1])
        assert torch.equal(scores(part, alone, params[row : row + 1], **context)[0], got[row])
    moves_with_its_rows(part, case, params, got, **context)


def moves_with_its_rows(
    part: Any, case: Case, params: Sequence[Mapping[str, Any]], got: torch.Tensor, **context: Any
) -> None:
    """``select`` and ``extend`` carry everything: the first row admitted after the others, and the last one twice."""
    count = len(case)
    chain, _ = table(part, case, params, **context)
    later = Case(case.logits[:1], case.histories[:1], case.prompt_lengths[:1])
    sooner = Case(case.logits[1:], case.histories[1:], case.prompt_lengths[1:])
    batch = table(part, later, params[:1], **context)[1]
    if count > 1:
        batch = table(part, sooner, params[1:], **context)[1].extend(batch)
    order = [*range(1, count), 0]
    index = [count - 1, *range(count), 0]
    moved = batch.select(torch.tensor(index))
    rows = [order[at] for at in index]
    assert torch.equal(chain.scores(case.logits[rows], moved), got[rows])


def close(got: torch.Tensor, wanted: Sequence[float]) -> None:
    """Equal where infinite, else to the precision of float32."""
    expected = torch.tensor(list(wanted), dtype=torch.float64)
    infinite = expected.isinf() | got.isinf()
    assert torch.equal(got.double()[infinite], expected[infinite]), (got, expected)
    scale = max([1.0, *expected[~infinite].abs().tolist()])
    tolerance = (2e-6 if got.dtype == torch.float32 else 1e-12) * scale
    torch.testing.assert_close(got.double()[~infinite], expected[~infinite], rtol=2e-6, atol=tolerance)


def is_neutral(part: Any, case: Case, **context: Any) -> None:
    """With every parameter as it is by default the part is not even called, and called all the same changes nothing."""
    chain, batch = table(part, case, [{}] * len(case), **context)
    assert chain.scores(case.logits, batch) is case.logits
    assert torch.equal(chain.processors[0](case.logits.clone(), batch), case.logits)


def refuses(part: Any, name: str, value: Any) -> None:
    """The message has the name, the value and the range."""
    param = part.params[name]
    assert param.range
    with pytest.raises(ParameterError) as caught:
        validate(declare([part]), {name: value})
    message = str(caught.value)
    assert f"{name}={value!r}" in message
    assert param.range in message or f"{name} takes {param.type.__name__}" in message


def foreign(processor: Any, case: Case, row: int) -> torch.Tensor:
    """A processor of transformers on one unpadded row."""
    ids = torch.tensor([case.histories[row]], dtype=torch.int64)
    out: torch.Tensor = processor(ids, case.logits[row : row + 1].clone())[0]
    return out
