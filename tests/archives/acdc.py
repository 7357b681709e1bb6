"""The archive of ACDC in small: hearts in short axis, one folder per patient, as nibabel writes the real ones."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from data_prep.make_splits import ACDC_GROUPS

SPACING = (1.5625, 1.5625, 10.0)
BROKEN = ("no Info.cfg", "no ES", "no label", "no frame", "three frames", "4D", "truncated", "text", "nan", "constant",
          "shape", "affine", "values", "empty")


def affine(spacing: Sequence[float] = SPACING) -> np.ndarray:
    """To the left, to the back, to the head, from the origin: so are the real ones."""
    return np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])


def heart(patient: str, squeeze: float, shape: Sequence[int], spacing: Sequence[float] = SPACING):
    """Image int16 and label uint8 of a frame, (i, j, k); `squeeze` is 0 in ED, 1 in ES.

    In every plane a left ventricle within its myocardium and a right ventricle at the side of it, smaller to the apex.
    """
    rng = np.random.default_rng(zlib.crc32(patient.encode()))
    field = np.array(shape[:2]) * spacing[:2]
    center = field * rng.uniform(0.47, 0.53, 2)
    scale, angle = field.min() * rng.uniform(0.9, 1.1), rng.uniform(0, 2 * np.pi)
    x, y, z = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij", sparse=True)
    u, v = x * spacing[0] - center[0], y * spacing[1] - center[1]
    base = 1 - 0.5 * z / max(shape[2] - 1, 1)
    inner = scale * 0.12 * base * (1 - 0.25 * squeeze)
    outer = inner + scale * 0.05 * (1 + 0.25 * squeeze)
    left = np.hypot(u, v)
    away = outer + scale * 0.06 * base
    right = np.hypot(u - away * np.cos(angle), v - away * np.sin(angle)) < outer
    label = np.zeros(shape, np.uint8)
    label[np.broadcast_to(right, shape)] = 1
    label[np.broadcast_to(left < outer, shape)] = 2
    label[np.broadcast_to(left < inner, shape)] = 3
    body = (u / (0.45 * field[0])) ** 2 + (v / (0.4 * field[1])) ** 2 < 1
    level = np.array([120, 330, 150, 350])[label] * np.where(body, 1, 0.1)
    return np.clip(level + rng.normal(0, 25, shape), 0, None).astype(np.int16), label


def build(
    folder: Path,
    ids: Sequence[str],
    shape: Sequence[int] = (48, 44, 6),
    spacing: Sequence[float] = SPACING,
    frames: Mapping[str, tuple[int, int]] | None = None,
    four_d: bool = True,
    only_4d: bool = False,
    labels: bool = True,
    broken: Mapping[str, str] | None = None,
    below: str = "database/training",
) -> Path:
    """Writes patients below a folder and returns it; `ids` are patients or their frames, as case lists have them.

    `frames` has (ED, ES) of single patients where it is not (1, 4); with `only_4d` the frames are in the 4D file alone;
    `broken` says by patient what is wrong with it, one of `BROKEN`, in the later frame unless it is the whole patient.
    """
    for patient in dict.fromkeys(name.split("_")[0] for name in ids):
        wrong = (broken or {}).get(patient, "")
        ed, es = (frames or {}).get(patient, (1, 4))
        place = folder / below / patient
        place.mkdir(parents=True)
        group = ACDC_GROUPS[(int(patient[-3:]) - 1) // 20 % len(ACDC_GROUPS)]
        last = max(ed, es)
        info = {"ED": ed, "ES": es, "Group": group, "Height": "184.0", "NbFrame": last, "Weight": "95.0"}
        if wrong == "no ES":
            del info["ES"]
        if wrong != "no Info.cfg":
            (place / "Info.cfg").write_text("".join(f"{key}: {value}\n" for key, value in info.items()))
        scans = {number: heart(patient, number == es, shape, spacing) for number in (ed, es)}
        for number, (image, label) in scans.items():
            name, late = place / f"{patient}_frame{number:02d}", number == last
            if not only_4d and not (late and wrong == "no frame"):
                _image(Path(f"{name}.nii.gz"), image, spacing, wrong if late else "")
            if labels and not (late and wrong == "no label"):
                _label(Path(f"{name}_gt.nii.gz"), label, spacing, wrong if late else "")
        if wrong == "three frames":
            _save(place / f"{patient}_frame{last + 1:02d}_gt.nii.gz", scans[ed][1], spacing)
        if four_d and wrong != "no frame" or only_4d:
            # frames between the two annotated ones differ from both, so that a wrong one is found out
            stack = [scans[n][0] if n in scans else scans[ed][0] + np.int16(n) for n in range(1, last + 1)]
            _save(place / f"{patient}_4d.nii.gz", np.stack(stack, axis=3), spacing)
    return folder


def build_h5(folder: Path, ids: Sequence[str], shape: Sequence[int] = (48, 44, 6), slices: Sequence[str] = ()) -> Path:
    """The same frames as SSL4MIS publishes them, slices first, those of `slices` one by one; returns the folder."""
    import h5py

    for case in ids:
        image, label = (part.transpose() for part in heart(case.split("_")[0], case.endswith("2"), shape))
        image = ((image - image.min()) / (image.max() - image.min())).astype(np.float32)
        files = {f"data/{case}.h5": (image, label)}
        if case in slices:
            files = {f"data/slices/{case}_slice_{k}.h5": planes
                     for k, planes in enumerate(zip(image, label, strict=True), 1)}
        for name, arrays in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(folder / name, "w") as file:
                for key, array in zip(("image", "label"), arrays, strict=True):
                    file.create_dataset(key, data=array, compression="gzip")
    return folder


def _image(path: Path, image: np.ndarray, spacing: Sequence[float], wrong: str) -> None:
    if wrong == "text":
        path.write_text("no scan\n")
        return
    if wrong == "constant":
        image = np.full_like(image, 7)
    if wrong == "nan":
        image = np.where(image == image.max(), np.nan, image.astype(np.float32))
    _save(path, np.stack([image, image + 1], axis=3) if wrong == "4D" else image, spacing)
    if wrong == "truncated":
        path.write_bytes(path.read_bytes()[:-200])


def _label(path: Path, label: np.ndarray, spacing: Sequence[float], wrong: str) -> None:
    if wrong == "shape":
        label = label[:-1]
    if wrong == "values":
        label = np.where(label == 3, 5, label)
    if wrong == "empty":
        label = np.zeros_like(label)
    _save(path, label.astype(np.uint8), [2 * mm for mm in spacing] if wrong == "affine" else spacing)


def _save(path: Path, array: np.ndarray, spacing: Sequence[float]) -> None:
    image = nib.Nifti1Image(array, affine(spacing))
    image.header.set_xyzt_units("mm", "sec")
    image.set_qform(affine(spacing), 1)
    image.set_sform(affine(spacing), 1)
    nib.save(image, path)
