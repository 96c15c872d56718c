"""Stopping criteria of your own: a plain function, and a class with a parameter."""

from __future__ import annotations

from llama_infer import DEFAULT_STOPPING, Param, Pipeline, Stop
from llama_infer.parts import SequenceView

PROMPT = "为什么要减少污染，保护环境？"


def after_one_sentence(sequence: SequenceView) -> bool:
    """Asked after every token; true ends the answer."""
    return sequence.text.endswith(("。", ".", "！", "!", "？", "?"))


class Characters:
    """Ends an answer after ``max_characters``, and cuts the text there; 0 lets it go on."""

    params = {"max_characters": Param(default=0, check=lambda v: v >= 0, range="max_characters >= 0")}

    def __call__(self, sequence: SequenceView) -> Stop | None:
        limit = sequence.params["max_characters"]
        return Stop("length", text_end=limit) if limit and len(sequence.text) >= limit else None


plain = Pipeline("demo", params={"temperature": 0, "max_new_tokens": 64})
sentence = plain.replace(stopping=(*DEFAULT_STOPPING, after_one_sentence))
counted = plain.replace(stopping=(*DEFAULT_STOPPING, Characters()))

for name, answer in (
    ("as it is", plain(PROMPT)),
    ("one sentence", sentence(PROMPT)),
    ("six characters", counted(PROMPT, max_characters=6)),
):
    print(f"{name}: {answer.text!r} ({answer.finish_reason}, {len(answer.token_ids)} tokens)")
