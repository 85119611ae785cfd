"""``relicctl export``: an encoder in another library's format, verified to give the same features there."""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from relicctl.console import Console
from relicctl.encoders.resolve import ResolvedEncoder, open_deepmind_encoder, open_trained_encoder
from relicctl.errors import RunFailed, UsageError
from relicctl.export import native, onnx, timm, torchvision, transformers
from relicctl.export.bundle import WEIGHTS_FILE, ExportBundle, load_head, to_symmetric_padding
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


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is exported, and how; ``origin``: ``relicctl``, or ``deepmind`` for a file of the authors."""

    format: str
    out: Path  # for timm and transformers a folder
    network: str = "online"
    origin: str = "relicctl"
    classifier: Path | None = None
    license: str = "unspecified"
    overwrite: bool = False
    quiet: bool = False


def export(source: str, options: ExportOptions) -> dict[str, Any]:
    """Write the encoder of a run, a checkpoint, weights or ``-`` in another format, with a model card.

    What was written is loaded again by the target library and compared on images before it takes its place.
    Returns ``path``, ``format``, ``network``, ``sha256``, ``largest_difference`` and ``verified_with`` (None
    if unverified), ``images``, ``padding_change``, ``card``, and ``load``, three lines of Python.
    Raises UsageError if the format cannot express the encoder, RunFailed if the features differ.
    """
    format, out, console = options.format, options.out, Console(options.quiet)
    if options.origin not in ORIGINS:
        raise UsageError(f"There is no --from {options.origin}.", f"Give --from {' or '.join(ORIGINS)}.")
    if format not in FORMATS:
        raise UsageError(f"There is no export format {format!r}.", f"Give --format {' or '.join(FORMATS)}.")
    target = FORMATS[format]
    check_output_free(out, folder=target.IS_FOLDER, overwrite=options.overwrite)
    if options.origin == "deepmind":
        reference = open_deepmind_encoder(source)
    else:
        reference = open_trained_encoder(source, network=options.network, warn=console.warn)
    bundle = make_bundle(reference, options)
    if missing := find_missing_packages(target.WRITE_PACKAGES):
        raise UsageError(
            f"Writing {format} takes {' and '.join(missing)}, which is not installed.",
            f"Run pip install {' '.join(missing)}.",
        )
    images, images_source = sample_images(reference)
    padding = None
    if bundle.encoder is not reference.encoder:
        padding = format_padding_change(reference.encoder, bundle, images)
        console.warn(
            f"{format} pads symmetrically, this encoder was trained with padding `same`: {padding}, on "
            f"{images_source}; --format onnx or relicctl keeps it exact"
        )
    card = out / "README.md" if target.IS_FOLDER else out.with_name(f"{out.stem}.card.md")
    with open_atomic_output(out) as temporary, redirect_stdout(sys.stderr):  # libraries print to stdout
        if target.IS_FOLDER:
            temporary.mkdir()
        target.write(bundle, temporary)
        max_difference, library, statement = verify_export(target, temporary, bundle, images)
        if library is not None:
            statement = f"{statement} on {images_source}."
        sha256 = hash_file(temporary / WEIGHTS_FILE if target.IS_FOLDER else temporary)
        usage = target.format_usage(Path(out.name), bundle)  # a card is shared, without the folders of this machine
        text = format_model_card(out.stem, format, bundle, usage, Verification(sha256, statement, padding))
        if target.IS_FOLDER:
            (temporary / card.name).write_text(text, "utf-8")
    if not target.IS_FOLDER:
        card.write_text(text, "utf-8")
    if library is None:
        packages = " ".join(find_missing_packages(target.READ_PACKAGES))
        console.warn(f"the export is unverified: pip install {packages} lets it be checked")
    usage = target.format_usage(out, bundle)
    console.info(f"{statement}\nsha256 {sha256}\nTo load it:\n" + "\n".join(f"    {line}" for line in usage))
    return {
        "path": str(out),
        "format": format,
        "network": bundle.metadata["network"],
        "sha256": sha256,
        "largest_difference": max_difference,
        "images": images_source,
        "verified_with": library,
        "padding_change": padding,
        "card": str(card),
        "load": usage,
    }


def make_bundle(reference: ResolvedEncoder, options: ExportOptions) -> ExportBundle:
    """Return what is written: padded as PyTorch does, where the format must. UsageError if it cannot express it."""
    encoder: Any = reference.encoder
    classifier, target = options.classifier, FORMATS[options.format]
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
        "license": options.license,
    }
    bundle = ExportBundle(encoder, head, metadata)
    reason = target.get_unsupported_reason(bundle)
    if reason is not None:
        raise UsageError(
            f"This encoder cannot be exported as {options.format}: {reason}.",
            "Use --format onnx, or load it with relicctl.load_encoder.",
        )
    if encoder.padding == "same" and not target.KEEPS_SAME_PADDING:
        bundle = replace(
            bundle,
            encoder=to_symmetric_padding(encoder),
            metadata={**metadata, "padding": "symmetric", "trained_padding": "same"},
        )
    return bundle


def verify_export(
    target: ModuleType, path: Path, bundle: ExportBundle, images: Tensor
) -> tuple[float | None, str | None, str]:
    """Return the largest difference of what ``path`` gives in its library, the library, and a sentence about both.

    The first two are None if the library is not installed. Raises RunFailed if the difference is too large.
    """
    if missing := find_missing_packages(target.READ_PACKAGES):
        return None, None, f"Not verified: {', '.join(missing)} was not installed."
    name = target.READ_PACKAGES[0]
    max_difference = compute_max_difference(bundle(images), target.read(path, bundle)(images))
    if max_difference > TOLERANCE:
        raise RunFailed(
            f"The export gives other features in {name} than the encoder: they differ by {max_difference:.1e}.",
            f"Nothing was written; another version of {name} may help.",
        )
    library = f"{name} {version(name)}"
    return max_difference, library, f"Loaded with {library}: largest difference {max_difference:.1e}"


def find_missing_packages(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def extract_numbers(results: dict[str, Any]) -> dict[str, float]:
    """Return the numbers among the values of a results.json."""
    return {k: v for k, v in results.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
