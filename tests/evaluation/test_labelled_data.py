"""Classes are known by name, in whatever order another data set has them."""

import numpy as np
import pytest

from relicctl.config.linear_eval import LinearEvalConfig
from relicctl.config.resolve import replace_defaults, resolve_config
from relicctl.console import Console
from relicctl.data.datasets.base import ImageDataset
from relicctl.errors import DataError, RelicError
from relicctl.evaluation.labelled_data import match_classes, open_train_test


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


def test_nothing_in_common_is_refused_with_both_sides():
    with pytest.raises(DataError, match=r"'bee'.*'ant'"):
        match_classes(Named(["ant", "cow"], ["ant", "cow"]), ("bee", "cat"))


def test_unlabelled_and_single_class_data_are_refused():
    with pytest.raises(DataError, match="two classes"):
        match_classes(Named(["ant"], ["ant"]), ("ant", "bee"))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, "No data is given"),
        ({"data.train": "shapes"}, "no images to test on"),
        ({"data.train": "shapes:train=5", "data.val": "shapes"}, "no image to train on"),
        ({"data.train": "shapes:train=20", "eval.val_fraction": 0.1}, "no image to test on"),
        ({"data.train": "shapes:train=20", "data.val": "shapes", "data.subset": 21}, "only 20 images"),
    ],
)
def test_what_cannot_be_used_is_refused(keys, says):
    config = replace_defaults(resolve_config(schema=LinearEvalConfig), keys).config
    with pytest.raises(RelicError, match=says):
        open_train_test(config, False, Console(quiet=True))
