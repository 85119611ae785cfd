"""Nothing in the package runs a pickle or any other program that hides in data: its code and its loaders show it."""

from __future__ import annotations

import ast
import os
import pickle
from pathlib import Path

import pytest

import relicctl
from tests.helpers import hostile

PACKAGE = Path(relicctl.__file__).parent
FORBIDDEN = {"dill", "joblib", "cloudpickle", "shelve", "marshal", "jsonpickle", "pandas", "imp", "runpy"}
HARMLESS = {"pickle.UnpicklingError"}
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load", "torch.jit.load",
    "importlib.import_module", "torch.package.PackageImporter", "yaml.full_load", "yaml.unsafe_load",
}  # fmt: skip


def complaints(source: str, name: str = "") -> list[str]:
    """What in a module could run what it reads."""
    found = []
    tree = ast.parse(source)
    full = _full_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"{name}:{node.lineno} imports {m}" for m in modules if m.partition(".")[0] in FORBIDDEN]
            if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "_pickle"):
                found.append(f"{name}:{node.lineno} imports from pickle")
        used = _in_full(node, full) if isinstance(node, ast.Attribute) else ""
        if used.partition(".")[0] in ("pickle", "_pickle") and used not in HARMLESS:
            found.append(f"{name}:{node.lineno} uses {used}")
        if isinstance(node, ast.Call) and (told := _call(node, full)):
            found.append(f"{name}:{node.lineno} {told}")
    return found


def _full_names(tree: ast.AST) -> dict[str, str]:
    """What the names that a module imports stand for."""
    full = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            full |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return full


def _in_full(node: ast.expr, full: dict[str, str]) -> str:
    first, dot, rest = ast.unparse(node).partition(".")
    return full.get(first, first) + dot + rest


def _call(node: ast.Call, full: dict[str, str]) -> str | None:
    called = _in_full(node.func, full)
    named = {word.arg: ast.unparse(word.value) for word in node.keywords}
    if called in CALLS:
        return f"calls {called}"
    if called.endswith("torch.load") and named.get("weights_only") != "True":
        return "calls torch.load without weights_only=True"
    if called in ("np.load", "numpy.load") and named.get("allow_pickle", "False") != "False":
        return "lets numpy load pickles"
    if called in ("np.load", "numpy.load") and "**" in ast.unparse(node):
        return "calls numpy's load with unknown arguments"
    if (
        called == "yaml.load"
        and [ast.unparse(a) for a in node.args[1:]] != ["_StrictLoader"]
        and "Safe" not in str(named)
    ):
        return "calls yaml.load without a safe loader"
    if called.endswith(("subprocess.run", "subprocess.Popen")) and named.get("shell", "False") != "False":
        return "runs a shell"
    return None


def test_nothing_in_the_package_runs_what_it_reads():
    modules = sorted(PACKAGE.rglob("*.py"))
    assert len(modules) > 90
    found = [told for path in modules for told in complaints(path.read_text("utf-8"), str(path.relative_to(PACKAGE)))]
    assert found == []


def test_the_yaml_loader_is_a_safe_loader():
    import yaml

    from relicctl.config import yaml_io

    assert issubclass(yaml_io._StrictLoader, yaml.SafeLoader)


@pytest.mark.parametrize(
    "line",
    [
        "import dill", "from joblib import load", "import pandas as pd", "from pickle import load", "pickle.load(f)",
        "pickle.Unpickler(f)", "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)",
        "yaml.load(f, yaml.Loader)", "yaml.unsafe_load(f)", "eval(x)", "torch.hub.load(a, b)",
        "subprocess.run(x, shell=True)", "load = pickle.loads", "from torch import load\nload(f)",
        "import torch as t\nt.load(f)", "from numpy import load\nload(f, allow_pickle=True)",
        "from yaml import unsafe_load\nunsafe_load(f)", "from subprocess import run\nrun(x, shell=True)",
        "import pickle as p\np.load(f)", "import numpy as n\nn.load(f, **how)", "importlib.import_module(x)",
        "from importlib import import_module\nimport_module(x)", "from os import system\nsystem(x)",
    ],
)  # fmt: skip
def test_the_search_for_pickles_finds_what_it_looks_for(line):
    assert complaints(line)
    assert not complaints(
        "torch.load(f, weights_only=True)\nnp.load(f)\npickle.UnpicklingError\nyaml.load(t, _StrictLoader)"
    )


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", hostile.TARGETS)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_in_place_of_any_file_is_not_run(name, protocol, tmp_path):
    trap = tmp_path / "it-ran"
    hostile.TARGETS[name].read(pickle.dumps({"state": Trap(trap)}, protocol))
    assert not trap.exists()
    pickle.loads(pickle.dumps(Trap(trap)))  # the trap works
    assert trap.exists()


def test_a_pickle_inside_a_torch_file_is_not_run(tmp_path):
    import torch

    trap = tmp_path / "it-ran"
    for zipped in (True, False):
        path = tmp_path / "weights.pt"
        torch.save({"conv1.weight": Trap(trap)}, path, _use_new_zipfile_serialization=zipped)
        hostile.read_weights(path.read_bytes())
    assert not trap.exists()
