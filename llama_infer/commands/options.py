"""The options of ``run`` and ``chat``, and what they mean to a pipeline."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ParameterError, UnsupportedError
from ..parts import Param
from ..types import Value

DEFAULTS: Mapping[str, Value] = {
    "temperature": 0.2,
    "top_k": 40,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "max_new_tokens": 400,
}
"""Sampling defaults of the command line: those of the script that it replaces."""

_METAVARS = {float: "NUMBER", int: "INTEGER", str: "TEXT", tuple: "VALUE", dict: "KEY=VALUE", bool: "true|false"}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, in which form, and where."""
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--base-model", default="demo", metavar="MODEL", help="folder or hub id; default: demo, the built-in model")
    add("--tokenizer-path", metavar="PATH", help="folder or hub id of the tokenizer; default: the model's own")
    add("--revision", metavar="NAME", help="branch, tag or commit of a hub model")
    add("--dtype", metavar="NAME", help="bfloat16, float16 or float32; default: what suits the device")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps, ...; default: the best there is")
    add("--gpus", metavar="IDS", help="GPUs to use, such as 0,1; several share the model's layers")
    add("--only-cpu", action="store_true", help="use no GPU (--gpus then means nothing)")
    add("--load-in-8bit", action="store_true", help="8-bit weights: the same as --quantization bnb-int8")
    add("--load-in-4bit", action="store_true", help="4-bit weights: the same as --quantization bnb-nf4")
    add("--quantization", metavar="NAME", help="policy for the weights; llama-infer parts lists them")
    add("--adapter", metavar="MODEL", help="folder or hub id of a LoRA adapter, merged into the weights as they load")
    add("--no-merge-adapter", action="store_true", help="keep the adapter beside the weights, which may be quantised")
    add("--local-files-only", action="store_true", help="use what the hub's cache holds and ask nobody for more")
    add("--attention", metavar="NAME", help="sdpa, eager or flash_attention_2; default: what suits the model")
    add("--use-flash-attention-2", action="store_true", help="the same as --attention flash_attention_2")
    add("--compile", action="store_true", help="on a GPU: compile decode steps where that is faster; takes minutes")
    add("--use-vllm", action="store_true", help="run on vLLM, where a backend of that name is installed")
    add(
        "--batch-size",
        type=positive,
        metavar="INTEGER",
        help="prompts decoded at the same time; default: chosen for you",
    )
    add(
        "--trust-remote-code",
        action="store_true",
        help="let the checkpoint run its own Python code; only if you trust it",
    )


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """How a line becomes a prompt."""
    group = parser.add_argument_group("prompt")
    choice = group.add_mutually_exclusive_group()
    choice.add_argument("--with-prompt", action="store_true", help="wrap each prompt in the model's chat template")
    choice.add_argument("--no-with-prompt", action="store_true", help="feed each prompt to the model as it is")
    group.add_argument("--system", metavar="TEXT", help="system prompt of the chat template; '' for none")


def add_sampling_options(parser: argparse.ArgumentParser, declared: Mapping[str, Param]) -> None:
    """One option for every parameter that a part declares."""
    group = parser.add_argument_group("sampling")
    for name, param in declared.items():
        default = DEFAULTS.get(name, param.default)
        unset = default is None or default in ((), {}, "")
        many = "may be repeated" if param.type in (tuple, dict) else ""
        ending = "default: unset" if unset else f"default: {default}"
        text = "; ".join(filter(None, [param.help, param.range, many, ending]))
        flag: dict[str, Any] = {"nargs": "?", "const": "true"} if param.type is bool else {}
        group.add_argument(
            "--" + name.replace("_", "-"),
            dest=f"param {name}",
            action="append",
            **flag,
            metavar=_METAVARS.get(param.type, "VALUE"),
            help=text.replace("%", "%%"),
        )


def positive(text: str) -> int:
    """A whole number above zero, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def parse_value(name: str, param: Param, texts: Sequence[str]) -> Value:
    """A parameter's value from what was typed: the last text for a single value, all of them for several.

    "none" unsets a parameter that may be unset. A mapping is given as KEY=VALUE. Raises ParameterError when a text
    cannot be read as the declared type or the value is out of range.
    """
    if param.default is None and texts[-1].lower() == "none":
        return None
    if param.type is tuple:
        return _first_accepted(name, param, texts)
    value: Value = texts[-1]
    try:
        if param.type is dict:
            value = dict(_entry(text) for text in texts)
        elif param.type is bool:
            value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[value.lower()]
        elif param.type in (int, float):
            value = param.type(value)
    except (ValueError, KeyError) as error:
        expected = (
            f"{param.type.__name__} such as {_METAVARS[param.type]}" if param.type is dict else param.type.__name__
        )
        raise ParameterError(f"{name}={' '.join(texts)!r} cannot be read: {name} takes {expected}") from error
    if param.type is dict:
        return _mapping(name, param, value)
    return _accepted(name, param, value)


def _mapping(name: str, param: Param, value: Mapping[Any, Value]) -> Value:
    """The keys as they are, or as sequences (``1,2=0.5``) where the parameter takes those."""
    try:
        return _accepted(name, param, value)
    except ParameterError:
        try:
            keys = [_ids(str(key)) for key in value]
        except ValueError:
            keys = []
        if not keys:
            raise
        return _accepted(name, param, dict(zip(keys, value.values(), strict=True)))


def _first_accepted(name: str, param: Param, texts: Sequence[str]) -> Value:
    """Texts as they are, or as numbers, or sequences of them (``1,2``), where the parameter does not take texts."""
    readings: tuple[Callable[[str], Any], ...] = (int, float, _ids)
    try:
        return _accepted(name, param, tuple(texts))
    except ParameterError:
        for reading in readings:
            try:
                return _accepted(name, param, tuple(reading(text) for text in texts))
            except ValueError:  # ParameterError is one
                continue
        raise


def _ids(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _accepted(name: str, param: Param, value: Value) -> Value:
    try:
        return param.validate(name, value)
    except TypeError as error:  # a check that compares numbers, and was given text
        raise ParameterError(f"{name}={value!r} is out of range: {param.range or error}") from error


def _entry(text: str) -> tuple[int | str, float | str]:
    key, equals, value = text.rpartition("=")
    if not equals:
        raise ValueError(text)
    return _number(key, int), _number(value, float)


def _number(text: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(text)
    except ValueError:
        return text


def sampling_params(args: argparse.Namespace, declared: Mapping[str, Param]) -> dict[str, Value]:
    """The parameters of every request: those that were typed, else the command line's defaults."""
    params: dict[str, Value] = {name: value for name, value in DEFAULTS.items() if name in declared}
    for name, param in declared.items():
        texts = getattr(args, f"param {name}")
        if texts is not None:
            params[name] = parse_value(name, param, texts)
    return params


def pipeline_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of a pipeline, without its formatter. Raises ParameterError where options contradict."""
    options: dict[str, Any] = {
        "tokenizer": args.tokenizer_path,
        "revision": args.revision,
        "dtype": args.dtype,
        "device": args.device,
        "quantization": _quantization(args),
        "adapter": args.adapter,
        "merge_adapter": not args.no_merge_adapter,
        "local_files_only": args.local_files_only,
        "attention": args.attention,
        "batch_size": args.batch_size,
        "compile": args.compile,
        "trust_remote_code": args.trust_remote_code,
    }
    if args.use_flash_attention_2:
        if args.attention not in (None, "flash_attention_2"):
            raise ParameterError(f"--use-flash-attention-2 contradicts --attention {args.attention}: give one of them")
        options["attention"] = "flash_attention_2"
    if args.gpus is not None and not _gpus(args):
        raise ParameterError(f"--gpus {args.gpus!r} names no GPU: give numbers such as 0,1, or --only-cpu")
    if args.only_cpu:
        if args.device not in (None, "cpu"):
            raise ParameterError(f"--only-cpu contradicts --device {args.device}: give one of them")
        options["device"] = "cpu"
    elif len(_gpus(args)) > 1 and args.device is None:
        options["device_map"] = "auto"
    if args.use_vllm:
        options["backend"] = _vllm()
    return options


def _quantization(args: argparse.Namespace) -> str | None:
    given = {
        "--load-in-8bit": "bnb-int8" if args.load_in_8bit else None,
        "--load-in-4bit": "bnb-nf4" if args.load_in_4bit else None,
        "--quantization": args.quantization,
    }
    chosen = {flag: policy for flag, policy in given.items() if policy is not None}
    if len(chosen) > 1:
        raise ParameterError(f"{' and '.join(chosen)} contradict each other: give one of them")
    return next(iter(chosen.values()), None)


def _vllm() -> str:
    from ..registry import installed

    if not any(part.kind == "backend" and part.name == "vllm" for part in installed()):
        raise UnsupportedError(
            "--use-vllm: there is no vLLM backend yet. Leave the option out to run on this machine's own"
        )
    return "vllm"


def _gpus(args: argparse.Namespace) -> list[str]:
    return [name.strip() for name in (args.gpus or "").split(",") if name.strip()]


def restrict_gpus(args: argparse.Namespace) -> None:
    """Hides the other GPUs from this process. It must come before torch is imported."""
    if args.only_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif args.gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(_gpus(args))
