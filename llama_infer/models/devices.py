"""Which device a model runs on, and in which numbers by default."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ParameterError, suggest

if TYPE_CHECKING:
    import torch

DTYPES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
    "float64": "float64",
    "auto": "auto",
}
"""Names of a dtype, and what transformers calls it. "auto" is the checkpoint's own."""


def available_devices() -> list[str]:
    """The devices of this machine in order of preference: every cuda device, mps, cpu."""
    import torch

    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return [*cuda, *mps, "cpu"]


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name, or the best of this machine: cuda, then mps, then the CPU.

    ``"cuda"`` is the current cuda device. Raises ParameterError, which lists the devices that are there, for a device
    that is absent or unknown.
    """
    import torch

    known = available_devices()
    if name is None:
        name = known[0].partition(":")[0]
    wanted = f"cuda:{torch.cuda.current_device()}" if name == "cuda" and known[0].startswith("cuda") else name
    if wanted not in known:
        raise ParameterError(f"device={name!r} is not on this machine. Here: {', '.join(known)}")
    return torch.device(wanted)


def default_dtype(device: torch.device) -> str:
    """The name of the dtype that is fast on a device.

    bfloat16 on the CPU and on cuda devices of compute capability 8.0 (Ampere) or later; float16 on older cuda devices,
    which only emulate bfloat16; on mps bfloat16 where it works (macOS 14), else float16.
    """
    import torch

    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float16"
    if device.type == "mps":
        try:
            torch.ones(1, dtype=torch.bfloat16, device=device).add_(1)
        except (RuntimeError, TypeError):
            return "float16"
    return "bfloat16"


def dtype_name(given: str) -> str:
    """The full name of a dtype given by name or alias; ParameterError for one that is unknown."""
    name = DTYPES.get(str(given).removeprefix("torch.").lower())
    if name is None:
        bits = "; for 8-bit or 4-bit weights see quantization" if any(c in str(given) for c in "48") else ""
        known = ", ".join(DTYPES)
        raise ParameterError(f"unknown dtype {given!r}{suggest(str(given), DTYPES)} Known: {known}{bits}")
    return name
