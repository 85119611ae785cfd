"""Measure what makes code easy or hard to read: names, sizes, parameters, the direction of imports, private words.

    python tools/measure_structure.py [TREE] [--verbose]

TREE is a checkout whose package is ``relicctl``. A function counts as beginning with a verb only if the first word of
its name is in ``VERB_LIST``: words that a reader takes for a verb at once. Words that are nouns or adjectives as often
(label, order, mask, record, stage, state, mean ...) are not in it, so the number is a lower bound. ``--verbose`` lists
the functions that do not begin with a verb, and those with many parameters.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

VERB_LIST = """
accumulate acquire activate add adjust aggregate align allocate analyze append apply assemble assert assign attach
begin bind blend broadcast build call cancel capture catch check choose clamp classify clean clear clip close collate
collect combine compare compile compose compress compute concat concatenate configure connect construct consume
convert convolve copy count create crop cut decode delete derive describe destroy detach detect determine dilate
disable discard divide download downsample draw drop dump embed enable encode ensure enter erode estimate evaluate
exclude execute expand explain export extend extract extrapolate fetch fill filter find finish fit flatten flip flush
follow forget fork format freeze fuse gather generate get give go guess handle has hash hide hold include infer
inflate init initialize insert inspect install interpolate invert is iter iterate join keep kill launch list load
locate make match measure merge modify move multiply normalize notify observe open optimize pack pad parse pass
permute pick plot pop postpone predict prefetch preload prepare preserve print produce propagate prove prune publish
pull push put quantize raise read rebuild receive recompute recover reduce refine refresh refuse reject release reload
remember remove rename render reopen repair replace report require rescale reset reshape resize resolve restart
restore resume retry return reuse reverse rewind rewrite rotate run save say scan scatter search see segment select
send separate serialize set settle shorten show shrink shuffle shut skip solve sort split start stop store strip
subtract suggest summarize suspend swap switch sync synchronize take tell terminate throw track train translate
transpose traverse trim truncate try turn unflatten unfreeze unlink unpack unwrap update upload upsample use validate
verify wait walk warm warn watch widen wrap write yield zip
"""
VERBS = frozenset(VERB_LIST.split())
HOUSE_WORDS = ("told", "tell", "tells", "kept", "made", "hand-made", "twins", "seer", "go on", "goes on")
TOO_MANY_PARAMETERS = 7


def parse_modules(package: Path) -> dict[str, ast.Module]:
    """Module name -> syntax tree."""
    return {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
            path.read_text(encoding="utf-8")
        )
        for path in sorted(package.rglob("*.py"))
    }


def find_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def begins_with_verb(function: ast.FunctionDef) -> bool:
    return not function.name.startswith("__") and function.name.strip("_").split("_")[0] in VERBS


def is_free_choice(function: ast.FunctionDef) -> bool:
    """Whether its author chose the form of the name: no dunder method, no property, no module's ``forward``."""
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    fixed = function.name.startswith("__") or function.name in ("forward", "backward")
    return not fixed and not any("property" in name for name in decorators)


def count_parameters(function: ast.FunctionDef) -> int:
    """All parameters but self and cls."""
    arguments = function.args
    names = [a.arg for a in arguments.posonlyargs + arguments.args + arguments.kwonlyargs]
    return len(names) - (names[:1] in (["self"], ["cls"])) + bool(arguments.vararg) + bool(arguments.kwarg)


def count_lines(function: ast.FunctionDef) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


def find_imports(name: str, tree: ast.Module, modules: dict[str, ast.Module]) -> set[str]:
    """The package's modules that this one imports, at the top or inside functions; not those of ``TYPE_CHECKING``."""
    found: set[str] = set()
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in skipped:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found |= {full if full in modules else node.module} & modules.keys()
    return found - {name}


def find_circles(imports: dict[str, set[str]]) -> list[str]:
    """Modules that can be reached from themselves."""
    circles = []
    for start in imports:
        reached: set[str] = set()
        front = imports[start]
        while front:
            reached |= front
            front = set(chain.from_iterable(imports[name] for name in front)) - reached
        if start in reached:
            circles.append(start)
    return circles


def main() -> None:
    arguments = [a for a in sys.argv[1:] if not a.startswith("-")]
    package = Path(*arguments[:1] or ["."]) / "relicctl"
    modules = parse_modules(package)
    functions = [(f"{name}:{f.name}", f) for name, tree in modules.items() for f in find_functions(tree)]
    chosen = [(where, f) for where, f in functions if is_free_choice(f)]
    wide = sorted(f"{count_parameters(f):3} {w}" for w, f in functions if count_parameters(f) >= TOO_MANY_PARAMETERS)
    longest = sorted(((count_lines(f), where) for where, f in functions), reverse=True)
    text = {path: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    lines = sorted(((len(t.splitlines()), str(path.relative_to(package))) for path, t in text.items()), reverse=True)
    everything = "\n".join(text.values())

    print("modules without __init__:", sum(path.name != "__init__.py" for path in text))
    print("files in commands/ without __init__:", len(list((package / "commands").glob("[!_]*.py"))))
    print("lines:", sum(n for n, _ in lines), "| longest files:", *(f"{name} {n}," for n, name in lines[:3]))
    for title, group in (("all functions", functions), ("freely named functions", chosen)):
        verbs = sum(begins_with_verb(f) for _, f in group)
        print(f"{title}: {len(group)}, begin with a verb: {verbs} = {verbs / len(group):.1%}")
    print(f"functions with {TOO_MANY_PARAMETERS} or more parameters:", len(wide))
    print("functions over 60 lines:", sum(n > 60 for n, _ in longest), "| longest:", *longest[0])
    print("modules in import circles:", find_circles({n: find_imports(n, t, modules) for n, t in modules.items()}))
    print("private words:", {word: len(re.findall(rf"\b{word}\b", everything)) for word in HOUSE_WORDS})
    if "--verbose" in sys.argv:
        print("", *wide, *sorted(where for where, f in chosen if not begins_with_verb(f)), sep="\n")


if __name__ == "__main__":
    main()
