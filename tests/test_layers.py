"""The layers, read from the imports: a module may import what is beneath it, and nothing else of ours."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "llama_infer"

LAYERS = [
    {"types", "errors", "parts", "registry", "files"},
    {
        "transfer",
        "native",
        "noise",
        "patterns",
        "batch",
        "layout",
        "encoded",
        "history",
        "rows",
        "candidates",
        "chain",
        "columns",
        "parameters",
    },
    {"samplers", "stopping", "foreign", "processors", "strategies", "cache", "models", "prompts"},
    {"engine"},
    {"backends"},
    {"assembly", "calls", "pipeline", "chat", "jobs", "quality"},
    {"commands", "cli"},
]
KINDS = LAYERS[2]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
OUTSIDE = {"__init__", "__main__", "testing", "demo"}
"""The package itself, its command, and what is for tests only."""


def name_of(path: Path) -> str:
    """llama_infer/cache/slots.py -> llama_infer.cache.slots."""
    return ".".join(("llama_infer", *path.relative_to(ROOT).with_suffix("").parts))


MODULES = {name_of(path): path for path in ROOT.rglob("*.py")}


class Imports(ast.NodeVisitor):
    """(module, name) of every import that runs, wherever in the file; not those for type checkers."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.found: set[tuple[str, str]] = set()

    def visit_If(self, node: ast.If) -> None:
        for child in node.orelse if "TYPE_CHECKING" in ast.unparse(node.test) else ast.iter_child_nodes(node):
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        self.found |= {(alias.name, "") for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self.package.split(".")[: len(self.package.split(".")) + 1 - node.level] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        self.found |= {(module, alias.name) for alias in node.names}


def imports(module: str) -> set[tuple[str, str]]:
    """What a module imports at run time."""
    visitor = Imports(module.rpartition(".")[0])
    visitor.visit(ast.parse(MODULES[module].read_text(encoding="utf-8")))
    return visitor.found


def ours(module: str) -> set[str]:
    """The modules of this package that a module imports."""
    found = set()
    for source, name in imports(module):
        if source == "llama_infer" or source.startswith("llama_infer."):
            found.add(f"{source}.{name}" if f"{source}.{name}" in MODULES else source)
    return found - {"llama_infer"} - {module}


def room(module: str) -> str:
    """The layer's member that a module belongs to."""
    return module.split(".")[1]


LAYERED = sorted(module for module in MODULES if module != "llama_infer.__init__" and room(module) not in OUTSIDE)


def test_every_module_has_a_layer():
    assert {room(module) for module in LAYERED} <= set(LEVEL)
    assert len(LAYERED) > 30


@pytest.mark.parametrize("module", LAYERED)
def test_imports_go_down(module):
    """Kinds of parts do not know each other, and nobody knows who is above."""
    here = room(module)
    for target in ours(module):
        there = room(target)
        if there == here:
            continue
        assert there in LEVEL, f"{module} imports {target}, which is in no layer"
        assert LEVEL[there] <= LEVEL[here], f"{module} imports {target} from a layer above it"
        assert not (here in KINDS and there in KINDS), f"{module} imports {target}: kinds never import each other"


@pytest.mark.parametrize("module", [m for m in LAYERED if room(m) == "engine"])
def test_the_engine_names_no_concrete_part(module):
    assert not {room(target) for target in ours(module)} & KINDS


def who_imports(*names: str) -> set[str]:
    """The modules that import one of these names from transformers."""
    return {
        module
        for module in MODULES
        for source, name in imports(module)
        if source.split(".")[0] == "transformers" and (name in names or source.rpartition(".")[2] in names)
    }


def test_one_place_for_what_moves_in_transformers():
    """Its caches in ``cache``, its registries of attention in ``models/attention.py``."""
    caches = ("DynamicCache", "DynamicLayer", "Cache", "CacheLayerMixin", "StaticCache", "cache_utils")
    assert who_imports(*caches) == {"llama_infer.cache.slots", "llama_infer.cache.plain"}
    registries = ("AttentionInterface", "AttentionMaskInterface", "masking_utils", "ALL_ATTENTION_FUNCTIONS")
    assert who_imports(*registries) == {"llama_infer.models.attention"}


def test_the_lowest_layers_load_no_torch():
    """Parameters, types and contracts can be read without it."""
    torch_free = LAYERS[0] | {"parameters", "stopping"}
    for module in LAYERED:
        if room(module) in torch_free:
            assert not {source.split(".")[0] for source, _ in imports(module)} & {"torch", "transformers"}


def test_nothing_generates_but_our_loop():
    """No call of a method ``generate`` anywhere in the package."""
    for module, path in MODULES.items():
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        assert "generate" not in {call.func.attr for call in calls if isinstance(call.func, ast.Attribute)}, module
