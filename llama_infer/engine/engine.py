"""The engine: add, step, cancel, close. It knows contracts only, no concrete part, and it alone moves rows."""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..batch import Batch
from ..chain import NOTHING, Chain
from ..columns import known_values, make_batch
from ..errors import InsufficientMemoryError, ParameterError, PartError
from ..layout import Layout
from ..parts import LoadedModel, Param, Strategy
from ..transfer import upload
from ..types import Completion, Event, Prompt, Request, Value
from .detokenize import Detokenizer
from .intake import make_task
from .memory import give_back, is_out_of_memory, keep_freed_memory
from .prefix import PrefixCache, Prefixes
from .readout import Reading, Readout, check_plan, failure, read
from .runner import Runner
from .scheduler import Scheduler
from .sequence import LiveSequence, own_criteria

logger = logging.getLogger("llama_infer")


@dataclass(frozen=True)
class Assembly:
    """Everything that an engine is made of, bound to a loaded model.

    Attributes:
        encode: a prompt to token ids.
        declared: every parameter; defaults: its value where a request says nothing.
        cache: makes an empty cache for the model.
        deal_seed: makes the seed of a request that brings none.
        lock: held during a step, so that engines in several threads take turns on one model.
        batch_size: rows decoded at once; cache_tokens: rows times tokens that there is memory for.
        prefixes: what the pipeline's engines share of earlier prompts; None: nothing.
        compiled: another form of the model, for decode steps on a GPU where it is faster; None: none.
        runs_ahead: whether a step is launched before the host has read the one before it, so that the device does not
            wait for the host; pays where the two work side by side.
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
    cache_tokens: float = math.inf
    compiled: Any = None
    runs_ahead: bool = False
    deal_seed: Callable[[], int] = partial(secrets.randbits, 53)


@dataclass(frozen=True)
class _Launched:
    """A step that the host has yet to read, and the rows that it is about."""

    rows: Sequence[LiveSequence]
    reading: Reading


class LocalEngine:
    """Serves requests on one model in this process; requests join and leave between steps.

    ``closed``, if set, is told once that the engine has been closed, and can be used again.
    """

    def __init__(self, assembly: Assembly) -> None:
        self._a = assembly
        self.closed: Callable[[LocalEngine], None] | None = None
        if assembly.loaded.device.type == "cpu":
            keep_freed_memory()
        self._scheduler = self._new_scheduler()
        self._runner = Runner(assembly.loaded, assembly.compiled)
        self._cache = assembly.cache()
        self._prefixes = Prefixes(assembly.prefixes)
        self._batch: Batch | None = None
        self._rows: list[LiveSequence] = []
        self._events: list[Event] = []
        self._launched: list[_Launched] = []
        self._ids: set[str] = set()  # of what waits or runs: asked at every add
        self._added = 0

    @property
    def assembly(self) -> Assembly:
        """What it is made of."""
        return self._a

    @property
    def busy(self) -> bool:
        """Whether a further step can yield events."""
        return bool(self._rows or self._scheduler.waiting or self._events)

    def add(self, request: Request) -> str:
        """Queues a request and returns its id. Raises ParameterError or PromptError when it cannot be served."""
        task = make_task(self._a, request, self._added + 1)
        self._added += 1
        request = task.request
        if request.id in self._ids:
            raise ParameterError(f"a request with the id {request.id!r} is being served already: choose another id")
        if task.params["max_new_tokens"] == 0:
            ids, seed = task.prompt_token_ids, task.seed
            self._events.append(Completion(request, prompt_token_ids=ids, seed=seed, finish_reason="length"))
        else:
            self._scheduler.add(task)
            self._ids.add(request.id)
        return request.id

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Feeds every row once and returns what came of it: chunks, and completions of requests that ended."""
        with self._a.lock:
            self._admit()
            events, self._events = self._events, []
            if self._rows:
                events += self._decode()
        for observer in self._a.observers:
            for event in events:
                observer(event)
        return events

    def cancel(self, id: str) -> None:
        """Ends a request now; its completion, with what it has, comes with the next step. Unknown ids are ignored."""
        task = self._scheduler.cancel(id)
        if task is not None and task.parked is not None:
            for sequence in task.parked[0]:
                self._events.append(sequence.finish("abort"))
                self._events += self._retire(sequence)
        elif task is not None:
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
        """Forgets everything and is as new; a GPU keeps its memory for keys and values, and its recorded steps."""
        self._cache.erase(range(len(self._cache.lengths)))  # the next owners of the slots must find no NaN there
        self._rows, self._batch, self._events, self._launched = [], None, [], []
        self._scheduler = self._new_scheduler()
        self._ids.clear()
        self._added = 0
        self._move([])
        closed, self.closed = self.closed, None
        if closed is not None:
            closed(self)

    def _new_scheduler(self) -> Scheduler:
        """Recorded steps are short; those that feed prompts are not, so that prompts share them."""
        size, tokens = self._a.batch_size, self._a.cache_tokens
        if not self._a.runs_ahead:
            return Scheduler(size, tokens)
        return Scheduler(size, tokens, idle_chunk=1024, together=max(1, size // 8))

    @property
    def _table(self) -> Batch:
        if self._batch is None:
            raise PartError("the engine has no rows")
        return self._batch

    def _admit(self) -> None:
        tasks = self._scheduler.admit(self._rows)
        new = [task for task in tasks if task.parked is None]
        if new:
            table = make_batch(
                self._a.chain,
                self._a.declared,
                [task.params for task in new],
                [task.prompt_token_ids for task in new],
                seeds=[task.seed for task in new],
                requests=[task.number for task in new],
                device=self._a.loaded.device,
            )
            stream, criteria = self._a.detokenizer.stream, self._a.stopping
            self._join([LiveSequence(task, stream(), own_criteria(criteria)) for task in new], table)
        for task in tasks:
            if task.parked is not None:
                parked, task.parked = task.parked, None
                self._join(*parked)

    def _join(self, rows: Sequence[LiveSequence], table: Batch) -> None:
        self._batch = table if self._batch is None else self._batch.extend(table)
        self._cache.extend(len(rows), self._longest(rows))
        self._rows += rows

    def _longest(self, rows: Sequence[LiveSequence]) -> int:
        """Tokens that the longest row may come to hold; rows that do not say how many count for none."""
        known = [len(row.prompt_token_ids) + int(row.params.get("max_new_tokens") or 0) for row in rows]
        return min(max(known, default=0), self._a.loaded.context_length)

    def _decode(self) -> list[Event]:
        """One forward and what comes of it; where memory runs out, again with fewer rows. Until the forward and the
        choice are through, nothing but the cache has changed."""
        ahead = self._may_run_ahead()
        events = [] if ahead else self._read(0)
        while self._rows and not all(row.ends_unread(self._a.loaded.context_length) for row in self._rows):
            try:
                self._launch(ahead)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                what = str(error)
            else:
                return events + self._read(1 if ahead else 0)
            events += self._read(0)  # out here: the error's traceback holds tensors
            if self._rows:
                events += self._shrink(what)
            else:  # all have ended in what was read just now
                self._empty_cache(0)
        return events + self._read(0)

    def _may_run_ahead(self) -> bool:
        """Whether the next step can be launched before the last one is read, because it cannot move rows."""
        forks = getattr(self._a.strategy, "forks", None)
        return self._a.runs_ahead and forks is not None and not any(map(forks, self._rows))

    def _launch(self, ahead: bool) -> None:
        """Has each row say its next token; nothing when no row is fed to its end."""
        self._prefixes.keep_prompts(self._rows, self._cache)
        waiting = self._prefixes.reuse(self._rows, self._cache)
        spans = self._scheduler.spans(self._rows, self._cache.lengths, waiting)
        output = self._runner.forward(self._table, self._cache, Layout(tuple(spans), self._a.loaded.device))
        if not any(span.ready for span in spans):
            return
        plan = self._a.strategy.step(output, self._table, self._a.chain)
        check_plan(plan, self._table, self._a.strategy, ahead)
        table = self._table.advance(plan)
        self._launched.append(_Launched(tuple(self._rows), read(plan, output, len(spans), table)))
        self._batch = table
        for sequence, span in zip(self._rows, spans, strict=True):
            sequence.ahead += span.ready

    def _read(self, behind: int) -> list[Event]:
        """Settles launched steps until ``behind`` are left."""
        events: list[Event] = []
        while len(self._launched) > behind:
            launched = self._launched.pop(0)
            events += self._settle(launched.rows, launched.reading.wait())
        return events

    def _shrink(self, what: str) -> list[Event]:
        """Makes room: the later requests wait again, the others' keys and values are computed anew."""
        self._empty_cache(0)
        staying = self._scheduler.shrink(self._rows)
        if not staying:
            error = InsufficientMemoryError(
                f"request {self._rows[0].task.request.id!r} does not fit into memory, though it is alone: shorten it, "
                f"or choose a smaller model or dtype ({what.splitlines()[0] if what else 'out of memory'})"
            )
            events: list[Event] = [sequence.finish("error", error=error) for sequence in self._rows]
            for sequence in self._rows:
                events += self._retire(sequence)
            self._rows, self._batch = [], None
            return events
        for task in {s.task.number: s.task for row, s in enumerate(self._rows) if row not in staying}.values():
            rows = [row for row, sequence in enumerate(self._rows) if sequence.task is task]
            task.parked = [self._rows[row] for row in rows], self._pick(rows)
            self._scheduler.add(task)
        index = sorted(staying)
        self._batch = self._pick(index)
        self._rows = [self._rows[row] for row in index]
        self._cache.extend(len(index), self._longest(self._rows))
        logger.warning("memory ran out: the batch is reduced to %d rows", self._scheduler.batch_size)
        return []

    def _empty_cache(self, rows: int) -> None:
        """Forgets all keys and values; what is known of the rows is fed again."""
        self._cache = self._a.cache()
        self._runner = Runner(self._a.loaded, self._a.compiled)
        self._prefixes.clear()
        for sequence in self._rows:
            sequence.cached, sequence.frontier = 0, None
        give_back(self._a.loaded.device)
        self._cache.extend(rows, self._longest(self._rows))

    def _move(self, index: Sequence[int]) -> None:
        """The cache follows the rows."""
        try:
            self._cache.select(index)
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._empty_cache(len(index))

    def _pick(self, rows: Sequence[int]) -> Batch:
        return self._table.select(upload(torch.tensor(rows), self._table.device))

    def _settle(self, rows: Sequence[LiveSequence], step: Readout) -> list[Event]:
        """Detokenise, ask the criteria, emit, drop. ``rows`` are the step's; they may have moved or left since."""
        if step.parents is not None:
            self._fork(step.parents)
            rows = self._rows
        place = {id(sequence): row for row, sequence in enumerate(self._rows)}
        events: list[Event] = []
        done: list[int] = []
        failed: list[int] = []
        for at, sequence in enumerate(rows):
            token, logprob = step.tokens[at], step.logprobs[at]
            if token == NOTHING or sequence.finish_reason is not None:
                continue
            row = place[id(sequence)]
            sequence.branch = step.branches[at]
            sequence.ahead -= 1
            if token < 0 or math.isnan(logprob) or step.totals[at] == math.inf:
                failed.append(row)
                events.append(sequence.finish("error", error=failure(self._a, sequence, token, step.totals[at])))
            else:
                top = tuple(step.top[at][: sequence.params["logprobs"]]) if step.top else ()
                events.append(sequence.append(token, logprob, top))
                if sequence.finish_reason is not None:
                    self._prefixes.keep(row, sequence, self._cache)
            if sequence.finish_reason is not None:
                done.append(row)
        if failed:
            self._cache.erase(failed)
        events += self._leave(done)
        if step.parents is not None and self._batch is not None:
            self._batch = replace(self._batch, values=self._values())
        return events

    def _values(self) -> dict[str, frozenset[Hashable]]:
        """What the host knows of the rows' parameters. Whoever has a token has been forked: ``n`` is done with."""
        rows = [{**row.params, "n": 1} if row.token_ids else row.params for row in self._rows]
        return known_values(self._a.declared, rows)

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
        self._move(parents)

    def _leave(self, done: Sequence[int]) -> list[Event]:
        """Drops finished rows; the last rows take their places, so that few slots move."""
        if not done:
            return []
        events: list[Event] = []
        for row in done:
            events += self._retire(self._rows[row])
        gone = set(done)
        count = len(self._rows) - len(gone)
        movers = iter([row for row in range(count, len(self._rows)) if row not in gone])
        index = [next(movers) if row in gone else row for row in range(count)]
        table = self._pick(index) if index else None
        self._rows = [self._rows[row] for row in index]
        self._move(index)
        self._batch = None
        if table is not None:
            self._batch = replace(table, width=max(row.known for row in self._rows), values=self._values())
        return events

    def _retire(self, sequence: LiveSequence) -> list[Event]:
        """Counts a finished sequence; the last one of a request brings its completion."""
        task = sequence.task
        task.finished.append(sequence)
        task.running -= 1
        if task.running:
            return []
        self._ids.discard(task.request.id)
        ranked = self._a.strategy.rank(sorted(task.finished, key=lambda sequence: sequence.branch))
        first, *others = [sequence for sequence in ranked if isinstance(sequence, LiveSequence)]
        return [first.completion(task.request, tuple(other.completion(task.request) for other in others))]
