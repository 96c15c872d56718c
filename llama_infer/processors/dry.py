"""DRY: an exponential penalty on the token that would prolong a repetition ("don't repeat yourself")."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import ParameterError
from ..history import HISTORY_ONLY
from ..parts import Context, Param
from ..types import Value
from .penalties import last_tokens, numbers, within_last

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..batch import Batch, Column

LONGEST_MATCH = 50
"""Longer matches count as this long (text-generation-webui has the same bound)."""
_LARGEST_PENALTY = 1e30
_CACHED_SETS = 64


def _are_breakers(value: Sequence[Any]) -> bool:
    return all(
        (isinstance(item, str) and item) or (isinstance(item, int) and not isinstance(item, bool) and item >= 0)
        for item in value
    )


class Dry:
    """Subtracts ``dry_multiplier * dry_base ** (match - dry_allowed_length)`` from the logit of a token that followed
    an earlier occurrence of the context's end; ``match`` is how many tokens that occurrence and the end share.

    With several occurrences the longest counts. Shorter matches than ``dry_allowed_length`` cost nothing; matches above
    50 tokens count as 50. Prompt and answer are searched. A match does not reach across a sequence breaker, and
    breakers are never penalised. By p-e-w, text-generation-webui PR 5677; names as in llama.cpp. Parameters:

    dry_multiplier: from 0, which is neutral. 0.8 is usual.
    dry_base: from 1.
    dry_allowed_length: from 0.
    dry_penalty_last_n: how many of the last tokens are searched: -1 all of them, 0 none.
    dry_sequence_breakers: strings; every token whose text contains one of them breaks matches. Token ids may stand
    among them, and must where the pipeline has no tokenizer.
    """

    name = "dry"
    params = {
        "dry_multiplier": Param(
            default=0.0,
            neutral=0.0,
            check=lambda v: 0 <= v < math.inf,
            range="0 <= dry_multiplier < inf",
            help="penalty on prolonging a repetition; 0 is off",
        ),
        "dry_base": Param(
            default=1.75,
            check=lambda v: 1 <= v < math.inf,
            range="1 <= dry_base < inf",
            help="factor of the penalty for each further token of a repetition",
        ),
        "dry_allowed_length": Param(
            default=2,
            check=lambda v: v >= 0,
            range="dry_allowed_length >= 0",
            help="the longest repetition whose continuation is not penalised by more than dry_multiplier",
        ),
        "dry_penalty_last_n": Param(
            default=-1,
            check=lambda v: v >= -1,
            range="dry_penalty_last_n >= -1",
            help="how many of the last tokens are searched for repetitions; -1: all of them",
        ),
        "dry_sequence_breakers": Param(
            default=("\n", ":", '"', "*"),
            check=_are_breakers,
            range="non-empty strings or token ids",
            help="repetitions do not reach across tokens that contain these strings",
        ),
    }
    traits = HISTORY_ONLY

    def __init__(self, context: Context | None = None) -> None:
        self._context = context
        self._texts: list[str] | None = None
        self._ids: dict[tuple[str | int, ...], list[int]] = {}
        self._masks: dict[tuple[str | int, ...], Tensor] = {}

    def bind(self, context: Context) -> Dry:
        """Learns the tokenizer, which finds the breakers' tokens when they are first needed."""
        return Dry(context)

    def prepare(self, name: str, values: Sequence[Value]) -> Column:
        """Numbers as they are; of the breakers, which set each row has."""
        import torch

        if name != "dry_sequence_breakers":
            return numbers(values)
        rows = [tuple(value) for value in values]
        sets = tuple(dict.fromkeys(rows))
        device = "cpu" if self._context is None else self._context.device
        return BreakerSets(sets, torch.tensor([sets.index(row) for row in rows], dtype=torch.int64, device=device))

    def check(self, params: Mapping[str, Value]) -> None:
        """Finds the breakers' tokens, or says why it cannot."""
        if self._context is not None:
            self._breaker_ids(tuple(params["dry_sequence_breakers"]), self._context.vocab_size)

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V], in place."""
        if batch.width < 2:
            return logits
        import torch

        tokens = self._units(batch, logits.shape[1])
        bound = min(LONGEST_MATCH, batch.width - 1)
        lengths = match_lengths(tokens, last_tokens(tokens, batch.length, bound))
        multiplier, base = batch["dry_multiplier"].double()[:, None], batch["dry_base"].double()[:, None]
        over = torch.arange(bound + 1, device=batch.device) - batch["dry_allowed_length"][:, None]
        growth = (base ** over.clamp(min=0)).clamp(max=_LARGEST_PENALTY)
        # Penalties by length of the match: one power for each length instead of one for each position.
        penalties = (multiplier * growth).clamp(max=_LARGEST_PENALTY).masked_fill(over < 0, 0.0)
        penalties[:, 0] = 0.0
        ids = tokens[:, 1:].clamp(min=0)
        lowered = logits.gather(1, ids) - penalties.to(logits.dtype).gather(1, lengths.long())
        return logits.scatter_reduce_(1, ids, lowered, "amin")

    def _units(self, batch: Batch, vocab_size: int) -> Tensor:
        """The tokens [R, width], -1 where a match cannot be: outside of the searched part, and at breakers."""
        import torch

        tokens = batch.tokens
        searched = within_last(batch, "dry_penalty_last_n")
        if searched is not None:
            tokens = tokens.masked_fill(~searched, -1)
        column: Any = batch["dry_sequence_breakers"]
        if not any(column.sets):
            return tokens
        masks = [self._mask(breakers, vocab_size, tokens.device) for breakers in column.sets]
        if len(masks) == 1:
            return tokens.masked_fill(masks[0][tokens.clamp(min=0)], -1)
        at = tokens.clamp(min=0) + column.index[:, None] * vocab_size
        return tokens.masked_fill(torch.cat(masks)[at], -1)

    def _mask(self, breakers: tuple[str | int, ...], vocab_size: int, device: torch.device | str) -> Tensor:
        """bool [V]: which tokens break."""
        if breakers not in self._masks:
            import torch

            mask = torch.zeros(vocab_size, dtype=torch.bool)
            with suppress(ParameterError):  # then the row has DRY off, else check() had refused it
                mask[self._breaker_ids(breakers, vocab_size)] = True
            while len(self._masks) >= _CACHED_SETS:
                del self._masks[next(iter(self._masks))]
            self._masks[breakers] = mask.to(device, non_blocking=True)
        return self._masks[breakers]

    def _breaker_ids(self, breakers: tuple[str | int, ...], vocab_size: int) -> list[int]:
        if breakers not in self._ids:
            self._ids[breakers] = self._find_ids(breakers, vocab_size)
        return self._ids[breakers]

    def _find_ids(self, breakers: Sequence[str | int], vocab_size: int) -> list[int]:
        ids = [item for item in breakers if isinstance(item, int)]
        wrong = next((item for item in ids if item >= vocab_size), None)
        if wrong is not None:
            raise ParameterError(f"dry_sequence_breakers: token {wrong} is not in the vocabulary of {vocab_size}")
        strings = [item for item in breakers if isinstance(item, str)]
        if strings:
            texts = self._token_texts(strings)[:vocab_size]
            ids += [id for id, text in enumerate(texts) if any(string in text for string in strings)]
            missing = next((string for string in strings if not any(string in text for text in texts)), None)
            if missing is not None:
                raise ParameterError(
                    f"dry_sequence_breakers: no single token contains {missing!r}; give shorter strings or token ids"
                )
        return ids

    def _token_texts(self, strings: Sequence[str]) -> list[str]:
        """The text of every token, decoded once."""
        tokenizer: Any = self._context.tokenizer if self._context else None
        if tokenizer is None:
            raise ParameterError(
                f"dry_sequence_breakers={tuple(strings)!r} are strings and there is no tokenizer to find their tokens: "
                "give token ids, or () for none"
            )
        if self._texts is None:
            self._texts = tokenizer.batch_decode(
                [[id] for id in range(len(tokenizer))], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        return self._texts


@dataclass(frozen=True)
class BreakerSets:
    """A column: which of the ``sets`` each row has, ``index`` int64 [R]."""

    sets: tuple[tuple[str | int, ...], ...]
    index: Tensor

    def select(self, index: Tensor) -> BreakerSets:
        """The rows ``index``."""
        return replace(self, index=self.index[index])

    def extend(self, other: BreakerSets) -> BreakerSets:
        """The other's rows behind these; sets that no row has any more are forgotten."""
        import torch

        if self.sets == other.sets and len(self.sets) == 1:
            return replace(self, index=torch.cat([self.index, other.index]))
        rows = [column.sets[at] for column in (self, other) for at in column.index.tolist()]
        sets = tuple(dict.fromkeys(rows))
        index = torch.tensor([sets.index(row) for row in rows], dtype=torch.int64, device=self.index.device)
        return BreakerSets(sets, index)

    def to(self, device: torch.device | str) -> BreakerSets:
        """The column on a device."""
        return replace(self, index=self.index.to(device))


def match_lengths(tokens: Tensor, tail: Tensor) -> Tensor:
    """int16 [R, T - 1]: how many tokens up to position i equal the row's last ones, if a token follows; else 0.

    ``tail`` [R, K]: the last token, the one before, ...; matches are looked at up to K tokens. Tokens below zero match
    nothing.
    """
    import torch

    count = tokens.shape[1] - 1
    alive = (tokens[:, :-1] == tail[:, :1]) & (tokens[:, 1:] >= 0)
    lengths = alive.to(torch.int16)
    for back in range(1, min(tail.shape[1], count)):
        # Asking costs as much as a comparison, and elsewhere a synchronisation.
        if back % 8 == 1 and tokens.device.type == "cpu" and not alive.any():
            break
        alive[:, back - 1] = False
        alive[:, back:] &= tokens[:, : count - back] == tail[:, back : back + 1]
        lengths += alive
    return lengths
