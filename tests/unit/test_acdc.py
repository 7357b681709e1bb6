"""ACDC from the archive and from the field's h5 files: which files make a case, what they hold, what is wrong."""

import importlib.util
from pathlib import Path

import h5py
import numpy as np
import pytest
from archives import acdc as archive

from data_prep import DataError, acdc, load_split
from data_prep.recipes import apply

SHARED = Path(__file__).resolve().parents[3] / "shared"
REAL = SHARED / "real" / "ACDC"
SHAPE = (20, 18, 12)
PATIENTS = ("patient001", "patient025")
SPEC = acdc.SPECS["ACDC"]


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message and "expected" in message
    return message


def by_id(cases):
    assert [case.id for case in cases] == sorted(case.id for case in cases)
    return {case.id: case for case in cases}


def test_both_frames_of_every_patient_are_found_at_any_depth(tmp_path):
    archive.build(tmp_path, ["patient120", "patient003"], SHAPE, below="database/testing")
    archive.build(tmp_path, ["patient099", "patient025", "patient001"], SHAPE, below="training")
    cases = acdc.raw_cases(tmp_path)
    patients = ("001", "003", "025", "099", "120")
    assert [case.id for case in cases] == [f"patient{n}_frame0{f}" for n in patients for f in (1, 2)]
    assert [case.patient for case in cases[::2]] == [f"patient{n}" for n in patients]
    assert [case.group for case in cases[:8:2]] == ["DCM", "DCM", "HCM", "RV"]
    assert not any(case.problem for case in cases)
    folder = tmp_path / "training" / "patient001"
    assert cases[1].images == (folder / "patient001_frame04.nii.gz",)
    assert cases[1].label == folder / "patient001_frame04_gt.nii.gz"


def test_the_patients_of_the_lists_are_the_cases(tmp_path):
    split = load_split("ACDC-lite", 0)
    archive.build(tmp_path, split.train + split.test, (16, 16, 4))
    assert set(by_id(acdc.raw_cases(tmp_path))) == {*split.train, *split.test}


def test_the_earlier_frame_is_frame01_whichever_of_ed_and_es_it_is(tmp_path):
    archive.build(tmp_path, PATIENTS, SHAPE, frames={"patient001": (11, 4)})
    first, second, *_ = acdc.raw_cases(tmp_path)
    assert (first.images[0].name, first.label.name) == ("patient001_frame04.nii.gz", "patient001_frame04_gt.nii.gz")
    assert (second.images[0].name, second.label.name) == ("patient001_frame11.nii.gz", "patient001_frame11_gt.nii.gz")
    systole = archive.heart("patient001", 1, SHAPE)[1]
    assert np.array_equal(first.read()[1].voxels, systole)


@pytest.mark.parametrize("only_4d", [False, True])
def test_a_frame_is_read_from_its_own_file_or_from_the_4d_one(tmp_path, only_4d):
    archive.build(tmp_path, PATIENTS, SHAPE, only_4d=only_4d)
    cases = acdc.raw_cases(tmp_path)[2:]
    assert [case.volume for case in cases] == ([0, 3] if only_4d else [None, None])
    for squeeze, case in enumerate(cases):
        named = f"patient025_frame0{1 + 3 * squeeze}.nii.gz"
        assert case.images[0].name == ("patient025_4d.nii.gz" if only_4d else named)
        image, label = case.read(len(acdc.CLASSES))
        expected = archive.heart("patient025", squeeze, SHAPE)
        assert np.array_equal(image.voxels, expected[0][None]) and np.array_equal(label.voxels, expected[1])
        assert np.array_equal(image.affine, np.diag([-1.5625, -1.5625, 10, 1]))
        assert set(np.unique(label.voxels)) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("wrong", "message", "bad"),
    [
        ("no Info.cfg", r"patient001/Info.cfg: no such file, expected one with the frames ED and ES", 2),
        ("no ES", r"patient001/Info.cfg: ED 1 and ES missing, expected the numbers of two frames", 2),
        ("three frames", r"patient001: annotated frames 1, 4, 5, expected 1 and 4, ED and ES of Info.cfg", 2),
        ("no label", r"patient001: no patient001_frame04_gt.nii.gz, expected the label of each", 1),
        ("no frame", r"patient001: neither patient001_frame04.nii.gz nor patient001_4d.nii.gz, expected one", 1),
    ],
)
def test_what_is_wrong_with_a_patient_is_the_problem_of_its_cases(tmp_path, wrong, message, bad):
    archive.build(tmp_path, PATIENTS, SHAPE, broken={"patient001": wrong})
    cases = acdc.raw_cases(tmp_path)
    assert [case.id for case in cases] == [f"{patient}_frame0{n}" for patient in PATIENTS for n in (1, 2)]
    assert [bool(case.problem) for case in cases] == [bad == 2, True, False, False]
    with pytest.raises(DataError, match=message) as error:
        cases[1].read()
    assert str(tmp_path) in one_line(error)
    cases[2].read(), cases[3].read()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("truncated", r"frame04.nii.gz: truncated"),
        ("text", r"frame04.nii.gz: truncated, damaged or no NIfTI file"),
        ("nan", r"frame04.nii.gz: \d+ voxels are NaN"),
        ("constant", r"frame04.nii.gz: the scan is 7 everywhere"),
        ("4D", r"frame04.nii.gz: 2 volumes or channels .* expected a single 3D volume"),
        ("shape", r"frame04_gt.nii.gz: label has shape \(19, 18, 12\), expected \(20, 18, 12\)"),
        ("affine", r"frame04_gt.nii.gz: label lies up to .* mm away"),
        ("values", r"frame04_gt.nii.gz: label has the value 5, expected 0 or 1 or 2 or 3"),
        ("empty", r"frame04_gt.nii.gz: label is background everywhere"),
    ],
)
def test_a_bad_scan_is_refused_in_one_line_and_stops_no_other(tmp_path, wrong, message):
    archive.build(tmp_path, PATIENTS, SHAPE, broken={"patient001": wrong})
    good, bad, *others = acdc.raw_cases(tmp_path)
    assert not bad.problem
    with pytest.raises(DataError, match=message) as error:
        bad.read()
    one_line(error)
    for case in (good, *others):
        case.read()


def test_a_4d_file_with_too_few_volumes_is_refused(tmp_path):
    archive.build(tmp_path, PATIENTS[:1], SHAPE, only_4d=True)
    folder = tmp_path / "database" / "training" / "patient001"
    (folder / "Info.cfg").write_text("ED: 1\nES: 9\n")
    (folder / "patient001_frame04_gt.nii.gz").rename(folder / "patient001_frame09_gt.nii.gz")
    with pytest.raises(DataError, match="patient001_4d.nii.gz: 4 volumes, expected at least 9") as error:
        acdc.raw_cases(tmp_path)[1].read()
    one_line(error)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("ED: 1\nES: 4\nGroup: NOR\n", "NOR"),
        ("ES : 4\r\n  ED:1\r\nWeight: 95.0\r\n", ""),
        ("ED: 4\nES: 4\n", None),
        ("ED: one\nES: 4\n", None),
        ("ED: 0\nES: 4\n", None),
        ("\x00\xff", None),
    ],
)
def test_info_cfg_may_look_different_but_must_name_two_frames(tmp_path, text, group):
    archive.build(tmp_path, PATIENTS[:1], SHAPE)
    (tmp_path / "database" / "training" / "patient001" / "Info.cfg").write_bytes(text.encode("latin-1"))
    for case in acdc.raw_cases(tmp_path):
        if group is None:
            assert "Info.cfg: ED" in case.problem and "\n" not in case.problem
        else:
            assert (case.problem, case.group) == ("", group)


def test_a_patient_in_two_folders_is_a_problem(tmp_path):
    archive.build(tmp_path, PATIENTS, SHAPE, below="a")
    archive.build(tmp_path, PATIENTS[:1], SHAPE, below="b")
    archive.build(tmp_path, PATIENTS[1:], SHAPE, below="__MACOSX")
    cases = acdc.raw_cases(tmp_path)
    places = f"{tmp_path / 'b' / 'patient001'}: patient001 again, expected it in {tmp_path / 'a' / 'patient001'} only"
    assert [case.problem for case in cases] == [places, places, "", ""]


def test_a_test_set_without_labels_is_unlabeled(tmp_path):
    archive.build(tmp_path, ["patient101"], SHAPE, below="testing", labels=False)
    archive.build(tmp_path, ["patient001"], SHAPE, below="training", labels=False)
    training, testing = acdc.raw_cases(tmp_path)[:2], acdc.raw_cases(tmp_path / "testing")
    assert all("no patient001_frame0" in case.problem for case in training)
    assert [case.id for case in testing] == ["patient101_frame01", "patient101_frame02"]
    assert not any(case.problem or case.label for case in testing)
    assert testing[0].read()[1] is None


@pytest.mark.parametrize("find", [acdc.raw_cases, acdc.h5_cases])
def test_another_folder_is_refused(tmp_path, find):
    (tmp_path / "lgemri.nrrd").write_text("")
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="patient001") as error:
            find(root)
        assert str(root) in one_line(error)


def test_published_volumes_have_their_slices_first(tmp_path):
    image, label = np.random.default_rng(0).random((5, 7, 9)).astype(np.float32), np.zeros((5, 7, 9), np.uint8)
    image[4, 2, 8], label[4, 2, 8] = 9, 3  # plane 4, row 2, column 8
    (tmp_path / "data").mkdir()
    with h5py.File(tmp_path / "data" / "patient061_frame02.h5", "w") as file:
        file["image"], file["label"] = image, label
    [case] = acdc.h5_cases(tmp_path)
    assert (case.id, case.patient, case.group) == ("patient061_frame02", "patient061", "NOR")
    scan, classes = case.read(len(acdc.CLASSES))
    assert scan.voxels.shape == (1, 9, 7, 5) and scan.voxels.dtype == np.float32
    assert scan.voxels[0, 8, 2, 4] == 9 and np.argwhere(classes.voxels).tolist() == [[8, 2, 4]]
    assert np.array_equal(scan.voxels[0], image.T)
    assert scan.spacing == (1.5625, 1.5625, 10.0) and not acdc.H5_SPACING_KNOWN


def test_slices_are_put_together_by_number(tmp_path):
    cases = ["patient001_frame01", "patient001_frame02"]
    archive.build_h5(tmp_path, cases, SHAPE, slices=cases[1:])
    whole, stacked = acdc.h5_cases(tmp_path)
    assert len(whole.files) == 1
    assert [path.stem.split("_")[-1] for path in stacked.files] == [str(k) for k in range(1, 13)]  # 10 after 9
    for squeeze, case in enumerate((whole, stacked)):
        image, label = case.read()
        expected = archive.heart("patient001", squeeze, SHAPE)
        assert np.array_equal(label.voxels, expected[1])
        assert np.array_equal(image.voxels.argmax(), expected[0].argmax())


def test_a_volume_is_preferred_to_its_slices(tmp_path):
    case = "patient001_frame01"
    archive.build_h5(tmp_path, [case], SHAPE, slices=[case])
    archive.build_h5(tmp_path, [case], SHAPE)
    [found] = acdc.h5_cases(tmp_path)
    assert found.files == (tmp_path / "data" / f"{case}.h5",)


@pytest.mark.parametrize("gap", [1, 7])
def test_a_missing_slice_is_a_problem(tmp_path, gap):
    cases = ["patient001_frame01", "patient001_frame02"]
    archive.build_h5(tmp_path, cases, SHAPE, slices=cases)
    (tmp_path / "data" / "slices" / f"{cases[0]}_slice_{gap}.h5").unlink()
    first, second = acdc.h5_cases(tmp_path)
    assert f"no {cases[0]}_slice_{gap}.h5, expected all slices up to 12" in first.problem
    assert not second.problem


def test_slices_may_be_counted_from_zero(tmp_path):
    case = "patient001_frame01"
    archive.build_h5(tmp_path, [case], SHAPE, slices=[case])
    for k in range(1, 13):
        path = tmp_path / "data" / "slices" / f"{case}_slice_{k}.h5"
        path.rename(path.with_name(f"{case}_slice_{k - 1}.h5"))
    [found] = acdc.h5_cases(tmp_path)
    assert not found.problem and len(found.files) == 12


def test_an_h5_file_in_two_folders_is_a_problem(tmp_path):
    for folder in ("a", "b"):
        archive.build_h5(tmp_path / folder, ["patient001_frame01"], SHAPE)
    [case] = acdc.h5_cases(tmp_path)
    assert case.problem.startswith(str(tmp_path / "b")) and str(tmp_path / "a") in case.problem


def test_the_published_recipe_gives_the_published_files(tmp_path):
    archive.build(tmp_path / "raw", PATIENTS[:1], SHAPE)
    cases = [f"patient001_frame0{n}" for n in (1, 2)]
    archive.build_h5(tmp_path / "h5", cases, SHAPE, slices=cases[1:])
    for raw, published in zip(acdc.raw_cases(tmp_path / "raw"), acdc.h5_cases(tmp_path / "h5"), strict=True):
        stored = apply(acdc.RECIPES["paper"], *raw.read())
        image, label = published.read()
        assert np.allclose(stored.image, image.voxels, rtol=0, atol=1e-6)
        assert np.array_equal(stored.label, label.voxels)
        assert (stored.image.min(), stored.image.max()) == (0, 1)


def test_the_clean_recipe_keeps_every_plane_and_looks_at_no_label(tmp_path):
    archive.build(tmp_path, PATIENTS[:1], (60, 50, 6), spacing=(1.25, 1.25, 5.0))
    image, label = acdc.raw_cases(tmp_path)[0].read()
    recipe = acdc.RECIPES["clean"]
    stored, blind = apply(recipe, image, label), apply(recipe, image)
    assert np.array_equal(stored.image, blind.image) and not recipe.label_guided
    assert stored.geometry.orientation == "RAS"
    assert stored.geometry.stored_spacing == pytest.approx((1.5625, 1.5625, 5.0), rel=0.03)
    assert stored.image.shape[3] == 6 and stored.image.shape[1] < 60
    assert np.count_nonzero(stored.label == 3) * 1.5625**2 == pytest.approx(
        np.count_nonzero(label.voxels == 3) * 1.25**2, rel=0.1)  # the heart lies within the box


def test_missing_data_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.delenv("SSL4MIS_DATA", raising=False)
    for root in (None, tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match="data_prep.prepare ACDC --raw DIR .* --from-h5 DIR"):
            SPEC.open(root, next(iter(SPEC.protocols.values())))


def test_the_published_protocol():
    for name in ("slices", "slices_cv5"):
        protocol = SPEC.protocols[name]
        assert protocol.slices and protocol.published == (name == "slices") and SPEC.dims(protocol) == 2
        assert (protocol.patch, protocol.stride) == ((256, 256), (256, 256))
        assert (protocol.iterations, protocol.learning_rate, protocol.schedule) == (30000, 0.01, "poly")
        assert (protocol.labeled_batch, protocol.unlabeled_batch, protocol.labeled) == (12, 12, (3, 7, 14))
        assert protocol.augmentation == ("rotflip_or_rotate",)
        assert (protocol.width, protocol.precision, protocol.recipe) == (16, "32-true", "paper")


def test_volumes_come_first_and_are_no_published_protocol():
    assert list(SPEC.protocols) == ["volumes", "cv5", "slices", "slices_cv5", "lite"]
    for name in ("volumes", "cv5"):
        protocol = SPEC.protocols[name]
        assert not protocol.published and SPEC.dims(protocol) == 3
        patch_mm = [size * mm for size, mm in zip(protocol.patch, SPEC.spacing, strict=True)]
        assert patch_mm == [250, 250, 160] and protocol.stride == (80, 80, 8)
    lite = SPEC.protocols["lite"]
    assert (lite.patch, lite.iterations, lite.width, lite.split) == ((128, 128), 3000, 8, "ACDC-lite")
    assert lite.slices and not lite.published and lite.augmentation == ("rotflip_or_rotate",)


@pytest.mark.parametrize("name", SPEC.protocols)
def test_labels_are_counted_in_patients(name):
    protocol = SPEC.protocols[name]
    split = load_split(protocol.split, 0)
    for count in protocol.labeled:
        cases = split.labeled(count)
        assert len({case.split("_")[0] for case in cases}) == count == len(cases) / 2
        assert split.unlabeled(count)
    assert SPEC.targets(protocol) == {"right ventricle": (1,), "myocardium": (2,), "left ventricle": (3,)}


@pytest.mark.skipif(not REAL.is_dir(), reason="no real scans: they lie in ../shared/real")
def test_a_real_patient():
    cases = acdc.raw_cases(REAL)
    assert [(case.id, case.group, case.problem) for case in cases] == [
        ("patient001_frame01", "DCM", ""), ("patient001_frame02", "DCM", "")]
    assert [case.images[0].name for case in cases] == ["patient001_frame01.nii.gz", "patient001_frame12.nii.gz"]
    volumes = []
    for case in cases:
        image, label = case.read(len(acdc.CLASSES))
        assert image.voxels.shape == (1, 216, 256, 10) and image.spacing == (1.5625, 1.5625, 10.0)
        stored = apply(acdc.RECIPES["paper"], image, label)
        assert stored.image.shape == (1, 216, 256, 10) and (stored.image.min(), stored.image.max()) == (0, 1)
        volumes.append(np.bincount(label.voxels.ravel()))
        clean = apply(acdc.RECIPES["clean"], image, label)
        assert clean.image.shape[3] == 10
        assert np.array_equal(np.bincount(clean.label.ravel())[1:], volumes[-1][1:])  # nothing of the heart is cut off
    assert volumes[0][3] > volumes[1][3]  # the left ventricle is larger in ED


@pytest.mark.skipif(not (SHARED / "acdc").is_dir(), reason="no published frames: they lie in ../shared/acdc")
def test_a_published_frame(tmp_path):
    spec = importlib.util.spec_from_file_location("shared_scans", SHARED / "scans.py")
    scans = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scans)
    image, label = scans.unpack(SHARED / "acdc" / "patient089_frame01.npz")
    with h5py.File(tmp_path / "patient089_frame01.h5", "w") as file:
        file["image"], file["label"] = image, label
    [case] = acdc.h5_cases(tmp_path)
    scan, classes = case.read(len(acdc.CLASSES))
    assert image.shape == (6, 288, 264) and scan.space == (264, 288, 6) and case.group == "RV"
    assert np.array_equal(scan.voxels[0], image.T) and np.array_equal(classes.voxels, label.T)
