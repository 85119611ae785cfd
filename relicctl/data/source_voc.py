"""PASCAL VOC as torchvision fetches it: ``torchvision:VOCDetection[:ROOT]#YEAR``."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout

from torchvision import datasets
from torchvision.datasets.voc import DATASET_YEAR_DICT

from relicctl.data.source_torchvision import DEFAULT_ROOT, make_unavailable_error
from relicctl.errors import DataError


def find_voc_folder(spec: str, download: bool) -> str | None:
    """The year's folder with JPEGImages, Annotations and ImageSets; None for what is not torchvision's VOCDetection.

    Raises DataError when no year is told, or its lists (of 2007 also the one of its test images) are not there.
    """
    place, _, year = spec.partition("#")
    kind, name, root = [*place.split(":", 2), "", ""][:3]
    if (kind, name) != ("torchvision", "VOCDetection"):
        return None
    years = [known for known in DATASET_YEAR_DICT if known.isdecimal()]
    if year not in years:
        raise DataError(
            f"{spec} does not name a year of VOC alone.",
            f"Write torchvision:VOCDetection#2007, or another of {', '.join(sorted(years))}.",
        )
    root = os.path.abspath(os.path.expanduser(root or DEFAULT_ROOT))
    folder = os.path.join(root, DATASET_YEAR_DICT[year]["base_dir"])
    for part in ("trainval", "test") if year == "2007" else ("trainval",):
        if os.path.isfile(os.path.join(folder, "ImageSets", "Main", f"{part}.txt")):
            continue  # torchvision would unpack it again
        try:
            with redirect_stdout(sys.stderr):
                datasets.VOCDetection(root, year=year, image_set=part, download=download)
        except (RuntimeError, OSError) as error:
            raise make_unavailable_error(name, root, True, download, error) from error
    return folder
