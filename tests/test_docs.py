"""The architecture page and the code agree: a file named there exists, a module that exists is named there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "relicctl"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CODE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.S))
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


@pytest.mark.parametrize("name", sorted({name for name in CODE if re.fullmatch(r"[\w./-]+(\.py|/)", name)}))
def test_a_file_named_in_the_architecture_page_exists(name: str) -> None:
    assert (PACKAGE / name).exists() or (ROOT / name).exists()


@pytest.mark.parametrize("module", [path.relative_to(PACKAGE).as_posix() for path in MODULES])
def test_every_module_is_in_the_architecture_page(module: str) -> None:
    rows = [line for line in PAGE.partition("## All files")[2].splitlines() if line.startswith("|")]
    assert any(f"`{module}`" in row.split("|")[1] for row in rows)


def test_functions_and_classes_named_in_the_architecture_page_exist() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    named = {name.removesuffix("()") for name in CODE if re.fullmatch(r"\w+\(\)|([A-Z][a-z]+){2,}", name)}
    assert len(named) > 20
    assert named - defined == set()


def test_every_link_of_the_docs_leads_to_a_file() -> None:
    broken = []
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert broken == []
