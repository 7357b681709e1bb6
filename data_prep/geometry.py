"""The lossless way of a scan from the scanner's grid to the store and back: axes in order, crop, resampling."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.scans import Scan, check_affine, check_grid, orientation_of, spacing_of
from data_prep.spec import DataError


@dataclass(frozen=True)
class Geometry:
    """How a scan goes to the store: axes permuted and flipped, then cropped, then resampled; plain numbers only.

    `shape` and `affine` are the scanner's. Axis n of the store is axis `axes[n]` of the scanner, reversed where
    `flips[n]`; `crop` is (start, stop) per axis of that order, in voxels; `stored` is the shape after resampling, which
    keeps the outer faces of the box where they are (equal to the crop's size: nothing is resampled).
    """

    shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    crop: tuple[tuple[int, int], ...]
    stored: tuple[int, int, int]

    @classmethod
    def of(
        cls,
        scan: Scan,
        crop: Sequence[tuple[int, int]] | None = None,
        spacing: Sequence[float | None] | None = None,
        orientation: str | None = "RAS",
    ) -> "Geometry":
        """The geometry of a scan stored in an axis order (None: the scanner's own), cropped and resampled.

        `crop` and `spacing` (mm, None keeps an axis) count along the axes of the store; the shape is rounded to whole
        voxels, so that `stored_spacing` meets `spacing` only nearly. Oblique scans take the nearest axes and are never
        rotated. Raises DataError for a box beyond the scan, and for a spacing that is not positive or leaves no voxel.
        """
        axes, flips = _axes(scan.affine, orientation, scan.path)
        full = [scan.space[axis] for axis in axes]
        crop = [(0, n) for n in full] if crop is None else crop
        box = tuple((int(start), int(stop)) for start, stop in crop)
        if len(box) != 3 or not all(0 <= start < stop <= n for (start, stop), n in zip(box, full, strict=True)):
            raise DataError(f"{scan.path}: crop {box}, expected 3 boxes with at least a voxel inside {tuple(full)}")
        sizes = [stop - start for start, stop in box]
        if spacing is not None:
            if len(spacing) != 3 or not all(mm is None or 0 < mm < np.inf for mm in spacing):
                raise DataError(f"{scan.path}: spacing {tuple(spacing)}, expected 3 numbers above 0 mm")
            old = [scan.spacing[axis] for axis in axes]
            sizes = [n if mm is None else max(1, int(np.floor(n * was / mm + 0.5)))
                     for n, was, mm in zip(sizes, old, spacing, strict=True)]
        affine = tuple(tuple(float(value) for value in row) for row in scan.affine)
        return cls(tuple(int(n) for n in scan.space), affine, axes, flips, box, tuple(sizes))

    @property
    def cropped(self) -> tuple[int, ...]:
        """Voxels of the crop box along the axes of the store, before resampling."""
        return tuple(stop - start for start, stop in self.crop)

    @property
    def resampled(self) -> bool:
        """Whether voxels of the store are interpolated."""
        return self.stored != self.cropped

    @property
    def stored_affine(self) -> np.ndarray:
        """(4, 4) from voxel index of the stored array to RAS+ mm."""
        to_scanner = np.zeros((4, 4))
        to_scanner[3, 3] = 1
        for n, (axis, flip, box) in enumerate(zip(self.axes, self.flips, self.crop, strict=True)):
            first, step = _centers(box, self.stored[n])
            to_scanner[axis, n] = -step if flip else step
            to_scanner[axis, 3] = self.shape[axis] - 1 - first if flip else first
        return np.array(self.affine) @ to_scanner

    @property
    def stored_spacing(self) -> tuple[float, float, float]:
        """Distance of neighboring voxels of the stored array in mm."""
        return spacing_of(self.stored_affine)

    @property
    def orientation(self) -> str:
        """Where the axes of the stored array point to, "RAS" unless asked otherwise."""
        return orientation_of(self.stored_affine)

    def to_dict(self) -> dict[str, Any]:
        """Lists, numbers and truth values, which JSON keeps exactly."""
        return {"shape": list(self.shape), "affine": [list(row) for row in self.affine], "axes": list(self.axes),
                "flips": list(self.flips), "crop": [list(box) for box in self.crop], "stored": list(self.stored)}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> "Geometry":
        """What `to_dict` gave. Raises DataError for a missing or impossible entry."""
        try:
            found = cls(
                shape=tuple(int(n) for n in entry["shape"]),
                affine=tuple(tuple(float(value) for value in row) for row in entry["affine"]),
                axes=tuple(int(n) for n in entry["axes"]),
                flips=tuple(bool(flip) for flip in entry["flips"]),
                crop=tuple((int(start), int(stop)) for start, stop in entry["crop"]),
                stored=tuple(int(n) for n in entry["stored"]),
            )
            affine = np.array(found.affine)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"geometry: {type(error).__name__} {error}, expected what Geometry.to_dict gives") from None
        check_affine(affine, "geometry")
        sound = sorted(found.axes) == [0, 1, 2] and len(found.shape) == len(found.flips) == len(found.crop) == 3
        sound = sound and len(found.stored) == 3 and min(found.stored) > 0 and all(
            0 <= start < stop <= found.shape[axis] for (start, stop), axis in zip(found.crop, found.axes, strict=True))
        if not sound:
            raise DataError(f"geometry: {found.to_dict()} fits no scan, expected what Geometry.to_dict gives")
        return found


def to_store(scan: Scan, geometry: Geometry, order: int) -> np.ndarray:
    """The voxels of a scan as stored, (*stored) or (channels, *stored); the scan must lie on the geometry's grid.

    `order` is 0 for labels (nearest, type kept), 1 (linear) to 5 for images: splines as in scipy, in float32 (float64
    stays) where something is resampled, and the type as it was where nothing is. They run through the whole scan, so
    that a crop makes no edge; beyond the scan its edge goes on. Detail finer than the new spacing is not smoothed away
    before. Raises DataError for a scan on another grid.
    """
    check_grid(geometry.shape, np.array(geometry.affine), scan, "scan", "those of the geometry")
    array = _in_store_order(scan.voxels, geometry)
    return np.ascontiguousarray(_resample(array, geometry.crop, geometry.stored, order))


def to_scanner(
    array: np.ndarray, geometry: Geometry, order: int = 0, outside: float | Sequence[float] = 0
) -> np.ndarray:
    """A stored array, (*stored) or (channels, *stored), on the scanner's own grid, (*shape) or (channels, *shape).

    Bit-exact where nothing was resampled; else order 0 is nearest (labels), 1 linear (probabilities), types as in
    `to_store`. Outside the crop box is `outside`, a number or one per channel. Raises ValueError for another shape.
    """
    array = np.asarray(array)
    if array.ndim not in (3, 4) or array.shape[-3:] != geometry.stored:
        raise ValueError(f"an array of shape {array.shape}, expected the stored shape {geometry.stored}")
    inside = _resample(array, _whole(geometry), geometry.cropped, order)
    lead = array.shape[:-3]
    result = np.empty(lead + geometry.shape, inside.dtype)
    result[...] = np.reshape(outside, lead + (1, 1, 1)) if np.ndim(outside) else outside
    # writing through the view undoes permutation and flips without a second formula for it
    _in_store_order(result, geometry)[_crop(geometry)] = inside
    return result


def labels_to_scanner(probabilities: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The most probable class on the scanner's own grid: (classes, *stored) to (*shape) uint8, 0 outside the crop box.

    Probabilities are resampled linearly before the choice, and a tie goes to the lower class. Raises ValueError for
    another shape or more than 256 classes.
    """
    if probabilities.ndim != 4 or probabilities.shape[1:] != geometry.stored or not 1 <= len(probabilities) <= 256:
        raise ValueError(f"probabilities of shape {probabilities.shape}, expected 1 to 256 x {geometry.stored}")
    result = np.zeros(geometry.shape, np.uint8)
    labels = _in_store_order(result, geometry)[_crop(geometry)]
    # one class at a time: all of them on the grid of a CT would not fit into a small machine
    best = np.array(_resample(probabilities[0], _whole(geometry), geometry.cropped, 1))
    for value in range(1, len(probabilities)):
        score = _resample(probabilities[value], _whole(geometry), geometry.cropped, 1)
        better = score > best
        np.copyto(labels, value, where=better)
        np.copyto(best, score, where=better)
        del score, better  # before the next ones are made
    return result


def _axes(affine: np.ndarray, orientation: str | None, path: Path) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """For each axis of the store the scanner's axis and whether it runs the other way."""
    import nibabel as nib

    if orientation is None:
        return (0, 1, 2), (False, False, False)
    if len(orientation) != 3 or any(sum(code in pair for code in orientation) != 1 for pair in ("RL", "AP", "SI")):
        raise DataError(f"{path}: orientation {orientation!r}, expected three letters such as RAS or LPS")
    change = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(orientation))
    # row a of `change` says to which axis of the store axis a of the scanner goes
    axes = tuple(int(a) for a in np.argsort(change[:, 0]))
    return axes, tuple(bool(change[axis, 1] < 0) for axis in axes)


def _in_store_order(array: np.ndarray, geometry: Geometry) -> np.ndarray:
    """View of (..., *scanner) with the axes of the store."""
    lead = array.ndim - 3
    view = array.transpose(*range(lead), *(lead + axis for axis in geometry.axes))
    return view[(..., *(slice(None, None, -1 if flip else 1) for flip in geometry.flips))]


def _crop(geometry: Geometry) -> tuple:
    return (..., *(slice(start, stop) for start, stop in geometry.crop))


def _whole(geometry: Geometry) -> tuple[tuple[int, int], ...]:
    return tuple((0, n) for n in geometry.stored)


def _centers(box: tuple[int, int], new: int) -> tuple[float, float]:
    """Center of the first and distance of the `new` voxels between two faces, in the voxels that the faces count."""
    step = (box[1] - box[0]) / new
    return box[0] + 0.5 * step - 0.5, step  # the faces coincide, so the centers do not


def _resample(
    array: np.ndarray, box: Sequence[tuple[int, int]], shape: tuple[int, ...], order: int
) -> np.ndarray:
    """The part `box` of (..., *space), (start, stop) per axis, to (..., *shape), faces on faces.

    The whole array counts, also for what is close to the faces of the box.
    """
    sizes = tuple(stop - start for start, stop in box)
    parts = [slice(*faces) for faces in box]
    if order == 0 or sizes == shape:
        return _nearest(array[(..., *parts)], shape)
    kind = array.dtype if array.dtype in (np.float32, np.float64) else np.dtype(np.float32)
    weights = {}
    for axis, (size, new) in enumerate(zip(sizes, shape, strict=True), start=-3):
        if size != new:
            weights[axis], parts[axis] = _weights(array.shape[axis], box[axis], new, order, kind)
    array = array[(..., *parts)]
    for axis in sorted(weights, key=lambda axis: shape[axis] / array.shape[axis]):  # what shrinks most comes first
        array = _along(array, axis, weights[axis], kind)
    return array


def _nearest(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    for axis, new in enumerate(shape, start=-3):
        if (old := array.shape[axis]) != new:
            # floor((i + 0.5) * old / new) in integers: no rounding, any type
            array = np.take(array, (2 * np.arange(new) + 1) * old // (2 * new), axis=axis)
    return array


def _weights(size: int, box: tuple[int, int], new: int, order: int, kind: np.dtype) -> tuple[Any, slice]:
    """What the voxels along an axis of `size` weigh in the `new` ones between two faces; resampling is linear.

    A sparse matrix (new, voxels that count), and the slice of these. Its columns are scipy's answers to a single 1
    among zeros; they decay so fast that what is left out stays far below the rounding of `kind`.
    """
    from scipy import ndimage, sparse

    first, step = _centers(box, new)
    table = np.empty((new, size))
    for unit, column in zip(np.eye(size), table.T, strict=True):
        column[:] = ndimage.affine_transform(unit, [step], first, (new,), order=order, mode="nearest")
    table[np.abs(table) < np.finfo(kind).eps / 64] = 0
    used = np.flatnonzero(table.any(axis=0))
    span = slice(int(used[0]), int(used[-1]) + 1)
    return sparse.csr_array(table[:, span]), span


def _along(array: np.ndarray, axis: int, weights: Any, kind: np.dtype) -> np.ndarray:
    """(..., voxels, ...) to (..., new, ...), summed in float64 and rounded once."""
    shape = list(array.shape)
    shape[axis] = weights.shape[0]
    result = np.empty(shape, kind)
    source, target = np.moveaxis(array, axis, 0), np.moveaxis(result, axis, 0)
    # a plane at a time: no volume in float64, and what is summed stays in the cache
    for index in np.ndindex(source.shape[1:-1]):
        target[:, *index] = weights @ source[:, *index].astype(np.float64)
    return result
