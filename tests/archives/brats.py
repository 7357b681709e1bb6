"""The archive of BraTS in small: brains without skull and a tumor of three parts, as nibabel writes the real ones."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from data_prep.make_splits import is_lgg

ENDINGS = {"FLAIR": ("_flair", "-t2f"), "T1": ("_t1", "-t1n"), "T1ce": ("_t1ce", "-t1c"), "T2": ("_t2", "-t2w"),
           "label": ("_seg", "-seg")}
# intensity of brain, necrotic core, edema and enhancing tumor
LEVELS = {"FLAIR": (180, 230, 420, 350), "T1": (400, 250, 330, 300), "T1ce": (420, 260, 350, 700),
          "T2": (200, 450, 480, 380)}
BROKEN = (*(f"no {name}" for name in ENDINGS), "truncated", "text", "nan", "constant", "shape", "affine",
          "image affine", "values", "empty", "4D")


def affine(shape: Sequence[int]) -> np.ndarray:
    """1 mm, to the left and to the back, from the last voxel of j on: the real ones start at 239 of 240."""
    result = np.diag([-1.0, -1.0, 1.0, 1.0])
    result[1, 3] = shape[1] - 1
    return result


def brain(case: str, shape: Sequence[int]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The modalities, int16 and 0 outside the brain, and the label: 1 necrotic core, 2 edema, 4 enhancing tumor.

    Some tumors of low grade do not enhance.
    """
    rng = np.random.default_rng(zlib.crc32(case.encode()))
    points = np.stack(np.meshgrid(*((np.arange(n) + 0.5) / n * 2 - 1 for n in shape), indexing="ij"))
    inside = sum((points[a] / r) ** 2 for a, r in enumerate(rng.uniform(0.75, 0.9, 3))) < 1
    center = rng.uniform(0.15, 0.35, 3) * rng.choice([-1, 1], 3)
    wobble = 1 + 0.15 * np.sin(3 * points[0] + 5 * points[1] - 4 * points[2] + rng.uniform(0, 6))
    radius = np.sqrt(sum((points[a] - center[a]) ** 2 for a in range(3))) * wobble / rng.uniform(0.9, 1.2)
    label = np.zeros(shape, np.uint8)
    label[radius < 0.45] = 2
    label[radius < 0.3] = 1 if is_lgg(case) and rng.random() < 0.3 else 4
    label[radius < 0.18] = 1
    label[~inside] = 0
    part = np.where(label == 4, 3, label)
    images = {}
    for name, levels in LEVELS.items():
        image = np.array(levels)[part] + rng.normal(0, 20, shape)
        images[name] = np.where(inside, np.maximum(image, 1), 0).astype(np.int16)
    return images, label


def build(
    folder: Path,
    ids: Sequence[str],
    shape: Sequence[int] = (24, 24, 24),
    layout: str = "2019",
    broken: Mapping[str, str] | None = None,
    labels: bool = True,
    suffix: str = ".nii.gz",
    below: str = "MICCAI_BraTS_2019_Data_Training",
) -> Path:
    """Writes cases below a folder and returns it: "2019" in HGG and LGG, "2021" flat, "2023" flat with other names.

    `broken` says by case what is wrong with it, one of `BROKEN`: in T2 where it is an image, else in the label.
    """
    for case in ids:
        wrong = (broken or {}).get(case, "")
        grade = ("LGG" if is_lgg(case) else "HGG") if layout == "2019" else ""
        place = folder / below / grade / case
        place.mkdir(parents=True)
        images, label = brain(case, shape)
        if layout == "2023":
            label = np.where(label == 4, 3, label).astype(np.uint8)
        label = label.astype(np.int16)
        for name, array in {**images, **({"label": label} if labels else {})}.items():
            path = place / (case + ENDINGS[name][layout == "2023"] + suffix)
            if wrong == f"no {name}":
                continue
            _save(path, array, affine(shape), {"T2": f"image {wrong}", "label": f"label {wrong}"}.get(name, ""))
    return folder


def build_h5(folder: Path, ids: Sequence[str], shape: Sequence[int] = (24, 24, 24)) -> Path:
    """FLAIR and the whole tumor of the same cases as SSL4MIS publishes them, slices first; returns the folder."""
    import h5py

    (folder / "data").mkdir(parents=True)
    for case in ids:
        images, label = brain(case, shape)
        image = images["FLAIR"].astype(np.float32).transpose()
        image = (image - image[image > 0].mean()) / image[image > 0].std()
        with h5py.File(folder / "data" / f"{case}.h5", "w") as file:
            file.create_dataset("image", data=image, compression="gzip")
            file.create_dataset("label", data=(label > 0).transpose().astype(np.uint8), compression="gzip")
    return folder


def _save(path: Path, array: np.ndarray, grid: np.ndarray, wrong: str) -> None:
    what, _, wrong = wrong.partition(" ")
    if (what, wrong) == ("image", "text"):
        path.write_text("no scan\n")
        return
    if (what, wrong) == ("image", "constant"):
        array = np.full_like(array, 7)
    if (what, wrong) == ("image", "nan"):
        array = np.where(array == array.max(), np.nan, array.astype(np.float32))
    if (what, wrong) == ("image", "4D"):
        array = np.stack([array, array + 1], axis=3)
    if (what, wrong) == ("label", "shape"):
        array = array[:-1]
    if (what, wrong) == ("label", "values"):
        array = np.where(array == 2, 7, array).astype(np.int16)
    if (what, wrong) == ("label", "empty"):
        array = np.zeros_like(array)
    if (what, wrong) in (("label", "affine"), ("image", "image affine")):
        grid = grid + np.eye(4, k=3) * 5  # 5 mm along x
    image = nib.Nifti1Image(array, grid)
    image.header.set_xyzt_units("mm", "sec")
    image.set_qform(grid, 1)
    image.set_sform(grid, 1)
    nib.save(image, path)
    if (what, wrong) == ("image", "truncated"):
        path.write_bytes(path.read_bytes()[:-200])
