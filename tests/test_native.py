"""The C++ kernel against the definition, and what happens where it cannot be had."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import greedy
from test_kernels import definition, make, spans

from llama_infer import Pipeline
from llama_infer.cache.int8 import encode_plainly
from llama_infer.encoded import Encoded
from llama_infer.layout import Layout, Span
from llama_infer.models.native import attention as native
from llama_infer.models.native import integer, tiled
from llama_infer.native import library
from llama_infer.testing import tiny_llama

NATIVE = "models/native/attention"
TILES = tiled.available()
compiled = pytest.mark.skipif(library(NATIVE) is None, reason="no C++ compiler, or no cache folder of one's own")


each_way = pytest.mark.parametrize(
    "tiles",
    [False, pytest.param(True, marks=pytest.mark.skipif(not TILES, reason="the processor multiplies no tiles"))],
)


@pytest.fixture(autouse=True)
def chosen_way(request, monkeypatch):
    """Without tiles where the test says so."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and not callspec.params.get("tiles", True):
        monkeypatch.setattr(tiled, "available", lambda: False)


def held(states, eight_bits):
    """Keys or values as a cache holds them, and exactly what they stand for."""
    if not eight_bits:
        return states, states.double()
    steps, scale = encode_plainly(states)
    return Encoded(steps, scale), steps.double() * scale.double()


in_eight_bits = pytest.mark.parametrize("eight_bits", [False, True])


def attend(layout, q, k, v, window=None, scaling=None):
    """q [N, kv heads, group, d]; [N, kv heads, group, d] with zeros where a row feeds more than one token."""
    out = torch.zeros_like(q)
    run = native.kernel(q, k, v)
    native.attend(run, q.flatten(1, 2), k, v, out.view(len(q), -1, q.shape[-1]), layout, window, scaling)
    return out


@compiled
@each_way
@in_eight_bits
@settings(deadline=None, max_examples=80)
@given(
    spans,
    st.sampled_from([(1, 1), (2, 3), (2, 4), (2, 7), (1, 11), (1, 20)]),
    st.none() | st.integers(1, 90),
    st.sampled_from([None, 0.7, -0.7]),
    st.sampled_from([(torch.float32, 8), (torch.bfloat16, 8), (torch.bfloat16, 32)]),
)
def test_every_single_token_is_the_definition(tiles, eight_bits, given_spans, heads, window, scaling, kind):
    """Ragged rows, windows, groups of heads; what lies behind the end of a row is not read at all."""
    dtype, dim = kind
    layout, q, k, v = make(given_spans, *heads, dtype, dim)
    (k, exact_k), (v, exact_v) = held(k, eight_bits), held(v, eight_bits)
    expected = definition(layout, q.double(), exact_k, exact_v, window, scaling)
    for row, span in enumerate(layout.spans):
        for t in (k.scale, v.scale) if eight_bits else (k, v):
            t[row, :, span.end :] = torch.nan
    found = attend(layout, q, k, v, window, scaling)
    singles = layout.singles[1] if layout.singles is not None else torch.empty(0, dtype=torch.int64)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found[singles].double(), expected[singles], rtol=0, atol=tolerance)
    others = torch.ones(len(q), dtype=torch.bool)
    others[singles] = False
    assert not found[others].any()


@compiled
@each_way
@in_eight_bits
@pytest.mark.parametrize("dim", [8, 16, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_size_of_head(tiles, eight_bits, dim, dtype):
    """And scores as far apart as attention ever has them."""
    for spread in (1, 30):
        layout = Layout(tuple(Span(old, 1, True) for old in (0, 63, 64, 200)), torch.device("cpu"))
        draw = torch.Generator().manual_seed(dim)
        q = (spread * torch.randn(4, 2, 3, dim, generator=draw)).to(dtype)
        states = torch.randn(2, 4, 2, 260, dim, generator=draw).to(dtype)
        (k, exact_k), (v, exact_v) = ((t[:, :, :201] for t in held(t, eight_bits)) for t in states)
        scores = (q.double() @ exact_k.transpose(-1, -2)) * dim**-0.5
        hidden = torch.arange(201) >= torch.tensor([1, 64, 65, 201])[:, None, None, None]
        expected = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ exact_v
        tolerance = 2e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(attend(layout, q, k, v).double(), expected, rtol=0, atol=tolerance)


@compiled
@each_way
@in_eight_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_what_is_not_finite_stays_so_and_in_its_row(tiles, eight_bits, dtype, bad, where):
    """As in torch's kernel, so that the engine finds it among the logits."""
    layout, q, k, v = make([Span(20, 1, True)] * 2, 1, 2, dtype, 32)
    clean = attend(layout, q, *(held(t, eight_bits)[0] for t in (k, v)))
    {"query": q, "key": k, "value": v}[where][1, 0, 0, 0] = bad
    k, v = (held(t, eight_bits)[0] for t in (k, v))
    found = attend(layout, q, k, v)
    expected = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert torch.equal(found[0], clean[0])
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found[1].float(), expected[1], rtol=0, atol=tolerance, equal_nan=True)


@pytest.mark.skipif(not TILES, reason="the processor multiplies no tiles")
@in_eight_bits
@pytest.mark.parametrize("group", [1, 4, 6, 16])
def test_a_row_gives_the_same_alone_and_among_others(eight_bits, group):
    """To the last bit."""
    layout, q, k, v = make([Span(old, 1, True) for old in (3, 64, 200, 127)], 2, group, torch.bfloat16, 64)
    k, v = (held(t, eight_bits)[0] for t in (k, v))
    found = attend(layout, q, k, v)
    for row, span in enumerate(layout.spans):
        alone = Layout((span,), torch.device("cpu"))
        assert torch.equal(attend(alone, q[row : row + 1], k[row : row + 1], v[row : row + 1])[0], found[row])


@compiled
def test_scales_that_do_not_lie_as_their_numbers_do_are_left():
    q = torch.randn(1, 2, 3, 16)
    keys, values = (Encoded(*encode_plainly(torch.randn(3, 2, 10, 16))) for _ in range(2))
    assert native.kernel(q, keys, values) is not None
    apart = Encoded(keys.steps, keys.scale.transpose(1, 2).contiguous().transpose(1, 2))
    for pair in ((apart, values), (keys, apart), (keys, values.decode()), (keys.decode(), values)):
        assert native.kernel(q, *pair) is None


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A cache folder with nothing in it, and nothing compiled yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LLAMA_INFER_NATIVE", raising=False)
    library.cache_clear()
    yield monkeypatch
    library.cache_clear()


@compiled
def test_it_is_compiled_once(fresh, tmp_path):
    assert library(NATIVE) is not None
    (built,) = (tmp_path / "llama_infer").iterdir()
    made = built.stat().st_mtime_ns
    library.cache_clear()
    assert library(NATIVE) is not None and built.stat().st_mtime_ns == made


def test_a_compiler_that_takes_too_long_is_ended_with_all_that_it_has_started(fresh, tmp_path):
    """Each of them holds the writing end of a pipe as long as it runs."""
    compiler, pipe = tmp_path / "compiler", tmp_path / "pipe"
    compiler.write_text(f"#!/bin/sh\nexec > {pipe}\nsleep 60 &\nwait\n")
    compiler.chmod(0o700)
    os.mkfifo(pipe)
    fresh.setenv("CXX", str(compiler))
    fresh.setattr("llama_infer.native._PATIENCE", 0.5)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert library(NATIVE) is None
        for _ in range(100):
            with contextlib.suppress(BlockingIOError):  # nothing to read, and somebody who might write
                assert os.read(reader, 1) == b""
                return
            time.sleep(0.05)
    finally:
        os.close(reader)
    raise AssertionError("one still runs")


@pytest.mark.parametrize("why", ["switched off", "no compiler", "compiler fails", "others can write", "no folder"])
def test_without_it_torch_serves(fresh, tmp_path, why):
    """The same tokens."""
    if why == "switched off":
        fresh.setenv("LLAMA_INFER_NATIVE", "0")
    elif why == "no compiler":
        fresh.setenv("CXX", "no-such-compiler")
    elif why == "compiler fails":
        fresh.setenv("CXX", "false")
    elif why == "others can write":
        (tmp_path / "llama_infer").mkdir()
        os.chmod(tmp_path / "llama_infer", 0o777)
    else:
        (tmp_path / "llama_infer").write_text("a file")
    assert library(NATIVE) is None
    answers = Pipeline(tiny_llama())([[1, 2, 3], [4] * 20], temperature=0, max_new_tokens=6)
    for answer in answers:
        assert answer.token_ids == greedy(tiny_llama(), answer.prompt_token_ids, 6)


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on memory that Linux keeps")
@pytest.mark.skipif(integer.kernel("int8", torch.bfloat16) is None, reason="no C++ compiler, or no AVX-512")
def test_memory_that_cannot_be_had_is_said_or_done_without():
    """An error that halves the batch, None for another way, or tiles done without; and right again afterwards."""
    expected = {"int8": "OutOfMemoryError", "int4": "the same", "packed": "nothing", "prefill": "MemoryError"}
    script = str(Path(__file__).resolve().parent / "exhausted_kernels.py")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True)
    found = dict(line.split(" ", 1) for line in run.stdout.splitlines())
    assert run.returncode == 0 and {"int8", "int4"} <= found.keys(), run.stderr
    assert found == {name: expected[name] for name in found}
