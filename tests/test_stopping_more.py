"""The further criteria against their definitions; and that no stream sends what is cut later."""

from __future__ import annotations

import copy
import math
import pickle
import re
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_infer import Stop
from llama_infer.engine.detokenize import Detokenizer
from llama_infer.engine.sequence import LiveSequence, Task
from llama_infer.errors import ParameterError
from llama_infer.stopping import EndTokens, Length, Loops, MaxTime, Pattern, StopRegex, StopStrings
from llama_infer.testing import FakeSequence, byte_tokenizer
from llama_infer.types import Request

torch.set_num_threads(1)
TEXT = Detokenizer(byte_tokenizer())
LETTERS = {letter: 40.0 for letter in range(97, 103)}


class Pieces:
    """The text of tokens that have several bytes: token n is the n-th piece."""

    def __init__(self, pieces):
        self.pieces, self.stream = pieces, TEXT.stream()

    def push(self, token_id):
        return "".join(self.stream.push(byte) for byte in self.pieces[token_id])

    def flush(self):
        return self.stream.flush()


def play(text, criteria, cuts=None, **params):
    """A live sequence that is given the bytes of ``text`` in pieces that end at ``cuts`` (default: single bytes)."""
    data = text.encode()
    ends = sorted({*(c for c in (range(len(data)) if cuts is None else cuts) if 0 < c < len(data)), len(data)} - {0})
    pieces = [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    task = Task(Request((1,)), 1, {"stop": (), "max_new_tokens": None, **params}, (1,), 0, 1)
    sequence = LiveSequence(task, Pieces(pieces), criteria)
    sent = ""
    for token in range(len(pieces)):
        sent += sequence.append(token, 0.0, ()).text
        assert sequence.text.startswith(sent)
        if sequence.finish_reason:
            break
    else:
        sent += sequence.finish("length").text
    assert sent == sequence.text
    return sequence


ALPHABET = "ab1 é🙂"
SETTINGS = settings(deadline=None, max_examples=150)
CUTS = st.none() | st.lists(st.integers(0, 40))


@SETTINGS
@given(
    st.text(ALPHABET, max_size=16), st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3), CUTS, st.booleans()
)
def test_stop_strings_by_definition(text, stops, cuts, include):
    """The string that is complete first, however the text was divided into tokens; kept in the text or not."""
    places = [(end, end - len(s)) for end in range(len(text) + 1) for s in stops if text[:end].endswith(s)]
    end, start = min(places, default=(None, None))
    sequence = play(text, [StopStrings()], cuts, stop=tuple(stops), include_stop_str_in_output=include)
    assert sequence.text == text[: end if include else start]
    assert sequence.finish_reason == ("length" if end is None else "stop")


ATOMS = st.sampled_from(
    ["a", "b", "1", "é", "🙂", ".", r"\d", r"\w", r"\s", "[ab]", "[^a]", "[a-b1]", r"[\d ]", "[]a]", r"\.", "A"]
)
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: (
        st.tuples(inner, inner).map("".join)
        | st.tuples(inner, inner).map(lambda p: f"({p[0]}|{p[1]})")
        | st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{,2}", "{2,}", "+?", "*?", "??"])).map(
            lambda p: f"(?:{p[0]}){p[1]}"
        )
        | inner.map(lambda p: f"(?i:{p})")
    ),
    max_leaves=6,
).filter(lambda pattern: not re.fullmatch(pattern, ""))


def first_match(text, patterns):
    """By definition, with ``re``: the smallest end of a piece that some pattern matches completely; its first start."""
    found = re.compile
    for end in range(1, len(text) + 1):
        starts = [start for start in range(end) for p in patterns if found(p).fullmatch(text, start, end)]
        if starts:
            return end, min(starts)
    return None


@SETTINGS
@given(st.text(ALPHABET, max_size=14), st.lists(PATTERNS, min_size=1, max_size=2), CUTS, st.booleans())
def test_stop_regex_by_definition(text, patterns, cuts, include):
    found = first_match(text, patterns)
    sequence = play(text, [StopRegex()], cuts, stop_regex=tuple(patterns), include_stop_str_in_output=include)
    assert sequence.text == (text if found is None else text[: found[0] if include else found[1]])
    assert sequence.finish_reason == ("length" if found is None else "stop")


@SETTINGS
@given(st.text(ALPHABET, max_size=14), st.lists(PATTERNS, min_size=1, max_size=2))
def test_a_regex_holds_back_no_more_than_may_match(text, patterns):
    """What is held starts a match under way: some continuation matches, or the held text is empty."""
    sequence = FakeSequence(stop_regex=tuple(patterns))
    criterion = StopRegex()
    for at, character in enumerate(text, 1):
        if sequence.push(character).ask(criterion):
            break
        held = criterion.hold(sequence)
        begun = [s for s in range(at) if any(_begins(Pattern.of(p), text[s:at]) for p in patterns)]
        assert held == (at - min(begun) if begun else 0)


def _begins(pattern, piece):
    """Whether a match that starts where the piece does is still under way behind it, in one go over the piece."""
    state = {}
    for at, character in enumerate(piece):
        state, _ = pattern.step(state, character, at)
        state = {number: start for number, start in state.items() if start == 0}
    return bool(state)


def test_several_that_end_in_one_token():
    """Whatever their order: what is complete first counts, and of what ends together what starts first."""
    for stops in (("b", "a"), ("a", "b"), ("bc", "c", "b", "ab", "xab")):
        expected = "" if "xab" in stops else "x"
        assert play("xabc", [StopStrings()], [], stop=stops).text == expected
        assert play("xabc", [StopRegex()], [], stop_regex=stops).text == expected


def test_known_patterns():
    for pattern, text, kept in [
        (r"\n\n+User:", "Hi.\n\n\nUser: no", "Hi."),
        (r"(?i)the end", "This is The End.", "This is "),
        (r"<(?:tool|call)>", "a <b> <call> x", "a <b> "),
        (r"\d{3,}", "12 1234", "12 "),
        (r"(?s)a.b", "xa\nb", "x"),
        (r"a.b", "xa\nb", "xa\nb"),
        (r"[\]x]{2}", "a]b]x", "a]b"),
        ("(?P<q>🙂|日)本", "日日本", "日"),
        (r"x\{2}{2}", "x{2}}", ""),
        (r"\x41\u00e9\071", "zAé9", "z"),
    ]:
        assert play(text, [StopRegex()], stop_regex=(pattern,)).text == kept


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("ab(", r"missing \), unterminated subpattern at position 2"),
        ("a[", "unterminated character set at position 1"),
        ("*a", "nothing to repeat at position 0"),
        ("ab^", r"the anchor '\^' at position 2"),
        ("a$", r"the anchor '\$' at position 1"),
        (r"a\b", r"at position 1 of .* is not supported"),
        ("a(?=b)", "at position 1 of"),
        ("(?<!a)b", "at position 0 of"),
        (r"(a)\1", "at position 3 of"),
        ("(?P<n>a)(?P=n)", "at position 8 of"),
        ("a*+b", "a possessive repeat at position 2"),
        ("(?x)a", "at position 0 of"),
        ("a*", "matches the empty text"),
        ("", "matches the empty text"),
        ("a{1000000}", "too large"),
        ("(a?){300}b", "too large"),
        ("(){100000000}a", "too large"),
        ("(" * 2000 + "a" + ")" * 2000, "too large"),
        (5, "a pattern is a string, not a int"),
    ],
)
def test_a_bad_pattern_is_refused_when_the_request_joins(pipe, pattern, message):
    regex = pipe.replace(stopping=("length", StopRegex()))
    with pytest.raises(ParameterError, match=message):
        regex([1, 2], stop_regex=("ok", pattern))


@pytest.mark.parametrize("pattern", ["(a*)*b", "(a|aa)+b", "(a|a)*b", "(.*)*(.*)*x", "(a?){60}b"])
def test_no_pattern_takes_long(pattern):
    """Backtracking would not come back from these."""
    sequence, criterion = FakeSequence(stop_regex=(pattern,)), StopRegex()
    started = time.monotonic()
    for _ in range(300):
        assert sequence.push("a").ask(criterion) is None
    assert time.monotonic() - started < 5 and criterion.hold(sequence) == (300 if "?" not in pattern else 60)


def test_a_regex_forgets_the_sequences_that_are_gone():
    criterion, sequence = StopRegex(), FakeSequence(stop_regex=("ab",))
    sequence.push("a").ask(criterion)
    other = FakeSequence(stop_regex=("ab",)).push("b")
    assert other.ask(criterion) is None and len(criterion._runs) == 2
    assert sequence.push("b").ask(criterion) == Stop("stop", 0)
    del sequence, other
    assert len(criterion._runs) == 0
    for same in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert FakeSequence(stop_regex=("b",)).push("ab").ask(same) == Stop("stop", 1)
    rewound = FakeSequence(stop_regex=("xab",)).push("xxxxx")
    assert rewound.ask(criterion) is None
    rewound.text = "xa"
    assert rewound.push("b").ask(criterion) == Stop("stop", 0)


def test_unset_parameters_cost_nothing():
    """No state, no hold, no look at the text."""

    class Blind(FakeSequence):
        text = token_ids = property(lambda self: pytest.fail("looked"), lambda self, value: None)

    regex, timer = StopRegex(), MaxTime(clock=lambda: pytest.fail("asked the clock"))
    for criterion in (regex, timer, Loops(), StopStrings()):
        assert Blind().ask(criterion) is None
    assert regex.hold(Blind()) == StopStrings().hold(Blind()) == 0 and not regex._runs


def test_max_time():
    now = [100.0]
    timer = MaxTime(clock=lambda: now[0])
    own = copy.deepcopy(timer)  # as the engine does at admission
    sequence = FakeSequence(max_time=2.5)
    for now[0], expected in [(100.0, None), (102.4, None), (102.5, Stop("length")), (110.0, Stop("length"))]:
        assert sequence.push("x").ask(own) == expected
    late = copy.deepcopy(timer)
    assert sequence.push("x").ask(late) is None and late._start == 110.0 and timer._start is None
    assert copy.deepcopy(own)._start == 100.0, "a sibling keeps the time of its request"
    assert FakeSequence(max_time=math.inf).push("x").ask(own) is FakeSequence(max_time=None).push("x").ask(own) is None
    assert FakeSequence(max_time=0.0).push("x").ask(MaxTime()) == Stop("length")
    assert FakeSequence(max_time=60.0).push("x").ask(timer) is None and timer._start == 110.0


def test_max_time_in_the_engine(pipe):
    """Each request has its own time, from when it was admitted; the clock moves a second a step."""
    now = [0.0]

    def clock():
        now[0] += 1
        return now[0]

    timed = pipe.replace(stopping=("length", MaxTime(clock)))
    answers = timed([[1, 2], [3]], seed=1, max_new_tokens=9, max_time=[2.0, 1e9])
    assert [answer.finish_reason for answer in answers] == ["length", "length"]
    assert len(answers[0].token_ids) == 1 and len(answers[1].token_ids) == 9
    assert len(timed([1], max_new_tokens=4, max_time=3.5).token_ids) == 4
    assert len(timed([1], max_new_tokens=4, max_time=3).token_ids) == 3
    with pytest.raises(ParameterError, match="max_time >= 0"):
        timed([1], max_time=-1)


def looping(tokens, repeats, shortest, longest_period):
    """By definition."""
    for period in range(1, longest_period + 1):
        need = max(period * repeats, shortest)
        if need <= len(tokens) and need >= 2 * period:
            tail = tokens[len(tokens) - need :]
            if all(tail[i] == tail[i + period] for i in range(need - period)):
                return True
    return False


@SETTINGS
@given(
    st.lists(st.integers(0, 2), max_size=8),
    st.lists(st.integers(0, 2), min_size=1, max_size=4),
    st.integers(0, 10),
    st.sampled_from([0, 2, 3, 5]),
    st.integers(0, 14),
    st.integers(1, 6),
)
def test_loops_by_definition(head, piece, times, repeats, shortest, longest_period):
    sequence = FakeSequence(loop_repeats=repeats, loop_min_tokens=shortest, loop_max_period=longest_period)
    for at, token in enumerate([*head, *piece * times], 1):
        expected = bool(repeats) and looping([*head, *piece * times][:at], repeats, shortest, longest_period)
        assert sequence.push("x", token).ask(Loops()) == (Stop("stop") if expected else None)


def test_loops_in_the_engine(pipe):
    looped = pipe.replace(stopping=("length", Loops()))
    one, other = looped(
        [[1, 2], [1, 2]],
        logit_bias={97: 99.0},
        temperature=0,
        loop_repeats=[4, 0],
        loop_min_tokens=6,
        max_new_tokens=11,
    )
    assert (one.text, one.finish_reason) == ("a" * 6, "stop") and len(other.text) == 11
    for wrong in (1, -1, 20_000):
        with pytest.raises(ParameterError, match="loop_repeats"):
            looped([1], loop_repeats=wrong)


def test_loops_take_little_time():
    sequence = FakeSequence(loop_repeats=1000)
    sequence.token_ids = list(range(100_000)) * 2
    started = time.monotonic()
    for _ in range(300):
        assert sequence.ask(Loops()) is None
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "params",
    [
        {"stop_regex": ("[ab]c", "f[^f]+f")},
        {"stop_regex": ("(c|d)(e|f)a?b?",), "include_stop_str_in_output": True},
        {"stop_regex": ("e{2}",), "stop": ("dab", "cc")},
        {"stop": ("ab", "d"), "include_stop_str_in_output": True},
        {"loop_repeats": 2, "loop_min_tokens": 4, "stop": ("ff",)},
    ],
)
def test_streams_send_what_the_answer_is(pipe, params):
    """The criteria together in a pipeline: chunks, joined, are the text; and it is the free text, cut by definition."""
    full = pipe.replace(stopping=("end", "length", StopStrings(), StopRegex(), Loops()))
    cuts = 0
    for seed in range(6):
        free = full([9, 9], seed=seed, logit_bias=LETTERS).text
        answer = full([9, 9], seed=seed, logit_bias=LETTERS, **params)
        assert (
            "".join(chunk.text for chunk in full.stream([9, 9], seed=seed, logit_bias=LETTERS, **params)) == answer.text
        )
        assert free.startswith(answer.text)
        patterns = [*params.get("stop_regex", ()), *map(re.escape, params.get("stop", ()))]
        found = first_match(free, patterns) if patterns else None
        if found and "loop_repeats" not in params:
            assert answer.text == free[: found[0] if params.get("include_stop_str_in_output") else found[1]]
        cuts += answer.text != free
    assert cuts


def test_samples_of_one_request_stop_on_their_own(pipe):
    regex = pipe.replace(stopping=("length", StopRegex()))
    free = regex([4, 4], n=4, seed=3, logit_bias=LETTERS)
    cut = regex([4, 4], n=4, seed=3, logit_bias=LETTERS, stop_regex=("[ab].",))
    texts = [a.text for a in (free, *free.alternatives)]
    expected = [text if (found := first_match(text, ["[ab]."])) is None else text[: found[1]] for text in texts]
    assert [a.text for a in (cut, *cut.alternatives)] == expected and expected != texts


def test_the_end_and_the_length_stay_what_they_were():
    sequence = FakeSequence(max_new_tokens=2).push("a", 257)
    assert sequence.ask(EndTokens((257,))) == Stop("stop", 0) and sequence.ask(Length()) is None
    assert sequence.push("b").ask(Length()) == Stop("length")
