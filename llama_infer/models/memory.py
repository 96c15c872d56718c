"""What fits: weights, keys and values against the memory that is free, before either is made."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InsufficientMemoryError, LoadingError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .checks import Checkpoint

ROW_TOKENS = 512
"""Tokens that a row must have room for, or the batch gets smaller; longer rows are admitted as the memory allows."""
_SHARE = 0.9
"""Of what is free; the rest is for activations and for others."""
_GROWTH = 2
"""Buffers grow by doubling: they may be twice as large as what they hold."""
_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryPlan:
    """How much is decoded at a time.

    Attributes:
        batch_size: rows.
        tokens: rows times the longest that there is room for; infinite when nobody knows how much is free.
        note: what the user should know: why there are fewer rows than were asked for.
    """

    batch_size: int
    tokens: float = math.inf
    note: str = ""


def plan_batch(model: PreTrainedModel, asked: int, context_length: int) -> MemoryPlan:
    """The batch of a loaded model that fits into what is free. InsufficientMemoryError when not even one row does.

    The system counts the files that it could drop as free. A model's own are read in every step: they are not.
    """
    from .mapped import mapped_bytes

    devices = {parameter.device for parameter in model.parameters() if parameter.device.type != "meta"}
    config: Any = model.config.get_text_config()
    each = token_bytes({name: getattr(config, name, None) for name in _FIELDS}, model.dtype.itemsize) * _GROWTH
    found = [_free(device, asked * ROW_TOKENS * each / _SHARE) for device in devices]
    free = sum(bytes for bytes in found if bytes is not None) - mapped_bytes(model)
    if not found or None in found or not each:
        return MemoryPlan(asked)
    tokens = int(_SHARE * free / each)
    needed = min(ROW_TOKENS, context_length)
    rows = min(asked, tokens // needed)
    if not rows:
        raise InsufficientMemoryError(
            f"keys and values of one row of {needed} tokens need {_size(needed * each)} and {_size(free)} are free. "
            "Choose a smaller model, or quantization='bnb-nf4'"
        )
    note = f"batch_size is {rows}, not {asked}: {_size(free)} are free for keys and values" if rows < asked else ""
    return MemoryPlan(rows, tokens, note)


def check_fits(checkpoint: Checkpoint, dtype: torch.dtype | str, device: torch.device, whole: bool) -> None:
    """Raises LoadingError, before a weight is read, when the weights and one row cannot be held.

    ``whole``: no policy makes the weights smaller on their way in; otherwise a quarter of them must fit.
    """
    stored = {"float64": 8, "float32": 4}.get(checkpoint.dtype or "", 2)
    packed = checkpoint.quantization and not checkpoint.unpacked
    size = stored if isinstance(dtype, str) or packed else dtype.itemsize
    files = sum(path.stat().st_size for path in checkpoint.weights)
    weights = files if checkpoint.numbers is None else checkpoint.numbers * size
    text = checkpoint.config.get("text_config")
    row = ROW_TOKENS * token_bytes({**checkpoint.config, **(text if isinstance(text, Mapping) else {})}, size)
    needed = weights * (1 if whole else 0.25) + row
    free = _free(device, needed)
    if free is not None and needed > free:
        raise LoadingError(
            f"{checkpoint.folder} does not fit: its weights are {_size(weights)} in {_name(dtype)}, a row of "
            f"{ROW_TOKENS} tokens needs {_size(row)}, and {_size(free)} are free on {device}. Choose a smaller "
            "model, a smaller dtype, or quantization='bnb-nf4'"
        )


_FIELDS = ("num_hidden_layers", "num_key_value_heads", "num_attention_heads", "head_dim", "hidden_size")


def token_bytes(config: Mapping[str, Any], itemsize: int) -> int:
    """Bytes of one token's keys and values in all layers; 0 where a configuration does not say."""
    layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    if not layers or not heads or not config.get("hidden_size"):
        return 0
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return int(2 * layers * (config.get("num_key_value_heads") or heads) * head_dim * itemsize)


def _free(device: torch.device, needed: float) -> int | None:
    """Bytes that can be had; where that is too little, without models that were dropped and wait to be collected."""
    free = free_memory(device)
    if free is not None and free < needed:
        gc.collect()
        free = free_memory(device)
    return free


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on a device; None when the system does not tell."""
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type != "cpu":
        return None
    limits = [bytes for bytes in (_available(), _left_in_cgroup()) if bytes is not None]
    return min(limits, default=None)


def _available() -> int | None:
    """What the machine has left, its file cache included."""
    try:
        for line in (_PROC / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _left_in_cgroup() -> int | None:
    """What the tightest limit on this process's control groups leaves, file cache that can be dropped included."""
    left = []
    for folder, limit, used in _cgroup_folders():
        for place in (folder, *folder.parents):
            if not place.is_relative_to(_CGROUPS):
                break
            try:
                most, now = int((place / limit).read_text()), int((place / used).read_text())
                stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # "max", or no such controller
                continue
            files = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            left.append(max(0, most - now + files))
    return min(left, default=None)


def _cgroup_folders() -> list[tuple[Path, str, str]]:
    """The folders of this process's memory controllers, with the names of the limit and the usage there."""
    try:
        lines = (_PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            folders.append((_CGROUPS / path.lstrip("/"), "memory.max", "memory.current"))
        elif "memory" in controllers.split(","):
            folder = _CGROUPS / "memory" / path.lstrip("/")
            folders.append((folder, "memory.limit_in_bytes", "memory.usage_in_bytes"))
    return folders


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 5e7 else f"{count / 1e6:.1f} MB"


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")
