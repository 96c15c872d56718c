"""The conformance kit: whether a part keeps the promises that the engine builds on. A line in a plug-in's tests.

All checks (:func:`~llama_infer.testing.check_stopping` is beside) draw their cases from ``seed``, raise
:class:`ConformanceError` at the first broken promise, and return None when all are kept. Parameter values to try are
given by name, several as a list: ``top_a=[0.1, 0.5]``.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import LlamaInferError, ParameterError
from ..parts import Param
from ..types import Value
from .cases import SHAPES, bind, draw_rows, make_histories, make_logits, make_rows, resolve_part
from .declarations import ConformanceError, check_declarations, conformance_error, declared_by, traits_of
from .windows import check_choose, check_narrow

if TYPE_CHECKING:
    from torch import Tensor

    from ..batch import Batch

_VOCABULARIES = (2, 33, 1500)
_STEPS = 3


def check_processor(part: Any, /, *, seed: int = 0, **params: Any) -> None:
    """Checks a logits processor (a name, a class, an object or a function).

    For every one: the shape, dtype and device of the logits are kept; NaN and +inf never come out of finite ones; what
    is -inf stays so (or is forced: the only token left); the batch is not written to; the same call gives the same
    result, and torch's global random state is left alone; a row whose parameters are all neutral is unchanged; defaults
    and neutral values are valid. Unless ``traits`` is declared without ``row_independent``: a batch equals its rows
    done alone, over several steps, also after ``select`` and ``extend``. Then whatever the traits claim, what
    ``accept`` returns, and that ``narrow`` on a window is the plain call, with true claims of ``complete`` and
    ``fits``.
    """
    _check("processor", part, seed, params, _check_scores)


def check_sampler(part: Any, /, *, seed: int = 0, **params: Any) -> None:
    """Checks a sampler: as :func:`check_processor`, for tokens.

    They are int64 [R], within the vocabulary, never excluded ones (-inf) while another is left; ``choose`` on a window
    takes the token of the plain call; ``greedy_at_zero`` means the likeliest token, the first of equals.
    """
    _check("sampler", part, seed, params, _check_tokens)


def check_import(part: Any, /) -> None:
    """Checks that the module of a part is imported without torch, as the command line does to list parameters."""
    module = part.partition(":")[0] if isinstance(part, str) else getattr(part, "__module__", type(part).__module__)
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["torch was loaded: import it inside of functions"]
        raise ConformanceError(f"{module} cannot be imported without torch: {reason[0]}")


@dataclass(frozen=True)
class Trial:
    """One case: a bound part, and rows of logits for each step, with their parameters and histories."""

    part: Any
    kind: str
    seed: int
    vocab_size: int
    kinds: Sequence[str]
    rows: Sequence[Mapping[str, Value]]
    tokens: Sequence[Sequence[int]]
    prompt_lengths: Sequence[int]
    logits: Sequence[Tensor]
    compare: Callable[[Tensor, Tensor], Tensor]

    def batch(self, index: Sequence[int]) -> Batch:
        """A new table of some of the rows, in this order."""
        return make_rows(
            [_TEMPERATURE, self.part] if self.kind == "sampler" else self.part,
            [self.rows[row] for row in index],
            [self.tokens[row] for row in index],
            prompt_lengths=[self.prompt_lengths[row] for row in index],
            seeds=[7 * row + self.seed for row in index],
        )

    @property
    def everything(self) -> range:
        return range(len(self.rows))

    def fail(self, promise: str, row: int | None = None, cause: Exception | None = None) -> NoReturn:
        """Raises."""
        where = f"a vocabulary of {self.vocab_size}, {self.logits[0].dtype}"
        if row is not None:
            where += f", row {row}: {self.kinds[row]} logits, {dict(self.rows[row])}, history {list(self.tokens[row])}"
        raise conformance_error(self.kind, self.part, promise, where, self.seed) from cause

    def fail_rows(self, broken: Tensor, promise: str) -> None:
        """Raises when ``broken`` bool [R] has a row."""
        if bool(broken.any()):
            self.fail(promise, int(broken.nonzero()[0]))


class _Temperature:
    """Declares ``temperature``, which samplers may read without declaring it."""

    @property
    def params(self) -> Mapping[str, Param]:
        from ..processors.temperature import Temperature

        return dict(Temperature.params)


_TEMPERATURE = _Temperature()


def _check(
    kind: str, part: Any, seed: int, given: Mapping[str, Any], check: Callable[[Trial, Tensor, Batch, Tensor], None]
) -> None:
    import torch

    found = resolve_part(kind, part)
    tried = check_declarations(kind, found, seed, given)
    greedy = kind == "sampler" and "greedy_at_zero" in traits_of(found)
    if kind == "sampler":
        tried = {"temperature": [0.0, 0.7, 1.0] if greedy else [0.7, 1.0], **tried}
    draw = random.Random(seed)
    done = 0
    refused: dict[str, ParameterError] = {}
    for vocab_size in _VOCABULARIES:
        try:
            bound = bind(found, vocab_size, ends=(vocab_size - 1,))
        except LlamaInferError:
            continue  # it needs a tokenizer, which comes with the large vocabulary
        done += 1
        fitting, refused = _fitting([_TEMPERATURE, bound] if kind == "sampler" else [bound], tried)
        for number, rows in enumerate(_assignments(bound, fitting, len(SHAPES), draw)):
            dtype = torch.float64 if number % 3 == 1 else torch.float32
            tokens, prompts = make_histories(len(rows), vocab_size, draw)
            logits = [make_logits(SHAPES, vocab_size, draw, dtype) for _ in range(_STEPS)]
            compare = _differ if kind == "processor" else torch.ne
            trial = Trial(bound, kind, seed, vocab_size, SHAPES, rows, tokens, prompts, logits, compare)
            _check_trial(trial, check, company=number < 3)
    if refused:
        raise next(iter(refused.values()))
    if not done:
        raise conformance_error(
            kind, found, "it could not be bound to any context", f"vocabularies of {_VOCABULARIES}", seed
        )


def _fitting(
    parts: list[Any], tried: Mapping[str, list[Value]]
) -> tuple[dict[str, list[Value]], dict[str, ParameterError]]:
    """The values that the part takes with this vocabulary (it may not have some token), and why it refused others."""
    fitting: dict[str, list[Value]] = {}
    refused = {}
    for name, values in tried.items():
        for value in values:
            try:
                make_rows(parts, [{name: value}], [[0]])
                fitting.setdefault(name, []).append(value)
            except ParameterError as error:
                refused[f"{name}={value!r}"] = error
    return fitting, refused


def _assignments(
    part: Any, tried: Mapping[str, list[Value]], count: int, draw: random.Random
) -> list[list[dict[str, Value]]]:
    """Parameters of the rows: mixed, twice; the same in all rows, twice; neutral in all."""
    mixed = [draw_rows(tried, count, draw) for _ in range(2 if tried else 1)]
    neutral = {name: param.neutral for name, param in declared_by(part).items() if param.neutral is not None}
    for rows in mixed:
        rows[-2] = {**rows[-2], **neutral}
    if not tried:
        return mixed
    same = [[draw_rows(tried, 1, draw)[0]] * count, [{name: draw.choice(v) for name, v in tried.items()}] * count]
    every = [*mixed, *same, *([[{**mixed[0][0], **neutral}] * count] if neutral else [])]
    return [[row if _goes_together(part, row) else {**row, **neutral} for row in rows] for rows in every]


def _goes_together(part: Any, row: Mapping[str, Value]) -> bool:
    """Whether a request with these values would be let in."""
    if not hasattr(part, "check"):
        return True
    try:
        part.check({**{name: param.default for name, param in declared_by(part).items()}, **row})
    except ParameterError:
        return False
    return True


def _check_trial(trial: Trial, check: Callable[[Trial, Tensor, Batch, Tensor], None], company: bool = True) -> None:
    everything = trial.everything
    batch = trial.batch(everything)
    _check_state(trial, batch)
    out = _call(trial, trial.logits[0], batch)
    check(trial, trial.logits[0], batch, out)
    trial.fail_rows(trial.compare(out, _call(trial, trial.logits[0], batch)), "the same call gave another result")
    alone = not hasattr(trial.part, "traits") or "row_independent" in traits_of(trial.part)
    if alone and company:
        _check_company(trial)
    else:
        _run(trial, batch, everything)


def _check_state(trial: Trial, batch: Batch) -> None:
    if not hasattr(trial.part, "state"):
        return
    names = set(trial.part.state(batch))
    if names & set(declared_by(trial.part)):
        trial.fail("a state column has the name of a parameter")
    if names and hasattr(trial.part, "traits") and "stateful" not in traits_of(trial.part):
        trial.fail("it has state columns and does not claim to be stateful")


def _call(trial: Trial, logits: Tensor, batch: Batch) -> Tensor:
    """The part's result, checked for what holds whatever it does."""
    import torch

    given, before, random_state = logits.clone(), _contents(batch), torch.random.get_rng_state()
    try:
        with torch.no_grad():
            out = trial.part(given, batch)
    except ParameterError as error:
        trial.fail(f"a value is refused by prepare(), when its request joins, not by the call: {error}", cause=error)
    except Exception as error:
        trial.fail(f"it raised {error!r}", cause=error)
    expected = (torch.int64, batch.length.shape) if trial.kind == "sampler" else (logits.dtype, logits.shape)
    if not isinstance(out, torch.Tensor) or (out.dtype, out.shape) != expected or out.device != logits.device:
        what = f"{out.dtype} {list(out.shape)}" if isinstance(out, torch.Tensor) else type(out).__name__
        trial.fail(f"it returned {what}; shape, dtype and device are to be {expected[0]} {list(expected[1])}")
    if "pure" in traits_of(trial.part) and not torch.equal(given, logits):
        trial.fail("it claims to be pure and wrote into the logits")
    if "history_only" in traits_of(trial.part):
        history = torch.zeros_like(logits, dtype=torch.bool).scatter(1, batch.tokens.clamp(min=0), True)
        trial.fail_rows(((given != logits) & ~history).any(-1), "it claims history_only and wrote at another token")
    if not _equal(_contents(batch), before):
        trial.fail("it wrote into the batch")
    if not torch.equal(random_state, torch.random.get_rng_state()):
        trial.fail("it moved torch's global random state: use batch.uniform")
    return out


def _contents(batch: Batch) -> dict[str, Tensor]:
    """Copies of the tensors of a batch."""
    import torch

    tensors = {name: getattr(batch, name) for name in ("length", "prompt_length", "seed", "branch", "request")}
    tensors[" history"] = batch.history.values
    for name, column in batch.columns.items():
        tensors[name] = column if isinstance(column, torch.Tensor) else getattr(column, "values", column)
    return {name: tensor.clone() for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


def _equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].shape == tensor.shape and bool(((left[name] == tensor) | (left[name] != left[name])).all())
        for name, tensor in right.items()
    )


def _differ(left: Tensor, right: Tensor) -> Tensor:
    """bool [R]: which rows differ: in what is -inf, or by more than rounding."""
    import torch

    close = torch.isclose(left, right, rtol=1e-5, atol=1e-5)
    return ~(close & ((left == -torch.inf) == (right == -torch.inf))).all(-1)


def _check_scores(trial: Trial, logits: Tensor, batch: Batch, out: Tensor) -> None:
    import torch

    trial.fail_rows((out.isnan() | (out == torch.inf)).any(-1), "NaN or +inf came out of finite logits")
    back, left = (logits == -torch.inf) & (out > -torch.inf), (out > -torch.inf).sum(-1)
    trial.fail_rows(back.any(-1) & (left > 1), "an excluded token (-inf) came back, and not alone as a forced one")
    neutral = {name: param.neutral for name, param in declared_by(trial.part).items() if param.neutral is not None}
    for row in trial.everything if neutral else ():
        unset = all(trial.rows[row][name] == value for name, value in neutral.items())
        if unset and not torch.equal(out[row], logits[row]):
            trial.fail("a row whose parameters are neutral was changed", row)
    if "keeps_argmax" in traits_of(trial.part):
        best = out.gather(1, logits.argmax(-1, keepdim=True))
        lost = (best < out.amax(-1, keepdim=True)) | (best == -torch.inf)
        trial.fail_rows(lost[:, 0], "it claims to keep the argmax, and the likeliest token is it no more")
    if hasattr(trial.part, "narrow"):
        for count in sorted({1, 2, trial.vocab_size // 8, trial.vocab_size // 2, trial.vocab_size} - {0}):
            check_narrow(trial, logits, batch, out, count)


def _check_tokens(trial: Trial, logits: Tensor, batch: Batch, out: Tensor) -> None:
    import torch

    outside = (out < 0) | (out >= trial.vocab_size)
    trial.fail_rows(outside, "it chose a token outside of the vocabulary")
    excluded = logits.gather(1, out[:, None])[:, 0] == -torch.inf
    trial.fail_rows(excluded, "it chose an excluded token (-inf) although another was left")
    if "greedy_at_zero" in traits_of(trial.part):
        wrong = (batch["temperature"] == 0) & (out != logits.argmax(-1))
        trial.fail_rows(wrong, "it claims to be greedy at temperature 0 and did not take the (first) likeliest token")
    if hasattr(trial.part, "choose"):
        for count in sorted({1, trial.vocab_size // 8, trial.vocab_size} - {0}):
            check_choose(trial, logits, batch, count, lambda left: _call(trial, left, batch))


def _choice(trial: Trial, out: Tensor, row: int, step: int) -> int:
    """The token that the row takes after a step: any that is left."""
    if trial.kind == "sampler":
        return int(out.item())
    left = (out > out.new_tensor(float("-inf"))).nonzero()[:, 0].tolist()
    tokens: list[int] = left or [0]
    return random.Random(f"{trial.seed} {row} {step}").choice(tokens)


def _run(trial: Trial, batch: Batch, index: Sequence[int]) -> tuple[list[Tensor], list[list[int]]]:
    """Every step of some rows: results, and the tokens taken after each."""
    results, tokens = [], []
    for step in range(_STEPS):
        out = _call(trial, trial.logits[step][list(index)], batch)
        results.append(out)
        tokens.append([_choice(trial, out[at], row, step) for at, row in enumerate(index)])
        batch = _advance(trial, batch, out, trial.logits[step][list(index)], tokens[-1])
    return results, tokens


def _advance(trial: Trial, batch: Batch, out: Tensor, logits: Tensor, tokens: Sequence[int]) -> Batch:
    """The table after the tokens were taken, with what ``accept`` says of the state."""
    import torch

    from ..batch import Plan

    chosen = torch.tensor(list(tokens))
    columns: Mapping[str, Tensor] = {}
    if hasattr(trial.part, "accept"):
        scores = out if trial.kind == "processor" else logits
        given, before = (scores.clone(), chosen.clone()), _contents(batch)
        columns = trial.part.accept(given[0], given[1], batch)
        if not _equal(before, _contents(batch)) or not torch.equal(given[0], scores) or not given[1].equal(chosen):
            trial.fail("accept wrote into what it was given")
        for name, column in columns.items():
            old = batch.columns.get(name)
            if old is None:
                trial.fail(f"accept returned a column {name!r} that state() does not make")
            if isinstance(old, torch.Tensor) and (old.shape[0], old.dtype) != (column.shape[0], column.dtype):
                trial.fail(f"accept returned {name!r} as {column.dtype} of {column.shape[0]} rows; it was {old.dtype}")
    return batch.advance(Plan(chosen[:, None], columns=columns))


def _check_company(trial: Trial) -> None:
    """A row alone, in a batch, after others joined and rows changed places: the same, step by step."""
    import torch

    alone = [_run(trial, trial.batch([row]), [row]) for row in trial.everything]

    def compare(out: Tensor, index: Sequence[int], steps: Sequence[int], promise: str) -> None:
        for at, (row, step) in enumerate(zip(index, steps, strict=True)):
            if bool(trial.compare(out[at : at + 1], alone[row][0][step]).any()):
                trial.fail(f"{promise} (step {step})", row)

    together, _ = _run(trial, trial.batch(trial.everything), trial.everything)
    for step, out in enumerate(together):
        compare(out, trial.everything, [step] * len(out), "a batch does not equal its rows done alone")
    early, late = list(trial.everything)[::2], list(trial.everything)[1::2]
    table = trial.batch(early)
    first = trial.logits[0][early]
    table = _advance(trial, table, _call(trial, first, table), first, [alone[row][1][0][0] for row in early])
    table = table.extend(trial.batch(late))
    rows, steps = [*early, *late], [1] * len(early) + [0] * len(late)
    order = [*reversed(range(1, len(rows))), 2]  # one is dropped, one is there twice, and none is in its place
    for index in (list(range(len(rows))), order):
        moved = table.select(torch.tensor(index))
        who, when = [rows[at] for at in index], [steps[at] for at in index]
        logits = torch.stack([trial.logits[step][row] for row, step in zip(who, when, strict=True)])
        compare(_call(trial, logits, moved), who, when, "select or extend lost the state of a row")
        tokens = [alone[row][1][step][0] for row, step in zip(who, when, strict=True)]
        moved = _advance(trial, moved, _call(trial, logits, moved), logits, tokens)
        after = [step + 1 for step in when]
        logits = torch.stack([trial.logits[step][row] for row, step in zip(who, after, strict=True)])
        compare(_call(trial, logits, moved), who, after, "select or extend lost the state of a row")
