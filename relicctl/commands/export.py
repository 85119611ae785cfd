"""``relicctl export``: an encoder in another library's format, verified to give the same features there."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from relicctl.console import Console
from relicctl.encoders.resolve import ResolvedEncoder, open_deepmind_encoder, open_trained_encoder
from relicctl.errors import RunFailed, UsageError
from relicctl.export import native, onnx, timm, torchvision, transformers, write
from relicctl.export.bundle import WEIGHTS_FILE, ExportBundle, load_head, to_symmetric_padding


@dataclass(frozen=True)
class Format:
    """A target library: the module that writes its form and computes with it, and the packages that this takes."""

    module: ModuleType
    read_packages: tuple[str, ...]
    write_packages: tuple[str, ...] = ()
    is_folder: bool = False
    keeps_same_padding: bool = False  # TensorFlow's


FORMATS = {
    "relicctl": Format(native, ("relicctl",), keeps_same_padding=True),
    "torchvision": Format(torchvision, ("torchvision",)),
    "timm": Format(timm, ("timm",), is_folder=True),
    "transformers": Format(transformers, ("transformers",), is_folder=True),
    "onnx": Format(onnx, ("onnxruntime",), ("onnx", "onnxscript"), keeps_same_padding=True),
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
    write.check_output_free(out, folder=target.is_folder, overwrite=options.overwrite)
    if options.origin == "deepmind":
        reference = open_deepmind_encoder(source)
    else:
        reference = open_trained_encoder(source, network=options.network, warn=console.warn)
    bundle = make_bundle(reference, options)
    if missing := find_missing_packages(target.write_packages):
        raise UsageError(
            f"Writing {format} takes {' and '.join(missing)}, which is not installed.",
            f"Run pip install {' '.join(missing)}.",
        )
    images, images_source = write.sample_images(reference)
    padding = None
    if bundle.encoder is not reference.encoder:
        padding = write.format_padding_change(reference.encoder, bundle, images)
        console.warn(
            f"{format} pads symmetrically, this encoder was trained with padding `same`: {padding}, on "
            f"{images_source}; --format onnx or relicctl keeps it exact"
        )
    card = out / "README.md" if target.is_folder else out.with_name(f"{out.stem}.card.md")
    with write.open_atomic_output(out) as temporary, redirect_stdout(sys.stderr):  # libraries print to stdout
        if target.is_folder:
            temporary.mkdir()
        target.module.write(bundle, temporary)
        max_difference, library, statement = verify_export(target, temporary, bundle, images, images_source)
        weights = temporary / WEIGHTS_FILE if target.is_folder else temporary
        sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
        agreement = [statement]
        if padding is not None:
            agreement.append(f"The padding was changed from TensorFlow's to the symmetric one: {padding}.")
        usage = target.module.format_usage(Path(out.name), bundle)  # a card is shared, without this machine's folders
        text = write.format_model_card(out.stem, format, bundle, usage, sha256, agreement)
        if target.is_folder:
            (temporary / card.name).write_text(text, "utf-8")
    if not target.is_folder:
        card.write_text(text, "utf-8")
    if library is None:
        packages = " ".join(find_missing_packages(target.read_packages))
        console.warn(f"the export is unverified: pip install {packages} lets it be checked")
    usage = target.module.format_usage(out, bundle)
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
    if reason := target.module.get_unsupported_reason(bundle):
        raise UsageError(
            f"This encoder cannot be exported as {options.format}: {reason}.",
            "Use --format onnx, or load it with relicctl.load_encoder.",
        )
    if encoder.padding == "same" and not target.keeps_same_padding:
        metadata |= {"padding": "symmetric", "trained_padding": "same"}
        return ExportBundle(to_symmetric_padding(encoder), head, metadata)
    return bundle


def verify_export(
    target: Format, path: Path, bundle: ExportBundle, images: Tensor, images_source: str
) -> tuple[float | None, str | None, str]:
    """Return the largest difference of what ``path`` gives in its library, the library, and a sentence about both.

    The first two are None if the library is not installed. Raises RunFailed if the difference is too large.
    """
    if missing := find_missing_packages(target.read_packages):
        return None, None, f"Not verified: {', '.join(missing)} was not installed."
    name = target.read_packages[0]
    with torch.inference_mode():
        outputs = target.module.compute_outputs(path, bundle, images)
    max_difference = write.compute_max_difference(bundle(images), outputs)
    if max_difference > write.TOLERANCE:
        raise RunFailed(
            f"The export gives other features in {name} than the encoder: they differ by {max_difference:.1e}.",
            f"Nothing was written; another version of {name} may help.",
        )
    library = f"{name} {version(name)}"
    statement = f"Loaded with {library}: largest difference {max_difference:.1e} on {images_source}."
    return max_difference, library, statement


def find_missing_packages(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def extract_numbers(results: dict[str, Any]) -> dict[str, float]:
    """Return the numbers among the values of a results.json."""
    return {k: v for k, v in results.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
