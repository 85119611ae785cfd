"""RUN/status.json: the state of a run, for monitoring from outside without reading its logs.

The training process itself writes the file, so a hung run shows by an old ``updated``. Writing never waits for the
device, and a file that cannot be written does not stop training.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from relicctl.console import Console
from relicctl.core.loop import Batches
from relicctl.errors import Diverged, Interrupted, describe_error

HEARTBEAT_SECONDS = 30.0  # between two writes where there is no log line


class Status:
    """The fields of status.json; changes that monitoring waits for are written at once.

    Without a ``path`` nothing is written: so it is on ranks other than the main one.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._steps_per_epoch = self._start = self._step = 0
        self._written = -HEARTBEAT_SECONDS
        self._warned = False
        self._fields: dict[str, Any] = {
            "state": "running",
            "step": 0,
            **dict.fromkeys(("total", "epoch", "eta_s", "images_per_s", "last_checkpoint", "last_checkpoint_step")),
            "images_skipped": 0,
            **dict.fromkeys(("resume", "error")),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": _get_timestamp(),
        }

    def set_total(self, *, total: int, steps_per_epoch: int, resume: str) -> None:
        """Set the run's last step, and the command that resumes it."""
        self._steps_per_epoch = steps_per_epoch
        self._update(total=total, resume=resume)

    def start(self, step: int) -> None:
        """Record that the run starts or resumes at ``step``."""
        self._start = self._step = step
        self._update()

    def log(self, record: dict[str, Any]) -> None:
        """Update from a record of metrics."""
        self._step = record.get("step", self._step)
        self._update(**{name: record[name] for name in ("eta_s", "images_per_s") if name in record})

    def record_checkpoint(self, path: Path, step: int) -> None:
        """Record that the checkpoint of ``step`` was written."""
        self._step = step
        self._update(last_checkpoint=str(path), last_checkpoint_step=step)

    def add_skipped(self, count: int) -> None:
        """Count images that could not be decoded; written with the next change."""
        self._fields["images_skipped"] += count

    def wrap_in_state(self, state: str, work: Callable[[int], Any]) -> Callable[[int], Any]:
        """Return ``work``, which then shows another ``state`` while it runs."""

        def work_in_state(step: int) -> Any:
            self._step = step
            self._update(state=state)
            result = work(step)
            self._update(state="running")
            return result

        return work_in_state

    def finish(self, error: BaseException | None) -> None:
        """Record how the run ended: done, stopped by a signal, diverged or failed."""
        if error is None:
            self._update(state="done", eta_s=0.0)
        elif isinstance(error, Interrupted):
            self._update(state="stopped")
        else:
            what, fix, _ = describe_error(error)
            self._update(state="diverged" if isinstance(error, Diverged) else "failed", error=f"{what} {fix}")

    def make_interrupted(self, signum: int) -> Interrupted:
        """Return the error for a signal that no training loop has handled: it came before the loop or after its end."""
        resume = self._fields["resume"]
        fix = f"Resume with: {resume}" if resume else "Start it again."
        what = f"after step {self._step} of {self._fields['total']}; everything is saved."
        if self._step == self._start:
            what = "before the first step; nothing was lost."
        return Interrupted(f"{signal.Signals(signum).name} {what}", fix, signum)

    def write_heartbeat(self, step: int | None = None) -> None:
        """Record that ``step`` steps are done, or as many as before; writes only every HEARTBEAT_SECONDS."""
        self._step = self._step if step is None else step
        if time.monotonic() - self._written >= HEARTBEAT_SECONDS:
            self._update()

    def _update(self, **fields: Any) -> None:
        self._fields |= fields
        self._fields["step"] = self._step
        if self._steps_per_epoch:
            self._fields["epoch"] = round(self._step / self._steps_per_epoch, 4)
        self._written = time.monotonic()
        if self._path is None:
            return
        try:
            _replace_text(self._path, json.dumps(self._fields | {"updated": _get_timestamp()}, indent=2) + "\n")
        except OSError as reason:
            if not self._warned:
                Console().warn(f"{self._path} cannot be written ({reason.strerror or reason}); training continues")
            self._warned = True


def is_unfinished(run: Path) -> bool:
    """Return whether the run at ``run`` was stopped, failed or killed, by its status.json: it can be resumed."""
    status = read_status(run)
    if status.get("state") in ("running", "evaluating"):
        return status.get("host") == socket.gethostname() and not _is_alive(int(status["pid"]))
    return status.get("state") in ("stopped", "failed")


def read_status(run: Path) -> dict[str, Any]:
    """Return what status.json says; {} where there is none that can be read."""
    try:
        status = json.loads((run / "status.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class HeartbeatBatches:
    """The same batches; while they are taken, status.json is written at least every half a minute."""

    def __init__(self, batches: Batches, status: Status) -> None:
        self._batches, self._status = batches, status

    @property
    def data_wait_seconds(self) -> float:
        return self._batches.data_wait_seconds

    def iter_from_step(self, step: int, stop: int) -> Iterator[Any]:
        self._status.start(step)
        for done, batch in enumerate(self._batches.iter_from_step(step, stop), step):
            self._status.write_heartbeat(done)
            yield batch


def _replace_text(path: Path, text: str) -> None:
    """Replace the file atomically. Not flushed to the disk, which could delay training: it is soon written again."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _get_timestamp() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
