"""Processors of your own: a plain function, and a class with a parameter that does nothing until a request sets it."""

from __future__ import annotations

import math

from torch import Tensor

from llama_infer import DEFAULT_PROCESSORS, Batch, Param, Pipeline

PROMPT = "Copy: a b c d"
STORY = "Tell me a story about a cat."

plain = Pipeline("demo", params={"temperature": 0, "max_new_tokens": 32})
first = plain(PROMPT).token_ids[0]


def never_first(logits: Tensor, batch: Batch) -> Tensor:
    """Bans one token: the one that the model would have begun with. ``logits`` is [rows, vocabulary]."""
    logits[:, first] = -math.inf
    return logits


class Contrast:
    """Multiplies the logits' distance from the maximum by ``contrast``: above 1 the likely get likelier.

    At its neutral value, 1, in every row of the batch, the processor is not even called.
    """

    params = {"contrast": Param(default=1.0, neutral=1.0, check=lambda v: v > 0, range="contrast > 0")}

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        top = logits.amax(-1, keepdim=True)
        return top + (logits - top) * batch["contrast"].to(logits.dtype)[:, None]


# The tuple is the order. Bans stand before the truncations, or a row might be left with nothing to choose from.
banned = plain.replace(processors=(never_first, *DEFAULT_PROCESSORS))
print(f"as it is:              {plain(PROMPT).text!r}")
print(f"without token {first}: {banned(PROMPT).text!r}")

contrasted = plain.replace(processors=(*DEFAULT_PROCESSORS, Contrast()))
contrasts = [0.5, 1.0, 4.0]  # one value a prompt
answers = contrasted([STORY] * len(contrasts), contrast=contrasts, temperature=1.0, seed=7)
for contrast, answer in zip(contrasts, answers, strict=True):
    print(f"contrast={contrast}: {answer.text!r}")
