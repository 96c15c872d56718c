"""Regular expressions read one character at a time: where a match may be under way is known at every character.

That is what a stop pattern needs and :mod:`re` does not tell: text that may still become a match is held back, all
other text is sent. A small Thompson automaton; character classes and flags are left to :mod:`re`. The time for a
character is bounded for every pattern.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NoReturn, TypeAlias

from .errors import ParameterError

State: TypeAlias = dict[int, int]
"""The states of a pattern that are reached: where the earliest match in each began."""

_ACCEPT = -1
_LIMIT = 20_000
"""How large an automaton may get."""
_REPEAT = re.compile(r"([*+?])|\{(?!\})(\d*)(?:(,)(\d*))?\}")
_ESCAPE = re.compile(r"\\(?:0[0-7]{0,2}|x..|u.{4}|U.{8}|N\{[^}]*\}|.)", re.DOTALL)
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_GROUP = re.compile(r"\((?:\?(?::|P<\w+>|([ais]+):))?")
_FLAGS = {"a": re.ASCII, "i": re.IGNORECASE, "s": re.DOTALL}


class Pattern:
    """A regular expression as an automaton that reads a character at a time (Thompson 1968).

    Unlike a backtracking search its time for a character is bounded, and it knows where the earliest match that is
    still possible began. The syntax and the meaning of each character, class and flag are :mod:`re`'s.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._tests: list[Callable[[str], Any]] = []
        self._follow: list[tuple[int, ...]] = []
        self._epsilon: dict[int, list[int]] = {}
        self._at = self._size = 0
        start = re.match(r"(?:\(\?[ais]+\))*", source)
        self._at = start.end() if start else 0
        tree = self._alternatives(re.compile(source).flags & (re.ASCII | re.IGNORECASE | re.DOTALL))
        if self._at < len(source):
            self._refuse("this", self._at)
        self._next: list[int] = []
        self._first = self._reached(self._build(tree, _ACCEPT))
        if _ACCEPT in self._first:
            raise ParameterError(f"stop_regex: {source!r} matches the empty text, so every answer would end at once")
        self._follow = [self._reached(state) for state in self._next]

    @staticmethod
    def of(source: Any) -> Pattern:
        """The automaton of a pattern. Raises ParameterError with the position of what is wrong."""
        if not isinstance(source, str):
            raise ParameterError(f"stop_regex: a pattern is a string, not a {type(source).__name__}")
        try:
            return _pattern(source)
        except re.error as error:
            at = "" if error.pos is None else f" at position {error.pos}"
            raise ParameterError(f"stop_regex: {source!r} is not a valid pattern: {error.msg}{at}") from error
        except (RecursionError, OverflowError) as error:
            raise ParameterError(f"stop_regex: the pattern {source[:40]!r}... is too large") from error

    def step(self, state: State, character: str, at: int) -> tuple[State, int | None]:
        """The state after ``character``, the text's number ``at``; and where a match that ends with it starts."""
        reached: State = {}
        for number, start in (*state.items(), *((first, at) for first in self._first if first not in state)):
            if self._tests[number](character):
                for target in self._follow[number]:
                    if reached.get(target, at) >= start:
                        reached[target] = start
        return reached, reached.pop(_ACCEPT, None)

    def _refuse(self, what: str, at: int) -> NoReturn:
        raise ParameterError(
            f"stop_regex: {what} at position {at} of {self._source!r} is not supported: a pattern has characters, "
            "classes, groups, alternatives and repeats; no anchors, lookarounds, back references or possessive forms"
        )

    def _alternatives(self, flags: int) -> tuple[Any, ...]:
        options = [self._sequence(flags)]
        while self._source.startswith("|", self._at):
            self._at += 1
            options.append(self._sequence(flags))
        return ("or", *options)

    def _sequence(self, flags: int) -> tuple[Any, ...]:
        items: list[Any] = []
        while self._at < len(self._source) and self._source[self._at] not in "|)":
            item = self._item(flags)
            repeat = _REPEAT.match(self._source, self._at)
            if repeat:
                self._at = repeat.end()
                item = ("repeat", item, *_bounds(repeat))
                if self._source.startswith("+", self._at):
                    self._refuse("a possessive repeat", self._at)
                self._at += self._source.startswith("?", self._at)
            items.append(item)
        return ("and", *items)

    def _item(self, flags: int) -> tuple[Any, ...]:
        """A group or what stands for one character."""
        at, first = self._at, self._source[self._at]
        if first == "(":
            group = _GROUP.match(self._source, at)
            if group is None or (group.end() == at + 1 and self._source.startswith("?", at + 1)):
                self._refuse(repr(self._source[at : at + 3]), at)
            self._at = group.end()
            inner = self._alternatives(flags | sum(_FLAGS[flag] for flag in set(group[1] or "")))
            self._at += 1
            return inner
        if first in "^$":
            self._refuse(f"the anchor {first!r}", at)
        known = _ESCAPE.match(self._source, at) or _CLASS.match(self._source, at)
        text = known[0] if known else first
        if first == "\\" and text[1] in "AZzbB123456789":
            self._refuse(repr(text), at)
        self._at += len(text)
        if len(text) == 1 and text != "." and not flags & re.IGNORECASE:
            return ("one", text.__eq__)
        return ("one", re.compile(text if known or text == "." else re.escape(text), flags).fullmatch)

    def _build(self, node: tuple[Any, ...], then: int) -> int:
        """The state from which ``node`` and then the state ``then`` are matched. States below -1 read nothing."""
        self._size += 1
        if self._size > _LIMIT:
            raise OverflowError
        if node[0] == "one":
            self._tests.append(node[1])
            self._next.append(then)
            return len(self._tests) - 1
        if node[0] == "or":
            return self._fork([self._build(option, then) for option in node[1:]])
        if node[0] == "and":
            for item in reversed(node[1:]):
                then = self._build(item, then)
            return then
        _, item, least, most = node
        if most is None:
            loop = self._fork([then])
            self._epsilon[loop].append(self._build(item, loop))
            then = loop
        else:
            end = then
            for _ in range(most - least):
                then = self._fork([self._build(item, then), end])
        for _ in range(least):
            then = self._build(item, then)
        return then

    def _fork(self, targets: list[int]) -> int:
        number = -2 - len(self._epsilon)
        self._epsilon[number] = targets
        return number

    def _reached(self, state: int) -> tuple[int, ...]:
        """What can be reached without reading."""
        seen, todo = {state}, [state]
        while todo:
            for target in self._epsilon.get(todo.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    todo.append(target)
        self._size += len(seen)
        if self._size > _LIMIT:
            raise OverflowError
        return tuple(number for number in seen if number >= _ACCEPT)


@lru_cache(maxsize=256)
def _pattern(source: str) -> Pattern:
    return Pattern(source)


def _bounds(repeat: re.Match[str]) -> tuple[int, int | None]:
    if repeat[1]:
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[repeat[1]]
    least = int(repeat[2] or 0)
    if not repeat[3]:
        return least, least
    return least, int(repeat[4]) if repeat[4] else None
