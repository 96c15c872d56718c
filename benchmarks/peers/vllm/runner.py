"""vLLM on the CPU, all in one process, so that no core waits for another process."""

from __future__ import annotations

import glob
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import protocol

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "KMP_BLOCKTIME": "5",
    "KMP_TPAUSE": "0",
}


class Engine:
    def load(self, model, dtype, threads, rows, context, prefix_cache: bool = False, **options: Any) -> dict:
        import torch
        from vllm import LLM

        torch.set_num_threads(threads)
        self._llm = LLM(
            model,
            dtype=dtype,
            skip_tokenizer_init=True,
            max_model_len=context,
            max_num_seqs=rows,
            max_num_batched_tokens=max(4096, context),
            kv_cache_memory_bytes=options.get("kv_bytes", 2 << 30),
            enable_prefix_caching=prefix_cache,
            distributed_executor_backend="uni",
            disable_log_stats=True,
        )
        self._number = 0
        return {}

    def generate(self, jobs, together=False):
        from vllm import SamplingParams

        engine = self._llm.llm_engine
        rows: dict[str, int] = {}
        for at, (prompt, new) in enumerate(jobs):
            params = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
            self._number += 1
            rows[str(self._number)] = at
            engine.add_request(str(self._number), {"prompt_token_ids": prompt}, params)
        tokens, times = [[] for _ in jobs], [[] for _ in jobs]
        while engine.has_unfinished_requests():
            for output in engine.step():
                at = rows[output.request_id]
                known = list(output.outputs[0].token_ids)
                times[at] += [time.perf_counter()] * (len(known) - len(tokens[at]))
                tokens[at] = known
        return tokens, times


def _restart_with_openmp() -> None:
    """Intel's OpenMP has to be there before Python is."""
    found = glob.glob(str(Path(sys.prefix) / "lib" / "libiomp5.so"))
    wanted = {**ENVIRONMENT, **({"LD_PRELOAD": found[0]} if found else {})}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


if __name__ == "__main__":
    _restart_with_openmp()
    protocol.serve(Engine)
