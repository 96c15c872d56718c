"""Ten thousand short requests: what is done for one does not depend on how many were before it."""

from __future__ import annotations

import gc
import itertools
import sys

import pytest
from oracles import open_engine

from llama_infer import Request
from llama_infer.engine.engine import LocalEngine

COUNT = 10_000


class Calls:
    """Counts calls, of Python's and of C's functions, while it is entered."""

    def __init__(self):
        self.count = 0

    def _see(self, frame, event, argument):
        self.count += event in ("call", "c_call")

    def __enter__(self):
        sys.setprofile(self._see)
        return self

    def __exit__(self, *args):
        sys.setprofile(None)


@pytest.mark.parametrize("ordered", [True, False])
def test_work_and_memory_for_a_request_stay_the_same(pipe, monkeypatch, ordered):
    """Calls made and objects alive at the end are those at the beginning, and no list of the engine's grows."""
    left = []  # behind in the engine when it is closed

    def note(self, close=LocalEngine.close):
        left.append((self._added, set(self._ids), self._scheduler._order, self._scheduler._waiting))
        close(self)

    monkeypatch.setattr(LocalEngine, "close", note)
    small = pipe.replace(batch_size=100, prefix_cache=1024, processors=("temperature",), stopping=("length",))
    fixed = {"max_new_tokens": 1, "temperature": 0}
    answers = small.run((Request([at % 250, at // 250 % 250], fixed) for at in range(COUNT)), ordered=ordered)
    calls, objects = [], []
    for start in range(0, COUNT, 1000):
        counted = start in (1000, COUNT - 2000)
        with Calls() if counted else nothing() as seen:
            assert sum(1 for _ in itertools.islice(answers, 1000)) == 1000
        if counted:
            calls.append(seen.count)
            gc.collect()
            objects.append(len(gc.get_objects()))
    assert calls[1] == pytest.approx(calls[0], rel=0.02)
    assert objects[1] - objects[0] < 500
    assert list(answers) == []
    assert left == [(COUNT, set(), [], {})]
    assert small._assembly.prefixes.tokens == len(small._assembly.prefixes._blocks) == 0  # two tokens are no block


class nothing:
    """Counts nothing."""

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


def test_a_long_queue_is_not_searched(pipe):
    """Adding to, admitting from and cancelling out of ten thousand waiting requests: calls do not grow with them."""
    engine = open_engine(pipe.replace(batch_size=4))
    counts = []
    for start in range(0, COUNT, 1000):
        with Calls() as seen:
            for at in range(start, start + 1000):
                engine.add(Request([at % 250], {"max_new_tokens": 1 + at % 3}, id=str(at)))
        counts.append(seen.count)
    assert max(counts) < 1.02 * min(counts)
    engine.step()
    with Calls() as few:
        engine.cancel("9999")
    with Calls() as one:
        engine.cancel("5000")
    assert one.count == few.count
    for at in range(COUNT - 8):
        engine.cancel(str(at))
    engine.step()
    with Calls() as late:
        engine.step()
    assert late.count < 20_000 and engine._scheduler.waiting <= 8
    while engine.busy:
        engine.step()
    assert not engine._scheduler._order
