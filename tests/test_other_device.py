"""The branches for other devices than the CPU, run on the CPU: they choose the same tokens as its own.

Tensors that say they were on a GPU, and are not. So what a GPU would compute is checked where there is none; that
nothing waits for it is in test_device_sync.py, and a real one is asked in test_gpu.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every_part import SET, WHOLE, chain_and_rows, named
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from llama_infer import Plan

torch.set_num_threads(1)
DEVICE = torch.device("cuda")
VOCABULARY = 4096


class Pretended(torch.Tensor):
    """A tensor of the CPU that says it was on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a tensor on a GPU has no numpy array")


class Pretending(TorchFunctionMode):
    """Makes tensors for that device pretended ones, and keeps torch from looking for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def here(value: Any) -> Any:
            return torch.device("cpu") if isinstance(value, (str, torch.device)) and str(value) == "cuda" else value

        kwargs = dict(kwargs or {})
        meant = "cuda" in (
            str(kwargs.get("device")),
            *(str(arg) for arg in args if isinstance(arg, (str, torch.device))),
        )
        meant |= any(issubclass(kind, Pretended) for kind in types)
        out = func(*tree_map(here, args), **tree_map(here, kwargs))
        if meant and getattr(func, "__name__", "") != "cpu":
            out = tree_map(lambda t: t.as_subclass(Pretended) if isinstance(t, torch.Tensor) else t, out)
        return out


def logits() -> torch.Tensor:
    """Random, with most tokens removed, flat, tied, random, random."""
    noise = 3 * torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(0))
    noise[1, 100:] = -torch.inf
    noise[2] *= 0.01
    noise[3] = noise[3].round()
    return noise


@pytest.mark.parametrize("name", [*SET, *WHOLE])
def test_the_choices_are_those_of_the_cpu(name: str) -> None:
    """Over two steps and their state; scores agree to rounding, what is kept exactly."""
    values = named(name)
    rows, given = [values] * 4 + [{}, {"temperature": 0.0}], logits()
    chain, batch = chain_and_rows(rows, VOCABULARY)
    with Pretending():
        far, table = chain_and_rows(rows, VOCABULARY, "cuda")
        there = given.to("cuda")
    assert isinstance(there, Pretended) and table.device.type == "cuda"
    for _ in range(2):
        scores = chain.scores(given, batch)
        tokens, columns = chain(given, batch)
        with Pretending():
            others = far.scores(there, table)
            chosen, renewed = far(there, table)
            assert isinstance(others, Pretended) and isinstance(chosen, Pretended)
            table = table.advance(Plan(chosen[:, None], columns=renewed))
        batch = batch.advance(Plan(tokens[:, None], columns=columns))
        assert chosen.tolist() == tokens.tolist() and columns.keys() == renewed.keys()
        assert torch.equal(others == -torch.inf, scores == -torch.inf)
        assert torch.allclose(torch.Tensor(others), scores, rtol=1e-5, atol=1e-5)
