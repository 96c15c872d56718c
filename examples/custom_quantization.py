"""A policy of your own for the weights: ten lines that round every linear layer but the head to eight levels a row."""

from __future__ import annotations

from typing import Any

import torch

from llama_infer import Pipeline, register
from llama_infer.models.linears import replace_linears


@register("quantization", "eight-levels")
class EightLevels:
    def convert(self, model: Any) -> Any:
        return replace_linears(model, self.rounded, keep=("lm_head",))

    def rounded(self, linear: torch.nn.Linear, model: Any) -> torch.nn.Module:
        step = linear.weight.abs().amax(1, keepdim=True) / 3.5
        rounded = ((linear.weight / step).floor().clamp(-4, 3) + 0.5) * step
        linear.weight = torch.nn.Parameter(rounded, requires_grad=False)
        return linear


PROMPTS = ["Copy: a b c d", "17+25=?", "Say hello"]
greedy = {"temperature": 0, "max_new_tokens": 16}
whole = Pipeline("demo", params=greedy)
rough = Pipeline("demo", quantization="eight-levels", params=greedy)
for prompt in PROMPTS:
    print(f"{prompt!r}: {whole(prompt).text!r}, in eight levels {rough(prompt).text!r}")
