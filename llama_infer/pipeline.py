"""The facade: parts are put together here, and only here are their defaults known."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, overload

from . import registry
from .calls import is_one_prompt, merge, per_prompt, serve
from .errors import ParameterError, PromptError, UnknownParameterError, UnsupportedError, release, suggest
from .parameters import Setting, declare, from_checkpoint, resolve, validate
from .parts import Context, LoadedModel, Param, Source
from .types import Chunk, Completion, Event, PromptLike, Request, Value, as_prompt

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig

    from .assembly import Shared
    from .chat import Chat
    from .engine.engine import Assembly

DEFAULT_PROCESSORS = (
    "logit_bias",
    "sequence_bias",
    "bad_words",
    "no_repeat_ngram_size",
    "suppress_tokens",
    "begin_suppress_tokens",
    "allowed_token_ids",
    "min_new_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "dry",
    "exponential_decay_length_penalty",
    "watermark",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "reasoning_budget",
    "quadratic_smoothing",
    "dynamic_temperature",
    "edt",
    "temperature",
    "top_h",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "top_n_sigma",
    "top_a",
    "tfs",
    "p_less",
    "p_less_norm",
    "mirostat",
    "xtc",
    "adaptive_p",
)
"""The order is the order in which they run."""
DEFAULT_STOPPING = ("end", "length", "text", "regex", "max_time", "loops")
_BATCH_SIZE = {"cpu": 32, "cuda": 128, "mps": 32}


class Explanation(dict[str, Setting]):
    """Every effective parameter and where it comes from; ``str`` makes a table of it."""

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        rows = [f"{name:<{width}}  {setting.value!r}  ({setting.origin})" for name, setting in self.items()]
        return "\n".join(rows)


@dataclass(frozen=True, repr=False, eq=False)
class Pipeline:
    """A loaded model and the parts that decode with it.

    Args:
        model: "demo", a folder or GGUF file, a hub id, a transformers model, a :class:`~llama_infer.parts.LoadedModel`.
        tokenizer: a folder or hub id, or a tokenizer, when it is not the model's.
        revision: of the hub repository.
        dtype: "bfloat16", "float16", "float32" or "auto"; by default what is fast on the device.
        device: "cuda", "mps" or "cpu"; by default the first of them that is there.
        device_map: as in transformers, in place of ``device``.
        tp_plan: "auto" splits the layers over the processes that torchrun started; all must ask for the same.
        attention: "sdpa" (default), "eager" or "flash_attention_2". On a CPU with a C++ compiler "sdpa" decodes with a
            kernel of ours, compiled at first use, unless the environment says ``LLAMA_INFER_NATIVE=0``.
        quantization: a policy, such as "bnb-int8"; by default "packed" where it exists; "none" leaves the layers alone.
        adapter: a LoRA adapter of peft, a folder or hub id.
        merge_adapter: whether it is added to the weights, or else kept beside them (for quantised weights).
        loader, formatter, sampler, strategy, cache, backend: one part each.
        processors, stopping: any number of parts, in this order.
        observers: called with every event (chunks and completions) of every run.
        params: defaults of this pipeline, a mapping or a transformers ``GenerationConfig``.
        batch_size: rows decoded at once; by default 32 on a CPU, 128 on a GPU. Fewer where memory is scarce, and then
            :attr:`notes` says so.
        prefix_cache: tokens of earlier prompts and answers whose keys and values are kept for prompts that begin
            alike, the least recently used out; 0: none. Make a new pipeline after changing the model's weights.
        compile: on a CUDA device, try decode steps through torch.compile too, and keep them where they are faster;
            takes minutes when a number of rows is first decoded.
        local_files_only: use what the hub's cache holds and ask nobody for more.
        trust_remote_code: whether a checkpoint may bring its own code.

    A part is a name (see ``llama-infer parts``), an object, or a plain function. Raises a
    :class:`~llama_infer.errors.LlamaInferError` when something does not fit; nothing is found out later that could be
    found out here.
    """

    model: Any = "demo"
    _: KW_ONLY
    tokenizer: Any = None
    revision: str | None = None
    dtype: Any = None
    device: Any = None
    device_map: Any = None
    tp_plan: str | None = None
    attention: str | None = None
    quantization: Any = None
    adapter: Any = None
    merge_adapter: bool = True
    loader: Any = "auto"
    formatter: Any = "auto"
    processors: Any = DEFAULT_PROCESSORS
    sampler: Any = "categorical"
    stopping: Any = DEFAULT_STOPPING
    strategy: Any = "sample"
    cache: Any = "slots"
    backend: Any = "local"
    observers: Sequence[Callable[[Event], None]] = ()
    params: Mapping[str, Value] | GenerationConfig = field(default_factory=dict)
    batch_size: int | None = None
    prefix_cache: int = 8192
    compile: bool = False
    local_files_only: bool = False
    trust_remote_code: bool = False
    notes: tuple[str, ...] = field(init=False, default=())
    _shared: Shared = field(init=False)
    _assembly: Assembly = field(init=False)
    _backend: Any = field(init=False)
    _layers: tuple[tuple[str, Mapping[str, Value]], ...] = field(init=False)

    def __post_init__(self) -> None:
        try:
            self._build()
        except BaseException as error:
            self.__dict__.pop("_shared", None)
            self.__dict__.pop("_assembly", None)
            release(error)
            raise

    def _build(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ParameterError(f"batch_size={self.batch_size!r} is out of range: batch_size >= 1")
        if not isinstance(self.prefix_cache, int) or self.prefix_cache < 0:
            raise ParameterError(f"prefix_cache={self.prefix_cache!r} is out of range: a number of tokens, 0 for none")
        _examine(self)
        parts = _resolve_parts(self)
        declared = declare([*parts.processors, parts.sampler, *parts.stopping, parts.strategy])
        own = validate(declared, self.params)
        from . import assembly

        shared = assembly.load(self)
        layers = (("pipeline", own), ("checkpoint", from_checkpoint(shared.loaded.generation, declared)))
        defaults = {name: setting.value for name, setting in resolve(declared, *layers).items()}
        size = self.batch_size or _BATCH_SIZE.get(shared.loaded.device.type, 32)
        built, plan = assembly.assemble(self, shared, parts, declared, defaults, size)
        object.__setattr__(self, "_shared", shared)
        object.__setattr__(self, "_layers", layers)
        object.__setattr__(self, "_assembly", built)
        costs = [part.note for part in parts.processors if hasattr(part, "note")]
        object.__setattr__(self, "notes", (*shared.loaded.notes, *([plan.note] if plan.note else []), *costs))
        backend = built_backend(self)  # once: to look for entry points takes milliseconds
        object.__setattr__(self, "_backend", backend)
        reasons = backend.unsupported(built)
        if reasons:
            raise UnsupportedError(f"{self.model}: " + "; ".join(reasons))

    @property
    def loaded(self) -> LoadedModel:
        """The transformers model, its tokenizer and what is known of them."""
        return self._shared.loaded

    @property
    def declared(self) -> Mapping[str, Param]:
        """Every parameter that this pipeline knows."""
        return self._assembly.declared

    @overload
    def __call__(self, prompts: str, generation_config: Any = None, **params: Value) -> Completion: ...

    @overload
    def __call__(self, prompts: list[str], generation_config: Any = None, **params: Value) -> list[Completion]: ...

    @overload
    def __call__(self, prompts: Any, generation_config: Any = None, **params: Value) -> Any: ...

    def __call__(self, prompts: Any, generation_config: Any = None, **params: Value) -> Any:
        """Answers one prompt with a :class:`Completion`, a list of prompts with a list of them, in order.

        A prompt is a string, a list of message dicts, or a list of token ids; any other list is a list of prompts. A
        scalar parameter may be a list then, one value a prompt (a sequence-valued one a list of lists).

        Raises ParameterError or PromptError for a bad request before anything is decoded. A request that fails while
        it is decoded comes back with ``finish_reason="error"``.
        """
        single = is_one_prompt(prompts)
        listed = list(prompts) if isinstance(prompts, Iterable) and not single else [prompts]
        if not listed:
            raise PromptError("the list of prompts is empty")
        requests = self._requests(listed, single, generation_config, params)
        engine = self._backend.open(self._assembly)
        try:
            order = {engine.add(request): at for at, request in enumerate(requests)}
            answers: list[Completion | None] = [None] * len(requests)
            while engine.busy:
                for event in engine.step():
                    if isinstance(event, Completion):
                        answers[order[event.request.id]] = event
        finally:
            engine.close()
        done = [answer for answer in answers if answer is not None]
        return done[0] if single else done

    def stream(self, prompt: PromptLike, generation_config: Any = None, **params: Value) -> Iterator[Chunk]:
        """The answer to one prompt, piece by piece. Closing the iterator cancels the request.

        Raises at once for a bad request, and in the middle when decoding fails.
        """
        if not is_one_prompt(prompt):
            raise PromptError("stream takes one prompt; use run for many")
        (request,) = self._requests([prompt], True, generation_config, params)
        engine = self._backend.open(self._assembly)
        engine.add(request)
        return self._chunks(engine)

    def run(self, requests: Iterable[Request], ordered: bool = True) -> Iterator[Completion]:
        """Any number of requests in bounded memory; completions in the order given, or as they are ready.

        A request that cannot be served is yielded with ``finish_reason="error"`` and its error. With ``ordered``, no
        more than four batches are held back while an early request is still being decoded.
        """
        engine = self._backend.open(self._assembly)
        try:
            yield from serve(engine, iter(requests), self._assembly.batch_size, ordered)
        finally:
            engine.close()

    def chat(self, system: str | None = None) -> Chat:
        """A conversation with memory. ``system=None`` is the default system prompt, an empty string none."""
        from .chat import Chat

        return Chat(self, system)

    def explain(self, generation_config: Any = None, **params: Value) -> Explanation:
        """Every effective parameter and where it comes from: the call, the pipeline, the checkpoint, or a default."""
        given = validate(self.declared, merge(generation_config, params, self.declared))
        return Explanation(resolve(self.declared, ("call", given), *self._layers))

    def replace(self, **parts: Any) -> Pipeline:
        """A pipeline with some parts replaced, which shares the loaded model unless what loads it is replaced."""
        known = [f.name for f in dataclasses.fields(self) if f.init]
        for name in parts:
            if name not in known:
                raise UnknownParameterError(
                    f"Pipeline has no part {name!r}{suggest(name, known)} Known: {', '.join(known)}"
                )
        return dataclasses.replace(self, **parts)

    def __repr__(self) -> str:
        from .chain import part_name

        chain = " -> ".join(part_name(part) for part in self._assembly.chain.parts)
        stops = ", ".join(part_name(part) for part in self._assembly.stopping)
        name = self.model if isinstance(self.model, (str, os.PathLike)) else type(self.model).__name__
        return (
            f"Pipeline({str(name)!r}, {self.loaded.model.dtype} on {self.loaded.device}, chain: {chain}, "
            f"stopping: {stops}, strategy: {part_name(self._assembly.strategy)}, "
            f"batch_size={self._assembly.batch_size})" + "".join(f"\n  note: {note}" for note in self.notes)
        )

    def _requests(
        self, prompts: Sequence[Any], single: bool, generation_config: Any, params: Mapping[str, Value]
    ) -> list[Request]:
        rows = per_prompt(merge(generation_config, params, self.declared), self.declared, len(prompts), single)
        return [Request(as_prompt(prompt), row) for prompt, row in zip(prompts, rows, strict=True)]

    def _chunks(self, engine: Any) -> Iterator[Chunk]:
        started = False
        try:
            while engine.busy:
                for event in engine.step():
                    if isinstance(event, Chunk):
                        started = True
                        yield event
                    elif event.error is not None:
                        raise event.error
                    elif not started:  # nothing to decode
                        yield Chunk(event.request.id, 0, event.text, event.token_ids, event.finish_reason)
        finally:
            engine.close()


@dataclass(frozen=True)
class _Parts:
    processors: tuple[Any, ...]
    sampler: Any
    stopping: tuple[Any, ...]
    strategy: Any


def declared_params(
    processors: Any = DEFAULT_PROCESSORS,
    sampler: Any = "categorical",
    stopping: Any = DEFAULT_STOPPING,
    strategy: Any = "sample",
) -> dict[str, Param]:
    """Every parameter that a pipeline of these parts would know. Loads neither torch nor a model."""
    parts = _parts(processors, sampler, stopping, strategy)
    return declare([*parts.processors, parts.sampler, *parts.stopping, parts.strategy])


def transform_logits(
    logits: Tensor,
    *,
    tokens: Sequence[Sequence[int]] | None = None,
    prompt_lengths: Sequence[int] | None = None,
    processors: Any = DEFAULT_PROCESSORS,
    end_token_ids: Sequence[int] = (),
    **params: Value,
) -> Tensor:
    """The chain's output [R, V] for given logits [R, V], outside of any run.

    Args:
        logits: float [R, V]; left as they are.
        tokens: each row's history, for penalties; ragged. Default: none.
        prompt_lengths: how much of each history is prompt. Default: 0.
        processors: the chain; by default that of a pipeline.
        end_token_ids: what ``min_new_tokens`` bans.
        params: values, or lists of one value a row.
    """
    from .chain import Chain
    from .columns import make_batch

    if logits.ndim != 2:
        raise ParameterError(f"logits have the shape [rows, vocabulary]; given: {list(logits.shape)}")
    count = logits.shape[0]
    history = [[] for _ in range(count)] if tokens is None else [list(row) for row in tokens]
    lengths = [0] * count if prompt_lengths is None else list(prompt_lengths)
    if len(history) != count or len(lengths) != count:
        raise ParameterError(
            f"{count} rows of logits need as many histories and prompt lengths; given: {len(history)}, {len(lengths)}"
        )
    parts = _parts(processors, "greedy", (), "sample")
    context = Context(None, logits.shape[1], tuple(end_token_ids), device=logits.device)
    chain = Chain(parts.processors, parts.sampler).bind(context)
    # The sampler's temperature is the same parameter; it is declared even when no processor of the chain reads it.
    declared = declare([*parts.processors, registry.resolve("sampler", "categorical")])
    defaults = {name: setting.value for name, setting in resolve(declared).items()}
    rows = [{**defaults, **validate(declared, row)} for row in per_prompt(params, declared, count, False)]
    batch = make_batch(chain, declared, rows, history, prompt_lengths=lengths, device=logits.device)
    return chain.scores(logits, batch)


def built_backend(pipeline: Pipeline) -> Any:
    """The pipeline's backend as an object."""
    return registry.resolve("backend", pipeline.backend)


def _examine(pipeline: Pipeline) -> None:
    """A folder that will not be loaded is refused before torch is, which takes a second."""
    if pipeline.loader == "auto" and isinstance(pipeline.model, (str, os.PathLike)) and os.path.isdir(pipeline.model):
        from .models.loaders import examine

        given = {name: getattr(pipeline, name) for name in ("revision", "quantization", "trust_remote_code")}
        examine(Source(os.fspath(pipeline.model), **given))


def _resolve_parts(pipeline: Pipeline) -> _Parts:
    return _parts(pipeline.processors, pipeline.sampler, pipeline.stopping, pipeline.strategy)


def _parts(processors: Any, sampler: Any, stopping: Any, strategy: Any) -> _Parts:
    from .foreign import adapt_criterion, adapt_processor

    return _Parts(
        tuple(adapt_processor(registry.resolve("processor", part)) for part in _as_tuple(processors)),
        registry.resolve("sampler", sampler),
        tuple(adapt_criterion(registry.resolve("stopping", part)) for part in _as_tuple(stopping)),
        registry.resolve("strategy", strategy),
    )


def _as_tuple(slot: Any) -> tuple[Any, ...]:
    if slot is None:
        return ()
    return tuple(slot) if isinstance(slot, (list, tuple)) else (slot,)
