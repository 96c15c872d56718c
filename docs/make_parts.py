"""Writes parts.md, the page of all built-in parts, from the code; ``--check`` exits with 1 where it is out of date."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llama_infer import DEFAULT_PROCESSORS, DEFAULT_STOPPING, Param, registry
from llama_infer.parameters import ENGINE_PARAMS
from llama_infer.parts import Kind

PAGE = Path(__file__).parent / "parts.md"
INTRODUCTION = """\
<!-- Written by docs/make_parts.py from the code: do not edit. -->

# Parts

What stands between the model's logits and the next token, and what ends an answer. `llama-infer parts` lists the same
together with the parts of installed plug-ins.

- **Order.** Processors run in the order of their number, which is that of `llama_infer.DEFAULT_PROCESSORS`;
  `Pipeline(processors=...)` takes any other order, repeats included. Then the sampler chooses a token, and the stopping
  criteria are asked about it.
- **Neutral.** At its neutral value a parameter's part does nothing and costs nothing. Nearly every default is neutral:
  a part works once its parameter is set. A dash means that there is no such value: the parameter is a limit that is
  unset until somebody sets it, or says how its part works while another one turns that on.
- **Setting.** By name, for one call, `pipe(prompt, top_p=0.9)`, or for all of them, `Pipeline(params={"top_p": 0.9})`;
  in a batch one value for all prompts or a list of one for each. A value out of its range is an error.
  `pipe.explain()` says which values apply and who set them.

What the temperatures and truncations do to one distribution, drawn by
[examples/plot_samplers.py](../examples/plot_samplers.py):

![A panel for each part: the distribution before in grey and after in colour](samplers.png)
"""
GROUPS = {
    "Bias and bans": (
        "logit_bias sequence_bias bad_words no_repeat_ngram_size suppress_tokens begin_suppress_tokens "
        "allowed_token_ids min_new_tokens forced_bos_token_id forced_eos_token_id reasoning_budget"
    ),
    "Penalties": (
        "repetition_penalty presence_penalty frequency_penalty dry exponential_decay_length_penalty watermark"
    ),
    "Temperature": "quadratic_smoothing dynamic_temperature edt temperature",
    "Truncation": (
        "top_h top_k top_p min_p typical_p epsilon_cutoff eta_cutoff top_n_sigma top_a tfs p_less p_less_norm mirostat "
        "xtc adaptive_p"
    ),
}
READ_BY = {"length": ("max_new_tokens",), "text": ("stop",)}
"""Parameters of the engine's own that a part reads."""
PROJECTS = {
    "OpenAI": "",
    "transformers": "https://github.com/huggingface/transformers",
    "vLLM": "https://github.com/vllm-project/vllm",
    "llama.cpp": "https://github.com/ggml-org/llama.cpp",
    "text-generation-webui": "https://github.com/oobabooga/text-generation-webui",
    "koboldcpp": "https://github.com/LostRuins/koboldcpp",
    "RWKV-LM": "https://github.com/BlinkDL/RWKV-LM",
    "trentonbricken.com/Tail-Free-Sampling": "https://www.trentonbricken.com/Tail-Free-Sampling/",
}


def page() -> str:
    """The whole page."""
    missing = set(DEFAULT_PROCESSORS) - set(" ".join(GROUPS.values()).split())
    if missing:
        raise SystemExit(f"docs/make_parts.py: say in GROUPS where these belong: {', '.join(sorted(missing))}")
    numbers = {name: str(number) for number, name in enumerate(DEFAULT_PROCESSORS, 1)}
    sections = [INTRODUCTION]
    for heading, names in GROUPS.items():
        members = sorted(names.split(), key=DEFAULT_PROCESSORS.index)
        sections.append(_section(heading, "processor", {name: numbers[name] for name in members}))
    sections.append(_section("Samplers", "sampler", dict.fromkeys(registry.BUILTIN["sampler"], "")))
    sections.append(_section("Stopping", "stopping", dict.fromkeys(DEFAULT_STOPPING, "")))
    return "\n".join(sections)


def _section(heading: str, kind: Kind, members: Mapping[str, str]) -> str:
    """A heading, the table of the parts and that of their parameters."""
    parts = {name: registry.resolve(kind, name) for name in members}
    numbered = any(members.values())
    about = []
    for name, part in parts.items():
        text = " ".join((type(part).__doc__ or "").split())
        row = (f"`{name}`", first_sentence(text), source(text))
        about.append((members[name], *row) if numbered else row)
    values = [
        (f"`{key}`", f"`{name}`", param.help, _code(param.default), _neutral(param), _range(param))
        for name, part in parts.items()
        for key, param in _params(name, part).items()
    ]
    columns = ("part", "what it does", "source")
    return "\n".join(
        [
            f"## {heading}\n",
            *_table(("#", *columns) if numbered else columns, about),
            "",
            *_table(("parameter", "of", "meaning", "default", "neutral", "range"), values),
            "",
        ]
    )


def _params(name: str, part: Any) -> dict[str, Param]:
    return {key: ENGINE_PARAMS[key] for key in READ_BY.get(name, ())} | dict(getattr(part, "params", {}))


def first_sentence(text: str) -> str:
    """Of a docstring, as Markdown."""
    return re.sub(r":\w+:`", "`", re.split(r"(?<=\.)\s", text)[0]).replace("``", "`")


def source(text: str) -> str:
    """Where a part comes from, as its docstring says: a paper, a pull request, or else the project named first."""
    if paper := re.search(r"arXiv (\d{4}\.\d{4,5})", text):
        return f"[arXiv {paper[1]}](https://arxiv.org/abs/{paper[1]})"
    if change := re.search(r"(\S+) PR (\d+)", text):
        return f"[{change[1]} PR {change[2]}]({PROJECTS[change[1]]}/pull/{change[2]})"
    named = {text.find(project): project for project in PROJECTS if project in text}
    if not named:
        return "-"
    project = named[min(named)]
    return f"[{project}]({PROJECTS[project]})" if PROJECTS[project] else project


def _code(value: Any) -> str:
    return "unset" if value is None else f"`{value!r}`"


def _neutral(param: Param) -> str:
    return "-" if param.neutral is None else _code(param.neutral)


def _range(param: Param) -> str:
    if not param.range and param.type is bool:
        return "`True` or `False`"
    formula = re.fullmatch(r"[\w.*]+( [<>]=? [\w.*-]+)+", param.range)
    return f"`{param.range}`" if formula else param.range or "-"


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    cells = [columns, ("---",) * len(columns), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells]


def main() -> int:
    """Writes or checks the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when the page is out of date")
    check = parser.parse_args().check
    text = page()
    if not check:
        PAGE.write_text(text, encoding="utf-8", newline="\n")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE} is out of date: run python docs/make_parts.py")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
