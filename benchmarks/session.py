"""One run: its options, its contenders taking turns, and what has been found out."""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import agreement
import machine
from contenders import OURS, Contender, PeerError
from environments import InstallError
from models import SHAPES, checkpoint

T = TypeVar("T")


class Session:
    """What a suite is given.

    Attributes:
        options: of the command line.
        report: what is printed as JSON in the end.
        limits: the best that the machine showed in the whole run.
        turns: what it could do right before and after each contender's latest turns: neighbours take their share,
            now more, now less.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cache: Path = options.cache
        self.report: dict[str, Any] = {"missing": {}, "ratios": {}}
        self.limits = machine.Machine()
        self.turns: dict[str, list[machine.Machine]] = {}

    @property
    def ours(self) -> str:
        """This package, under the policy that was asked for."""
        return f"{OURS}:{self.options.policy}" if self.options.policy else OURS

    @property
    def quick(self) -> bool:
        return bool(self.options.quick)

    @property
    def vocab_size(self) -> int:
        return int(SHAPES[self.options.model]["vocab_size"])

    @contextlib.contextmanager
    def contenders(
        self, names: Iterable[str], *, rows: int, context: int, **more: Any
    ) -> Iterator[dict[str, Contender]]:
        """Those of ``names`` that run here, loaded and found to compute the right thing. Who does not is reported."""
        names = list(names)
        if not self.options.no_agreement:
            self._exact(names, **more)
        with self._open(names, self.options.model, self.options.dtype, rows=rows, context=context, **more) as found:
            if not self.options.no_agreement:
                with self._judge(found) as judge:
                    self._agree(found, judge)
            yield found

    @contextlib.contextmanager
    def contender(self, name: str, **settings: Any) -> Iterator[Contender | None]:
        """A fresh one, unchecked; None when it does not run here, which is reported."""
        with self._open([name], self.options.model, self.options.dtype, **settings) as found:
            yield found.get(name)

    def take_turns(self, found: Mapping[str, Contender], measure: Callable[[Contender, int], T]) -> dict[str, list[T]]:
        """``measure(contender, repeat)`` of each in each repeat. ``turns`` has what the machine could do meanwhile."""
        results: dict[str, list[T]] = {name: [] for name in found}
        self.turns = {name: [] for name in found}
        for repeat in range(self.options.repeats):
            before = self.look()
            for name, contender in found.items():
                results[name].append(measure(contender, repeat))
                print(
                    f"  {name}: {results[name][-1]:.4g}" if isinstance(results[name][-1], float) else f"  {name}",
                    flush=True,
                )
                after = self.look()
                self.turns[name].append(before.best(after))
                before = after
            print(f"repeat {repeat + 1}/{self.options.repeats} done; {self.limits}", flush=True)
        return results

    def look(self) -> machine.Machine:
        """Measures what the machine can do now."""
        now = machine.measure(self.options.dtype, self.quick)
        self.limits = self.limits.best(now)
        return now

    def ratio(self, name: str, below: Sequence[float], above: Sequence[float]) -> dict[str, float]:
        """Notes how many times ``below`` goes into ``above``, one ratio a repeat."""
        each = [a / b for b, a in zip(below, above, strict=True) if b]
        found = {"median": statistics.median(each), "least": min(each), "most": max(each)} if each else {}
        self.report["ratios"][name] = {key: round(value, 3) for key, value in found.items()}
        return found

    @contextlib.contextmanager
    def _open(self, names: Iterable[str], model: str, dtype: str, **settings: Any) -> Iterator[dict[str, Contender]]:
        folder = checkpoint(model, dtype, self.cache)
        found: dict[str, Contender] = {}
        try:
            for name in names:
                given = {"model": str(folder), "dtype": dtype, "threads": self.options.threads, **settings}
                try:
                    found[name] = Contender(name, self.cache, given, isolated=self.options.isolated or not self.quick)
                except (InstallError, PeerError) as error:
                    if name == self.ours:
                        raise
                    self.report["missing"][name] = str(error)
                    print(f"without {name}: {error}", flush=True)
            yield found
        finally:
            for contender in found.values():
                contender.close()

    def _exact(self, names: Sequence[str], **more: Any) -> None:
        """Tokens of a tiny model in float32, against transformers one row at a time."""
        whole = [name for name in names if ":" not in name]
        judge = [] if "transformers" in whole else ["transformers"]
        with self._open([*whole, *judge], "tiny", "float32", rows=16, context=512, **more) as found:
            equal = agreement.exact(found, SHAPES["tiny"]["vocab_size"], 4 if self.quick else 16)
        print("float32, same tokens as generate: " + ", ".join(f"{n} {'yes' if y else 'NO'}" for n, y in equal.items()))
        self.report.setdefault("float32_exact", {}).update(equal)

    @contextlib.contextmanager
    def _judge(self, found: Mapping[str, Contender]) -> Iterator[Contender]:
        for name in ("transformers", "padded"):
            if name in found:
                yield found[name]
                return
        with self._open(["transformers"], self.options.model, self.options.dtype, rows=1, context=512) as opened:
            yield opened["transformers"]

    def _agree(self, found: Mapping[str, Contender], judge: Contender) -> None:
        whole = {**found, "transformers": judge}
        shares = agreement.teacher_forced(whole, judge, self.vocab_size, 2 if self.quick else 6)
        print("likeliest to the reference: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
        self.report.setdefault("teacher_forced", {}).update({n: round(share, 4) for n, share in shares.items()})
