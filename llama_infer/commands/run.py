"""``llama-infer run``: a file of prompts in, predictions out."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import LlamaInferError, ParameterError
from .options import pipeline_options, restrict_gpus, sampling_params

if TYPE_CHECKING:
    from ..jobs import PredictionsWriter, Summary
    from ..pipeline import Pipeline
    from ..types import Completion, Value

SAMPLES = ("为什么要减少污染，保护环境？", "你有什么建议？")
PREDICTIONS = "./predictions.json"
SHOWN = 10
_WIDEST = 200


def run(args: argparse.Namespace) -> int:
    """Answers the prompts. Returns 0; 1 when some failed, 130 on Ctrl-C. Raises LlamaInferError before work begins."""
    from ..jobs import PredictionsWriter, count_prompts, read_prompts
    from ..pipeline import declared_params

    params = sampling_params(args, declared_params())
    options = pipeline_options(args)
    formatter = batch_formatter(args)
    file = args.data_file
    total = len(SAMPLES) if file is None else count_prompts(file)
    prompts = iter(SAMPLES) if file is None else read_prompts(file)
    writer = PredictionsWriter(
        PREDICTIONS if args.predictions_file is None else args.predictions_file, data_file=args.data_file
    )
    try:
        with writer:
            pipe = open_pipeline(args, {**options, "formatter": formatter})
            pipe.explain(**params)  # raises where the parameters do not suit this model
            first = list(itertools.islice(prompts, SHOWN))
            print_head(pipe)
            _print_prompts(first, total)
            summary = _answer(pipe, itertools.chain(first, prompts), total, writer, params)
    except KeyboardInterrupt:
        saved = f"{writer.rows} results are saved in {writer.path}" if writer.rows else "nothing was done yet"
        print(f"\ninterrupted: {saved}", file=sys.stderr)
        return 130
    except LlamaInferError as error:
        if not writer.rows:
            raise
        print(f"error: {one_line(error)} ({writer.rows} results were done)", file=sys.stderr)
        return 1
    _print_summary(summary)
    return 1 if summary.failed else 0


def batch_formatter(args: argparse.Namespace) -> Any:
    """The formatter that the options ask for."""
    from ..prompts.auto import AutoFormatter
    from ..prompts.chat import ChatFormatter
    from ..prompts.plain import PlainFormatter

    if args.no_with_prompt:
        if args.system is not None:
            raise ParameterError("--system has no place in a prompt without a template: drop it or --no-with-prompt")
        return PlainFormatter()
    formatter = ChatFormatter if args.with_prompt else AutoFormatter
    return formatter() if args.system is None else formatter(system=args.system)


def open_pipeline(args: argparse.Namespace, options: dict[str, Any]) -> Pipeline:
    """Loads the model; torch is imported here and not before."""
    restrict_gpus(args)
    from ..pipeline import Pipeline

    return Pipeline(args.base_model, **options)


def print_head(pipe: Pipeline) -> None:
    """Where the model is, and what a user should know about it."""
    dtype = str(pipe.loaded.model.dtype).removeprefix("torch.")
    print(f"device: {pipe.loaded.device}, dtype: {dtype}")
    for note in pipe.notes:
        print(f"note: {note}")


def one_line(error: BaseException) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _print_prompts(first: list[str], total: int | None) -> None:
    more = total is None or total > len(first)
    print(
        f"{'an unknown number of' if total is None else total} prompts"
        + (f", the first {len(first)}:" if more else ":")
    )
    for number, prompt in enumerate(first, 1):
        print(f"  {number}. {_shortened(prompt)}")
    print(flush=True)


def _shortened(prompt: str) -> str:
    return prompt if len(prompt) <= _WIDEST else prompt[:_WIDEST] + "…"


def _answer(
    pipe: Pipeline, prompts: Iterator[str], total: int | None, writer: PredictionsWriter, params: dict[str, Value]
) -> Summary:
    from tqdm import tqdm

    from ..jobs import run_file

    with tqdm(total=total, unit="prompt", file=sys.stderr, disable=None) as bar:  # None: silent when not a terminal
        number = itertools.count(1)

        def show(completion: Completion) -> None:
            with tqdm.external_write_mode(file=sys.stdout):  # the bar steps aside
                print(_result(next(number), completion), flush=True)
            bar.update()

        return run_file(pipe, prompts, writer, params, on_result=show)


def _result(number: int, completion: Completion) -> str:
    lines = [f"[{number}] {_shortened(str(completion.request.prompt))}"]
    if completion.error is not None:
        lines.append(f"error: {one_line(completion.error)}")
    else:
        samples = (completion, *completion.alternatives)
        marks = [f"({index} of {len(samples)}) " if len(samples) > 1 else "" for index in range(1, len(samples) + 1)]
        lines += [mark + sample.text for mark, sample in zip(marks, samples, strict=True)]
    return "\n".join(lines) + "\n"


def _print_summary(summary: Summary) -> None:
    failed = f" ({summary.failed} failed)" if summary.failed else ""
    print(
        f"{summary.prompts} prompts{failed}, {summary.tokens} tokens in {summary.seconds:.1f} s, "
        f"{summary.tokens_per_second:.1f} tokens a second"
    )
    print(f"predictions: {summary.predictions_file}")
