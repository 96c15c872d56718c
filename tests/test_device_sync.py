"""Nothing in the chain waits for the device that the logits are on: read off the operations that it runs.

The "meta" device stands in for a GPU. It takes the same branches and has shapes only, so that whatever would have to
look at a number fails by itself; :func:`watched` finds what would copy from one device to another besides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from every_part import EVERYTHING, SET, chain_and_rows, set_one
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama_infer import DEFAULT_PROCESSORS, Output, Plan, registry
from llama_infer.strategies.sample import Sample

# Each asks the device for a number, or for how many there are.
WAITS = """_local_scalar_dense item is_nonzero equal nonzero masked_select repeat_interleave bincount _unique2
unique_dim unique_consecutive""".split()


class Waited(Exception):
    """Something would wait for the device."""


class Operations(TorchDispatchMode):
    """Raises at an operation that would wait for a device other than the CPU, or copy to it or from it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.ndim or name == "copy_"}  # numbers may be passed
        if name == "_to_copy" and kwargs.get("non_blocking") and devices == {"cpu"}:
            return func(*args, **kwargs)  # a copy to the device that the host does not wait for
        if name == "_to_copy" and kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]).type)
        masks = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype is torch.bool for index in tree_leaves(args[1])
        )
        if devices - {"cpu"} and (name in WAITS or len(devices) > 1 or masks):
            raise Waited(str(func))
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Raises at a call that makes a tensor of Python's numbers on a device other than the CPU, which copies them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        first, kwargs = args[0] if args else None, kwargs or {}
        device = kwargs.get("device") or (first.device if isinstance(first, torch.Tensor) else "cpu")
        indexes = args[1] if name in ("__getitem__", "__setitem__") else ()
        lists = any(
            isinstance(index, (list, np.ndarray)) for index in (indexes if isinstance(indexes, tuple) else (indexes,))
        )
        if torch.device(device).type != "cpu" and (name in ("tensor", "as_tensor", "new_tensor", "asarray") or lists):
            raise Waited(f"{name} on {device}")
        return func(*args, **kwargs)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    with Calls(), Operations():
        yield


def numbers() -> torch.Tensor:
    return torch.zeros(3, 5, device="meta")


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x[0].tolist(),
        lambda x: bool(x.any()),
        lambda x: float(x.amax()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.index_put((x > 0,), x.new_zeros(())),
        lambda x: x.masked_select(x > 0),
        lambda x: x[0].long().repeat_interleave(x[0].long()),
        lambda x: x.unique(),
        lambda x: x.long()[0].bincount(),
        lambda x: torch.equal(x, x),
        lambda x: x[:, [1, 2]],
        lambda x: x[:, torch.tensor([1, 2])],
        lambda x: x + torch.ones(5).to(x.device),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: torch.as_tensor([1.0, 2.0], device=x.device),
        lambda x: torch.from_numpy(np.ones(5)).to(x.device),
        lambda x: x.copy_(torch.ones(3, 5)),
        lambda x: torch.ones(3, 5).copy_(x),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", non_blocking=True),
    ],
)
def test_what_waits_is_caught(waits: Any) -> None:
    with pytest.raises((Waited, RuntimeError, NotImplementedError)), watched():
        waits(numbers())


def test_what_does_not_wait_passes() -> None:
    with watched():
        x = numbers()
        index = torch.arange(3, device=x.device)
        x[:, 2:4] += x.gather(1, index[:, None])
        assert x[index, 1].where(x[:, 0] > 0, 1.0).shape == (3,)
        x.masked_fill_(x > 1, 0.0).sort(-1)
        x.new_zeros(()).masked_fill(x > 0, 1.0)
        torch.ones(3).to(x.device, non_blocking=True)
        torch.ones(3).nonzero()  # the CPU does not wait for itself


def run(rows: Any, **options: Any) -> None:
    """Two steps of a chain on another device, none of which may wait."""
    chain, batch = chain_and_rows(rows, 4096, "meta", **options)
    logits = torch.zeros(len(rows), 4096, device="meta")
    with watched():
        for _ in range(2):
            tokens, columns = chain(logits, batch)
            batch = batch.advance(Plan(tokens[:, None], columns=columns))
        batch.select(torch.arange(len(rows), device="meta")).generated()
    assert tokens.device.type == "meta"


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", [*SET, "everything", "nothing", "greedy"])
def test_no_part_waits(name: str, fresh: bool) -> None:
    """In rows that all have its parameters, and in mixed ones."""
    whole = {"everything": EVERYTHING, "nothing": {}, "greedy": {"temperature": 0.0}}
    values = whole[name] if name in whole else set_one(name)
    run([values, values], fresh=fresh)
    run([values, {}, {"temperature": 0.0}], fresh=fresh)


def test_the_values_set_every_part() -> None:
    assert set(SET) == set(registry.BUILTIN["processor"]) >= set(DEFAULT_PROCESSORS)
    for name, values in SET.items():
        part = registry.resolve("processor", name)
        assert any(values[key] != part.params[key].neutral for key in values if part.params[key].neutral is not None)


def test_a_step_of_the_strategy_does_not_wait() -> None:
    chain, batch = chain_and_rows([{}, {}, EVERYTHING], 4096, "meta")
    everything = Output(torch.zeros(3, 4096, device="meta"))
    some = Output(torch.zeros(2, 4096, device="meta"), torch.arange(2, device="meta"))
    with watched():
        for output in (everything, some):
            Sample().step(output, batch, chain)
