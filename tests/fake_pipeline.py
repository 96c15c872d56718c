"""A pipeline without a model, for tests of what is built on pipelines. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

from llama_infer.errors import GenerationError
from llama_infer.parameters import Setting, resolve, validate
from llama_infer.pipeline import declared_params
from llama_infer.types import Chunk, Completion, Message, Request


class FakePipeline:
    """Answers "echo PROMPT" in one token a character. "FAIL" fails; "CTRL-C" interrupts."""

    made: list[FakePipeline] = []

    def __init__(self, model: Any = "demo", **options: Any) -> None:
        self.options = options
        self.closed = 0
        self.seen: list[dict[str, Any]] = []
        source = SimpleNamespace(model=model, tokenizer=None, revision=None, quantization=options.get("quantization"))
        self.loaded = SimpleNamespace(model=SimpleNamespace(dtype="torch.float32"), device="cpu", source=source)
        self.notes = ("a note",)
        FakePipeline.made.append(self)

    def explain(self, **params: Any) -> dict[str, Setting]:
        declared = declared_params()
        return resolve(declared, ("call", validate(declared, params)))

    def run(self, requests: Iterable[Request], ordered: bool = True) -> Iterator[Completion]:
        assert ordered
        try:
            for request in requests:
                self.seen.append(dict(request.params))
                yield self._answer(request)
        finally:
            self.closed += 1

    def _answer(self, request: Request) -> Completion:
        prompt = str(request.prompt)
        if prompt == "CTRL-C":
            raise KeyboardInterrupt
        if prompt.startswith("FAIL"):
            return Completion(request, finish_reason="error", error=GenerationError("it\nbroke"), seed=1)
        text = f"echo {prompt}"
        samples = [
            Completion(request, text=text, token_ids=tuple(range(len(text))), seed=request.params.get("seed", 7))
            for _ in range(request.params.get("n", 1))
        ]
        return Completion(request, text, (), samples[0].token_ids, seed=samples[0].seed, alternatives=(*samples[1:],))

    def stream(self, prompt: str, **params: Any) -> Iterator[Chunk]:
        self.seen.append(params)
        if prompt.startswith("FAIL"):
            raise GenerationError("it\nbroke")
        text = f"echo {prompt}"
        for number, character in enumerate(text):
            if prompt == "CTRL-C" and number == 4:
                raise KeyboardInterrupt
            yield Chunk("1", 0, character, (number,), "length" if number == len(text) - 1 else None)

    def chat(self, system: str | None = None) -> FakeChat:
        return FakeChat(self, "the default" if system is None else system)


class FakeChat:
    def __init__(self, pipe: FakePipeline, system: str) -> None:
        self.pipe = pipe
        self.system = system
        self.reset()

    def stream(self, text: str, **params: Any) -> Iterator[Chunk]:
        said = ""
        try:
            for chunk in self.pipe.stream(text, **params):
                said += chunk.text
                yield chunk
        finally:
            if said:
                self.messages = (*self.messages, Message("user", text), Message("assistant", said))

    def reset(self) -> None:
        self.messages: tuple[Message, ...] = (Message("system", self.system),) if self.system else ()
