"""What the library is held against: transformers' own loop one row at a time, and definitions written out."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from llama_infer import Chunk, Completion, Pipeline, Request
from llama_infer.pipeline import built_backend
from llama_infer.types import Event

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def greedy(model: Any, prompt: Sequence[int], max_new_tokens: int, **generation: Any) -> tuple[int, ...]:
    """What transformers' ``generate`` answers to one prompt; the end token is part of it."""
    from transformers import GenerationConfig

    parts = {name: generation.pop(name, None) for name in ("logits_processor", "stopping_criteria")}
    config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0, **generation)
    ids = torch.tensor([list(prompt)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, **parts)
    return tuple(out[0, len(prompt) :].tolist())


def raw_logits(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """[T, V] logits of one unpadded row in one forward without a cache."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return logits


def split_mix(state: int) -> int:
    """SplitMix64's output function as published (Steele, Lea, Flood 2014), in Python's integers."""
    z = state & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def random_prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    """Prompts of bytes, 1 to ``longest`` long."""
    draw = random.Random(seed)
    return [[draw.randrange(256) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def open_engine(pipe: Pipeline, chunk: int | None = None) -> Any:
    """A new engine of the pipeline; ``chunk``: prompt tokens fed in a step."""
    engine = built_backend(pipe).open(pipe._assembly)
    if chunk is not None:
        engine._scheduler.chunk = engine._scheduler.idle_chunk = chunk
    return engine


def drain(engine: Any) -> list[Event]:
    """Every event until the engine has nothing left."""
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
    return events


def completions(events: Iterable[Event]) -> dict[str, Completion]:
    """The completions among events, by the id of their request."""
    return {event.request.id: event for event in events if isinstance(event, Completion)}


def streamed(events: Iterable[Event], id: str, index: int = 0) -> tuple[str, tuple[int, ...]]:
    """Text and tokens that the chunks of one sample bring."""
    chunks = [event for event in events if isinstance(event, Chunk) and (event.id, event.index) == (id, index)]
    return "".join(chunk.text for chunk in chunks), tuple(token for chunk in chunks for token in chunk.token_ids)


def tokens_of(done: Iterable[Completion]) -> list[tuple[int, ...]]:
    """The tokens of each completion."""
    return [completion.token_ids for completion in done]


def requests(prompts: Sequence[Sequence[int]], **params: Any) -> list[Request]:
    """Requests named "0", "1", ...; the seed counts up too unless given."""
    return [Request(prompt, {"seed": at, **params}, id=str(at)) for at, prompt in enumerate(prompts)]
