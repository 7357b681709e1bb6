"""From test cases to the rows of a record, with methods whose answer is known."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import networks
from networks.base import NetSpec
from ssl4mis.errors import UserError
from ssl4mis.evaluator import evaluate, predictor, probabilities, segment, segment_slices
from ssl4mis.inference import sliding_window
from ssl4mis.method import Method, Task
from ssl4mis.records import DISTANCES, FLAGS, OVERLAPS

CLASSES = ("background", "chamber", "vessels", "wall")
TARGETS = {"chamber": (1,), "vessels": (2,), "wall": (3,)}
PATCH16 = (16, 16, 16)
PATCH, STRIDE, SPACING = (16, 16, 8), (8, 8, 4), (1.0, 1.0, 2.5)
CASES = ("large", "small")
KEYS = {"case", "class", *OVERLAPS, *DISTANCES, *FLAGS, "diagonal_voxel", "diagonal_mm"}


class Shared(list):
    """A list that the copies of its owner share."""

    def __deepcopy__(self, memo):
        return self


class Oracle(Method):
    """The images of the store below show the class of every voxel; `shown` maps it to what is predicted."""

    def __init__(self, shown=lambda label: label, dims=3):
        super().__init__(None, Task(len(CLASSES), dims), None)
        self.shown, self.modes, self.shapes = shown, Shared(), Shared()

    def predict(self, image):
        self.modes.append(self.training)
        self.shapes.append(tuple(image.shape))
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


def rows(method, targets=TARGETS, patch=PATCH, **options):
    found = evaluate(method, Store(), CASES, targets, patch, STRIDE, "cpu", **options).cases
    return {(row["case"], row["class"]): row for row in found}


def test_rows_are_those_of_a_record():
    found = rows(Oracle())
    assert list(found) == [(case, name) for case in CASES for name in CLASSES[1:]]
    assert all(set(row) == KEYS for row in found.values())


def test_every_case_is_calibrated_and_its_class_map_kept():
    kept = {}
    method = Oracle(lambda label: (label > 0).long())  # all structures are the first one
    found = evaluate(method, Store(), CASES, TARGETS, PATCH, STRIDE, "cpu", keep=kept.__setitem__)
    assert [row["case"] for row in found.calibration] == list(CASES) == list(kept)
    for row in found.calibration:
        truth = Store().label(row["case"])
        wrong = np.mean(truth > 1)  # and certain
        assert row["ece"] == pytest.approx(wrong, rel=1e-6)
        assert row["nll"] == pytest.approx(wrong * -math.log(1e-12), rel=1e-6)
        assert kept[row["case"]].dtype == np.uint8 and np.array_equal(kept[row["case"]], truth > 0)


def test_planes_are_calibrated_as_volumes():
    found = evaluate(Oracle(dims=2), Store(), CASES, TARGETS, (42, 40), None, "cpu", slices=True)
    assert found.calibration == [{"case": case, "ece": 0, "nll": 0} for case in CASES]


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
    (found,) = [row for row in evaluate(Oracle(), store, ["large"], TARGETS, PATCH, STRIDE, "cpu").cases
                if row["class"] == "wall"]
    assert found["hd95_max_voxel"] == 1
    assert found["hd95_max_mm"] == SPACING[2]
    assert found["diagonal_voxel"] == pytest.approx(math.hypot(21, 18, 13))
    assert found["diagonal_mm"] == pytest.approx(math.hypot(21, 18, 13 * 2.5))


def test_every_case_has_its_own_spacing():
    store = Store()
    store.spacing = lambda case: SPACING if case == "large" else (2.0, 2.0, 2.0)
    scored = evaluate(Oracle(), store, CASES, {"chamber": (1,)}, PATCH, STRIDE, "cpu").cases
    found = {row["case"]: row for row in scored}
    assert found["large"]["diagonal_mm"] == pytest.approx(math.hypot(21, 18, 13 * 2.5))
    assert found["small"]["diagonal_mm"] == pytest.approx(2 * math.hypot(12, 20, 7))


def test_the_method_is_in_evaluation_mode_and_every_case_is_told():
    method, told = Oracle().train(), []
    rows(method, tell=lambda done, case: told.append((done, case)))
    assert not any(method.modes)
    assert told == [(1, "large"), (2, "small")]


def test_segment_gives_a_class_map():
    store = Store()
    found = segment(Oracle().predict, store.image("small"), PATCH, STRIDE, "cpu")
    assert found.dtype == torch.uint8
    assert np.array_equal(found.numpy(), store.label("small"))


def test_regions_are_unions_of_classes():
    """What is called what inside of a region does not matter, what lies outside does; rows carry the region's name."""
    regions = {"inner": (1, 2), "heart": (1, 2, 3), "chamber": (1,)}
    swapped = Oracle(lambda label: torch.tensor([0, 2, 1, 0])[label])
    found = rows(swapped, regions)
    assert list(found) == [(case, name) for case in CASES for name in regions]
    assert found["large", "inner"]["dice"] == 1 and found["large", "chamber"]["dice"] == 0
    voxels = {name: np.isin(Store().label("large"), values).sum() for name, values in regions.items()}
    assert found["large", "heart"]["dice"] == pytest.approx(2 * voxels["inner"] / (voxels["inner"] + voxels["heart"]))
    assert found["small", "heart"]["dice"] == 1


def test_classes_and_regions_of_one_class_score_alike():
    method = Oracle(lambda label: label.roll(1, -1))
    assert rows(method) == rows(method, {name: list(values) for name, values in TARGETS.items()})


@pytest.mark.parametrize("patch", [(21, 18), (42, 36)])
def test_slices_are_predicted_in_two_dimensions_and_scored_as_volumes(patch):
    method = Oracle(dims=2)
    found = evaluate(method, Store(), ["large"], TARGETS, patch, None, "cpu", slices=True).cases
    assert method.shapes == [(13, 1, *patch)]
    assert [row["dice"] for row in found] == [1, 1, 1]
    assert found[0]["diagonal_mm"] == pytest.approx(math.hypot(21, 18, 13 * 2.5))


def test_slices_lose_what_the_patch_cannot_show():
    found = rows(Oracle(dims=2), patch=(8, 8), slices=True)
    assert all(0.5 < row["dice"] < 1 for (case, name), row in found.items() if (case, name) != ("small", "wall"))


def test_segment_slices_gives_a_class_map():
    method, image = Oracle(dims=2), Store().image("small")
    found = segment_slices(method.predict, image, (24, 40), "cpu")
    assert found.dtype == torch.uint8 and found.shape == image.shape[1:]
    assert np.array_equal(found.numpy(), Store().label("small"))


def test_probabilities_are_those_that_segment_chooses_by():
    image = Store().image("large")
    found = probabilities(Oracle().predict, image, PATCH, STRIDE, "cpu")
    assert found.dtype == torch.float32 and found.shape == (len(CLASSES), *image.shape[1:])
    torch.testing.assert_close(found.sum(0), torch.ones(image.shape[1:]))
    assert torch.equal(found.argmax(0), segment(Oracle().predict, image, PATCH, STRIDE, "cpu").long())


class Network(Method):
    """A small V-Net."""

    def __init__(self):
        super().__init__(None, Task(3), None)
        torch.manual_seed(0)
        self.net = networks.Build("vnet", 3, NetSpec(1, PATCH16, 4))()

    def predict(self, image):
        return self.net(image).logits.softmax(1)


def test_half_precision_is_near_and_something_else():
    method, image = Network().train(), torch.randn((1, 18, 20, 17), generator=torch.Generator().manual_seed(0)).numpy()
    found = {name: probabilities(predictor(method, "cpu", name), image, PATCH16, (8, 8, 8), "cpu")
             for name in ("32-true", "bf16-mixed")}
    assert method.training and all(p.dtype == torch.float32 for p in (*method.parameters(), *found.values()))
    assert 0 < (found["32-true"] - found["bf16-mixed"]).abs().max() < 0.05
    method.eval()
    with torch.inference_mode():
        plain = sliding_window(method.predict, torch.from_numpy(image), PATCH16, (8, 8, 8))
    torch.testing.assert_close(found["32-true"], plain, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("error")
def test_images_may_be_mapped_and_read_only(tmp_path):
    Store().image("small").tofile(tmp_path / "image")
    image = np.memmap(tmp_path / "image", np.float32, "r", shape=(1, 12, 20, 7))
    torch.set_warn_always(True)
    try:
        assert np.array_equal(segment(Oracle().predict, image, PATCH, STRIDE, "cpu"), Store().label("small"))
        assert np.array_equal(segment_slices(Oracle(dims=2).predict, image, (12, 20), "cpu"), Store().label("small"))
    finally:
        torch.set_warn_always(False)


def test_a_damaged_test_case_gets_no_score():
    class Damaged(Store):
        def image(self, case):
            image = super().image(case)
            image[0, 0, 0, 0] = math.nan if case == "small" else 0
            return image

    with pytest.raises(UserError, match="^test case small: NaN or infinity in the stored image, expected finite"):
        evaluate(Oracle(), Damaged(), CASES, TARGETS, PATCH, STRIDE, "cpu")
