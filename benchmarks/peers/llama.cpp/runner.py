"""llama.cpp through its C interface: up to ``rows`` sequences at once, a row that ends is replaced at once."""

from __future__ import annotations

import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import protocol

TOKENS = 2048
"""Most tokens of one call."""


class Engine:
    def load(self, model, dtype, threads, rows, context, format: str | None = None, **options: Any) -> dict:
        """``format`` "q8_0" or "q4_0" quantises; the file is made beside the checkpoint when it is not there."""
        import llama_cpp
        import numpy as np
        from write_gguf import write

        path = Path(model).with_name(f"{Path(model).name}.{format or dtype}.gguf")
        if not path.exists():
            write(Path(model), path, format or dtype)
        self._c, self._np, self._rows = llama_cpp, np, rows
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx, wanted.n_seq_max = -(-context // 256) * 256 * rows, rows
        wanted.n_batch, wanted.n_ubatch = TOKENS, 512
        wanted.n_threads = wanted.n_threads_batch = threads
        if dtype == "float32":
            wanted.type_k = wanted.type_v = 0  # GGML_TYPE_F32
            wanted.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama_cpp.llama_init_from_model(self._model, wanted)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context")
        self._memory = llama_cpp.llama_get_memory(self._context)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._batch = llama_cpp.llama_batch_init(TOKENS, 0, 1)
        return {}

    def generate(self, jobs, together=False):
        tokens, times = [[] for _ in jobs], [[] for _ in jobs]
        waiting, free = deque(range(len(jobs))), deque(range(self._rows))
        slot: dict[int, int] = {}
        fed = [0] * len(jobs)
        while waiting or slot:
            while waiting and free:
                slot[waiting.popleft()] = free.popleft()
            ready = self._forward(jobs, tokens, slot, fed)
            now = time.perf_counter()
            for at, best in ready:
                tokens[at].append(best)
                times[at].append(now)
                if len(tokens[at]) == jobs[at][1]:
                    self._c.llama_memory_seq_rm(self._memory, slot[at], -1, -1)
                    free.append(slot.pop(at))
        return tokens, times

    def _forward(self, jobs, tokens, slot, fed):
        """One call: a token of each row that decodes, and of the prompts what fits. Rows that have a next token."""
        batch, used, ready = self._batch, 0, []
        for at in sorted(slot, key=lambda at: not tokens[at]):
            known = [*jobs[at][0][fed[at] :]] if not tokens[at] else tokens[at][-1:]
            part = known[: TOKENS - used]
            for offset, token in enumerate(part):
                batch.token[used + offset] = token
                batch.pos[used + offset] = fed[at] + offset
                batch.n_seq_id[used + offset] = 1
                batch.seq_id[used + offset][0] = slot[at]
                batch.logits[used + offset] = 0
            used += len(part)
            fed[at] += len(part)
            if part and len(part) == len(known):
                batch.logits[used - 1] = 1
                ready.append((at, used - 1))
        batch.n_tokens = used
        if self._c.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        return [(at, self._best(index)) for at, index in ready]

    def _best(self, index: int) -> int:
        logits = self._c.llama_get_logits_ith(self._context, index)
        return int(self._np.ctypeslib.as_array(logits, (self._size,)).argmax())


if __name__ == "__main__":
    protocol.serve(Engine)
