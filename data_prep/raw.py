"""Cases of an archive as downloaded: which files make up a case, and their scans checked against each other."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.recipes import Recipe
from data_prep.scans import Scan, read_scan, same_grid
from data_prep.spec import DataError
from data_prep.volumes import read_image, read_label

DATA_FILE = {".mhd": ("elementdatafile", "="), ".nhdr": ("data file", ":")}  # the header line that names the voxels
PACKED = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")


@dataclass(frozen=True)
class RawCase:
    """Files of a case and what their values mean.

    `images` are one file (or DICOM folder) per channel; `label` is None for a case without one; `values` maps label
    values of the file to classes, {} where they are the classes already; `patient` and `group` (pathology, grade) are
    what folds go by; `volume` picks one volume of a 4D image, `channels` says how many of them are the channels of the
    scan; `may_be_empty` says that a label without foreground is no mistake; `align` puts a label on the grid of the
    image where an archive is known for headers that do not agree; `problem` is one line on what is wrong with the case,
    where that shows before a file is opened, and `note` one on what the user should know of a sound case.
    """

    id: str
    images: tuple[Path, ...] = ()
    label: Path | None = None
    values: Mapping[int, int] = field(default_factory=dict)
    patient: str = ""
    group: str = ""
    volume: int | None = None
    channels: int | None = None
    may_be_empty: bool = False
    align: Callable[[Scan, Scan], Scan] | None = None
    problem: str = ""
    note: str = ""

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the case, those of DICOM folders and voxels beside a header one by one, in a fixed order."""
        places = (*self.images, *((self.label,) if self.label else ()))
        return tuple(dict.fromkeys(file for place in places for file in _files(place)))

    def read(self, classes: int = 256) -> tuple[Scan, Scan | None]:
        """The image (channels, i, j, k) of the stored type and the label (i, j, k) uint8 with classes, on one grid.

        Raises DataError for `problem`, for what `read_scan` refuses (missing, damaged, NaN, constant, 4D files), for
        channels or a label on another grid, for label values that are no class, and for a label without foreground.
        """
        if self.problem:
            raise DataError(self.problem)
        for path in self.files:
            check_name(path)
        parts = [self._channel(path) for path in self.images]
        image = parts[0]
        for other in parts[1:]:
            same_grid(image, other, "channel")
        voxels = np.concatenate([part.voxels for part in parts])
        image = Scan(voxels, image.affine, image.path, image.header)
        if self.label is None:
            return image, None
        label = read_scan(self.label, contrast=False)
        if self.align:
            label = self.align(image, label)
        same_grid(image, label, "label")
        labels = _classes(label.voxels, self.values, classes, self.label, self.may_be_empty)
        return image, Scan(labels, label.affine, label.path, label.header)

    def _channel(self, path: Path) -> Scan:
        """One image, (channels, i, j, k)."""
        if self.volume is None and self.channels is None:
            scan = read_scan(path)
            return Scan(scan.voxels[None], scan.affine, path, scan.header)
        scan = read_scan(path, channels=True)
        count = len(scan.voxels)
        if self.channels not in (None, count):
            raise DataError(f"{path}: {count} volumes, expected {self.channels}, one per channel")
        if self.volume is None:
            return scan
        if not 0 <= self.volume < count:
            raise DataError(f"{path}: {count} volumes, expected at least {self.volume + 1}")
        return Scan(scan.voxels[[self.volume]], scan.affine, path, scan.header)


@dataclass(frozen=True)
class H5Case:
    """A case in the field's own h5 files (`image`, `label`), which tell nothing of the scanner's grid.

    `files` are one volume or, several, its 2D slices in order, one on the other along a new first axis; `axes` are the
    axes of the file (channels not counted) that are x, y and z; `spacing` is in mm along x, y, z; the rest is as in
    `RawCase`.
    """

    id: str
    files: tuple[Path, ...] = ()
    axes: tuple[int, int, int] = (0, 1, 2)
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    values: Mapping[int, int] = field(default_factory=dict)
    patient: str = ""
    group: str = ""
    may_be_empty: bool = False
    problem: str = ""
    note: str = ""

    def read(self, classes: int = 256) -> tuple[Scan, Scan | None]:
        """Image (channels, x, y, z) float32 and label (x, y, z) uint8 with classes, on a grid at the origin.

        x, y and z of the published arrays run as in the archives' own files: to the left, the back and the head.

        Raises DataError for `problem`, for what `read_image` and `read_label` refuse, and like `RawCase.read`.
        """
        if self.problem:
            raise DataError(self.problem)
        path, dims = self.files[0], 2 if len(self.files) > 1 else 3
        images = [read_image(file, dims) for file in self.files]
        labels = [read_label(file, 256, dims) for file in self.files]
        for file, part in zip(self.files, images, strict=True):
            if part.shape != images[0].shape:
                raise DataError(f"{file}: 'image' has shape {part.shape}, expected {images[0].shape} as {path.name}")
        image, label = (images[0], labels[0]) if dims == 3 else (np.stack(images, axis=1), np.stack(labels))
        image = np.ascontiguousarray(image.transpose(0, *(1 + axis for axis in self.axes)))
        label = np.ascontiguousarray(label.transpose(self.axes))
        affine = np.diag([-self.spacing[0], -self.spacing[1], self.spacing[2], 1.0])
        label = _classes(label, self.values, classes, path, self.may_be_empty)
        return Scan(image, affine, path), Scan(label, affine, path)


@dataclass(frozen=True)
class Archive:
    """All that preparing a data set takes, for the built-in ones and for own data alike.

    `source` is "raw" or "h5"; `spacing_known` says whether the mm of the cases are those of the scanner; `recipe` is
    done to the cases, and `replay` to a new scan before prediction (the same, except for h5 files, which were prepared
    by others); `folds` are those that came with own data (`splits_final.json`), else None.
    """

    name: str
    title: str
    modality: str
    modalities: tuple[str, ...]
    classes: tuple[str, ...]
    regions: Mapping[str, tuple[int, ...]]
    citation: str
    source: str
    spacing_known: bool
    cases: tuple[RawCase | H5Case, ...]
    recipe: Recipe
    replay: Recipe
    folds: list[dict] | None = None


def check_name(path: Path) -> None:
    """Raises DataError for a name that is not UTF-8, at which SimpleITK ends the process."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise DataError(f"{str(path)!r}: the name is not UTF-8, expected one that is: rename it") from None


def below(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and all below it, each with the names of its files, in a fixed order.

    Links are followed, every folder once. What is hidden or macOS's does not count, nor does a data set that was
    prepared into the archive, whose h5 files may have the names of the published ones. Raises DataError for a folder
    that cannot be read.
    """
    def unreadable(error: OSError):
        if os.path.isdir(error.filename):
            raise DataError(f"{error.filename}: cannot be read ({error.strerror}), expected a folder of the archive")

    seen = set()
    for folder, folders, names in os.walk(root, onerror=unreadable, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen or "cases" in folders and "manifest.json" in names:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__MACOSX")
        yield Path(folder), sorted(name for name in names if name[0] != ".")


def wrong_folder(root: Path, expected: str) -> DataError:
    """The error to raise where a folder is not the archive: what is there, and what was expected."""
    if not root.is_dir():
        return DataError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}, expected {expected}")
    inside = sorted(entry.name + "/" * entry.is_dir() for entry in root.iterdir())
    found = ", ".join(inside[:4]) + (f" and {len(inside) - 4} more" if len(inside) > 4 else "")
    advice = " (unpack what is packed first)" if any(name.lower().endswith(PACKED) for name in inside) else ""
    return DataError(f"{root}: found {found or 'nothing'}, expected {expected}{advice}")


def _files(place: Path) -> Sequence[Path]:
    if place.is_dir():
        return sorted(path for path in place.rglob("*") if path.is_file())
    key, sign = DATA_FILE.get(place.suffix.lower(), ("", ""))
    if key and place.is_file():
        for line in place.read_bytes()[:65536].decode("latin-1").splitlines():
            name, _, value = line.partition(sign)
            beside = place.parent / value.strip()
            if name.strip().lower() == key and beside.is_file():
                return [place, beside]
    return [place]


def _classes(
    label: np.ndarray, values: Mapping[int, int], classes: int, path: Path, may_be_empty: bool
) -> np.ndarray:
    """Label values of a file to classes, uint8. Raises DataError for another value and for no foreground."""
    allowed = list(values) or range(classes)
    highest = max(int(label.max()), 0)  # no pass over the label for each of 256 classes that are not there
    values = values or {value: value for value in allowed if value <= highest}
    result = np.zeros(label.shape, np.uint8)
    known = 0
    for value, number in values.items():
        here = label == value
        known += np.count_nonzero(here)
        if number:
            result[here] = number
    if known < label.size:
        wrong = np.unique(label[~np.isin(label, list(allowed))]).tolist()
        listed = ", ".join(f"{value:g}" for value in wrong[:4]) + (", ..." if len(wrong) > 4 else "")
        expected = " or ".join(map(str, allowed)) if len(allowed) < 5 else f"{min(allowed)} to {max(allowed)}"
        raise DataError(f"{path}: label has the value{'s' * (len(wrong) > 1)} {listed}, expected {expected}")
    if not may_be_empty and not result.any():
        raise DataError(f"{path}: label is background everywhere, expected foreground")
    return result
