"""A run's folder: its files, its lock, its metrics and checkpoints, and the checks before it is written."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from relicctl.core import atomic_io, checkpoint
from relicctl.data.datasets.specs import find_data_folders
from relicctl.errors import RunFailed, Terminated, UsageError
from relicctl.runs.status import Status

LOCK_FILE = ".lock"


class RunFolder:
    """RUN/: config.yaml, status.json, metrics.jsonl, checkpoints/, encoder.safetensors, results.json.

    The folder is locked until ``close``, so no second run can write to it. Use ``create`` or ``reopen``.

    Args:
        path: the folder, which exists.
        keep: how many of the newest checkpoints to keep.
        writer: whether this process locks the folder and writes there; only one rank of a run does.

    Raises:
        UsageError: another process is writing to the folder.
    """

    def __init__(self, path: Path, *, keep: int, writer: bool) -> None:
        self.path, self._max_checkpoints, self._is_writer = path, keep, writer
        self.resume_option = f"--resume {path}"  # how to resume, for error messages
        self.config_path = path / "config.yaml"
        self.encoder_path = path / "encoder.safetensors"
        self.results_path = path / "results.json"
        self.bad_images_path = path / "bad_images.txt"
        self.curves_path = path / "curves.png"
        self.checkpoints_dir = path / "checkpoints"
        self._metrics_path = path / "metrics.jsonl"
        self._lock = _acquire_lock(path) if writer else None
        self._tensorboard: Any = None
        self.status = Status(None)  # writes nothing until ``track_status``
        if writer:
            self._clear_leftovers()

    @classmethod
    def create(cls, path: Path, *, overwrite: bool, keep: int) -> RunFolder:
        """Create an empty run folder. Raises UsageError if something is there already or it cannot be written."""
        check_overwrite(path, overwrite=overwrite)
        try:
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, keep=keep, writer=True)
            if overwrite:
                for child in path.iterdir():
                    if child.is_dir() and not child.is_symlink():
                        shutil.rmtree(child)
                    elif child.name != LOCK_FILE:
                        child.unlink()
            return run
        except OSError as reason:
            raise _make_unwritable_error(path, reason) from None

    @classmethod
    def reopen(cls, path: Path, *, keep: int) -> RunFolder:
        """Open the folder of a run to resume. Raises UsageError if there is none."""
        check_is_run(path)
        return cls(path, keep=keep, writer=True)

    def _clear_leftovers(self) -> None:
        """Remove the temporary files of a process that was killed while it wrote."""
        files = (self.config_path, self.encoder_path, self.results_path, self.curves_path, self._metrics_path)
        names = [*(file.name for file in files), "status.json"]  # not of others: an export may be writing here too
        patterns = [f".{name}.*.tmp" for name in names]
        patterns += [".tmp*", "stages/.tmp*", "features/.tmp*"]  # written by safetensors
        for temporary in [path for pattern in patterns for path in self.path.glob(pattern)]:
            temporary.unlink()

    def close(self) -> None:
        """Release the lock."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextmanager
    def track_status(self) -> Iterator[Status]:
        """Write status.json while the block runs and when it ends, and close the folder.

        A signal that no training loop handles becomes an Interrupted that says what is saved.
        """
        self.status = Status(self.path / "status.json" if self._is_writer else None)
        self.status.add_skipped(len(self.read_bad_images()))
        paths = checkpoint.list_checkpoints(self.checkpoints_dir)
        step = checkpoint.parse_step(paths[-1]) if paths else 0
        if paths:
            self.status.record_checkpoint(paths[-1], step)
        self.status.start(step)
        try:
            yield self.status
        except (KeyboardInterrupt, Terminated) as stop:
            number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
            interrupted = self.status.make_interrupted(number)
            self.status.finish(interrupted)
            raise interrupted from None
        except BaseException as error:
            self.status.finish(error)
            raise
        else:
            self.status.finish(None)
        finally:
            self.close()

    def start_tensorboard(self) -> None:
        """Write metrics to RUN/tensorboard too from now on. Raises UsageError if TensorBoard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            what = "runtime.tensorboard is true, but TensorBoard is not installed."
            raise UsageError(what, "pip install 'relicctl[tensorboard]'.") from None
        if self._is_writer:
            self._tensorboard = SummaryWriter(str(self.path / "tensorboard"))

    def write_metrics(self, record: dict[str, Any]) -> None:
        """Append one JSON object to metrics.jsonl, and update status.json with its progress."""
        try:
            with open(self._metrics_path, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(record) + "\n")
        except OSError as reason:
            fix = f"Checkpoints are untouched: free some space, then resume with {self.resume_option}."
            raise RunFailed(f"{self._metrics_path} cannot be written ({reason.strerror}).", fix) from None
        if self._tensorboard is not None:
            for name, value in record.items():
                if name != "step":
                    self._tensorboard.add_scalar(name, value, record["step"])
        self.status.log(record)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return all records so far, without a last line that was cut short when the process was killed."""
        if not self._metrics_path.exists():
            return []
        records = []
        with suppress(ValueError, RecursionError):
            for line in self._metrics_path.read_text(encoding="utf-8", errors="replace").splitlines():
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                    break
                records.append(record)
        return records

    def truncate_metrics(self, step: int) -> None:
        """Remove records later than ``step``: a resumed run writes them again."""
        lines = [json.dumps(record) + "\n" for record in self.read_metrics() if record["step"] <= step]
        self.write_text(self._metrics_path, "".join(lines))

    def save(self, step: int, tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
        """Write the checkpoint of ``step`` and remove old ones."""
        path = self.checkpoints_dir / checkpoint.format_checkpoint_name(step)
        try:
            checkpoint.save_checkpoint(path, tensors, header)
        except OSError as reason:
            fix = f"Earlier ones are untouched: free some space, then resume with {self.resume_option}."
            what = f"The checkpoint {path} could not be written ({reason.strerror or reason})."
            raise RunFailed(what, fix) from None
        checkpoint.prune_checkpoints(self.checkpoints_dir, self._max_checkpoints)
        self.status.record_checkpoint(path, step)

    def quarantine_after(self, step: int) -> None:
        """Rename checkpoints later than ``step``, which could not be read, so that they no longer count."""
        for path in checkpoint.list_checkpoints(self.checkpoints_dir) if self._is_writer else []:
            if path.name > checkpoint.format_checkpoint_name(step):
                path.rename(path.with_name(f"{path.name}.unreadable"))

    def get_last_checkpoint(self) -> str | None:
        paths = checkpoint.list_checkpoints(self.checkpoints_dir)
        return str(paths[-1]) if paths else None

    def delete(self) -> None:
        """Delete the folder of a run that failed its checks before training."""
        self.status = Status(None)
        self.close()
        if self._is_writer:
            shutil.rmtree(self.path)

    def add_bad_image(self, name: str, reason: str) -> None:
        """Append to bad_images.txt: sample name, tab, reason."""
        if self._is_writer:
            with open(self.bad_images_path, "a", encoding="utf-8") as handle:
                handle.write(f"{name}\t{' '.join(reason.split())}\n")
            self.status.add_skipped(1)

    def remove_bad_images(self, names: set[str]) -> None:
        """Remove these samples from bad_images.txt."""
        lines = self.bad_images_path.read_text("utf-8").splitlines(keepends=True)
        self.write_text(self.bad_images_path, "".join(line for line in lines if line.split("\t")[0] not in names))
        self.status.add_skipped(-len(names))

    def read_bad_images(self) -> set[str]:
        if not self.bad_images_path.exists():
            return set()
        return {line.split("\t")[0] for line in self.bad_images_path.read_text("utf-8").splitlines()}

    def write_text(self, path: Path, text: str) -> None:
        if self._is_writer:
            atomic_io.write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))

    def write_json(self, path: Path, content: dict[str, Any]) -> None:
        self.write_text(path, json.dumps(content, indent=2) + "\n")


def check_is_run(path: Path) -> None:
    """Raise UsageError unless ``path`` is the folder of a run."""
    if not (path / "config.yaml").is_file():
        raise UsageError(f"{path} is not a run folder: it has no config.yaml.", "Give --resume the folder of a run.")


def check_overwrite(path: Path, *, overwrite: bool) -> None:
    """Raise UsageError if ``path`` is a file, or a folder with content that must not be overwritten."""
    try:
        path.lstat()
    except FileNotFoundError:
        return
    except OSError as reason:
        raise _make_unwritable_error(str(path)[:80], reason) from None
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, not a folder.", "Choose another --out.")
    occupied = path.is_dir() and not all(_is_leftover(child.name) for child in path.iterdir())
    if occupied and not overwrite:
        fix = "Use --resume to continue, choose another --out, or give --overwrite to delete the run that is there."
        raise UsageError(f"The run folder {path} is not empty.", fix)
    if occupied and not (path / "config.yaml").is_file():
        what = f"{path} is not empty and not a run folder, so --overwrite will not delete it."
        raise UsageError(what, "Choose another --out.")


def _make_unwritable_error(path: Path | str, reason: OSError) -> UsageError:
    return UsageError(f"The run folder {path} cannot be written ({reason.strerror}).", "Choose another --out.")


def _is_leftover(name: str) -> bool:
    """Whether a file was left by a run that was killed before it had a config.yaml."""
    return name in (LOCK_FILE, "status.json") or (name.startswith(".") and name.endswith(".tmp"))


def find_free_name(parent: Path, name: str) -> Path:
    """Return ``parent/name``, or the first of ``name-2``, ``name-3``, ... that does not exist yet."""
    path, number = parent / name, 1
    while path.exists():
        number += 1
        path = parent / f"{name}-{number}"
    return path


def _acquire_lock(path: Path) -> int:
    """Take an advisory lock on the folder; the system releases it however the process ends.

    POSIX locks are not inherited: data workers that outlive their parent for some seconds block nobody.
    """
    handle = os.open(path / LOCK_FILE, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        what = f"Another process is writing to {path}."
        raise UsageError(what, "Wait for it to end, or choose another --out.") from None
    return handle


def check_outside_data(out: Path, specs: Iterable[str | None]) -> None:
    """Raise UsageError if ``out`` lies inside a folder of the data: a run's pictures would be taken for its images."""
    for spec in filter(None, specs):
        for folder in find_data_folders(spec):
            if out.resolve().is_relative_to(Path(folder).resolve()):
                raise UsageError(f"The run folder {out} lies inside the data ({folder}).", "Choose another --out.")
