"""Score a demo model with transformers: exact answers per task, greedy or sampled.

python examples/score_demo_model.py FOLDER --items tests/data/demo_evaluation.jsonl
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .evaluation import Item
from .tokenizer import END, END_OF_TURN

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 160}
SAMPLING: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.2,
    "top_k": 40,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "max_new_tokens": 160,
}
BATCH_SIZE = 64


@dataclass
class Score:
    """How many items of a task were asked, answered exactly, and ended by the model itself."""

    asked: int = 0
    exact: int = 0
    ended: int = 0


def same_length_batches(prompts: list[list[int]]) -> Iterator[list[int]]:
    """Yield the indexes of prompts of equal length, so that no batch needs padding."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    for indexes in by_length.values():
        for first in range(0, len(indexes), BATCH_SIZE):
            yield indexes[first : first + BATCH_SIZE]


def answers(folder: Path, items: list[Item], dtype: torch.dtype, sampled: bool) -> Iterator[tuple[Item, str, bool]]:
    """Yield each item with the model's answer and whether the model ended its turn itself."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in (END, END_OF_TURN)]
    settings = SAMPLING if sampled else GREEDY
    prompts = []
    for item in items:
        text = tokenizer.apply_chat_template(item["messages"], tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer.encode(text, add_special_tokens=False))
    for indexes in same_length_batches(prompts):
        ids = torch.tensor([prompts[index] for index in indexes])
        mask = torch.ones_like(ids)
        output = model.generate(ids, attention_mask=mask, eos_token_id=ends, pad_token_id=ends[0], **settings)
        for index, row in zip(indexes, output[:, ids.shape[1] :].tolist(), strict=True):
            ended = any(token in ends for token in row)
            yield items[index], tokenizer.decode(row, skip_special_tokens=True), ended


def score(folder: Path, items: list[Item], dtype: torch.dtype, sampled: bool, show: bool = False) -> dict[str, Score]:
    """Return the score of each task; ``show`` prints the wrong answers."""
    scores: dict[str, Score] = defaultdict(Score)
    for item, answer, ended in answers(folder, items, dtype, sampled):
        entry = scores[item["task"]]
        entry.asked += 1
        entry.ended += ended
        entry.exact += answer == item["expected"]
        if show and answer != item["expected"]:
            print(f"{item['messages'][-1]['content']!r}: {answer!r}, expected {item['expected']!r}")
    return dict(scores)
