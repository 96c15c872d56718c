"""The demo model's tokenizer: a small byte-level BPE in Llama-3's form."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from . import words
from .tasks import LETTERS, conversation, written_questions

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
START_HEADER, END_HEADER = "<|start_header_id|>", "<|end_header_id|>"
END_OF_TURN = "<|eot_id|>"
SPECIAL_TOKENS = (BEGIN, END, START_HEADER, END_HEADER, END_OF_TURN)

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r"\s*[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim"
    " + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{%- endif %}"
)


def corpus(seed: int) -> Iterator[str]:
    """Yield the text from which the merges are learned."""
    rng = random.Random(seed)
    letters = "".join(f" {letter} {letter.upper()}" for letter in LETTERS)
    lists = [*words.VALUES_EN.values(), *words.VALUES_ZH.values(), words.KEYS_EN, words.KEYS_ZH]
    lists += [words.PLAIN_EN, words.PLAIN_ZH, words.UNITS_EN, words.UNITS_ZH]
    entries = written_questions()
    characters = " ".join([*words.COMMON_ZH, *{c: None for entry in entries for text in entry for c in text}])
    for _ in range(400):
        yield from (letters, "system", "user", "assistant", "\n\n", characters) * 2
        for entry in entries:
            yield from entry
        for values in lists:
            yield " ".join(values)
            yield from values
    for _ in range(3_000):
        for turn in conversation(rng):
            yield from turn


def build_tokenizer(vocabulary_size: int, seed: int) -> Tokenizer:
    """Learn the merges, with digits and Chinese characters kept single, then install Llama-3's pattern."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    llama3 = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    single = pre_tokenizers.Split(Regex(r"\p{N}|\p{Han}"), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(SPECIAL_TOKENS),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([single, llama3, byte_level])
    tokenizer.train_from_iterator(corpus(seed), trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([llama3, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BEGIN}:0 $A:0",
                pair=f"{BEGIN}:0 $A:0 {BEGIN}:1 $B:1",
                special_tokens=[(BEGIN, token_id(tokenizer, BEGIN))],
            ),
        ]
    )
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a token that the vocabulary must contain."""
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the vocabulary has no token {token!r}")
    return found


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write ``tokenizer.json`` and the settings that transformers reads beside it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": BEGIN,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TURN,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    text = json.dumps(settings, ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
