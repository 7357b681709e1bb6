"""From test cases to the rows of a record, with methods whose answer is known."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ssl4mis.evaluator import evaluate, segment
from ssl4mis.method import Method, Task
from ssl4mis.records import DISTANCES, FLAGS, OVERLAPS

CLASSES = ("background", "chamber", "vessels", "wall")
PATCH, STRIDE, SPACING = (16, 16, 8), (8, 8, 4), (1.0, 1.0, 2.5)
CASES = ("large", "small")
KEYS = {"case", "class", *OVERLAPS, *DISTANCES, *FLAGS, "diagonal_voxel", "diagonal_mm"}


class Oracle(Method):
    """The images of the store below show the class of every voxel; `shown` maps it to what is predicted."""

    def __init__(self, shown=lambda label: label):
        super().__init__(None, Task(len(CLASSES)), None)
        self.shown, self.modes = shown, []

    def predict(self, image):
        self.modes.append(self.training)
        label = self.shown(image[:, 0].round().long())
        return F.one_hot(label, len(CLASSES)).movedim(-1, 1).float()


class Store:
    """A case larger and one smaller than the patch; `wall` is in the large one only."""

    def __init__(self):
        self.opened = []

    def label(self, case):
        self.opened.append(case)
        label = np.zeros((21, 18, 13) if case == "large" else (12, 20, 7), np.uint8)
        label[2:8, 2:8, 1:4] = 1
        label[3:9, 10:16, 2:6] = 2
        if case == "large":
            label[15:20, 3:9, 6:12] = 3
        return label

    def image(self, case):
        label = Store.label(Store(), case)
        return label[None].astype(np.float32)

    def spacing(self, case):
        return SPACING


def rows(method, **options):
    found = evaluate(method, Store(), CASES, CLASSES, PATCH, STRIDE, "cpu", **options)
    return {(row["case"], row["class"]): row for row in found}


def test_rows_are_those_of_a_record():
    found = rows(Oracle())
    assert list(found) == [(case, name) for case in CASES for name in CLASSES[1:]]
    assert all(set(row) == KEYS for row in found.values())


def test_the_truth_scores_one():
    for row in rows(Oracle()).values():
        assert row["dice"] == row["jaccard"] == 1
        assert all(row[key] == 0 for key in DISTANCES)


def test_background_everywhere_is_an_empty_prediction():
    found = rows(Oracle(torch.zeros_like))
    absent = found.pop(("small", "wall"))
    assert absent["empty_prediction"] and absent["empty_truth"] and absent["dice"] == 1
    for row in found.values():
        assert row["empty_prediction"] and not row["empty_truth"]
        assert row["dice"] == row["jaccard"] == 0
        assert all(math.isnan(row[key]) for key in DISTANCES)


def test_a_structure_that_is_not_there_is_a_false_alarm():
    row = rows(Oracle(torch.ones_like))["small", "chamber"]
    assert 0 < row["dice"] < 1
    row = rows(Oracle(lambda label: torch.full_like(label, 3)))["small", "wall"]
    assert row["empty_truth"] and not row["empty_prediction"] and row["dice"] == 0


def test_classes_are_not_mixed_up():
    found = rows(Oracle(lambda label: torch.tensor([0, 2, 1, 3])[label]))  # chamber and vessels swapped
    assert found["large", "chamber"]["dice"] == found["large", "vessels"]["dice"] == 0
    assert found["large", "wall"]["dice"] == 1


def test_distances_in_voxels_and_mm():
    """The image shows everything one voxel further along the last axis."""
    store = Store()
    store.image = lambda case: np.roll(Store.label(Store(), case), 1, axis=-1)[None].astype(np.float32)
    (found,) = [row for row in evaluate(Oracle(), store, ["large"], CLASSES, PATCH, STRIDE, "cpu")
                if row["class"] == "wall"]
    assert found["hd95_max_voxel"] == 1
    assert found["hd95_max_mm"] == SPACING[2]
    assert found["diagonal_voxel"] == pytest.approx(math.hypot(21, 18, 13))
    assert found["diagonal_mm"] == pytest.approx(math.hypot(21, 18, 13 * 2.5))


def test_the_method_is_in_evaluation_mode_and_every_case_is_told():
    method, told = Oracle().train(), []
    rows(method, tell=lambda done, case: told.append((done, case)))
    assert not any(method.modes)
    assert told == [(1, "large"), (2, "small")]


def test_segment_gives_a_class_map():
    store = Store()
    found = segment(Oracle(), store.image("small"), PATCH, STRIDE, "cpu")
    assert found.dtype == torch.uint8
    assert np.array_equal(found.numpy(), store.label("small"))
