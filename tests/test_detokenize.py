"""Ids to text, one at a time: never half a character, and together what the tokenizer says."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llama_infer.engine.detokenize import Detokenizer
from llama_infer.testing import byte_tokenizer

BYTES = byte_tokenizer()
SAMPLES = [
    "Hello, world!\n  indented\ttext",
    "为什么要减少污染，保护环境？",
    "สวัสดีครับ ภาษาไทย",
    "👩‍👩‍👧‍👦 🇨🇳 🙂🏽 é é",
    "नमस्ते مرحبا שלום",
    "a genuine \ufffd stays",
    "\ufffd",
]


def sentence_pieces() -> PreTrainedTokenizerFast:
    """Llama 2's kind of vocabulary in small: words marked by U+2581, and bytes for all else."""
    words = ["▁Hello", "▁world", "▁the", "▁", "lo", "世界", "▁是", "!", "a", "b", "\ufffd"]
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(strip)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


PIECES = sentence_pieces()


def stream(tokenizer, ids):
    """The pieces of text, the flushed one last."""
    text = Detokenizer(tokenizer).stream()
    return [*(text.push(token) for token in ids), text.flush()]


def decode(tokenizer, ids):
    """All at once, by the tokenizer."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) if ids else ""


@pytest.mark.parametrize("text", SAMPLES)
def test_no_character_is_cut(text):
    """Every piece is whole: a prefix of the text at each step, U+FFFD only where the text has it."""
    pieces = stream(BYTES, list(text.encode()))
    assert "".join(pieces) == text and pieces[-1] == ""
    for end in range(len(pieces)):
        assert text.startswith("".join(pieces[:end]))
    # A character comes with its last byte, not later.
    assert [len(piece) for piece in pieces[:-1]] == [
        length for character in text for length in [0] * (len(character.encode()) - 1) + [1]
    ]


@settings(deadline=None, max_examples=80)
@given(st.text(max_size=30), st.integers(0, 90))
def test_a_cut_character_ends_in_one_replacement(text, end):
    """As Python's own decoder has it."""
    some = text.encode()[:end]
    assert "".join(stream(BYTES, list(some))) == some.decode("utf-8", "replace")


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(0, 263), max_size=40))
def test_any_ids_give_the_tokenizers_text(ids):
    """Lone bytes and control tokens among them."""
    assert "".join(stream(BYTES, ids)) == decode(BYTES, [token for token in ids if token < 256])


def test_special_tokens_have_no_text():
    assert "".join(stream(BYTES, [256, *b"a", 260, *b"b", 258])) == "ab"
    assert stream(None, [1, 2, 3]) == ["", "", "", ""]


def test_an_added_token_is_its_text():
    """Not special, written as it is: beyond the bytes' alphabet."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<思考>"])
    ids = tokenizer.encode("a<思考>b", add_special_tokens=False)
    assert len(ids) == 3 and stream(tokenizer, ids) == ["a", "<思考>", "b", ""]


words = st.sampled_from([PIECES.convert_tokens_to_ids(w) for w in ("▁Hello", "▁world", "▁", "lo", "世界", "▁是", "a")])
letters = st.sampled_from(["é", "是", "🙂", "ก"]).map(
    lambda c: [PIECES.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in c.encode()]
)


@settings(deadline=None, max_examples=80)
@given(st.lists(words.map(lambda token: [token]) | letters, max_size=12))
def test_vocabularies_with_word_marks_and_byte_fallback(parts):
    """Every piece of text is whole, the spaces between words are there, and the sum is the tokenizer's text."""
    ids = [token for part in parts for token in part]
    pieces = stream(PIECES, ids)
    assert "".join(pieces) == decode(PIECES, ids)
    assert "\ufffd" not in "".join(pieces)


broken = st.sampled_from(["é", "是", "🙂"]).map(
    lambda c: [PIECES.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in c.encode()[:-1]]
)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(words, st.just([]) | broken | letters), max_size=8))
def test_broken_characters_in_such_a_vocabulary(parts):
    """Bytes that are no character, each run between words: the tokenizer's text, one U+FFFD for a cut at the end.

    (A whole and a broken character in one run have no streamable text: the tokenizer's decoder then takes back the
    whole one.)
    """
    ids = [token for word, run in parts for token in (word, *run)]
    text, expected = "".join(stream(PIECES, ids)), decode(PIECES, ids)
    assert text.rstrip("\ufffd") == expected.rstrip("\ufffd")
    assert text.endswith("\ufffd") == expected.endswith("\ufffd") and not text.endswith("\ufffd\ufffd")


def test_a_genuine_replacement_character_passes_in_such_a_vocabulary():
    ids = PIECES.convert_tokens_to_ids(["a", "\ufffd", "b", "\ufffd"])
    assert "".join(stream(PIECES, ids)) == "a\ufffdb\ufffd"


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["bytes", "pieces"])
def test_forks_go_their_own_ways(tokenizer):
    """From the middle of a character on."""
    draw = random.Random(0)
    alphabet = range(256) if tokenizer is BYTES else range(2, 268)
    for _ in range(30):
        trunk, one, two = ([draw.choice(alphabet) for _ in range(draw.randint(0, 6))] for _ in range(3))
        text = Detokenizer(tokenizer).stream()
        begun = "".join(text.push(token) for token in trunk)
        twin = text.fork()
        first = "".join([*(text.push(token) for token in one), text.flush()])
        second = "".join([*(twin.push(token) for token in two), twin.flush()])
        assert begun + first == "".join(stream(tokenizer, trunk + one))
        assert begun + second == "".join(stream(tokenizer, trunk + two))


@pytest.mark.parametrize("text", SAMPLES)
def test_a_pipeline_streams_whole_characters(pipe, text):
    """The model is made to say the text: the chunks are its characters, the completion's text their sum."""

    def say(logits, batch):
        said = text.encode()
        at = (batch.length - batch.prompt_length).clamp(max=len(said) - 1).tolist()
        forced = logits.new_full(logits.shape, -1e9)
        for row, byte in enumerate(said[n] for n in at):
            forced[row, byte] = 0.0
        return forced

    chunks = list(pipe.replace(processors=say).stream([1], max_new_tokens=len(text.encode()), temperature=0))
    assert [chunk.text for chunk in chunks if chunk.text] == list(text)
