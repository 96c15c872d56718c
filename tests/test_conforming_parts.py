"""Our own parts keep every promise that the conformance kit knows."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from llama_infer import registry
from llama_infer.testing import check_processor, check_sampler, check_stopping

torch.set_num_threads(1)

VALUES = {
    "logit_bias": {"logit_bias": [{0: 5.0}, {1: -3.0, 0: 1.0}, {1: -math.inf}]},
    "min_new_tokens": {"min_new_tokens": [3, 100]},
    "repetition_penalty": {"repetition_penalty": [0.5, 1.3]},
    "presence_penalty": {"presence_penalty": [-1.0, 0.7]},
    "frequency_penalty": {"frequency_penalty": [-0.4, 0.7]},
    "temperature": {"temperature": [0.0, 0.5, 2.0, 1e-6, 50.0]},
    "top_k": {"top_k": [1, 3, 5000]},
    "top_p": {"top_p": [0.0, 0.3, 0.9]},
    "min_p": {"min_p": [0.05, 0.5, 1.0]},
    "typical_p": {"typical_p": [0.2, 0.9]},
    "epsilon_cutoff": {"epsilon_cutoff": [3e-4, 0.1]},
    "eta_cutoff": {"eta_cutoff": [3e-4, 0.1]},
    "top_h": {"top_h": [0.3, 0.8]},
    "top_n_sigma": {"top_n_sigma": [0.5, 2.0]},
    "top_a": {"top_a": [0.1, 0.5]},
    "tfs": {"tfs": [0.3, 0.95]},
    "mirostat": {"mirostat": [1, 2], "mirostat_tau": [2.0, 5.0]},
    "xtc": {"xtc_probability": [0.5, 1.0], "xtc_threshold": [0.05, 0.2]},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": [1, 2, 3]},
    "dry": {"dry_multiplier": [0.8, 2.0], "dry_allowed_length": [1, 2]},
    "text": {"stop": [("END",), ("la", "xx", "🙃")], "include_stop_str_in_output": [True, False]},
    "length": {"max_new_tokens": [1, 7]},
    "regex": {"stop_regex": [("E.D", "🙂+ a"), (r"\d+ ", "[xy]{3}")], "include_stop_str_in_output": [True, False]},
    "max_time": {"max_time": [0.0, 1e9]},
    "loops": {"loop_repeats": [3, 5], "loop_min_tokens": [1, 10]},
}
"""Interesting values of the parameters of our parts, by the parts' names; the others are tried with their defaults."""


def values(name):
    """Those of the table that the part declares under these names."""
    return VALUES.get(name, {})


@pytest.mark.parametrize("name", registry.BUILTIN["processor"])
def test_every_processor_conforms(name):
    check_processor(name, **values(name))


@pytest.mark.parametrize("name", registry.BUILTIN["sampler"])
def test_every_sampler_conforms(name):
    check_sampler(name, **values(name))


@pytest.mark.parametrize("name", {**registry.BUILTIN["stopping"], "regex": 0, "max_time": 0, "loops": 0})
def test_every_criterion_conforms(name):
    from llama_infer import stopping

    new = {"regex": stopping.StopRegex, "max_time": stopping.MaxTime, "loops": stopping.Loops}
    check_stopping(name if name in registry.BUILTIN["stopping"] else new[name], **values(name))


def test_parts_are_imported_without_torch():
    kinds = ("processor", "sampler", "stopping")
    modules = sorted({place.partition(":")[0] for kind in kinds for place in registry.BUILTIN[kind].values()})
    code = f"import sys, llama_infer.testing, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
