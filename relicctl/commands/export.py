"""``relicctl export``: an encoder in another library's form, proven to give the same features there."""

from __future__ import annotations

import importlib
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
from relicctl.encoders.resolve import ResolvedEncoder, open_deepmind_encoder, open_trained_encoder
from relicctl.errors import RunFailed, UsageError
from relicctl.export import native, onnx, timm, torchvision, transformers
from relicctl.export.bundle import ExportBundle, load_head, to_symmetric_padding
from relicctl.export.write import (
    TOLERANCE,
    Verification,
    check_output_free,
    compute_max_difference,
    format_model_card,
    format_padding_change,
    hash_file,
    open_atomic_output,
    sample_images,
)

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
    check_output_free(out, folder=target.IS_FOLDER, overwrite=overwrite)
    console = Console(quiet)
    reference = (
        open_deepmind_encoder(source)
        if origin == "deepmind"
        else open_trained_encoder(source, network=network, warn=console.warn)
    )
    bundle = make_bundle(reference, format, classifier, license)
    check_packages(target.WRITE_PACKAGES, format)
    missing = find_missing_packages(target.READ_PACKAGES)

    usage = target.format_usage(out, bundle)
    images, images_source = sample_images(reference)
    padding = None
    if bundle.encoder is not reference.encoder:
        padding = format_padding_change(reference.encoder, bundle, images)
        console.warn(
            f"{format} pads symmetrically, this encoder was trained with padding `same`: {padding}, on "
            f"{images_source}; "
            "--format onnx or relicctl keeps it exact"
        )
    with open_atomic_output(out) as temporary, redirect_stdout(sys.stderr):  # libraries talk on stdout
        if target.IS_FOLDER:
            temporary.mkdir()
        target.write(bundle, temporary)
        max_difference = None if missing else verify_export(target, temporary, bundle, images, format)
        sha256 = hash_file(temporary / target.WEIGHTS_FILE)
        if max_difference is None:
            statement = f"Not verified: {', '.join(missing)} was not installed."
            console.warn(f"the export is unverified: {format_pip_command(missing)} lets it be checked")
        else:
            library = f"{target.READ_PACKAGES[0]} {version(target.READ_PACKAGES[0])}"
            statement = f"Loaded with {library}: largest difference {max_difference:.1e} on {images_source}."
        card = out / "README.md" if target.IS_FOLDER else out.with_name(f"{out.stem}.card.md")
        card_usage = target.format_usage(Path(out.name), bundle)  # a card travels, and not with this machine's folders
        text = format_model_card(out.stem, format, bundle, card_usage, Verification(sha256, statement, padding))
        if target.IS_FOLDER:
            (temporary / "README.md").write_text(text, "utf-8")
    if not target.IS_FOLDER:
        card.write_text(text, "utf-8")

    console.info(f"{statement}\nsha256 {sha256}\nTo load it:\n" + "\n".join(f"    {line}" for line in usage))
    return {
        "path": str(out),
        "format": format,
        "network": bundle.metadata["network"],
        "sha256": sha256,
        "largest_difference": max_difference,
        "images": images_source,
        "verified_with": None if max_difference is None else library,
        "padding_change": padding,
        "card": str(card),
        "load": usage,
    }


def find_format(name: str) -> ModuleType:
    if name not in FORMATS:
        raise UsageError(f"There is no export format {name!r}.", f"Give --format {' or '.join(FORMATS)}.")
    return FORMATS[name]


def make_bundle(reference: ResolvedEncoder, format: str, classifier: Path | None, license: str) -> ExportBundle:
    """What is written. Raises UsageError if ``format`` cannot express it.

    Padding other than PyTorch's is given up where it must be: the export then says what that costs.
    """
    encoder: Any = reference.encoder
    figures = {"pretraining": extract_numbers(reference.load_results())}
    head = None
    if classifier is not None:
        head = load_head(classifier, encoder.feature_dim)
        results = (classifier if classifier.is_dir() else classifier.parent) / "results.json"
        figures["classifier"] = extract_numbers(json.loads(results.read_text("utf-8"))) if results.is_file() else {}
    metadata = {
        "version": "unknown",
        "preset": "",
        "objective": "unknown",
        "network": "online",
        **encoder.metadata,
        "data_fingerprint": reference.load_record().get("data_fingerprint", ""),
        "figures": json.dumps(figures),
        "license": license,
    }
    bundle = ExportBundle(encoder, head, metadata)
    reason = FORMATS[format].get_unsupported_reason(bundle)
    if reason is not None:
        raise UsageError(
            f"This encoder cannot be exported as {format}: {reason}.",
            "Use --format onnx, or load it with relicctl.load_encoder.",
        )
    if encoder.padding == "same" and not FORMATS[format].KEEPS_SAME_PADDING:
        bundle = replace(
            bundle,
            encoder=to_symmetric_padding(encoder),
            metadata={**metadata, "padding": "symmetric", "trained_padding": "same"},
        )
    return bundle


def verify_export(target: ModuleType, path: Path, bundle: ExportBundle, images: Tensor, format: str) -> float:
    """The largest difference of what ``path`` gives in its library. Raises RunFailed if it is too large."""
    max_difference = compute_max_difference(bundle(images), target.read(path, bundle)(images))
    if max_difference > TOLERANCE:
        raise RunFailed(
            f"The {format} export gives other features than the encoder: they differ by {max_difference:.1e}.",
            f"Nothing was written; another version of {target.READ_PACKAGES[0]} may help.",
        )
    return max_difference


def check_packages(libraries: tuple[str, ...], format: str) -> None:
    """Raises UsageError naming those that are not installed."""
    missing = find_missing_packages(libraries)
    if missing:
        raise UsageError(
            f"Writing {format} takes {' and '.join(missing)}, which is not installed.",
            f"Run {format_pip_command(missing)}.",
        )


def find_missing_packages(libraries: tuple[str, ...]) -> list[str]:
    return [name for name in libraries if importlib.util.find_spec(name) is None]


def format_pip_command(libraries: list[str]) -> str:
    return f"pip install {' '.join(libraries)}"


def extract_numbers(results: dict[str, Any]) -> dict[str, float]:
    """The figures among what a results.json says."""
    return {k: v for k, v in results.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
