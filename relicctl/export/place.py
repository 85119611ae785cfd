"""An export takes its place whole and proven, or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from relicctl.core.checkpoint import to_os_error
from relicctl.errors import RunFailed, UsageError

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
    """A temporary path beside ``out``; it replaces ``out`` when the block ends well, else it is removed."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if out.is_dir():
            shutil.rmtree(out)
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        reason = to_os_error(error) if isinstance(error, SafetensorError) else error
        if reason.errno is None:  # a library's own, about what is in the files
            raise error
        if reason.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFailed(f"The disk is full: {out} was not written.", "Make room, then do it again.") from None
        raise UsageError(f"{out} cannot be written ({reason.strerror or reason}).", "Choose another --out.") from None
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
