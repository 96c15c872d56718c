"""This package, as it comes: ``Pipeline.run`` with nothing but a length to stop at."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import protocol


class Engine:
    def load(self, model, dtype, threads, rows, context, quantization=None, **options: Any) -> dict:
        import torch
        import transformers  # noqa: F401

        from llama_infer import Pipeline

        imports = protocol.memory()["now"]

        torch.set_num_threads(threads)
        self._times: dict[str, list[float]] = {}
        self._pipe = Pipeline(
            model,
            dtype=dtype,
            stopping=("length",),
            batch_size=rows,
            params={"temperature": 0},
            observers=(self._observe,),
            quantization=quantization,
        )
        return {"imports": imports}

    def _observe(self, event) -> None:
        if hasattr(event, "index"):  # a chunk
            self._times[event.id].extend([time.perf_counter()] * len(event.token_ids))

    def generate(self, jobs, together=False):
        from llama_infer import Request

        self._times = {str(at): [] for at in range(len(jobs))}
        requests = (Request(prompt, {"max_new_tokens": new}, str(at)) for at, (prompt, new) in enumerate(jobs))
        tokens = [list(completion.token_ids) for completion in self._pipe.run(requests)]
        return tokens, list(self._times.values())

    def forward(self, prompt) -> float:
        """Seconds of one bare call of the loaded model: a cache to fill, logits of the last token."""
        import torch
        from transformers import DynamicCache

        model = self._pipe.loaded.model
        ids = torch.tensor([prompt])
        with torch.no_grad():
            start = time.perf_counter()
            cache = DynamicCache(config=model.config)
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            logits[0, -1].argmax().item()
            return time.perf_counter() - start


if __name__ == "__main__":
    protocol.serve(Engine)
