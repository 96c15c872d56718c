"""What parts are tried on: rows with parameters, logits of every shape, sequences that grow."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import registry
from ..parameters import ENGINE_PARAMS, declare, resolve, validate
from ..parts import Context, Param, Stop
from ..types import Value

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..batch import Batch


def make_rows(
    parts: Any,
    rows: Sequence[Mapping[str, Value]] = ({},),
    tokens: Sequence[Sequence[int]] | None = None,
    *,
    prompt_lengths: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> Batch:
    """A table for one part or several: their parameters and fresh state.

    Args:
        parts: a part that is bound already where it has to be, or a list of them.
        rows: each row's parameters; what is left out has its default.
        tokens: each row's history. Default: none.
        prompt_lengths: how much of each history is prompt. Default: all of it.
        seeds: of the rows. Default: 0, 1, 2 and so on.

    Raises ParameterError for a parameter that no part declares, or a value out of range.
    """
    from ..chain import Chain
    from ..columns import make_batch
    from ..samplers import Greedy

    listed = list(parts) if isinstance(parts, (list, tuple)) else [parts]
    declared = declare(listed)
    defaults = {name: setting.value for name, setting in resolve(declared).items()}
    return make_batch(
        Chain(listed, Greedy()),
        declared,
        [{**defaults, **validate(declared, row)} for row in rows],
        [[]] * len(rows) if tokens is None else tokens,
        prompt_lengths=prompt_lengths,
        seeds=range(len(rows)) if seeds is None else seeds,
        device=device,
    )


def sampling_step(
    logits: Tensor,
    *,
    tokens: Sequence[Sequence[int]] | None = None,
    processors: Any = None,
    sampler: Any = "categorical",
    **params: Value,
) -> Callable[[], Tensor]:
    """A callable that runs the whole chain and sampler once on ``logits`` [R, V] and returns the token ids, int64 [R].

    Everything but that is done here, once: for benchmarks. Each call does the same work and gives the same tokens.

    Args:
        logits: float [R, V]; left as they are.
        tokens: each row's history, all of it answer. Default: none.
        processors: the chain; by default that of a pipeline.
        sampler: what chooses.
        params: values, or lists of one value a row. Row r has the seed r.
    """
    import torch

    from ..calls import per_prompt
    from ..chain import Chain
    from ..columns import make_batch
    from ..pipeline import DEFAULT_PROCESSORS, _parts

    count = logits.shape[0]
    chosen = _parts(DEFAULT_PROCESSORS if processors is None else processors, sampler, (), "sample")
    context = Context(None, logits.shape[1], device=logits.device)
    chain = Chain(chosen.processors, chosen.sampler).bind(context)
    declared = declare(chain.parts)
    defaults = {name: setting.value for name, setting in resolve(declared).items()}
    batch = make_batch(
        chain,
        declared,
        [{**defaults, **validate(declared, row)} for row in per_prompt(params, declared, count, False)],
        [[]] * count if tokens is None else [list(row) for row in tokens],
        prompt_lengths=[0] * count,
        seeds=range(count),
        device=logits.device,
    )

    @torch.no_grad()
    def step() -> Tensor:
        return chain(logits, batch).tokens

    return step


class FakeSequence:
    """What a stopping criterion sees, without an engine: push text, then ask.

        sequence = FakeSequence(stop=("END",))
        assert sequence.push("The E").ask(criterion) is None
        assert sequence.push("ND.").ask(criterion) == Stop("stop", 4)

    Parameters that are not given have the engine's defaults; those of the criterion are given here, or read by it with
    ``params.get``.
    """

    def __init__(self, prompt_token_ids: Sequence[int] = (1,), branch: int = 0, **params: Value) -> None:
        self.prompt_token_ids = tuple(prompt_token_ids)
        self.token_ids: list[int] = []
        self.text = ""
        self.text_before = 0
        self.params = {**{name: param.default for name, param in ENGINE_PARAMS.items()}, **params}
        self.branch = branch

    def push(self, text: str = "", token_id: int = 0) -> FakeSequence:
        """One more token with its text, possibly none. Returns the sequence."""
        self.token_ids.append(token_id)
        self.text_before = len(self.text)
        self.text += text
        return self

    def ask(self, criterion: Callable[[Any], Stop | bool | None]) -> Stop | None:
        """What the criterion says of it now; True is a plain ``Stop()``."""
        said = criterion(self)
        return said if isinstance(said, Stop) else Stop() if said else None


SHAPES = ("random", "sharp", "peaked", "flat", "tied", "steps", "excluded", "single", "large")
"""Rows of logits by their kind; see :func:`make_logits`."""


def make_logits(kinds: Sequence[str], vocab_size: int, draw: random.Random, dtype: torch.dtype) -> Tensor:
    """[R, V], a row of each kind: normal; normal with a large or a dominant maximum; almost equal; all equal; few
    distinct values; half of them -inf; all but one -inf; of a thousand in size."""
    import torch

    generator = torch.Generator().manual_seed(draw.randrange(1 << 40))
    rows = []
    for kind in kinds:
        noise = torch.randn(vocab_size, generator=generator, dtype=torch.float64)
        some = int(torch.randint(vocab_size, (1,), generator=generator))
        if kind == "sharp":
            noise = noise * 5
        elif kind == "peaked":
            noise[some] += 12
        elif kind == "flat":
            noise = noise * 1e-3
        elif kind == "tied":
            noise = torch.full_like(noise, float(noise[0]))
        elif kind == "steps":
            noise = noise.round()
        elif kind == "excluded":
            keep = noise[some].item()
            noise = noise.masked_fill(torch.rand(vocab_size, generator=generator) < 0.5, -torch.inf)
            noise[some] = keep
        elif kind == "single":
            noise = torch.full_like(noise, -torch.inf)
            noise[some] = 1.5
        elif kind == "large":
            noise = noise * 1000
        rows.append(noise)
    return torch.stack(rows).to(dtype)


def make_histories(count: int, vocab_size: int, draw: random.Random) -> tuple[list[list[int]], list[int]]:
    """Ragged histories with repeats, and how much of each is prompt; the first is a prompt alone."""
    few = [draw.randrange(vocab_size) for _ in range(4)]
    tokens = [
        [draw.choice([*few, draw.randrange(vocab_size)]) for _ in range(draw.randint(1, 14))] for _ in range(count)
    ]
    return tokens, [len(row) if at == 0 else draw.randint(0, len(row)) for at, row in enumerate(tokens)]


def pools(params: Mapping[str, Param], given: Mapping[str, Any]) -> dict[str, list[Value]]:
    """The values that each parameter is tried with: a list gives several, anything else is one; then the default and
    the neutral one."""
    validate(params, {name: values[0] for name, values in _listed(given).items()})
    tried = {}
    for name, param in params.items():
        values = [*_listed(given).get(name, []), param.default]
        values += [param.neutral] if param.neutral is not None else []
        tried[name] = [param.validate(name, value) for value in values]
    return tried


def _listed(given: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: value if isinstance(value, list) and value else [value] for name, value in given.items()}


def draw_rows(tried: Mapping[str, list[Value]], count: int, draw: random.Random) -> list[dict[str, Value]]:
    """Rows of parameters: every value in its turn first, then at random."""
    return [
        {name: values[at] if at < len(values) else draw.choice(values) for name, values in tried.items()}
        for at in range(count)
    ]


def bind(part: Any, vocab_size: int, ends: Sequence[int] = ()) -> Any:
    """The part for such a vocabulary; the byte tokenizer comes with one that is large enough for it."""
    from .models import VOCAB_SIZE, byte_tokenizer

    if not hasattr(part, "bind"):
        return part
    tokenizer = byte_tokenizer() if vocab_size >= VOCAB_SIZE else None
    return part.bind(Context(tokenizer, vocab_size, tuple(ends), context_length=4096))


def resolve_part(kind: Any, part: Any) -> Any:
    """A name, a class or an object as the part that a pipeline would make of it."""
    from ..foreign import adapt_criterion, adapt_processor

    found = registry.resolve(kind, part)
    return {"processor": adapt_processor, "stopping": adapt_criterion}.get(kind, lambda same: same)(found)
