"""The policies of torchao, by name: the only file that imports it."""

from __future__ import annotations

import importlib
import importlib.util
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import MissingDependencyError, ParameterError, UnsupportedError, suggest
from .quantization import only_errors

if TYPE_CHECKING:
    import torch

    from ..parts import Source

_TRIAL = 256
"""Inputs and outputs of the layer on which a config is tried: whole groups of any size."""


class TorchAO:
    """``"torchao:<config>"``: a quantization of torchao with its own defaults, the head kept whole.

    Args:
        config: one of torchao's config objects, such as ``Int8WeightOnlyConfig(group_size=64)``.
    """

    def __init__(self, config: Any = None) -> None:
        if config is None or isinstance(config, str):
            raise ParameterError(
                f"which of torchao's configs? quantization='torchao:NAME'. Known: {', '.join(_configs())}"
            )
        self.config = config

    @classmethod
    def named(cls, name: str) -> TorchAO:
        """The config of that name with its defaults, ``"int8_weight_only"`` or ``"Int8WeightOnlyConfig"``.

        Raises MissingDependencyError without torchao, ParameterError for a name that it does not know.
        """
        known = _configs()
        if _words(name) not in known:
            raise ParameterError(
                f"torchao has no config {name!r}{suggest(_words(name), known)} Known: {', '.join(known)}"
            )
        return cls(known[_words(name)]())

    def check(self, device: torch.device, dtype: torch.dtype | str) -> None:
        """Raises UnsupportedError for a device or dtype on which torchao fails; a small layer is quantised to see."""
        import torch

        quantization: Any = importlib.import_module("torchao.quantization")
        numbers = torch.bfloat16 if isinstance(dtype, str) else dtype
        layer = torch.nn.Linear(_TRIAL, _TRIAL, bias=False, device=device, dtype=numbers)
        try:
            with torch.no_grad():
                quantization.quantize_(layer, self.config)
                layer(torch.ones(2, _TRIAL, device=device, dtype=numbers))
        except Exception as error:  # whatever its kernels may miss
            reason = (str(error).strip().splitlines() or [""])[0]
            raise UnsupportedError(
                f"quantization={self!r} does not work on {device} in {numbers}: {type(error).__name__}: {reason}"
            ) from error

    def options(self, source: Source) -> Mapping[str, Any]:
        """Keyword arguments for ``from_pretrained``."""
        from .weights import quiet

        with quiet():
            from transformers import TorchAoConfig

            configure: Any = TorchAoConfig
            return {"quantization_config": configure(self.config)}

    def __repr__(self) -> str:
        return f"TorchAO({self.config})"


def _configs() -> dict[str, Any]:
    """By name, the configs that can be made without arguments."""
    if importlib.util.find_spec("torchao") is None:
        raise MissingDependencyError("quantization='torchao:...' needs torchao: pip install 'llama-infer[torchao]'")
    with warnings.catch_warnings(), only_errors("torchao"), only_errors("torch.utils._pytree"):
        warnings.simplefilter("ignore")  # about libraries for other versions of Python and for GPUs
        module: Any = importlib.import_module("torchao.quantization")
        base: Any = importlib.import_module("torchao.core.config").AOBaseConfig
    found = [getattr(module, name) for name in module.__all__]
    kinds = [kind for kind in found if isinstance(kind, type) and issubclass(kind, base)]
    return {_words(kind.__name__): kind for kind in kinds if kind.__name__.endswith("Config") and _is_plain(kind)}


def _is_plain(kind: Any) -> bool:
    """Whether it quantises layers as they come: no mapping from names, and no statistics that have to be given."""
    return "fqn_to_config" not in kind.__dataclass_fields__ and "act_quant_scale" not in kind.__dataclass_fields__


def _words(name: str) -> str:
    """``Int8WeightOnlyConfig`` -> ``int8_weight_only``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().removesuffix("_config")
