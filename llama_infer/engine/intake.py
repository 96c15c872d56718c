"""From a request to a task: everything that can be found wrong with it is found here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import PromptError, PromptTooLongError
from ..parameters import validate
from ..types import Request, Value
from .sequence import Task

if TYPE_CHECKING:
    from .engine import Assembly


def make_task(assembly: Assembly, request: Request, number: int) -> Task:
    """The request with a complete set of parameters, token ids, a seed and an id. ParameterError or PromptError."""
    given = validate(assembly.declared, request.params)
    params = {**assembly.defaults, **given}
    _check_parts(assembly, given, params)
    prompt = tuple(assembly.encode(request.prompt))
    _check_prompt(assembly, prompt, params)
    seed = params["seed"] if params["seed"] is not None else assembly.deal_seed()
    request = replace(request, id=request.id or f"#{number}")
    return Task(request, number, params, prompt, seed, assembly.strategy.width(params))


def _check_parts(assembly: Assembly, given: Mapping[str, Value], params: Mapping[str, Value]) -> None:
    """Has the parts look at the values: what they refuse must not be found out in a step."""
    for part in (*assembly.chain.parts, *assembly.stopping):
        own = getattr(part, "params", {})
        if hasattr(part, "prepare"):
            for name in given.keys() & own.keys():
                part.prepare(name, [given[name]])
        if hasattr(part, "check") and any(
            params[name] != own[name].neutral for name in own if own[name].neutral is not None
        ):
            part.check(params)


def _check_prompt(assembly: Assembly, prompt: Sequence[int], params: Mapping[str, Value]) -> None:
    if not prompt:
        raise PromptError("the prompt has no tokens: give some text or at least one token id")
    wrong = next((token for token in prompt if not 0 <= token < assembly.vocab_size), None)
    if wrong is not None:
        raise PromptError(f"token id {wrong} is not in the model's vocabulary of {assembly.vocab_size}")
    limit = assembly.loaded.context_length
    if len(prompt) + (params["max_new_tokens"] != 0) > limit:
        raise PromptTooLongError(
            f"the prompt has {len(prompt)} tokens; the model's context holds {limit}, the answer included: shorten it"
        )
