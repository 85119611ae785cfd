"""The model card: what the weights are, how to load them, what they were measured to be worth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from relicctl.export.bundle import Bundle


@dataclass(frozen=True)
class Checked:
    """How an exported form was found to agree with the encoder it came from."""

    sha256: str  # of the file with the weights
    statement: str  # one sentence
    padding: str | None = None  # what a changed padding costs


def model_card(name: str, library: str, bundle: Bundle, usage: list[str], checked: Checked) -> str:
    """Markdown, with the front matter that the Hugging Face hub reads."""
    facts = bundle.metadata
    task = "image-classification" if bundle.head else "image-feature-extraction"
    origin = f"objective {facts['objective']}" + (f", preset {facts['preset']}" if facts["preset"] else "")
    front = [
        f"library_name: {library}",
        f"pipeline_tag: {task}",
        "tags: [self-supervised-learning, relicctl]",
    ]
    if facts["license"] != "unspecified":
        front.insert(0, f"license: {json.dumps(facts['license'])}")
    rows = {
        "encoder": "{arch}, width {width}, {stem} stem, {padding} padding".format(**facts),
        "network": facts["network"],
        "features": str(bundle.feature_dim),
        "input": f"RGB, short side to {round(bundle.size / bundle.crop_ratio)} px (bicubic), "
        f"centre {bundle.size} px, scaled to [0, 1], mean {bundle.mean}, std {bundle.std}",
        "trained with": f"relicctl {facts['version']}, {origin}",
        "data fingerprint": facts["data_fingerprint"] or "unknown",
        "licence of the weights": facts["license"],
        "sha256 of the weights": checked.sha256,
    }
    if bundle.head:
        rows["classes"] = f"{len(bundle.classes)}: {', '.join(bundle.classes[:20])}" + (
            ", ..." if len(bundle.classes) > 20 else ""
        )
    sections = ["---", *front, "---", "", f"# {name}", "", *_table("", "", rows), ""]
    sections += ["## Loading", "", "```python", *usage, "```", ""]
    for title, figures in json.loads(facts["figures"]).items():
        if figures:
            sections += [f"## Figures: {title}", "", *_table("figure", "value", figures), ""]
    sections += ["## Agreement with the original encoder", "", checked.statement]
    if checked.padding:
        sections += [
            "",
            f"The padding was changed from TensorFlow's to the symmetric one: {checked.padding}.",
        ]
    return "\n".join(sections) + "\n"


def _table(left: str, right: str, rows: Mapping[str, object]) -> list[str]:
    body = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items()]
    return [f"| {left} | {right} |", "| --- | --- |", *body]
