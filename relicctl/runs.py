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

from relicctl.core import checkpoint
from relicctl.errors import RunFailed, Terminated, UsageError
from relicctl.status import Status


class RunFolder:
    """RUN/: config.yaml, status.json, metrics.jsonl, checkpoints/, encoder.safetensors, results.json.

    The folder is locked while this object lives: a second run into it is refused. Of several processes only the
    one with ``writer`` locks and writes.
    """

    def __init__(self, path: Path, *, keep: int, writer: bool) -> None:
        self.path, self._keep, self._writer = path, keep, writer
        self.resume = f"--resume {path}"  # how to go on, as errors say it
        self.config = path / "config.yaml"
        self.encoder = path / "encoder.safetensors"
        self.results = path / "results.json"
        self.bad_images = path / "bad_images.txt"
        self.curves = path / "curves.png"
        self.checkpoints = path / "checkpoints"
        self._metrics = path / "metrics.jsonl"
        self._lock = _lock(path) if writer else None
        self._board: Any = None
        self.status = Status(None)  # writes nothing until the run is ``watched``
        if writer:
            self._clear_leftovers()

    @classmethod
    def create(cls, path: Path, *, overwrite: bool, keep: int, writer: bool = True) -> RunFolder:
        """A new, empty run folder. Raises UsageError when something is there already or it cannot be written."""
        if not writer:
            return cls(path, keep=keep, writer=False)
        refuse_occupied(path, overwrite=overwrite)
        try:
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, keep=keep, writer=True)
            if overwrite:
                for child in path.iterdir():
                    if child.is_dir() and not child.is_symlink():
                        shutil.rmtree(child)
                    elif child.name != LOCK:
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
        for own in (self.config, self.encoder, self.results, self.curves, self._metrics, self.path / "status.json"):
            for left in self.path.glob(f".{own.name}.*.tmp"):
                left.unlink()
        for folder in (self.path, self.path / "stages", self.path / "features"):
            for left in folder.glob(".tmp*"):  # safetensors' own
                left.unlink()

    def close(self) -> None:
        """Let others write here."""
        if self._board is not None:
            self._board.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextmanager
    def watched(self) -> Iterator[Status]:
        """Keep status.json while the block runs, tell there how it ended, and close the folder.

        A signal that no training loop takes care of becomes an Interrupted that says what is saved.
        """
        self.status = Status(self.path / "status.json" if self._writer else None)
        self.status.skipped(len(self.read_bad_images()))
        last = checkpoint.listed(self.checkpoints)[-1:]
        for path in last:
            self.status.saved(path, checkpoint.step_of(path))
        self.status.begin(checkpoint.step_of(last[0]) if last else 0)
        try:
            yield self.status
        except (KeyboardInterrupt, Terminated) as stop:
            signum = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
            interrupted = self.status.interruption(signum)
            self.status.end(interrupted)
            raise interrupted from None
        except BaseException as error:
            self.status.end(error)
            raise
        else:
            self.status.end(None)
        finally:
            self.close()

    def write_tensorboard(self) -> None:
        """From now on metrics go to RUN/tensorboard too. Raises UsageError when TensorBoard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError(
                "runtime.tensorboard is true, but TensorBoard is not installed.", "pip install 'relicctl[tensorboard]'."
            ) from None
        if self._writer:
            self._board = SummaryWriter(str(self.path / "tensorboard"))

    def metrics(self, record: dict[str, Any]) -> None:
        """Append one JSON object to metrics.jsonl; what it says of the progress goes to status.json."""
        try:
            with open(self._metrics, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(record) + "\n")
        except OSError as reason:
            raise RunFailed(
                f"{self._metrics} cannot be written ({reason.strerror}).",
                f"Checkpoints are untouched: make room, then go on with {self.resume}.",
            ) from None
        if self._board is not None:
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, value, record["step"])
        self.status.log(record)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All records so far; a last line that a kill cut short is left out."""
        if not self._metrics.exists():
            return []
        records = []
        for line in self._metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                break
            records.append(record)
        return records

    def rewind_metrics(self, step: int) -> None:
        """Forget records later than ``step``: a resumed run writes them again."""
        if not self._writer:
            return
        lines = [json.dumps(record) + "\n" for record in self.read_metrics() if record["step"] <= step]
        checkpoint.atomically(self._metrics, lambda temporary: temporary.write_text("".join(lines), "utf-8"))

    def save(self, step: int, tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
        """Write the checkpoint of ``step`` and remove old ones."""
        path = self.checkpoints / checkpoint.file_name(step)
        try:
            checkpoint.save(path, tensors, header)
        except OSError as reason:
            raise RunFailed(
                f"The checkpoint {path} could not be written ({reason.strerror or reason}).",
                f"Earlier ones are untouched: make room, then go on with {self.resume}.",
            ) from None
        checkpoint.prune(self.checkpoints, self._keep)
        self.status.saved(path, step)

    def set_aside(self, step: int) -> None:
        """Rename checkpoints later than ``step``, which could not be read: none counts as the newest, none is lost."""
        for path in checkpoint.listed(self.checkpoints) if self._writer else []:
            if path.name > checkpoint.file_name(step):
                path.rename(path.with_name(f"{path.name}.unreadable"))

    def last_checkpoint(self) -> str | None:
        found = checkpoint.listed(self.checkpoints)
        return str(found[-1]) if found else None

    def discard(self) -> None:
        """Remove the folder of a run that was refused before it began."""
        self.status.forget()
        self.close()
        if self._writer:
            shutil.rmtree(self.path)

    def add_bad_image(self, name: str, reason: str) -> None:
        """Append to bad_images.txt: sample name, tab, what is wrong with it."""
        if self._writer:
            with open(self.bad_images, "a", encoding="utf-8") as handle:
                handle.write(f"{name}\t{' '.join(reason.split())}\n")
            self.status.skipped(1)

    def forget_bad_images(self, names: set[str]) -> None:
        """Take these samples out of bad_images.txt."""
        lines = self.bad_images.read_text("utf-8").splitlines(keepends=True)
        self.write_text(self.bad_images, "".join(line for line in lines if line.split("\t")[0] not in names))
        self.status.skipped(-len(names))

    def read_bad_images(self) -> set[str]:
        if not self.bad_images.exists():
            return set()
        return {line.split("\t")[0] for line in self.bad_images.read_text("utf-8").splitlines()}

    def write_text(self, path: Path, text: str) -> None:
        if self._writer:
            checkpoint.atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))

    def write_json(self, path: Path, content: dict[str, Any]) -> None:
        self.write_text(path, json.dumps(content, indent=2) + "\n")


LOCK = ".lock"


def refuse_occupied(path: Path, *, overwrite: bool) -> None:
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
    occupied = path.is_dir() and not all(_left_by_a_kill(child.name) for child in path.iterdir())
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


def _left_by_a_kill(name: str) -> bool:
    """Of a run that was killed before it had a config.yaml."""
    return name in (LOCK, "status.json") or (name.startswith(".") and name.endswith(".tmp"))


def free_name(parent: Path, name: str) -> Path:
    """``parent/name``, or the first of ``name-2``, ``name-3``, ... that does not exist yet."""
    path, number = parent / name, 1
    while path.exists():
        number += 1
        path = parent / f"{name}-{number}"
    return path


def _lock(path: Path) -> int:
    """Hold an advisory lock on the folder for the life of the process; the system drops it on any kind of death.

    POSIX locks are not inherited: data workers that outlive their parent for some seconds keep nobody out.
    """
    handle = os.open(path / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise UsageError(
            f"Another process is writing to {path}.", "Wait for it to end, or choose another --out."
        ) from None
    return handle
