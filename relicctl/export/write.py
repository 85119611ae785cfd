"""Write an export: verified on images in float32, with a model card, in place whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from relicctl.config.base import DecodingConfig, list_specs
from relicctl.config.resolve import load_run_config
from relicctl.core.atomic_io import to_os_error
from relicctl.data.datasets.joined import open_joined_dataset
from relicctl.data.decoding import load_or_next
from relicctl.encoders.resolve import ResolvedEncoder
from relicctl.errors import RelicError, RunFailed, UsageError
from relicctl.export.bundle import EncoderOutputs, ExportBundle

TOLERANCE = 1e-4  # of the largest feature where that is above 1: float32 keeps no fixed number of decimals
NUM_IMAGES = 4


def sample_images(reference: ResolvedEncoder) -> tuple[Tensor, str]:
    """Return prepared images ``[4, 3, s, s]`` and where they are from: the run's data, else the demo data."""
    transform: Any = reference.encoder.transform
    run = reference.run
    if run is not None and (run / "config.yaml").is_file():
        try:
            data = load_run_config(run / "config.yaml").data
            for specs, split in ((list_specs(data.val), "val"), (list_specs(data.train), "train")):
                if specs:
                    images = _load_sample_images(transform, specs, split, data.decoding)
                    return images, f"{NUM_IMAGES} images of {', '.join(specs)}"
        except RelicError:
            pass  # moved, or of another machine
    images = _load_sample_images(transform, ("shapes",), "val", DecodingConfig())
    return images, f"{NUM_IMAGES} images of the demo data, as the run's data cannot be read here"


def compute_max_difference(expected: EncoderOutputs, actual: EncoderOutputs) -> float:
    """Return the largest absolute difference of features and logits, each over max(1, its largest value)."""
    assert (expected.logits is None) == (actual.logits is None)
    pairs = [(a, b) for a, b in zip(expected, actual, strict=True) if a is not None and b is not None]
    assert all(a.shape == b.shape for a, b in pairs), [(a.shape, b.shape) for a, b in pairs]
    largest = max(float((a - b).abs().max() / a.abs().max().clamp_min(1.0)) for a, b in pairs)
    return largest if np.isfinite(largest) else float("inf")


def format_padding_change(original: torch.nn.Module, changed: ExportBundle, images: Tensor) -> str:
    """Say how far features move when TensorFlow's padding is replaced by the symmetric one."""
    with torch.inference_mode():
        before, after = original(images), changed.encoder(images)
    cosine = torch.nn.functional.cosine_similarity(before, after).mean()
    relative = (before - after).norm(dim=1) / before.norm(dim=1)
    return f"mean cosine {cosine:.4f} to the original features, mean relative difference {relative.mean():.1%}"


def _load_sample_images(
    transform: Callable[[Any], Tensor], specs: tuple[str, ...], split: Any, decoding: DecodingConfig
) -> Tensor:
    source = open_joined_dataset(specs, split=split, decoding=decoding)
    chosen = np.linspace(0, len(source) - 1, NUM_IMAGES).astype(int)
    return torch.stack([transform(load_or_next(source, int(index))[0]) for index in chosen])


# what an exported folder may hold: --overwrite deletes no folder with anything else in it
EXPORT_FILES = {"README.md", "config.json", "preprocessor_config.json", "model.safetensors"}


def check_output_free(out: Path, *, folder: bool, overwrite: bool) -> None:
    """Raises UsageError when ``out`` exists, unless it is an earlier export that may be overwritten."""
    fix = "Choose another --out."
    if folder and out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, and this format is a folder.", fix)
    if not folder and out.is_dir():
        raise UsageError(f"{out} is a folder, and this format is a file.", "Give --out a file name.")
    existing = {child.name for child in out.iterdir()} if out.is_dir() else set()
    if (existing or out.is_file()) and not overwrite:
        raise UsageError(f"{out} exists already.", "Choose another --out, or give --overwrite to replace it.")
    if not existing <= EXPORT_FILES:
        raise UsageError(f"{out} holds more than an export, so --overwrite will not delete it.", fix)


@contextmanager
def open_atomic_output(out: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``out``; it replaces ``out`` when the block ends well, else it is removed."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if out.is_dir():
            shutil.rmtree(out)
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        reason = to_os_error(error) if isinstance(error, SafetensorError) else error
        if reason.errno is None:  # raised by a library about the files' content
            raise error
        if reason.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFailed(f"The disk is full: {out} was not written.", "Make room, then do it again.") from None
        raise UsageError(f"{out} cannot be written ({reason.strerror or reason}).", "Choose another --out.") from None
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def format_model_card(
    name: str, library: str, bundle: ExportBundle, usage: list[str], sha256: str, agreement: list[str]
) -> str:
    """Return Markdown, with the front matter that the Hugging Face hub reads; ``agreement``: one or more paragraphs."""
    metadata = bundle.metadata
    task = "image-classification" if bundle.head else "image-feature-extraction"
    origin = f"objective {metadata['objective']}" + (f", preset {metadata['preset']}" if metadata["preset"] else "")
    front = [f"library_name: {library}", f"pipeline_tag: {task}", "tags: [self-supervised-learning, relicctl]"]
    if metadata["license"] != "unspecified":
        front.insert(0, f"license: {json.dumps(metadata['license'])}")
    rows = {
        "encoder": "{arch}, width {width}, {stem} stem, {padding} padding".format(**metadata),
        "network": metadata["network"],
        "features": str(bundle.encoder.feature_dim),
        "input": f"RGB, short side to {round(bundle.size / bundle.crop_ratio)} px (bicubic), "
        f"centre {bundle.size} px, scaled to [0, 1], mean {bundle.mean}, std {bundle.std}",
        "pixels": "upright by EXIF orientation, transparency composited on white, 16 bits scaled to 8 "
        f"({metadata.get('white_point', 'the largest value')} becomes white); other libraries do not do this by "
        "themselves",
        "trained with": f"relicctl {metadata['version']}, {origin}",
        "data fingerprint": metadata["data_fingerprint"] or "unknown",
        "licence of the weights": metadata["license"],
        "sha256 of the weights": sha256,
    }
    if bundle.head:
        names = [*bundle.classes[:20], *(["..."] if len(bundle.classes) > 20 else [])]
        rows["classes"] = f"{len(bundle.classes)}: {', '.join(names)}"
    sections = ["---", *front, "---", "", f"# {name}", "", *_format_markdown_table("", "", rows), ""]
    sections += ["## Loading", "", "```python", *usage, "```", ""]
    for title, figures in json.loads(metadata["figures"]).items():
        if figures:
            sections += [f"## Figures: {title}", "", *_format_markdown_table("figure", "value", figures), ""]
    sections += ["## Agreement with the original encoder", "", "\n\n".join(agreement)]
    return "\n".join(sections) + "\n"


def _format_markdown_table(left: str, right: str, rows: Mapping[str, object]) -> list[str]:
    body = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items()]
    return [f"| {left} | {right} |", "| --- | --- |", *body]
