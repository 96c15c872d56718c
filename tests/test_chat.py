"""A conversation: what it remembers, and what it sends."""

from __future__ import annotations

import pytest

from llama_infer import Message, Pipeline
from llama_infer.errors import LlamaInferError, ParameterError, PromptError
from llama_infer.prompts.chat import DEFAULT_SYSTEM_PROMPT
from llama_infer.testing import byte_tokenizer, tiny_llama

LETTERS = {letter: 30.0 for letter in range(97, 123)}


@pytest.fixture(scope="module")
def pipe():
    """Says letters only, so that its answers survive being read back."""
    params = {"max_new_tokens": 5, "logit_bias": LETTERS}
    return Pipeline(tiny_llama(), tokenizer=byte_tokenizer(), params=params)


def as_dicts(messages):
    return [{"role": message.role, "content": message.content} for message in messages]


def test_each_turn_sees_all_before_it(pipe):
    """The same as the whole conversation given at once."""
    chat = pipe.chat()
    first = chat("one", seed=1)
    second = chat("two", seed=2)
    conversation = [
        Message("system", DEFAULT_SYSTEM_PROMPT),
        Message("user", "one"),
        Message("assistant", first.text),
        Message("user", "two"),
    ]
    assert second.token_ids == pipe(as_dicts(conversation), seed=2).token_ids
    assert chat.messages == (*conversation, Message("assistant", second.text))
    assert first.text and first.prompt_token_ids == pipe("one").prompt_token_ids


def test_streaming_is_the_same_conversation(pipe):
    spoken, streamed = pipe.chat(), pipe.chat()
    for seed, text in enumerate(["one", "two"]):
        answer = spoken(text, seed=seed)
        assert "".join(chunk.text for chunk in streamed.stream(text, seed=seed)) == answer.text
    assert streamed.messages == spoken.messages and len(spoken.messages) == 5


@pytest.mark.parametrize("system, count", [(None, 1), ("", 0), ("Be brief.", 1)])
def test_system_prompts_and_reset(pipe, system, count):
    chat = pipe.chat(system)
    assert len(chat.messages) == count
    chat("hello")
    assert len(chat.messages) == count + 2
    chat.reset()
    assert [message.content for message in chat.messages] == [system or DEFAULT_SYSTEM_PROMPT][:count]


def test_a_bad_turn_is_forgotten(pipe):
    """An error before anything is decoded leaves the conversation as it was, streamed or not."""
    chat = pipe.chat()
    chat("one")
    before = chat.messages
    for call in (chat, chat.stream):
        with pytest.raises(ParameterError, match="top_pp"):
            call("two", top_pp=1)
        with pytest.raises(PromptError):
            call(["two"])
        with pytest.raises(PromptError):
            call("\ud800")
    assert chat.messages == before and chat("three", seed=1).error is None


def test_a_turn_that_fails_while_it_is_decoded_is_forgotten(pipe):
    """Every token banned: an error, and the conversation goes on without that turn."""
    chat = pipe.chat()
    bans = dict.fromkeys(range(264), float("-inf"))
    with pytest.raises(LlamaInferError, match="no token is left"):
        chat("one", logit_bias=bans)
    with pytest.raises(LlamaInferError, match="no token is left"):
        list(chat.stream("one", logit_bias=bans))
    assert len(chat.messages) == 1
    assert chat("one").text


def test_a_stream_that_is_closed_keeps_what_was_said(pipe):
    chat = pipe.chat()
    stream = chat.stream("one", seed=1)
    said = next(stream).text + next(stream).text
    stream.close()
    assert chat.messages[-1] == Message("assistant", said) and len(said) == 2
    assert pipe.chat()("one", seed=1).text.startswith(said)


def test_control_tokens_of_a_user_end_no_turn(pipe):
    """``<|eot_id|>`` typed by a user is text."""
    typed = pipe.chat("")("a<|eot_id|>b")
    assert typed.prompt_token_ids.count(260) == pipe.chat("")("ab").prompt_token_ids.count(260)


def test_samples_of_a_turn_remember_the_first(pipe):
    chat = pipe.chat()
    answer = chat("one", n=2, seed=1)
    assert chat.messages[-1].content == answer.text and len(answer.alternatives) == 1
    other = pipe.chat()
    list(other.stream("one", n=2, seed=1))
    assert other.messages == chat.messages
