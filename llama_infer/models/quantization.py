"""Policies for the weights: none at all, and bitsandbytes in 8 and in 4 bits, on the CPU as well as on cuda.

A policy is any object with ``check(device, dtype)``, asked first, ``options(source)``, keyword arguments for
``from_pretrained``, and/or ``convert(model)``, called on the loaded model.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoadingError, MissingDependencyError, ParameterError, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..parts import Source


_READERS = {
    "compressed-tensors": ("compressed-tensors",),
    "torchao": ("torchao",),
}
"""Packages that transformers reads quantised checkpoints with."""


_WHOLE = "if its weights are whole, take 'quantization_config' out of that file"


class Unchanged:
    """``"none"``: the layers as transformers loads them, without the packing that is the default on x86 processors."""

    def __repr__(self) -> str:
        return "Unchanged()"


class BitsAndBytesInt8:
    """``"bnb-int8"``: LLM.int8() of bitsandbytes; 8-bit weights, activations quantised on the fly, the head kept whole.

    Args:
        threshold: columns of the activations that reach this magnitude are computed in 16 bits. Which columns do is
            decided over all tokens of a forward, so a request's logits then depend a little on its neighbours;
            0 turns it off.
    """

    def __init__(self, threshold: float = 6.0) -> None:
        if not threshold >= 0:
            raise ParameterError(f"threshold={threshold!r} is out of range: 0 <= threshold")
        self.threshold = float(threshold)

    def options(self, source: Source) -> Mapping[str, Any]:
        """Keyword arguments for ``from_pretrained``. MissingDependencyError without bitsandbytes."""
        prepare_bitsandbytes()
        from transformers import BitsAndBytesConfig

        configure: Any = BitsAndBytesConfig
        return {"quantization_config": configure(load_in_8bit=True, llm_int8_threshold=self.threshold)}

    def __repr__(self) -> str:
        return f"BitsAndBytesInt8(threshold={self.threshold})"


class BitsAndBytesNF4:
    """``"bnb-nf4"``: 4-bit NormalFloat weights with quantised scales, bfloat16 arithmetic, the head kept whole."""

    quant_type = "nf4"

    def options(self, source: Source) -> Mapping[str, Any]:
        """Keyword arguments for ``from_pretrained``. MissingDependencyError without bitsandbytes."""
        prepare_bitsandbytes()
        import torch
        from transformers import BitsAndBytesConfig

        configure: Any = BitsAndBytesConfig
        config = configure(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return {"quantization_config": config}

    def convert(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model, with :func:`plain_layouts` where they are needed."""
        plain_layouts(model)
        return model

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class BitsAndBytesFP4(BitsAndBytesNF4):
    """``"bnb-fp4"``: the same with 4-bit floating-point weights, which fit most models a little worse."""

    quant_type = "fp4"


def prepare_bitsandbytes() -> None:
    """Import bitsandbytes quietly, and without the native code that it would fetch from the hub.

    On CPUs with AVX-512 its import asks the package ``kernels``, if installed, to download and run a library. That is
    code from the network which nobody asked for, and offline it ends in a warning. There is no setting against it, so
    the import sees no ``kernels``; bitsandbytes then uses the kernels that it ships with.

    Raises MissingDependencyError when bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependencyError("8-bit and 4-bit weights need bitsandbytes: pip install 'bitsandbytes>=0.46'")
    with _hidden("kernels"), only_errors("bitsandbytes.backends.cpu.ops"):
        importlib.import_module("bitsandbytes")
    noisy = logging.getLogger("bitsandbytes.autograd._functions")
    if _about_casts not in noisy.filters:
        noisy.addFilter(_about_casts)


def need_reader(method: str) -> None:
    """Raise MissingDependencyError when transformers needs packages for checkpoints quantised so that are not here."""
    missing = [name for name in _READERS.get(method, ()) if importlib.util.find_spec(name.replace("-", "_")) is None]
    if missing:
        raise MissingDependencyError(f"a checkpoint quantised by {method} needs: pip install {' '.join(missing)}")


def check_method(folder: Path, described: Mapping[str, Any]) -> None:
    """Raise LoadingError for a method that transformers does not know: it would pass over it, and take the weights as
    they lie for whole ones."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer

    from .checks import method_of

    method = method_of(described)
    if method is None:
        raise LoadingError(f"{folder}: 'quantization_config' in its config.json names no 'quant_method'; {_WHOLE}")
    if not AutoHfQuantizer.supports_quant_method(described):
        known = AUTO_QUANTIZATION_CONFIG_MAPPING
        raise LoadingError(
            f"{folder} is quantised by {method!r}, which transformers does not know{suggest(method, known)} "
            f"Known: {', '.join(sorted(known))}; {_WHOLE}"
        )


def plain_layouts(model: PreTrainedModel) -> None:
    """Turn off bitsandbytes' packed layout for AVX-512 in the 4-bit layers whose shape it cannot hold.

    It interleaves 32 output channels and wants whole blocks of 64 inputs, and fails in the first forward otherwise.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu") and (module.out_features % 32 or module.in_features % 64):
            module.support_avx512bf16_for_cpu = False


def _about_casts(record: logging.LogRecord) -> bool:
    """False for the message, once per layer and step, that bfloat16 activations become float16 before they are int8."""
    return "inputs will be cast from" not in str(record.msg)


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """A package that cannot be imported for now."""
    found = {module: sys.modules[module] for module in (name,) if module in sys.modules}
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(found)


@contextlib.contextmanager
def only_errors(name: str) -> Iterator[None]:
    """Without what a logger says below that level."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
