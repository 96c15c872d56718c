"""On a CUDA device, where there is one: nothing in the chain waits for it, and the choices are those of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from every_part import SET, WHOLE, chain_and_rows, named

from llama_infer import Output, Plan
from llama_infer.strategies.sample import Sample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

VOCABULARY = 8192
NAMES = [*SET, *WHOLE]


def rows_of(name: str) -> list[dict[str, Any]]:
    """Twelve rows with these parameters, three without any, one greedy."""
    return [named(name)] * 12 + [{}] * 3 + [{"temperature": 0.0}]


def logits(rows: int, kind: str) -> torch.Tensor:
    """float32 [rows, V], made on the CPU."""
    noise = torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(rows))
    return {"random": 3 * noise, "flat": 0.01 * noise, "tied": (3 * noise).round()}[kind]


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_is_an_error_here() -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        torch.ones(3, device="cuda").sum().item()


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_chain_does_not_wait(name: str, fresh: bool) -> None:
    chain, batch = chain_and_rows(rows_of(name), VOCABULARY, "cuda", fresh=fresh)
    given = logits(len(batch), "random").cuda()
    with no_waiting():
        for _ in range(2):
            tokens, columns = chain(given, batch)
            batch = batch.advance(Plan(tokens[:, None], columns=columns))
        batch = batch.select(torch.arange(len(batch), device="cuda"))
        Sample().step(Output(given), batch, chain)
    assert (tokens >= 0).all()


@pytest.mark.parametrize("sampler", ["categorical", "greedy"])
@pytest.mark.parametrize("kind", ["random", "flat", "tied"])
@pytest.mark.parametrize("name", NAMES)
def test_seeds_give_the_same_tokens_on_both_devices(name: str, kind: str, sampler: str) -> None:
    """Three steps: the state that parts keep is the same too. Logits of a row on which the two would round to different
    sides of a limit do not occur here."""
    here = chain_and_rows(rows_of(name), VOCABULARY, "cpu", sampler=sampler)
    there = chain_and_rows(rows_of(name), VOCABULARY, "cuda", sampler=sampler)
    given = logits(len(here[1]), kind)
    (chain, batch), (far, table) = here, there
    for _ in range(3):
        tokens, columns = chain(given, batch)
        others, renewed = far(given.cuda(), table)
        assert others.device.type == "cuda"
        if (odd := (others.cpu() != tokens).nonzero()[:, 0]).numel():  # only among equals can rounding choose
            assert sampler == "greedy"
            scores = chain.scores(given, batch)[odd]
            best, other = (scores.gather(1, chosen[odd, None]) for chosen in (tokens, others.cpu()))
            assert torch.allclose(best, other, rtol=1e-5, atol=1e-5)
            return
        assert columns.keys() == renewed.keys()
        for column, value in columns.items():
            assert torch.allclose(renewed[column].cpu().double(), value.double(), atol=1e-4)
        batch = batch.advance(Plan(tokens[:, None].clamp(min=0), columns=columns))
        table = table.advance(Plan(others[:, None].clamp(min=0), columns=renewed))


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_same_on_both_devices(name: str) -> None:
    """The processed logits, to rounding; what is kept exactly."""
    chain, batch = chain_and_rows(rows_of(name), VOCABULARY)
    far, table = chain_and_rows(rows_of(name), VOCABULARY, "cuda")
    for kind in ("random", "flat", "tied"):
        given = logits(len(batch), kind)
        scores, others = chain.scores(given, batch), far.scores(given.cuda(), table).cpu()
        assert torch.equal(scores == -torch.inf, others == -torch.inf)
        assert torch.allclose(scores, others, rtol=1e-4, atol=1e-4)


def test_faulty_rows_are_told_there_too() -> None:
    given = logits(4, "random")
    given[0, 5], given[1], given[2, 3] = torch.nan, -torch.inf, torch.inf
    for params in ({}, WHOLE["common"], {"temperature": 0.0}):
        (chain, batch), (far, table) = (chain_and_rows([params] * 4, VOCABULARY, device) for device in ("cpu", "cuda"))
        assert far(given.cuda(), table).tokens.tolist() == chain(given, batch).tokens.tolist()


def test_noise_has_the_same_bits_on_both_devices() -> None:
    _, batch = chain_and_rows([{}] * 9, VOCABULARY)
    _, table = chain_and_rows([{}] * 9, VOCABULARY, "cuda")
    ids = torch.arange(VOCABULARY)
    assert torch.equal(table.uniform("categorical", ids.cuda()).cpu(), batch.uniform("categorical", ids))
