"""The conformance kit: what keeps its promises passes, and what breaks one is caught and named."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from llama_infer import Stop, transform_logits
from llama_infer.errors import LlamaInferError, ParameterError
from llama_infer.parts import Param
from llama_infer.testing import (
    ConformanceError,
    FakeSequence,
    check_import,
    check_processor,
    check_sampler,
    check_stopping,
    make_rows,
    sampling_step,
)
from llama_infer.testing.cases import SHAPES, make_logits

torch.set_num_threads(1)


def test_check_import(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "eager.py").write_text("import torch\n")
    (tmp_path / "lazy.py").write_text("def f():\n    import torch\n")
    (tmp_path / "faulty.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    check_import("lazy:Part")
    with pytest.raises(ConformanceError, match="eager cannot be imported without torch"):
        check_import("eager")
    with pytest.raises(ConformanceError, match="ZeroDivisionError"):
        check_import("faulty")


class Good:
    """Scales; a base for parts that break one promise each."""

    params = {"scale": Param(default=1.0, neutral=1.0, check=lambda v: 0 < v < 100)}
    traits = frozenset({"pure", "keeps_argmax", "row_independent"})

    def __call__(self, logits, batch):
        return logits * batch["scale"].to(logits.dtype)[:, None]


class Counts(Good):
    """A bias that grows with every token."""

    traits = frozenset({"pure", "keeps_argmax", "row_independent", "stateful"})

    def state(self, batch):
        return {"good.count": torch.zeros(len(batch))}

    def __call__(self, logits, batch):
        return (
            super().__call__(logits, batch)
            - batch["good.count"].to(logits.dtype)[:, None] * (batch["scale"] != 1)[:, None]
        )

    def accept(self, logits, tokens, batch):
        return {"good.count": batch["good.count"] + tokens % 3 + 1}


def test_parts_that_keep_their_promises_pass():
    check_processor(Good(), scale=[0.5, 3.0])
    check_processor(Good, scale=0.5)
    check_processor(Counts(), scale=[0.5, 3.0])
    check_processor(lambda logits, batch: logits)
    check_processor(lambda logits, batch: logits.mul_(2))  # who does not claim to be pure may write
    check_sampler(lambda logits, batch: logits.argmax(-1))
    check_stopping(lambda sequence: len(sequence.token_ids) == 3)
    check_stopping(lambda sequence: None)


def fails(check, part, match, **params):
    with pytest.raises(ConformanceError, match=match) as caught:
        check(part, **params)
    assert isinstance(caught.value, AssertionError) and isinstance(caught.value, LlamaInferError)


class Calls:
    """A result that depends on how often it was asked for."""

    calls = 0

    def __call__(self, logits, batch):
        self.calls += 1
        return logits + self.calls


@pytest.mark.parametrize(
    ("part", "match"),
    [
        (lambda logits, batch: logits.double(), "shape, dtype and device are to be torch.float32"),
        (lambda logits, batch: logits[:, 1:], "shape, dtype and device"),
        (lambda logits, batch: None, "returned NoneType"),
        (lambda logits, batch: logits - logits, "NaN or .inf"),
        (lambda logits, batch: -logits, "NaN or .inf"),
        (lambda logits, batch: logits.clamp(min=-1e9), "excluded token .* came back"),
        (lambda logits, batch: batch.length.add_(1)[:, None] * 0 + logits, "wrote into the batch"),
        (lambda logits, batch: logits + torch.rand(1).to(logits.dtype), "global random state"),
        (Calls(), "same call gave another result"),
        (lambda logits, batch: logits - logits.amax(), "does not equal its rows done alone"),
        (lambda logits, batch: logits - batch.width, "does not equal its rows done alone"),
        (lambda logits, batch: logits + len(batch), "does not equal its rows done alone"),
        (lambda logits, batch: batch["nothing"], "raised KeyError"),
    ],
)
def test_a_function_that_breaks_a_promise_is_named(part, match):
    fails(check_processor, part, match)


def variant(base=Good, **attributes):
    return type("Broken", (base,), attributes)()


def drop_best(self, logits, batch):
    """Removes the likeliest token where the scale is set."""
    best = logits.scatter(1, logits.argmax(-1, keepdim=True), -math.inf)
    return torch.where((batch["scale"] != 1)[:, None], best, logits)


def refuse(self, logits, batch):
    raise ParameterError("not this scale")


class Stuck:
    """A column that does not follow its rows."""

    def __init__(self, values):
        self.values = values

    def select(self, index):
        return Stuck(self.values[: len(index)])

    def extend(self, other):
        return Stuck(torch.cat([self.values, other.values]))


STUCK = {
    "state": lambda self, batch: {"good.count": Stuck(torch.arange(len(batch)) * 0.0)},
    "__call__": lambda self, logits, batch: (
        logits - batch.columns["good.count"].values[:, None].to(logits.dtype) * (batch["scale"] != 1)[:, None]
    ),
    "accept": lambda self, logits, tokens, batch: {
        "good.count": Stuck(batch.columns["good.count"].values + tokens + 1)
    },
}


@pytest.mark.parametrize(
    ("part", "match"),
    [
        (
            variant(__call__=lambda self, logits, batch: logits.mul_(batch["scale"][:, None])),
            "claims to be pure and wrote",
        ),
        (variant(__call__=lambda self, logits, batch: logits * 1.5), "parameters are neutral was changed"),
        (variant(__call__=drop_best), "likeliest token is it no more"),
        (
            variant(
                __call__=lambda self, logits, batch: logits.mul_(batch["scale"][:, None]),
                traits=frozenset({"history_only", "row_independent"}),
            ),
            "claims history_only and wrote at another token",
        ),
        (variant(__call__=refuse), "refused by prepare"),
        (variant(traits=frozenset({"stateful"})), "claims to be stateful and has no state"),
        (variant(traits=frozenset({"fast"})), "unknown traits are claimed. Seen with fast"),
        (variant(Counts, traits=Good.traits), "does not claim to be stateful"),
        (variant(Counts, state=lambda self, batch: {"scale": torch.zeros(len(batch))}), "has the name of a parameter"),
        (variant(Counts, accept=lambda self, logits, tokens, batch: {"x": tokens}), "state.. does not make"),
        (
            variant(Counts, accept=lambda self, logits, tokens, batch: {"good.count": tokens}),
            "returned 'good.count' as",
        ),
        (
            variant(Counts, accept=lambda self, logits, tokens, batch: {"good.count": batch["good.count"].add_(1)}),
            "accept wrote",
        ),
        (
            variant(
                Counts, accept=lambda self, logits, tokens, batch: {"good.count": batch["good.count"] + len(batch)}
            ),
            "rows done alone",
        ),
        (variant(Counts, **STUCK), "select or extend lost the state"),
        (
            variant(params={"scale": Param(default=1.0, neutral=0.0, check=lambda v: v > 0)}),
            "neutral value of scale is refused",
        ),
        (variant(params={"scale": Param(default=-1.0, check=lambda v: v > 0)}), "default of scale is refused"),
        (
            variant(params={"scale": Param(default=(), neutral=(), check=lambda v: all(x.isalpha() for x in v))}),
            "is a ParameterError, not a AttributeError",
        ),
        (variant(params={"scale": 1.0}), "declared by a Param"),
    ],
)
def test_a_part_that_breaks_a_promise_is_named(part, match):
    fails(
        check_processor,
        part,
        match,
        **({"scale": [0.5, 3.0]} if part.params is Good.params else {}),
    )


class Keep:
    """Keeps the ``keep`` likeliest tokens, ties included, also on candidates."""

    params = {"keep": Param(default=0, neutral=0, check=lambda v: v >= 0)}
    traits = frozenset({"pure", "keeps_argmax", "row_independent"})

    def limit(self, values, batch):
        last = values.sort(-1, descending=True).values.gather(
            1, (batch["keep"] - 1).clamp(0, values.shape[1] - 1)[:, None]
        )
        return last.masked_fill(batch["keep"][:, None] == 0, -math.inf)

    def __call__(self, logits, batch):
        return logits.masked_fill(logits < self.limit(logits, batch), -math.inf)

    def on(self, candidates, batch):
        """The limit of a window, and the rows whose k is inside of it."""
        limit = self.limit(candidates.tensor(), batch).numpy()
        return limit, (batch["keep"].numpy() <= candidates.values.shape[1])[:, None]

    def narrow(self, candidates, batch):
        limit, reached = self.on(candidates, batch)
        inside = (candidates.values[:, -1:] < limit) & reached
        return candidates.need(inside | (limit == -math.inf)).keep(candidates.values >= limit, inside)


@pytest.mark.parametrize(
    ("narrow", "match"),
    [
        (Keep.narrow, None),
        (
            lambda self, c, b: c.keep(c.values > self.on(c, b)[0], np.zeros_like(c.complete)),
            "differs from the plain call",
        ),
        (
            lambda self, c, b: c.need(self.on(c, b)[1]).keep(c.values >= self.on(c, b)[0], np.ones_like(c.complete)),
            "said complete",
        ),
        (
            lambda self, c, b: c.need(self.on(c, b)[1]).keep(c.values >= self.on(c, b)[0], np.zeros_like(c.complete)),
            "not complete, and the plain call removes a token outside",
        ),
        (lambda self, c, b: c.keep(c.values == c.values, np.zeros_like(c.complete)), "removes a token outside"),
        (
            lambda self, c, b: c.keep(np.multiply(c.values, 2, out=c.values) > 0, c.complete),
            "wrote into the candidates",
        ),
        (lambda self, c, b: c._replace(values=c.values * 2, fits=np.ones_like(c.fits)), "differs from the plain call"),
        (
            lambda self, c, b: type(c).of(c.everything(), 1)._replace(fits=np.zeros_like(c.fits)),
            "changed which tokens",
        ),
    ],
)
def test_narrow(narrow, match):
    part = variant(Keep, narrow=narrow)
    if match is None:
        return check_processor(part, keep=[1, 3, 500])
    return fails(check_processor, part, match, keep=[1, 3, 500])


def last_of_equals(logits, batch):
    return logits.shape[1] - 1 - logits.flip(-1).argmax(-1)


class Sampler:
    traits = frozenset({"pure", "row_independent", "greedy_at_zero"})

    def __init__(self, call, **attributes):
        self.call = call
        vars(self).update(attributes)

    def __call__(self, logits, batch):
        return self.call(logits, batch)


@pytest.mark.parametrize(
    ("part", "match"),
    [
        (lambda logits, batch: logits.argmax(-1).int(), "shape, dtype and device are to be torch.int64"),
        (lambda logits, batch: logits.argmax(-1, keepdim=True), "shape, dtype and device"),
        (lambda logits, batch: logits.argmax(-1) + logits.shape[1], "outside of the vocabulary"),
        (lambda logits, batch: logits.argmin(-1), "excluded token"),
        (lambda logits, batch: logits.softmax(-1).multinomial(1)[:, 0], "global random state"),
        (lambda logits, batch: (logits + logits.amax(0)).argmax(-1), "does not equal its rows done alone"),
        (Sampler(last_of_equals), "greedy at temperature 0"),
        (Sampler(lambda logits, batch: logits.add_(1).argmax(-1)), "claims to be pure"),
        (
            Sampler(lambda logits, batch: logits.argmax(-1), choose=lambda c, b: c.values.argmin(-1)),
            "took another token",
        ),
        (Sampler(lambda logits, batch: logits.argmax(-1), choose=lambda c, b: c.ids[:, 0]), "took another|no place"),
    ],
)
def test_a_sampler_that_breaks_a_promise_is_named(part, match):
    fails(check_sampler, part, match)


class Third:
    """Counts its questions."""

    seen = 0

    def __call__(self, sequence):
        self.seen += 1
        return self.seen % 7 == 3


class Cut:
    """Stops at an 'o' and cuts the text two characters before it."""

    params = {"cut": Param(default=0, neutral=0)}

    def __call__(self, sequence):
        at = sequence.text.find("o", sequence.text_before)
        return Stop("stop", max(0, at - 2)) if at >= 0 and sequence.params["cut"] else None


@pytest.mark.parametrize(
    ("part", "match"),
    [
        (Cut(), "is not the final text: hold back"),
        (variant(Cut, hold=lambda self, sequence: min(1, len(sequence.text))), "is not the final text: hold back"),
        (variant(Cut, hold=lambda self, sequence: 2), "hold.. is from 0"),
        (variant(Cut, hold=lambda self, sequence: -1), "hold.. is from 0"),
        (variant(Cut, hold=lambda self, sequence: min(2, len(sequence.text))), "although its parameters are neutral"),
        (
            variant(Cut, __call__=lambda self, sequence: len(sequence.token_ids) > 2),
            "although its parameters are neutral",
        ),
        (Third(), "two sequences in turn"),
        (lambda sequence: "stop", "returned a str"),
        (lambda sequence: Stop("error"), "is neither 'stop' nor 'length'"),
        (lambda sequence: Stop("stop", len(sequence.text) + 1), "not within the text"),
        (lambda sequence: sequence.token_ids.append(1), "changed the sequence"),
        (lambda sequence: sequence.nothing, "raised AttributeError"),
    ],
)
def test_a_criterion_that_breaks_a_promise_is_named(part, match):
    fails(check_stopping, part, match, **({"cut": [1]} if hasattr(part, "params") else {}))


def test_criteria_that_keep_their_promises_pass():
    held = {"hold": lambda self, sequence: min(2, len(sequence.text)) if sequence.params["cut"] else 0}
    check_stopping(variant(Cut, **held), cut=[1])
    check_stopping(variant(Third, stateful=True))


def test_a_message_names_the_part_the_case_and_the_seed():
    class Wrong:
        name = "wrong_one"

        def __call__(self, logits, batch):
            return logits.clamp(min=-1e9)

    fails(
        check_processor,
        Wrong(),
        "processor wrong_one: .*row [67]: (excluded|single) logits, .*history .*seed=5.",
        seed=5,
    )
    with pytest.raises(ParameterError, match="'scal'"):
        check_processor(Good(), scal=[1.0])
    with pytest.raises(ParameterError, match="out of range"):
        check_processor(Good(), scale=[0.5, 1000.0])


def test_the_cases_are_what_they_say():
    logits = dict(zip(SHAPES, make_logits(SHAPES, 40, random.Random(0), torch.float32), strict=True))
    assert (logits["single"] > -torch.inf).sum() == 1 and 1 < (logits["excluded"] == -torch.inf).sum() < 40
    assert logits["tied"].unique().numel() == 1 and logits["steps"].unique().numel() < 12
    assert logits["peaked"].softmax(-1).max() > 0.9 and logits["flat"].softmax(-1).max() < 0.026


def test_make_rows():
    batch = make_rows(Good(), [{"scale": 2.0}, {}], [[1, 2], [3]])
    assert batch["scale"].tolist() == [2.0, 1.0] and batch.length.tolist() == [2, 1] and batch.seed.tolist() == [0, 1]
    both = make_rows([Good(), Counts()], [{}])
    assert both["good.count"].tolist() == [0.0] and both.width == 0
    with pytest.raises(ParameterError, match="'scales'"):
        make_rows(Good(), [{"scales": 1.0}])


def test_sampling_step():
    logits = torch.randn(3, 500)
    before = logits.clone()
    greedy = sampling_step(logits, tokens=[[1, 2], [], [7]], temperature=0.0, presence_penalty=[0.0, 1.0, 50.0])
    expected = transform_logits(logits, tokens=[[1, 2], [], [7]], temperature=0.0, presence_penalty=[0.0, 1.0, 50.0])
    assert greedy().equal(expected.argmax(-1)) and logits.equal(before)
    drawn = sampling_step(logits, top_k=2, temperature=1.5)
    ids = drawn()
    assert ids.dtype == torch.int64 and drawn().equal(ids)
    assert (logits.gather(1, ids[:, None]) >= logits.topk(2).values[:, 1:]).all()
    assert len({int(t) for t in sampling_step(torch.zeros(50, 500))()}) > 25
    assert sampling_step(logits, sampler="greedy", processors=())().equal(logits.argmax(-1))


def test_fake_sequence():
    from llama_infer.stopping import StopStrings

    sequence = FakeSequence(stop=("END",))
    assert sequence.push("The E").ask(StopStrings()) is None
    assert sequence.push("ND.").ask(StopStrings()) == Stop("stop", 4)
    assert FakeSequence().push().ask(lambda s: True) == Stop() and FakeSequence().params["max_new_tokens"] is None
