"""Compares two recordings item by item: an exit code, an output, a file."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from golden_lib.renames import Renames

_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?")
SHOWN = 12  # differing values of an item that are listed without --verbose


class Verdict(IntEnum):
    """How two items differ; the larger wins."""

    IDENTICAL = 0
    WORDS = 1
    RENAMED = 2
    DIFFERENT = 3


@dataclass
class Finding:
    """What was found of one item."""

    item: str
    verdict: Verdict
    details: list[str]
    before: list[str]
    after: list[str]


def compare(before: Path, after: Path, renames: Renames, *, verbose: bool) -> int:
    """Print the differences of two recordings; the exit code."""
    findings: list[Finding] = []
    names = sorted({path.stem for folder in (before, after) for path in folder.glob("*.json")})
    for name in names:
        paths = [folder / f"{name}.json" for folder in (before, after)]
        if not all(path.is_file() for path in paths):
            missing = next(str(path) for path in paths if not path.is_file())
            findings.append(Finding(name, Verdict.DIFFERENT, [f"there is no {missing}"], [], []))
            continue
        old, new = (json.loads(path.read_text("utf-8")) for path in paths)
        findings += compare_case(name, old, new, renames)
    report(findings, verbose=verbose)
    return int(any(finding.verdict is Verdict.DIFFERENT for finding in findings) or not names)


def report(findings: list[Finding], *, verbose: bool) -> None:
    """Differences first by their kind, then how many items of each kind there are."""
    for verdict in reversed(Verdict):
        found = [finding for finding in findings if finding.verdict is verdict]
        if verdict is Verdict.IDENTICAL or not found:
            continue
        print(f"== {verdict.name.lower() if verdict is not Verdict.DIFFERENT else 'DIFFERENT'}")
        for finding in found:
            print(finding.item)
            if verdict is Verdict.DIFFERENT:
                print("\n".join(f"    {line}" for line in finding.details[:SHOWN]))
                if len(finding.details) > SHOWN:
                    print(f"    ... {len(finding.details) - SHOWN} more")
            if verbose:
                print("\n".join(difflib.unified_diff(finding.before, finding.after, lineterm="", n=1)))
    counts = Counter(finding.verdict for finding in findings)
    titles = {Verdict.WORDS: "words only", Verdict.RENAMED: "keys renamed"}
    parts = [f"{counts[verdict]} {titles.get(verdict, verdict.name)}" for verdict in Verdict]
    print(f"{len(findings)} items: {', '.join(parts)}")


def compare_case(name: str, before: dict[str, Any], after: dict[str, Any], renames: Renames) -> Iterator[Finding]:
    """A finding for each part of each command, and for each file."""
    words = bool(before["words"])
    old, new = before["commands"], after["commands"]
    for title in [*old, *(title for title in new if title not in old)]:
        if title not in old or title not in new:
            yield Finding(f"{name}: {title}", Verdict.DIFFERENT, ["run in one recording only"], [], [])
            continue
        a, b = old[title], new[title]
        for part in ("exit", "stdout", "stderr"):
            yield judge(f"{name}: {part} of {title}", a[part], b[part], renames, words)
    yield from compare_files(name, before["files"], after["files"], renames, words)


def compare_files(
    name: str, before: dict[str, Any], after: dict[str, Any], renames: Renames, words: bool = False
) -> Iterator[Finding]:
    """A finding for each file of two snapshots."""
    for path in sorted(before.keys() | after.keys()):
        if path in before and path in after:
            yield judge(f"{name}: {path}", before[path], after[path], renames, words)
        else:
            side = "before" if path in before else "after"
            yield Finding(f"{name}: {path}", Verdict.DIFFERENT, [f"only {side}"], [], [])


def judge(item: str, before: dict[str, Any], after: dict[str, Any], renames: Renames, words: bool) -> Finding:
    """How two records of one item differ."""
    lines = [json.dumps(record, indent=1, ensure_ascii=False).splitlines() for record in (before, after)]
    if before == after:
        return Finding(item, Verdict.IDENTICAL, [], *lines)
    if before["kind"] != after["kind"]:
        return Finding(item, Verdict.DIFFERENT, [f"{before['kind']} became {after['kind']}"], *lines)
    mapped = map_record(before, renames)
    verdict = Verdict.RENAMED if mapped != before else Verdict.IDENTICAL
    details: list[str] = []
    for path, old, new in find_differences(mapped, after):
        kind = Verdict.DIFFERENT
        if path[-1:] == ("lines",):
            kind = judge_text("\n".join(old), "\n".join(new), words)
            details += list(difflib.unified_diff(old, new, lineterm="", n=0))[2:] if kind is Verdict.DIFFERENT else []
        elif isinstance(old, str) and isinstance(new, str) and " " in old and " " in new and "tensors" not in path:
            kind = judge_text(old, new, words)
        if kind is Verdict.DIFFERENT and path[-1:] != ("lines",):
            details.append(f"{'.'.join(map(str, path))}: {shorten(old)} became {shorten(new)}")
        verdict = max(verdict, kind)
    return Finding(item, verdict, details, *lines)


def judge_text(before: str, after: str, words: bool) -> Verdict:
    """Words may change; the numbers among them only in help and errors."""
    same = before == after or words or count_numbers(before) == count_numbers(after)
    return Verdict.WORDS if same else Verdict.DIFFERENT


def count_numbers(text: str) -> Counter[str]:
    """The numbers in a text and how often each stands there."""
    return Counter(_NUMBER.findall(text))


def map_record(record: dict[str, Any], renames: Renames) -> dict[str, Any]:
    """A record of the old tree under the keys of the new one."""
    if record["kind"] == "config":
        command = record["command"]
        parts = {name: renames.map_config(command, record[name]) for name in ("config", "origin") if name in record}
        return record | parts | {"config": renames.add_defaults(command, parts["config"])}
    if record["kind"] == "json":
        return record | {"content": renames.map_names(record["content"])}
    if record["kind"] == "safetensors":
        return record | {"metadata": renames.map_names(record["metadata"])}
    return record


def find_differences(before: Any, after: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """The places where two JSON values differ, with both values; lists of a text's lines as a whole."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in [*before, *(name for name in after if name not in before)]:
            yield from find_differences(before.get(name, "absent"), after.get(name, "absent"), (*path, name))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after) and path[-1:] != ("lines",):
        for place, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from find_differences(old, new, (*path, place))
    elif before != after:
        yield path, before, after


def shorten(value: Any) -> str:
    """A value on part of a line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 90 else f"{text[:60]}...{text[-25:]}"
