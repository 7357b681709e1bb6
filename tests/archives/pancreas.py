"""TCIA's Pancreas-CT: CT series as pydicom writes them, slices in no order of their names, and labels as NIfTI."""

import zlib
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

SPACING = (0.75, 0.75, 1.0)
ORIGIN = (-110.0, -95.0, 30.0)  # of the first voxel in LPS mm
INTERCEPT = -1024
ROOT = "1.2.826.0.1.3680043.8.498"  # pydicom's own, for UIDs
BROKEN = ("no image", "no label", "shape", "affine", "constant", "truncated", "no scan", "value", "empty")
BROKEN_DICOM = (*BROKEN, "two series", "missing slice", "same position")
BROKEN_NIFTI = (*BROKEN, "4D", "NaN")
IDS_82 = tuple(f"PANCREAS_{n:04d}" for n in range(1, 83))
IDS_80 = tuple(case for case in IDS_82 if case not in ("PANCREAS_0025", "PANCREAS_0070"))


def build(
    folder: Path, ids: Sequence[str], shape: tuple[int, int, int] = (24, 24, 16), broken: str | None = None,
    seed: int = 0, form: str = "dicom", header: str = "no origin", flips: Sequence[int] = (),
    spacing: tuple[float, float, float] = SPACING, descending: bool = False,
) -> Path:
    """Write the archive and return its folder; shape and spacing along x, y, z of DICOM (LPS).

    `form` is "dicom" or, for images as NIfTI, an orientation such as "LAS" (as dcm2niix has it). The affine of a label
    is that of the image with the `header` "image", points the same way without an origin ("no origin"), says RAS in
    place of LPS ("wrong") or is that of a label turned to RAS ("RAS"); its voxels are flipped along the axes `flips`
    after that. `descending` counts the instances from the head down. The first case is wrong as `broken` says, one of
    BROKEN_DICOM or of BROKEN_NIFTI.
    """
    assert broken in (None, *(BROKEN_DICOM if form == "dicom" else BROKEN_NIFTI))
    folder = Path(folder)
    for number, case in enumerate(ids):
        hu, label = anatomy(case, shape, seed)
        wrong = broken if number == 0 else None
        affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
        affine[:3, 3] = -ORIGIN[0], -ORIGIN[1], ORIGIN[2]
        if wrong == "constant":
            hu[:] = 40
        if wrong != "no image":
            if form == "dicom":
                _series(folder, case, hu, spacing, wrong, descending)
            else:
                _image(folder, case, hu, affine, form, wrong)
        if wrong != "no label":
            _label(folder, case, label, affine, header, flips, wrong)
    return folder


def anatomy(case: str, shape: tuple[int, int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """HU int16 and label uint8, (x, y, z) in LPS: fat around organs with gas, the pancreas in front of the spine."""
    rng = np.random.default_rng([seed, zlib.crc32(case.encode())])
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")

    def ball(center, radii):
        return sum(((a - m) / r) ** 2 for a, m, r in zip((x, y, z), center, radii, strict=True)) < 1

    body = (x / 0.9) ** 2 + (y / 0.8) ** 2 < 1
    inside = (x / 0.75) ** 2 + (y / 0.65) ** 2 < 1
    spine = x**2 + (y - 0.42) ** 2 < 0.04
    gas = ball((-0.3, -0.2, -0.6), (0.35, 0.3, 0.35))
    lung = inside & (z > 0.8) & (y > -0.3)
    pancreas = ball(rng.uniform(-0.1, 0.1, 3) + (0.2, -0.25, 0.3), rng.uniform(0.24, 0.34, 3))
    hu = np.select([pancreas, gas, spine, lung, inside, body], [105, -700, 420, -850, 45, -100], -1000)
    return (hu + rng.normal(0, 12, shape)).round().astype(np.int16), pancreas.astype(np.uint8)


def _series(folder: Path, case: str, hu: np.ndarray, spacing, broken: str | None, descending: bool) -> None:
    study, series = (f"{ROOT}.{zlib.crc32(f'{case} {what}'.encode())}" for what in ("study", "series"))
    place = folder / "manifest" / "Pancreas-CT" / case / f"11-24-2015-{case}-Pancreas-18957" / "Pancreas-99667"
    places = [place, place.with_name("Scout-1")] if broken == "two series" else [place]
    depth = hu.shape[2]
    for number, there in enumerate(places):
        there.mkdir(parents=True)
        slices = _slices(case, study, f"{series}.{number}", hu, spacing, descending)
        names = np.random.default_rng(depth).permutation(depth)
        for k, (name, data) in enumerate(zip(names, slices, strict=True)):
            if broken == "missing slice" and k == depth // 2:
                continue
            if broken == "same position" and k == depth // 2:
                data.ImagePositionPatient = [ORIGIN[0], ORIGIN[1], ORIGIN[2] + (k - 1) * spacing[2]]
            path = there / f"1-{name + 1:03d}.dcm"
            data.save_as(path, enforce_file_format=True)
            if broken == "truncated" and k == 0:
                path.write_bytes(path.read_bytes()[:-50])
            elif broken == "no scan":
                path.write_text("<html>log in first</html>\n")


def _slices(case: str, study: str, series: str, hu: np.ndarray, spacing, descending: bool):
    """The slices from the feet up, each with the header of a CT."""
    stored = (hu.astype(np.int32) - INTERCEPT).clip(0, 4095).astype(np.uint16)
    depth = hu.shape[2]
    for k in range(depth):
        number = depth - k if descending else k + 1
        data = pydicom.Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = f"{series}.{number}"
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = study, series, f"{study}.1"
        data.PatientID = data.PatientName = case
        data.Modality, data.StudyID, data.SeriesNumber, data.InstanceNumber = "CT", "1", 1, number
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.ImagePositionPatient = [ORIGIN[0], ORIGIN[1], ORIGIN[2] + k * spacing[2]]
        data.PixelSpacing = [spacing[1], spacing[0]]  # of rows, then of columns
        data.SliceThickness = spacing[2]
        data.Columns, data.Rows = hu.shape[:2]
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
        data.RescaleIntercept, data.RescaleSlope = INTERCEPT, 1
        data.PixelData = stored[:, :, k].T.tobytes()  # row by row
        yield data


def _image(folder: Path, case: str, hu: np.ndarray, affine: np.ndarray, orientation: str, broken: str | None) -> None:
    if broken == "4D":
        hu = np.stack([hu, hu], axis=3)
    elif broken == "NaN":
        hu = hu.astype(np.float32)
        hu[1, 2, 3] = np.nan
    _nifti(folder / "images" / f"{case}.nii.gz", _turned(hu, affine, orientation), broken)


def _label(
    folder: Path, case: str, label: np.ndarray, affine: np.ndarray, header: str, flips: Sequence[int],
    broken: str | None,
) -> None:
    if broken == "shape":
        label = label[:, :, :-1]
    elif broken == "value":
        label[1, 2, 3] = 2
    elif broken == "empty":
        label[:] = 0
    elif broken == "affine":  # the label of another scan: half of this one, whatever lies there
        label[:] = 0
        label[: len(label) // 2] = 1
    image = _turned(label, affine, "RAS" if header == "RAS" else "LPS")
    voxels, affine = np.asanyarray(image.dataobj), image.affine
    if header != "image":
        affine = affine * [[-1], [-1], [1], [1]] if header == "wrong" else affine.copy()
        affine[:3, 3] = 0
    elif broken == "affine":
        affine = affine.copy()
        affine[:3, 3] += 40
    path = folder / "TCIA_pancreas_labels-02-05-2017" / f"label{case[-4:]}.nii.gz"
    _nifti(path, nib.Nifti1Image(np.flip(voxels, tuple(flips)), affine), None)


def _turned(voxels: np.ndarray, affine: np.ndarray, orientation: str) -> nib.Nifti1Image:
    """The same anatomy at the same mm with its axes in another order."""
    change = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(orientation))
    return nib.Nifti1Image(voxels, affine).as_reoriented(change)


def _nifti(path: Path, image: nib.Nifti1Image, broken: str | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    if broken == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif broken == "no scan":
        path.write_text("<html>log in first</html>\n")
