"""The built-in model, on the shipped weights: what it must be able to do, greedily and under the command line's
sampling defaults, on items that its training text never had (the written questions apart)."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from llama_infer import Pipeline, Request
from llama_infer.commands.options import DEFAULTS

ITEMS = [json.loads(line) for line in (Path(__file__).parent / "data/demo_evaluation.jsonl").read_text().splitlines()]
LEAST = {"question": 0.99, "sum": 0.90, "reverse": 0.90, "copy": 0.90, "json": 0.90, "memory": 0.90}
DEMO = Path(__file__).parent.parent / "llama_infer/demo"


@pytest.fixture(scope="module")
def scores() -> dict[str, dict[str, float]]:
    pipe = Pipeline("demo", batch_size=64)
    settings: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0}, "sampled": {**DEFAULTS, "seed": 1}}
    return {name: _scores(pipe, {**params, "max_new_tokens": 160}) for name, params in settings.items()}


def _scores(pipe: Pipeline, params: dict[str, Any]) -> dict[str, float]:
    right, count = defaultdict(int), defaultdict(int)
    answers = pipe.run(Request(item["messages"], params) for item in ITEMS)
    for item, answer in zip(ITEMS, answers, strict=True):
        count[item["task"]] += 1
        right[item["task"]] += answer.text == item["expected"] and answer.finish_reason == "stop"
    return {task: right[task] / count[task] for task in count}


def test_greedy_scores(scores: dict[str, dict[str, float]]) -> None:
    assert set(scores["greedy"]) == set(LEAST)
    short = {task: score for task, score in scores["greedy"].items() if score < LEAST[task]}
    assert not short, scores["greedy"]


def test_the_scores_hold_under_the_command_lines_sampling(scores: dict[str, dict[str, float]]) -> None:
    lost = {task: scores["greedy"][task] - scores["sampled"][task] for task in LEAST}
    assert max(lost.values()) <= 0.05, scores


def test_enough_was_written_for_it() -> None:
    assert sum(item["task"] == "question" for item in ITEMS) >= 200
    prompts = {item["messages"][-1]["content"] for item in ITEMS}
    assert {"为什么要减少污染，保护环境？", "你有什么建议？"} <= prompts


def test_it_is_small_and_complete() -> None:
    assert (DEMO / "model.safetensors").stat().st_size <= 8_000_000
    generation = json.loads((DEMO / "generation_config.json").read_text())
    assert len(generation["eos_token_id"]) == 2
    pipe = Pipeline("demo")
    assert pipe.loaded.model.config.num_key_value_heads < pipe.loaded.model.config.num_attention_heads
    tokenizer: Any = pipe.loaded.tokenizer
    for text in (*"0123456789", *(f" {letter}" for letter in "abcxyzABC")):
        assert len(tokenizer.encode(text, add_special_tokens=False)) == 1
