"""Raw scans of the common formats in one convention.

Everywhere here voxel axes come first to last as (i, j, k), and an affine maps voxel indices to mm in RAS+: x grows to
the patient's right, y to the front, z to the head. NIfTI says it so, the others (LPS) are converted.
"""

import gzip
import math
import os
import re
import uuid
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.spec import DataError

NIFTI = (".nii.gz", ".nii")
ITK = {".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
EXPECTED = f"{', '.join((*NIFTI, *ITK))} or a folder with one DICOM series"
WRITABLE = (*NIFTI, ".nrrd", ".mha")
GRID_TOLERANCE = 0.1  # of the smallest voxel side: beyond the rounding of any header, below what a label would show
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
MM = {1: 1000.0, 3: 0.001}  # NIfTI's codes of meter and micrometer; 2 is mm, and unknown ones are taken for mm
NIFTI_SPACE = ("xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x",
               "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z")
LONGEST = 800  # characters of a line in the header of a NRRD file
DICOM_TAGS = {"position": "0020|0032", "orientation": "0020|0037", "pixel spacing": "0028|0030"}


@dataclass(frozen=True, eq=False)
class Scan:
    """A scan as stored: voxels (i, j, k) or (channels, i, j, k), affine (4, 4) from voxel index to RAS+ mm.

    `header` is the NIfTI header as read, so that `write_scan` can repeat it; None for the other formats.
    """

    voxels: np.ndarray
    affine: np.ndarray
    path: Path
    header: Any = field(default=None, repr=False)

    @property
    def space(self) -> tuple[int, ...]:
        """Number of voxels along i, j and k."""
        return self.voxels.shape[-3:]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance of neighboring voxels in mm along i, j and k."""
        return spacing_of(self.affine)

    @property
    def orientation(self) -> str:
        """Where i, j and k point to, one of R L A P S I each: "LPS" for most DICOM series."""
        return orientation_of(self.affine)


def read_scan(path: Path | str, *, channels: bool = False, finite: bool = True, contrast: bool = True) -> Scan:
    """A NIfTI, NRRD or MetaImage file or a DICOM folder: voxels of the stored type, or scaled as the header says.

    Voxels are (i, j, k), or with `channels` always (channels, i, j, k); what has several volumes is refused without it.
    `finite` refuses NaN and infinity, `contrast` a volume with the same value everywhere (False for labels that may be
    empty). Raises DataError for these, and for what is missing, truncated, no scan, or a series that is not one volume.
    """
    path = Path(path)
    if path.is_dir():
        scan = _read_dicom(path)
    elif not path.exists():
        raise DataError(f"{path}: no such file or folder, expected {EXPECTED}")
    else:
        suffix = _suffix(path, (*NIFTI, *ITK))
        if suffix is None:
            if is_dicom(path):
                raise DataError(f"{path}: a single DICOM file, expected the folder with the series")
            raise DataError(f"{path}: not a medical scan ({path.suffix or 'no suffix'}), expected {EXPECTED}")
        scan = _read_nifti(path) if suffix in NIFTI else _read_itk(path, ITK[suffix])
    check_affine(scan.affine, path)
    voxels = scan.voxels
    if voxels.dtype.kind not in "biuf":
        raise DataError(f"{path}: the voxels are of type {voxels.dtype}, expected real numbers")
    if 0 in voxels.shape:
        raise DataError(f"{path}: shape {voxels.shape}, expected at least one voxel along each axis")
    if voxels.ndim == 4 and not channels:
        raise DataError(f"{path}: {len(voxels)} volumes or channels of shape {scan.space}, expected a single 3D volume")
    voxels = voxels[None] if channels and voxels.ndim == 3 else voxels
    _check_values(voxels, path, finite, contrast)
    return Scan(voxels, scan.affine, path, scan.header)


def write_scan(path: Path | str, array: np.ndarray, affine: np.ndarray | None, like: Scan | None = None) -> None:
    """Write .nii, .nii.gz, .nrrd or .mha, whole or not at all; array (i, j, k) or (channels, i, j, k), affine in mm.

    The type is kept, except that bool becomes uint8 and float16 float32. With `like` the array must lie on its grid (an
    affine of None takes over its affine), and NIfTI repeats the transforms of its header, so that every viewer lays
    both over each other. Raises DataError for another suffix, grid, shape or type and where nothing can be written.
    """
    path, array = Path(path), np.asarray(array)
    suffix = _suffix(path, WRITABLE)
    if suffix is None:
        raise DataError(f"{path}: cannot be written as {path.suffix or 'a file without suffix'}, "
                        f"expected {', '.join(WRITABLE)}")
    if affine is None:
        if like is None:
            raise DataError(f"{path}: no affine, expected one or a scan to take it from")
        affine = like.affine
    affine = np.asarray(affine, np.float64)
    check_affine(affine, path)
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise DataError(f"{path}: an array of shape {array.shape}, expected 3 axes or channels and 3 axes, none empty")
    if like is not None:
        same_grid(like, Scan(array, affine, path), "array")
    kind = {np.bool_: np.uint8, np.float16: np.float32}.get(array.dtype.type, array.dtype.newbyteorder("="))
    array = array.astype(kind, copy=False)
    if array.dtype.kind not in "iuf" or array.dtype.itemsize > 8:
        raise DataError(f"{path}: an array of type {array.dtype}, expected integers or floats of up to 64 bit")
    # in the same folder, since only there os.replace is atomic; the writers know the format by the suffix
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix in NIFTI:
            data = _nifti_bytes(array, affine, like)
            # no time in the gzip header: the same scan gives the same file
            temporary.write_bytes(gzip.compress(data, 6, mtime=0) if suffix == ".nii.gz" else data)
        else:
            _write_itk(temporary, array, affine)
        os.replace(temporary, path)
    except Exception as error:  # each library has its own errors, without a common base
        raise DataError(f"{path}: cannot be written ({_reason(error)}), expected a writable folder") from None
    finally:
        with suppress(OSError):  # gone already, or its folder never came to be
            temporary.unlink()


def same_grid(a: Scan, b: Scan, what: str) -> None:
    """Raises DataError, naming `b` as `what` ("label"), unless it lies on the voxels of `a`.

    Shapes without channels must be equal, and no corner voxel further away than a tenth of the smallest voxel side.
    """
    check_grid(a.space, a.affine, b, what, f"those of {a.path}")


def check_grid(shape: Sequence[int], affine: np.ndarray, scan: Scan, what: str, whose: str) -> None:
    if scan.space != tuple(shape):
        raise DataError(f"{scan.path}: {what} has shape {scan.space}, expected {tuple(shape)}, {whose}")
    corners = np.array([[*(i * (n - 1) for i, n in zip(corner, shape, strict=True)), 1.0]
                        for corner in np.ndindex(2, 2, 2)])
    distance = np.linalg.norm(corners @ (scan.affine - affine).T, axis=1).max()
    allowed = GRID_TOLERANCE * min(spacing_of(affine))
    if not distance <= allowed:
        raise DataError(f"{scan.path}: {what} lies up to {distance:.3g} mm away from its voxels, "
                        f"expected at most {allowed:.2g} mm between its affine and {whose}")


def check_affine(affine: np.ndarray, path: Path | str) -> None:
    affine = np.asarray(affine)
    sound = affine.shape == (4, 4) and np.isfinite(affine).all() and affine[3].tolist() == [0, 0, 0, 1]
    if sound:
        sides = np.prod(spacing_of(affine))
        sound = sides > 0 and abs(np.linalg.det(affine[:3, :3])) > 1e-3 * sides
    if not sound:
        rows = "; ".join(" ".join(f"{value:g}" for value in row) for row in np.atleast_2d(affine))
        raise DataError(f"{path}: the affine is [{rows}], expected 3 independent axes of finite length")


def _check_values(voxels: np.ndarray, path: Path, finite: bool, contrast: bool) -> None:
    bad = 0
    if voxels.dtype.kind == "f":
        bad = voxels.size - int(np.count_nonzero(np.isfinite(voxels)))
        if finite and bad:
            raise DataError(f"{path}: {bad} voxels are NaN or infinite, expected finite values")
    if not contrast:
        return
    for number, volume in enumerate(voxels if voxels.ndim == 4 else voxels[None]):
        values = volume[np.isfinite(volume)] if bad else volume
        if not values.size or values.min() == values.max():
            where = f"volume {number} of {len(voxels)}" if voxels.ndim == 4 and len(voxels) > 1 else "the scan"
            value = f"{values.flat[0]:g}" if values.size else "NaN or infinite"
            raise DataError(f"{path}: {where} is {value} everywhere, expected contrast")


def spacing_of(affine: np.ndarray) -> tuple[float, ...]:
    return tuple(float(mm) for mm in np.linalg.norm(np.asarray(affine)[:3, :3], axis=0))


def orientation_of(affine: np.ndarray) -> str:
    import nibabel as nib

    return "".join(nib.aff2axcodes(affine))


def _suffix(path: Path, known: Sequence[str]) -> str | None:
    return next((suffix for suffix in known if path.name.lower().endswith(suffix)), None)


def _reason(error: Exception) -> str:
    """The message of a library in one short line; ITK's begins with places in its own source."""
    text = str(error).split("ERROR: ")[-1].strip()
    line = " ".join(text.splitlines()[-1].split())[:200] if text else type(error).__name__
    if line.startswith("Reason: "):  # ITK repeats errno, "Success" where a file is only too short
        return "the voxels are missing or too few"
    # an address in memory is another one each time
    return "".join(filter(str.isprintable, re.sub(r"\w+\(0x[0-9a-f]+\): ", "", line)))


def _read(path: Path, what: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except DataError:
        raise
    except Exception as error:  # damaged bytes raise anything, from EOFError and zlib.error to KeyError
        raise DataError(f"{path}: truncated, damaged or no {what} file ({_reason(error)}), expected a readable one") \
            from None


def _room() -> int:
    """Bytes that a scan may take: a quarter of the memory of this machine (of 16 GiB where that is not known)."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (AttributeError, OSError, ValueError):
        return 2**32


def _check_size(size: int, path: Path) -> None:
    """Raises DataError for more bytes than a scan may take: a few packed ones can stand for all of the memory."""
    if size > _room():
        raise DataError(f"{path}: more than {_room() / 2**30:.3g} GiB of voxels, expected at most a quarter of this "
                        "machine's memory")


def _unpacked(packed: BytesIO, path: Path) -> BytesIO:
    """What a gzip file holds, checked to its end."""
    found = BytesIO()
    packed.seek(0)
    with gzip.GzipFile(fileobj=packed) as file:
        while part := file.read(2**24):
            found.write(part)
            _check_size(found.tell(), path)
    found.seek(0)
    return found


def _read_nifti(path: Path) -> Scan:
    import nibabel as nib

    def read() -> Scan:
        _check_size(path.stat().st_size, path)
        data = BytesIO(path.read_bytes())
        if data.read(2) == b"\x1f\x8b":
            data = _unpacked(data, path)  # to the end, checksum included, which nibabel leaves unread
        start = data.getbuffer()[:4]
        kind = nib.Nifti2Image if start in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nib.Nifti1Image
        del start  # while it lasts the buffer cannot be closed
        image = kind.from_file_map({"image": nib.FileHolder(fileobj=data)})
        voxels = np.asanyarray(image.dataobj)
        affine = np.array(image.affine, np.float64)
        affine[:3] *= MM.get(int(image.header["xyzt_units"]) % 8, 1.0)
        while voxels.ndim > 3 and 1 in voxels.shape[3:]:  # (i, j, k, 1) is a volume, (i, j, k, 1, 3) a vector image
            voxels = voxels.squeeze(3 + voxels.shape[3:].index(1))
        if voxels.ndim == 4:
            voxels = np.moveaxis(voxels, 3, 0)
        return Scan(voxels, affine, path, image.header)

    scan = _read(path, "NIfTI", read)
    if scan.voxels.ndim not in (3, 4):
        raise DataError(f"{path}: shape {scan.voxels.shape}, expected 3 axes (a volume)")
    native = scan.voxels.dtype.newbyteorder("=")
    return Scan(scan.voxels.astype(native, copy=False), scan.affine, path, scan.header)


def _check_nrrd(path: Path) -> None:
    """Raises DataError for a line of the header, no free text, that is too long for ITK: it ends the process."""
    with path.open("rb") as file:
        while line := file.readline(2**20).rstrip(b"\r\n"):
            if len(line) > LONGEST and b":=" not in line and not line.startswith(b"#"):
                raise DataError(f"{path}: a line of the header has {len(line)} characters, expected at most {LONGEST}")


def _read_itk(path: Path, io: str) -> Scan:
    import SimpleITK as sitk

    if io.startswith("Nrrd"):
        _read(path, "NRRD", lambda: _check_nrrd(path))
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(io)  # by name: a picture that was renamed to .nrrd is not taken for a scan

    def read() -> sitk.Image:
        reader.ReadImageInformation()
        bytes_per_value = sitk.Image([1, 1], reader.GetPixelID()).GetSizeOfPixelComponent()
        _check_size(math.prod(reader.GetSize()) * reader.GetNumberOfComponents() * bytes_per_value, path)
        return reader.Execute()

    image = _read(path, "NRRD" if io.startswith("Nrrd") else "MetaImage", read)
    size, parts = image.GetSize(), image.GetNumberOfComponentsPerPixel()
    if len(size) not in (3, 4) or (len(size) == 4 and parts > 1):
        raise DataError(f"{path}: {len(size)} axes with {parts} values per voxel, expected 3 axes (a volume)")
    axes = len(size)
    direction = np.array(image.GetDirection()).reshape(axes, axes)[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(image.GetSpacing())[:3]
    affine[:3, 3] = image.GetOrigin()[:3]
    voxels = sitk.GetArrayFromImage(image)  # (k, j, i), with (t, k, j, i) or (k, j, i, part) for several volumes
    voxels = voxels.transpose(3, 2, 1, 0) if parts > 1 else voxels.transpose(*range(axes - 3), *range(axes)[:-4:-1])
    return Scan(voxels[0] if voxels.ndim == 4 and len(voxels) == 1 else voxels, LPS @ affine, path)


@contextmanager
def _quiet():
    """No warnings of ITK on the terminal: what matters of them becomes an error with a line of its own."""
    import SimpleITK as sitk

    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


def is_dicom(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"
    return False


@dataclass(frozen=True)
class _Slice:
    """What the header of a DICOM slice says, in LPS mm; orientation holds the cosines of a row and of a column."""

    name: str
    reader: Any
    size: tuple[int, int]
    position: np.ndarray
    orientation: np.ndarray
    pixel: np.ndarray


def _read_dicom(folder: Path) -> Scan:
    """One volume of the slices of a folder, sorted by their position and not by name or number."""
    import SimpleITK as sitk

    with _quiet():
        series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
        names = [sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid) for uid in series]
        if not series:
            inside = sorted(entry.name for entry in folder.iterdir())
            found = f"{len(inside)} entries, the first is {inside[0]}" if inside else "nothing"
            raise DataError(f"{folder}: no DICOM slices (found: {found}), expected a folder with one DICOM series")
        if len(series) > 1:
            found = ", ".join(f"{uid} ({len(files)} files)" for uid, files in zip(series[:3], names, strict=False))
            more = ", ..." if len(series) > 3 else ""
            raise DataError(f"{folder}: {len(series)} DICOM series ({found}{more}), expected one series per folder")
        listed = {Path(name).name for name in names[0]}
        # GDCM passes over slices that it cannot read, which at the ends of a series would go unnoticed
        for path in sorted(folder.iterdir()):
            if path.name[0] != "." and path.name not in listed | {"DICOMDIR"} and path.is_file() and (
                    path.suffix.lower() == ".dcm" or is_dicom(path)):
                raise DataError(f"{folder}: {path.name} is truncated or no DICOM slice, expected a readable one")
        slices = [_slice_header(folder, name) for name in names[0]]
        affine, slices = _stack(folder, slices)
        planes = []
        for part in slices:
            image = _read(folder / part.name, "DICOM", part.reader.Execute)
            planes.append(sitk.GetArrayViewFromImage(image)[0].T.copy())
    # each slice has its own rescale slope: the common type holds them all
    return Scan(np.stack(planes, axis=-1), LPS @ affine, folder)


def _slice_header(folder: Path, name: str) -> _Slice:
    import SimpleITK as sitk

    path = folder / Path(name).name
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("GDCMImageIO")
    _read(path, "DICOM", reader.ReadImageInformation)
    size, parts = reader.GetSize(), reader.GetNumberOfComponents()
    if any(n != 1 for n in size[2:]) or parts != 1:
        raise DataError(f"{path}: {max(size[2:], default=1)} frames with {parts} values per pixel, "
                        "expected one slice per DICOM file")
    values = {}
    for (what, tag), count in zip(DICOM_TAGS.items(), (3, 6, 2), strict=True):
        text = reader.GetMetaData(tag) if reader.HasMetaDataKey(tag) else ""
        try:
            values[what] = np.array([float(part) for part in text.split("\\")])
        except ValueError:
            values[what] = np.empty(0)
        if len(values[what]) != count or not np.isfinite(values[what]).all():
            raise DataError(f"{path}: {what} ({tag.replace('|', ',')}) is {text.strip()!r}, expected {count} numbers")
    position, orientation, pixel = (values[what] for what in DICOM_TAGS)
    return _Slice(path.name, reader, tuple(size[:2]), position, orientation, pixel)


def _stack(folder: Path, slices: list[_Slice]) -> tuple[np.ndarray, list[_Slice]]:
    """LPS affine of a series and its slices in order. Raises DataError unless they are evenly spaced and alike."""
    first = slices[0]
    if len(slices) < 2:
        raise DataError(f"{folder}: a single DICOM slice, {first.name}, expected at least 2 for a volume")
    for part in slices:
        for what, found, expected, tolerance in (
            ("size", part.size, first.size, 0),
            ("orientation", part.orientation, first.orientation, 1e-3),
            ("pixel spacing", part.pixel, first.pixel, 1e-3),
        ):
            if np.abs(np.subtract(found, expected)).max() > tolerance:
                raise DataError(f"{folder}: {part.name} has {what} {tuple(map(float, found))}, expected "
                                f"{tuple(map(float, expected))} as {first.name}")
    row, column = first.orientation[:3], first.orientation[3:]
    if np.abs([row @ row - 1, column @ column - 1, row @ column]).max() > 1e-3:
        raise DataError(f"{folder}: orientation {tuple(map(float, first.orientation))} of {first.name}, "
                        "expected two perpendicular unit vectors")
    normal = np.cross(row, column)
    slices = sorted(slices, key=lambda part: float(part.position @ normal))
    positions = np.array([part.position for part in slices])
    gaps = np.diff(positions @ normal)
    usual = float(np.median(gaps))
    pairs = [f"{a.name} and {b.name}" for a, b in zip(slices, slices[1:], strict=False)]
    # first, since the gaps beside a repeated slice would be taken for a missing one
    for pair, gap in zip(pairs, gaps, strict=True):
        if gap < 1e-3:
            raise DataError(f"{folder}: {pair} are at the same position, expected one slice per position (3D)")
    for pair, gap in zip(pairs, gaps, strict=True):
        if abs(gap - usual) > 0.02 * usual + 0.01:
            raise DataError(f"{folder}: {gap:.4g} mm between {pair}, expected {usual:.4g} mm as between the others "
                            "(a missing slice or uneven spacing)")
    # from the positions and not along the normal: with a tilted gantry the slices are shifted against each other
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    away = np.linalg.norm(positions - positions[0] - np.arange(len(slices))[:, None] * step, axis=1)
    if away.max() > 0.05 * usual + 0.01:
        worst = int(away.argmax())
        raise DataError(f"{folder}: {slices[worst].name} is {away[worst]:.3g} mm off its place, expected slices on a "
                        "line at even distances")
    affine = np.eye(4)
    # DICOM gives the distance of rows first, which is the step along a column (j)
    affine[:3, :3] = np.stack([row * first.pixel[1], column * first.pixel[0], step], axis=1)
    affine[:3, 3] = positions[0]
    return affine, slices


def _nifti_bytes(array: np.ndarray, affine: np.ndarray, like: Scan | None) -> bytes:
    import nibabel as nib

    data = np.moveaxis(array, 0, 3) if array.ndim == 4 else array
    kind = nib.Nifti1Image if max(data.shape) < 2**15 else nib.Nifti2Image
    header = kind.header_class()
    header.set_data_dtype(data.dtype)
    header.set_data_shape(data.shape)
    known = like.header if like is not None else None
    if known is not None and np.allclose(like.affine, affine, rtol=0, atol=1e-6):
        # both transforms, their codes and their unit as they were: viewers differ in which one they follow
        for name in NIFTI_SPACE:
            header[name] = known[name]
        header["pixdim"][:4] = known["pixdim"][:4]
    else:
        header.set_xyzt_units("mm")
        header.set_zooms((*spacing_of(affine), *[1.0] * (data.ndim - 3)))
        header.set_sform(affine, 1)
        axes = affine[:3, :3] / spacing_of(affine)
        # a quaternion holds no shear: better none than one that contradicts the affine
        if np.abs(axes.T @ axes - np.eye(3)).max() < 1e-4:
            header.set_qform(affine, 1)
    return kind(data, None, header).to_bytes()


def _write_itk(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    import SimpleITK as sitk

    # (channels, i, j, k) to ITK's (k, j, i, channels), (i, j, k) to (k, j, i)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T), isVector=array.ndim == 4)
    lps = LPS @ affine
    spacing = np.array(spacing_of(lps))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    sitk.WriteImage(image, str(path), useCompression=True)
