"""A picture of what each temperature and truncation does to one distribution. Needs matplotlib."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

import torch

from llama_infer import transform_logits

# In the order of the chain. The temperatures come first; the rest removes tokens, or prefers others.
PANELS: list[dict[str, Any]] = [
    {"smoothing_factor": 0.3},
    {"dynatemp_low": 0.2, "dynatemp_high": 2.0},
    {"edt_theta": 3.0},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_h": 0.6},
    {"top_k": 20},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"typical_p": 0.5},
    {"epsilon_cutoff": 0.01},
    {"eta_cutoff": 0.02},
    {"top_n_sigma": 1.0},
    {"top_a": 0.5},
    {"tfs": 0.9},
    {"p_less": True},
    {"p_less_norm": True},
    {"mirostat": 2, "mirostat_tau": 2.5},
    {"xtc_probability": 1.0, "xtc_threshold": 0.08},
    {"min_p": 0.05, "adaptive_target": 0.1},
]
TEMPERATURES = 5  # so many of the panels, and the others behind them
GREY, ORANGE, BLUE = "#cfd3d8", "#e8954a", "#5b94cf"
FLOOR = 1e-4


def distribution(size: int = 60) -> torch.Tensor:
    """Logits [1, size] as a model might give them: a few good tokens, some plausible ones, a tail. Likeliest first."""
    rank = torch.arange(size, dtype=torch.float32)
    logits = -1.1 * torch.log1p(rank / 5) - 0.05 * rank + 0.15 * torch.sin(2.4 * rank)
    return logits.sort(descending=True).values[None]


def draw(plt: Any, path: str) -> None:
    """One panel a part: before in grey, after in colour."""
    logits = distribution()
    before = logits.softmax(-1)[0].tolist()
    ranks = range(1, len(before) + 1)
    figure, grid = plt.subplots(4, 5, figsize=(14, 9), sharex=True, sharey=True, layout="constrained")
    for number, (axes, params) in enumerate(zip(grid.flat, PANELS, strict=True)):
        after = transform_logits(logits, **params).softmax(-1)[0].tolist()
        color = ORANGE if number < TEMPERATURES else BLUE
        axes.bar(ranks, before, width=1.0, color=GREY)
        axes.bar(ranks, after, width=1.0, color=color)
        axes.stairs(before, [rank - 0.5 for rank in range(1, len(before) + 2)], color="#333333", linewidth=0.9)
        axes.set(yscale="log", ylim=(FLOOR, 1), xlim=(0.5, len(before) + 0.5), xticks=(1, 20, 40, 60))
        axes.set_title("\n".join(f"{name}={value}" for name, value in params.items()), fontsize=10, family="monospace")
        kept = sum(p > 0 for p in after)
        note = f"keeps {kept} of {len(after)}" if kept < len(after) else "keeps all"
        axes.text(0.97, 0.95, note, transform=axes.transAxes, ha="right", va="top", fontsize=9, color="#333333")
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("token, the likeliest first")
    figure.supylabel("probability")
    patches = [plt.Rectangle((0, 0), 1, 1, color=color) for color in (GREY, ORANGE, BLUE)]
    labels = ["before", "after: temperature", "after: truncation"]
    figure.legend(patches, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=90)


def main() -> int:
    """Draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="samplers.png", help="the file to write (default: samplers.png)")
    path = parser.parse_args().output
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
    except ImportError:
        print("this example draws with matplotlib: pip install 'llama-infer[plot]'", file=sys.stderr)
        return 1
    matplotlib.use("Agg")
    draw(importlib.import_module("matplotlib.pyplot"), path)
    print(f"{len(PANELS)} panels in {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
