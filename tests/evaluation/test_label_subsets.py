"""Laws of few labels: every class keeps its share, the seed decides and nothing else, more labels contain fewer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from relicctl.data.datasets.open import open_dataset
from relicctl.errors import DataError, UsageError
from relicctl.evaluation.labelled_data import check_label_subset, select_labelled_rows, split_stratified


@pytest.fixture(scope="module")
def source():
    return open_dataset("shapes:size=16,train=200,val=20")


@pytest.mark.parametrize("text", ["0.1", "0.01", "7-per-class"])
def test_every_class_keeps_its_share_and_the_seed_decides(source, text):
    labels = np.random.default_rng(0).integers(0, 10, 200)
    rows = select_labelled_rows(source, labels, text, 3)
    counts, wanted = np.bincount(labels[rows], minlength=10), np.bincount(labels)
    expected = np.full(10, 7) if text.startswith("7") else np.maximum(1, np.rint(float(text) * wanted))
    assert (counts == expected).all()
    assert (np.diff(rows) > 0).all()
    assert (rows == select_labelled_rows(source, labels, text, 3)).all()
    assert not np.array_equal(rows, select_labelled_rows(source, labels, text, 4))


def test_more_labels_contain_fewer(source):
    few, more = (set(select_labelled_rows(source, source.labels, t, 0)) for t in ("0.1", "0.3"))
    assert few < more


@given(st.lists(st.integers(0, 4), min_size=2, max_size=60), st.floats(0.05, 0.9), st.integers(0, 99))
def test_what_is_held_out_parts_every_class_and_empties_none(labels, share, seed):
    labels = np.array(labels)
    fit, held = split_stratified(labels, share, seed)
    assert sorted([*fit, *held]) == list(range(len(labels)))
    assert set(labels[fit]) == set(labels)
    many = [c for c in set(labels) if (labels == c).sum() > 1]
    assert set(many) == set(labels[held])


def test_of_images_with_any_number_of_classes_a_share_of_all_is_taken(source):
    labels = np.random.default_rng(0).integers(-1, 2, (200, 4)).astype(np.int8)
    few, more = (select_labelled_rows(source, labels, text, 0) for text in ("0.1", "0.3"))
    assert (len(few), len(more)) == (20, 60)
    assert set(few) < set(more)
    fit, held = split_stratified(labels, 0.2, 0)
    assert (len(fit), len(held)) == (160, 40)
    assert sorted([*fit, *held]) == list(range(200))


def test_a_list_names_images_wholly_or_by_their_files(source, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(f"{source.get_name(5)}\n\n{source.get_name(2).rpartition('/')[2]}\n")
    assert select_labelled_rows(source, source.labels, str(path), 0).tolist() == [2, 5]
    path.write_text("nothing.jpg\n")
    with pytest.raises(DataError, match=r"nothing\.jpg"):
        select_labelled_rows(source, source.labels, str(path), 0)
    path.write_text("")
    with pytest.raises(DataError, match="no names"):
        select_labelled_rows(source, source.labels, str(path), 0)


def test_what_is_no_amount_of_labels_is_refused(source, tmp_path):
    for text in ("all", "0.5", "12-per-class"):
        check_label_subset(text)
    for text in ("0", "1", "1.5", "-0.1", "0-per-class", "few", "nan", str(tmp_path / "none.txt")):
        with pytest.raises(UsageError):
            check_label_subset(text)
    with pytest.raises(DataError, match="only"):
        select_labelled_rows(source, source.labels, "1000-per-class", 0)


def test_a_name_that_several_classes_have_is_no_name(tmp_path):
    for kind in "ab":
        (tmp_path / kind).mkdir()
        for number in range(2):
            Image.new("RGB", (4, 4)).save(tmp_path / kind / f"{number}{'x' * (number * ord(kind) % 97 % 2)}.png")
    source = open_dataset(str(tmp_path))
    path = tmp_path / "list.txt"
    path.write_text("0.png\n")
    with pytest.raises(DataError, match="several images of that name") as error:
        select_labelled_rows(source, source.labels, str(path), 0)
    assert "a/0.png" in error.value.fix
    path.write_text("b/0.png\n")
    assert [source.get_name(int(row)) for row in select_labelled_rows(source, source.labels, str(path), 0)] == [
        "b/0.png"
    ]
