"""Score the demo model with transformers.

python examples/score_demo_model.py llama_infer/demo --items tests/data/demo_evaluation.jsonl --sampled
"""

import argparse
from pathlib import Path

import torch
from demo_data.evaluation import read_items
from demo_data.scoring import score


def main() -> None:
    """Read the options and print one line for each task."""
    parser = argparse.ArgumentParser(description="Score the demo model with transformers.")
    parser.add_argument("folder", type=Path, help="folder of the model")
    parser.add_argument("--items", type=Path, required=True, help="evaluation items (JSON lines)")
    parser.add_argument("--sampled", action="store_true", help="sample (0.2, top-k 40, top-p 0.9, penalty 1.1)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=1, help="seed of the sampling")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--show", action="store_true", help="print the wrong answers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    items = read_items(options.items)
    dtype = getattr(torch, options.dtype)
    for task, entry in score(options.folder, items, dtype, options.sampled, options.show).items():
        share = 100 * entry.exact / entry.asked
        print(f"{task:9} {entry.exact}/{entry.asked} exact ({share:.1f} %), {entry.ended} ended their turn")


if __name__ == "__main__":
    main()
