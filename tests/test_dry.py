"""DRY against the definition of text-generation-webui's PR 5677, token by token in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from history_oracles import MODEST, Case, cases, check, refuses, scores, table
from hypothesis import given
from hypothesis import strategies as st

from llama_infer.errors import ParameterError
from llama_infer.parts import Context
from llama_infer.processors.dry import LONGEST_MATCH, BreakerSets, Dry

MULTIPLIERS = st.sampled_from([0.0, 0.8, 50.0]) | st.floats(0, 4)
BASES = st.sampled_from([1.0, 1.75, 1e3]) | st.floats(1, 3)


def dry(logits, history, prompt_length, params, longest=50):
    """For each earlier place that ends like the context: walk back while the tokens agree and none of them breaks."""
    window, breakers = params["dry_penalty_last_n"], set(params["dry_sequence_breakers"])
    searched = history if window < 0 else history[max(0, len(history) - window) :]
    matches: dict[int, int] = {}
    for at in range(len(searched) - 1):
        length = 0
        while length < longest and at - length >= 0:
            token = searched[at - length]
            if token != searched[-1 - length] or token in breakers:
                break
            length += 1
        follower = searched[at + 1]
        if length and follower not in breakers:
            matches[follower] = max(length, matches.get(follower, 0))
    out = list(logits)
    for token, length in matches.items():
        if length >= params["dry_allowed_length"]:
            excess = length - params["dry_allowed_length"]
            out[token] -= params["dry_multiplier"] * params["dry_base"] ** excess
    return out


@MODEST
@given(cases(longest=40, largest_vocabulary=6), st.data())
def test_dry(case, data):
    """Breakers as token ids here."""
    params = [
        {
            "dry_multiplier": data.draw(MULTIPLIERS),
            "dry_base": data.draw(BASES.filter(lambda v: v < 100)),
            "dry_allowed_length": data.draw(st.integers(0, 6)),
            "dry_penalty_last_n": data.draw(st.sampled_from([-1, 0, 1, 2, 7, 1000])),
            "dry_sequence_breakers": tuple(data.draw(st.sets(st.integers(0, 1), max_size=1))),
        }
        for _ in range(len(case))
    ]
    check(Dry(), case, params, dry)


def test_a_loop_by_hand():
    """After 1 2 3 4, 1 2 3 calls for 4 (three tokens in common), and 5 2 3 made 6 one of two."""
    history = [1, 2, 3, 4, 5, 2, 3, 6, 0, 1, 2, 3]
    params = {"dry_multiplier": 0.5, "dry_base": 2.0, "dry_allowed_length": 2, "dry_sequence_breakers": ()}
    got = scores(Dry(), Case(torch.zeros(1, 8), [history], [3]), [params])
    assert got[0].tolist() == [0, 0, 0, 0, -1.0, 0, -0.5, 0]
    broken = {**params, "dry_sequence_breakers": (2,)}  # now only the 3 behind it can match
    assert not scores(Dry(), Case(torch.zeros(1, 8), [history], [3]), [broken]).any()


@pytest.mark.parametrize(("last_n", "penalty"), [(-1, -4.0), (8, -4.0), (7, -2.0), (6, -1.0), (5, 0.0), (0, 0.0)])
def test_only_the_last_tokens_are_searched(last_n, penalty):
    """Of 4 1 2 3 4 0 1 2 3, the window of 7 holds a match of two tokens, that of 5 none; matches end at its edge."""
    params = {"dry_multiplier": 1.0, "dry_base": 2.0, "dry_allowed_length": 1, "dry_penalty_last_n": last_n}
    case = Case(torch.zeros(1, 5), [[4, 1, 2, 3, 4, 0, 1, 2, 3]], [0])
    got = scores(Dry(), case, [{**params, "dry_sequence_breakers": ()}])
    assert got[0].tolist() == [0, 0, 0, 0, penalty]


def test_matches_are_bounded():
    """A loop of 300 tokens costs no more than one of 50, and no power overflows."""
    params = {"dry_multiplier": 1.0, "dry_base": 1.5, "dry_allowed_length": 2, "dry_sequence_breakers": ()}
    got = scores(Dry(), Case(torch.zeros(1, 3), [[1] * 300], [0]), [params])
    assert got[0].tolist() == [0, pytest.approx(-(1.5 ** (LONGEST_MATCH - 2))), 0]
    case = Case(torch.zeros(2, 3), [[1] * 300] * 2, [0, 0])
    got = scores(Dry(), case, [{**params, "dry_base": 1e300}, {**params, "dry_base": 1e300, "dry_multiplier": 0.0}])
    assert got.isfinite().all() and got[0, 1] < -1e20 and not got[1].any()


@pytest.mark.parametrize("length", [3000])
def test_wide(length):
    generator = torch.Generator().manual_seed(6)
    histories = [torch.randint(0, 40, (length - 700 * row,), generator=generator).tolist() * 2 for row in range(3)]
    case = Case(torch.randn(3, 128256, generator=generator), histories, [7] * 3)
    params = [{"dry_multiplier": 0.8, "dry_sequence_breakers": breakers} for breakers in ((), (3, 5), (39,))]
    check(Dry(), case, params, lambda *args: dry(*args[:3], {**args[3]}))


def test_breakers_are_the_tokens_that_contain_them(tokenizer):
    """Strings through the byte tokenizer equal the ids of these bytes; a newline is in "<|...|>" of no token."""
    text = list(b'say "yes" say "yes" say ')
    rows = [
        {"dry_multiplier": 1.0, "dry_sequence_breakers": breakers}
        for breakers in (('"', "\n"), (ord('"'), ord("\n")), (), ("begin",), (256,))
    ]
    case = Case(torch.zeros(5, 264), [text] * 5, [0] * 5)
    got = scores(Dry(), case, rows, tokenizer=tokenizer)
    assert torch.equal(got[0], got[1]) and torch.equal(got[3], got[4]) and torch.equal(got[2], got[3])
    assert not got[0, ord('"')] and got[2, ord('"')] < 0


def test_breakers_that_cannot_be_found_are_refused(tokenizer):
    """When the request joins, and only where DRY is on."""

    def check(tokenizer, breakers):
        defaults = {name: param.default for name, param in Dry.params.items()}
        Dry().bind(Context(tokenizer, 264)).check({**defaults, "dry_sequence_breakers": breakers})

    with pytest.raises(ParameterError, match="dry_sequence_breakers.*no single token contains 'xyz'"):
        check(tokenizer, ("xyz",))
    with pytest.raises(ParameterError, match="dry_sequence_breakers.*vocabulary of 264"):
        check(tokenizer, (264,))
    with pytest.raises(ParameterError, match="dry_sequence_breakers.*no tokenizer"):
        check(None, ("\n",))
    check(None, (5,))


class Counting:
    """A tokenizer of two tokens that counts how often it is asked."""

    asked = 0

    def __len__(self):
        return 2

    def batch_decode(self, rows, **kwargs):
        self.asked += 1
        return ['a:"', "b\n*"]


def test_the_vocabulary_is_decoded_once_and_only_if_needed():
    counting = Counting()
    case = Case(torch.zeros(1, 2), [[1, 1]], [0])
    chain, batch = table(Dry(), case, [{}], tokenizer=counting)
    chain.scores(case.logits, batch)
    assert counting.asked == 0
    for breakers in (("b",), ("a",), ("b",)):
        batch = table(Dry(), case, [{"dry_multiplier": 1.0, "dry_sequence_breakers": breakers}], tokenizer=counting)[1]
        chain.scores(case.logits, batch)
    assert counting.asked == 1


def test_sets_of_breakers_that_no_row_has_are_forgotten():
    one = BreakerSets((("a",), ("b",), ("c",)), torch.tensor([2, 0, 1])).select(torch.tensor([0, 0]))
    both = one.extend(BreakerSets((("d",),), torch.tensor([0])))
    assert both.sets == (("c",), ("d",)) and both.index.tolist() == [0, 0, 1]
    assert both.to("cpu").index.tolist() == [0, 0, 1]


@MODEST
@given(cases())
def test_neutral_is_identity(case):
    chain, batch = table(Dry(), case, [{}] * len(case))
    assert chain.scores(case.logits, batch) is case.logits
    mixed = [{"dry_multiplier": 0.0, "dry_sequence_breakers": ()}] * len(case)
    assert torch.equal(Dry()(case.logits.clone(), table(Dry(), case, mixed)[1]), case.logits)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dry_multiplier", -0.1),
        ("dry_multiplier", math.inf),
        ("dry_base", 0.9),
        ("dry_allowed_length", -1),
        ("dry_penalty_last_n", -2),
        ("dry_sequence_breakers", ("",)),
        ("dry_sequence_breakers", (True,)),
        ("dry_sequence_breakers", (-1,)),
        ("dry_sequence_breakers", 5),
    ],
)
def test_bad_values_are_refused(name, value):
    refuses(Dry(), name, value)
