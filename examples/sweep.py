"""A sweep over seeds and temperatures: any number of requests, one batch after another, results as a table."""

from __future__ import annotations

from collections import defaultdict

from llama_infer import Pipeline, Request

PROMPT = "Tell me a story about a cat."
TEMPERATURES = (0.0, 0.7, 1.5)
SEEDS = range(4)

pipe = Pipeline("demo", params={"max_new_tokens": 32})

# ``run`` takes an iterator, endless if need be, and yields completions in order. Each request has its own parameters.
grid = [(temperature, seed) for temperature in TEMPERATURES for seed in SEEDS]
requests = (Request(PROMPT, {"temperature": temperature, "seed": seed}) for temperature, seed in grid)
answers = defaultdict(list)
for (temperature, _), completion in zip(grid, pipe.run(requests), strict=True):
    answers[temperature].append(completion)

for temperature, completions in answers.items():
    tokens = sum(len(c.token_ids) for c in completions)
    logprob = sum(sum(c.logprobs) for c in completions) / tokens
    different = len({c.text for c in completions})
    print(f"temperature {temperature}: {different} different answers, {logprob:.2f} nats a token")
    print(f"  for example: {completions[-1].text!r}")
