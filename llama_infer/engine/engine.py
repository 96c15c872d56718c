"""The engine: add, step, cancel, close. It knows contracts only, no concrete part, and it alone moves rows."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..batch import Batch, Output, Plan
from ..chain import EXCLUDED, NON_FINITE, NOTHING, OUT_OF_RANGE, Chain, part_name
from ..columns import known_values, make_batch
from ..errors import (
    EmptySupportError,
    LlamaInferError,
    NonFiniteLogitsError,
    ParameterError,
    PartError,
    PromptError,
    PromptTooLongError,
)
from ..layout import Layout
from ..parameters import validate
from ..parts import LoadedModel, Param, Strategy
from ..types import Completion, Event, Prompt, Request, TokenLogprob, Value
from .detokenize import Detokenizer
from .prefix import PrefixCache, Prefixes
from .runner import Runner
from .scheduler import Scheduler
from .sequence import LiveSequence, Task, own_criteria


@dataclass(frozen=True)
class Assembly:
    """Everything that an engine is made of, bound to a loaded model.

    Attributes:
        encode: a prompt to token ids.
        declared: every parameter; defaults: its value where a request says nothing.
        cache: makes an empty cache for the model.
        lock: held during a step, so that engines in several threads take turns on one model.
        prefixes: what the pipeline's engines share of earlier prompts; None: nothing.
    """

    loaded: LoadedModel
    chain: Chain
    strategy: Strategy
    stopping: Sequence[Any]
    cache: Callable[[], Any]
    encode: Callable[[Prompt], Sequence[int]]
    declared: Mapping[str, Param]
    defaults: Mapping[str, Value]
    vocab_size: int
    detokenizer: Detokenizer
    batch_size: int
    lock: Any
    observers: Sequence[Callable[[Event], None]] = ()
    prefixes: PrefixCache | None = None


@dataclass(frozen=True)
class _Settled:
    """What the host reads of a step, in one copy."""

    tokens: list[int]
    logprobs: list[float]
    totals: list[float]
    branches: list[int]
    parents: list[int] | None
    top: list[list[TokenLogprob]] | None


class LocalEngine:
    """Serves requests on one model in this process; requests join and leave between steps."""

    def __init__(self, assembly: Assembly) -> None:
        self._a = assembly
        self._scheduler = Scheduler(assembly.batch_size)
        self._runner = Runner(assembly.loaded)
        self._cache = assembly.cache()
        self._prefixes = Prefixes(assembly.prefixes)
        self._batch: Batch | None = None
        self._rows: list[LiveSequence] = []
        self._events: list[Event] = []
        self._ids: set[str] = set()  # of what waits or runs: asked at every add
        self._added = 0

    @property
    def busy(self) -> bool:
        """Whether a further step can yield events."""
        return bool(self._rows or self._scheduler.waiting or self._events)

    def add(self, request: Request) -> str:
        """Queues a request and returns its id. Raises ParameterError or PromptError when it cannot be served."""
        given = validate(self._a.declared, request.params)
        params = {**self._a.defaults, **given}
        self._check_parts(given, params)
        prompt = tuple(self._a.encode(request.prompt))
        self._check_prompt(prompt, params)
        self._added += 1
        request = replace(request, id=request.id or f"#{self._added}")
        if request.id in self._ids:
            raise ParameterError(f"a request with the id {request.id!r} is being served already: choose another id")
        seed = params["seed"] if params["seed"] is not None else secrets.randbits(53)
        task = Task(request, self._added, params, prompt, seed, self._a.strategy.width(params))
        if params["max_new_tokens"] == 0:
            self._events.append(Completion(request, prompt_token_ids=prompt, seed=seed, finish_reason="length"))
        else:
            self._scheduler.waiting.append(task)
            self._ids.add(request.id)
        return request.id

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Feeds every row once and returns what came of it: chunks, and completions of requests that ended."""
        with self._a.lock:
            self._prefixes.keep_prompts(self._rows, self._cache)
            self._admit()
            events, self._events = self._events, []
            if self._rows:
                layout = self._layout()
                output = self._runner.forward(self._table, self._cache, layout)
                if any(span.ready for span in layout.spans):
                    plan = self._a.strategy.step(output, self._table, self._a.chain)
                    _check_plan(plan, self._table, self._a.strategy)
                    self._batch = self._table.advance(plan)
                    events += self._settle(self._read(plan, output))
        for observer in self._a.observers:
            for event in events:
                observer(event)
        return events

    def cancel(self, id: str) -> None:
        """Ends a request now; its completion, with what it has, comes with the next step. Unknown ids are ignored."""
        for task in [task for task in self._scheduler.waiting if task.request.id == id]:
            self._scheduler.waiting.remove(task)
            self._ids.discard(id)
            self._events.append(
                Completion(task.request, prompt_token_ids=task.prompt_token_ids, seed=task.seed, finish_reason="abort")
            )
        done = [row for row, sequence in enumerate(self._rows) if sequence.task.request.id == id]
        for row in done:
            self._events.append(self._rows[row].finish("abort"))
        if done:
            self._cache.erase(done)  # what was fed last has not been looked at: it may be NaN
        self._events += self._leave(done)

    def close(self) -> None:
        """Forgets everything; nothing more comes."""
        self._rows, self._batch, self._events = [], None, []
        self._scheduler.waiting.clear()
        self._ids.clear()
        self._cache = self._a.cache()

    @property
    def _table(self) -> Batch:
        if self._batch is None:
            raise PartError("the engine has no rows")
        return self._batch

    def _check_parts(self, given: Mapping[str, Value], params: Mapping[str, Value]) -> None:
        """Has the parts look at the values: what they refuse must not be found out in a step."""
        for part in (*self._a.chain.parts, *self._a.stopping):
            own = getattr(part, "params", {})
            if hasattr(part, "prepare"):
                for name in given.keys() & own.keys():
                    part.prepare(name, [given[name]])
            if hasattr(part, "check") and any(
                params[name] != own[name].neutral for name in own if own[name].neutral is not None
            ):
                part.check(params)

    def _check_prompt(self, prompt: Sequence[int], params: Mapping[str, Value]) -> None:
        if not prompt:
            raise PromptError("the prompt has no tokens: give some text or at least one token id")
        wrong = next((token for token in prompt if not 0 <= token < self._a.vocab_size), None)
        if wrong is not None:
            raise PromptError(f"token id {wrong} is not in the model's vocabulary of {self._a.vocab_size}")
        limit = self._a.loaded.context_length
        if len(prompt) + (params["max_new_tokens"] != 0) > limit:
            raise PromptTooLongError(
                f"the prompt has {len(prompt)} tokens; the model's context holds {limit}, the answer included: "
                "shorten it"
            )

    def _admit(self) -> None:
        tasks = self._scheduler.admit(self._rows)
        if not tasks:
            return
        rows = make_batch(
            self._a.chain,
            self._a.declared,
            [task.params for task in tasks],
            [task.prompt_token_ids for task in tasks],
            seeds=[task.seed for task in tasks],
            requests=[task.number for task in tasks],
            device=self._a.loaded.device,
        )
        self._batch = rows if self._batch is None else self._batch.extend(rows)
        self._cache.extend(len(tasks))
        for task in tasks:
            self._rows.append(LiveSequence(task, self._a.detokenizer.stream(), own_criteria(self._a.stopping)))

    def _layout(self) -> Layout:
        waiting = self._prefixes.reuse(self._rows, self._cache)
        spans = self._scheduler.spans(self._rows, self._cache.lengths, waiting)
        return Layout(tuple(spans), self._a.loaded.device)

    def _read(self, plan: Plan, output: Output) -> _Settled:
        """The one synchronisation of a step."""
        source = output.index(len(self._cache.lengths))
        source = source if plan.parents is None else source[plan.parents]
        tokens = plan.tokens[:, 0]
        logits = output.logits
        total = logits.logsumexp(-1)[source]
        chosen = logits[source, tokens.clamp(0, logits.shape[1] - 1)]
        columns = [tokens, chosen - total, total, self._table.branch]
        if plan.parents is not None:
            columns.append(plan.parents)
        read = torch.stack([column.double() for column in columns]).tolist()
        known = [n for n in self._table.values.get("logprobs", frozenset()) if isinstance(n, int)]
        return _Settled(
            tokens=[int(token) for token in read[0]],
            logprobs=read[1],
            totals=read[2],
            branches=[int(branch) for branch in read[3]],
            parents=[int(parent) for parent in read[4]] if plan.parents is not None else None,
            top=_top(logits, max(known, default=0), source.tolist()) if any(known) else None,
        )

    def _settle(self, step: _Settled) -> list[Event]:
        """Detokenise, ask the criteria, emit, drop."""
        if step.parents is not None:
            self._fork(step.parents)
        events: list[Event] = []
        done, failed = [], []
        for row, sequence in enumerate(self._rows):
            sequence.branch = step.branches[row]
            token, logprob = step.tokens[row], step.logprobs[row]
            if token == NOTHING:
                continue
            if token < 0 or math.isnan(logprob) or step.totals[row] == math.inf:
                failed.append(row)
                events.append(sequence.finish("error", error=self._failure(sequence, token, step.totals[row])))
            else:
                top = tuple(step.top[row][: sequence.params["logprobs"]]) if step.top else ()
                events.append(sequence.append(token, logprob, top))
                if sequence.finish_reason is not None:
                    self._prefixes.keep(row, sequence, self._cache)
            if sequence.finish_reason is not None:
                done.append(row)
        if failed:
            self._cache.erase(failed)
        return events + self._leave(done)

    def _fork(self, parents: Sequence[int]) -> None:
        """The sequences and the cache follow their rows."""
        taken: set[int] = set()
        rows = []
        for parent in parents:
            rows.append(self._rows[parent].fork() if parent in taken else self._rows[parent])
            taken.add(parent)
        for task in {row.task.number: row.task for row in (*self._rows, *rows)}.values():
            task.running = sum(row.task is task for row in rows)
        self._rows = rows
        self._cache.select(parents)

    def _leave(self, done: Sequence[int]) -> list[Event]:
        """Drops finished rows; the last rows take their places, so that few slots move."""
        if not done:
            return []
        events: list[Event] = []
        for row in done:
            sequence = self._rows[row]
            task = sequence.task
            task.finished.append(sequence)
            task.running -= 1
            if not task.running:
                events.append(self._complete(task))
        gone = set(done)
        count = len(self._rows) - len(gone)
        movers = iter([row for row in range(count, len(self._rows)) if row not in gone])
        index = [next(movers) if row in gone else row for row in range(count)]
        self._rows = [self._rows[row] for row in index]
        self._cache.select(index)
        table, self._batch = self._table, None
        if index:
            self._batch = replace(
                table.select(torch.tensor(index, device=table.device)),
                width=max(len(row.prompt_token_ids) + len(row.token_ids) for row in self._rows),
                values=known_values(self._a.declared, [row.params for row in self._rows]),
            )
        return events

    def _complete(self, task: Task) -> Completion:
        self._ids.discard(task.request.id)
        ranked = self._a.strategy.rank(sorted(task.finished, key=lambda sequence: sequence.branch))
        first, *others = [sequence for sequence in ranked if isinstance(sequence, LiveSequence)]
        return first.completion(task.request, tuple(other.completion(task.request) for other in others))

    def _failure(self, sequence: LiveSequence, token: int, total: float) -> LlamaInferError:
        where = f"request {sequence.task.request.id!r}, step {len(sequence.token_ids)}"
        if token == OUT_OF_RANGE:
            return PartError(
                f"{where}: sampler {part_name(self._a.chain.sampler)} chose a token id outside of the vocabulary of "
                f"{self._a.vocab_size}"
            )
        if token == EXCLUDED or total == -math.inf:
            return EmptySupportError(
                f"{where}: no token is left to choose from; every logit is -inf after the processors. "
                "Loosen the bans or truncations of this request"
            )
        stage = "after the processors" if token == NON_FINITE and math.isfinite(total) else "of the model"
        return NonFiniteLogitsError(f"{where}: NaN or +inf among the logits {stage}")


def _top(logits: torch.Tensor, count: int, source: Sequence[int]) -> list[list[TokenLogprob]]:
    """The likeliest tokens of each row under the raw distribution."""
    best = logits.topk(min(count, logits.shape[1]))
    logprobs = (best.values - logits.logsumexp(-1, keepdim=True)).tolist()
    ids = best.indices.tolist()
    return [[TokenLogprob(i, p) for i, p in zip(ids[m], logprobs[m], strict=True)] for m in source]


def _check_plan(plan: Plan, batch: Batch, strategy: Strategy) -> None:
    rows = len(batch) if plan.parents is None else len(plan.parents)
    if plan.tokens.shape != (rows, 1) or plan.tokens.dtype != torch.int64:
        raise PartError(
            f"strategy {part_name(strategy)} planned a {plan.tokens.dtype} tensor of shape {list(plan.tokens.shape)}; "
            f"this engine takes one int64 token a row and step: [{rows}, 1]"
        )
