"""One model over several processes: transformers splits the layers, every process runs the same requests.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py

On GPUs each process takes one, on the CPU they share it. Seeds that are not given are rank 0's, so all processes come
to the same answers, and one of them prints.
"""

import os

from llama_infer import Pipeline

ranks = int(os.environ.get("WORLD_SIZE", "1"))
pipe = Pipeline("demo", dtype="float32", tp_plan="auto" if ranks > 1 else None)
answers = pipe(["17+25=?", "Say hello", "What is a llama?"], max_new_tokens=24)
if os.environ.get("RANK", "0") == "0":
    print(f"{ranks} processes")
    for answer in answers:
        print(answer.seed, answer.text)
