"""Segmentations of new scans lie on the scans' own voxels, whatever their axes, their format and the recipe."""

import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

import data_prep
from data_prep import DataError
from data_prep.recipes import Crop, Recipe, Step
from data_prep.scans import LPS, Scan, read_scan, spacing_of, write_scan
from ssl4mis import checkpoint, config, export
from ssl4mis import predict as module
from ssl4mis.errors import UserError
from ssl4mis.inference import sliding_window
from ssl4mis.method import Method, Task
from ssl4mis.predict import Model, find_scans, predict
from ssl4mis.run import build_method

LEVELS = (500, 900)  # from which intensity on a voxel is of class 1, of class 2
CLASSES = ("background", "organ", "lesion")
WINDOW = Step("rescale", {"low": 0, "high": 1000})
PLAIN = {"dataset": "test", "name": "plain", "version": 1, "about": "", "after": (WINDOW,)}
CPU = torch.device("cpu")


class Shared(list):
    """A list that the copies of its owner share."""

    def __deepcopy__(self, memo):
        return self


class Bright(Method):
    """Untrained: a voxel's class follows from its own intensity, with a probability that grows around the level."""

    def __init__(self, channels=1, dims=3, classes=CLASSES, channel=0):
        super().__init__(None, Task(len(classes), dims, channels), None)
        self.channel, self.seen = channel, Shared()

    def predict(self, image):
        self.seen.append(tuple(image.shape))
        value = image[:, self.channel] * 1000
        above = [torch.sigmoid((value - level) / 5) for level in LEVELS[: self.task.classes - 1]]
        edges = [torch.ones_like(value), *above, torch.zeros_like(value)]
        return torch.stack([low - high for low, high in zip(edges, edges[1:], strict=False)], 1)


def model(recipe=None, patch=(8, 8, 8), channels=("CT",), classes=CLASSES, channel=0, **card):
    """`card` has entries of its parts `task` and `input`."""
    task = {"classes": list(classes), "dims": len(patch), "channels": list(channels), "slices": len(patch) == 2}
    known = {"spacing": [1.0, 1.0, 1.0], "spacing_known": False, "downsample": 1}
    for name, value in card.items():
        (task if name in task else known)[name] = value
    spec = {"method": "bright", "dataset": "test", "patch": list(patch), "stride": [1] * len(patch)}
    described = {"id": "test-run", "spec": spec, "task": task, "input": known, "training": {"iterations": 3, "of": 3}}
    method = Bright(len(channels), len(patch), classes, channel).eval()
    return Model(described, method, recipe or Recipe(**PLAIN), CPU)


def expected(voxels):
    return np.digitize(voxels, LEVELS, right=True).astype(np.uint8)


def phantom(shape=(19, 14, 11), seed=0):
    """Int16: three smooth structures without any symmetry, crossing the levels steeply, on a textured background."""
    x, y, z = np.meshgrid(*((np.arange(n) + 0.5) / n for n in shape), indexing="ij")
    voxels = np.random.default_rng(seed).integers(50, 150, shape).astype(np.float64)
    for (a, b, c), radius, value in (((0.3, 0.4, 0.45), 0.28, 700), ((0.75, 0.7, 0.3), 0.2, 750),
                                     ((0.3, 0.4, 0.45), 0.14, 1200)):
        voxels[(x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2 < radius**2] = value
    voxels[-3:, :2, -2:] = 1100  # a mark in one corner
    return voxels.astype(np.int16)


def turn(degrees):
    result = np.eye(3)
    for (a, b), angle in zip(((1, 2), (2, 0), (0, 1)), np.radians(degrees), strict=True):
        part = np.eye(3)
        part[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        result = part @ result
    return result


def affine_of(axes="RAS", spacing=(1.0, 1.0, 1.0), degrees=(0, 0, 0)):
    """Axes point to three directions, then the head turns."""
    affine = np.zeros((4, 4))
    for n, code in enumerate(axes):
        affine["RLAPSI".index(code) // 2, n] = spacing[n] if code in "RAS" else -spacing[n]
    affine[:3] = turn(degrees) @ affine[:3]
    affine[:, 3] = (-31, 12.5, 40, 1)
    return affine


AFFINES = {
    "axes as in the store": affine_of(),
    "anisotropic": affine_of(spacing=(0.7, 0.9, 3)),
    "flipped": affine_of("LPI"),
    "permuted": affine_of("SRA", (3, 0.8, 0.8)),
    "permuted and flipped": affine_of("IPR", (2.5, 0.7, 1.2)),
    "oblique": affine_of("LPS", (0.8, 0.8, 2.5), (20, -15, 30)),
    "oblique and permuted": affine_of("PIR", (0.9, 1.1, 2), (-25, 10, 38)),
}
CROPPED = Recipe(**PLAIN | {"crop": Crop("nonzero")})


def scan_of(voxels, affine, path="scan.nii.gz"):
    return Scan(voxels if voxels.ndim == 4 else voxels[None], affine, Path(path))


def dice(a, b):
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


# --- one scan


@pytest.mark.parametrize("orientation", ["RAS", "LPI", None])
@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_without_resampling_every_voxel_is_in_its_place(affine, orientation):
    voxels = phantom()
    found = model(Recipe(**PLAIN | {"orientation": orientation})).segment(scan_of(voxels, affine), (4, 5, 3))
    assert found.labels.dtype == np.uint8 and found.probabilities is None
    assert np.array_equal(found.labels, expected(voxels)) and set(np.unique(found.labels)) == {0, 1, 2}


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_outside_the_crop_there_is_background(affine):
    voxels = phantom()
    voxels[:4], voxels[:, 12:], voxels[..., :2] = 0, 0, 0
    found = model(CROPPED).segment(scan_of(voxels, affine), (4, 4, 4), probabilities=True)
    assert np.array_equal(found.labels, expected(voxels))
    assert found.probabilities.shape == (3, *voxels.shape) and found.probabilities.dtype == np.float32
    assert np.all(found.probabilities[:, :4].T == (1, 0, 0))
    assert np.array_equal(found.probabilities.argmax(0), found.labels)


@pytest.mark.parametrize("spacing", [(1.3, 1.3, 1.3), (0.6, 0.8, 1.5)])
@pytest.mark.parametrize("affine", [AFFINES["oblique"], AFFINES["permuted and flipped"]], ids=["oblique", "permuted"])
def test_with_resampling_the_overlay_fits(affine, spacing):
    voxels = phantom((44, 36, 30))
    recipe = Recipe(**PLAIN | {"spacing": spacing, "order": 1, "crop": Crop("nonzero")})
    found = model(recipe, (16, 16, 16)).segment(scan_of(voxels, affine), (12, 12, 12), probabilities=True)
    truth = expected(voxels)
    assert dice(found.labels > 0, truth > 0) > 0.95 and dice(found.labels == 2, truth == 2) > 0.9
    for axis in range(3):  # a voxel off would show
        for step in (-1, 1):
            assert dice(np.roll(found.labels, step, axis) > 0, truth > 0) < dice(found.labels > 0, truth > 0)
    assert np.array_equal(found.probabilities.argmax(0), found.labels)
    assert found.probabilities.sum(0) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("shape", "axes"), [((24, 20, 16), "LPI"), ((23, 21, 15), "RAS")])
def test_a_network_trained_at_half_the_resolution(shape, axes):
    blocks = np.random.default_rng(1).choice((100, 700, 1200), [-(-n // 4) for n in shape]).astype(np.int16)
    voxels = blocks.repeat(4, 0).repeat(4, 1).repeat(4, 2)[: shape[0], : shape[1], : shape[2]]
    made = model(downsample=2)
    found = made.segment(scan_of(voxels, affine_of(axes)), (8, 8, 8), probabilities=True)
    assert found.labels.shape == shape and found.probabilities.shape == (3, *shape)
    # of a block of 4 voxels the middle ones are as far from the other blocks as the coarse voxels' centers
    inside = np.ix_(*([i for i in range(n) if i % 4 in (1, 2)] for n in shape))
    assert np.array_equal(found.labels[inside], expected(voxels)[inside])
    windows = sum(seen[0] for seen in made.method.seen)
    assert windows == np.prod([-(-max(-(-n // 2) - 8, 0) // 8) + 1 for n in shape])


def test_a_scan_smaller_than_the_window_is_padded():
    voxels = phantom((9, 5, 4))
    found = model(patch=(12, 12, 12)).segment(scan_of(voxels, AFFINES["oblique"]), (6, 6, 6))
    assert np.array_equal(found.labels, expected(voxels))


def test_slices():
    voxels = phantom((16, 12, 9))
    recipe = Recipe(**PLAIN | {"orientation": None})
    made = model(recipe, patch=(32, 24))  # planes doubled to the patch and halved again
    found = made.segment(scan_of(voxels, AFFINES["oblique"]), ())
    assert np.array_equal(found.labels, expected(voxels)) and found.probabilities is None
    assert {seen[1:] for seen in made.method.seen} == {(1, 32, 24)} and sum(seen[0] for seen in made.method.seen) == 9


def test_channels_keep_their_order():
    one, two = phantom(), phantom(seed=1)[::-1]
    found = model(channels=("A", "B"), channel=1).segment(scan_of(np.stack([one, two]), AFFINES["permuted"]), (8, 8, 8))
    assert np.array_equal(found.labels, expected(two))


def test_voxels_of_another_size_are_told():
    lines = []
    odd = scan_of(phantom(), affine_of(spacing=(1, 1, 3)), "far.nii")
    model(spacing_known=True).segment(odd, (8, 8, 8), say=lines.append)
    assert len(lines) == 1 and "far.nii: voxels of 1 x 1 x 3 mm" in lines[0] and "1 x 1 x 1 mm" in lines[0]
    model(spacing_known=True, spacing=[2.0, 2.0, 6.0], downsample=2).segment(odd, (8, 8, 8), say=lines.append)
    model(Recipe(**PLAIN | {"spacing": (1, 1, 1)}), spacing_known=True).segment(odd, (8, 8, 8), say=lines.append)
    assert len(lines) == 1


# --- files: shape, affine and header are those of the scan


def save_nifti(path, voxels, affine):
    image = nib.Nifti1Image(voxels, None)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, 2)
    image.set_qform(affine, 1)
    nib.save(image, path)
    return path


def save_itk(path, voxels, affine):
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
    lps = LPS @ affine
    image.SetSpacing(spacing_of(lps))
    image.SetDirection((lps[:3, :3] / spacing_of(lps)).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    sitk.WriteImage(image, str(path))
    return path


def save_dicom(folder, voxels, affine):
    """Slices whose names and numbers run against their positions."""
    folder.mkdir(parents=True)
    lps = LPS @ affine
    spacing = spacing_of(lps)
    row, column = (lps[:3, :2] / spacing[:2]).T
    count = voxels.shape[2]
    for k in range(count):
        part = pydicom.Dataset()
        part.file_meta = FileMetaDataset()
        part.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        part.SOPClassUID = part.file_meta.MediaStorageSOPClassUID = CTImageStorage
        part.SOPInstanceUID = part.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{k + 1}"
        part.Modality, part.SeriesInstanceUID, part.StudyInstanceUID = "CT", "1.2.3", "1.2"
        part.PatientID = part.PatientName = "x"
        part.InstanceNumber = count - k
        part.ImagePositionPatient = [f"{value:.10g}" for value in lps[:3, 3] + k * lps[:3, 2]]
        part.ImageOrientationPatient = [f"{value:.12g}" for value in (*row, *column)]
        part.PixelSpacing, part.SliceThickness = [spacing[1], spacing[0]], spacing[2]
        part.Rows, part.Columns, part.SamplesPerPixel = voxels.shape[1], voxels.shape[0], 1
        part.BitsAllocated = part.BitsStored = 16
        part.HighBit, part.PixelRepresentation, part.PhotometricInterpretation = 15, 1, "MONOCHROME2"
        part.RescaleSlope, part.RescaleIntercept = 1, -24
        part.PixelData = (np.ascontiguousarray(voxels[..., k].T) + 24).astype("<i2").tobytes()
        part.save_as(folder / f"IM{count - k:03}.dcm", enforce_file_format=True)
    return folder


FORMATS = {"a.nii.gz": ".nii.gz", "a.nii": ".nii", "a.nrrd": ".nrrd", "a.mha": ".mha", "a.mhd": ".nii.gz",
           "a.nhdr": ".nii.gz", "a": ".nii.gz"}


def save(path, voxels, affine):
    writer = save_nifti if ".nii" in path.name else save_itk if path.suffix else save_dicom
    return writer(path, voxels, affine)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(inputs, ...) -> (lines of failures, lines said) with a model of one's own in place of a trained one."""

    def call(*inputs, made=None, **options):
        said = []
        monkeypatch.setattr(module, "load", lambda *rest: made or model())
        failed = predict("test", inputs, options.pop("output", tmp_path / "out"), say=said.append, **options)
        return failed, said

    return call


@pytest.mark.parametrize("affine", [affine_of("LPS", (0.7, 0.7, 2.5), (20, -15, 30)),
                                    affine_of("PRS", (2, 0.75, 0.5), (5, 40, -8))], ids=["oblique", "permuted"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_result_lies_over_the_scan_in_its_format(tmp_path, run, name, affine):
    voxels = phantom()
    path = save(tmp_path / name, voxels, affine)
    assert run(path)[0] == []
    result = tmp_path / "out" / f"a_seg{FORMATS[name]}"
    source, found = read_scan(path), read_scan(result)
    assert np.allclose(source.affine, affine, atol=1e-4)
    assert found.space == source.space == voxels.shape and np.allclose(found.affine, source.affine, atol=1e-4)
    assert found.voxels.dtype == np.uint8 and np.array_equal(found.voxels, expected(voxels))
    # ITK, in its own convention, finds the corner's mark at the place in the patient where the scan has it
    at = tuple(map(int, np.argwhere(expected(voxels) == 2)[-1]))
    image = sitk.ReadImage(str(result))
    assert image[at] == 2
    place = np.array(image.TransformIndexToPhysicalPoint(at)) * (-1, -1, 1)
    assert place == pytest.approx((affine @ (*at, 1))[:3], abs=1e-3)


def test_nifti_keeps_both_transforms_of_the_header(tmp_path, run):
    image = nib.Nifti1Image(phantom(), None)
    image.set_sform(AFFINES["oblique"], 4)
    image.set_qform(AFFINES["oblique"], 1)
    nib.save(image, tmp_path / "a.nii.gz")
    run(tmp_path / "a.nii.gz", probabilities=True)
    source = nib.load(tmp_path / "a.nii.gz").header
    for kind, shape in (("seg", (19, 14, 11)), ("prob", (19, 14, 11, 3))):
        header = nib.load(tmp_path / "out" / f"a_{kind}.nii.gz").header
        assert header.get_data_shape() == shape
        for name in ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d",
                     "qoffset_x", "xyzt_units"):
            assert np.array_equal(header[name], source[name]), name


def test_probabilities_and_preview_on_request(tmp_path, run):
    save_itk(tmp_path / "a.nrrd", phantom(), AFFINES["oblique"])
    assert run(tmp_path / "a.nrrd", probabilities=True, preview=True)[0] == []
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"a_seg.nrrd", "a_prob.nrrd", "a_preview.png", "predictions.json"}
    found = read_scan(tmp_path / "out" / "a_prob.nrrd", channels=True)
    assert found.voxels.dtype == np.float32 and found.voxels.shape == (3, *phantom().shape)
    assert np.array_equal(found.voxels.argmax(0), expected(phantom()))
    assert found.voxels.sum(0) == pytest.approx(1, abs=1e-6)
    assert (tmp_path / "out" / "a_preview.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_preview_shows_where_the_organ_is(tmp_path):
    from matplotlib.image import imread

    voxels = np.full((40, 30, 10), 100, np.int16)
    voxels[28:36, 5:25, 2:8] = 800  # to the left of the patient, where i grows to the left
    scan = scan_of(voxels, affine_of("LPS", (1, 1, 4)))
    module.write_preview(tmp_path / "x_preview.png", scan, expected(voxels), ("background", "organ"), "x", "model")
    picture = imread(tmp_path / "x_preview.png")[66:, :, :3]
    colored = np.ptp(picture, axis=-1) > 0.2
    columns = np.flatnonzero(colored.any(0))
    gray = np.flatnonzero((picture.max(-1) > 0.05).any(0))
    breaks = np.flatnonzero(np.diff(columns) > 20)
    axial, rest = columns[: breaks[0] + 1], columns[breaks[0] + 1 :]
    assert len(breaks) == 2 and len(rest)  # three planes
    assert axial.mean() > gray.min() + 100  # the patient's left is on the right
    rows = np.flatnonzero(colored[:, axial[0] : axial[-1] + 1].any(1))
    assert len(rows) / len(axial) == pytest.approx(20 / 8, rel=0.2)  # 20 x 8 mm
    middle = rest[: np.flatnonzero(np.diff(rest) > 20)[0] + 1]
    rows = np.flatnonzero(colored[:, middle[0] : middle[-1] + 1].any(1))
    assert len(rows) / len(middle) == pytest.approx(24 / 8, rel=0.2)  # 6 planes of 4 mm


def test_the_same_scan_gives_the_same_bytes(tmp_path, run):
    save_nifti(tmp_path / "a.nii.gz", phantom(), AFFINES["flipped"])
    for name in ("one", "two"):
        run(tmp_path / "a.nii.gz", output=tmp_path / name, probabilities=True, preview=True)
    files = sorted((tmp_path / "one").iterdir())
    assert len(files) == 4
    for file in files:
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


# --- many scans


@pytest.fixture
def folder(tmp_path):
    """A scan of three formats, a series, a bad scan and what is none."""
    place = tmp_path / "scans"
    place.mkdir()
    save_nifti(place / "a.nii.gz", phantom(), AFFINES["flipped"])
    save_itk(place / "b.mha", phantom(seed=2), AFFINES["oblique"])
    save_dicom(place / "deep" / "er" / "series", phantom(seed=3), AFFINES["flipped"])
    (place / "c.nrrd").write_text("no scan")
    (place / "notes.txt").write_text("nor this")
    (place / ".hidden.nii.gz").write_text("nor this")
    return place


def test_a_bad_scan_never_stops_the_others(tmp_path, run, folder):
    failed, said = run(folder)
    assert len(failed) == 1 and str(folder / "c.nrrd") in failed[0] and "\n" not in failed[0]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"a_seg.nii.gz", "b_seg.mha", "series_seg.nii.gz", "predictions.json"}
    assert [line.split(":")[0] for line in said[-4:]] == ["1/4 a", "2/4 b", "3/4 c", "4/4 series"]
    assert "not possible" in said[-2]


def test_what_is_there_is_skipped_and_can_be_done_again(tmp_path, run, folder):
    (folder / "c.nrrd").unlink()
    run(folder)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    made = model()
    _, said = run(folder, made=made)
    assert not made.method.seen and "3 of 3 scans are skipped" in said[-1]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == files
    (tmp_path / "out" / "b_seg.mha").unlink()
    _, said = run(folder, made=made)
    assert "2 of 3 scans are skipped" in said[-2] and said[-1].startswith("1/1 b")
    run(folder, overwrite=True)
    assert all(path.stat().st_mtime_ns > time for path, time in files.items())


def test_more_is_asked_of_a_scan_that_was_done(tmp_path, run, folder):
    run(folder / "a.nii.gz")
    run(folder / "a.nii.gz", probabilities=True)
    assert (tmp_path / "out" / "a_prob.nii.gz").exists()


def test_results_of_another_model_are_never_mixed(tmp_path, run, folder):
    run(folder / "a.nii.gz", stride=[8, 8, 8])
    with pytest.raises(UserError, match=r"a_seg.nii.gz: was made by test-run, stride \[8, 8, 8\]; expected another"):
        run(folder / "a.nii.gz")
    run(folder / "a.nii.gz", overwrite=True)
    entry = json.loads((tmp_path / "out" / "predictions.json").read_text())["files"]["a_seg.nii.gz"]
    content = hashlib.sha256(hashlib.sha256((folder / "a.nii.gz").read_bytes()).digest()).hexdigest()
    assert entry == {"model": "test-run", "iterations": 3, "recipe": "test-plain-1", "stride": [4, 4, 4],
                     "classes": list(CLASSES), "scan": str(folder / "a.nii.gz"), "sha256": content}


def test_a_scan_of_the_same_name_is_another_scan(tmp_path, run, folder):
    """Every patient's file may be called scan.nii.gz: no one gets the mask of another."""
    other = tmp_path / "other" / "a.nii.gz"
    other.parent.mkdir()
    write_scan(other, phantom((20, 16, 12)), AFFINES["flipped"])
    run(folder / "a.nii.gz")
    before = (tmp_path / "out" / "a_seg.nii.gz").read_bytes()
    with pytest.raises(UserError) as error:
        run(other)
    assert f"was made of {folder / 'a.nii.gz'}; expected another --output for {other}" in str(error.value)
    assert (tmp_path / "out" / "a_seg.nii.gz").read_bytes() == before
    run(other, overwrite=True)
    assert read_scan(tmp_path / "out" / "a_seg.nii.gz", contrast=False).space == (20, 16, 12)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_of_someone_else_is_never_replaced(tmp_path, run, folder, overwrite):
    label = folder / "a_seg.nii.gz"
    label.write_bytes(b"drawn by hand")
    with pytest.raises(UserError, match="a_seg.nii.gz: is there and no prediction of this suite, expected another"):
        run(folder / "a.nii.gz", output=folder, overwrite=overwrite)
    assert label.read_bytes() == b"drawn by hand" and not (folder / "predictions.json").exists()


def test_results_beside_the_scans_are_no_scans(tmp_path, run, folder):
    (folder / "c.nrrd").unlink()
    run(folder, output=folder)
    before = sorted(path.name for path in folder.iterdir())
    failed, said = run(folder, output=folder)
    assert failed == [] and sorted(path.name for path in folder.iterdir()) == before
    assert any("left out" in line and "a_seg.nii.gz" in line for line in said)
    run(folder, output=folder / "out")
    for file in folder.glob("*_seg.*"):
        file.unlink()
    failed, said = run(folder, output=folder / "out")
    assert failed == [] and "3 of 3" in said[-1] and not any("left out" in line for line in said)


def test_files_of_one_scan_may_be_named_one_by_one(tmp_path):
    names = ("flair", "t1", "t1ce", "t2")
    files = [tmp_path / f"{case}_{name}.nii.gz" for case in ("x", "y") for name in reversed(names)]
    for file in files:
        file.write_bytes(b"")
    for inputs in (files, [tmp_path]):
        found = module.find_scans(inputs, ("FLAIR", "T1", "T1ce", "T2"), tmp_path / "out", say=lambda text: None)
        assert [(case.id, [image.name for image in case.images], case.problem) for case in found] == [
            (case, [f"{case}_{name}.nii.gz" for name in names], "") for case in ("x", "y")]


def test_two_commands_may_fill_one_folder(tmp_path, folder):
    entry = {"model": "x", "stride": [4, 4, 4]}
    one, two = (module.Listing(tmp_path / "out", entry) for _ in range(2))
    scanned = {"scan": "a", "sha256": "0"}
    one.note([tmp_path / "out" / "a_seg.nii.gz"], scanned)
    two.note([tmp_path / "out" / "b_seg.nii.gz"], scanned)
    files = json.loads((tmp_path / "out" / "predictions.json").read_text())["files"]
    assert files == {"a_seg.nii.gz": entry | scanned, "b_seg.nii.gz": entry | scanned}


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"files": ["a"]}', '{"files": {"a": 1}}'])
def test_a_list_of_predictions_that_is_none(tmp_path, run, folder, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.json").write_text(text)
    with pytest.raises(DataError, match="predictions.json: cannot be read .*, expected the list of the predictions"):
        run(folder / "a.nii.gz")


def test_what_is_stopped_while_another_model_replaces_it_is_done_again(tmp_path, run, folder, monkeypatch):
    def stopped(*rest, **more):
        raise KeyboardInterrupt

    run(folder / "a.nii.gz", stride=[8, 8, 8])
    monkeypatch.setattr(module, "write_scan", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(folder / "a.nii.gz", overwrite=True)
    monkeypatch.undo()
    _, said = run(folder / "a.nii.gz")
    assert said[-1].startswith("1/1 a: organ")


def test_nothing_half_written_stays(tmp_path, run, folder, monkeypatch):
    def broken(path, *rest, **more):
        raise DataError(f"{path}: no space left, expected some")

    monkeypatch.setattr(module, "write_scan", broken)
    with pytest.raises(DataError, match="no space left"):
        run(folder / "a.nii.gz")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.json"]
    monkeypatch.undo()
    run(folder / "a.nii.gz")
    assert (tmp_path / "out" / "a_seg.nii.gz").exists()


def test_a_scan_beyond_the_memory_is_one_line(tmp_path, run, folder):
    class Full(Bright):
        def predict(self, image):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nlong\nstory")

    full = Model(model().card, Full(), Recipe(**PLAIN), CPU)
    failed, _ = run(folder / "a.nii.gz", folder / "b.mha", made=full)
    assert len(failed) == 2 and "19 x 14 x 11 voxels, more than the memory of this cpu holds" in failed[0]
    assert not any("\n" in line for line in failed)


# --- which files are a scan


def ids(place, channels, output="/nowhere", said=None):
    said = [] if said is None else said
    return {case.id: tuple(path.name for path in case.images)
            for case in find_scans([place], channels, Path(output), said.append)}


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


BRATS = ("FLAIR", "T1", "T1ce", "T2")


@pytest.mark.parametrize("names", [
    ("x_1_flair.nii.gz", "x_1_t1.nii.gz", "x_1_t1ce.nii.gz", "x_1_t2.nii.gz"),
    ("x-1-T2F.nii.gz", "x-1-T1n.nii.gz", "x-1-T1c.nii.gz", "x-1-T2w.nii.gz"),
    ("x_1_0000.nii.gz", "x_1_0001.nii.gz", "x_1_0002.nii.gz", "x_1_0003.nii.gz"),
    ("x_1FLAIR.nii.gz", "x_1T1.nii.gz", "x_1T1CE.nii.gz", "x_1T2.nii.gz"),
    ("FLAIR x 1.nrrd", "T1 x 1.nrrd", "T1Gd x 1.nrrd", "T2 x 1.nrrd"),
    ("T1_x_flair.nii", "T1_x_t1.nii", "T1_x_t1ce.nii", "T1_x_t2.nii"),
    ("x_1FLAIR.nii", "x_1T1w.nii", "x_1T1Gd.nii", "x_1T2w.nii"),
])
def test_one_file_per_modality(tmp_path, names):
    touch(tmp_path / "case", *names, "x_1_seg.nii.gz", "info.json")
    found = ids(tmp_path / "case", BRATS)
    assert list(found.values()) == [names]
    assert set(found) <= {"x_1", "x-1", "x 1", "T1_x"}


def test_names_that_share_nothing_but_the_folder(tmp_path):
    touch(tmp_path / "patient", "3_t2_axial.nii", "1_flair.nii", "9_t1ce_late.nii", "7_t1_native.nii")
    assert ids(tmp_path / "patient", BRATS) == {
        "patient": ("1_flair.nii", "7_t1_native.nii", "9_t1ce_late.nii", "3_t2_axial.nii")}
    touch(tmp_path / "plain", *(f"{name}.mha" for name in BRATS))
    assert ids(tmp_path / "plain", BRATS) == {"plain": tuple(f"{name}.mha" for name in BRATS)}


def test_many_scans_of_several_modalities(tmp_path):
    touch(tmp_path, *(f"{case}/{case}_{name}.nii.gz" for case in ("p1", "p2") for name in BRATS), "flat/a_0000.nii.gz",
          "flat/a_0001.nii.gz", "flat/a_0002.nii.gz", "flat/a_0003.nii.gz", "flat/b_0000.nii.gz", "flat/b_0001.nii.gz",
          "flat/b_0002.nii.gz", "flat/b_0003.nii.gz", "anat/other.nii.gz")
    said = []
    assert set(ids(tmp_path, BRATS, said=said)) == {"p1", "p2", "a", "b"}
    assert len(said) == 1 and "other.nii.gz" in said[0]
    assert ids(tmp_path, BRATS)["b"] == tuple(f"b_000{n}.nii.gz" for n in range(4))


def test_files_that_hold_all_channels(tmp_path):
    touch(tmp_path, "one.nii.gz", "two_0004.nii.gz", "deep/three.nrrd")
    assert set(ids(tmp_path, BRATS)) == {"one", "two_0004", "three"}
    touch(tmp_path / "alike", "MRI_a.nii")  # the name tells nothing where two channels have the same
    assert [case.problem for case in find_scans([tmp_path / "alike"], ("MRI", "MRI"), Path("/nowhere"))] == [""]


def test_a_missing_or_doubled_modality_is_the_problem_of_its_scan(tmp_path):
    touch(tmp_path, *(f"a_{name}.nii" for name in BRATS), "b_flair.nii", "b_t1.nii", "b_t2.nii",
          *(f"c_{name}.nii" for name in BRATS), "c_t1n.nii")
    problems = {case.id: case.problem for case in find_scans([tmp_path], BRATS, Path("/nowhere"))}
    assert problems["a"] == "" and "b*: no file for T1ce, expected one for each of FLAIR, T1, T1ce, T2" in problems["b"]
    assert "c_T1.nii and c_t1n.nii for one modality" in problems["c"]


def test_the_other_modalities_of_a_scan_are_left_out(tmp_path):
    """A network for FLAIR alone is given a folder of BraTS."""
    said = []
    touch(tmp_path / "BraTS19_x_1", *(f"BraTS19_x_1_{name}.nii.gz" for name in ("flair", "t1", "t1ce", "t2", "seg")))
    assert ids(tmp_path, ("FLAIR",), said=said) == {"BraTS19_x_1_flair": ("BraTS19_x_1_flair.nii.gz",)}
    assert len(said) == 1 and "BraTS19_x_1_t1.nii.gz" in said[0] and "and 1 more" in said[0]
    said.clear()
    touch(tmp_path / "PROMISE12", "Case00.mhd", "Case00.raw", "Case00_segmentation.mhd", "Case00_segmentation.raw")
    assert ids(tmp_path / "PROMISE12", ("T2",), said=said) == {"Case00": ("Case00.mhd",)}
    assert len(said) == 1 and "Case00_segmentation.mhd" in said[0]
    labels = ("patient001_frame01_GT", "label0001", "sub-1_msk", "x.seg", "a_label", "mask", "laendo", "x_prob")
    scans = ("segment", "x_gtv", "label-free", "probe", "massk", "seg_x")
    touch(tmp_path / "many", *(f"{name}.nii.gz" for name in (*labels, *scans)))
    assert set(ids(tmp_path / "many", ("CT",))) == set(scans)
    touch(tmp_path / "LA", "lgemri.nrrd", "laendo.nrrd")
    assert ids(tmp_path / "LA", ("LGE-MRI",)) == {"lgemri": ("lgemri.nrrd",)}


def test_scans_of_one_channel_need_no_rule_for_their_names(tmp_path):
    names = ["scan_0000", "scan_0001", "flair", "7", "CT-late", "x.y", "t1 (2)", "ÄÖ"]
    touch(tmp_path, *(f"{name}.nii.gz" for name in names))
    assert set(ids(tmp_path, ("image",))) == set(names)
    assert set(ids(tmp_path, ("CT",))) == set(names)


def test_a_name_for_each(tmp_path):
    touch(tmp_path, "one/image.nii", "two/image.nii", "two/label.txt")
    assert set(ids(tmp_path, ("CT",))) == {"one_image", "two_image"}
    touch(tmp_path / "same", "a.nii", "a.nrrd", "b.nii")
    assert set(ids(tmp_path / "same", ("CT",))) == {"a.nii", "a.nrrd", "b.nii"}
    touch(tmp_path / "case", "A.nii", "a.nrrd")
    assert set(ids(tmp_path / "case", ("CT",))) == {"A.nii", "a.nrrd"}
    touch(tmp_path / "alike", "CT_1.nii", "1_ct.nii")
    assert set(ids(tmp_path / "alike", ("CT",))) == {"CT_1", "1_ct"}
    assert len(find_scans([tmp_path / "same", tmp_path / "same" / "b.nii"], ("CT",), Path("/nowhere"))) == 3


def test_channels_as_files_or_as_one(tmp_path, run):
    one, two = phantom(), phantom(seed=1)[::-1].copy()
    made = model(channels=("DWI", "ADC"), channel=1)
    (tmp_path / "case").mkdir()
    save_nifti(tmp_path / "case" / "x_ADC.nii.gz", two, AFFINES["oblique"])
    save_nifti(tmp_path / "case" / "x_dwi.nii.gz", one, AFFINES["oblique"])
    write_scan(tmp_path / "whole.nii.gz", np.stack([one, two]), AFFINES["oblique"])
    for name, voxels in (("ADC map", two), ("dwi b1000", one)):
        save_dicom(tmp_path / "study" / name, voxels, AFFINES["oblique"])
    assert run(tmp_path / "case", tmp_path / "whole.nii.gz", tmp_path / "study", made=made)[0] == []
    for name in ("x", "whole", "study"):
        found = read_scan(tmp_path / "out" / f"{name}_seg.nii.gz")
        assert np.array_equal(found.voxels, expected(two)) and np.allclose(found.affine, AFFINES["oblique"], atol=1e-4)


# --- trained models


def fake(results, text, tensors=None, data=None):
    """A run that never took place, with fresh or any weights; returns its id and its method."""
    [spec], _ = config.parse(f"--method supervised --width 2 --labeled 2 --precision 32-true {text}".split())
    dataset = data_prep.dataset(spec.dataset)
    protocol = dataset.protocols[spec.protocol]
    spacing = tuple(mm * protocol.downsample for mm in dataset.spacing)
    torch.manual_seed(0)
    method = build_method(spec, Task(len(dataset.task(protocol)), dataset.dims(protocol), 1, (2, 0)), spacing)
    folder = results / "runs" / spec.id
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(spec.stated))
    if data:
        (folder / "data.json").write_text(json.dumps(data))
    checkpoint.save(folder, {"method": tensors or method.state_dict(), "done": spec.iterations})
    return spec.id, method


LITE = "--dataset LA --protocol lite --patch [16,16,16] --stride [8,8,8]"


def test_a_run_and_its_export_predict_the_same(tmp_path, folder):
    name, method = fake(tmp_path, LITE)
    exported = export.export(name, tmp_path, tmp_path / "exported")
    for run, out in ((name, "one"), (str(exported), "two")):
        assert predict(run, [folder / "a.nii.gz"], tmp_path / out, results=tmp_path, say=lambda text: None) == []
    one, two = (read_scan(tmp_path / out / "a_seg.nii.gz", contrast=False) for out in ("one", "two"))
    assert np.array_equal(one.voxels, two.voxels)
    made = module.load(name, tmp_path, CPU, say=lambda text: None)
    assert not made.method.training and not any(p.requires_grad for p in made.method.parameters())
    for key, tensor in method.state_dict().items():
        assert torch.equal(made.method.state_dict()[key], tensor), key


def test_a_run_on_published_files_replays_their_recipe(tmp_path, folder):
    """LA at half the resolution: z-score over the whole scan, then means over blocks; by hand up to the network."""
    name, method = fake(tmp_path, LITE)
    made = module.load(name, tmp_path, CPU, say=lambda text: None)
    assert made.recipe.id == "LA-paper-1" and made.recipe.label_guided
    voxels = phantom((24, 20, 16))
    own = np.diag([-0.625, -0.625, 0.625, 1.0])  # the axes of the archive: nothing is turned
    found = made.segment(scan_of(voxels, own), (8, 8, 8), probabilities=True)
    blocks = ((voxels - voxels.mean()) / voxels.std()).reshape(12, 2, 10, 2, 8, 2).mean((1, 3, 5)).astype(np.float32)
    coarse = sliding_window(method.eval().predict, torch.from_numpy(blocks[None]), (16, 16, 16), (8, 8, 8)).numpy()
    for axis in (1, 2, 3):  # of two fine voxels between two coarse ones each is nearer to one
        low, high = np.moveaxis(coarse, axis, 0)[:-1], np.moveaxis(coarse, axis, 0)[1:]
        fine = np.stack([0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high], 1)
        coarse = np.moveaxis(fine.reshape(-1, *fine.shape[2:]), 0, axis)
    assert found.probabilities[:, 1:-1, 1:-1, 1:-1] == pytest.approx(coarse, abs=1e-5)


def test_a_phantom_has_no_recipe(tmp_path):
    said = []
    name, _ = fake(tmp_path, "--dataset phantom --patch [16,16,16] --stride [8,8,8]")
    made = module.load(name, tmp_path, CPU, say=said.append)
    assert any("phantom has no recipe for scans: they are taken as they are, with a z-score" in line for line in said)
    image = module.recipes.apply(made.recipe, scan_of(phantom(), AFFINES["permuted"])).image
    assert image.shape == (1, *phantom().shape) and (image.mean(), image.std()) == pytest.approx((0, 1), abs=1e-5)


def test_images_in_two_dimensions_are_no_scans(tmp_path):
    fake(tmp_path, "--dataset phantom-2d2c --patch [16,16] --stride [8,8]")
    with pytest.raises(UserError, match="segments 2D images, expected a run in 3D or one that goes through slices"):
        module.load("phantom", tmp_path, CPU, say=lambda text: None)


def test_weights_of_another_network(tmp_path):
    fake(tmp_path, LITE, tensors={"net.weight": torch.zeros(2)})
    with pytest.raises(UserError, match="the weights do not fit supervised on vnet") as error:
        module.load("LA", tmp_path, CPU, say=lambda text: None)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


# --- bad input, one line each


@pytest.mark.parametrize(("made", "options", "line"), [
    ({}, {"stride": [9, 4, 4]}, r"stride \[9, 4, 4\]: expected 3 numbers from 1 to those of the window, \[8, 8, 8\]"),
    ({}, {"stride": [4, 4]}, "expected 3 numbers"),
    ({}, {"stride": [0, 4, 4]}, "expected 3 numbers"),
    ({"patch": (8, 8)}, {"stride": [4, 4]}, "expected none"),
    ({"patch": (8, 8)}, {"probabilities": True}, "gives labels only"),
])
def test_settings_that_cannot_work(run, folder, made, options, line):
    with pytest.raises(UserError, match=line):
        run(folder / "a.nii.gz", made=model(**made), **options)


@pytest.mark.parametrize(("channels", "shape", "line"), [
    (("CT",), (2, 9, 8, 7), "2 volumes or channels of shape .*, expected a single 3D volume"),
    (("A", "B"), (9, 8, 7), "1 volumes, expected 2, one per channel"),
    (("A", "B"), (3, 9, 8, 7), "3 volumes, expected 2, one per channel"),
])
def test_another_number_of_channels(tmp_path, run, channels, shape, line):
    voxels = np.random.default_rng(0).integers(0, 99, shape).astype(np.int16)
    write_scan(tmp_path / "x.nii.gz", voxels, np.eye(4))
    with pytest.raises(DataError, match=line):
        run(tmp_path / "x.nii.gz", made=model(channels=channels))


def test_channels_on_other_grids(tmp_path, run):
    (tmp_path / "case").mkdir()
    save_nifti(tmp_path / "case" / "x_a.nii.gz", phantom(), np.eye(4))
    save_nifti(tmp_path / "case" / "x_b.nii.gz", phantom(), affine_of())
    with pytest.raises(DataError, match="x_b.nii.gz: channel lies up to .* mm away"):
        run(tmp_path / "case", made=model(channels=("A", "B")))


@pytest.mark.parametrize("what", ["absent", "empty folder", "text", "one slice", "constant", "nan"])
def test_what_is_no_scan(tmp_path, run, what):
    path = tmp_path / "x.nii.gz"
    if what == "absent":
        expectation = "no such file or folder"
    elif what == "empty folder":
        path.mkdir()
        expectation = "no scan in it, expected .nii.gz"
    elif what == "text":
        path = tmp_path / "x.txt"
        path.write_text("x")
        expectation = "not a medical scan"
    elif what == "one slice":
        path = next(save_dicom(tmp_path / "series", phantom(), np.eye(4)).iterdir())
        expectation = "a single DICOM file, expected the folder with the series"
    else:
        voxels = np.full((5, 5, 5), 7, np.float32)
        voxels[0] = np.nan if what == "nan" else 7
        save_nifti(path, voxels, np.eye(4))
        expectation = {"nan": "NaN", "constant": "everywhere"}[what]
    with pytest.raises(DataError, match=expectation) as error:
        run(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value) and "expected" in str(error.value)
    assert not list((tmp_path / "out").glob("x*")) if (tmp_path / "out").exists() else True


def test_where_nothing_can_be_written(tmp_path, run, folder):
    (tmp_path / "taken").write_text("")
    made = model()
    with pytest.raises(DataError, match="cannot be written"):
        run(folder / "a.nii.gz", made=made, output=tmp_path / "taken" / "out")
    assert not made.method.seen


# --- what is said


def test_the_introduction_names_labels_windows_and_what_the_recipe_cannot_do(run, folder):
    guided = Recipe(**PLAIN | {"crop": Crop("label")})
    _, said = run(folder / "a.nii.gz", made=model(guided))
    assert said[0] == "test-run: bright, labels 0 background, 1 organ, 2 lesion"
    assert "crops around the label" in said[1] and "all of it is segmented" in said[1]
    assert not any("axes" in line for line in said)
    assert "windows of 8 x 8 x 8 voxels every 4 x 4 x 4 (half a window), the evaluation took 1 x 1 x 1" in said[2]
    voxel = 0.001  # ml
    counts = np.bincount(expected(phantom()).ravel())
    assert said[3].startswith(f"1/1 a: organ {counts[1] * voxel:.3g} ml, lesion {counts[2] * voxel:.3g} ml; ")


def test_a_recipe_that_keeps_the_axes(run, folder):
    _, said = run(folder / "a.nii.gz", made=model(Recipe(**PLAIN | {"orientation": None})))
    assert "takes the axes as they come: scans must lie as those of the training data" in said[1]


def test_the_stored_classes_of_brats(run, folder):
    made = model(classes=("background", "necrotic core", "edema", "enhancing tumor"))
    made.card["spec"]["dataset"] = "BraTS"
    _, said = run(folder / "a.nii.gz", made=made)
    assert "label 3 stands for the 4 of BraTS archives until 2021" in said


def test_progress_through_many_windows(run, folder, monkeypatch):
    from ssl4mis import progress

    monkeypatch.setattr(progress, "LINE_EVERY", -1.0)
    # (19 - 8) / 4, (14 - 8) / 4, (11 - 8) / 4, rounded up, and the first: 4 * 3 * 2
    save_nifti(folder / "flat.nii.gz", phantom()[:, :3], np.eye(4))
    for name, total in (("a", 24), ("flat", 8)):
        _, said = run(folder / f"{name}.nii.gz")
        found = [line.split()[2] for line in said if line.startswith(f"{name}.nii.gz: windows ")]
        assert found == [f"{n}/{total}" for n in range(1, total)]
