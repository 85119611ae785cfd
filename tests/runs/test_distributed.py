"""The list of bad images: an image that was repaired is on it no more, and other processes' finds count."""

from __future__ import annotations

from contextlib import closing

import pytest
from PIL import Image

from relicctl.core.distributed import World
from relicctl.data.datasets.open import open_dataset
from relicctl.data.decoding import BadImages
from relicctl.errors import DataError
from relicctl.runs.distributed import SharedBadImages
from relicctl.runs.folder import RunFolder


@pytest.fixture
def run(tmp_path):
    with closing(RunFolder.create(tmp_path / "run", overwrite=False, keep=1)) as run:
        yield run


def test_repaired_images_are_removed_from_the_list(run, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in "abc":
        Image.new("RGB", (8, 8)).save(photos / f"{name}.png")
    (photos / "c.png").write_bytes(b"broken")
    for name in ("a.png", "c.png"):
        run.add_bad_image(name, "broken")
    bad = BadImages(3, 0.5)
    SharedBadImages(bad, run, World()).load_recorded(open_dataset(str(photos)))
    assert bad.seen == run.read_bad_images() == {"c.png"}
    bad.add("c.png", "broken")
    assert run.bad_images_path.read_text().splitlines() == ["c.png\tbroken"]


def test_bad_images_of_other_ranks_are_listed_once_and_count(run):
    world, bad = World(0, 2), BadImages(10, 0.35)
    pool, gathered = SharedBadImages(bad, run, world), []

    def tell(mine):
        gathered.append(mine)
        return [mine, [["theirs", "cut"]]]

    object.__setattr__(world, "all_gather_object", tell)
    bad.add("ours", "cut")
    pool.sync()
    pool.sync()
    assert gathered == [[("ours", "cut")], []]
    assert run.read_bad_images() == {"ours", "theirs"}
    bad.add("another", "cut")
    with pytest.raises(DataError, match="4 of 10") as error:
        bad.add("one more", "cut")
    assert str(run.bad_images_path) in error.value.fix
