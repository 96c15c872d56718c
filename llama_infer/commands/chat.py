"""``llama-infer chat``: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..errors import DataFileError, LlamaInferError, ParameterError, UnknownParameterError, suggest
from ..types import Chunk, Message
from .options import parse_value, pipeline_options, sampling_params
from .run import one_line, open_pipeline, print_head

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..parts import Param
    from ..pipeline import Pipeline
    from ..types import Value

HELP = """\
/reset            forget the conversation
/system TEXT      another system prompt, and a new conversation; without TEXT: show it
/set NAME VALUE   a sampling parameter, such as: /set temperature 0.5; without VALUE or NAME: show them
/save FILE        write the conversation as JSON messages
/help             this list
/exit             leave, as Ctrl-D does; Ctrl-C stops an answer
//TEXT            say a text that begins with a slash"""


class Conversation(Protocol):
    """What a session needs of :class:`llama_infer.Chat`."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """What was said."""

    @property
    def system(self) -> str | None:
        """The system prompt."""

    def stream(self, text: str, **params: Value) -> Iterator[Chunk]:
        """The answer, piece by piece."""

    def reset(self) -> None:
        """Forgets what was said."""


class Continuation:
    """Each text continued by itself: no template, no memory."""

    messages: tuple[Message, ...] = ()
    system = None

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = pipe

    def stream(self, text: str, **params: Value) -> Iterator[Chunk]:
        """What the model goes on with."""
        return self._pipe.stream(text, **params)

    def reset(self) -> None:
        """Nothing to forget."""


class Session:
    """A conversation and the commands that steer it."""

    def __init__(
        self, start: Callable[[str | None], Conversation], params: dict[str, Value], declared: Mapping[str, Param]
    ) -> None:
        self._start = start
        self._params = params
        self._declared = declared
        self._talk = start(None)
        self._commands = {
            "reset": self._reset,
            "system": self._system,
            "set": self._set,
            "save": self._save,
            "help": self._help,
        }

    def take(self, line: str) -> bool:
        """Acts on a line; False when the user leaves. Errors are shown, never raised."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                name, _, rest = line[1:].partition(" ")
                if name in ("exit", "quit"):
                    return False
                self._command(name, rest.strip())
            elif line.strip():
                self._answer(line.removeprefix("/") if line.startswith("//") else line)
        except KeyboardInterrupt:
            print("[stopped]", flush=True)
        except LlamaInferError as error:
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        return True

    def _command(self, name: str, rest: str) -> None:
        known = [f"/{command}" for command in (*self._commands, "exit")]
        if name not in self._commands:
            hint = suggest(f"/{name}", known)
            raise ParameterError(f"unknown command '/{name}'{hint} Known: {', '.join(known)}")
        self._commands[name](rest)

    def _answer(self, text: str) -> None:
        chunks = self._talk.stream(text, **self._params)
        reason = None
        try:
            for chunk in chunks:
                if chunk.index == 0:
                    print(chunk.text, end="", flush=True)
                    reason = chunk.finish_reason or reason
        finally:
            getattr(chunks, "close", lambda: None)()
            print(flush=True)
        if reason == "length":
            print("[cut: no room for more tokens; /set max_new_tokens allows longer answers]", flush=True)

    def _reset(self, rest: str) -> None:
        self._talk.reset()
        print("a new conversation")

    def _system(self, rest: str) -> None:
        if not rest:
            print(self._talk.system or "no system prompt")
            return
        self._talk = self._start(rest)
        print("a new conversation, with that system prompt")

    def _set(self, rest: str) -> None:
        name, text = (*re.split(r"\s*[\s=]\s*", rest, maxsplit=1), "")[:2]
        name = name.replace("-", "_")
        if name and name not in self._declared:
            hint = suggest(name, self._declared)
            raise UnknownParameterError(f"unknown parameter {name!r}{hint} Known: {', '.join(self._declared)}")
        if text:
            param = self._declared[name]
            self._params[name] = parse_value(name, param, _words(text) if param.type in (tuple, dict) else [text])
        for shown in [name] if name else self._declared:
            print(f"{shown} = {self._params.get(shown, 'the default')}", flush=True)

    def _save(self, rest: str) -> None:
        from ..files import write_atomically

        if not rest:
            raise DataFileError("/save needs the name of a file, such as: /save talk.json")
        messages = [{"role": m.role, "content": m.content} for m in self._talk.messages]
        text = json.dumps(messages, ensure_ascii=False, indent=2) + "\n"
        path = Path(os.path.realpath(os.path.expanduser(rest)))
        try:
            write_atomically(path, [text.encode(errors="replace")])
        except (OSError, ValueError) as error:
            raise DataFileError(f"{rest!r} cannot be written: {error}") from error
        print(f"{len(messages)} messages are saved in {path}")

    def _help(self, rest: str) -> None:
        print(HELP)


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ParameterError(f"{text!r} cannot be read: {error}") from error


def chat(args: argparse.Namespace) -> int:
    """Talks until the user leaves. Returns 0. Raises LlamaInferError before the conversation begins."""
    from ..pipeline import declared_params

    declared = declared_params()
    params = sampling_params(args, declared)
    if params.pop("n", 1) != 1:
        raise ParameterError("a conversation has one answer a turn: drop --n")
    options = pipeline_options(args)
    plain = args.no_with_prompt
    if plain and args.system is not None:
        raise ParameterError("--system has no place in a prompt without a template: drop it or --no-with-prompt")
    pipe = open_pipeline(args, {**options, "formatter": "plain" if plain else "chat"})
    pipe.explain(**params)  # raises where the parameters do not suit this model

    def start(system: str | None) -> Conversation:
        return Continuation(pipe) if plain else pipe.chat(system=args.system if system is None else system)

    session = Session(start, params, {name: param for name, param in declared.items() if name != "n"})
    print_head(pipe)
    print("/help lists the commands; Ctrl-D leaves", flush=True)
    for line in _typed():
        if not session.take(line):
            break
    return 0


def _typed() -> Iterator[str]:
    """The lines that the user types, or those of a pipe."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # editing and history in input()
    while True:
        try:
            line = input("> ") if terminal else sys.stdin.readline()
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)", flush=True)
            continue
        except EOFError:
            print()
            return
        if not terminal and not line:
            return
        yield line.rstrip("\r\n")
