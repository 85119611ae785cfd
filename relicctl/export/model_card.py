"""The model card: what the weights are, how to load them, what they were measured to be worth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from relicctl.export.bundle import ExportBundle


@dataclass(frozen=True)
class Verification:
    """How an exported form was found to agree with the encoder it came from."""

    sha256: str  # of the file with the weights
    statement: str  # one sentence
    padding: str | None = None  # what a changed padding costs


def format_model_card(
    name: str, library: str, bundle: ExportBundle, usage: list[str], verification: Verification
) -> str:
    """Markdown, with the front matter that the Hugging Face hub reads."""
    metadata = bundle.metadata
    task = "image-classification" if bundle.head else "image-feature-extraction"
    origin = f"objective {metadata['objective']}" + (f", preset {metadata['preset']}" if metadata["preset"] else "")
    front = [
        f"library_name: {library}",
        f"pipeline_tag: {task}",
        "tags: [self-supervised-learning, relicctl]",
    ]
    if metadata["license"] != "unspecified":
        front.insert(0, f"license: {json.dumps(metadata['license'])}")
    rows = {
        "encoder": "{arch}, width {width}, {stem} stem, {padding} padding".format(**metadata),
        "network": metadata["network"],
        "features": str(bundle.feature_dim),
        "input": f"RGB, short side to {round(bundle.size / bundle.crop_ratio)} px (bicubic), "
        f"centre {bundle.size} px, scaled to [0, 1], mean {bundle.mean}, std {bundle.std}",
        "trained with": f"relicctl {metadata['version']}, {origin}",
        "data fingerprint": metadata["data_fingerprint"] or "unknown",
        "licence of the weights": metadata["license"],
        "sha256 of the weights": verification.sha256,
    }
    if bundle.head:
        rows["classes"] = f"{len(bundle.classes)}: {', '.join(bundle.classes[:20])}" + (
            ", ..." if len(bundle.classes) > 20 else ""
        )
    sections = ["---", *front, "---", "", f"# {name}", "", *_format_markdown_table("", "", rows), ""]
    sections += ["## Loading", "", "```python", *usage, "```", ""]
    for title, figures in json.loads(metadata["figures"]).items():
        if figures:
            sections += [f"## Figures: {title}", "", *_format_markdown_table("figure", "value", figures), ""]
    sections += ["## Agreement with the original encoder", "", verification.statement]
    if verification.padding:
        sections += [
            "",
            f"The padding was changed from TensorFlow's to the symmetric one: {verification.padding}.",
        ]
    return "\n".join(sections) + "\n"


def _format_markdown_table(left: str, right: str, rows: Mapping[str, object]) -> list[str]:
    body = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items()]
    return [f"| {left} | {right} |", "| --- | --- |", *body]
