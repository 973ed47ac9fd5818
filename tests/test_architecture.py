"""The arrows of docs/architecture.md: a module imports only from rooms to its left."""

import ast
from pathlib import Path

import pytest

import sae_lens_gemma4

ROOT = Path(sae_lens_gemma4.__file__).parent
ORDER = [
    "errors", "mapping", "embedded",
    "kernels", "models", "catalogue", "activations", "evaluation", "interp", "training", "report",
    "publishing", "neuronpedia", "studies", "bench", "demo", "cli",
]  # fmt: skip
EXCEPTIONS = {("evaluation/result.py", "report")}
MODULES = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.py"))
ELSEWHERE = {"__init__.py", "plugin.py", "testing.py"}


def rooms_imported(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "sae_lens_gemma4":
                names = [f"sae_lens_gemma4.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("sae_lens_gemma4."):
                yield name.split(".")[1]


@pytest.mark.parametrize("path", [m for m in MODULES if m not in ELSEWHERE])
def test_arrows_point_left(path):
    here = ORDER.index(path.split("/")[0].removesuffix(".py"))
    for room in rooms_imported(path):
        if room in ORDER and (path, room) not in EXCEPTIONS:
            assert ORDER.index(room) <= here, f"{path} imports {room}"
        assert room != "plugin", f"{path} imports plugin"


def test_nobody_but_the_door_assigns_into_another_package():
    """No attribute of an imported foreign module is assigned outside plugin.py."""
    for path in MODULES:
        if path == "plugin.py":
            continue
        tree = ast.parse((ROOT / path).read_text())
        foreign = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                foreign |= {(a.asname or a.name).split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                foreign |= {a.asname or a.name for a in node.names}
        for node in ast.walk(tree):
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            for target in targets if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) else []:
                if isinstance(target, ast.Attribute):
                    if (path, ast.unparse(target)) == ("cli/__init__.py", "warnings.showwarning"):
                        continue  # which Python itself says is to be assigned
                    root = target
                    while isinstance(root, ast.Attribute):
                        root = root.value
                    assert not (isinstance(root, ast.Name) and root.id in foreign), f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
                assert path == "models/loading.py", f"{path}:{node.lineno}"  # a config of its own, before loading


def test_modules_are_short_enough_to_hold_one_idea():
    for path in MODULES:
        assert len((ROOT / path).read_text().splitlines()) <= 350, path
