"""The archive of the 2018 Atrial Segmentation Challenge: NRRD files in LPS as SimpleITK writes them."""

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

SPACING = (0.625, 0.625, 0.625)
BROKEN = ("no image", "no label", "shape", "affine", "4D", "NaN", "constant", "truncated", "no scan", "value", "empty")


def build(
    folder: Path, ids: Sequence[str], shape: tuple[int, int, int] = (24, 24, 16), broken: str | None = None,
    seed: int = 0, orientation: str = "LPS", spacing: tuple[float, float, float] = SPACING,
    part: str = "Training Set",
) -> Path:
    """Write <folder>/<part>/<ID>/lgemri.nrrd and laendo.nrrd, and return the folder; shape and spacing along x, y, z.

    The first case is wrong in the way that `broken` names. Another `orientation` writes the same anatomy at the same
    mm with its axes in that order.
    """
    assert broken in (None, *BROKEN)
    for number, case in enumerate(ids):
        image, label = anatomy(case, shape, seed)
        place = Path(folder) / part / case
        place.mkdir(parents=True)
        _write(place, image, label, broken if number == 0 else None, orientation, spacing)
    return Path(folder)


def anatomy(case: str, shape: tuple[int, int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Image and label (x, y, z) uint8: a bright atrium (255) before a darker vessel in a body; air is 0."""
    rng = np.random.default_rng([seed, zlib.crc32(case.encode())])
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    body = (x / 0.85) ** 2 + (y / 0.75) ** 2 < 1
    center, radii = rng.uniform(-0.15, 0.15, 3), rng.uniform(0.3, 0.4, 3)
    away = sum(((axis - middle) / radius) ** 2 for axis, middle, radius in zip((x, y, z), center, radii, strict=True))
    vessel = (x - center[0] - 0.3) ** 2 + (y - center[1] - 0.45) ** 2 < 0.02
    levels = np.select([away < 1, vessel, body], [180, 140, 60], 0)
    image = np.where(body, levels + rng.normal(0, 8, shape), rng.integers(0, 3, shape)).clip(0, 255).astype(np.uint8)
    return image, np.where(away < 1, 255, 0).astype(np.uint8)


def _write(place: Path, image: np.ndarray, label: np.ndarray, broken: str | None, orientation: str, spacing) -> None:
    origin = (0.0, 0.0, 0.0)
    if broken == "shape":
        label = label[:, :, :-1]
    elif broken == "4D":
        image = np.stack([image, image[::-1]])
    elif broken == "NaN":
        image = image.astype(np.float32)
        image[1, 2, 3] = np.nan
    elif broken == "constant":
        image = np.full_like(image, 7)
    elif broken == "value":
        label[1, 2, 3] = 100
    elif broken == "empty":
        label[:] = 0
    if broken != "no image":
        _save(place / "lgemri.nrrd", image, origin, orientation, spacing)
    if broken != "no label":
        _save(place / "laendo.nrrd", label, (5.0, 0.0, 0.0) if broken == "affine" else origin, orientation, spacing)
    if broken == "truncated":
        content = (place / "lgemri.nrrd").read_bytes()
        (place / "lgemri.nrrd").write_bytes(content[: len(content) // 2])
    elif broken == "no scan":
        (place / "lgemri.nrrd").write_text("<html>log in first</html>\n")


def _save(path: Path, array: np.ndarray, origin, orientation: str, spacing) -> None:
    """An array (x, y, z), or (channels, x, y, z) as a vector image."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T), isVector=array.ndim == 4)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    sitk.WriteImage(sitk.DICOMOrient(image, orientation), str(path), useCompression=True)
