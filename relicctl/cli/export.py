"""``relicctl export``: options and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relicctl.cli import options as opt
from relicctl.cli.options import option, print_result

EXAMPLES = """\b
Examples:
  relicctl export runs/r50 --format torchvision --out r50.safetensors
  relicctl export runs/r50 --format timm --classifier runs/r50/linear-eval --out r50-timm
  relicctl pretrain --preset demo | relicctl export - --format onnx --out encoder.onnx"""


def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN|CHECKPOINT|WEIGHTS|-", help="The encoder; - reads a path from stdin.")
    ],
    format: Annotated[str, option("torchvision|timm|transformers|onnx|relicctl", "Target library.", "--format")],
    out: Annotated[Path, option("PATH", "File; for timm and transformers a folder.")],
    network: opt.NetworkChoice = "online",
    origin: Annotated[
        str, option("relicctl|deepmind", "Source format; deepmind: the authors' published .pkl.", "--from")
    ] = "relicctl",
    classifier: Annotated[
        Path | None, option("RUN", "Linear evaluation whose classifier is exported as the head.")
    ] = None,
    license: Annotated[str, option("NAME", "Licence of the weights, for the card.")] = "unspecified",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the export that --out holds.")] = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Export an encoder for another library and verify it there; prints its path."""
    from relicctl.commands import export as command

    options = command.ExportOptions(
        format=format, out=out, network=network, origin=origin, classifier=classifier, license=license,
        overwrite=overwrite, quiet=quiet,
    )  # fmt: skip
    result = command.export(source, options)
    print_result(result["path"], result if as_json else None)
