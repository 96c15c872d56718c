"""A sampler of your own: epsilon-greedy, registered under a name, with a parameter that every request may set."""

from __future__ import annotations

import torch
from torch import Tensor

from llama_infer import Batch, Param, Pipeline, register


@register("sampler", "epsilon_greedy")
class EpsilonGreedy:
    """With probability ``epsilon`` a token drawn from softmax(logits), else the likeliest."""

    params = {"epsilon": Param(default=0.1, check=lambda v: 0 <= v <= 1, range="0 <= epsilon <= 1")}

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        ids = torch.arange(logits.shape[-1], device=logits.device)
        noise = -(-batch.uniform("epsilon.noise", ids).log()).log()  # Gumbel noise: argmax of the sum draws
        drawn, likeliest = (logits + noise).argmax(-1), logits.argmax(-1)
        return torch.where(batch.uniform("epsilon.coin") < batch["epsilon"], drawn, likeliest)


pipe = Pipeline("demo", sampler="epsilon_greedy", params={"max_new_tokens": 48})

# Each row has its own epsilon, in one batch. The noise belongs to the seed: run it again and nothing changes.
epsilons = [0.0, 0.2, 1.0]
answers = pipe(["你有什么建议？"] * len(epsilons), epsilon=epsilons, temperature=2.0, seed=3)
for epsilon, answer in zip(epsilons, answers, strict=True):
    print(f"epsilon={epsilon}: {answer.text!r}")
