"""What each of the processes of test_parallel.py does; it prints what it saw, a line of JSON a process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from oracles import random_prompts
from torch import distributed

from llama_infer import Pipeline
from llama_infer.errors import ParameterError, UnsupportedError
from llama_infer.models import memory


def refused(kind: type[Exception], call: Any) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    return "nothing was refused"


def main(folder: str) -> dict[str, Any]:
    prompts = random_prompts(6, seed=9)
    rank = int(os.environ["RANK"])
    free = memory.free_memory
    memory.free_memory = lambda device: (1 + rank) * 400_000  # rank 0 has room for fewer rows
    options: dict[str, Any] = {"dtype": "float32", "formatter": "plain", "tp_plan": "auto"}
    pipe = Pipeline(folder, **options)
    memory.free_memory = free
    heads = pipe.loaded.model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0]
    greedy = pipe(prompts, temperature=0, max_new_tokens=8)
    seeded = pipe(prompts, seed=4, n=2, max_new_tokens=8)
    dealt = pipe(prompts, max_new_tokens=8)
    clock = refused(ParameterError, lambda: pipe("x", max_time=3))
    both = refused(UnsupportedError, lambda: Pipeline(folder, device="cpu", **options))
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        runpy.run_path(str(Path(__file__).parent.parent / "examples" / "tensor_parallel.py"), run_name="__main__")
    return {
        "rank": rank,
        "rows": heads,
        "batch_size": pipe._assembly.batch_size,
        "greedy": [answer.token_ids for answer in greedy],
        "seeded": [[answer.token_ids, answer.alternatives[0].token_ids] for answer in seeded],
        "dealt": [[answer.seed, answer.token_ids] for answer in dealt],
        "refused": [clock, both],
        "example": shown.getvalue(),
    }


if __name__ == "__main__":
    found = main(sys.argv[1])
    Path(sys.argv[2], f"{found['rank']}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()
