"""``llama-infer parts``: everything that can be named in a slot of a pipeline."""

from __future__ import annotations

import argparse
import json


def parts(args: argparse.Namespace) -> int:
    """Prints the parts, built in and from installed packages, without importing any of them."""
    from ..registry import installed

    rows = [{"kind": p.kind, "name": p.name, "package": p.package, "version": p.version} for p in installed()]
    if args.json:
        print(json.dumps(rows, ensure_ascii=False, indent=2))
        return 0
    table = [["kind", "name", "package", "version"], *(list(row.values()) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0
