"""``relicctl export``: an encoder in another library's form, proven to give the same features there."""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from relicctl.console import Console
from relicctl.errors import RunFailed, UsageError
from relicctl.export import native, onnx, timm, torchvision, transformers
from relicctl.export.bundle import Bundle, load_head, with_symmetric_padding
from relicctl.export.card import Checked, model_card
from relicctl.export.place import hash_file, placed, refuse_occupied
from relicctl.export.verify import TOLERANCE, difference, padding_loss, sample_images
from relicctl.reference import Reference, open_deepmind, open_reference

FORMATS: dict[str, ModuleType] = {
    "relicctl": native,
    "torchvision": torchvision,
    "timm": timm,
    "transformers": transformers,
    "onnx": onnx,
}
ORIGINS = ("relicctl", "deepmind")


def export(
    source: str,
    *,
    format: str,
    out: Path,
    network: str = "online",
    origin: str = "relicctl",
    classifier: Path | None = None,
    license: str = "unspecified",
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write the encoder in ``format`` to ``out`` (for timm and transformers a folder), with a model card.

    ``source``: a run, a checkpoint, weights or ``-``; with ``origin`` ``deepmind`` a file of the authors.
    What was written is loaded again by the target library and compared on images before it takes its place.
    Returns ``path``, ``format``, ``network``, ``sha256``, ``largest_difference`` and ``verified_with`` (None
    if unverified), ``images``, ``padding_change``, ``card``, and ``load``, three lines of Python.
    Raises UsageError if the format cannot express the encoder, RunFailed if the features differ.
    """
    if origin not in ORIGINS:
        raise UsageError(f"There is no --from {origin}.", f"Give --from {' or '.join(ORIGINS)}.")
    target = find_format(format)
    refuse_occupied(out, folder=target.FOLDER, overwrite=overwrite)
    console = Console(quiet)
    reference = (
        open_deepmind(source) if origin == "deepmind" else open_reference(source, network=network, warn=console.warn)
    )
    bundle = make_bundle(reference, format, classifier, license)
    require(target.WRITES_WITH, format)
    missing = absent(target.READS_WITH)

    usage = target.usage(out, bundle)
    images, where = sample_images(reference)
    padding = None
    if bundle.encoder is not reference.encoder:
        padding = padding_loss(reference.encoder, bundle, images)
        console.warn(
            f"{format} pads symmetrically, this encoder was trained with padding `same`: {padding}, on {where}; "
            "--format onnx or relicctl keeps it exact"
        )
    with placed(out) as temporary, redirect_stdout(sys.stderr):  # libraries talk on stdout
        if target.FOLDER:
            temporary.mkdir()
        target.write(bundle, temporary)
        largest = None if missing else verified(target, temporary, bundle, images, format)
        sha256 = hash_file(temporary / target.WEIGHTS)
        if largest is None:
            statement = f"Not verified: {', '.join(missing)} was not installed."
            console.warn(f"the export is unverified: {pip(missing)} lets it be checked")
        else:
            library = f"{target.READS_WITH[0]} {version(target.READS_WITH[0])}"
            statement = f"Loaded with {library}: largest difference {largest:.1e} on {where}."
        card = out / "README.md" if target.FOLDER else out.with_name(f"{out.stem}.card.md")
        shown = target.usage(Path(out.name), bundle)  # a card travels, and not with this machine's folders
        text = model_card(out.stem, format, bundle, shown, Checked(sha256, statement, padding))
        if target.FOLDER:
            (temporary / "README.md").write_text(text, "utf-8")
    if not target.FOLDER:
        card.write_text(text, "utf-8")

    console.note(f"{statement}\nsha256 {sha256}\nTo load it:\n" + "\n".join(f"    {line}" for line in usage))
    return {
        "path": str(out),
        "format": format,
        "network": bundle.metadata["network"],
        "sha256": sha256,
        "largest_difference": largest,
        "images": where,
        "verified_with": None if largest is None else library,
        "padding_change": padding,
        "card": str(card),
        "load": usage,
    }


def find_format(name: str) -> ModuleType:
    if name not in FORMATS:
        raise UsageError(f"There is no export format {name!r}.", f"Give --format {' or '.join(FORMATS)}.")
    return FORMATS[name]


def make_bundle(reference: Reference, format: str, classifier: Path | None, license: str) -> Bundle:
    """What is written. Raises UsageError if ``format`` cannot express it.

    Padding other than PyTorch's is given up where it must be: the export then says what that costs.
    """
    encoder: Any = reference.encoder
    figures = {"pretraining": numbers(reference.results())}
    head = None
    if classifier is not None:
        head = load_head(classifier, encoder.feature_dim)
        results = (classifier if classifier.is_dir() else classifier.parent) / "results.json"
        figures["classifier"] = numbers(json.loads(results.read_text("utf-8"))) if results.is_file() else {}
    metadata = {
        "version": "unknown",
        "preset": "",
        "objective": "unknown",
        "network": "online",
        **encoder.metadata,
        "data_fingerprint": reference.record().get("data_fingerprint", ""),
        "figures": json.dumps(figures),
        "license": license,
    }
    bundle = Bundle(encoder, head, metadata)
    reason = FORMATS[format].refusal(bundle)
    if reason is not None:
        raise UsageError(
            f"This encoder cannot be exported as {format}: {reason}.",
            "Use --format onnx, or load it with relicctl.load_encoder.",
        )
    if encoder.padding == "same" and not FORMATS[format].KEEPS_PADDING:
        bundle = replace(
            bundle,
            encoder=with_symmetric_padding(encoder),
            metadata={**metadata, "padding": "symmetric", "trained_padding": "same"},
        )
    return bundle


def verified(target: ModuleType, path: Path, bundle: Bundle, images: Tensor, format: str) -> float:
    """The largest difference of what ``path`` gives in its library. Raises RunFailed if it is too large."""
    largest = difference(bundle(images), target.read(path, bundle)(images))
    if largest > TOLERANCE:
        raise RunFailed(
            f"The {format} export gives other features than the encoder: they differ by {largest:.1e}.",
            f"Nothing was written; another version of {target.READS_WITH[0]} may help.",
        )
    return largest


def require(libraries: tuple[str, ...], format: str) -> None:
    """Raises UsageError naming those that are not installed."""
    missing = absent(libraries)
    if missing:
        raise UsageError(
            f"Writing {format} takes {' and '.join(missing)}, which is not installed.", f"Run {pip(missing)}."
        )


def absent(libraries: tuple[str, ...]) -> list[str]:
    return [name for name in libraries if importlib.util.find_spec(name) is None]


def pip(libraries: list[str]) -> str:
    return f"pip install {' '.join(libraries)}"


def numbers(results: dict[str, Any]) -> dict[str, float]:
    """The figures among what a results.json says."""
    return {k: v for k, v in results.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
