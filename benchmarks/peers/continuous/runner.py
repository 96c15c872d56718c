"""transformers' continuous batching: ``init_continuous_batching``, as ``generate_batch`` uses it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import protocol

PAGE = 256


class Engine:
    def load(self, model, dtype, threads, rows, context, **options: Any) -> dict:
        import torch
        from transformers import AutoModelForCausalLM

        imports = protocol.memory()["now"]
        torch.set_num_threads(threads)
        self._rows = rows
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        return {"imports": imports}

    def generate(self, jobs, together=False):
        from transformers import ContinuousBatchingConfig, GenerationConfig

        pages = sum(-(-(len(prompt) + new) // PAGE) for prompt, new in jobs)
        config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=pages + 1,
            max_batch_tokens=max(512, max(len(prompt) for prompt, _ in jobs)),
            max_requests_per_batch=self._rows,
            allow_block_sharing=False,
        )
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1)
        found: dict[str, Any] = {}
        with self._model.continuous_batching_context_manager(
            generation_config=greedy, continuous_batching_config=config, block=True, timeout=5, warmup=False
        ) as manager:
            ids = [manager.add_request(p, max_new_tokens=new, record_timestamps=True) for p, new in jobs]
            while len(found) < len(jobs):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    if result.error is not None:
                        raise RuntimeError(result.error)
                    found[result.request_id] = result
                elif result is None and not manager.is_running():
                    raise RuntimeError("the generation thread ended")
        return [found[id].generated_tokens for id in ids], [found[id].timestamps for id in ids]


if __name__ == "__main__":
    protocol.serve(Engine)
