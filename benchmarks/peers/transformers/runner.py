"""transformers' ``generate``: one prompt at a time, or left-padded batches of prompts sorted by length."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import protocol


class Engine:
    def load(self, model, dtype, threads, rows, context, batch: int = 1, **options: Any) -> dict:
        import torch
        from transformers import AutoModelForCausalLM

        imports = protocol.memory()["now"]
        torch.set_num_threads(threads)
        self._batch = batch
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        return {"imports": imports}

    def generate(self, jobs, together=False):
        """How long an answer will be is nobody's to know in advance, so jobs are not sorted by it."""
        order = sorted(range(len(jobs)), key=lambda at: len(jobs[at][0])) if self._batch > 1 else range(len(jobs))
        size = len(jobs) if together else self._batch
        tokens, times = [[] for _ in jobs], [[] for _ in jobs]
        for start in range(0, len(jobs), size):
            group = order[start : start + size]
            answers, when = self._call([jobs[at] for at in group])
            for at, answer in zip(group, answers, strict=True):
                tokens[at], times[at] = answer, when[: len(answer)]
        return tokens, times

    def _call(self, jobs):
        """One call of ``generate``, as far as the longest answer goes; each job's share of it."""
        import torch
        from transformers import StoppingCriteria

        when: list[float] = []

        class Clock(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                when.append(time.perf_counter())
                return torch.zeros(input_ids.shape[0], dtype=torch.bool)

        width = max(len(prompt) for prompt, _ in jobs)
        ids = torch.zeros(len(jobs), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, (prompt, _) in enumerate(jobs):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        found = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(new for _, new in jobs),
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[Clock()],
        )
        return [row[width : width + new].tolist() for row, (_, new) in zip(found, jobs, strict=True)], when

    def agreement(self, jobs, answers) -> float:
        """Share of the answers' tokens that the model, fed prompt and answer, finds the likeliest at their places."""
        import torch

        same = total = 0
        for (prompt, _), answer in zip(jobs, answers, strict=True):
            ids = torch.tensor([[*prompt, *answer[:-1]]])
            with torch.no_grad():
                best = self._model(input_ids=ids, logits_to_keep=len(answer)).logits[0].argmax(-1).tolist()
            same += sum(a == b for a, b in zip(best, answer, strict=True))
            total += len(answer)
        return same / total


if __name__ == "__main__":
    protocol.serve(Engine)
