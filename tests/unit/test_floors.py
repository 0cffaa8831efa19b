"""Holds the floors: imports only go down, and only a gate imports what it is the gate to."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "gpupt"
FLOORS = {
    "errors": 0,
    "model": 1,
    "actions": 2,
    "decide": 3,
    "edges": 3,
    "apply": 4,
    "report": 5,
    "cli": 6,
}
# outside package → the only modules that may import it
GATES = {
    "libvirt": {"gpupt.edges.hypervisor"},
    "paramiko": {"gpupt.edges.ssh"},
    "pynvml": {"gpupt.edges.nvml"},
    "ansible_runner": {"gpupt.edges.ansible"},
    "yaml": {"gpupt.edges.yamlfile"},
    "subprocess": {"gpupt.edges.process"},
    "sqlite3": {"gpupt.edges.journal"},
    "jinja2": {"gpupt.edges.templates"},
}
IMPURE = {"os", "time", "logging", "subprocess", "io", "shutil", "socket"}


def imports_of(source: str) -> set[str]:
    """Every dotted module a piece of source imports, lazily or not."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def violations(module: str, source: str) -> list[str]:
    """What that module's source does that its floor forbids, a line each."""
    said = []
    parts = module.split(".")
    room = parts[1] if len(parts) > 1 else ""
    for name in sorted(imports_of(source)):
        top, *rest = name.split(".")
        gate = GATES.get(top)
        if gate is not None and module not in gate:
            said.append(f"{module} imports {top}: only {', '.join(sorted(gate))} may")
        if room in {"model", "decide"} and (top in IMPURE or name == "pathlib.Path"):
            said.append(f"{module} is pure and imports {top}")
        if top != "gpupt" or not rest or rest[0] not in {*FLOORS, "lab"}:
            continue
        if rest[0] == "lab":
            if room not in {"lab", "cli"}:
                said.append(f"{module} imports the lab")
        elif room == "lab":
            if rest[0] not in {"errors", "model", "edges"}:
                said.append(f"{module} imports {rest[0]}: the lab stands on model and edges")
        elif room in FLOORS and rest[0] != room and FLOORS[rest[0]] >= FLOORS[room]:
            said.append(f"{module} (floor {FLOORS[room]}) imports {name}")
    if room in {"model", "decide"}:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "open":
                said.append(f"{module} is pure and opens a file")
    return said


def modules() -> list[tuple[str, str]]:
    """Every module of the package with its source."""
    named = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        named.append((".".join(parts).removesuffix(".__init__"), path.read_text()))
    return named


def test_floors_hold() -> None:
    found = modules()
    assert len(found) > 10
    assert [line for name, source in found for line in violations(name, source)] == []


@pytest.mark.parametrize(
    ("module", "source", "word"),
    [
        ("gpupt.model.pci", "from gpupt.edges import sysfs", "floor 1"),
        ("gpupt.decide.plan", "from gpupt.edges.sysfs import read_host", "floor 3"),
        ("gpupt.edges.ssh", "import gpupt.decide.plan", "floor 3"),
        ("gpupt.decide.plan", "import time", "pure"),
        ("gpupt.decide.plan", "from pathlib import Path", "pure"),
        ("gpupt.decide.plan", "open('x')", "opens"),
        ("gpupt.cli.host", "def f():\n    import libvirt", "only gpupt.edges.hypervisor"),
        ("gpupt.apply.host", "import subprocess", "only gpupt.edges.process"),
        ("gpupt.apply.host", "from gpupt.lab import host", "imports the lab"),
        ("gpupt.lab.machine", "from gpupt.apply import execute", "the lab stands on"),
    ],
)
def test_each_rule_fires(module: str, source: str, word: str) -> None:
    assert any(word in line for line in violations(module, source))
