"""How weights get into a model: transformers reads them, then a policy has its way with the layers."""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import LlamaInferError, LoadingError, ParameterError, UnsupportedError, suggest
from ..parts import Source
from ..registry import resolve
from .adapters import Adapter, apply_adapter
from .checks import COMPRESSED, Checkpoint
from .gguf import gguf_options, is_gguf, quiet_bar
from .gptq import METHODS, reader, zero_biases
from .parallel import split
from .quantization import only_errors, plain_layouts, prepare_bitsandbytes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_model(
    source: Source,
    checkpoint: Checkpoint,
    policy: Any,
    dtype: torch.dtype | str,
    attention: str | None,
    device: torch.device,
    adapter: Adapter | None = None,
) -> PreTrainedModel:
    """The model of a checkpoint that passed its checks, in eval mode, with its adapter, after its policy."""
    if checkpoint.quantization == "llama_infer":
        from .saved import load_saved  # which imports torch; what is refused needs none

        _refuse_for_saved(source, adapter)
        return load_saved(checkpoint, dtype, attention, device)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    if source.tp_plan is not None:
        options["distributed_config"] = split(source)
    elif source.device_map is not None:
        options["device_map"] = source.device_map
    elif device.type != "cpu" or hasattr(policy, "options") or checkpoint.quantization:
        # Straight onto the device. On the CPU that is the default, except for quantisers, which take a GPU they see.
        options["device_map"] = {"": str(device)}
    if hasattr(policy, "options"):
        options.update(policy.options(source))
    if adapter is not None and source.merge_adapter and "quantization_config" in options:
        raise UnsupportedError(
            f"quantization={source.quantization!r} quantises as it loads, too early for an adapter to be merged: "
            "merge_adapter=False keeps it beside the weights, `llama-infer convert --adapter` merges it beforehand"
        )
    if checkpoint.quantization == "bitsandbytes":
        prepare_bitsandbytes()
    if is_gguf(checkpoint.folder):
        if "quantization_config" in options:
            raise UnsupportedError(
                f"quantization={source.quantization!r} does not read GGUF: llama-infer convert makes safetensors of it"
            )
        options.update(gguf_options(checkpoint.folder))
    model = _from_pretrained(checkpoint, options, bool(source.trust_remote_code))
    _check_places(model, source.device_map)
    if checkpoint.quantization == "bitsandbytes":
        plain_layouts(model)
    if adapter is not None:
        model = apply_adapter(model, adapter, source.merge_adapter)
    if hasattr(policy, "convert"):
        model = policy.convert(model)
    return model


def _check_places(model: PreTrainedModel, places: Any) -> None:
    """transformers passes over names in a device map that no module has."""
    names = [name for name, _ in model.named_modules()] if isinstance(places, Mapping) else []
    for place in names and places:
        if place not in names:
            raise ParameterError(f"device_map: the model has no module {place!r}{suggest(place, names)}")


def _refuse_for_saved(source: Source, adapter: Adapter | None) -> None:
    if adapter is not None:
        raise UnsupportedError(
            f"{source.model} is quantised, and an adapter wants whole weights: quantise both together"
        )
    if source.device_map is not None or source.tp_plan is not None:
        given = "device_map" if source.tp_plan is None else "tp_plan"
        raise UnsupportedError(f"{source.model} is quantised for the CPU: leave {given} out")


def pick_policy(source: Source, checkpoint: Checkpoint, dtype: torch.dtype | str, device: torch.device) -> Any:
    """The policy that was asked for; by default packed layers, where the processor has them.

    Raises UnsupportedError, MissingDependencyError or ParameterError for one that cannot be had here.
    """
    if source.quantization is None:
        from .packed import Packed, refusal

        ordinary = checkpoint.unpacked or not checkpoint.quantization
        whole = ordinary and source.device_map is None and source.tp_plan is None
        return Packed() if whole and refusal(device, dtype) is None else None
    policy = resolve("quantization", source.quantization)
    if hasattr(policy, "check"):
        policy.check(device, dtype)
    return policy


def _from_pretrained(checkpoint: Checkpoint, options: dict[str, Any], trust: bool) -> PreTrainedModel:
    config, folder = None, checkpoint.folder
    place, bar = (folder.parent, quiet_bar()) if is_gguf(folder) else (folder, contextlib.nullcontext())
    known = {name: options[name] for name in options if name == "gguf_file"}
    try:
        with quiet(), bar:
            from transformers import AutoConfig, AutoModelForCausalLM

            load: Any = AutoModelForCausalLM.from_pretrained
            # The config apart, because a kernel that config.json names would else win over the one asked for.
            config = AutoConfig.from_pretrained(place, trust_remote_code=trust, local_files_only=True, **known)
            _unpacked(config)
            model, report = load(
                place,
                config=config,
                use_safetensors=True,
                trust_remote_code=trust,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, in one line
                **options,
            )
    except LlamaInferError:
        raise
    except Exception as error:
        raise LoadingError(f"{folder} cannot be loaded: {_unknown_rope(error, config) or first_line(error)}") from error
    if checkpoint.quantization in METHODS:
        report["unexpected_keys"] = set(report["unexpected_keys"]) - zero_biases(checkpoint.weights)
    problems = [
        f"{len(report[kind])} {words} ({', '.join(sorted(_key(key) for key in report[kind])[:3])})"
        for kind, words in (
            ("missing_keys", "tensors are missing"),
            ("unexpected_keys", "tensors belong to no part of the model"),
            ("mismatched_keys", "tensors have another shape than config.json says"),
        )
        if report[kind]
    ]
    if problems:
        del model  # the traceback must not keep it alive
        raise LoadingError(f"the weights in {folder} do not fit its config.json: {'; '.join(problems)}")
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _unpacked(config: Any) -> None:
    """Has transformers unpack quantised weights while it reads them; left to itself it would do so in the first
    forward, or ask for further packages."""
    described = getattr(config, "quantization_config", None)
    if not isinstance(described, dict):
        return
    method = described.get("quant_method")
    if method == COMPRESSED:
        described["dequantize"] = True
    elif method in METHODS:
        config.quantization_config = {"quant_method": reader(), "described": described}


def _unknown_rope(error: Exception, config: Any) -> str | None:
    """transformers looks the rope type up and says no more than that it is not there."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from .attention import rope_types

    unknown = rope_types(config) - {"default", *ROPE_INIT_FUNCTIONS} if config is not None else set()
    if not isinstance(error, KeyError) or unknown.isdisjoint(error.args):
        return None
    known = ", ".join(sorted({"default", *ROPE_INIT_FUNCTIONS}))
    return f"its config.json asks for the rope type {error.args[0]!r}; known: {known}"


def _key(found: Any) -> str:
    return found if isinstance(found, str) else f"{found[0]}: {tuple(found[1])} for {tuple(found[2])}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without its advice; a progress bar only on a terminal. What matters comes as an error of ours."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(max(verbosity, logging.ERROR))
    if bars and not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        # transformers imports torchao wherever it is installed
        with only_errors("accelerate.big_modeling"), only_errors("torchao"), only_errors("torch.utils._pytree"):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's collector of cycles: importing transformers' modules makes a million objects that stay, and
    looking through them again and again takes a sixth of the time (measured). In the end they count as old ones, which
    are looked through rarely."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            if not gc.get_freeze_count():  # else those that somebody froze would thaw
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def first_line(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
