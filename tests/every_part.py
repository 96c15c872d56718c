"""Values that set every processor, and rows that carry them: for tests of all parts at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llama_infer import DEFAULT_PROCESSORS, Batch, Context, registry
from llama_infer.chain import Chain
from llama_infer.columns import make_batch
from llama_infer.parameters import declare, resolve, validate

END = 5
SET: dict[str, dict[str, Any]] = {
    "logit_bias": {"logit_bias": {1: -0.5, 4: 0.5, 6: -math.inf}},
    "sequence_bias": {"sequence_bias": {(7, 8): -1.0, (9,): 0.5}},
    "bad_words": {"bad_words_ids": ((7, 11), (12,))},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "suppress_tokens": {"suppress_tokens": (13, 14)},
    "begin_suppress_tokens": {"begin_suppress_tokens": (15,)},
    "allowed_token_ids": {"allowed_token_ids": tuple(range(200))},
    "min_new_tokens": {"min_new_tokens": 30},
    "repetition_penalty": {"repetition_penalty": 1.2, "penalty_last_n": 9},
    "presence_penalty": {"presence_penalty": 0.4},
    "frequency_penalty": {"frequency_penalty": 0.3},
    "dry": {"dry_multiplier": 0.8, "dry_base": 1.5, "dry_allowed_length": 1, "dry_sequence_breakers": (3,)},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 1.1)},
    "watermark": {"watermark_bias": 1.0, "watermark_context_width": 2},
    "forced_bos_token_id": {"forced_bos_token_id": 16},
    "forced_eos_token_id": {"forced_eos_token_id": 17, "max_new_tokens": 12},
    "reasoning_budget": {"reasoning_budget": 4, "reasoning_start": (18,), "reasoning_end": (19, 20)},
    "quadratic_smoothing": {"smoothing_factor": 0.3, "smoothing_curve": 1.5},
    "dynamic_temperature": {"dynatemp_low": 0.5, "dynatemp_high": 1.5},
    "edt": {"edt_theta": 0.2},
    "temperature": {"temperature": 0.7},
    "top_h": {"top_h": 0.95},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.95},
    "min_p": {"min_p": 0.01},
    "typical_p": {"typical_p": 0.9},
    "epsilon_cutoff": {"epsilon_cutoff": 1e-4},
    "eta_cutoff": {"eta_cutoff": 1e-3},
    "top_n_sigma": {"top_n_sigma": 3.0},
    "top_a": {"top_a": 0.05},
    "tfs": {"tfs": 0.98},
    "p_less": {"p_less": True},
    "p_less_norm": {"p_less_norm": True},
    "mirostat": {"mirostat": 1, "mirostat_tau": 4.0},
    "xtc": {"xtc_probability": 0.5, "xtc_threshold": 0.05, "xtc_protected": (2,)},
    "adaptive_p": {"adaptive_target": 0.3},
}
"""By the processor's name. Together they leave a choice in most rows."""
EVERYTHING = {name: value for values in SET.values() for name, value in values.items()}
TEMPERED = {"temperature": 0.7}
WHOLE: dict[str, dict[str, Any]] = {
    "everything": EVERYTHING,
    "nothing": {},
    "greedy": {"temperature": 0.0},
    "common": {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1},
    "mirostat 2": {"mirostat": 2},
}
"""Sets of values that belong together, by what they are called."""


def named(name: str) -> dict[str, Any]:
    """The values of one processor, or one of :data:`WHOLE`."""
    return WHOLE[name] if name in WHOLE else set_one(name)


def set_one(name: str) -> dict[str, Any]:
    """The values that set this processor and no other, drawn with a temperature so that a difference shows."""
    return {**TEMPERED, **SET[name]}


def chain_and_rows(
    rows: Sequence[dict[str, Any]], vocab_size: int, device: Any = "cpu", *, fresh: bool = False, sampler: Any = None
) -> tuple[Chain, Batch]:
    """The default chain on a device, and a table of such rows; ``fresh`` rows have a prompt and no answer yet."""
    sampler = registry.resolve("sampler", sampler or "categorical")
    parts = [registry.resolve("processor", name) for name in DEFAULT_PROCESSORS]
    chain = Chain(parts, sampler).bind(Context(None, vocab_size, (END,), device=device))
    declared = declare([*chain.parts, registry.resolve("sampler", "categorical")])
    defaults = {name: setting.value for name, setting in resolve(declared).items()}
    rows = [{**defaults, **validate(declared, row)} for row in rows]
    for part in chain.processors:
        neutral = {name: param.neutral for name, param in getattr(part, "params", {}).items()}
        for row in rows if hasattr(part, "check") else ():
            if any(value is not None and row[name] != value for name, value in neutral.items()):
                part.check(row)  # as when a request joins
    histories = [[18, *((7 * row + 3 * at) % 23 for at in range(4 + row % 5)), 7, 8, 7] for row in range(len(rows))]
    batch = make_batch(
        chain,
        declared,
        rows,
        histories,
        prompt_lengths=[len(history) if fresh else 2 for history in histories],
        seeds=[row + 11 for row in range(len(rows))],
        device=device,
    )
    return chain, batch
