"""A processor for anybody's pipeline: ``shout=2`` makes tokens with an exclamation mark likelier."""

from __future__ import annotations

import torch
from torch import Tensor

from llama_infer import Batch, Context, Param


class Shout:
    """Adds ``shout`` to the logits of every token that has an exclamation mark in it."""

    params = {"shout": Param(default=0.0, neutral=0.0, help="how much louder")}

    def __init__(self, loud: Tensor | None = None) -> None:
        self.loud = loud

    def bind(self, context: Context) -> Shout:
        """Called once, when the model is known."""
        texts = [context.tokenizer.decode([token]) for token in range(context.vocab_size)]
        return Shout(torch.tensor(["!" in text or "！" in text for text in texts], device=context.device))

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        return logits + batch["shout"].to(logits.dtype)[:, None] * self.loud
