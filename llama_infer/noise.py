"""Counter-based noise: a random number is a pure function of (seed, branch, position, stream, index).

Nothing is drawn in sequence, so a row's numbers are the same alone or in company, in any batch order, on any device,
and a run can be taken up again in its middle. The generator is SplitMix64 (Steele, Lea, Flood 2014), written in int64
tensors: torch's int64 wraps as uint64 does, its ``>>`` is arithmetic, hence the masks.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA, _C1, _C2 = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mix(x: Tensor) -> Tensor:
    """SplitMix64's output function, elementwise on int64: ``mix(state + gamma)`` is its next number."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _C1
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _C2
    return x ^ (x >> 31 & (1 << 33) - 1)


def key(seed: Tensor, branch: Tensor, position: Tensor, stream: str) -> Tensor:
    """int64 [R] keys of the rows' streams; each argument but the name is int64 [R]."""
    name = zlib.crc32(stream.encode())
    return mix(mix(mix(mix(seed + _GAMMA) + branch * _GAMMA) + position * _GAMMA) + _signed(name * _GAMMA % (1 << 64)))


def uniform(keys: Tensor, index: Tensor) -> Tensor:
    """float32 [R, K] in the open interval (0, 1): number ``index`` int64 [R, K] of each row's stream ``keys`` [R]."""
    bits = mix(keys[:, None] + (index + 1) * _GAMMA) >> 32 & 0xFFFFFFFF
    # Without the clamp the topmost values would round to 1.0 in float32.
    return ((bits.float() + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform noise; ``argmax(logits + gumbel)`` draws from softmax(logits)."""
    return -torch.log(-torch.log1p(-uniform))
