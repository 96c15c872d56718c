"""The contracts of interchangeable parts: what a pipeline asks of a processor, a sampler, a strategy, a loader.

Every hook but the call itself is optional, so a plain function is a complete part. No torch at run time: parameters can
be listed without loading it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

from .errors import ParameterError
from .types import Prompt, Value

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .batch import Batch, Column, Output, Plan
    from .chain import Chain

Trait: TypeAlias = Literal["pure", "history_only", "keeps_argmax", "row_independent", "stateful", "greedy_at_zero"]
"""What a part promises, in its attribute ``traits`` (a frozenset); nothing is assumed of a part that promises nothing.

pure: never writes into the logits that it is given (others get a copy of the raw ones).
history_only: writes at tokens of ``batch.tokens`` only, and keeps no reference to the tensor: it may be given the raw
    logits, which are restored after the choice.
keeps_argmax: the likeliest token of a row stays the likeliest; skipped where every row is greedy.
row_independent: a row's result depends on nothing but that row.
stateful: keeps state columns.
greedy_at_zero: a sampler that takes the likeliest token where ``temperature`` is 0.
"""

Kind: TypeAlias = Literal[
    "processor", "sampler", "stopping", "strategy", "cache", "loader", "quantization", "formatter", "backend"
]


@dataclass(frozen=True, slots=True)
class Param:
    """A value that a request may bring, declared by the part that reads it.

    Args:
        default: used when neither the call, the pipeline nor the checkpoint says otherwise; its type is the parameter's
            type (an int is accepted where a float is declared). None means "unset": give ``kind`` then.
        neutral: the value at which the part does nothing. None: there is no such value.
        check: true for values in range.
        range: the range in words, for messages: ``"0 <= top_p <= 1"``.
        help: one line for the command line.
        kind: the type, when it cannot be read from ``default``.
    """

    default: Value
    neutral: Value | None = None
    check: Callable[[Value], bool] | None = field(default=None, compare=False)
    range: str = field(default="", compare=False)
    help: str = field(default="", compare=False)
    kind: type | None = None

    @property
    def type(self) -> type:
        """float, int, bool, str, tuple or dict."""
        if self.kind is not None:
            return self.kind
        return dict if isinstance(self.default, Mapping) else type(self.default)

    def accepts(self, value: Value) -> bool:
        """Whether :meth:`validate` would take the value."""
        try:
            self.validate("", value)
        except ParameterError:
            return False
        return True

    def validate(self, name: str, value: Value) -> Value:
        """The value in canonical form (lists become tuples, ints floats where floats are due), or ParameterError."""
        if value is None and self.default is None:
            return None
        value = _convert(name, value, self.type)
        if isinstance(value, float) and math.isnan(value):
            raise ParameterError(f"{name}=nan is not a number" + (f": {self.range}" if self.range else ""))
        try:
            fits = not isinstance(value, int) or -(1 << 63) <= value < 1 << 63  # columns are int64
            accepted = fits and (self.check is None or self.check(value))
        except ParameterError:
            raise  # the check says itself what is wrong
        except (TypeError, ValueError):  # a check that compares numbers, and was given something else inside
            accepted = False
        if not accepted:
            raise ParameterError(f"{name}={value!r} is out of range: {self.range or 'see the part that declares it'}")
        return value


def _convert(name: str, value: Value, kind: type) -> Value:
    """The value as the declared type. Strings are never parsed here: that is the command line's work."""
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # a number of numpy or torch
        value = value.item()
    if isinstance(value, bool) and kind is not bool:
        raise ParameterError(f"{name}={value!r} is a bool; {name} takes {kind.__name__}")
    if kind is float and isinstance(value, (int, float)):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is tuple:
        if isinstance(value, str):
            return (value,)
        if isinstance(value, Sequence) and not isinstance(value, bytes):
            return tuple(tuple(item) if isinstance(item, list) else item for item in value)
    if kind is dict and isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, kind):
        return value
    raise ParameterError(f"{name}={value!r} is a {type(value).__name__}; {name} takes {kind.__name__}")


@dataclass(frozen=True)
class Context:
    """What is known once a model is loaded, handed to :meth:`Part.bind`.

    Attributes:
        tokenizer: transformers' tokenizer, or None when only token ids are used.
        vocab_size: width of the logits.
        end_token_ids: every token that ends an answer.
        context_length: how many tokens the model's positions cover.
        device: where the logits are.
    """

    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    end_token_ids: tuple[int, ...] = ()
    context_length: int = 1 << 30
    device: torch.device | str = "cpu"


@runtime_checkable
class Part(Protocol):
    """Hooks that any part may have; none is required."""

    params: Mapping[str, Param]
    traits: frozenset[Trait]

    def bind(self, context: Context) -> Part:
        """The part for this model (called once, at load)."""

    def check(self, params: Mapping[str, Value]) -> None:
        """Raises ParameterError for effective values that do not go together, or not with this model. Asked when a
        request joins, unless all of the part's parameters are neutral."""

    def prepare(self, name: str, values: Sequence[Value]) -> Column:
        """The column of a ragged or mapping parameter: one value a row, on the CPU. Default: a tensor of numbers."""

    def state(self, batch: Batch) -> Mapping[str, Column]:
        """State columns of newly admitted rows, by names of the part's own."""

    def accept(self, logits: Tensor, tokens: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """New values of state columns after ``tokens`` [R] were chosen from the processed ``logits`` [R, V]. Pure."""


class LogitsProcessor(Protocol):
    """Changes scores before the choice. A plain function qualifies. It may write into the tensor that it is given.

    A truncation may have ``narrow(candidates, batch) -> Candidates`` too: the same on the likeliest tokens only (see
    :mod:`llama_infer.candidates`, whose numbers are arrays of numpy), and a sampler ``choose(candidates, batch)``, an
    int64 array [R]: the place of its choice among them.
    """

    def __call__(self, logits: Tensor, batch: Batch, /) -> Tensor:
        """float [R, V] -> float [R, V]."""


class Sampler(Protocol):
    """Chooses a token in each row."""

    def __call__(self, logits: Tensor, batch: Batch, /) -> Tensor:
        """float [R, V] -> int64 [R]."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Why and where a sequence ends.

    Attributes:
        reason: the completion's ``finish_reason``.
        text_end: characters of the text to keep; None keeps all of it.
    """

    reason: Literal["stop", "length"] = "stop"
    text_end: int | None = None


class SequenceView(Protocol):
    """What a stopping criterion sees of a sequence."""

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        """The prompt's tokens."""

    @property
    def token_ids(self) -> Sequence[int]:
        """The tokens chosen so far."""

    @property
    def text(self) -> str:
        """Their text, as far as its characters are complete."""

    @property
    def text_before(self) -> int:
        """Length of the text before the last token."""

    @property
    def params(self) -> Mapping[str, Value]:
        """Every parameter's effective value."""

    @property
    def branch(self) -> int:
        """Which of its request's samples this is."""


class StoppingCriterion(Protocol):
    """Asked on the host after every single token. A plain function of a sequence qualifies; True means stop."""

    def __call__(self, sequence: SequenceView, /) -> Stop | bool | None:
        """None or False to go on."""


class Strategy(Protocol):
    """Turns logits into the next :class:`~llama_infer.batch.Plan`. It never moves rows itself.

    On a GPU a step is launched before the host has read the one before it, where the strategy has
    ``forks(sequence) -> bool``, whether a sequence's row may become another row, or several, in the next step, and says
    that none does. Without that method every step is read first.
    """

    def width(self, params: Mapping[str, Value]) -> int:
        """How many rows a request may hold at once."""

    def step(self, output: Output, batch: Batch, chain: Chain) -> Plan:
        """One step for every row of logits. ``batch`` is the table; ``batch.at(output)`` aligns with the logits."""

    def rank(self, sequences: Sequence[SequenceView]) -> Sequence[SequenceView]:
        """A request's finished sequences, best first."""


class Formatter(Protocol):
    """Turns a prompt into token ids."""

    def __call__(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, /) -> list[int]:
        """Raises PromptError when the prompt cannot be encoded."""


@dataclass(frozen=True)
class Source:
    """What a loader is asked for; field by field the arguments of :class:`llama_infer.Pipeline`."""

    model: str
    tokenizer: str | None = None
    revision: str | None = None
    dtype: str | None = None
    device: str | None = None
    device_map: str | Mapping[str, Any] | None = None
    tp_plan: str | None = None
    attention: str | None = None
    quantization: Any = None
    adapter: str | None = None
    merge_adapter: bool = True
    local_files_only: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        model: transformers' causal language model, in eval mode.
        tokenizer: its tokenizer, or None.
        generation: the fields of the checkpoint's generation_config.json that are set.
        end_token_ids: every token that ends an answer.
        context_length: how many tokens the model's positions cover.
        device: where token ids go in and logits come out.
        attention: the kernel that was asked for: "sdpa", "eager" or "flash_attention_2".
        source: what it was loaded from; None for a model that the caller brought.
        notes: what a user should know, such as a dtype chosen for him.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    generation: Mapping[str, Value]
    end_token_ids: tuple[int, ...]
    context_length: int
    device: torch.device
    attention: str = "sdpa"
    source: Source | None = None
    notes: tuple[str, ...] = field(default=())


class Loader(Protocol):
    """Reads a checkpoint."""

    def __call__(self, source: Source, /) -> LoadedModel:
        """Raises LoadingError and its kin; never executes code of the checkpoint."""


class Quantization(Protocol):
    """A policy for the weights. Every hook is optional: two run before loading, the last one after."""

    def check(self, device: torch.device, dtype: torch.dtype | str) -> None:
        """Raises UnsupportedError for a device or a dtype that it cannot serve."""

    def options(self, source: Source) -> Mapping[str, Any]:
        """Keyword arguments for ``from_pretrained`` (a transformers quantization config, a dtype)."""

    def convert(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with its modules replaced."""
