"""The demo model's evaluation items: every written question and held-out material of each task."""

import json
import random
from pathlib import Path
from typing import TypedDict

from . import tasks

SYSTEM_PROMPT = "You are a helpful assistant. 你是一个乐于助人的助手。"
EVALUATION_SEED = 4_321
Message = dict[str, str]  # "role" and "content"
COUNTS = {"sum": 300, "reverse": 100, "copy": 100, "json": 100, "memory": 100}


class Item(TypedDict):
    """One evaluation item: the model should answer the messages with exactly the expected text."""

    task: str
    messages: list[Message]
    expected: str


def make_item(task: str, turns: list[tasks.Turn]) -> Item:
    """Return an item that asks for the answer of the last turn and gives all the earlier ones."""
    messages: list[Message] = [{"role": "system", "content": SYSTEM_PROMPT}]
    for user, assistant in turns:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": assistant})
    expected = messages.pop()["content"]
    return {"task": task, "messages": messages, "expected": expected}


def held_out_turns(rng: random.Random, task: str) -> list[tasks.Turn]:
    """Return the turns of one held-out item of a synthetic task."""
    if task == "memory":
        return tasks.memory(rng, lambda: tasks.question(rng), held_out=True)
    makers = {"sum": tasks.sum_of_two, "reverse": tasks.reverse, "copy": tasks.copy, "json": tasks.record}
    return [makers[task](rng, True)]


def evaluation_items() -> list[Item]:
    """Return all items; every call returns the same ones."""
    items = [make_item("question", [(entry[0], entry[1])]) for entry in tasks.written_questions()]
    for task, count in COUNTS.items():
        rng = random.Random(f"{EVALUATION_SEED} {task}")
        seen: set[str] = set()
        while len(seen) < count:
            turns = held_out_turns(rng, task)
            asked = "\n".join(user for user, _ in turns)
            if asked not in seen:
                seen.add(asked)
                items.append(make_item(task, turns))
    return items


def write_items(path: Path) -> None:
    """Write the items as JSON lines."""
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in evaluation_items()]
    path.write_text("".join(lines), encoding="utf-8")


def read_items(path: Path) -> list[Item]:
    """Read the items that :func:`write_items` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
