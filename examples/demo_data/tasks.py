"""Generators for the demo model's synthetic tasks.

A conversation is a list of turns, and a turn is a pair ``(user, assistant)``.
Every generator takes a ``random.Random`` and the flag ``held_out``: training
draws only material that :func:`is_held_out` rejects, the evaluation only
material that it accepts, so the two never share a sum, a string, a record or a
fact.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence

from . import words
from .questions_en import QUESTIONS_EN
from .questions_zh import QUESTIONS_ZH

Turn = tuple[str, str]

SPLIT_SEED = 20_26
LETTERS = "abcdefghijklmnopqrstuvwxyz"

SUM_FORMS = (
    "{a}+{b}=?",
    "{a}+{b}=",
    "{a} + {b} = ?",
    "What is {a} plus {b}?",
    "{a}加{b}等于多少？",
    "{a}+{b}等于多少？",
    "What is {a}+{b}?",
    "{a} + {b}",
)
REVERSE_FORMS = (
    "Reverse: {s}",
    "Reverse: {s}",
    "Reverse the letters: {s}",
    "Reverse {s}",
    "倒写：{s}",
    "反转：{s}",
    "把 {s} 倒过来写",
)
COPY_FORMS = (
    "Copy: {s}",
    "Copy: {s}",
    "Copy the letters: {s}",
    "Repeat: {s}",
    "抄写：{s}",
    "重复：{s}",
    "把 {s} 照抄一遍",
)
JSON_FORMS_EN = ("To JSON: {s}", "To JSON: {s}", "Convert to JSON: {s}", "Write as JSON: {s}", "{s}", "{s}")
JSON_FORMS_ZH = ("转成 JSON：{s}", "转成 JSON：{s}", "写成 JSON：{s}", "{s}")

# kind -> (statement, acknowledgement, question, answer); {v} is the value.
FACTS_EN = {
    "colour": (
        "My favourite colour is {v}.",
        "I will remember that your favourite colour is {v}.",
        "What is my favourite colour?",
        "Your favourite colour is {v}.",
    ),
    "food": (
        "My favourite food is {v}.",
        "I will remember that your favourite food is {v}.",
        "What is my favourite food?",
        "Your favourite food is {v}.",
    ),
    "animal": (
        "My favourite animal is the {v}.",
        "I will remember that your favourite animal is the {v}.",
        "What is my favourite animal?",
        "Your favourite animal is the {v}.",
    ),
    "sport": (
        "My favourite sport is {v}.",
        "I will remember that your favourite sport is {v}.",
        "What is my favourite sport?",
        "Your favourite sport is {v}.",
    ),
    "name": ("My name is {v}.", "Nice to meet you, {v}!", "What is my name?", "Your name is {v}."),
    "city": ("I live in {v}.", "I will remember that you live in {v}.", "Where do I live?", "You live in {v}."),
    "pet": (
        "My pet is called {v}.",
        "I will remember that your pet is called {v}.",
        "What is my pet called?",
        "Your pet is called {v}.",
    ),
    "number": (
        "My lucky number is {v}.",
        "I will remember that your lucky number is {v}.",
        "What is my lucky number?",
        "Your lucky number is {v}.",
    ),
}
FACTS_ZH = {
    "colour": (
        "我最喜欢的颜色是{v}。",
        "记住了，你最喜欢的颜色是{v}。",
        "我最喜欢的颜色是什么？",
        "你最喜欢的颜色是{v}。",
    ),
    "food": (
        "我最喜欢的食物是{v}。",
        "记住了，你最喜欢的食物是{v}。",
        "我最喜欢的食物是什么？",
        "你最喜欢的食物是{v}。",
    ),
    "animal": (
        "我最喜欢的动物是{v}。",
        "记住了，你最喜欢的动物是{v}。",
        "我最喜欢的动物是什么？",
        "你最喜欢的动物是{v}。",
    ),
    "sport": (
        "我最喜欢的运动是{v}。",
        "记住了，你最喜欢的运动是{v}。",
        "我最喜欢的运动是什么？",
        "你最喜欢的运动是{v}。",
    ),
    "name": ("我叫{v}。", "很高兴认识你，{v}！", "我叫什么名字？", "你叫{v}。"),
    "city": ("我住在{v}。", "记住了，你住在{v}。", "我住在哪里？", "你住在{v}。"),
    "pet": ("我的宠物叫{v}。", "记住了，你的宠物叫{v}。", "我的宠物叫什么？", "你的宠物叫{v}。"),
    "number": ("我的幸运数字是{v}。", "记住了，你的幸运数字是{v}。", "我的幸运数字是多少？", "你的幸运数字是{v}。"),
}
# Other wordings of a statement or question, seen in training only.
REWORDED = {
    "My favourite colour is {v}.": ("I like the colour {v} best.", "My favorite color is {v}."),
    "What is my favourite colour?": ("Which colour do I like best?", "What is my favorite color?"),
    "My name is {v}.": ("I am called {v}.", "I'm {v}."),
    "What is my name?": ("What am I called?", "Do you remember my name?"),
    "I live in {v}.": ("My home is in {v}.", "I live in the city of {v}."),
    "Where do I live?": ("Which city do I live in?",),
    "我叫{v}。": ("我的名字是{v}。",),
    "我叫什么名字？": ("我的名字是什么？", "你记得我叫什么吗？"),
    "我住在{v}。": ("我的家在{v}。",),
    "我住在哪里？": ("我的家在哪里？",),
    "我最喜欢的颜色是什么？": ("我喜欢什么颜色？",),
}
UNKNOWN_EN = "You have not told me yet."
UNKNOWN_ZH = "你还没有告诉我。"


def is_held_out(*material: object) -> bool:
    """Tell whether this material belongs to the evaluation (one fifth of everything)."""
    text = repr((SPLIT_SEED, material))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 5 == 0


def made_up_word(rng: random.Random) -> str:
    """Return a pronounceable word that no list contains, such as ``Lokesa``."""
    word = "".join(rng.choice(words.SYLLABLES) for _ in range(rng.randint(2, 3)))
    return word.capitalize() if rng.random() < 0.5 else word


def question(rng: random.Random) -> Turn:
    """Return one written question, in any of its phrasings, with its answer."""
    first, answer, *others = rng.choice(rng.choice((QUESTIONS_EN, QUESTIONS_ZH)))
    asked = rng.choice((first, first, *others))
    if rng.random() < 0.15:  # People drop capitals and full stops.
        asked = asked[0].lower() + asked[1:] if rng.random() < 0.5 else asked.rstrip("。.？?！!")
    return asked, answer


def sum_of_two(rng: random.Random, held_out: bool = False) -> Turn:
    """Return an addition; pairs of two-digit numbers are split, smaller numbers are not."""
    while True:
        small = not held_out and rng.random() < 0.08
        a, b = (rng.randint(0, 9), rng.randint(0, 99)) if small else (rng.randint(10, 99), rng.randint(10, 99))
        if small and rng.random() < 0.5:
            a, b = b, a
        if small or is_held_out("sum", min(a, b), max(a, b)) == held_out:
            return rng.choice(SUM_FORMS).format(a=a, b=b), str(a + b)


def spaced_letters(rng: random.Random, held_out: bool) -> list[str]:
    """Return two to eight letters whose string is (or is not) held out."""
    while True:
        letters = rng.choices(LETTERS, k=rng.randint(2, 8))
        if rng.random() < 0.15:
            letters = [letter.upper() for letter in letters]
        if is_held_out("letters", "".join(letters).lower()) == held_out:
            return letters


def reverse(rng: random.Random, held_out: bool = False) -> Turn:
    """Return a request to reverse spaced letters."""
    letters = spaced_letters(rng, held_out)
    return rng.choice(REVERSE_FORMS).format(s=" ".join(letters)), " ".join(reversed(letters))


def copy(rng: random.Random, held_out: bool = False) -> Turn:
    """Return a request to copy spaced letters."""
    letters = spaced_letters(rng, held_out)
    return rng.choice(COPY_FORMS).format(s=" ".join(letters)), " ".join(letters)


def record_value(rng: random.Random, chinese: bool) -> str:
    """Return a value for a record: a word, two words, a number, a quantity or a made-up word."""
    lists = words.VALUES_ZH if chinese else words.VALUES_EN
    plain = words.PLAIN_ZH if chinese else words.PLAIN_EN
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(rng.choice(list(lists.values())))
    if kind < 0.62:
        return rng.choice(plain)
    if kind < 0.74:
        return str(rng.randint(0, 10 ** rng.randint(1, 4)))
    if kind < 0.86:
        unit = rng.choice(words.UNITS_ZH if chinese else words.UNITS_EN)
        return f"{rng.randint(1, 10 ** rng.randint(1, 3))} {unit}"
    if chinese:
        return "".join(rng.choices(words.COMMON_ZH, k=rng.randint(1, 3)))
    return made_up_word(rng) if kind < 0.95 else f"{rng.choice(plain)} {rng.choice(plain)}"


def record(rng: random.Random, held_out: bool = False) -> Turn:
    """Return a sentence of two to four fields that becomes a JSON object."""
    while True:
        chinese = rng.random() < 0.35
        keys = rng.sample(words.KEYS_ZH if chinese else words.KEYS_EN, rng.randint(2, 4))
        fields = {key: record_value(rng, chinese) for key in keys}
        if is_held_out("record", *fields.items()) != held_out:
            continue
        sentence = ", ".join(f"{key}: {value}" for key, value in fields.items())
        form = rng.choice(JSON_FORMS_ZH if chinese else JSON_FORMS_EN)
        return form.format(s=sentence), json.dumps(fields, ensure_ascii=False)


def fact_value(rng: random.Random, kind: str, chinese: bool, held_out: bool) -> str:
    """Return a value for a fact of this kind; held-out values are never trained with this kind."""
    lists = words.VALUES_ZH if chinese else words.VALUES_EN
    while True:
        if kind == "number":
            value = str(rng.randint(1, 999))
        elif not held_out and rng.random() < 0.35:  # Any word at all, so that it learns to copy.
            other = rng.choice(list(lists.values()))
            made_up = "".join(rng.choices(words.COMMON_ZH, k=2)) if chinese else made_up_word(rng)
            value = rng.choice((made_up, rng.choice(other)))
        else:
            value = rng.choice(lists[kind])
        if is_held_out("fact", kind, value) == held_out:
            return value


def reworded(rng: random.Random, text: str) -> str:
    """Return the text or, at times, another wording of it."""
    return rng.choice(REWORDED.get(text, (text,))) if rng.random() < 0.4 else text


def memory(
    rng: random.Random, between: Callable[[], Turn], held_out: bool = False, opening: bool = False
) -> list[Turn]:
    """Return turns that state a fact, pass zero to two other turns, and ask for the fact.

    Only turns that open a training conversation (``opening``) may ask before anything was stated.
    """
    chinese = rng.random() < 0.5
    facts = FACTS_ZH if chinese else FACTS_EN
    kind, other_kind = rng.sample(sorted(facts), 2)
    statement, acknowledgement, asked, answer = facts[kind]
    if not held_out:
        statement, asked = reworded(rng, statement), reworded(rng, asked)
    value = fact_value(rng, kind, chinese, held_out)
    turns = [(statement.format(v=value), acknowledgement.format(v=value))]
    shape = rng.random()
    if shape < 0.08 and opening:
        turns = [(asked, UNKNOWN_ZH if chinese else UNKNOWN_EN), *turns]
    elif shape < 0.30:  # The fact changes: the later one counts.
        earlier = fact_value(rng, kind, chinese, held_out)
        turns = [(statement.format(v=earlier), acknowledgement.format(v=earlier)), *turns]
    elif shape < 0.50:  # Another fact comes with it.
        other = facts[other_kind]
        other_value = fact_value(rng, other_kind, chinese, held_out)
        turns.append((other[0].format(v=other_value), other[1].format(v=other_value)))
        rng.shuffle(turns)
    turns.extend(between() for _ in range(rng.choice((0, 0, 1, 1, 2))))
    return [*turns, (asked, answer.format(v=value))]


TASK_WEIGHTS = {"question": 0.27, "sum": 0.36, "reverse": 0.11, "copy": 0.06, "json": 0.10, "memory": 0.12}


def one_turn(rng: random.Random, weights: dict[str, float]) -> Turn:
    """Return one turn of a single-turn task, chosen by weight."""
    makers: dict[str, Callable[[random.Random], Turn]] = {
        "question": question,
        "sum": sum_of_two,
        "reverse": reverse,
        "copy": copy,
        "json": record,
    }
    names = list(makers)
    return makers[rng.choices(names, [weights[name] for name in names])[0]](rng)


def conversation(rng: random.Random, weights: dict[str, float] = TASK_WEIGHTS) -> list[Turn]:
    """Return a training conversation: often one exchange, sometimes many."""
    draw = rng.random()
    units = 1 if draw < 0.62 else rng.randint(2, 4) if draw < 0.95 else rng.randint(6, 16)
    turns: list[Turn] = []
    for _ in range(units):
        if rng.random() < weights["memory"]:
            turns.extend(memory(rng, lambda: one_turn(rng, weights), opening=not turns))
        else:
            turns.append(one_turn(rng, weights))
    return turns


def written_questions() -> Sequence[tuple[str, ...]]:
    """Return all written entries, English first."""
    return (*QUESTIONS_EN, *QUESTIONS_ZH)
