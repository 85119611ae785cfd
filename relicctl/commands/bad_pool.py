"""The images that a run's processes could not decode: known to all of them, listed once, and dropped when repaired."""

from __future__ import annotations

from relicctl.core.distributed import World
from relicctl.data.bad_images import BadImages, decodes
from relicctl.data.sources import Source
from relicctl.runs import RunFolder


class BadPool:
    """``bad`` of each process, so that it counts what the others met too; the main process writes the list."""

    def __init__(self, bad: BadImages, run: RunFolder, world: World) -> None:
        self._bad, self._run, self._world = bad, run, world
        self._fresh: list[tuple[str, str]] = []
        bad.report = self._report

    def recall(self, source: Source) -> None:
        """What an earlier process of the run listed, but for images that can be decoded by now."""
        self._bad.seen = set(self._world.lead(lambda: self._still_bad(source)))

    def share(self) -> None:
        """Tell all processes what each has met since. Raises DataError, on all of them, where that is too much."""
        if self._world.size == 1:
            return
        told, self._fresh = self._world.tell(self._fresh), []
        for rank, met in enumerate(told):
            for name, reason in met if rank != self._world.rank else []:
                self._bad.add(name, reason)
        self._fresh = []

    def _report(self, name: str, reason: str) -> None:
        self._fresh.append((name, reason))
        self._run.add_bad_image(name, reason)

    def _still_bad(self, source: Source) -> list[str]:
        listed = self._run.read_bad_images()
        if not listed:
            return []
        rows = {source.key(row): row for row in range(len(source))}
        repaired = {name for name in listed if name in rows and decodes(source, rows[name])}
        if repaired:
            self._run.forget_bad_images(repaired)
        return sorted(listed - repaired)
