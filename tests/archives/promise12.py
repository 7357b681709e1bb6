"""The archive of PROMISE12: MetaImage headers with their voxels in a file beside, as SimpleITK writes them."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

SPACING = (1.25, 1.25, 3.6)
BROKEN = ("no image", "no label", "no raw", "shape", "affine", "4D", "NaN", "constant", "truncated", "no scan", "value",
          "empty")


def build(
    folder: Path, ids: Sequence[str], shape: tuple[int, int, int] = (48, 44, 8),
    spacing: tuple[float, float, float] = SPACING, tilt: float = 0.0, parts: bool = True, test_data: bool = False,
    broken: Mapping[str, str] | None = None,
) -> Path:
    """Write Case00.mhd/.raw and Case00_segmentation.mhd/.raw for the ids, and return the folder.

    They lie in TrainingData_Part1 to 3, or without `parts` in training_data as in the later release; `test_data` adds
    the challenge's Case00 under test, another scan of the same name. `tilt` turns the planes about x, in degrees;
    `broken` says what is wrong with single cases, one of `BROKEN`.
    """
    for case in ids:
        number = int(case.removeprefix("Case"))
        place = Path(folder) / (f"TrainingData_Part{1 + number // 17}" if parts else "training_data")
        image, label = pelvis(case, shape)
        _write(place, case, image, label, spacing, tilt, (broken or {}).get(case, ""))
    if test_data:
        image, label = pelvis("test", shape)
        _write(Path(folder) / "test_data", "Case00", image, label, spacing, tilt, "")
    return Path(folder)


def pelvis(case: str, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Image int16 and label int8, (x, y, z): a gland with a dark capsule between bladder and muscles, fat around."""
    rng = np.random.default_rng(zlib.crc32(case.encode()))
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    middle, radii = rng.uniform(-0.1, 0.1, 3), rng.uniform((0.3, 0.25, 0.55), (0.4, 0.35, 0.7))
    away = sum(((axis - m) / r) ** 2 for axis, m, r in zip((x, y, z), middle, radii, strict=True))
    bladder = ((x / 0.35) ** 2 + ((y + 0.6) / 0.25) ** 2 + ((z - 0.7) / 0.5) ** 2) < 1
    muscles = np.broadcast_to((np.abs(x) > 0.55) & (np.abs(y) < 0.6), shape)
    level = np.select([away < 0.4, away < 1, away < 1.25, bladder, muscles], [260, 330, 90, 480, 110], 400)
    image = level + rng.normal(0, 15, shape) + 60 * y  # the coil is behind
    return image.clip(0, None).astype(np.int16), (away < 1).astype(np.int8)


def _write(place: Path, case: str, image: np.ndarray, label: np.ndarray, spacing, tilt: float, wrong: str) -> None:
    place.mkdir(parents=True, exist_ok=True)
    if wrong == "shape":
        label = label[:, :, :-1]
    elif wrong == "4D":
        image = np.stack([image, image + 1], axis=3)
    elif wrong == "NaN":
        image = np.where(label > 0, np.nan, image.astype(np.float32))
    elif wrong == "constant":
        image = np.full_like(image, 5)
    elif wrong == "value":
        label = label * 2
    elif wrong == "empty":
        label = np.zeros_like(label)
    if wrong != "no image":
        _save(place / f"{case}.mhd", image, spacing, tilt)
    if wrong != "no label":
        _save(place / f"{case}_segmentation.mhd", label, spacing, tilt + 5 * (wrong == "affine"))
    raw = place / f"{case}.raw"
    if wrong == "no raw":
        raw.unlink()
    elif wrong == "truncated":
        raw.write_bytes(raw.read_bytes()[:-1000])
    elif wrong == "no scan":
        (place / f"{case}.mhd").write_text("not a header\n")


def _save(path: Path, voxels: np.ndarray, spacing: Sequence[float], tilt: float) -> None:
    """ITK's array is (z, y, x), with two values for a fourth axis."""
    image = sitk.GetImageFromArray(voxels.transpose(2, 1, 0, *range(3, voxels.ndim)), isVector=voxels.ndim == 4)
    image.SetSpacing(spacing)
    image.SetOrigin((-30.5, -25.25, 12.0))
    cosine, sine = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
    image.SetDirection((1, 0, 0, 0, cosine, -sine, 0, sine, cosine))
    sitk.WriteImage(image, str(path))
