"""Classes are known by name, in whatever order another data set has them."""

import numpy as np
import pytest

from relicctl.config.linear_eval import LinearEvalConfig
from relicctl.config.resolve import replace_defaults, resolve_config
from relicctl.console import Console
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.datasets.open import open_dataset
from relicctl.errors import DataError, RelicError
from relicctl.evaluation.labelled_data import align_labels, match_classes, open_train_test, split_holdout


class Named(ImageDataset):
    """One image per name in ``of``."""

    spec = "named"

    def __init__(self, classes, of):
        self.classes = tuple(classes)
        self.labels = np.array([self.classes.index(name) for name in of], dtype=np.int64)

    def __len__(self):
        return len(self.labels)

    def get_name(self, index):
        return f"{self.classes[self.labels[index]]}/{index}"

    def read(self, index):
        return np.zeros((4, 4, 3), np.uint8)


def test_other_orders_missing_and_unknown_classes():
    found = match_classes(Named(["ant", "cat", "dog"], ["dog", "ant", "cat", "dog"]), ("bee", "cat", "dog"))
    assert found.labels.tolist() == [2, 1, 2]
    assert [found.source.get_name(i) for i in range(3)] == ["dog/0", "cat/2", "dog/3"]
    assert (found.missing_classes, found.unknown_classes) == (("bee",), ("ant",))


def test_composed_and_decomposed_names_are_one_class():
    found = match_classes(Named(["cafe\u0301", "dog"], ["dog", "cafe\u0301"]), ("café", "dog"))
    assert found.labels.tolist() == [1, 0]
    assert (found.missing_classes, found.unknown_classes) == ((), ())
    train, val = Named(["café", "dog"], ["dog", "café"]), Named(["cafe\u0301", "dog"], ["cafe\u0301"])
    assert align_labels(train, val).tolist() == [0]


def test_a_difference_names_what_differs_and_no_composition():
    with pytest.raises(DataError, match="missing there 'bee'; only there 'dog'"):
        match_classes(Named(["cafe\u0301", "dog"], ["dog"]), ("café", "bee"))


def test_a_small_draw_holds_out_some_of_each_class():
    """A draw of all images may miss a class; the draw of the others stays as it was."""
    config = replace_defaults(
        resolve_config(schema=LinearEvalConfig), {"data.train": "shapes:train=20", "eval.val_fraction": 0.1}
    ).config
    train, test = open_train_test(config, False, Console(quiet=True))
    assert np.bincount(test.labels).tolist() == np.bincount(train.labels).tolist() == [1] * 10
    config = replace_defaults(
        resolve_config(schema=LinearEvalConfig), {"data.train": "shapes:train=400", "eval.val_fraction": 0.2}
    ).config
    train, test = open_train_test(config, False, Console(quiet=True))
    _, expected = split_holdout(open_dataset("shapes:train=400"), 0.2, config.seed)
    assert test.source.compute_fingerprint() == expected.compute_fingerprint()


def test_nothing_in_common_is_refused_with_both_sides():
    with pytest.raises(DataError, match=r"'bee'.*'ant'"):
        match_classes(Named(["ant", "cow"], ["ant", "cow"]), ("bee", "cat"))


def test_unlabelled_and_single_class_data_are_refused():
    with pytest.raises(DataError, match="two classes"):
        match_classes(Named(["ant"], ["ant"]), ("ant", "bee"))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, "Missing --data"),
        ({"data.train": "shapes"}, "no images to test on"),
        ({"data.train": "shapes:train=5", "data.val": "shapes"}, "no image to train on"),
        ({"data.train": "shapes:train=11", "eval.val_fraction": 0.1}, "no image to test on"),
        ({"data.train": "shapes:train=20", "data.val": "shapes", "data.subset": 21}, "only 20 images"),
    ],
)
def test_what_cannot_be_used_is_refused(keys, says):
    config = replace_defaults(resolve_config(schema=LinearEvalConfig), keys).config
    with pytest.raises(RelicError, match=says):
        open_train_test(config, False, Console(quiet=True))
