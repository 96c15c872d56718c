"""Counter-based noise: a random number is a pure function of (seed, branch, position, stream, index).

Nothing is drawn in sequence, so a row's numbers are the same alone or in company, in any batch order, on any device,
and a run can be taken up again in its middle. The generator is SplitMix64 (Steele, Lea, Flood 2014), written twice with
the same bits: in int64 tensors (torch's int64 wraps as uint64 does, its ``>>`` is arithmetic, hence the masks), and for
the CPU in numpy, whose uint64 needs half of the operations and a third of the time for each.
"""

from __future__ import annotations

import zlib
from functools import cache
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words: TypeAlias = NDArray[np.uint64]


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_UNSIGNED = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_GAMMA, _C1, _C2 = map(_signed, _UNSIGNED)
_ALL_BITS = (1 << 64) - 1
_WORD_GAMMA, _WORD_C1, _WORD_C2 = map(np.uint64, _UNSIGNED)
_1, _27, _30, _31, _32 = map(np.uint64, (1, 27, 30, 31, 32))
_BELOW_ONE = np.float32(1 - 2.0**-24)
"""Without this bound the topmost values would round to 1.0 in float32."""


def mix(x: Tensor) -> Tensor:
    """SplitMix64's output function, elementwise on int64: ``mix(state + gamma)`` is its next number."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _C1
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _C2
    return x ^ (x >> 31 & (1 << 33) - 1)


def mix_words(x: Words) -> Words:
    """The same on uint64, in place."""
    x ^= x >> _30
    x *= _WORD_C1
    x ^= x >> _27
    x *= _WORD_C2
    x ^= x >> _31
    return x


def key(seed: Tensor, branch: Tensor, position: Tensor, stream: str) -> Tensor:
    """int64 [R] keys of the rows' streams; each argument but the name is int64 [R]."""
    if seed.device.type != "cpu":
        return tensor_key(seed, branch, position, _signed(_name_word(stream)))
    return torch.from_numpy(row_keys(seed, branch, position, stream).view(np.int64))


def row_keys(seed: Tensor, branch: Tensor, position: Tensor, stream: str) -> Words:
    """The same on the CPU. In Python's integers: a row takes a microsecond, an operation on an array as long."""
    name, states = _name_word(stream), _row_states(seed, branch)
    steps = zip(states, position.tolist(), strict=True)
    return np.array([_mix(_mix(state + at * _UNSIGNED[0]) + name) for state, at in steps], dtype=np.uint64)


def _mix(x: int) -> int:
    """:func:`mix` of one number, whatever its size, as an unsigned one."""
    x &= _ALL_BITS
    x = (x ^ x >> 30) * _UNSIGNED[1] & _ALL_BITS
    x = (x ^ x >> 27) * _UNSIGNED[2] & _ALL_BITS
    return x ^ x >> 31


@cache
def _name_word(stream: str) -> int:
    return zlib.crc32(stream.encode()) * _UNSIGNED[0] & _ALL_BITS


def _row_states(seed: Tensor, branch: Tensor) -> list[int]:
    """What is the same in every step of a row; kept for the rows that asked last."""
    global _kept
    kept = _kept
    if kept is None or kept[0] is not seed or kept[1] is not branch:
        rows = zip(seed.tolist(), branch.tolist(), strict=True)
        gamma = _UNSIGNED[0]
        kept = _kept = (seed, branch, [_mix(_mix(s + gamma) + b * gamma) for s, b in rows])
    return kept[2]


_kept: tuple[Tensor, Tensor, list[int]] | None = None


def tensor_key(seed: Tensor, branch: Tensor, position: Tensor, name: int) -> Tensor:
    """:func:`key` on any device."""
    return mix(mix(mix(mix(seed + _GAMMA) + branch * _GAMMA) + position * _GAMMA) + name)


def bits(keys: Words, index: Words) -> Words:
    """32 random bits for each key and index, which broadcast."""
    return mix_words(keys + (index + _1) * _WORD_GAMMA) >> _32


def fraction(drawn: Words) -> NDArray[np.float32]:
    """32 random bits as a number in the open interval (0, 1)."""
    found = drawn.astype(np.float32)
    found += np.float32(0.5)
    found *= np.float32(2.0**-32)
    return np.minimum(found, _BELOW_ONE, out=found)


def words(tensor: Tensor) -> Words:
    """An int64 tensor on the CPU as uint64, sharing its memory."""
    return tensor.numpy().view(np.uint64)


def uniform(keys: Tensor, index: Tensor) -> Tensor:
    """float32 [R, K] in the open interval (0, 1): number ``index`` int64 [R, K] of each row's stream ``keys`` [R]."""
    if keys.device.type == "cpu":
        return torch.from_numpy(fraction(bits(words(keys)[:, None], words(index))))
    return tensor_uniform(keys, index)


def tensor_uniform(keys: Tensor, index: Tensor) -> Tensor:
    """:func:`uniform` on any device."""
    drawn = mix(keys[:, None] + (index + 1) * _GAMMA) >> 32 & 0xFFFFFFFF
    return ((drawn.float() + 0.5) * 2.0**-32).clamp_(max=float(_BELOW_ONE))


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform noise; ``argmax(logits + gumbel)`` draws from softmax(logits)."""
    if uniform.device.type == "cpu":
        return torch.from_numpy(_gumbel(uniform.numpy().copy()))
    return (-uniform).log1p_().neg_().log_().neg_()


def gumbel_of(drawn: Words) -> NDArray[np.float32]:
    """:func:`gumbel` of what :func:`bits` gave."""
    return _gumbel(fraction(drawn))


def _gumbel(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    """In place."""
    for step in (np.negative, np.log1p, np.negative, np.log, np.negative):
        step(uniform, out=uniform)
    return uniform
