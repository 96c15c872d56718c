"""From the arguments of a call to requests, and from requests to completions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .errors import LlamaInferError, ParameterError, PromptError
from .parameters import validate
from .parts import Param
from .types import Completion, Message, Request, Value

_END: Any = object()


def is_one_prompt(given: Any) -> bool:
    """Whether this is one prompt (text, token ids, messages) and not a list of prompts."""
    if isinstance(given, str):
        return True
    if getattr(given, "ndim", 0) == 1:
        return True
    if not isinstance(given, Sequence) or not given:
        return False
    ids = all(isinstance(item, int) and not isinstance(item, bool) for item in given)
    return ids or all(isinstance(item, (Message, Mapping)) for item in given)


def merge(generation_config: Any, params: Mapping[str, Value], declared: Mapping[str, Param]) -> dict[str, Value]:
    """A ``GenerationConfig`` and the parameters given beside it, which count more."""
    return {**(validate(declared, generation_config) if generation_config is not None else {}), **params}


def per_prompt(
    params: Mapping[str, Value], declared: Mapping[str, Param], count: int, single: bool
) -> list[dict[str, Value]]:
    """The parameters of each prompt: a list stands for one value a prompt where the parameter itself is no list."""
    rows: list[dict[str, Value]] = [{} for _ in range(count)]
    for name, value in params.items():
        kind = declared[name].type if name in declared else object
        if hasattr(value, "tolist"):
            value = value.tolist()
        listed = isinstance(value, (list, tuple))
        if listed and kind is tuple:
            # A list of lists is one list a prompt, unless the parameter takes it as it is (bad_words_ids).
            listed = any(isinstance(item, (list, tuple)) for item in value) and not declared[name].accepts(value)
        if listed and name in declared and (single or len(value) != count):
            raise ParameterError(
                f"{name} has {len(value)} values for {count} prompt{'s' if count > 1 else ''}: give one value, or one "
                "for each prompt of a list"
            )
        for row, item in zip(rows, value if listed and name in declared else [value] * count, strict=True):
            row[name] = item
    return rows


def serve(engine: Any, requests: Iterator[Request], batch_size: int, ordered: bool) -> Iterator[Completion]:
    """Keeps the engine fed, and the undelivered results few."""
    order: OrderedDict[str, None] = OrderedDict()  # what was taken and not delivered, in the order given
    done: OrderedDict[str, Completion] = OrderedDict()
    exhausted, refused = False, 0
    while True:
        while not exhausted and len(order) < 4 * batch_size and len(order) - len(done) < 2 * batch_size:
            request = next(requests, _END)
            if request is _END:
                exhausted = True
                break
            if not isinstance(request, Request):
                raise PromptError(f"run takes Request objects, not a {type(request).__name__}: write Request(prompt)")
            try:
                if request.id in order:
                    raise ParameterError(f"a request with the id {request.id!r} is being served: choose another id")
                order[engine.add(request)] = None
            except LlamaInferError as error:
                refused += 1
                order[f"\0refused {refused}"] = None
                done[f"\0refused {refused}"] = Completion(request, finish_reason="error", error=error)
        if engine.busy and len(done) < len(order):
            for event in engine.step():
                if isinstance(event, Completion):
                    done[event.request.id] = event
        while done:
            key = next(iter(order if ordered else done))
            if key not in done:
                break
            del order[key]
            yield done.pop(key)
        if exhausted and not order:
            return
