"""Raw scans: every format on one convention, every way to the store and back, every refusal in one line."""

import gzip
import itertools
import json
import locale
import os
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from data_prep import scans
from data_prep.geometry import Geometry, labels_to_scanner, to_scanner, to_store
from data_prep.scans import Scan, read_scan, same_grid, write_scan
from data_prep.spec import DataError

REAL = Path(__file__).resolve().parents[3] / "shared" / "real"
SHAPE, SPACING, ORIGIN = (7, 6, 5), (0.7, 1.25, 3.0), (-31.0, 12.5, 40.0)
ORIENTATIONS = ["".join(codes) for axes in itertools.permutations(("RL", "AP", "SI"))
                for codes in itertools.product(*axes)]


def turn(x=0.0, y=0.0, z=0.0):
    """Rotation by degrees around the three axes."""
    result = np.eye(3)
    for (a, b), angle in zip(((1, 2), (2, 0), (0, 1)), np.radians((x, y, z)), strict=True):
        part = np.eye(3)
        part[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        result = part @ result
    return result


def grid(spacing=SPACING, rotation=None, origin=ORIGIN):
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if rotation is None else rotation) * np.array(spacing)
    affine[:3, 3] = origin
    return affine


def oriented(codes, spacing=SPACING):
    """Affine whose axes point exactly to the three directions."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for n, code in enumerate(codes):
        axis = next(i for i, pair in enumerate(("RL", "AP", "SI")) if code in pair)
        affine[axis, n] = spacing[n] if code in "RAS" else -spacing[n]
    affine[:3, 3] = ORIGIN
    return affine


OBLIQUE = grid(rotation=turn(20, -15, 30))
SHEARED = OBLIQUE @ np.array([[1, 0, 0, 0], [0, 1, 0.3, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def noise(shape=SHAPE, kind=np.int16, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(-1000, 3000, shape).astype(kind) if np.dtype(kind).kind == "i" else rng.normal(
        size=shape).astype(kind)


def scan(voxels=None, affine=None, name="a.nii.gz"):
    return Scan(noise() if voxels is None else voxels, grid() if affine is None else affine, Path(name))


def nifti(path, voxels, affine, unit=None):
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, path)
    return path


def itk(path, voxels, affine, vector=False, compress=False):
    """As ITK stores it: array (i, j, k) or, as a vector image, (channels, i, j, k); affine in RAS+."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T), isVector=vector)
    lps = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    sitk.WriteImage(image, str(path), compress)
    return path


def dicom(folder, voxels, affine, order=None, series="1.2.3", skip=(), change=None, tags=None):
    """A CT series, a file per slice; `order[k]` is file name and number of slice k, `change[k]` overrides its tags."""
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    row, column = (lps[:3, :2] / spacing[:2]).T
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    words = locale.setlocale(locale.LC_ALL)
    for k in range(voxels.shape[2]):
        if k in skip:
            continue
        number = k if order is None else order[k]
        image = sitk.GetImageFromArray(np.ascontiguousarray(voxels[..., k].T))
        image.SetSpacing(spacing[:2].tolist())
        entries = {
            "0008|0060": "CT", "0020|000d": "1.2", "0020|000e": series, "0008|0018": f"{series}.{number + 1}",
            "0020|0013": str(number + 1), "0020|0032": text(lps[:3, 3] + k * lps[:3, 2]),
            "0020|0037": text([*row, *column]), "0028|0030": text(spacing[[1, 0]]),
            **(tags or {}), **((change or {}).get(k, {})),
        }
        for tag, value in entries.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{series}-{number:03}.dcm"))
        writer.Execute(image)
    locale.setlocale(locale.LC_ALL, words)  # the writer leaves the C locale, in which later tests would read ASCII only
    return folder


def patch(path, tag, value):
    """Put another value of the same length into a written file (ITK fills in what is left out)."""
    content = path.read_bytes()
    at = content.index(struct.pack("<HH", *tag)) + 8  # ITK writes implicit types: tag, length, value
    length = struct.unpack("<I", content[at - 4 : at])[0]
    assert len(value) <= length
    path.write_bytes(content[:at] + value.ljust(length).encode() + content[at + length :])


def text(numbers):
    return "\\".join(f"{number:.12g}"[:16] for number in numbers)


def line(error, *parts):
    """The refusal is one line that names all of the parts and what was expected."""
    message = str(error.value)
    assert "\n" not in message and "expected" in message, message
    for part in parts:
        assert str(part) in message, (part, message)


# --- reading


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "a.mhd", "A.NII.GZ"])
def test_every_format_gives_the_same_scan(tmp_path, name, kind):
    voxels = noise(kind=np.int16).astype(kind)
    writer = nifti if ".nii" in name.lower() else itk
    found = read_scan(writer(tmp_path / name, voxels, OBLIQUE))
    assert found.voxels.dtype == kind and np.array_equal(found.voxels, voxels)
    assert np.allclose(found.affine, OBLIQUE, atol=1e-5)
    assert found.spacing == pytest.approx(SPACING, abs=1e-5) and found.path == tmp_path / name
    assert found.space == SHAPE


def test_a_marked_voxel_has_one_place_in_the_world_whatever_the_format(tmp_path):
    voxels = np.zeros(SHAPE, np.int16)
    voxels[5, 1, 3] = 1000
    expected = (OBLIQUE @ (5, 1, 3, 1))[:3]
    paths = [nifti(tmp_path / "a.nii.gz", voxels, OBLIQUE), dicom(tmp_path / "series", voxels, OBLIQUE),
             *(itk(tmp_path / name, voxels, OBLIQUE) for name in ("a.nrrd", "a.mha"))]
    # ITK is asked itself, in its own convention
    image = sitk.ReadImage(str(tmp_path / "a.nrrd"))
    assert np.array(image.TransformIndexToPhysicalPoint((5, 1, 3))) * (-1, -1, 1) == pytest.approx(expected, abs=1e-4)
    for path in paths:
        found = read_scan(path)
        at = np.argwhere(found.voxels == 1000)
        assert at.tolist() == [[5, 1, 3]]
        assert (found.affine @ (*at[0], 1))[:3] == pytest.approx(expected, abs=1e-4), path


def test_nifti_written_by_itk_agrees(tmp_path):
    itk(tmp_path / "a.nii.gz", noise(), OBLIQUE)
    found = read_scan(tmp_path / "a.nii.gz")
    assert np.array_equal(found.voxels, noise()) and np.allclose(found.affine, OBLIQUE, atol=1e-4)


@pytest.mark.parametrize("space, signs", [("left-posterior-superior", (-1, -1, 1)), ("LPS", (-1, -1, 1)),
                                          ("right-anterior-superior", (1, 1, 1)),
                                          ("left-anterior-superior", (-1, 1, 1))])
def test_the_space_of_an_nrrd_header_is_honored(tmp_path, space, signs):
    header = (f"NRRD0004\ntype: short\ndimension: 3\nspace: {space}\nsizes: 7 6 5\nspace directions: (2,0,0) (0,3,0) "
              "(0,0,4)\nkinds: domain domain domain\nendian: little\nencoding: raw\nspace origin: (10,20,30)\n\n")
    (tmp_path / "a.nrrd").write_bytes(header.encode() + noise().tobytes(order="F"))
    found = read_scan(tmp_path / "a.nrrd")
    assert np.array_equal(found.voxels, noise())
    assert found.affine[:3] == pytest.approx(np.diag(signs) @ [[2, 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, 30]])


def test_the_spacing_of_an_mhd_header(tmp_path):
    (tmp_path / "a.raw").write_bytes(noise().tobytes(order="F"))
    (tmp_path / "a.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
        "TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = -5 6 7\nElementSpacing = 0.625 0.5 3.6\nDimSize = 7 6 5\n"
        "ElementType = MET_SHORT\nElementDataFile = a.raw\n")
    found = read_scan(tmp_path / "a.mhd")
    assert found.spacing == pytest.approx((0.625, 0.5, 3.6)) and found.orientation == "LPS"
    assert np.array_equal(found.voxels, noise()) and found.affine[:3, 3].tolist() == [5, -6, 7]


def test_scale_and_unit_of_a_nifti_header(tmp_path):
    affine = grid(np.array(SPACING) / 1000, origin=np.array(ORIGIN) / 1000)
    assert read_scan(nifti(tmp_path / "a.nii", noise(), affine, "meter")).affine == pytest.approx(grid(), rel=1e-5)
    path = nifti(tmp_path / "b.nii", noise(), grid(np.array(SPACING) * 1000), "micron")
    assert read_scan(path).spacing == pytest.approx(SPACING)
    raw = bytearray(nib.Nifti1Image(noise(), grid()).to_bytes())
    raw[112:120] = struct.pack("<ff", 0.5, -3)  # slope and intercept
    raw[123] = 7  # no unit that there is
    (tmp_path / "c.nii").write_bytes(raw)
    found = read_scan(tmp_path / "c.nii")
    assert np.array_equal(found.voxels, noise() * 0.5 - 3) and found.spacing == pytest.approx(SPACING)


def test_other_nifti_layouts(tmp_path):
    big = nib.Nifti1Image(noise(), grid()).header.as_byteswapped(">")
    nib.save(nib.Nifti1Image(noise(), grid(), big), tmp_path / "big.nii")
    assert (tmp_path / "big.nii").read_bytes()[:4] == b"\0\0\x01\x5c"
    found = read_scan(tmp_path / "big.nii")
    assert np.array_equal(found.voxels, noise()) and found.voxels.dtype == np.dtype("=i2")
    nib.save(nib.Nifti2Image(noise(), grid()), tmp_path / "two.nii.gz")
    assert np.array_equal(read_scan(tmp_path / "two.nii.gz").voxels, noise())
    nifti(tmp_path / "plain.nii", noise(), grid())
    (tmp_path / "plain.nii").rename(tmp_path / "plain.nii.gz")  # not compressed, whatever its name says
    assert np.array_equal(read_scan(tmp_path / "plain.nii.gz").voxels, noise())
    nifti(tmp_path / "one.nii", noise()[..., None], grid())
    assert read_scan(tmp_path / "one.nii").voxels.shape == SHAPE


def test_channels_come_first(tmp_path):
    voxels = np.stack([noise(seed=seed) for seed in range(3)])
    nifti(tmp_path / "time.nii.gz", np.moveaxis(voxels, 0, 3), OBLIQUE)
    nifti(tmp_path / "vector.nii.gz", np.moveaxis(voxels, 0, 3)[..., None, :], OBLIQUE)
    itk(tmp_path / "vector.nrrd", voxels, OBLIQUE, vector=True)
    itk(tmp_path / "vector.mha", voxels, OBLIQUE, vector=True)
    image = sitk.JoinSeries([sitk.ReadImage(str(itk(tmp_path / "one.mha", v, OBLIQUE))) for v in voxels])
    sitk.WriteImage(image, str(tmp_path / "time.mha"))
    sitk.WriteImage(image, str(tmp_path / "time.nrrd"))
    for name in ("time.nii.gz", "vector.nii.gz", "vector.nrrd", "vector.mha", "time.mha", "time.nrrd"):
        found = read_scan(tmp_path / name, channels=True)
        assert np.array_equal(found.voxels, voxels), name
        assert np.allclose(found.affine, OBLIQUE, atol=1e-4) and found.space == SHAPE, name
        with pytest.raises(DataError) as error:
            read_scan(tmp_path / name)
        line(error, tmp_path / name, "3 volumes", SHAPE, "single 3D volume")
    assert read_scan(tmp_path / "one.mha", channels=True).voxels.shape == (1, *SHAPE)


# --- DICOM


@pytest.mark.parametrize("affine", [grid(), oriented("LPS"), oriented("PSR"), oriented("LPI"), OBLIQUE, SHEARED],
                         ids=["axial", "LPS", "sagittal", "downwards", "oblique", "tilted gantry"])
def test_dicom_slices_out_of_order(tmp_path, affine):
    folder = dicom(tmp_path / "series", noise(), affine, order=[3, 0, 4, 1, 2])
    (folder / "LICENSE").write_text("not a slice")
    found = read_scan(folder)
    expected = noise()
    # a series has no direction of its own: slices go along the normal of row and column, so that no volume is mirrored
    if np.linalg.det(affine[:3, :3]) < 0:
        expected = expected[..., ::-1]
        affine = affine @ [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, SHAPE[2] - 1], [0, 0, 0, 1]]
    assert np.array_equal(found.voxels, expected)
    assert np.allclose(found.affine, affine, atol=1e-6)


def test_slices_are_sorted_by_their_position_even_where_gdcm_does_not(tmp_path, monkeypatch):
    folder = dicom(tmp_path / "a", noise(), OBLIQUE, order=[3, 0, 4, 1, 2])
    by_name = staticmethod(lambda folder, uid: sorted(map(str, Path(folder).iterdir())))
    monkeypatch.setattr(sitk.ImageSeriesReader, "GetGDCMSeriesFileNames", by_name)
    assert np.array_equal(read_scan(folder).voxels, noise())


def test_dicom_rescale_of_every_slice(tmp_path):
    voxels = noise(kind=np.int16)
    folder = dicom(tmp_path / "a", voxels, grid(), tags={"0028|1052": "-1024", "0028|1053": "1"})
    assert np.array_equal(read_scan(folder).voxels, voxels)
    # PET has a slope per slice: the type of the first must not round the others
    patch(folder / "1.2.3-004.dcm", (0x28, 0x1052), "10")
    patch(folder / "1.2.3-004.dcm", (0x28, 0x1053), ".5")
    found = read_scan(folder).voxels
    assert np.array_equal(found[..., :4], voxels[..., :4])
    assert np.array_equal(found[..., 4], (voxels[..., 4] + 1024) * 0.5 + 10)


@pytest.mark.parametrize("skip", [1, 2, 3])
def test_a_missing_slice_is_refused(tmp_path, skip):
    folder = dicom(tmp_path / "a", noise(), OBLIQUE, skip=(skip,))
    with pytest.raises(DataError) as error:
        read_scan(folder)
    line(error, folder, f"6 mm between 1.2.3-{skip - 1:03}.dcm and 1.2.3-{skip + 1:03}.dcm", "3 mm", "missing slice")


def moved(k, by):
    lps = np.diag([-1, -1, 1, 1]) @ grid()
    return {k: {"0020|0032": text(lps[:3, 3] + k * lps[:3, 2] + by)}}


DICOM_ERRORS = {
    "uneven": (dict(change=moved(2, (0, 0, 0.2))), ["3.2 mm", "expected 3 mm"]),
    "repeated": (dict(change=moved(2, (0, 0, 3))), ["same position", "1.2.3-002.dcm", "1.2.3-003.dcm"]),
    "sideways": (dict(change=moved(2, (2, 0, 0))), ["1.2.3-002.dcm is 2 mm off"]),
    "turned": (dict(change={3: {"0020|0037": "0\\1\\0\\1\\0\\0"}}), ["1.2.3-003.dcm has orientation"]),
    "one slice": (dict(skip=(0, 1, 2, 3)), ["a single DICOM slice", "1.2.3-004.dcm"]),
}


@pytest.mark.parametrize("options, parts", DICOM_ERRORS.values(), ids=DICOM_ERRORS)
def test_a_series_that_is_no_volume_is_refused(tmp_path, options, parts):
    folder = dicom(tmp_path / "a", noise(), grid(), **options)
    with pytest.raises(DataError) as error:
        read_scan(folder)
    line(error, folder, *parts)


def test_slices_of_other_sizes_are_refused(tmp_path):
    folder = dicom(tmp_path / "a", noise(), grid(), skip=(4,))
    dicom(folder, noise((8, 6, 5)), grid(), skip=(0, 1, 2, 3))
    with pytest.raises(DataError) as error:
        read_scan(folder)
    line(error, folder, "has size (8.0, 6.0)", "(7.0, 6.0)")


def test_slices_of_other_pixels_are_refused(tmp_path):
    folder = dicom(tmp_path / "a", noise(), grid(), skip=(4,))
    dicom(folder, noise(), grid((0.7, 1.5, 3)), skip=(0, 1, 2, 3))
    with pytest.raises(DataError) as error:
        read_scan(folder)
    line(error, folder, "has pixel spacing (1.5, 0.7)", "(1.25, 0.7)")


@pytest.mark.parametrize("what, tag", [("position", (0x20, 0x32)), ("orientation", (0x20, 0x37)),
                                       ("pixel spacing", (0x28, 0x30))])
@pytest.mark.parametrize("value", ["", "1", "a\\b\\c"])
def test_a_slice_without_a_place_is_refused(tmp_path, what, tag, value):
    folder = dicom(tmp_path / "a", noise(), grid())
    patch(folder / "1.2.3-002.dcm", tag, value)
    with pytest.raises(DataError) as error:
        read_scan(folder)
    line(error, folder / "1.2.3-002.dcm", f"{what} ({tag[0]:04x},{tag[1]:04x})", "numbers")


@pytest.mark.parametrize("cosines", ["1\\0\\0\\1\\1\\0", "1\\0\\0\\0\\2\\0", "0\\0\\0\\0\\0\\0"])
def test_a_skewed_series_is_refused(tmp_path, cosines):
    folder = dicom(tmp_path / "a", noise(), oriented("LPS"))
    for path in folder.iterdir():
        patch(path, (0x20, 0x37), cosines)
    with pytest.raises(DataError) as error:
        read_scan(folder)
    line(error, folder, "orientation", "perpendicular unit vectors")


def test_several_series_are_refused(tmp_path):
    folder = dicom(tmp_path / "a", noise(), grid())
    dicom(folder, noise(), grid(), series="1.2.4")
    with pytest.raises(DataError) as error:
        read_scan(folder)
    line(error, folder, "2 DICOM series", "1.2.3 (5 files)", "1.2.4 (5 files)", "one series per folder")


@pytest.mark.parametrize("keep", [300, -40], ids=["header", "pixels"])
@pytest.mark.parametrize("name", ["1.2.3-004.dcm", "004"])
def test_a_truncated_slice_at_the_end_is_noticed(tmp_path, keep, name):
    folder = dicom(tmp_path / "a", noise(), grid())
    last = folder / "1.2.3-004.dcm"
    last.write_bytes(last.read_bytes()[:keep])
    last.rename(folder / name)
    with pytest.raises(DataError) as error:
        read_scan(folder)
    line(error, folder, name, "truncated")


def test_a_wrong_folder_is_refused_without_a_word_of_itk(tmp_path, capfd):
    with pytest.raises(DataError) as error:
        read_scan(tmp_path)
    line(error, tmp_path, "no DICOM slices (found: nothing)")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError) as error:
        read_scan(tmp_path)
    line(error, tmp_path, "1 entries, the first is notes.txt")
    assert capfd.readouterr().err == "" and sitk.ProcessObject.GetGlobalWarningDisplay()


def test_a_single_slice_is_no_scan(tmp_path):
    folder = dicom(tmp_path / "a", noise(), grid())
    with pytest.raises(DataError) as error:
        read_scan(folder / "1.2.3-000.dcm")
    line(error, folder, "single DICOM file", "folder")


def test_colors_and_frames_are_refused(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    for name, image in (("colors", sitk.GetImageFromArray(np.ones((1, 6, 7, 3), np.uint8), isVector=True)),
                        ("frames", sitk.GetImageFromArray(np.ones((4, 6, 7), np.uint8)))):
        sitk.WriteImage(image, str(folder / "a.dcm"))
        with pytest.raises(DataError) as error:
            read_scan(folder)
        found = "3 values per pixel" if name == "colors" else "4 frames"
        line(error, folder / "a.dcm", found, "one slice per DICOM file")


# --- refusals of files


def with_value(value, kind=np.float32):
    voxels = noise(kind=np.float32).astype(kind)
    voxels[1, 2, 3] = value
    return voxels


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd"])
def test_nan_and_infinity_are_refused_unless_asked_for(tmp_path, name, value):
    (nifti if "nii" in name else itk)(tmp_path / name, with_value(value), grid())
    with pytest.raises(DataError) as error:
        read_scan(tmp_path / name)
    line(error, tmp_path / name, "1 voxels are NaN or infinite")
    assert np.array_equal(read_scan(tmp_path / name, finite=False).voxels, with_value(value), equal_nan=True)


def test_a_constant_scan_is_refused_unless_asked_for(tmp_path):
    path = nifti(tmp_path / "a.nii", np.full(SHAPE, 7, np.int16), grid())
    with pytest.raises(DataError) as error:
        read_scan(path)
    line(error, path, "the scan is 7 everywhere", "contrast")
    assert read_scan(path, contrast=False).voxels.max() == 7
    voxels = np.stack([noise(), np.zeros(SHAPE, np.int16)], -1)
    path = nifti(tmp_path / "b.nii", voxels, grid())
    with pytest.raises(DataError) as error:
        read_scan(path, channels=True)
    line(error, path, "volume 1 of 2 is 0 everywhere")
    path = nifti(tmp_path / "c.nii", np.full(SHAPE, np.nan, np.float32), grid())
    with pytest.raises(DataError) as error:
        read_scan(path, finite=False)
    line(error, path, "NaN or infinite everywhere")
    path = nifti(tmp_path / "d.nii", np.where(np.arange(SHAPE[2]) > 1, np.nan, np.float32(2)) * np.ones(SHAPE), grid())
    with pytest.raises(DataError) as error:
        read_scan(path, finite=False)
    line(error, path, "2 everywhere")


@pytest.mark.parametrize("name, compress", [("a.nii", 0), ("a.nii.gz", 1), ("a.nrrd", 0), ("a.nrrd", 1), ("a.mha", 0),
                                            ("a.mha", 1), ("a.mhd", 0)])
@pytest.mark.parametrize("keep", [0.0, 0.6, 0.99])
def test_a_truncated_file_is_refused(tmp_path, name, compress, keep):
    path, voxels = tmp_path / name, noise((30, 20, 25))
    nifti(path, voxels, grid()) if "nii" in name else itk(path, voxels, grid(), compress=bool(compress))
    data = path.with_suffix(".raw") if name == "a.mhd" else path
    content = data.read_bytes()
    data.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataError) as error:
        read_scan(path)
    line(error, f"{path}: truncated")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha"])
def test_a_scan_that_would_fill_the_memory_is_one_line(name, tmp_path, monkeypatch):
    """Thousands of times smaller in the file where it is packed, and refused before it is all unpacked."""
    path = tmp_path / name
    itk(path, np.zeros((200, 100, 100), np.int16), grid(), compress=True)
    assert read_scan(path, contrast=False).space == (200, 100, 100)
    monkeypatch.setattr(scans, "_room", lambda: 3_999_999)
    with pytest.raises(DataError) as error:
        read_scan(path, contrast=False)
    line(error, path, "more than 0.00373 GiB of voxels, expected at most a quarter of this machine's memory")
    monkeypatch.setattr(scans, "_room", lambda: 4_000_000 + 352)  # NIfTI's header
    assert read_scan(path, contrast=False).space == (200, 100, 100)


def test_a_header_that_says_more_than_there_is_takes_no_memory(tmp_path):
    path = nifti(tmp_path / "a.nii.gz", noise(), grid())
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    path.write_bytes(gzip.compress(data))
    with pytest.raises(DataError, match="truncated, damaged or no NIfTI file"):
        read_scan(path)


def test_a_flipped_bit_in_gzip_is_noticed(tmp_path):
    path = nifti(tmp_path / "a.nii.gz", noise((30, 20, 25)), grid())
    with gzip.open(path, "rb") as file:
        data = bytearray(file.read())
    stored = bytearray(gzip.compress(data, 0))  # stored blocks: only the checksum can tell
    stored[len(stored) // 2] ^= 1
    path.write_bytes(stored)
    with pytest.raises(DataError) as error:
        read_scan(path)
    line(error, path, "truncated, damaged", "CRC")


FOREIGN = {
    "a.png": (b"\x89PNG\r\n\x1a\n", "not a medical scan (.png)"),
    "a": (b"text", "not a medical scan (no suffix)"),
    "a.nii": (b"this is a text", "no NIfTI file"),
    "a.nii.gz": (b"this is a text", "no NIfTI file"),
    "a.nrrd": (b"\x89PNG\r\n\x1a\n", "no NRRD file"),
    "a.mha": (b"hello", "no MetaImage file"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_refused(tmp_path, name):
    content, message = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_scan(tmp_path / name)
    line(error, tmp_path / name, message)


def test_a_renamed_picture_is_refused(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((6, 7), np.uint8)), str(tmp_path / "a.png"))
    path = (tmp_path / "a.png").rename(tmp_path / "a.nrrd")
    with pytest.raises(DataError) as error:
        read_scan(path)
    line(error, path, "no NRRD file")


def test_other_refusals(tmp_path):
    path = tmp_path / "none.nii.gz"
    with pytest.raises(DataError) as error:
        read_scan(path)
    line(error, path, "no such file", ".nrrd", "DICOM")
    path = nifti(tmp_path / "flat.nii", noise()[..., 0], grid())
    with pytest.raises(DataError) as error:
        read_scan(path)
    line(error, path, "(7, 6)", "3 axes")
    path = nifti(tmp_path / "complex.nii", noise().astype(np.complex64), grid())
    with pytest.raises(DataError) as error:
        read_scan(path)
    line(error, path, "complex64", "real numbers")
    path = tmp_path / "colors.nii"
    colors = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colors, grid()), path)
    with pytest.raises(DataError) as error:
        read_scan(path)
    line(error, path, "real numbers")
    path = tmp_path / "flat.nrrd"
    sitk.WriteImage(sitk.GetImageFromArray(noise()[0]), str(path))
    with pytest.raises(DataError) as error:
        read_scan(path)
    line(error, path, "2 axes", "3 axes")
    flat = grid()
    flat[:, 2] = flat[:, 1]
    path = nifti(tmp_path / "flat_affine.nii", noise(), flat)
    with pytest.raises(DataError) as error:
        read_scan(path)
    line(error, path, "the affine is", "independent axes")


# --- writing


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64, np.uint64, np.float32,
                                  np.float64, np.dtype(">i2"), bool, np.float16])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha"])
def test_written_is_read(tmp_path, name, kind):
    array = (noise() % 100).astype(kind) if kind is not bool else noise() > 0
    write_scan(tmp_path / "new" / name, array, OBLIQUE)
    found = read_scan(tmp_path / "new" / name)
    native = np.dtype(kind).newbyteorder("=")
    assert found.voxels.dtype == {bool: np.dtype("u1"), np.float16: np.dtype("f4")}.get(kind, native)
    assert np.array_equal(found.voxels, array) and np.allclose(found.affine, OBLIQUE, atol=1e-5)
    assert os.listdir(tmp_path / "new") == [name]


@pytest.mark.parametrize("affine", [SHEARED, *(oriented(codes) for codes in ("RAS", "LPS", "SRA", "IPL"))])
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha"])
def test_any_affine_survives(tmp_path, name, affine):
    voxels = np.stack([noise(), noise(seed=1)])
    write_scan(tmp_path / name, voxels, affine)
    found = read_scan(tmp_path / name, channels=True)
    assert np.array_equal(found.voxels, voxels) and np.allclose(found.affine, affine, atol=1e-5)


def test_itk_and_nibabel_read_what_was_written_at_the_same_place(tmp_path):
    for name in ("a.nii.gz", "a.nrrd"):
        write_scan(tmp_path / name, noise(), OBLIQUE)
        image = sitk.ReadImage(str(tmp_path / name))
        found = np.array(image.TransformIndexToPhysicalPoint((5, 1, 3))) * (-1, -1, 1)
        assert found == pytest.approx((OBLIQUE @ (5, 1, 3, 1))[:3], abs=1e-4)
    image = nib.load(tmp_path / "a.nii.gz")
    assert np.allclose(image.get_qform(), OBLIQUE, atol=1e-4) and np.allclose(image.get_sform(), OBLIQUE, atol=1e-5)
    assert image.header.get_xyzt_units()[0] == "mm" and image.header.get_zooms() == pytest.approx(SPACING)
    write_scan(tmp_path / "s.nii", noise(), SHEARED)
    assert nib.load(tmp_path / "s.nii").header["qform_code"] == 0


@pytest.mark.parametrize("codes", [(1, 1), (1, 0), (0, 4), (0, 0), (2, 3)])
@pytest.mark.parametrize("unit", ["mm", "meter", "unknown"])
def test_like_repeats_both_transforms_of_the_header(tmp_path, codes, unit):
    image = nib.Nifti1Image(noise(), OBLIQUE)
    image.header.set_xyzt_units(unit if unit != "unknown" else None)
    image.set_qform(grid(rotation=turn(5)), codes[0])
    image.set_sform(OBLIQUE, codes[1])
    nib.save(image, tmp_path / "a.nii.gz")
    first = read_scan(tmp_path / "a.nii.gz")
    write_scan(tmp_path / "b.nii.gz", (noise() > 0).astype(np.uint8), None, like=first)
    second = read_scan(tmp_path / "b.nii.gz")
    assert np.array_equal(second.affine, first.affine) and second.voxels.dtype == np.uint8
    a, b = nib.load(tmp_path / "a.nii.gz").header, nib.load(tmp_path / "b.nii.gz").header
    for name in ("qform_code", "sform_code", "srow_x", "quatern_b", "qoffset_z", "xyzt_units"):
        assert np.array_equal(a[name], b[name]), name
    assert np.array_equal(a["pixdim"][:4], b["pixdim"][:4])
    # another affine is not overruled by the header
    other = first.affine.copy()
    other[0, 3] += 0.01
    write_scan(tmp_path / "c.nii.gz", noise(), other, like=first)
    assert np.allclose(read_scan(tmp_path / "c.nii.gz").affine, other, atol=1e-5)


def test_like_is_a_check(tmp_path):
    with pytest.raises(DataError) as error:
        write_scan(tmp_path / "a.nii", noise()[1:], grid(), like=scan())
    line(error, tmp_path / "a.nii", (6, 6, 5), SHAPE)
    with pytest.raises(DataError) as error:
        write_scan(tmp_path / "a.nii", noise(), OBLIQUE, like=scan())
    line(error, tmp_path / "a.nii", "mm away")
    with pytest.raises(DataError) as error:
        write_scan(tmp_path / "a.nii", noise(), None)
    line(error, tmp_path / "a.nii", "no affine")
    write_scan(tmp_path / "a.nrrd", np.stack([noise()] * 2), None, like=scan(affine=OBLIQUE))
    assert np.allclose(read_scan(tmp_path / "a.nrrd", channels=True).affine, OBLIQUE, atol=1e-12)


@pytest.mark.parametrize("array, affine, name, parts", [
    (noise(), grid(), "a.mhd", [".mhd", ".nrrd"]),
    (noise(), grid(), "a", ["without suffix"]),
    (noise()[0], grid(), "a.nii", ["(6, 5)"]),
    (noise()[:0], grid(), "a.nii", ["(0, 6, 5)"]),
    (noise().astype(np.complex64), grid(), "a.nii", ["complex64"]),
    (noise(), np.zeros((4, 4)), "a.nii", ["affine"]),
    (noise(), grid()[:3], "a.nii", ["affine"]),
    (noise(), grid() * np.nan, "a.nii", ["affine"]),
])
def test_what_cannot_be_written_is_refused(tmp_path, array, affine, name, parts):
    with pytest.raises(DataError) as error:
        write_scan(tmp_path / name, array, affine)
    line(error, tmp_path / name, *parts)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd"])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, name):
    write_scan(tmp_path / name, noise(), grid())
    before = (tmp_path / name).read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(scans.os, "replace", fail)
    with pytest.raises(DataError) as error:
        write_scan(tmp_path / name, noise() + 1, grid())
    line(error, tmp_path / name, "disk full")
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_bytes() == before
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError) as error:
        write_scan(tmp_path / "file" / name, noise(), grid())
    line(error, "cannot be written")


def test_the_same_scan_gives_the_same_bytes(tmp_path):
    for suffix in (".nii.gz", ".nrrd", ".mha"):
        write_scan(tmp_path / f"a{suffix}", noise(), OBLIQUE)
        write_scan(tmp_path / f"b{suffix}", noise(), OBLIQUE)
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    assert (tmp_path / "a.nii.gz").read_bytes()[4:8] == bytes(4)  # the time in the gzip header


# --- grids


def test_same_grid():
    image = scan(name="image.nii")
    channels = Scan(np.stack([noise()] * 2), grid(), Path("both.nii"))
    same_grid(image, channels, "label")
    near = grid()
    near[2, 3] += 0.06  # a tenth of 0.7 mm is allowed
    same_grid(image, scan(affine=near), "label")
    near[2, 3] += 0.02
    with pytest.raises(DataError) as error:
        same_grid(image, scan(affine=near, name="label.nii"), "label")
    line(error, "label.nii: label lies up to 0.08 mm away", "at most 0.07 mm", "image.nii")
    # the first corner fits, the last does not
    with pytest.raises(DataError) as error:
        same_grid(image, scan(affine=grid((0.7, 1.25, 3.1)), name="label.nii"), "label")
    line(error, "0.4 mm")
    with pytest.raises(DataError) as error:
        same_grid(image, scan(noise((7, 5, 6)), name="label.nii"), "label")
    line(error, "label.nii: label has shape (7, 5, 6)", SHAPE, "image.nii")


# --- to the store and back


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_every_orientation_goes_there_and_back_bit_by_bit(codes):
    raw = scan(noise(), oriented(codes))
    assert raw.orientation == codes
    geometry = Geometry.of(raw)
    stored = to_store(raw, geometry, 3)
    assert geometry.orientation == "RAS" and not geometry.resampled and stored.flags.c_contiguous
    assert np.array_equal(to_scanner(stored, geometry), raw.voxels) and stored.dtype == raw.voxels.dtype
    oracle = nib.as_closest_canonical(nib.Nifti1Image(raw.voxels, raw.affine))
    assert np.array_equal(stored, np.asanyarray(oracle.dataobj)) and np.allclose(geometry.stored_affine, oracle.affine)
    # cropped, with channels: every voxel keeps its place in the world
    geometry = Geometry.of(raw, crop=[(1, 4), (0, 3), (2, 5)])
    both = Scan(np.stack([raw.voxels, -raw.voxels]), raw.affine, raw.path)
    stored = to_store(both, geometry, 1)
    assert stored.shape == (2, 3, 3, 3)
    back = to_scanner(stored, geometry, outside=-9999)
    inside = back[0] != -9999
    assert np.count_nonzero(inside) == 27 and np.array_equal(back[:, inside], both.voxels[:, inside])
    index = np.linalg.inv(raw.affine) @ geometry.stored_affine @ (2, 0, 1, 1)
    assert stored[0, 2, 0, 1] == raw.voxels[tuple(np.rint(index[:3]).astype(int))]


def test_orientations_are_48():
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("wanted", ["LPS", "SRA", "AIL", None])
def test_other_orders_of_the_store(wanted):
    raw = scan(affine=oriented("PIR"))
    geometry = Geometry.of(raw, orientation=wanted)
    stored = to_store(raw, geometry, 0)
    assert geometry.orientation == (wanted or "PIR")
    assert np.array_equal(to_scanner(stored, geometry), raw.voxels)
    assert wanted or np.array_equal(stored, raw.voxels)


@pytest.mark.parametrize("affine", [OBLIQUE, SHEARED, grid(rotation=turn(170, 40, -100))])
def test_oblique_scans_keep_their_place(affine):
    raw = scan(affine=affine)
    geometry = Geometry.of(raw, crop=[(1, 4), (1, 5), (0, 4)])
    assert geometry.orientation == "RAS"
    stored = to_store(raw, geometry, 0)
    assert np.array_equal(to_scanner(stored, geometry)[to_scanner(np.ones_like(stored), geometry) > 0],
                          raw.voxels[to_scanner(np.ones_like(stored), geometry) > 0])
    for at in np.ndindex(stored.shape):
        index = np.rint((np.linalg.inv(affine) @ geometry.stored_affine @ (*at, 1))[:3]).astype(int)
        assert stored[at] == raw.voxels[tuple(index)]


def world(geometry_affine, shape):
    index = np.stack([*np.indices(shape), np.ones(shape)])
    return np.einsum("ab,b...->a...", geometry_affine, index)[:3]


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "PIL"])
@pytest.mark.parametrize("order", [1, 3])
def test_resampling_keeps_the_world_in_place(codes, order):
    """An image that is a linear function of the place is the same function at the places of the store, and back."""
    shape, slope = (40, 36, 34), np.array([0.3, -0.7, 0.2])
    affine = oriented(codes, (0.9, 1.2, 1.6))
    affine[:3, :3] = turn(10, 5, -8) @ affine[:3, :3]
    raw = scan(np.tensordot(slope, world(affine, shape), 1), affine)
    geometry = Geometry.of(raw, spacing=(1.0, 1.0, 1.0))
    stored = to_store(raw, geometry, order)
    assert geometry.resampled and stored.shape == geometry.stored and stored.dtype == np.float64
    expected = np.tensordot(slope, world(geometry.stored_affine, stored.shape), 1)
    inner = (slice(13, -13),) * 3  # the edge of the image goes on as a constant
    assert np.abs(stored - expected)[inner].max() < (1e-9 if order == 1 else 1e-3)
    assert np.abs(to_scanner(stored, geometry, 1) - raw.voxels)[inner].max() < (1e-9 if order == 1 else 1e-3)
    assert geometry.stored_spacing == pytest.approx((1, 1, 1), rel=0.03)


def test_the_box_keeps_its_faces():
    raw = scan(noise((10, 9, 8)), grid((1, 1, 2)))
    geometry = Geometry.of(raw, crop=[(2, 8), (0, 9), (1, 7)], spacing=(2.0, None, 1.0))
    assert geometry.cropped == (6, 9, 6) and geometry.stored == (3, 9, 12)
    assert geometry.stored_spacing == pytest.approx((2, 1, 1))
    first = geometry.stored_affine @ (-0.5, -0.5, -0.5, 1)
    last = geometry.stored_affine @ (2.5, 8.5, 11.5, 1)
    assert first == pytest.approx(raw.affine @ (1.5, -0.5, 0.5, 1))
    assert last == pytest.approx(raw.affine @ (7.5, 8.5, 6.5, 1))


@pytest.mark.parametrize("mm, expected", [(1.7, 6), (1.9, 5), (2.2, 5), (30, 1), (0.4, 25)])
def test_the_shape_is_rounded_and_never_empty(mm, expected):
    raw = scan(noise((10, 1, 1)), grid((1, 1, 1)))
    geometry = Geometry.of(raw, spacing=(mm, None, None))
    assert geometry.stored == (expected, 1, 1) == to_store(raw, geometry, 1).shape
    assert to_scanner(to_store(raw, geometry, 0), geometry).shape == (10, 1, 1)


def test_nearest_takes_the_voxel_that_is_there():
    line_of = np.arange(6, dtype=np.int64).reshape(6, 1, 1)
    raw = scan(line_of, grid((1, 1, 1)))
    assert to_store(raw, Geometry.of(raw, spacing=(2, 1, 1)), 0).ravel().tolist() == [1, 3, 5]
    assert to_store(raw, Geometry.of(raw, spacing=(3, 1, 1)), 0).ravel().tolist() == [1, 4]
    twice = to_store(raw, Geometry.of(raw, spacing=(0.5, 1, 1)), 0)
    assert twice.ravel().tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5] and twice.dtype == np.int64


def ball(shape, affine, radius):
    place = world(affine, shape)
    center = (affine @ [*((np.array(shape) - 1) / 2), 1])[:3]
    return (np.linalg.norm(place - center[:, None, None, None], axis=0) <= radius).astype(np.uint8)


def dice(a, b):
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


@pytest.mark.parametrize("codes", ["RAS", "PIL"])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.3, 1.3, 1.3), (0.6, 0.6, 2.0)])
def test_a_ball_survives_resampling(codes, spacing):
    affine = oriented(codes, (0.8, 1.1, 1.5))
    affine[:3, :3] = turn(12, -7, 20) @ affine[:3, :3]
    raw = scan(ball((60, 44, 32), affine, 14), affine)
    geometry = Geometry.of(raw, crop=[(1, n - 2) for n in (Geometry.of(raw).stored)], spacing=spacing)
    stored = to_store(raw, geometry, 0)
    assert stored.dtype == np.uint8 and dice(stored, ball(stored.shape, geometry.stored_affine, 14)) > 0.9
    back = to_scanner(stored, geometry)
    assert back.dtype == np.uint8 and dice(back, raw.voxels) > 0.95
    probabilities = np.stack([1.0 - stored, stored]).astype(np.float32)
    smooth = labels_to_scanner(probabilities, geometry)
    assert smooth.shape == raw.space and dice(smooth, raw.voxels) > 0.95
    full = to_scanner(probabilities, geometry, 1, outside=(1, 0))
    assert np.array_equal(smooth, full.argmax(0)) and np.abs(full.sum(0) - 1).max() < 1e-5


def test_outside_the_crop_is_background():
    raw = scan(noise((10, 9, 8)), oriented("LIP"))
    geometry = Geometry.of(raw, crop=[(2, 8), (3, 6), (1, 7)], spacing=(1.0, 1.5, 2.0))
    inside = to_scanner(np.ones(geometry.stored, np.uint8), geometry) > 0
    assert np.count_nonzero(inside) == 6 * 3 * 6
    # only the last of three classes inside, so a background of 0 outside would show as well
    probabilities = np.zeros((3, *geometry.stored), np.float32)
    probabilities[2] = 0.4
    labels = labels_to_scanner(probabilities, geometry)
    assert labels.dtype == np.uint8 and np.array_equal(labels, np.where(inside, 2, 0))
    full = to_scanner(probabilities, geometry, 1, outside=(1, 0, 0))
    assert full[:, ~inside].T.tolist() == [[1, 0, 0]] * np.count_nonzero(~inside)


def test_labels_are_chosen_bit_exactly_without_resampling_and_a_tie_goes_down():
    raw = scan(affine=oriented("SLA"))
    geometry = Geometry.of(raw)
    probabilities = np.random.default_rng(0).random((4, *geometry.stored)).astype(np.float32)
    probabilities[:, 0] = 0.25
    labels = labels_to_scanner(probabilities, geometry)
    assert np.array_equal(labels, to_scanner(probabilities.argmax(0).astype(np.uint8), geometry))
    assert not labels[to_scanner((np.indices(geometry.stored)[0] == 0), geometry)].any()


@pytest.mark.parametrize("kind, expected", [(np.int16, np.float32), (np.uint8, np.float32), (np.float16, np.float32),
                                            (np.float32, np.float32), (np.float64, np.float64)])
def test_types(kind, expected):
    raw = scan(noise().astype(kind))
    geometry = Geometry.of(raw, spacing=(1, 1, 1))
    assert to_store(raw, geometry, 1).dtype == expected and to_store(raw, geometry, 0).dtype == kind
    assert to_store(raw, Geometry.of(raw), 3).dtype == kind


def test_json_keeps_a_geometry_exactly():
    raw = scan(affine=OBLIQUE)
    geometry = Geometry.of(raw, crop=np.array([(1, 4), (1, 5), (0, 4)]), spacing=(0.9, 1.1, None))
    entry = geometry.to_dict()
    again = Geometry.from_dict(json.loads(json.dumps(entry)))
    assert again == geometry and hash(again) == hash(geometry)
    assert np.array_equal(again.stored_affine, geometry.stored_affine)


@pytest.mark.parametrize("change", [{"axes": [0, 0, 1]}, {"axes": None}, {"stored": [1, 2]}, {"stored": [0, 2, 2]},
                                    {"crop": [[0, 99], [0, 1], [0, 1]]}, {"crop": [[0, 1], [0, 1]]}, {"shape": ["x"]},
                                    {"affine": [[0] * 4] * 4}, {"affine": [[1], [2, 3]]}, {"flips": [True]}])
def test_a_damaged_geometry_is_refused(change):
    entry = Geometry.of(scan()).to_dict()
    with pytest.raises(DataError) as error:
        Geometry.from_dict({**entry, **change})
    line(error, "geometry")
    entry.pop(next(iter(change)))
    with pytest.raises(DataError) as error:
        Geometry.from_dict(entry)
    line(error, "KeyError")


@pytest.mark.parametrize("options, parts", [
    ({"crop": [(0, 8), (0, 6), (0, 5)]}, ["crop", SHAPE]), ({"crop": [(3, 3), (0, 6), (0, 5)]}, ["crop"]),
    ({"crop": [(-1, 3), (0, 6), (0, 5)]}, ["crop"]), ({"crop": [(0, 6), (0, 5)]}, ["crop"]),
    ({"spacing": (1, 0, 1)}, ["spacing (1, 0, 1)", "mm"]), ({"spacing": (1, float("nan"), 1)}, ["spacing"]),
    ({"spacing": (1, 1)}, ["spacing (1, 1)"]), ({"orientation": "RAA"}, ["'RAA'"]), ({"orientation": "RA"}, ["'RA'"]),
    ({"orientation": "XYZ"}, ["'XYZ'"]),
])
def test_an_impossible_geometry_is_refused(options, parts):
    with pytest.raises(DataError) as error:
        Geometry.of(scan(), **options)
    line(error, "a.nii.gz", *parts)


def test_arrays_that_do_not_fit_are_refused():
    geometry = Geometry.of(scan(), crop=[(1, 4), (1, 5), (0, 4)])
    with pytest.raises(DataError) as error:
        to_store(scan(noise((7, 6, 4)), name="label.nii"), geometry, 0)
    line(error, "label.nii", (7, 6, 4), SHAPE)
    with pytest.raises(DataError) as error:
        to_store(scan(affine=OBLIQUE, name="label.nii"), geometry, 0)
    line(error, "label.nii", "mm away")
    with pytest.raises(ValueError, match=r"\(7, 6, 5\), expected the stored shape \(3, 4, 4\)"):
        to_scanner(noise(), geometry)
    with pytest.raises(ValueError, match="expected 1 to 256 x"):
        labels_to_scanner(noise(), geometry)


def test_from_a_raw_file_to_an_overlay_on_its_own_grid(tmp_path):
    """Read, store with crop and resampling, predict the threshold, write: what a viewer then lays over the raw scan."""
    affine = oriented("PSL", (0.9, 0.9, 1.6))
    affine[:3, :3] = turn(9, 14, -21) @ affine[:3, :3]
    truth = ball((50, 48, 30), affine, 12)
    for name in ("a.nii.gz", "a.nrrd"):
        write_scan(tmp_path / name, truth * 900.0 + 100, affine)
        raw = read_scan(tmp_path / name)
        geometry = Geometry.of(raw, crop=[(3, n - 3) for n in Geometry.of(raw).stored], spacing=(1, 1, 1))
        image = to_store(raw, geometry, 3)
        part = 1 / (1 + np.exp(-(image - 550) / 50))
        write_scan(tmp_path / f"out.{name}", labels_to_scanner(np.stack([1 - part, part]), geometry), None, like=raw)
        found = read_scan(tmp_path / f"out.{name}")
        same_grid(raw, found, "prediction")
        assert np.array_equal(found.affine, raw.affine) and dice(found.voxels, truth) > 0.98


# --- real scans


REAL_SCANS = {
    "ACDC/training/patient001/patient001_frame01.nii.gz": ((1.5625, 1.5625, 10), 4),
    "ACDC/training/patient001/patient001_frame12.nii.gz": ((1.5625, 1.5625, 10), 4),
    "LA/Training Set/06SR5RBREL16DQ6M8LWS/lgemri.nrrd": ((0.625, 0.625, 0.625), 2),
    "MSD/Task09_Spleen/imagesTr/spleen_2.nii.gz": (None, 2),
    "nrrd/data/brain1_image.nrrd": (None, 2),
    "nrrd/data/brain2_image.nrrd": (None, 2),
    "nrrd/data/breast1_image.nrrd": (None, 2),
}


@pytest.mark.parametrize("name", REAL_SCANS)
def test_real_scans(name):
    path = REAL / name
    if not path.exists():
        pytest.skip(f"no real scan {name} in ../shared/real")
    spacing, classes = REAL_SCANS[name]
    raw = read_scan(path)
    assert raw.spacing == pytest.approx(spacing, abs=1e-3) if spacing else all(0.2 < mm < 12 for mm in raw.spacing)
    extent = np.array(raw.space) * raw.spacing
    assert (20 < extent).all() and (extent < 600).all()
    masks = (("frame01", "frame01_gt"), ("frame12", "frame12_gt"), ("lgemri", "laendo"), ("imagesTr", "labelsTr"),
             ("_image", "_label"))
    other = next(name.replace(*pair) for pair in masks if pair[0] in name)
    label = read_scan(REAL / other)
    same_grid(raw, label, "label")
    assert len(np.unique(label.voxels)) == classes
    geometry = Geometry.of(raw)
    for part in (raw, label):
        assert np.array_equal(to_scanner(to_store(part, geometry, 0), geometry), part.voxels)
