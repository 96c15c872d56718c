"""A watermark in the choice of tokens, and its detector. Kirchenbauer et al. 2023, arXiv 2301.10226 (KGW)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ParameterError
from ..parts import Param
from .penalties import IN_PLACE, largest, last_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from ..batch import Batch

_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_LANES = 4
"""Tokens that share one hash of 64 bits, 16 bits each."""
_STEPS = 1 << 16
_ROWS_AT_ONCE = 1 << 18

_RATIO = Param(
    default=0.25,
    check=lambda v: 0 < v < 1,
    range="0 < watermark_greenlist_ratio < 1",
    help="share of the vocabulary that is green",
)
_KEY = Param(
    default=15485863,
    check=lambda v: 0 <= v < 1 << 63,
    range="0 <= watermark_key < 2**63",
    help="whoever knows it can detect the watermark",
)
_WIDTH = Param(
    default=1,
    check=lambda v: 1 <= v <= 16,
    range="1 <= watermark_context_width <= 16",
    help="how many tokens decide which the next green ones are",
)


class Watermark:
    """Adds ``watermark_bias`` to the logits of green tokens. Which tokens are green is a hash of the key and the last
    ``watermark_context_width`` tokens, so that whoever has the key can count them: :class:`WatermarkDetector`.

    The scheme is "lefthash" of arXiv 2301.10226 (transformers' ``WatermarkLogitsProcessor``) with a hash of our own,
    which is the same on every device, where theirs reseeds a generator for each row: SplitMix64 (see
    :mod:`llama_infer.noise`) folds the key and the tokens, oldest first, into 64 bits; number ``id // 4`` of the stream
    that they begin gives 16 bits to each of four token ids, and a token is green where these, read as a signed number
    plus 32768, are below ``round(ratio * 65536)``. So each token is green on its own with that probability. A row with
    fewer tokens than the width is left as it is. Parameters:

    watermark_bias: any finite number, 2 is usual; 0 is neutral.
    watermark_greenlist_ratio: above 0, below 1.
    watermark_key: 0 to 2**63 - 1; keep one of your own secret.
    watermark_context_width: 1 to 16; wider is harder to forge and weaker against edits.
    """

    name = "watermark"
    params = {
        "watermark_bias": Param(
            default=0.0,
            neutral=0.0,
            check=math.isfinite,
            range="a finite number",
            help="added to the logits of green tokens; 0 is off",
        ),
        "watermark_greenlist_ratio": _RATIO,
        "watermark_key": _KEY,
        "watermark_context_width": _WIDTH,
    }
    traits = IN_PLACE

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V], in place."""
        width = batch["watermark_context_width"]
        contexts = last_tokens(batch.tokens, batch.length, largest(batch, "watermark_context_width"))
        keys = _fold(batch["watermark_key"], contexts, width)
        limits = (batch["watermark_greenlist_ratio"].double() * _STEPS).round().clamp(1, _STEPS - 1).long()
        bias = batch["watermark_bias"].masked_fill(batch.length < width, 0.0).to(logits.dtype)
        rows = max(1, _ROWS_AT_ONCE // logits.shape[1])  # so that the bits stay in the processor's cache
        for start in range(0, len(batch), rows):
            part = slice(start, start + rows)
            green = _green(keys[part], limits[part], logits.shape[1])
            logits[part].add_(green * bias[part, None])
        return logits


@dataclass(frozen=True, slots=True)
class WatermarkResult:
    """What the detector found.

    Attributes:
        scored: tokens that were looked at.
        green: how many of them are green.
        z_score: ``(green - ratio * scored) / sqrt(scored * ratio * (1 - ratio))``; 4 and more is strong evidence.
        p_value: the probability of such a z-score or a larger one in text without the watermark.
    """

    scored: int
    green: int
    z_score: float
    p_value: float


class WatermarkDetector:
    """Counts green tokens in token ids; needs no model.

    Args:
        watermark_greenlist_ratio, watermark_key, watermark_context_width: as the text was made with.
        ignore_repeats: count each token once for the same tokens before it, without which repetitive text misleads.

    Raises ParameterError for a value out of range.
    """

    def __init__(
        self,
        watermark_greenlist_ratio: float = 0.25,
        watermark_key: int = 15485863,
        watermark_context_width: int = 1,
        ignore_repeats: bool = True,
    ) -> None:
        self.ratio: float = _RATIO.validate("watermark_greenlist_ratio", watermark_greenlist_ratio)
        self.key: int = _KEY.validate("watermark_key", watermark_key)
        self.width: int = _WIDTH.validate("watermark_context_width", watermark_context_width)
        self.ignore_repeats = ignore_repeats

    def __call__(self, token_ids: Sequence[int], prompt_length: int = 0) -> WatermarkResult:
        """Scores the tokens from ``prompt_length`` on that have enough tokens before them.

        Give prompt and answer to score the whole answer. Without a token to score: z-score 0, p-value 1.
        """
        ids = [int(token) for token in token_ids]
        if any(token < 0 for token in ids) or prompt_length < 0:
            raise ParameterError("token ids and prompt_length are integers from 0")
        first = max(self.width, prompt_length)
        grams: list[tuple[int, ...]] = [tuple(ids[at - self.width : at + 1]) for at in range(first, len(ids))]
        if self.ignore_repeats:
            grams = list(dict.fromkeys(grams))
        if not grams:
            return WatermarkResult(0, 0, 0.0, 1.0)
        limit = min(max(round(self.ratio * _STEPS), 1), _STEPS - 1)
        green, share = self._count(grams, limit), limit / _STEPS
        z_score = (green - share * len(grams)) / math.sqrt(len(grams) * share * (1 - share))
        return WatermarkResult(len(grams), green, z_score, 0.5 * math.erfc(z_score / math.sqrt(2)))

    def _count(self, grams: Sequence[tuple[int, ...]], limit: int) -> int:
        """How many of the last tokens are green after those before them."""
        import torch

        table = torch.tensor(grams, dtype=torch.int64)
        contexts, tokens = table[:, :-1].flip(1), table[:, -1]
        key, width = torch.full_like(tokens, self.key), torch.full_like(tokens, self.width)
        bits = _bits(_fold(key, contexts, width)[:, None], (tokens // _LANES)[:, None])
        lanes = bits.view(torch.int16).gather(1, (tokens % _LANES)[:, None])[:, 0]
        return int((lanes.long() + _STEPS // 2 < limit).sum())


def _fold(key: Tensor, contexts: Tensor, width: Tensor) -> Tensor:
    """int64 [R]: a key for each row out of ``key`` [R] and the first ``width`` [R] of ``contexts`` [R, K], the last
    token first."""
    from .. import noise

    state = noise.mix(key + _GAMMA)
    for back in reversed(range(contexts.shape[1])):
        mixed = noise.mix(state + (contexts[:, back] + 1) * _GAMMA)
        state = mixed.where(width > back, state)
    return state


def _bits(keys: Tensor, index: Tensor) -> Tensor:
    """int64: 64 bits for each number of the streams."""
    from .. import noise

    return noise.mix(keys + (index + 1) * _GAMMA)


def _green(keys: Tensor, limits: Tensor, vocab_size: int) -> Tensor:
    """bool [R, V]."""
    import torch

    blocks = torch.arange(-(-vocab_size // _LANES), device=keys.device)
    lanes = _bits(keys[:, None], blocks).view(torch.int16)[:, :vocab_size]
    return lanes < (limits - _STEPS // 2).to(torch.int16)[:, None]
