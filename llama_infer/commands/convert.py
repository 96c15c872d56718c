"""``llama-infer convert``: a checkpoint as safetensors in a new folder."""

from __future__ import annotations

import argparse

from .options import positive


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    """What to convert, and into what."""
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a folder in Meta's layout, or whatever --base-model takes")
    add("target", metavar="TARGET", help="the folder to make")
    add("--adapter", metavar="MODEL", help="folder or hub id of a LoRA adapter, to be merged into the weights")
    add("--tokenizer-path", metavar="PATH", help="folder or hub id of the tokenizer; default: the source's own")
    add("--revision", metavar="NAME", help="branch, tag or commit of a hub model")
    add("--dtype", metavar="NAME", help="bfloat16, float16 or float32; default: the source's")
    add("--quantization", metavar="NAME", help="int8 or int4: quantised, for this library alone to read")
    add("--context-length", type=positive, metavar="INTEGER", help="for Meta's layout, whose files do not say it")
    add("--trust-remote-code", action="store_true", help="let the source run its own Python code; only if you trust it")


def convert(args: argparse.Namespace) -> int:
    """Converts and returns 0. Raises LlamaInferError; the target is then as it was."""
    from ..models.convert import convert as write

    notes = write(
        args.source,
        args.target,
        adapter=args.adapter,
        tokenizer=args.tokenizer_path,
        revision=args.revision,
        dtype=args.dtype,
        context_length=args.context_length,
        quantization=args.quantization,
        trust_remote_code=args.trust_remote_code,
    )
    print(f"written: {args.target}")
    for note in notes:
        print(f"note: {note}")
    return 0
