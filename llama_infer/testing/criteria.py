"""The conformance kit for stopping criteria."""

from __future__ import annotations

import codecs
import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ..parameters import ENGINE_PARAMS
from ..parts import Param, Stop
from ..types import Value
from .cases import bind, draw_rows, resolve_part
from .declarations import check_declarations, conformance_error, declared_by

_ANSWERS = (
    "plain words, one after another",
    "la la la la la la la la la la la la",
    "a stop: END. and more END of text",
    "日本語 🙂 and é, cut 🙃🙃",
    "12 345 6789\n\nUser: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
)


def check_stopping(part: Any, /, *, seed: int = 0, answers: Sequence[str] = (), **params: Any) -> None:
    """Checks a stopping criterion on texts that come in tokens of one byte and of several.

    It returns None, a bool or a :class:`~llama_infer.parts.Stop` whose ``text_end`` is within the text; it changes
    nothing that it sees; ``hold`` is 0 to the text's length, and enough: what a later stop cuts off was not sent
    before; sequences that are asked in turn do not disturb each other (a criterion with memory has
    ``stateful = True``, and a deep copy for each sequence); while its parameters are neutral or unset it neither stops
    nor holds anything back.

    Args:
        part: a name, a class, an object or a function.
        seed: of the cases.
        answers: further texts to try, besides a few of the kit's own.
        params: values to try by name, ``stop`` and ``max_new_tokens`` included.
    """
    found = resolve_part("stopping", part)
    tried = check_declarations("stopping", found, seed, params)
    bound = bind(found, 264, ends=(257, 260))
    draw = random.Random(seed)
    unset = {name: param.neutral for name, param in declared_by(found).items() if _can_be_unset(param)}
    assigned = [row for row in draw_rows(tried, 12, draw)] or [{}]
    plays = [_Play(bound, seed, text, row, draw) for text in (*_ANSWERS, *answers) for row in assigned]
    for play in plays:
        play.run()
    for one, other in zip(plays, plays[1:] + plays[:1], strict=True):
        expected = one.result(), other.result()
        one.restart()
        other.restart()
        while one.advance() | other.advance():
            pass
        if (one.result(), other.result()) != expected:
            one.fail("asked about two sequences in turn it answers otherwise than about one")
    for play in plays if unset else ():
        quiet = _Play(bound, seed, play.text, {**play.row, **unset}, draw)
        quiet.run()
        if quiet.stopped or quiet.held:
            quiet.fail("it stops or holds text back although its parameters are neutral")


def _can_be_unset(param: Param) -> bool:
    return param.neutral is not None or param.default is None


class _Play:
    """One answer fed to a live sequence with the criterion and nothing else."""

    def __init__(self, part: Any, seed: int, text: str, row: Mapping[str, Value], draw: random.Random) -> None:
        self.part, self.seed, self.text, self.row = part, seed, text, row
        self.pieces: list[bytes] = []
        data, sizes = text.encode(), draw.choice([(1,), (1, 2, 3, 7)])
        while data:
            size = draw.choice(sizes)
            self.pieces.append(data[:size])
            data = data[size:]
        self.restart()

    def restart(self) -> None:
        """Begins again, with a copy of a stateful criterion."""
        from ..engine.sequence import LiveSequence, Task
        from ..types import Request

        own = copy.deepcopy(self.part) if getattr(self.part, "stateful", False) else self.part
        params = {**{name: param.default for name, param in ENGINE_PARAMS.items()}, **self.row}
        task = Task(Request((1, 2)), 1, params, (1, 2), 0, 1)
        self._stream = _Bytes()
        self._sequence = LiveSequence(task, self._stream, [_Watched(self, own)])
        self._at, self._sent, self.stopped, self.held = 0, "", False, False

    def run(self) -> None:
        """To the end."""
        while self.advance():
            pass

    def result(self) -> tuple[str, Any]:
        """The text and why it ended."""
        return self._sequence.text, self._sequence.finish_reason

    def fail(self, promise: str, cause: Exception | None = None) -> NoReturn:
        """Raises."""
        where = f"the text {self._sequence.text!r} of {self.text!r}, {dict(self.row)}"
        raise conformance_error("stopping", self.part, promise, where, self.seed) from cause

    def advance(self) -> bool:
        """One more token; false when nothing is left."""
        sequence = self._sequence
        if sequence.finish_reason is not None:
            return False
        if self._at == len(self.pieces):
            self._sent += sequence.finish("length").text
        else:
            self._stream.next = self.pieces[self._at]
            self._at += 1
            token = self.pieces[self._at - 1][0]
            self._sent += sequence.append(token, 0.0, ()).text
            self.stopped = sequence.finish_reason is not None
        if sequence.finish_reason is not None and self._sent != sequence.text:
            self.fail(f"what was sent ({self._sent!r}) is not the final text: hold back what may still be cut")
        return True


class _Watched:
    """The criterion, with a look at what it answers."""

    def __init__(self, play: _Play, criterion: Any) -> None:
        self.play, self.criterion = play, criterion

    def __call__(self, sequence: Any) -> Stop | bool | None:
        before = _seen(sequence)
        said = self._answer(self.criterion, sequence)
        if before != _seen(sequence):
            self.play.fail("it changed the sequence")
        if said is None or isinstance(said, bool):
            return said
        if not isinstance(said, Stop):
            self.play.fail(f"it returned a {type(said).__name__}; a criterion returns None, a bool or a Stop")
        elif said.reason not in ("stop", "length"):
            self.play.fail(f"the reason {said.reason!r} is neither 'stop' nor 'length'")
        elif said.text_end is not None and not 0 <= said.text_end <= len(sequence.text):
            self.play.fail(f"text_end={said.text_end} is not within the text")
        return said

    def hold(self, sequence: Any) -> int:
        """The criterion's, 0 where it has none."""
        if not hasattr(self.criterion, "hold"):
            return 0
        held = self._answer(self.criterion.hold, sequence)
        if not isinstance(held, int) or not 0 <= held <= len(sequence.text):
            self.play.fail(f"hold() is from 0 to the length of the text; it was {held!r}")
        self.play.held |= bool(held)
        return int(held)

    def _answer(self, ask: Any, sequence: Any) -> Any:
        try:
            return ask(sequence)
        except Exception as error:
            self.play.fail(f"it raised {error!r}", error)


def _seen(sequence: Any) -> tuple[Any, ...]:
    return list(sequence.token_ids), sequence.text, sequence.text_before, dict(sequence.params)


class _Bytes:
    """The text of tokens whose bytes are said beforehand."""

    def __init__(self) -> None:
        self.next = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self.next)

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)

    def fork(self) -> _Bytes:
        return copy.deepcopy(self)
