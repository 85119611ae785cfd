"""Files that are whole or not there: write to a temporary name, flush, rename."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``; rename it only when it is safely on the disk.

    Raises OSError when the disk refuses, also for safetensors, which has an error of its own for that.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_get_umask())  # safetensors makes files that their owner alone can read
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):
            raise to_os_error(error) from error
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def to_os_error(error: SafetensorError) -> OSError:
    """What safetensors says of a failed write (``I/O error: No space left on device (os error 28)``) as Python does."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


def _get_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
