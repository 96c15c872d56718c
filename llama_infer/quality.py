"""What a quantization costs and gains: perplexity, agreement with the unquantised model, size and speed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ParameterError, PromptError
from .pipeline import Pipeline

if TYPE_CHECKING:
    from torch import Tensor

PROMPTS = ("What is a llama?", "Tell me a story about a cat.", "为什么要减少污染，保护环境？", "17+25=?")
"""What the unquantised model answers when no text is given."""


@dataclass(frozen=True, slots=True)
class Window:
    """Token ids of which the last ``predicted`` are predicted, each from all before it."""

    ids: Sequence[int]
    predicted: int


@dataclass(frozen=True, slots=True)
class Quality:
    """One model on one text, held against the unquantised one.

    Attributes:
        quantization: the policy's name.
        megabytes: of its weights in memory; rows of a tied embedding that stay in the checkpoint's file not included.
        perplexity: of the text.
        divergence: Kullback-Leibler, of the unquantised model's next-token distribution from this one, in nats a token.
        agreement: how often the likeliest token is the same, 0 to 1.
        decode: tokens a second of one sequence.
        prefill: prompt tokens a second.
    """

    quantization: str
    megabytes: float
    perplexity: float
    divergence: float
    agreement: float
    decode: float
    prefill: float


def compare(
    model: Any = "demo",
    quantization: Any = ("int8", "int4"),
    *,
    text: str | None = None,
    tokens: int = 2048,
    window: int = 256,
    **options: Any,
) -> list[Quality]:
    """Measure policies against the unquantised model, which comes first in the result.

    Args:
        model: as a pipeline takes it. It and one quantised model at a time are in memory.
        quantization: one policy or several, by name or as objects.
        text: what is predicted, all of it. None: what the unquantised model itself answers to :data:`PROMPTS` at
            temperature 1; the answers alone are predicted, from prompt and answer so far.
        tokens: how much of the text is used, or about how many tokens are answered.
        window: tokens of a text that are predicted in one forward, each from those before it in its window; an answer
            is no longer.
        options: of the pipelines, such as ``dtype`` and ``device``.

    Raises ParameterError for numbers that make no sense, PromptError for a text that is too short.
    """
    if tokens < 2 or window < 2:
        raise ParameterError(f"tokens={tokens!r}, window={window!r} is out of range: both >= 2")
    policies = quantization if isinstance(quantization, (list, tuple)) else [quantization]
    reference = Pipeline(model, **{**options, "quantization": "none"})
    windows = _answers(reference, tokens, window) if text is None else _text(reference, text, tokens, window)
    rows = [_measure("none", reference, reference, windows)]
    for policy in policies:
        pipe = Pipeline(model, **{**options, "quantization": policy})
        rows.append(_measure(policy if isinstance(policy, str) else repr(policy), pipe, reference, windows))
        del pipe
    return rows


def table(rows: Sequence[Quality]) -> str:
    """The rows as text, one a line, with a head."""
    head = ("quantization", "MB", "perplexity", "KL", "same top-1", "decode tok/s", "prefill tok/s")
    cells = [head]
    for row in rows:
        numbers = (f"{row.megabytes:.1f}", f"{row.perplexity:.4g}", f"{row.divergence:.2g}", f"{row.agreement:.1%}")
        cells.append((row.quantization, *numbers, f"{row.decode:.1f}", f"{row.prefill:.0f}"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells]
    return "\n".join(lines)


def _answers(pipe: Pipeline, tokens: int, window: int) -> list[Window]:
    """What the model says to each prompt, as often as it takes."""
    each = max(1, tokens // len(PROMPTS))
    limit = min(each, window, max(1, pipe.loaded.context_length // 2))
    answers = pipe(list(PROMPTS), temperature=1.0, seed=1, max_new_tokens=limit, n=max(1, each // limit))
    samples = [sample for answer in answers for sample in (answer, *answer.alternatives)]
    return [Window((*sample.prompt_token_ids, *sample.token_ids), len(sample.token_ids)) for sample in samples]


def _text(pipe: Pipeline, text: str, tokens: int, window: int) -> list[Window]:
    if pipe.loaded.tokenizer is None:
        raise PromptError("a text needs a tokenizer: give one with tokenizer=")
    ids = list(pipe.loaded.tokenizer(text)["input_ids"])[:tokens]
    if len(ids) < 2:
        raise PromptError(f"a text of {len(ids)} tokens predicts nothing: give a longer one")
    parts = [ids[start : start + window] for start in range(0, len(ids) - 1, window)]
    return [Window(part, len(part) - 1) for part in parts]


def _measure(name: str, pipe: Pipeline, reference: Pipeline, windows: Sequence[Window]) -> Quality:
    from .models.size import weight_bytes

    loss = divergence = same = count = 0.0
    for ids, mine, theirs in _predictions(pipe, reference, windows):
        loss -= float(mine.gather(1, ids[:, None]).sum())
        divergence += float((theirs.exp() * (theirs - mine)).sum())
        same += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
        count += len(mine)
    decode, prefill = _speed(pipe, max((window.ids for window in windows), key=len))
    return Quality(
        quantization=name,
        megabytes=weight_bytes(pipe.loaded.model) / 1e6,
        perplexity=math.exp(loss / count),
        divergence=max(0.0, divergence / count),
        agreement=same / count,
        decode=decode,
        prefill=prefill,
    )


def _predictions(
    pipe: Pipeline, reference: Pipeline, windows: Sequence[Window]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each window's predicted ids [n], with both models' log-probabilities [n, V] of them and all others."""
    import torch

    with torch.no_grad():
        for window in windows:
            ids = torch.tensor(window.ids, device=reference.loaded.device)
            theirs = _log_probabilities(reference, ids, window.predicted)
            mine = theirs if pipe is reference else _log_probabilities(pipe, ids, window.predicted)
            yield ids[-window.predicted :].cpu(), mine, theirs


def _log_probabilities(pipe: Pipeline, ids: Tensor, count: int) -> Tensor:
    """Of the last tokens, as many as ``count``, from those before them."""
    logits: Tensor = pipe.loaded.model(input_ids=ids[None, :-1].to(pipe.loaded.device), use_cache=False).logits[0]
    return logits[-count:].float().log_softmax(-1).cpu()


def _speed(pipe: Pipeline, window: Sequence[int], new: int = 16) -> tuple[float, float]:
    """Tokens a second of one sequence, and of its prompt: the best of three."""
    alone = pipe.replace(prefix_cache=0)
    best = {1: math.inf, 1 + new: math.inf}
    for _ in range(3):
        for count in best:
            begun = time.perf_counter()
            alone(list(window), temperature=0, max_new_tokens=count, min_new_tokens=count)
            best[count] = min(best[count], time.perf_counter() - begun)
    return new / max(1e-9, best[1 + new] - best[1]), len(window) / best[1]
