"""The page of the parts is up to date, and the picture on it can be drawn."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_infer import DEFAULT_PROCESSORS, registry
from llama_infer.parts import Kind

ROOT = Path(__file__).parent.parent
MAKE, PLOT = ROOT / "docs" / "make_parts.py", ROOT / "examples" / "plot_samplers.py"
PAGE = ROOT / "docs" / "parts.md"
KINDS: tuple[Kind, ...] = ("processor", "sampler", "stopping")


def _run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, encoding="utf-8")


def _check(page: Path | None, monkeypatch: pytest.MonkeyPatch) -> Any:
    script = runpy.run_path(str(MAKE))
    if page is not None:
        monkeypatch.setitem(script["main"].__globals__, "PAGE", page)
    monkeypatch.setattr(sys, "argv", [str(MAKE), "--check"])
    return script["main"]()


def test_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _check(None, monkeypatch) == 0, "run python docs/make_parts.py"


def test_an_old_page_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "parts.md"
    assert _check(page, monkeypatch) == 1
    page.write_text(PAGE.read_text(encoding="utf-8").replace("`top_k`", "`top_q`"), encoding="utf-8")
    assert _check(page, monkeypatch) == 1
    assert "run python docs/make_parts.py" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in registry.BUILTIN[kind]])
def test_page_has_the_part_and_its_parameters(kind: Kind, name: str) -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    number = f"| {DEFAULT_PROCESSORS.index(name) + 1} " if kind == "processor" else ""
    assert any(line.startswith(f"{number}| `{name}` | ") for line in lines)
    for param in getattr(registry.resolve(kind, name), "params", {}):
        assert any(line.startswith(f"| `{param}` | `{name}` | ") for line in lines)


def test_every_processor_says_its_source_and_explains_its_parameters() -> None:
    rows = [
        line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:3].strip("| ").isdigit()
    ]
    assert len(rows) == len(DEFAULT_PROCESSORS)
    assert [row[1] for row in rows if row[-1].strip(" |") == "-"] == []
    for name in DEFAULT_PROCESSORS:
        part = registry.resolve("processor", name)
        for param in part.params:
            assert param in f"{part.name} {type(part).__doc__}", (name, param)


def test_picture_is_there_and_small() -> None:
    assert 10_000 < (ROOT / "docs" / "samplers.png").stat().st_size < 200_000


def test_picture_has_a_panel_for_every_temperature_and_truncation() -> None:
    drawn = {name for panel in runpy.run_path(str(PLOT))["PANELS"] for name in panel}
    for name in DEFAULT_PROCESSORS[DEFAULT_PROCESSORS.index("quadratic_smoothing") :]:
        assert drawn & set(registry.resolve("processor", name).params), name


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_plot_runs(tmp_path: Path) -> None:
    done = _run(str(PLOT), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "samplers.png").read_bytes().startswith(b"\x89PNG")
    assert _run(str(PLOT), "--output", "other.png", cwd=tmp_path).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"samplers.png", "other.png"}


def test_plot_without_matplotlib_says_what_to_install(tmp_path: Path) -> None:
    blocked = "import runpy, sys; sys.modules['matplotlib'] = None; runpy.run_path(sys.argv.pop(), run_name='__main__')"
    done = _run("-c", blocked, str(PLOT), cwd=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "pip install 'llama-infer[plot]'" in done.stderr
    assert not list(tmp_path.iterdir())
