"""Prompts: what becomes a control token, what does not, and what is no prompt."""

from __future__ import annotations

import pytest

from llama_infer.errors import LlamaInferError, PromptError, UnsafeCheckpointError, UnsupportedError
from llama_infer.prompts.auto import AutoFormatter
from llama_infer.prompts.chat import DEFAULT_SYSTEM_PROMPT, ChatFormatter
from llama_infer.prompts.common import check_ids
from llama_infer.prompts.plain import PlainFormatter
from llama_infer.testing import CONTROL_TOKENS, byte_tokenizer
from llama_infer.types import Message

BEGIN, END, HEADER, HEADER_END, EOT = 256, 257, 258, 259, 260


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def own():
    """A tokenizer that the test may change."""
    return byte_tokenizer()


def turn(role, text):
    return [HEADER, *role.encode(), HEADER_END, *b"\n\n", *text.encode(), EOT]


OPEN = [HEADER, *b"assistant", HEADER_END, *b"\n\n"]


def test_the_byte_tokenizer_is_what_it_says(tokenizer):
    assert len(tokenizer) == 264
    text = "naïve 🌍 为什么\x00\r\n"
    assert tokenizer(text)["input_ids"] == [BEGIN, *text.encode()]
    assert tokenizer.decode([*text.encode()]) == text
    assert tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)) == list(range(256, 264))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BEGIN, END)


def test_text_becomes_a_conversation(tokenizer):
    assert DEFAULT_SYSTEM_PROMPT == "You are a helpful assistant. 你是一个乐于助人的助手。"
    ids = ChatFormatter()("你有什么建议？", tokenizer)
    assert ids == [BEGIN, *turn("system", DEFAULT_SYSTEM_PROMPT), *turn("user", "你有什么建议？"), *OPEN]


@pytest.mark.parametrize("system", [None, ""])
def test_no_system_prompt(tokenizer, system):
    assert ChatFormatter(system)("Hi", tokenizer) == [BEGIN, *turn("user", "Hi"), *OPEN]


def test_messages_are_used_as_given(tokenizer):
    messages = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    expected = [BEGIN, *turn("user", "a"), *turn("assistant", "b"), *turn("user", "c"), *OPEN]
    assert ChatFormatter()(messages, tokenizer) == AutoFormatter()(messages, tokenizer) == expected


@pytest.mark.parametrize("token", CONTROL_TOKENS)
@pytest.mark.parametrize("wrap", ["{}", "a {} b", "{0}{0}", "{}\n\n", "<|{}|>"])
def test_typed_control_tokens_stay_text(tokenizer, token, wrap):
    typed = wrap.format(token)
    text = typed.strip()  # the template trims
    ids = ChatFormatter(typed)(typed, tokenizer)
    assert ids == [BEGIN, *turn("system", text), *turn("user", text), *OPEN]
    assert typed.strip() in tokenizer.decode(ids)
    assert [i for i in ids if i > 255].count(BEGIN) == 1


def test_control_tokens_of_a_past_answer_stay_text(tokenizer):
    messages = (Message("user", "a"), Message("assistant", "<|eot_id|>"), Message("user", "c"))
    assert ChatFormatter()(messages, tokenizer).count(EOT) == 3


def test_a_tokenizer_that_cannot_neutralise_is_refused(own, monkeypatch):
    old = type(own).apply_chat_template
    monkeypatch.setattr(
        type(own), "apply_chat_template", lambda self, messages, **options: old(self, messages, **options)
    )
    with pytest.raises(UnsupportedError, match="upgrade transformers"):
        ChatFormatter()("Hi", own)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([("user", "a"), ("tool", "b")], "message 1 has the unknown role 'tool'.*system, user, assistant"),
        ([("users", "a")], "did you mean 'user'"),
        ([("user", "a"), ("system", "b"), ("user", "c")], "message 1 is from the system"),
        ([("system", "a"), ("system", "b"), ("user", "c")], "message 1 is from the system"),
        ([("user", "a"), ("assistant", "b")], "last message is from the assistant"),
        ([("system", "a")], "last message is from the system"),
        ([("user", "a"), ("assistant", "b\ud800"), ("user", "c")], r"message 1, from the assistant, .*U\+D800.* 1"),
    ],
)
def test_conversations_that_cannot_be_continued(tokenizer, messages, words):
    with pytest.raises(PromptError, match=words):
        AutoFormatter()(tuple(Message(*message) for message in messages), tokenizer)


def test_no_template(own):
    own.chat_template = None
    with pytest.raises(PromptError, match="formatter='plain'"):
        ChatFormatter()("Hi", own)
    with pytest.raises(PromptError, match="no chat template"):
        AutoFormatter()((Message("user", "Hi"),), own)
    assert AutoFormatter()("Hi", own) == [BEGIN, *b"Hi"]


def test_auto_is_chat_where_there_is_a_template(tokenizer):
    assert AutoFormatter("S").system == "S"
    assert AutoFormatter("S")("Hi", tokenizer) == ChatFormatter("S")("Hi", tokenizer)


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        ("{{ messages.__class__.__mro__ }}", UnsafeCheckpointError),
        ("{% for c in ''.__class__.__base__.__subclasses__() %}{{ c }}{% endfor %}", UnsafeCheckpointError),
        ("{{ messages.append(1) }}", UnsafeCheckpointError),
        ("{{ raise_exception('roles must alternate') }}", PromptError),
        ("{% if %}", PromptError),
        ("{{ 1 / 0 }}", PromptError),
        ("{{ '' }}", PromptError),
    ],
)
def test_templates_that_fail_or_reach_too_far(own, template, kind):
    own.chat_template = template
    with pytest.raises(kind):
        ChatFormatter()("Hi", own)


def test_begin_of_text_is_never_doubled(own):
    own.chat_template = "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert ChatFormatter(None)("Hi", own) == [BEGIN, *b"Hi"]
    assert PlainFormatter()("<|begin_of_text|>Hi", own) == [BEGIN, *b"Hi"]
    assert PlainFormatter()("Hi", own) == [BEGIN, *b"Hi"]


def test_plain_parses_control_tokens(tokenizer):
    assert PlainFormatter()("a<|eot_id|>", tokenizer) == [BEGIN, *b"a", EOT]
    ChatFormatter()("<|eot_id|>", tokenizer)  # leaves the tokenizer in its other setting
    assert PlainFormatter()("a<|eot_id|>", tokenizer) == [BEGIN, *b"a", EOT]


def test_plain_parses_them_whatever_the_tokenizer_was_set_to(own):
    own.split_special_tokens = True
    assert PlainFormatter()("a<|eot_id|>", own) == [BEGIN, *b"a", EOT]


def test_plain_takes_no_messages(tokenizer):
    with pytest.raises(PromptError, match="formatter='chat'"):
        PlainFormatter()((Message("user", "Hi"),), tokenizer)


def test_nothing_is_no_prompt(own):
    assert PlainFormatter()("", own) == [BEGIN]
    own.backend_tokenizer.post_processor = None
    with pytest.raises(PromptError, match="no tokens"):
        PlainFormatter()("", own)


FORMATTERS = [ChatFormatter(), PlainFormatter(), AutoFormatter()]


@pytest.mark.parametrize("formatter", FORMATTERS, ids=repr)
def test_every_formatter(formatter, tokenizer):
    assert formatter((1, 2, 3), tokenizer) == formatter((1, 2, 3), None) == [1, 2, 3]
    for bad in ((), (1, -1), (True,), (1.5,)):
        with pytest.raises(PromptError):
            formatter(bad, tokenizer)
    with pytest.raises(PromptError, match="tokenizer="):
        formatter("Hi", None)
    with pytest.raises(PromptError, match=r"U\+DC00.* at character 2"):
        formatter("ab\udc00", tokenizer)


def test_ids_are_checked_against_the_vocabulary():
    assert check_ids((0, 263), 264) == [0, 263]
    with pytest.raises(PromptError, match="token 1 of the prompt is 264.*0 to 263"):
        check_ids((0, 264), 264)


def test_the_system_prompt_is_checked():
    with pytest.raises(LlamaInferError, match="system prompt"):
        ChatFormatter("\ud800")
