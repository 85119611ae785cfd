"""``open_dataset``: from the data set specs that users write to data sets.

photos/                         a folder tree; a .zip or a plain .tar
shards/{000..012}.tar           several of them as one: a range or a comma list in braces
photos.zip#train                only what lies in a folder of it
torchvision:DTD[:ROOT][#SPLIT]  a data set of torchvision by its class's name
shapes[:key=value,...]          the embedded demo data; ./shapes is a folder of that name
"""

from __future__ import annotations

import codecs
import difflib
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import PurePosixPath

import numpy as np

from relicctl.config.base import DecodingConfig
from relicctl.data.datasets.archives import (
    READABLE_METHODS,
    Container,
    Folder,
    Member,
    convert_os_errors,
    describe_method,
    normalize_file_name,
    open_container,
    split_spec,
)
from relicctl.data.datasets.base import DatasetSplit, FileDataset, ImageDataset, PackedNames, normalize_unicode
from relicctl.data.datasets.specs import expand_spec, join_spec, spell_splits
from relicctl.data.datasets.splits import find_mixed_splits, get_split
from relicctl.data.decoding import HEIF_EXTENSIONS, IMAGE_EXTENSIONS, USUAL_EXTENSIONS, Decoder
from relicctl.errors import DataError

# Pictures and archives, which somebody may take for images that are used; other kinds of files are no surprise.
_ARCHIVE_EXTENSIONS = {".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar"}
_UNREAD_EXTENSIONS = _ARCHIVE_EXTENSIONS | {
    *HEIF_EXTENSIONS, ".avif", ".jxl", ".psd", ".tga", ".pcx", ".svg", ".eps", ".ico", ".dds", ".exr", ".hdr", ".xcf",
    ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".raw", ".dcm", ".pfm", ".dib", ".qoi", ".sgi",
}  # fmt: skip


def infer_classes(names: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Return the sorted class names and the label of every name, int64 ``[N]``; ``(), None`` if unlabelled.

    The class is the first folder level. Folders that enclose everything are removed first: ``photos/cat/1.jpg``
    and ``photos/dog/2.jpg`` are a cat and a dog, and a single folder of images is no class. As soon as one
    image lies beside the class folders, the data count as unlabelled. Names that differ only in how Unicode composes
    a letter are one class.
    """
    _, folders = _split_top_folders(names)
    present = sorted(set(folders))
    if present[0] == "":
        return (), None
    classes: dict[str, str] = {}
    for folder in present:
        classes.setdefault(normalize_unicode(folder), folder)
    label = {name: number for number, name in enumerate(classes)}
    number = {folder: label[normalize_unicode(folder)] for folder in present}
    return tuple(classes.values()), np.array([number[folder] for folder in folders], dtype=np.int64)


def _split_top_folders(names: Sequence[str]) -> tuple[str, list[str]]:
    """Return the folder that encloses all ``names``, and for each the folder in it that holds it; "" for none."""
    enclosing = posixpath.commonpath({name.rpartition("/")[0] for name in names})
    start = len(enclosing) + 1 if enclosing else 0
    return enclosing, [name[start : name.find("/", start)] if "/" in name[start:] else "" for name in names]


def check_splits(names: Sequence[str], spec: str, warn: Callable[[str], None]) -> None:
    """Raise DataError if two of the class folders are splits such as train and test: together they would leak.

    Splits further down give a warning.
    """
    mixed = find_mixed_splits({name.rpartition("/")[0] for name in names})
    if not mixed:
        return
    enclosing, folders = _split_top_folders(names)
    if splits := mixed.get(enclosing):
        first = min(splits, key=lambda name: not name.lower().startswith("train"))
        others = set(folders).difference(splits)
        unless = "; if they are classes, rename them" if others else ""
        what = f"The folders of {spec} are splits, not classes: {', '.join(splits)}."
        place = join_spec(spec, posixpath.join(enclosing, first))
        raise DataError(what, f"Name one of them, for example {place}{unless}.")
    parent, splits = min(mixed.items())  # one says it all
    warn(f"{spec} mixes splits: the images of {' and '.join(splits)} in {parent} are used alike")


def open_dataset(
    spec: str,
    *,
    split: DatasetSplit = "train",
    download: bool = False,
    decoding: DecodingConfig = DecodingConfig(),  # noqa: B008 (immutable)
    warn: Callable[[str], None] = lambda text: None,
    class_folders: bool = True,
) -> ImageDataset:
    """Open the data set that ``spec`` names; the module's docstring lists the forms of specs.

    Args:
        spec: A folder, an archive, a data set of torchvision or the demo data.
        split: Which part of torchvision's data sets and of the demo data; other specs name it themselves.
        download: Whether torchvision may download what is missing.
        decoding: How image files are read.
        warn: Is called with a sentence about files that are not read, and whatever else one may not expect.
        class_folders: Whether the folders are meant to be classes, so that they may not be splits; they are not where
            images are taken from a list, or paired with masks.

    Returns:
        The data set. Its images are not read yet.

    Raises:
        DataError: For anything that cannot be used, with what to do about it.
    """
    dataset: ImageDataset
    kind, _, _ = spec.partition(":")
    if kind == "shapes":
        from relicctl.data.datasets.shapes import ShapesDataset

        dataset = ShapesDataset.from_spec(spec, split, warn)
    elif kind == "torchvision" and not os.path.exists(spec):
        from relicctl.data.datasets.torchvision import open_torchvision  # imports torch

        dataset = open_torchvision(spec, split, download)
    else:
        dataset = _open_files(spec, warn, class_folders)
    dataset.decode = Decoder(**decoding.model_dump())
    return dataset


def _open_files(spec: str, warn: Callable[[str], None], class_folders: bool) -> FileDataset:
    places = list(dict.fromkeys(map(split_spec, expand_spec(spec))))
    prefixes = _make_prefixes(places)
    containers: list[tuple[str, Container]] = []
    images: dict[str, tuple[str, int, Member]] = {}  # by name; of two members with one name the later counts
    others: Counter[str] = Counter()
    for number, (path, folder) in enumerate(places):
        container, entries, extensions = _index_container(path, folder)
        others += extensions
        containers.append((prefixes[number], container))
        images.update((prefixes[number] + name, (name, number, member)) for name, member in entries)
    names = sorted(images)  # the same order for the same files, however they are packed
    members = np.array([(images[name][1], *images[name][2]) for name in names], dtype=np.int64)
    dataset = FileDataset(spec, containers, PackedNames(names), members)
    inner_names = [images[name][0] for name in names]
    dataset.classes, dataset.labels = infer_classes(inner_names)
    if class_folders:
        check_splits(inner_names, spec, warn)
        _warn_unlabelled(dataset, inner_names, others[".cls"], warn)
    if unread := {extension: number for extension, number in others.items() if extension in _UNREAD_EXTENSIONS}:
        kinds = ", ".join(f"{number} {extension}" for extension, number in sorted(unread.items()))
        warn(f"{spec} has pictures or archives that are not read: {kinds}{_get_heif_hint(unread)}")
    return dataset


def _warn_unlabelled(dataset: FileDataset, names: Sequence[str], cls_files: int, warn: Callable[[str], None]) -> None:
    """Warn of what makes images unlabelled though they seem to have labels: a few beside class folders, .cls files."""
    if dataset.labels is not None:
        return
    _, folders = _split_top_folders(names)
    if len(set(folders)) > 2:
        stray = summarize_names([name for name, folder in zip(names, folders, strict=True) if not folder])
        warn(f"{dataset.spec} counts as unlabelled, as not all images are in class folders: {stray} lies beside them")
    if cls_files:
        warn(f"{dataset.spec} counts as unlabelled: the labels in its {cls_files} .cls files are not read")


def _make_prefixes(places: list[tuple[str, str]]) -> list[str]:
    """Return what distinguishes several places, without the path that they share; empty for a single one."""
    if len(places) == 1:
        return [""]
    full = [os.path.abspath(os.path.join(path, folder)) for path, folder in places]
    shared = os.path.commonpath([os.path.dirname(path) for path in full])
    return [os.path.relpath(path, shared).replace(os.sep, "/") + "/" for path in full]


def _index_container(path: str, folder: str) -> tuple[Container, list[tuple[str, Member]], Counter[str]]:
    """List the images at ``path``, or those in its ``folder``, named from there, and count the endings of other files.

    Raises DataError if there are no images, or none that can be unpacked.
    """
    if not os.path.exists(path):
        raise _make_missing_path_error(path)
    container = open_container(path)
    if folder and isinstance(container, Folder):
        container = Folder(_find_inner_folder(path, folder))
    files = list(container.iter_files())
    if folder and not isinstance(container, Folder):
        files = _select_inner_files(path, folder, files)
    entries = [entry for entry in files if is_image_name(entry[0])]
    others = Counter(posixpath.splitext(name)[1].lower() for name, _ in files if not is_image_name(name))
    if not entries:
        place = f"{path}{'#' * bool(folder)}{folder}"
        if isinstance(container, Folder) and not os.listdir(container.path):
            raise DataError(f"{place} is empty.", "Check the path, or put images there.")
        raise _make_no_images_error(path, place, others)
    methods = {member.method for _, member in entries}
    if methods.isdisjoint(READABLE_METHODS):
        what = f"The images in {path} are {describe_method(min(methods))}, which cannot be read."
        raise DataError(what, "Pack it again, without a password and without compression: zip -0 -r.")
    return container, entries, others


def is_image_name(name: str) -> bool:
    """Return whether a file is read as an image, by the ending of its name."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


def _find_inner_folder(path: str, folder: str) -> str:
    """Return the path of ``folder`` in the folder ``path``, however its name is composed. Raises DataError."""
    inner = path
    for part in folder.split("/"):
        if not os.path.isdir(os.path.join(inner, part)):
            with convert_os_errors(path), os.scandir(inner) as listing:
                folders = sorted(entry.name for entry in listing if os.path.isdir(entry.path))
            same = [name for name in folders if normalize_unicode(name) == normalize_unicode(part)]
            if len(same) != 1:
                raise _make_missing_folder_error(path, folder, folders if inner == path else [])
            part = same[0]
        inner = os.path.join(inner, part)
    return inner


def _select_inner_files(path: str, folder: str, files: list[tuple[str, Member]]) -> list[tuple[str, Member]]:
    """Return the files in ``folder`` of the archive ``path``, named from there. Raises DataError."""
    parents = {str(parent) for name, _ in files if is_image_name(name) for parent in PurePosixPath(name).parents}
    same = [name for name in parents if normalize_unicode(name) == normalize_unicode(folder)]
    start = f"{same[0] if folder not in parents and len(same) == 1 else folder}/"
    inside = [(name[len(start) :], member) for name, member in files if name.startswith(start)]
    if parents and not inside:
        raise _make_missing_folder_error(path, folder, sorted(parents - {"."}))
    return inside


def _make_no_images_error(path: str, place: str, others: Counter[str]) -> DataError:
    kinds = ", ".join(f"{extension} ({number})" for extension, number in others.most_common(3) if extension)
    what = f"{place} holds no images{f', but files that end in {kinds}' * bool(kinds)}."
    fix = f"Give a folder, .zip or .tar with files that end in {', '.join(USUAL_EXTENSIONS)}."
    if others.keys() & HEIF_EXTENSIONS:
        fix = "Install what reads HEIC: pip install 'relicctl[heif]'."
    elif archives := sorted(others.keys() & {".tar", ".zip"}):
        start, folder = ("Give", path) if os.path.isdir(path) else (f"Unpack {path}, and give", "FOLDER")
        fix = f"{start} the archives in it, several as {os.path.join(folder, '{a,b}')}{archives[0]}."
    return DataError(what, fix)


def _get_heif_hint(extensions: Iterable[str]) -> str:
    return "; pip install 'relicctl[heif]' to read HEIC" if HEIF_EXTENSIONS & set(extensions) else ""


def check_data_exists(spec: str) -> None:
    """Raise DataError where ``spec`` names a path that is not there; nothing is opened.

    Of a spec with ``{split}`` one split has to be there.
    """
    if spec.partition(":")[0] in ("shapes", "torchvision"):
        return
    for text in spell_splits(spec):
        missing = [path for path, _ in map(split_spec, expand_spec(text)) if not os.path.exists(path)]
        if not missing:
            return
    raise _make_missing_path_error(split_spec(spec)[0] if "{split}" in spec else missing[0])


def _make_missing_path_error(path: str) -> DataError:
    parent, name = os.path.split(path.rstrip("/"))
    siblings: list[str] = []
    with suppress(OSError):
        siblings = os.listdir(parent or ".")
    near = ", ".join(difflib.get_close_matches(name, siblings))
    fix = f"Check the path; near it are {near}." if near else "Check the path."
    return DataError(f"There is no folder or archive '{path}'.", fix)


def _make_missing_folder_error(path: str, folder: str, folders: list[str]) -> DataError:
    near = difflib.get_close_matches(folder, folders) or folders[:5]
    fix = f"Name one that holds images, such as {', '.join(near)}." if near else f"Give {path} alone."
    return DataError(f"{path} has no folder {folder}.", fix)


def list_folders(spec: str) -> list[str]:
    """Return the folders at the top of the folder or archive ``spec``, as paths in it; none if it cannot be opened.

    Where a single folder encloses everything and is no split by its name, they are those in it.
    """
    path, folder = split_spec(expand_spec(spec)[0])
    try:
        if os.path.isdir(path):
            list_level = partial(_list_subfolders, _find_inner_folder(path, folder) if folder else path)
        else:
            parents = {name.rpartition("/")[0] for name, _ in _index_container(path, folder)[1]}
            list_level = partial(_list_children, parents)
    except DataError:
        return []
    inner, names = "", list_level("")
    while len(names) == 1 and get_split(names[0]) is None:
        inner = posixpath.join(inner, names[0])
        names = list_level(inner)
    return [posixpath.join(inner, name) for name in names]


def _list_subfolders(path: str, inner: str) -> list[str]:
    names: list[str] = []
    with suppress(OSError), os.scandir(os.path.join(path, inner)) as listing:
        names = [entry.name for entry in listing if entry.is_dir() and normalize_file_name(entry.name)]
    return sorted(names)


def _list_children(folders: set[str], inner: str) -> list[str]:
    start = f"{inner}/" if inner else ""
    return sorted({folder[len(start) :].split("/")[0] for folder in folders if folder.startswith(start)} - {""})


def decode_text(content: bytes, errors: str = "strict") -> str:
    """Decode UTF-8, or what the byte order mark at the beginning says. Raises UnicodeDecodeError."""
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_utf16 else "utf-8-sig", errors)


def parse_first_words(content: bytes) -> list[str]:
    """Return the first word of every line that has one."""
    return [line.split()[0] for line in decode_text(content, "replace").splitlines() if line.strip()]


def summarize_names(names: list[str]) -> str:
    """Return their number and the first."""
    return f"{len(names)} ({names[0]} among them)" if len(names) > 1 else names[0]
