"""Tensor parallelism: transformers splits the layers over processes, and every process runs the same requests.

Nothing is sent between the processes but what the layers need. So whatever decides the course of a run must be the same
in all of them: noise is counted, not drawn; rank 0 deals the seeds; the tightest memory plan holds for all.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError

if TYPE_CHECKING:
    from ..parts import LoadedModel, Param, Source
    from ..types import Value
    from .memory import MemoryPlan

_ALONE = ("device", "device_map", "quantization", "adapter")
_CLOCKS = ("max_time",)


def split(source: Source) -> Any:
    """transformers' configuration for the processes that there are.

    Raises UnsupportedError outside of torchrun, and with an option that places or replaces layers itself.
    """
    given = [name for name in _ALONE if getattr(source, name) not in (None, "none")]
    if given:
        raise UnsupportedError(f"tp_plan and {given[0]} were both given: tp_plan places every layer, leave {given[0]}")
    if source.tp_plan != "auto":
        raise UnsupportedError(f"unknown tp_plan {source.tp_plan!r}: give 'auto', the plan of the model")
    if "WORLD_SIZE" not in os.environ:
        raise UnsupportedError("tp_plan needs several processes: torchrun --nproc-per-node 2 your_script.py")
    from transformers import DistributedConfig

    configure: Any = DistributedConfig
    return configure(tp_size=int(os.environ["WORLD_SIZE"]))


def is_split(loaded: LoadedModel) -> bool:
    """Whether the model's layers are split over several processes."""
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return False
    return any(hasattr(parameter, "device_mesh") for parameter in loaded.model.parameters())


def deal_seed(loaded: LoadedModel) -> int:
    """A seed for a request that brings none: rank 0's in all processes."""
    import torch
    from torch import distributed

    dealt = torch.tensor(secrets.randbits(53), device=loaded.device)
    distributed.broadcast(dealt, src=0)
    return int(dealt)


def agree(loaded: LoadedModel, plan: MemoryPlan) -> MemoryPlan:
    """The least that any process has memory for: all must admit the same rows."""
    import torch
    from torch import distributed

    least = torch.tensor([plan.batch_size, int(min(plan.tokens, 1 << 60))], device=loaded.device)
    distributed.all_reduce(least, op=distributed.ReduceOp.MIN)
    batch_size, tokens = least.tolist()
    return replace(plan, batch_size=batch_size, tokens=tokens)


def without_clocks(declared: Mapping[str, Param], defaults: Mapping[str, Value]) -> Mapping[str, Param]:
    """The parameters, where one that reads a clock is refused: clocks differ, and so would the processes."""
    clocks = {name: declared[name] for name in _CLOCKS if name in declared}
    for name in clocks:
        if defaults.get(name) is not None:
            raise UnsupportedError(f"{name} does not go with tp_plan: the processes' clocks differ")
    refusing = {"check": lambda value: False, "range": "not with tp_plan, the processes' clocks differ"}
    return {**declared, **{name: replace(param, **refusing) for name, param in clocks.items()}}  # type: ignore[arg-type]
