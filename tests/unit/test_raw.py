"""Raw cases: files put together, label values to classes, and every refusal in one line that names the file."""

import os
import pickle
from dataclasses import replace

import h5py
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from data_prep.raw import H5Case, RawCase, below, wrong_folder
from data_prep.spec import DataError

SHAPE = (6, 5, 4)
AFFINE = np.array([[-0.7, 0, 0, 10], [0, 1.25, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1]])


def noise(seed=0, shape=SHAPE, kind=np.int16):
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(kind)


def blob(value=1, kind=np.uint8):
    label = np.zeros(SHAPE, kind)
    label[2:4, 1:3, 1:3] = value
    return label


def nifti(path, voxels, affine=AFFINE):
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


@pytest.fixture
def case(tmp_path):
    images = tuple(nifti(tmp_path / f"image{n}.nii.gz", noise(n)) for n in range(2))
    return RawCase("a", images, nifti(tmp_path / "label.nii.gz", blob(255)), {0: 0, 255: 1})


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message and "expected" in message
    return message


def change(case, **what):
    return RawCase(**{**case.__dict__, **what})


def test_channels_are_stacked_and_the_label_becomes_classes(case):
    image, label = case.read(2)
    assert np.array_equal(image.voxels, np.stack([noise(0), noise(1)])) and image.voxels.dtype == np.int16
    assert np.array_equal(image.affine, nib.load(case.images[0]).affine) and image.path == case.images[0]
    assert np.array_equal(label.voxels, blob()) and label.voxels.dtype == np.uint8
    assert image.header is not None and label.path == case.label


def test_channels_of_several_types_are_stacked_in_one_that_holds_them(case, tmp_path):
    second = nifti(tmp_path / "b.nii", noise(3, kind=np.float32) / 8)
    image, _ = change(case, images=(case.images[0], second)).read()
    assert image.voxels.dtype == np.float32
    assert np.array_equal(image.voxels, np.stack([noise(0), noise(3) / 8]))


def test_a_case_without_a_label(case):
    image, label = change(case, label=None).read()
    assert image.voxels.shape == (2, *SHAPE) and label is None


@pytest.mark.parametrize("values", [{}, {0: 0, 1: 1, 2: 2}])
def test_labels_of_any_type_that_are_classes_already(case, tmp_path, values):
    label = blob(2, np.float64)
    label[0, 0, 0] = 1
    read = change(case, label=nifti(tmp_path / "classes.nii.gz", label), values=values).read(3)[1]
    assert np.array_equal(read.voxels, label) and read.voxels.dtype == np.uint8


def test_several_values_become_one_class(case, tmp_path):
    label = blob(4)
    label[0, 0, 0] = 2
    merged = change(case, label=nifti(tmp_path / "l.nii", label), values={0: 0, 1: 1, 2: 1, 4: 1}).read(2)[1]
    assert np.array_equal(merged.voxels, label > 0)


def test_one_volume_of_a_4d_image_and_all_of_them_as_channels(case, tmp_path):
    volumes = np.stack([noise(n) for n in range(3)], axis=3)
    images = (nifti(tmp_path / "4d.nii.gz", volumes),)
    assert np.array_equal(change(case, images=images, volume=2).read()[0].voxels, noise(2)[None])
    assert np.array_equal(change(case, images=images, channels=3).read()[0].voxels, volumes.transpose(3, 0, 1, 2))


def test_align_comes_before_the_comparison_with_the_image(case, tmp_path):
    label = nifti(tmp_path / "moved.nii.gz", blob(255), np.diag([2, 2, 2, 1.0]))
    with pytest.raises(DataError, match="label lies up to"):
        change(case, label=label).read()
    aligned = change(case, label=label, align=_as_the_image).read()[1]
    assert np.array_equal(aligned.voxels, blob()) and np.array_equal(aligned.affine, nib.load(case.images[0]).affine)


def _as_the_image(image, label):
    return type(label)(label.voxels, image.affine, label.path)


def test_an_empty_label_is_refused_unless_it_may_be_empty(case, tmp_path):
    label = nifti(tmp_path / "empty.nii.gz", blob(0))
    with pytest.raises(DataError, match="empty.nii.gz: label is background everywhere, expected foreground"):
        change(case, label=label).read()
    assert not change(case, label=label, may_be_empty=True).read()[1].voxels.any()


def cut(path, keep=0.6):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def with_value(array, value):
    array = array.astype(np.float32)
    array[0, 1, 2] = value
    return array


MOVED, TURNED = AFFINE.copy(), AFFINE @ np.diag([-1, 1, 1, 1.0])
MOVED[0, 3] += 0.2

REFUSED = {
    "a problem known before": (lambda case, path: {"problem": f"{path}: no T2, expected four modalities"}, "no T2"),
    "a missing modality": (lambda case, path: {"images": (*case.images, path)}, "no such file or folder"),
    "a missing label": (lambda case, path: {"label": path}, "no such file or folder"),
    "a channel of another shape": (
        lambda case, path: {"images": (*case.images, nifti(path, noise(shape=(6, 5, 3))))},
        r"channel has shape \(6, 5, 3\), expected \(6, 5, 4\)"),
    "a channel elsewhere": (
        lambda case, path: {"images": (*case.images, nifti(path, noise(), MOVED))}, "channel lies up to 0.2 mm away"),
    "a label of another shape": (
        lambda case, path: {"label": nifti(path, blob(255)[:5])}, r"label has shape \(5, 5, 4\), expected \(6, 5, 4\)"),
    "a label elsewhere": (
        lambda case, path: {"label": nifti(path, blob(255), MOVED)}, "label lies up to 0.2 mm away"),
    "a mirrored label": (lambda case, path: {"label": nifti(path, blob(255), TURNED)}, "label lies up to 7 mm away"),
    "a value that is no class": (
        lambda case, path: {"label": nifti(path, with_value(blob(255), 7))}, "has the value 7, expected 0 or 255"),
    "several such values": (
        lambda case, path: {"label": nifti(path, noise())}, "has the values -9[0-9]+, .*, ..., expected 0 or 255"),
    "a class beyond the last": (
        lambda case, path: {"label": nifti(path, blob(2)), "values": {}}, "label has the value 2, expected 0 or 1"),
    "half a class": (
        lambda case, path: {"label": nifti(path, with_value(blob(), 0.5)), "values": {}},
        "label has the value 0.5, expected 0 or 1"),
    "a label that is not finite": (
        lambda case, path: {"label": nifti(path, with_value(blob(255), np.nan))}, "1 voxels are NaN or infinite"),
    "an image that is not finite": (
        lambda case, path: {"images": (nifti(path, with_value(noise(), np.inf)),)}, "1 voxels are NaN or infinite"),
    "a constant channel": (
        lambda case, path: {"images": (*case.images, nifti(path, np.full(SHAPE, 7, np.int16)))}, "7 everywhere"),
    "4D in place of 3D": (
        lambda case, path: {"images": (nifti(path, np.stack([noise()] * 3, axis=3)),)}, "3 volumes or channels"),
    "a 4D label": (
        lambda case, path: {"label": nifti(path, np.stack([blob(255)] * 2, axis=3))}, "2 volumes or channels"),
    "too few volumes": (
        lambda case, path: {"images": (nifti(path, np.stack([noise()] * 2, axis=3)),), "volume": 2},
        "2 volumes, expected at least 3"),
    "other channels": (
        lambda case, path: {"images": (nifti(path, np.stack([noise()] * 3, axis=3)),), "channels": 4},
        "3 volumes, expected 4, one per channel"),
    "a truncated image": (lambda case, path: {"images": (cut(nifti(path, noise())),)}, "truncated, damaged"),
    "a truncated label": (lambda case, path: {"label": cut(nifti(path, blob(255)))}, "truncated, damaged"),
    "no scan": (
        lambda case, path: {"images": (path.with_name("wrong.txt"),)}, "wrong.txt: not a medical scan"),
}


@pytest.mark.parametrize(("wrong", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_told_in_one_line_with_the_file(case, tmp_path, wrong, message):
    path = tmp_path / "wrong.nii.gz"
    path.with_name("wrong.txt").write_text("no scan")
    with pytest.raises(DataError, match=message) as error:
        change(case, **wrong(case, path)).read(2)
    assert one_line(error).startswith(str(path.with_suffix("").with_suffix("")))


def test_the_files_of_a_case_are_listed_one_by_one(case, tmp_path):
    folder = tmp_path / "series"
    (folder / "deep").mkdir(parents=True)
    slices = [folder / "1.dcm", folder / "2.dcm", folder / "deep" / "3.dcm"]
    for path in reversed(slices):
        path.write_bytes(b"")
    image = sitk.GetImageFromArray(noise())
    for suffix, beside in ((".mhd", ".raw"), (".nhdr", ".raw.gz")):
        header = tmp_path / f"scan{suffix}"
        sitk.WriteImage(image, str(header), useCompression=suffix == ".nhdr")
        files = RawCase("b", (folder, header, header), case.label).files
        assert files == (*slices, header, header.with_suffix(beside), case.label)


def test_a_name_that_is_not_utf8_is_refused_before_a_library_ends_the_process(case, tmp_path):
    path = tmp_path / os.fsdecode(b"M\xfcller.nrrd")
    with pytest.raises(DataError, match=r"M.udcfcller.nrrd': the name is not UTF-8, expected one that is") as error:
        replace(case, images=(path,)).read()
    one_line(error)


def test_cases_travel_to_other_processes(case):
    sent = change(case, align=_as_the_image, note="note")
    assert pickle.loads(pickle.dumps(sent)) == sent


# h5


def h5(path, image, label):
    with h5py.File(path, "w") as file:
        file["image"], file["label"] = image, label
    return path


def test_an_h5_volume_is_read_with_its_axes_in_order(tmp_path):
    image, label = noise(kind=np.float32), blob(kind=np.float32)
    case = H5Case("a", (h5(tmp_path / "a.h5", image, label),), axes=(2, 0, 1), spacing=(0.5, 1.0, 3.0))
    scan, classes = case.read(2)
    for (i, j, k), value in np.ndenumerate(image):
        assert scan.voxels[0, k, i, j] == value
    assert classes.voxels.shape == (4, 6, 5) and classes.voxels[1, 2, 1] == 1 and classes.voxels.dtype == np.uint8
    assert np.array_equal(scan.affine, np.diag([-0.5, -1, 3, 1])) and scan.spacing == (0.5, 1, 3)
    assert scan.voxels.dtype == np.float32 and np.array_equal(classes.affine, scan.affine)


def test_h5_slices_become_a_volume_in_their_order(tmp_path):
    image, label = noise(kind=np.float32), blob(3)
    files = tuple(h5(tmp_path / f"{n}.h5", image[n], label[n]) for n in range(6))
    scan, classes = H5Case("a", files, axes=(2, 1, 0), values={0: 0, 3: 1}).read(2)
    assert np.array_equal(scan.voxels[0], image.T) and np.array_equal(classes.voxels, label.T // 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda path: h5(path, noise(), blob()[:5]), r"'label' has shape \(5, 5, 4\), expected \(6, 5, 4\)"),
        (lambda path: h5(path, noise()[0], blob()[0]), r"'image' has shape \(5, 4\), expected 3 or 4 axes"),
        (lambda path: h5(path, with_value(noise(), np.nan), blob()), "1 voxels with NaN or infinity"),
        (lambda path: h5(path, blob(0), blob()), "'image' is 0 everywhere"),
        (lambda path: h5(path, noise(), blob(2)), "label has the value 2, expected 0 or 1"),
        (lambda path: h5(path, noise(), blob(0)), "label is background everywhere"),
        (lambda path: cut(h5(path, noise(), blob())), "not an h5 file, truncated or unreadable"),
        (lambda path: path, "no such file"),
    ],
)
def test_wrong_h5_files_are_told_in_one_line(tmp_path, wrong, message):
    with pytest.raises(DataError, match=message) as error:
        H5Case("a", (wrong(tmp_path / "wrong.h5"),)).read(2)
    assert one_line(error).startswith(f"{tmp_path / 'wrong.h5'}: ")


def test_h5_slices_must_be_of_one_size(tmp_path):
    files = (h5(tmp_path / "0.h5", noise()[0], blob()[2]), h5(tmp_path / "1.h5", noise()[1, :4], blob()[2, :4]))
    with pytest.raises(DataError, match=r"1.h5: 'image' has shape \(1, 4, 4\), expected \(1, 5, 4\) as 0.h5"):
        H5Case("a", files).read()


def test_a_problem_of_an_h5_case_is_what_reading_says(tmp_path):
    with pytest.raises(DataError, match="^this, expected that$"):
        H5Case("a", problem="this, expected that").read()


# folders


def test_folders_are_gone_through_in_order_with_their_links_and_each_once(tmp_path):
    for name in ("b/x.nii", "a/z.nii", "a/y.nii", "a/._y.nii", ".git/y.nii", "__MACOSX/a/y.nii", "a/DATA/manifest.json",
                 "a/DATA/cases/y.h5", "a/cases/y.h5", "a/manifests/manifest.json"):
        (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / name).touch()
    (tmp_path / "other" / "disk").mkdir(parents=True)
    (tmp_path / "other" / "disk" / "labels.nii").touch()
    (tmp_path / "raw" / "c").symlink_to(tmp_path / "other")
    (tmp_path / "raw" / "b" / "round").symlink_to(tmp_path / "raw")
    (tmp_path / "raw" / "b" / "lost").symlink_to(tmp_path / "gone")
    found = [(folder.relative_to(tmp_path / "raw").as_posix(), names) for folder, names in below(tmp_path / "raw")]
    assert found == [(".", []), ("a", ["y.nii", "z.nii"]), ("a/cases", ["y.h5"]), ("a/manifests", ["manifest.json"]),
                     ("b", ["lost", "x.nii"]), ("c", []), ("c/disk", ["labels.nii"])]
    assert list(below(tmp_path / "gone")) == []


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "raw" / "a").mkdir(parents=True)
    scandir = os.scandir

    def locked(place):
        if str(place).endswith("a"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(DataError, match="a: cannot be read .Permission denied., expected a folder of the archive"):
        list(below(tmp_path / "raw"))


def test_a_folder_that_is_not_the_archive(tmp_path):
    def line(place):
        return str(wrong_folder(place, "the archive"))

    assert line(tmp_path) == f"{tmp_path}: found nothing, expected the archive"
    assert line(tmp_path / "a") == f"{tmp_path / 'a'}: no such folder, expected the archive"
    for name in "edcba":
        (tmp_path / name).write_text("")
    (tmp_path / "f").mkdir()
    assert line(tmp_path) == f"{tmp_path}: found a, b, c, d and 2 more, expected the archive"
    assert line(tmp_path / "a") == f"{tmp_path / 'a'}: not a folder, expected the archive"
    (tmp_path / "f" / "LA.zip").write_text("")
    assert line(tmp_path / "f") == f"{tmp_path / 'f'}: found LA.zip, expected the archive (unpack what is packed first)"
