"""Every example runs, and the plug-in package can be installed and is found."""

from __future__ import annotations

import importlib.metadata
import json
import os
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from llama_infer import registry

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = (
    "quickstart", "custom_sampler", "custom_processor", "custom_stopping", "custom_quantization", "sweep",
    "tensor_parallel",
)  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_runs_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_registered", {})  # what the example registers does not stay
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 3
    assert not list(tmp_path.iterdir())


def test_every_example_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for name in SCRIPTS:
        assert f"({name}.py)" in listed
    assert "(plugin)" in listed


def test_custom_sampler_is_short() -> None:
    lines = (EXAMPLES / "custom_sampler.py").read_text(encoding="utf-8").splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("@register"))
    end = next(at for at, line in enumerate(lines) if at > start and line and not line.startswith(("class", " ")))
    assert len("\n".join(lines[start:end]).strip().splitlines()) <= 15


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plug-in installed: by pip, or, where its build backend is not at hand, by what pip would do."""
    tmp = tmp_path_factory.mktemp("plugin")
    source, target = tmp / "source", tmp / "target"
    shutil.copytree(EXAMPLES / "plugin", source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    if _has("setuptools") and _has("pip"):
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
        done = subprocess.run([*command, "--target", str(target), str(source)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        _install_by_hand(source, target)
    return target


def _has(distribution: str) -> bool:
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    # setuptools builds wheels without the package "wheel" since 70.1.
    return distribution != "setuptools" or tuple(map(int, version.split(".")[:2])) >= (70, 1)


def _install_by_hand(source: Path, target: Path) -> None:
    """Writes the modules and the metadata that an installer would, from the plug-in's own pyproject.toml."""
    settings = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))
    project = settings["project"]
    info = target / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    for module in settings["tool"]["setuptools"]["py-modules"]:
        shutil.copy(source / f"{module}.py", target)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def _python(target: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = [str(target), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8", **environment}
    env = {name: value for name, value in env.items() if name != "LLAMA_INFER_PLUGINS" or name in environment}
    return subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, encoding="utf-8", cwd=target
    )


def _parts(target: Path, **environment: str) -> list[dict[str, str]]:
    done = _python(target, "-m", "llama_infer", "parts", "--json", **environment)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, str]] = json.loads(done.stdout)
    return found


def test_plugin_is_listed_with_its_package_and_version(plugin: Path) -> None:
    row = {"kind": "processor", "name": "shout", "package": "llama-infer-shout", "version": "1.2.3"}
    assert [part for part in _parts(plugin) if part["name"] == "shout"] == [row]


def test_plugins_can_be_turned_off(plugin: Path) -> None:
    assert not [part for part in _parts(plugin, LLAMA_INFER_PLUGINS="0") if part["name"] == "shout"]


USE = """
from llama_infer import DEFAULT_PROCESSORS, Pipeline
pipe = Pipeline("demo", processors=(*DEFAULT_PROCESSORS, "shout"), params={"temperature": 0, "max_new_tokens": 4})
quiet, neutral, loud = pipe("Say hello"), pipe("Say hello", shout=0), pipe("Say hello", shout=1000)
assert quiet.token_ids == neutral.token_ids
assert any(mark in loud.text for mark in "!！"), loud
assert "shout" in pipe.explain(shout=3)
print("loud and clear")
"""


def test_plugin_is_used_by_its_name(plugin: Path) -> None:
    done = _python(plugin, "-c", USE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "loud and clear\n"


def test_install_by_hand_is_what_pip_does(plugin: Path, tmp_path: Path) -> None:
    _install_by_hand(EXAMPLES / "plugin", tmp_path / "target")
    by_hand, installed = (
        importlib.metadata.Distribution.at(next(folder.glob("*.dist-info"))) for folder in (tmp_path / "target", plugin)
    )
    assert (by_hand.metadata["Name"], by_hand.version) == (installed.metadata["Name"], installed.version)
    assert {(p.group, p.name, p.value) for p in by_hand.entry_points} == {
        (p.group, p.name, p.value) for p in installed.entry_points
    }
