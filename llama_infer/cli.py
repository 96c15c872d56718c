"""The command line: ``llama-infer run``, ``chat``, ``convert``, ``quality``, ``parts``. No torch before a model."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NoReturn

from . import __version__
from .commands.chat import chat
from .commands.convert import add_convert_options, convert
from .commands.options import add_model_options, add_prompt_options, add_sampling_options
from .commands.parts import parts
from .commands.quality import add_quality_options, quality
from .commands.run import one_line, run
from .errors import LlamaInferError, ParameterError, suggest

_ABOUT = """\
Answer prompts with a Llama-family model.

commands:
  run      a file of prompts in, predictions out
  chat     a conversation in the terminal
  convert  a checkpoint as safetensors: Meta's layout, a merged adapter, a quantised model
  quality  what quantizations of a model cost and gain
  parts    the parts that pipelines are built of"""
_EXAMPLES = """\
examples:
  llama-infer run                             the sample prompts, the built-in model
  llama-infer run --data_file prompts.txt --predictions_file out/predictions.jsonl
  llama-infer run --base_model ./llama-3-chinese-8b-instruct-v3 --load_in_4bit --temperature 0
  llama-infer chat --system "You answer in one sentence."
  llama-infer parts --json

llama-infer COMMAND --help tells more."""

_RUN = """\
Answers every line of a file and writes the answers to a JSON file, which is valid at every instant: whenever the
command is killed, what it has saved is there. Options may be written with hyphens or underscores.

A checkpoint with a chat template gets it, with or without --with_prompt, because an instruct model answers badly
without; --no_with_prompt feeds the lines as they are."""
_RUN_MORE = """\
data file:    UTF-8, one prompt a line; a line ends at \\n or \\r\\n; blank lines are skipped.
predictions:  a list of {"Input", "Output", "finish_reason", "seed", "tokens"}, with "Error" where a prompt failed;
              a name that ends in .jsonl gets one such object a line. The parameters of the run are written to
              generation_config.json beside it.
exit code:    0, or 1 when some prompts failed, 2 when nothing could begin, 130 after Ctrl-C.

examples:
  llama-infer run --data_file prompts.txt --predictions_file predictions.json --temperature 0
  llama-infer run --base_model meta-llama/Meta-Llama-3-8B-Instruct --gpus 0 --dtype bfloat16 --seed 1 --n 3
  llama-infer run --interactive"""
_CHAT = """\
Talks with the model in the terminal and remembers what was said. /help lists the commands of a conversation."""
_CONVERT = """\
Writes a checkpoint as safetensors with its config and tokenizer into a new folder, which appears when it is complete or
not at all. SOURCE is Meta's original layout (params.json, consolidated.*.pth), or a model with an adapter to merge."""
_CONVERT_MORE = """\
examples:
  llama-infer convert Meta-Llama-3-8B/original ./llama-3-8b
  llama-infer convert ./llama-3-8b ./merged --adapter ./llama-3-chinese-8b-lora --dtype bfloat16"""
_QUALITY = """\
Measures quantizations against the unquantised model: perplexity of a text, Kullback-Leibler divergence (nats a token),
how often the likeliest token is the same, size in memory, and tokens a second of one sequence. Both models are in
memory."""
_PARTS = """\
Lists everything that can be named in a slot of a pipeline, with the package that it comes from."""


class _Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line and suggests the nearest option."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        usage = f"{prog} [OPTION ...]"
        super().__init__(prog, usage, description, epilog, formatter_class=layout, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Like ``parse_args``, where a word that is not known gets a suggestion."""
        args, unknown = self.parse_known_args(words)
        if unknown:
            flag = unknown[0].partition("=")[0]
            if not flag.startswith("-"):
                self.error(f"unexpected argument {unknown[0]!r}")
            self.error(f"unknown option {flag}{suggest(flag, self._option_string_actions)}")
        return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; a mistake of the user is one line on standard error, never raised."""
    _never_fail_to_print()
    try:
        code = _dispatch([_hyphens(word) for word in (sys.argv[1:] if argv is None else argv)])
        sys.stdout.flush()
        return code
    except SystemExit as end:  # argparse's help and errors
        return end.code if isinstance(end.code, int) else 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _close_stdout()
        return 141  # as a process that was ended by the signal
    except LlamaInferError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def _dispatch(words: list[str]) -> int:
    command = words[0] if words else ""
    if command in _COMMANDS:
        return _COMMANDS[command](words[1:])
    parser = _Parser("llama-infer", _ABOUT, _EXAMPLES)
    parser.usage = "llama-infer COMMAND [OPTION ...]"
    parser.add_argument("--version", action="version", version=f"llama-infer {__version__}")
    if not words:
        parser.print_help(sys.stderr)
        return 2
    if not command.startswith("-"):
        hint = suggest(command, _COMMANDS)
        parser.error(f"unknown command {command!r}{hint} Commands: {', '.join(_COMMANDS)}")
    _, unknown = parser.parse_known_args(words)
    parser.error(f"{(unknown or words)[0]!r} comes after a command: llama-infer run {' '.join(words)}")


def _run(words: Sequence[str]) -> int:
    parser = _Parser("llama-infer run", _RUN, _RUN_MORE)
    add = parser.add_argument_group("files").add_argument
    add("--data-file", metavar="FILE", help="prompts, one a line; default: two sample prompts")
    add("--predictions-file", metavar="FILE", help="where the answers go; default: ./predictions.json")
    add("--interactive", action="store_true", help="talk instead: the same as llama-infer chat")
    _add_options(parser)
    args = parser.parse(words)
    if not args.interactive:
        return run(args)
    for flag, file in (("--data-file", args.data_file), ("--predictions-file", args.predictions_file)):
        if file is not None:
            raise ParameterError(f"{flag} has no use with --interactive, which asks you for the prompts: drop one")
    return chat(args)


def _chat(words: Sequence[str]) -> int:
    parser = _Parser("llama-infer chat", _CHAT)
    _add_options(parser)
    return chat(parser.parse(words))


def _convert(words: Sequence[str]) -> int:
    parser = _Parser("llama-infer convert", _CONVERT, _CONVERT_MORE)
    parser.usage = "llama-infer convert SOURCE TARGET [OPTION ...]"
    add_convert_options(parser)
    return convert(parser.parse(words))


def _quality(words: Sequence[str]) -> int:
    parser = _Parser("llama-infer quality", _QUALITY)
    add_quality_options(parser)
    return quality(parser.parse(words))


def _parts(words: Sequence[str]) -> int:
    parser = _Parser("llama-infer parts", _PARTS)
    parser.add_argument("--json", action="store_true", help="as JSON")
    return parts(parser.parse(words))


_COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = MappingProxyType(
    {"run": _run, "chat": _chat, "convert": _convert, "quality": _quality, "parts": _parts}
)


def _add_options(parser: argparse.ArgumentParser) -> None:
    from .pipeline import declared_params

    add_prompt_options(parser)
    add_sampling_options(parser, declared_params())
    add_model_options(parser)


def _hyphens(word: str) -> str:
    """``--base_model=a_b`` is ``--base-model=a_b``."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if word.startswith("--") else word


def _never_fail_to_print() -> None:
    """A terminal that knows no Chinese shows question marks; bytes that are no text come in as U+FFFD."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # replaced by something else, or in use already
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def _close_stdout() -> None:
    """Whoever read our output has gone; without this, Python complains about the rest of it on its way out."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
