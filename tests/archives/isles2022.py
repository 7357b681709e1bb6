"""The archive of ISLES-2022: a BIDS folder of NIfTI files as nibabel writes them, FLAIR on a grid of its own."""

import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

SPACING = (2.0, 2.0, 2.0)
UNITS = (1.0, 1e-3, 1e-6)  # ADC maps come in 1e-6 mm2/s, 1e-3 mm2/s and mm2/s
BROKEN = ("no dwi", "no adc", "no mask", "adc grid", "shape", "affine", "4D", "NaN", "constant", "truncated", "no scan",
          "value")


def affine(spacing: Sequence[float] = SPACING) -> np.ndarray:
    """To the left, to the front, to the head, a little oblique, as brains are scanned."""
    angle = np.radians(8)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    result = np.eye(4)
    result[:3, :3] = turn @ np.diag([-spacing[0], spacing[1], spacing[2]])
    result[:3, 3] = 45.0, -52.0, -30.5
    return result


def build(
    folder: Path, ids: Sequence[str], shape: tuple[int, int, int] = (44, 52, 36),
    spacing: tuple[float, float, float] = SPACING, empty: Collection[str] = (), rawdata: bool = False,
    broken: Mapping[str, str] | None = None,
) -> Path:
    """Write <folder>/ISLES-2022/<id>/ses-0001/{dwi,anat} and derivatives, and return the folder.

    Cases of `empty` have no lesion; with `rawdata` the images lie in rawdata without dwi and anat, as in the first
    release; `broken` says what is wrong with single cases, one of `BROKEN`.
    """
    top = Path(folder) / "ISLES-2022"
    for number, case in enumerate(ids):
        wrong = (broken or {}).get(case, "")
        session = (top / "rawdata" if rawdata else top) / case / "ses-0001"
        dwi, anat = (session, session) if rawdata else (session / "dwi", session / "anat")
        masks = top / "derivatives" / case / "ses-0001"
        for place in (dwi, anat, masks):
            place.mkdir(parents=True, exist_ok=True)
        name, grid = f"{case}_ses-0001", affine(spacing)
        diffusion, adc, mask = brain(case, shape, case not in empty)
        if wrong != "no adc":
            moved = affine((2.2, 2.2, 2.2)) if wrong == "adc grid" else grid
            _save(dwi / f"{name}_adc.nii.gz", (adc * UNITS[number % 3]).astype(np.float32), moved)
        if wrong != "no dwi":
            _save(dwi / f"{name}_dwi.nii.gz", _spoiled(diffusion, wrong), grid)
            (dwi / f"{name}_dwi.json").write_text(json.dumps({"Manufacturer": "none", "EchoTime": 0.08}))
        if wrong != "no mask":
            mask = mask[:-1] if wrong == "shape" else mask * 3 if wrong == "value" else mask
            _save(masks / f"{name}_msk.nii.gz", mask, affine((2, 2, 2.4)) if wrong == "affine" else grid)
        _save(anat / f"{name}_{'flair' if rawdata else 'FLAIR'}.nii.gz", _flair(case), affine((0.9, 0.9, 5.0)))
        if wrong == "truncated":
            path = dwi / f"{name}_dwi.nii.gz"
            path.write_bytes(path.read_bytes()[:-500])
        elif wrong == "no scan":
            (dwi / f"{name}_dwi.nii.gz").write_text("not a scan\n")
    (top / "dataset_description.json").write_text(json.dumps({"Name": "ISLES-2022", "BIDSVersion": "1.6.0"}))
    return Path(folder)


def brain(case: str, shape: Sequence[int], stroke: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """DWI and ADC (1e-6 mm2/s) float32 and mask uint8, (x, y, z): water is dark in DWI, a fresh lesion bright there and
    dark in ADC."""
    rng = np.random.default_rng(zlib.crc32(case.encode()))
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    inside = (x / 0.8) ** 2 + (y / 0.85) ** 2 + (z / 0.9) ** 2 < 1
    water = ((np.abs(x) - 0.15) / 0.1) ** 2 + (y / 0.35) ** 2 + (z / 0.3) ** 2 < 1
    side, place = rng.choice([-1, 1]), rng.uniform(-0.2, 0.2, 2)
    lesion = ((x - side * 0.45) / 0.2) ** 2 + ((y - place[0]) / 0.25) ** 2 + ((z - place[1]) / 0.3) ** 2 < 1
    lesion &= inside & ~water & stroke
    noise = rng.normal(1, 0.05, (2, *shape))
    diffusion = np.select([lesion, water, inside], [380, 60, 160], 0) * noise[0]
    adc = np.select([lesion, water, inside], [450, 2800, 800], 0) * noise[1]
    return diffusion.astype(np.float32), adc.astype(np.float32), lesion.astype(np.uint8)


def _flair(case: str) -> np.ndarray:
    return (brain(case, (60, 64, 12))[0] * 2).astype(np.int16)


def _spoiled(image: np.ndarray, wrong: str) -> np.ndarray:
    if wrong == "4D":
        return np.stack([image, image + 1], axis=3)
    if wrong == "NaN":
        return np.where(image == image.max(), np.float32(np.nan), image)
    return np.full_like(image, 7) if wrong == "constant" else image


def _save(path: Path, voxels: np.ndarray, grid: np.ndarray) -> None:
    nib.save(nib.Nifti1Image(voxels, grid), path)
