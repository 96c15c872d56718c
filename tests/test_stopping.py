"""Stopping: on tokens, lengths, strings and whatever a user thinks of; and what is held back until it is sure."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_infer import Context, Stop
from llama_infer.engine.detokenize import Detokenizer
from llama_infer.engine.sequence import LiveSequence, Task
from llama_infer.errors import PromptTooLongError
from llama_infer.stopping import EndTokens, Length, StopStrings
from llama_infer.testing import byte_tokenizer, tiny_llama
from llama_infer.types import Request

TEXT = Detokenizer(byte_tokenizer())


def play(answer, stop=(), criteria=(), prompt=(1, 2), **params):
    """A sequence that is given the bytes (or tokens) of ``answer`` until it stops, and its chunks."""
    task = Task(Request(prompt), 1, {"stop": tuple(stop), "max_new_tokens": None, **params}, tuple(prompt), 0, 1)
    sequence = LiveSequence(task, TEXT.stream(), criteria or [EndTokens((257, 260)), Length(), StopStrings()])
    chunks = []
    for token in answer.encode() if isinstance(answer, str) else answer:
        chunks.append(sequence.append(token, 0.0, ()))
        if sequence.finish_reason:
            break
    else:
        chunks.append(sequence.finish("length"))
    return sequence, chunks


def first_stop(text, stops):
    """Where the text ends by definition: at the stop string that is complete first, the leftmost of several."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts)
    return None


@settings(deadline=None, max_examples=80)
@given(
    st.text("ab是é🙂", max_size=20),
    st.lists(st.text("ab是é🙂", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_end_the_text_before_them(text, stops):
    """Byte by byte, so that every stop string and every character spans tokens."""
    sequence, chunks = play(text, stops)
    end = first_stop(text, stops)
    assert sequence.text == "".join(chunk.text for chunk in chunks) == text[:end]
    assert sequence.finish_reason == ("length" if end is None else "stop")


@settings(deadline=None, max_examples=100)
@given(st.text("ab是", max_size=16), st.lists(st.text("ab是", min_size=1, max_size=4), min_size=1, max_size=3))
def test_only_what_may_become_a_stop_string_is_held_back(text, stops):
    """After each character the stream has all but the longest tail that begins a stop string."""
    _, chunks = play(text, stops)
    whole, sent = "", ""
    for token, chunk in zip(text.encode(), chunks, strict=False):
        sent += chunk.text
        whole += TEXT.decode([token]) if token < 128 else ""
        if chunk.finish_reason or token >= 128:
            break
        held = max(n for n in range(len(whole) + 1) if n == 0 or any(s[:n] == whole[-n:] and n < len(s) for s in stops))
        assert sent == whole[: len(whole) - held]


@pytest.mark.parametrize("stop", ["wxyz", "。\n", "จบ", "🙂🙃", "\n\n"])
def test_a_stop_string_across_tokens_and_scripts(stop):
    sequence, chunks = play(f"left{stop[0]} {stop}right", [stop])
    assert sequence.text == f"left{stop[0]} " == "".join(chunk.text for chunk in chunks)
    assert len(sequence.token_ids) == len(f"left{stop[0]} {stop}".encode())


def test_a_request_stops_at_its_string(pipe):
    """In the engine; and neighbours do not stop at it."""
    letters = {letter: 30.0 for letter in range(97, 123)}
    free = pipe([1, 2], seed=5, logit_bias=letters)
    stop = free.text[4:6]
    stopped, other = pipe([[1, 2], [1, 2]], seed=5, logit_bias=letters, stop=[[stop], []])
    assert (stopped.text, stopped.finish_reason) == (free.text[: free.text.index(stop)], "stop")
    assert (other.text, other.finish_reason) == (free.text, "length")


def test_a_stop_string_counts_at_the_last_token_too(pipe):
    """Complete with the last token that is allowed: it is still no part of the text."""
    letters = {letter: 30.0 for letter in range(97, 123)}
    free = pipe([1, 2], seed=5, logit_bias=letters)
    stopped = pipe([1, 2], seed=5, logit_bias=letters, stop=free.text[-2:])
    assert (stopped.text, stopped.finish_reason) == (free.text[:-2], "stop")
    sequence, _ = play("abc", ["c"], max_new_tokens=3)
    assert (sequence.text, sequence.finish_reason) == ("ab", "stop")


@pytest.mark.parametrize("end", [257, 260])
def test_every_end_token_stops_and_has_no_text(end):
    sequence, _ = play([*b"hi", end, *b"more"])
    assert (sequence.text, sequence.token_ids, sequence.finish_reason) == ("hi", [*b"hi", end], "stop")
    first, _ = play([end])
    assert (first.text, first.finish_reason) == ("", "stop")


def test_an_end_token_with_text_leaves_it_out():
    """A checkpoint may end its answers with an ordinary token."""
    sequence, _ = play("hi!", criteria=[EndTokens((ord("!"),))])
    assert (sequence.text, sequence.finish_reason) == ("hi", "stop")


def test_the_checkpoints_end_tokens_stop(tokenizer):
    """Those of the generation config and ``<|eot_id|>``."""
    from llama_infer import Pipeline

    model = tiny_llama()
    model.generation_config.eos_token_id = [65, 66]
    pipe = Pipeline(model, tokenizer=tokenizer, params={"temperature": 0, "max_new_tokens": 5})
    assert {65, 66, 257, 260} <= set(pipe.loaded.end_token_ids)
    for end in (65, 66, 260):
        answer = pipe([1, 2], logit_bias={end: 100.0})
        assert (answer.token_ids, answer.finish_reason, answer.text) == ((end,), "stop", "")


def test_length():
    assert Length()(play("abc", criteria=[lambda s: None], max_new_tokens=4)[0]) is None
    sequence, _ = play("abcdef", max_new_tokens=4)
    assert (sequence.text, sequence.finish_reason) == ("abcd", "length")
    bound = Length().bind(Context(None, 264, (), 5))
    sequence, _ = play("abcdef", criteria=[bound], prompt=(1, 2), max_new_tokens=9)
    assert (sequence.text, sequence.finish_reason) == ("abc", "length")


def test_the_end_of_the_context_stops(tokenizer):
    """Prompt and answer fill it exactly; a prompt that leaves no room is refused."""
    from llama_infer import Pipeline

    pipe = Pipeline(tiny_llama(max_position_embeddings=16), tokenizer=tokenizer, params={"min_new_tokens": 99})
    full, asked = pipe([[1] * 10, [1] * 15], seed=1)
    assert (len(full.token_ids), full.finish_reason) == (6, "length") and len(asked.token_ids) == 1
    assert len(pipe([1] * 10, max_new_tokens=99).token_ids) == 6
    with pytest.raises(PromptTooLongError, match="16"):
        pipe([1] * 16)


def test_a_users_callable(pipe):
    """True, or a Stop that cuts the text; it sees tokens, text and parameters."""
    seen = []

    def third(sequence):
        seen.append((tuple(sequence.prompt_token_ids), len(sequence.token_ids), sequence.params["top_k"]))
        return len(sequence.token_ids) == 3

    answer = pipe.replace(stopping=("end", "length", third))([7, 8], top_k=5, seed=1)
    assert (len(answer.token_ids), answer.finish_reason) == (3, "stop")
    assert seen == [((7, 8), n, 5) for n in (1, 2, 3)]
    cut = pipe.replace(stopping=lambda sequence: Stop("length", 2) if len(sequence.text) > 3 else None)
    answer = cut([7], logit_bias={letter: 50.0 for letter in range(97, 123)})
    assert (len(answer.text), len(answer.token_ids), answer.finish_reason) == (2, 4, "length")


def test_a_stateful_criterion_has_a_copy_for_each_sequence(pipe):
    class Count:
        stateful = True
        seen = 0

        def __call__(self, sequence):
            self.seen += 1
            return self.seen == 4

    counter = Count()
    answers = pipe.replace(stopping=counter)([[1], [2], [3]])
    assert [len(answer.token_ids) for answer in answers] == [4, 4, 4] and counter.seen == 0


def test_transformers_stopping_criteria(pipe, reference):
    """In the slot, against transformers' own ``generate`` with the same object."""
    from oracles import greedy
    from transformers import MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList

    class Even(StoppingCriteria):
        """Stops at the second even token of the answer or the prompt."""

        def __call__(self, input_ids, scores, **kwargs):
            return ((input_ids % 2 == 0).sum(-1) >= 4).to(torch.bool)

    prompts = [[1, 2, 3], [4, 5], [7]]
    for criterion in (Even(), MaxLengthCriteria(7), StoppingCriteriaList([Even(), MaxLengthCriteria(5)])):
        listed = criterion if isinstance(criterion, list) else StoppingCriteriaList([criterion])
        answers = pipe.replace(stopping=(criterion, "end", "length"))(prompts, temperature=0)
        for prompt, answer in zip(prompts, answers, strict=True):
            ends = pipe.loaded.end_token_ids
            expected = greedy(reference, prompt, 12, eos_token_id=list(ends), stopping_criteria=listed)
            assert answer.token_ids == expected
