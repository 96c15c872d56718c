"""Figures for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table, its first column to the left."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    print(f"\n{title}")
    for row in [head, *rows]:
        cells = [
            cell.ljust(w) if at == 0 else cell.rjust(w) for at, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  " + "  ".join(cells))
    print(flush=True)


def times(ratio: Mapping[str, float]) -> str:
    """A ratio with its least and its most."""
    return f"{ratio['median']:.2f}x ({ratio['least']:.2f} - {ratio['most']:.2f})" if ratio else "-"
