"""Two processes on one model say what one process says, and agree on what they draw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from oracles import greedy, random_prompts

from llama_infer import Pipeline
from llama_infer.errors import UnsupportedError
from llama_infer.testing import tiny_llama

TESTS = Path(__file__).parent


def test_two_processes_say_what_one_says(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(TESTS / "parallel_ranks.py"), str(folder), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for name in set(first) - {"rank", "example"}:
        assert first[name] == second[name], name
    assert first["rows"] == 16, "half of the 32 rows of q_proj"
    prompts = random_prompts(6, seed=9)
    assert first["greedy"] == [list(greedy(tiny_llama(), prompt, 8, eos_token_id=[257, 260])) for prompt in prompts]
    pipe = Pipeline(str(folder), dtype="float32", formatter="plain")
    assert 0 < first["batch_size"] < pipe._assembly.batch_size
    seeded = pipe(prompts, seed=4, n=2, max_new_tokens=8)
    expected = [[list(answer.token_ids), list(answer.alternatives[0].token_ids)] for answer in seeded]
    assert first["seeded"] == expected
    assert len({seed for seed, _ in first["dealt"]}) == 6
    for prompt, (seed, tokens) in zip(prompts, first["dealt"], strict=True):
        assert list(pipe(prompt, seed=seed, max_new_tokens=8).token_ids) == tokens, "the seed replays"
    assert "max_time=3.0" in first["refused"][0] and "clocks differ" in first["refused"][0]
    assert "leave device" in first["refused"][1]
    assert first["example"].startswith("2 processes\n") and second["example"] == ""


def test_one_process_alone_is_told_so(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    folder = str(write_checkpoint(tmp_path))
    with pytest.raises(UnsupportedError, match="torchrun"):
        Pipeline(folder, tp_plan="auto")
    with pytest.raises(UnsupportedError, match="tp_plan 'atuo'"):
        Pipeline(folder, tp_plan="atuo")
    with pytest.raises(UnsupportedError, match="leave quantization"):
        Pipeline(folder, tp_plan="auto", quantization="bnb-int8")
