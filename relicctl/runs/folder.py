"""A run's folder: what lies where, who may write to it, and how its records survive a kill."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from relicctl.core import atomic_io, checkpoint
from relicctl.errors import RunFailed, Terminated, UsageError
from relicctl.runs.status import Status


class RunFolder:
    """RUN/: config.yaml, status.json, metrics.jsonl, checkpoints/, encoder.safetensors, results.json.

    The folder is locked while this object lives: a second run into it is refused. Of several processes only the
    one with ``writer`` locks and writes.
    """

    def __init__(self, path: Path, *, keep: int, writer: bool) -> None:
        self.path, self._num_kept, self._is_writer = path, keep, writer
        self.resume_option = f"--resume {path}"  # how to go on, as errors say it
        self.config_path = path / "config.yaml"
        self.encoder_path = path / "encoder.safetensors"
        self.results_path = path / "results.json"
        self.bad_images_path = path / "bad_images.txt"
        self.curves_path = path / "curves.png"
        self.checkpoints_dir = path / "checkpoints"
        self._metrics_path = path / "metrics.jsonl"
        self._lock = _acquire_lock(path) if writer else None
        self._tensorboard: Any = None
        self.status = Status(None)  # writes nothing until the run is ``watched``
        if writer:
            self._clear_leftovers()

    @classmethod
    def create(cls, path: Path, *, overwrite: bool, keep: int, writer: bool = True) -> RunFolder:
        """A new, empty run folder. Raises UsageError when something is there already or it cannot be written."""
        if not writer:
            return cls(path, keep=keep, writer=False)
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
            raise UsageError(
                f"The run folder {path} cannot be written ({reason.strerror}).", "Choose another --out."
            ) from None

    @classmethod
    def reopen(cls, path: Path, *, keep: int, writer: bool = True) -> RunFolder:
        """The folder of a run that goes on. Raises UsageError when there is none."""
        if not (path / "config.yaml").is_file():
            raise UsageError(f"{path} is no run folder: it has no config.yaml.", "Give --resume the folder of a run.")
        return cls(path, keep=keep, writer=writer)

    def _clear_leftovers(self) -> None:
        """Remove the temporary files of a process that was killed while it wrote."""
        for path in (
            self.config_path,
            self.encoder_path,
            self.results_path,
            self.curves_path,
            self._metrics_path,
            self.path / "status.json",
        ):
            for left in self.path.glob(f".{path.name}.*.tmp"):
                left.unlink()
        for folder in (self.path, self.path / "stages", self.path / "features"):
            for left in folder.glob(".tmp*"):  # safetensors' own
                left.unlink()

    def close(self) -> None:
        """Let others write here."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextmanager
    def track_status(self) -> Iterator[Status]:
        """Keep status.json while the block runs, tell there how it ended, and close the folder.

        A signal that no training loop takes care of becomes an Interrupted that says what is saved.
        """
        self.status = Status(self.path / "status.json" if self._is_writer else None)
        self.status.add_skipped(len(self.read_bad_images()))
        last = checkpoint.list_checkpoints(self.checkpoints_dir)[-1:]
        for path in last:
            self.status.record_checkpoint(path, checkpoint.parse_step(path))
        self.status.start(checkpoint.parse_step(last[0]) if last else 0)
        try:
            yield self.status
        except (KeyboardInterrupt, Terminated) as stop:
            signum = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
            interrupted = self.status.make_interrupted(signum)
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
        """From now on metrics go to RUN/tensorboard too. Raises UsageError when TensorBoard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError(
                "runtime.tensorboard is true, but TensorBoard is not installed.", "pip install 'relicctl[tensorboard]'."
            ) from None
        if self._is_writer:
            self._tensorboard = SummaryWriter(str(self.path / "tensorboard"))

    def write_metrics(self, record: dict[str, Any]) -> None:
        """Append one JSON object to metrics.jsonl; what it says of the progress goes to status.json."""
        try:
            with open(self._metrics_path, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(record) + "\n")
        except OSError as reason:
            raise RunFailed(
                f"{self._metrics_path} cannot be written ({reason.strerror}).",
                f"Checkpoints are untouched: make room, then go on with {self.resume_option}.",
            ) from None
        if self._tensorboard is not None:
            for name, value in record.items():
                if name != "step":
                    self._tensorboard.add_scalar(name, value, record["step"])
        self.status.log(record)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All records so far; a last line that a kill cut short is left out."""
        if not self._metrics_path.exists():
            return []
        records = []
        for line in self._metrics_path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                break
            records.append(record)
        return records

    def truncate_metrics(self, step: int) -> None:
        """Forget records later than ``step``: a resumed run writes them again."""
        if not self._is_writer:
            return
        lines = [json.dumps(record) + "\n" for record in self.read_metrics() if record["step"] <= step]
        atomic_io.write_atomically(self._metrics_path, lambda temporary: temporary.write_text("".join(lines), "utf-8"))

    def save(self, step: int, tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
        """Write the checkpoint of ``step`` and remove old ones."""
        path = self.checkpoints_dir / checkpoint.format_checkpoint_name(step)
        try:
            checkpoint.save_checkpoint(path, tensors, header)
        except OSError as reason:
            raise RunFailed(
                f"The checkpoint {path} could not be written ({reason.strerror or reason}).",
                f"Earlier ones are untouched: make room, then go on with {self.resume_option}.",
            ) from None
        checkpoint.prune_checkpoints(self.checkpoints_dir, self._num_kept)
        self.status.record_checkpoint(path, step)

    def quarantine_after(self, step: int) -> None:
        """Rename checkpoints later than ``step``, which could not be read: none counts as the newest, none is lost."""
        for path in checkpoint.list_checkpoints(self.checkpoints_dir) if self._is_writer else []:
            if path.name > checkpoint.format_checkpoint_name(step):
                path.rename(path.with_name(f"{path.name}.unreadable"))

    def get_last_checkpoint(self) -> str | None:
        found = checkpoint.list_checkpoints(self.checkpoints_dir)
        return str(found[-1]) if found else None

    def delete(self) -> None:
        """Remove the folder of a run that was refused before it began."""
        self.status.disable()
        self.close()
        if self._is_writer:
            shutil.rmtree(self.path)

    def add_bad_image(self, name: str, reason: str) -> None:
        """Append to bad_images.txt: sample name, tab, what is wrong with it."""
        if self._is_writer:
            with open(self.bad_images_path, "a", encoding="utf-8") as handle:
                handle.write(f"{name}\t{' '.join(reason.split())}\n")
            self.status.add_skipped(1)

    def remove_bad_images(self, names: set[str]) -> None:
        """Take these samples out of bad_images.txt."""
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


LOCK_FILE = ".lock"


def check_overwrite(path: Path, *, overwrite: bool) -> None:
    """Raises UsageError when ``path`` is a file, or a folder with something in it that may not be overwritten."""
    try:
        path.lstat()
    except FileNotFoundError:
        return
    except OSError as reason:
        raise UsageError(
            f"The run folder {str(path)[:80]} cannot be written ({reason.strerror}).", "Choose another --out."
        ) from None
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, not a folder.", "Choose another --out.")
    occupied = path.is_dir() and not all(_is_leftover(child.name) for child in path.iterdir())
    if occupied and not overwrite:
        raise UsageError(
            f"The run folder {path} is not empty.",
            "Go on with --resume, choose another --out, or give --overwrite to delete the run that is there.",
        )
    if occupied and not (path / "config.yaml").is_file():
        raise UsageError(
            f"{path} is not empty and no run folder, so --overwrite will not delete it.",
            "Choose another --out.",
        )


def _is_leftover(name: str) -> bool:
    """Of a run that was killed before it had a config.yaml."""
    return name in (LOCK_FILE, "status.json") or (name.startswith(".") and name.endswith(".tmp"))


def find_free_name(parent: Path, name: str) -> Path:
    """``parent/name``, or the first of ``name-2``, ``name-3``, ... that does not exist yet."""
    path, number = parent / name, 1
    while path.exists():
        number += 1
        path = parent / f"{name}-{number}"
    return path


def _acquire_lock(path: Path) -> int:
    """Hold an advisory lock on the folder for the life of the process; the system drops it on any kind of death.

    POSIX locks are not inherited: data workers that outlive their parent for some seconds keep nobody out.
    """
    handle = os.open(path / LOCK_FILE, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise UsageError(
            f"Another process is writing to {path}.", "Wait for it to end, or choose another --out."
        ) from None
    return handle


def check_outside_data(out: Path, data: str | None) -> None:
    """A run's pictures must not become training images of its continuation."""
    folder = Path((data or "").partition("#")[0])
    if data and folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"The run folder {out} lies inside the data, {folder}.", "Choose another --out.")
