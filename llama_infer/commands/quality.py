"""``llama-infer quality``: what quantizations of a model cost and gain, in one table."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from ..errors import MissingFileError
from .options import positive


def add_quality_options(parser: argparse.ArgumentParser) -> None:
    """Which model and policies, on which text."""
    add = parser.add_argument
    add("--base-model", default="demo", metavar="MODEL", help="folder or hub id; default: demo, the built-in model")
    add(
        "--quantization",
        action="append",
        metavar="NAME",
        help="a policy to measure; may be repeated; default: int8 and int4",
    )
    add("--data-file", metavar="FILE", help="text to predict; default: the unquantised model's own answers")
    add("--tokens", type=positive, default=2048, metavar="INTEGER", help="how much of it; default: 2048")
    add("--window", type=positive, default=256, metavar="INTEGER", help="tokens predicted together; default: 256")
    add("--tokenizer-path", metavar="PATH", help="folder or hub id of the tokenizer; default: the model's own")
    add("--revision", metavar="NAME", help="branch, tag or commit of a hub model")
    add("--dtype", metavar="NAME", help="bfloat16, float16 or float32; default: what suits the device")
    add("--device", metavar="NAME", help="cpu, cuda, ...; default: the best there is")
    add("--json", action="store_true", help="as JSON")


def quality(args: argparse.Namespace) -> int:
    """Measures, prints the table and returns 0."""
    from ..quality import compare, table

    rows = compare(
        args.base_model,
        tuple(args.quantization or ("int8", "int4")),
        text=None if args.data_file is None else _text(args.data_file),
        tokens=args.tokens,
        window=args.window,
        tokenizer=args.tokenizer_path,
        revision=args.revision,
        dtype=args.dtype,
        device=args.device,
    )
    print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) if args.json else table(rows))
    return 0


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise MissingFileError(f"{path!r} cannot be read: {error.strerror or error}") from error
