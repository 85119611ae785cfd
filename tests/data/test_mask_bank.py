"""The mask bank: what was put in comes out by name, a kill loses little, and nothing broken is read."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from relicctl.data.datasets.base import ImageDataset
from relicctl.data.datasets.open import open_dataset
from relicctl.data.datasets.shapes import ShapesDataset
from relicctl.data.mask_bank import FLUSH_EVERY, HEADER_BYTES, MaskBank, MaskBankWriter, make_layout
from relicctl.errors import DataError, RelicError, RunFailed

COUNT = 40


class Named(ImageDataset):
    """Samples that are names only."""

    spec = "named"

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def get_name(self, index: int) -> str:
        return self.names[index]

    def read(self, index: int) -> bytes:
        raise AssertionError("a bank never reads an image")


def mask_of(index: int) -> np.ndarray:
    return np.random.default_rng(index).random((128, 128)) < (index + 1) / (COUNT + 2)


def source_of(count: int = COUNT) -> Named:
    return Named([f"class/{number * 7919 % 1000:03d}.jpg" for number in range(count)])


def fill(path: Path, source: ImageDataset) -> MaskBank:
    with MaskBankWriter(path, source, made_by="a test") as writer:
        for index in writer.find_missing().tolist():
            writer.write_mask(index, mask_of(index))
    return MaskBank.open(path)


@pytest.fixture(scope="module")
def bank_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run") / "masks.bank"
    fill(path, source_of())
    return path


# Laws.


def test_what_was_put_in_comes_out_whatever_the_order(tmp_path):
    source = source_of()
    with MaskBankWriter(tmp_path / "masks.bank", source, made_by="a test") as writer:
        for index in np.random.default_rng(1).permutation(COUNT).tolist():
            writer.write_mask(index, mask_of(index))
    bank = MaskBank.open(tmp_path)  # the folder will do
    rows = bank.find_rows(source)
    for index in range(COUNT):
        assert np.array_equal(bank.load_mask(int(rows[index])), mask_of(index))
        assert bank.get_foreground_ratio(int(rows[index])) == mask_of(index).mean()
    assert bank.made_by == "a test"
    assert np.array_equal(bank.get_foreground_ratio(rows), [mask_of(index).mean() for index in range(COUNT)])


def test_rows_go_by_name_in_any_order_and_selection(bank_file):
    bank, source = MaskBank.open(bank_file), source_of()
    chosen = np.random.default_rng(2).permutation(COUNT)[:17]
    for other in (source.select(chosen), Named([source.get_name(int(i)) for i in chosen])):
        rows = bank.find_rows(other)
        assert all(
            np.array_equal(bank.load_mask(int(row)), mask_of(int(i))) for row, i in zip(rows, chosen, strict=True)
        )


def test_samples_without_a_mask_are_counted_with_an_example_and_the_way_on(bank_file):
    source = Named([*source_of().names, "new/1.jpg", "new/2.jpg"])
    with pytest.raises(DataError) as refused:
        MaskBank.open(bank_file).find_rows(source)
    assert "no mask for 2 of the 42 images" in refused.value.what
    assert "new/1.jpg" in refused.value.what
    assert "--masks-for named" in refused.value.fix


def test_drawn_pictures_of_another_seed_are_other_data_though_their_names_are_equal(tmp_path):
    bank = fill(tmp_path / "masks.bank", open_dataset("shapes:train=40"))
    assert len(bank.find_rows(open_dataset("shapes:train=30,size=64"))) == 30  # the same objects
    with pytest.raises(DataError, match="no mask for 30 of the 30"):
        bank.find_rows(open_dataset("shapes:train=30,seed=1"))


def test_the_same_masks_make_the_same_file_and_others_another_identity(tmp_path):
    one, same = fill(tmp_path / "one", source_of()), fill(tmp_path / "same", source_of())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "same").read_bytes()
    with MaskBankWriter(tmp_path / "other", source_of(), made_by="a test") as writer:
        for index in range(COUNT):
            writer.write_mask(index, mask_of(index) if index else ~mask_of(index))
    assert one.identity == same.identity != MaskBank.open(tmp_path / "other").identity


def test_a_million_masks_take_under_3_gb():
    assert make_layout(1_300_000, 128).end < 3e9


# Unfinished banks.


def test_what_was_written_is_known_after_a_kill(tmp_path):
    """SIGKILL in the middle of writing: at most the last FLUSH_EVERY masks are lost, none is wrong."""
    path, count = tmp_path / "masks.bank", 20 * FLUSH_EVERY
    code = (
        "import sys, numpy as np; sys.path[:0] = [sys.argv[2]]\n"
        "from pathlib import Path; from test_mask_bank import MaskBankWriter, mask_of, source_of\n"
        f"writer = MaskBankWriter(Path(sys.argv[1]), source_of({count}), made_by='a test')\n"
        f"for index in range({count}):\n"
        "    writer.write_mask(index, mask_of(index % 40)); print(index, flush=True)\n"
        "    if index > 1100: break\n"
        "input()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(path), str(Path(__file__).parent)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    seen = 0
    while seen < 1000:
        seen = int(child.stdout.readline())
    time.sleep(0.01)
    child.kill()
    child.communicate()

    assert not path.exists()
    with pytest.raises(DataError, match="not finished"):
        MaskBank.open(path)
    writer = MaskBankWriter(path, source_of(count), made_by="a test")
    first = int(writer.find_missing()[0])
    assert first > seen - FLUSH_EVERY
    assert np.array_equal(writer.find_missing(), np.arange(first, count))
    for index in writer.find_missing().tolist():
        writer.write_mask(index, mask_of(index % 40))
    writer.close()
    bank = MaskBank.open(path)
    assert all(np.array_equal(bank.load_mask(row), mask_of(row % 40)) for row in range(0, count, 101))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("other", ["data", "maker", "nonsense", "cut"])
def test_what_another_maker_left_is_not_mixed_in(tmp_path, other):
    path, part = tmp_path / "masks.bank", tmp_path / "masks.bank.part"
    with MaskBankWriter(path, source_of(), made_by="a test") as writer:
        writer.write_mask(3, mask_of(3))
    if other == "nonsense":
        part.write_bytes(b"nonsense")
    if other == "cut":
        os.truncate(part, HEADER_BYTES + 100)
    source = source_of() if other != "data" else Named([f"{n}x" for n in range(COUNT)])
    again = MaskBankWriter(path, source, made_by="another" if other == "maker" else "a test")
    assert len(again.find_missing()) == COUNT
    again.close()


def test_a_mask_may_be_written_again(tmp_path):
    with MaskBankWriter(tmp_path / "masks.bank", source_of(), made_by="a test") as writer:
        for index in range(COUNT):
            writer.write_mask(index, ~mask_of(index))
        for index in range(COUNT):
            writer.write_mask(index, mask_of(index))
    assert (tmp_path / "masks.bank").read_bytes() == fill(tmp_path / "two", source_of()).path.read_bytes()


@pytest.mark.parametrize("mask", [np.zeros((128, 127), bool), np.zeros((128, 128), np.uint8)])
def test_only_masks_are_taken(tmp_path, mask):
    with MaskBankWriter(tmp_path / "masks.bank", source_of(), made_by="a test") as writer:
        with pytest.raises(ValueError, match="a mask is bool"):
            writer.write_mask(0, mask)
        assert len(writer.find_missing()) == COUNT


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match="could not be written"):
        MaskBankWriter(tmp_path / "file" / "masks.bank", source_of(), made_by="a test")


# Broken, foreign and missing banks.


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


BREAKS = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 1), "cut short"),
    "longer": (lambda path: os.truncate(path, path.stat().st_size + 1), "too long"),
    "a stump": (lambda path: os.truncate(path, 100), "cut short"),
    "empty": (lambda path: os.truncate(path, 0), "no mask bank"),
    "foreign": (lambda path: path.write_bytes(b"\x89PNG" * 4000), "no mask bank"),
    "newer": (lambda path: path.write_bytes(path.read_bytes().replace(b"relicMSK\1", b"relicMSK\2")), "newer"),
    "version 0": (lambda path: path.write_bytes(path.read_bytes().replace(b"relicMSK\1", b"relicMSK\0")), "damaged"),
    "flipped bit in the header": (lambda path: flip(path, 30), "damaged"),
    "flipped bit in the header's length": (lambda path: flip(path, 13), "damaged"),
    "flipped bit in a name": (lambda path: flip(path, HEADER_BYTES + 5), "damaged"),
    "flipped bit in an area": (lambda path: flip(path, make_layout(COUNT, 128).offsets["areas"] + 5), "damaged"),
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_bank_is_refused_in_two_sentences(bank_file, tmp_path, how):
    path = tmp_path / "masks.bank"
    path.write_bytes(bank_file.read_bytes())
    spoil, said = BREAKS[how]
    spoil(path)
    with pytest.raises(DataError, match=said) as refused:
        MaskBank.open(path)
    assert str(path) in refused.value.what
    assert refused.value.what.endswith(".")
    assert refused.value.fix.endswith(".")


def test_any_flipped_bit_before_the_masks_is_told(bank_file, tmp_path):
    content, path = bank_file.read_bytes(), tmp_path / "masks.bank"
    used = len(content[:HEADER_BYTES].rstrip(b"\0"))
    places = [*range(used), *range(HEADER_BYTES, make_layout(COUNT, 128).offsets["masks"], 37)]
    for at in places:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(RelicError):
            MaskBank.open(path)


def test_an_unfinished_bank_is_none_under_any_name(tmp_path):
    MaskBankWriter(tmp_path / "masks.bank", source_of(), made_by="a test").close()
    for path in (tmp_path, tmp_path / "masks.bank", tmp_path / "masks.bank.part"):
        with pytest.raises(DataError, match="not finished"):
            MaskBank.open(path)


def test_a_missing_bank_is_told(tmp_path):
    for path, said in ((tmp_path, "holds no masks.bank"), (tmp_path / "nothing", "There is no mask bank")):
        with pytest.raises(DataError, match=said):
            MaskBank.open(path)


# In workers.


def test_a_pickled_bank_is_its_path(bank_file):
    bank = MaskBank.open(bank_file)
    assert len(pickle.dumps(bank)) < 1000
    twin = pickle.loads(pickle.dumps(bank))
    assert np.array_equal(twin.load_mask(5), bank.load_mask(5))


def test_a_bank_replaced_under_a_run_is_told(tmp_path):
    bank = pickle.dumps(fill(tmp_path / "masks.bank", source_of()))
    fill(tmp_path / "masks.bank", source_of(COUNT - 1))
    with pytest.raises(DataError, match="replaced"):
        pickle.loads(bank)


def test_masks_are_not_held_in_memory(tmp_path):
    source = ShapesDataset.from_spec("shapes:train=3000", "train")
    mask = np.zeros((128, 128), bool)
    tracemalloc.start()
    try:
        with MaskBankWriter(tmp_path / "masks.bank", source, made_by="a test") as writer:
            for index in range(3000):
                writer.write_mask(index, mask)
        MaskBank.open(tmp_path).find_rows(source)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3000 * 2048 / 2
