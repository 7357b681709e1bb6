"""The LA store on small synthetic files, and on the real ones where SSL4MIS_DATA names them."""

import os
import subprocess
import sys

import numpy as np
import pytest

from data_prep import DataError, dataset, load_split, volumes

SPEC = dataset("LA")
FULL, LITE = SPEC.protocols["paper"], SPEC.protocols["lite"]
REAL = os.environ.get("SSL4MIS_DATA")
CASES = load_split("LA-paper", 0).labeled(3)


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL4MIS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SSL4MIS_DATA", raising=False)


def fill(folder, cases=CASES):
    rng = np.random.default_rng(0)
    for case in cases:
        image, label = rng.normal(size=(8, 6, 5)), rng.integers(0, 2, size=(8, 6, 5))
        volumes.write_case(folder / case / "mri_norm2.h5", image, label)


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("below", [".", "LA"])
def test_both_places_are_found(tmp_path, below):
    fill(tmp_path / below)
    store = SPEC.open(tmp_path, FULL)
    store.check(CASES)
    image, label = store.image(CASES[0]), store.label(CASES[0])
    assert image.shape == (1, 8, 6, 5) and image.dtype == np.float32
    assert label.shape == (8, 6, 5) and label.dtype == np.uint8
    assert store.spacing(CASES[0]) == (0.625, 0.625, 0.625)


def test_the_environment_names_the_folder(tmp_path, monkeypatch):
    fill(tmp_path)
    monkeypatch.setenv("SSL4MIS_DATA", str(tmp_path))
    assert SPEC.open(None, FULL).image(CASES[0]).shape == (1, 8, 6, 5)


def test_lite_is_downsampled(tmp_path):
    fill(tmp_path)
    full, lite = SPEC.open(tmp_path, FULL), SPEC.open(tmp_path, LITE)
    assert lite.spacing(CASES[0]) == (1.25, 1.25, 1.25)
    for _ in range(2):  # made, then from the cache
        assert np.array_equal(lite.image(CASES[0]), volumes.downsample_image(full.image(CASES[0]), 2))
        assert np.array_equal(lite.label(CASES[0]), volumes.downsample_label(full.label(CASES[0]), 2))


@pytest.mark.parametrize("protocol", [FULL, LITE])
def test_an_image_is_read_without_looking_at_its_label(tmp_path, monkeypatch, protocol):
    fill(tmp_path)

    def forbidden(*_):
        raise AssertionError("a label was read")

    monkeypatch.setattr(volumes, "read_label", forbidden)
    monkeypatch.setattr("data_prep.la.read_label", forbidden)
    SPEC.open(tmp_path, protocol).image(CASES[0])


def test_missing_data_says_what_is_expected_and_how_to_get_it(tmp_path):
    for root in (None, tmp_path / "nowhere"):
        with pytest.raises(DataError) as error:
            SPEC.open(root, FULL)
        for part in ("<ID>/mri_norm2.h5", "UA-MT", "2018 Atrial Segmentation Challenge", "--data-root", "SSL4MIS_DATA"):
            assert part in one_line(error)


def test_check_counts_the_missing_cases(tmp_path):
    fill(tmp_path, CASES[:1])
    with pytest.raises(DataError, match=f"2 of 3 case files are missing .*first is {CASES[1]}/mri_norm2.h5") as error:
        SPEC.open(tmp_path, LITE).check(CASES)
    assert str(tmp_path) in one_line(error)
    with pytest.raises(DataError, match=f"case {CASES[2]} is missing"):
        SPEC.open(tmp_path, LITE).image(CASES[2])


def test_the_published_recipe():
    for name in ("paper", "cv5", "mcf5"):
        protocol = SPEC.protocols[name]
        assert (protocol.patch, protocol.stride) == ((112, 112, 80), (18, 18, 4))
        assert (protocol.iterations, protocol.learning_rate, protocol.schedule) == (6000, 0.01, "step")
        assert (protocol.labeled_batch, protocol.unlabeled_batch) == (2, 2)
        assert (protocol.width, protocol.precision, protocol.downsample) == (16, "32-true", 1)
    assert list(SPEC.protocols) == ["paper", "cv5", "mcf5", "lite"]
    assert all(protocol.labeled == (4, 8, 16) for protocol in SPEC.protocols.values())


def test_importing_a_data_set_loads_no_file_format_and_no_torch():
    code = (
        "import sys, data_prep; [data_prep.dataset(name) for name in data_prep.names()]; "
        "print(*{'h5py', 'scipy', 'nibabel', 'SimpleITK', 'torch', 'ssl4mis', 'networks'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.skipif(not REAL, reason="SSL4MIS_DATA is not set")
def test_the_published_files(monkeypatch):
    monkeypatch.setenv("SSL4MIS_DATA", REAL)
    full, lite = SPEC.open(None, FULL), SPEC.open(None, LITE)
    case = CASES[0]
    try:
        full.check([case])
    except DataError as error:
        pytest.skip(str(error))
    image, label = full.image(case), full.label(case)
    assert image.shape[1:] == label.shape and label.shape[2] == 88
    assert set(np.unique(label)) == {0, 1} and 0.03 < label.mean() < 0.2
    assert lite.image(case).shape[1:] == lite.label(case).shape == tuple(size // 2 for size in label.shape)
    assert lite.label(case).mean() == pytest.approx(label.mean(), rel=0.1)
