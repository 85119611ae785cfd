"""The images that a run's processes could not decode: known to all of them, listed once, and dropped when repaired."""

from __future__ import annotations

from relicctl.core.distributed import World
from relicctl.data.bad_images import BadImages, is_decodable
from relicctl.data.sources import ImageDataset
from relicctl.runs import RunFolder


class SharedBadImages:
    """``bad`` of each process, so that it counts what the others met too; the main process writes the list."""

    def __init__(self, bad: BadImages, run: RunFolder, world: World) -> None:
        self._bad, self._run, self._world = bad, run, world
        self._new: list[tuple[str, str]] = []
        bad.report = self._record

    def load_recorded(self, source: ImageDataset) -> None:
        """What an earlier process of the run listed, but for images that can be decoded by now."""
        self._bad.seen = set(self._world.broadcast_from_main(lambda: self._find_still_bad(source)))

    def sync(self) -> None:
        """Tell all processes what each has met since. Raises DataError, on all of them, where that is too much."""
        if self._world.size == 1:
            return
        gathered, self._new = self._world.all_gather_object(self._new), []
        for rank, new in enumerate(gathered):
            for name, reason in new if rank != self._world.rank else []:
                self._bad.add(name, reason)
        self._new = []

    def _record(self, name: str, reason: str) -> None:
        self._new.append((name, reason))
        self._run.add_bad_image(name, reason)

    def _find_still_bad(self, source: ImageDataset) -> list[str]:
        listed = self._run.read_bad_images()
        if not listed:
            return []
        rows = {source.get_name(row): row for row in range(len(source))}
        repaired = {name for name in listed if name in rows and is_decodable(source, rows[name])}
        if repaired:
            self._run.remove_bad_images(repaired)
        return sorted(listed - repaired)
