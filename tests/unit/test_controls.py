"""Negative controls: what stands in for unlabeled images, and that nothing else of a run moves."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data_prep
from data_prep import DataError, Split
from data_prep.volumes import write_case
from ssl4mis import config, controls
from ssl4mis.config import RunSpec
from ssl4mis.errors import UserError
from ssl4mis.loading import Loader
from ssl4mis.method import Needs

ROOT = Path(__file__).resolve().parents[2]
TRAIN = tuple("abcdefgh")
SPLIT = Split("made-up", 0, 1, TRAIN, ("z",), "", extra=("free",))
LA, PHANTOM = data_prep.dataset("LA"), data_prep.dataset("phantom")


class Store:
    """Two channels of other mean and spread in each case; it remembers whose labels were asked for."""

    def __init__(self):
        self.asked = []

    def image(self, case):
        n = float(ord(case[0]))
        x = np.random.default_rng(ord(case[0])).uniform(size=(2, 24, 22, 20))
        return np.stack([n + x[0], -n + 100 * x[1] ** 3]).astype(np.float32)

    def label(self, case):
        self.asked.append(case)
        return (self.image(case)[0] % 1 > 0.5).astype(np.uint8)


def spec(control="", labeled=2, unlabeled="all", **settings) -> RunSpec:
    return RunSpec(method="mean_teacher", control=control, labeled=labeled, unlabeled=unlabeled, **settings)


def training(control, store=None, dataset=LA, root=None, **settings):
    protocol = next(iter(dataset.protocols.values()))
    return controls.for_training(store or Store(), SPLIT, spec(control, **settings), dataset, protocol, root)


def test_without_a_control_all_stays_as_it_is():
    store = Store()
    assert training("", store) == (store, ("c", "d", "e", "f", "g", "h", "free"))


def test_a_part_is_the_start_of_the_list_so_that_parts_nest():
    parts = [controls.unlabeled_cases(SPLIT, spec(unlabeled=n)) for n in (0, 2, 5, "all")]
    assert parts[:3] == [(), ("c", "d"), ("c", "d", "e", "f", "g")] and parts[3] == SPLIT.unlabeled(2)
    assert training("", unlabeled=2)[1] == ("c", "d")


def test_a_part_counts_patients_where_each_has_several_cases():
    pairs = Split("pairs", 0, 1, TRAIN, ("z",), "", per_patient=2)
    assert controls.unlabeled_cases(pairs, spec(labeled=1, unlabeled=2)) == ("c", "d", "e", "f")


@pytest.mark.parametrize(("control", "ids"), [
    ("noise", ("c#noise", "d#noise", "e#noise", "f#noise", "g#noise")),
    ("copies", ("a#copy1", "b#copy1", "a#copy2", "b#copy2", "a#copy3"))])
def test_as_many_images_as_without_a_control_under_ids_of_their_own(control, ids):
    assert training(control, unlabeled=5)[1] == ids


def test_noise_has_shape_mean_and_deviation_of_its_scan_and_nothing_else():
    store, _ = training("noise")
    scan, found = Store().image("c"), store.image("c#noise")
    assert (found.shape, found.dtype) == (scan.shape, np.float32)
    voxels = scan[0].size
    for one, other in zip(found.astype(float), scan.astype(float), strict=True):
        sd = other.std()
        assert abs(one.mean() - other.mean()) < 5 * sd / voxels**0.5
        assert abs(one.std() - sd) < 5 * sd / (2 * voxels) ** 0.5
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 / voxels**0.5
    first, second = ((channel - channel.mean()) / channel.std() for channel in found)
    assert abs((first * second).mean()) < 5 / voxels**0.5 and abs((first[1:] * first[:-1]).mean()) < 5 / voxels**0.5
    assert abs((first**3).mean()) < 5 * (6 / voxels) ** 0.5  # no skew, unlike the scan's second channel


def test_noise_follows_from_the_id_alone():
    image = training("noise", seed=3, labeled=1)[0].image("c#noise")
    assert np.array_equal(image, training("noise")[0].image("c#noise"))
    shown = (image - image.mean((1, 2, 3), keepdims=True)) / image.std((1, 2, 3), keepdims=True)
    other = training("noise")[0].image("d#noise")
    assert abs((shown * (other - other.mean((1, 2, 3), keepdims=True))).mean() / other.std()) < 0.05


def test_noise_is_the_same_in_every_process():
    program = ("import numpy as np; from ssl4mis import controls\n"
               "class S:\n def image(self, case): return np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2)\n"
               "print(controls.noise(S(), 'c').tobytes().hex())")
    done = [subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={"PYTHONHASHSEED": seed}, check=True,
                           capture_output=True, text=True).stdout for seed in ("1", "2")]
    assert done[0] == done[1] and len(done[0]) == 2 * 4 * 8 + 1


@pytest.mark.parametrize("control", ["noise", "copies", "other:phantom"])
def test_no_label_behind_a_control_can_be_reached(control):
    below = Store()
    store, ids = training(control, below, PHANTOM if control == "other:phantom" else LA)
    for case in ids:
        with pytest.raises(DataError, match="an image of a negative control"):
            store.label(case)
    assert below.asked == []
    assert np.array_equal(store.label("a"), Store().label("a")) and np.array_equal(store.image("a"), Store().image("a"))


def test_copies_are_the_labeled_images():
    store, ids = training("copies", labeled=3)
    assert len(ids) == len(SPLIT.unlabeled(3))
    for case in ids:
        assert np.array_equal(store.image(case), Store().image(case[0])) and case[0] in "abc"


@pytest.mark.parametrize("control", ["noise", "copies"])
def test_batches_read_the_labels_of_labeled_cases_only_and_resume_exactly(control):
    def loader(below):
        store, ids = training(control, below)
        return Loader(store, SPLIT.labeled(2), ids, (16, 16, 16), (2, 2), 0, ("rotflip",), "cpu", needs=Needs(strong=1))

    below = Store()
    first = loader(below)
    assert below.asked == ["a", "b"]
    plain = Loader(Store(), SPLIT.labeled(2), SPLIT.unlabeled(2), (16, 16, 16), (2, 2), 0, ("rotflip",), "cpu")
    batches = [first.batch(0, step) for step in range(6)]
    for step, batch in enumerate(batches):
        assert batch.unlabeled.label is None and set(batch.unlabeled.cases) <= set(training(control)[1])
        assert torch.equal(batch.labeled.image, plain.batch(0, step).labeled.image)
        again = loader(Store()).batch(0, step)
        assert torch.equal(again.image, batch.image) and again.unlabeled.cases == batch.unlabeled.cases
    if control == "copies":  # a copy is cropped on its own, or it would be the labeled sample itself
        assert not any(torch.equal(one, two) for batch in batches for one in batch.labeled.image
                       for two in batch.unlabeled.image)


def test_another_data_set_comes_in_turn_as_its_training_list_says():
    split = data_prep.load_split("LA-paper", 0)
    wanted = spec("other:phantom", labeled=16)
    store, ids = controls.for_training(Store(), split, wanted, LA, LA.protocols["lite"], None)
    train = data_prep.load_split("phantom-demo", 0).train
    assert ids == tuple(f"phantom:{case}#{turn}" for turn in (1, 2) for case in train) and len(ids) == 64
    phantom = PHANTOM.open(None, PHANTOM.protocols["demo"])
    for case in (ids[5], ids[5 + len(train)]):
        assert np.array_equal(store.image(case), phantom.image(train[5]))


def tiny_la(folder: Path) -> Path:
    for number, case in enumerate(data_prep.load_split("LA-paper", 0).train):
        image = np.random.default_rng(number).normal(size=(5, 6, 7))
        write_case(folder / "LA" / case / "mri_norm2.h5", image, image > 1)
    return folder


def test_another_data_set_is_found_beside_and_above_that_of_the_run(tmp_path, monkeypatch):
    monkeypatch.delenv("SSL4MIS_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    data = tiny_la(tmp_path / "scans")
    (data / "mine" / "clean").mkdir(parents=True)
    first = data_prep.load_split("LA-paper", 0).train[0]
    for root in (data, data / "mine", data / "mine" / "clean", Path("scans/mine/clean")):
        store, ids = training("other:LA", dataset=PHANTOM, root=root, unlabeled=1)
        assert ids == (f"LA:{first}#1",) and store.image(ids[0]).shape == (1, 5, 6, 7)
    monkeypatch.setenv("SSL4MIS_DATA", str(data))
    (tmp_path / "elsewhere").mkdir()
    for root in (None, tmp_path / "elsewhere"):
        assert training("other:LA", dataset=PHANTOM, root=root, unlabeled=1)[1] == ids


@pytest.mark.parametrize(("control", "dataset", "expected"), [
    ("other:LA", PHANTOM, "control other:LA: LA: 80 of 80 case files are missing under"),
    ("other:phantom-2d2c", LA, "control other:phantom-2d2c: phantom-2d2c has 1 channels in 2D, expected 1 in 3D"),
    ("other:phantm", LA, "control other:phantm: data set 'phantm' is unknown, did you mean 'phantom'?"),
])
def test_another_data_set_that_cannot_serve_is_one_line(tmp_path, monkeypatch, control, dataset, expected):
    monkeypatch.delenv("SSL4MIS_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(UserError) as stop:
        training(control, dataset=dataset, root=tmp_path / "a" / "b")
    assert str(stop.value).startswith(expected) and "\n" not in str(stop.value)


def test_channels_are_those_of_the_protocols(monkeypatch):
    brats = data_prep.dataset("BraTS")
    with pytest.raises(UserError, match="phantom has 1 channels in 3D, expected 4 in 3D"):
        controls.for_training(Store(), SPLIT, spec("other:phantom"), brats, brats.protocols["regions"], None)
    assert controls.for_training(Store(), SPLIT, spec("other:phantom"), brats, brats.protocols["paper"], None)[1]


@pytest.mark.parametrize(("control", "words"), [("noise", "Gaussian noise"), ("copies", "copies of the labeled ones"),
                                                ("other:phantom", "those of data set phantom")])
def test_a_control_says_what_it_is(control, words):
    assert words in controls.describe(controls.canonical(control, "LA"))


def test_spellings():
    assert controls.canonical("", "LA") == "" and controls.canonical("other:PROMISE12", "LA") == "other:PROMISE12"
    assert config.RunSpec(method="x", control="noise").stated["control"] == "noise"
