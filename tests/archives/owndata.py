"""Own data in the layouts that users have: nnU-Net of both versions, Medical Decathlon (4D), and a CSV of paths."""

import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk

LAYOUTS = ("nnunet", "nnunet1", "decathlon", "csv")
LABELS = {"background": 0, "liver": 1, "tumor": 2}
BROKEN = ("no image", "no channel", "no label", "shape", "affine", "4D", "3D", "NaN", "constant", "truncated",
          "no scan", "value", "empty")


def build(
    folder: Path, ids: Sequence[str], layout: str = "nnunet", modalities: Sequence[str] = ("MRI",),
    labels: Mapping[str, Any] = LABELS, unlabeled: Collection[str] = (), shape: tuple[int, int, int] = (40, 36, 24),
    spacing: tuple[float, float, float] = (1.5, 1.5, 2.0), ending: str = ".nii.gz", separator: str = ",",
    columns: Mapping[str, Mapping[str, str]] | None = None, content: Mapping[str, Any] | None = None,
    broken: Mapping[str, str] | None = None,
) -> Path:
    """Write a data set in one of `LAYOUTS`; returns its folder, or the CSV file.

    `labels` as in nnU-Net's dataset.json, whose `content` overrides entries (None removes them). Cases of `unlabeled`
    have no label: in imagesUnlabeled, or an empty cell of the CSV, which has further `columns`, values by case.
    `broken` says what is wrong with single cases, one of `BROKEN`.
    """
    folder, names = Path(folder), list(modalities)
    values = sorted({number for value in labels.values() for number in (value if isinstance(value, list) else [value])})
    rows = []
    for case in (*ids, *unlabeled):
        wrong, free = (broken or {}).get(case, ""), case in unlabeled
        image, label = torso(case, shape, len(names), values, ct=any("CT" in name for name in names))
        image, label, grid = _spoil(image, label, spacing, wrong)
        where = "scans" if layout == "csv" else "imagesUnlabeled" if free else "imagesTr"
        files = [folder / where / f"{case}{ending}"]
        if layout != "decathlon":
            files = [folder / where / f"{case}_{number:04d}{ending}" for number in range(len(names))]
        for number, file in enumerate(files):
            if wrong != "no image" and not (wrong == "no channel" and number):
                part = image if layout == "decathlon" else np.moveaxis(image, 3, 0)[number]
                _save(file, np.stack([part, part + 1], 3) if wrong == "4D" and part.ndim == 3 else part, spacing)
        if files[0].exists() and wrong in ("truncated", "no scan"):
            files[0].write_bytes(files[0].read_bytes()[:-400] if wrong == "truncated" else b"no scan")
        target = folder / ("masks" if layout == "csv" else "labelsTr") / f"{case}{ending}"
        if not (free or wrong == "no label"):
            _save(target, label, grid)
        rows.append([case, *files, "" if free else target])
    if layout == "csv":
        return _table(folder, rows, names, separator, columns or {})
    entries = {"name": "Torso", "reference": "nobody", "numTraining": len(ids)}
    if layout == "nnunet":
        entries |= {"channel_names": dict(enumerate(names)), "labels": dict(labels), "file_ending": ending}
    else:
        entries |= {"modality": dict(enumerate(names)), "labels": {str(v): name for name, v in labels.items()}}
        entries["training"] = [{"image": f"./imagesTr/{case}{ending}", "label": f"./labelsTr/{case}{ending}"}
                               for case in ids]
    entries = {key: value for key, value in (entries | dict(content or {})).items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(entries))
    return folder


def torso(
    case: str, shape: Sequence[int], channels: int, values: Sequence[int], ct: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Image int16 (x, y, z, channels), HU with `ct`, and label uint8 (x, y, z): organs one in the other in a body."""
    rng = np.random.default_rng(zlib.crc32(case.encode()))
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    body = np.broadcast_to((x / 0.85) ** 2 + (y / 0.7) ** 2 < 1, shape)
    middle = rng.uniform(-0.15, 0.15, 3)
    away = sum((axis - m) ** 2 for axis, m in zip((x, y, z), middle, strict=True))
    label, level = np.zeros(shape, np.uint8), np.where(body, 40 if ct else 300, -1000 if ct else 5)
    for number, value in enumerate(values[1:]):
        inner = away < (0.5 * 0.7**number) ** 2
        label[inner] = value
        level = np.where(inner, (90 if ct else 420) + 60 * number, level)
    noise = rng.normal(0, 8, (*shape, channels))
    image = level[..., None] * (1 if ct else 1 + 0.5 * np.arange(channels)) + noise
    return (image if ct else np.abs(image)).astype(np.int16), label


def _spoil(image: np.ndarray, label: np.ndarray, spacing, wrong: str) -> tuple[np.ndarray, np.ndarray, Sequence[float]]:
    """Image, label and the spacing of the label."""
    if wrong == "NaN":
        image = np.where(image == image.max(), np.nan, image.astype(np.float32))
    elif wrong == "constant":
        image = np.full_like(image, 3)
    elif wrong == "3D":
        image = image[..., 0]
    elif wrong == "shape":
        label = label[:, :-1]
    elif wrong == "value":
        label = np.where(label == label.max(), 9, label).astype(np.uint8)
    elif wrong == "empty":
        label = np.zeros_like(label)
    return image, label, tuple(1.3 * mm for mm in spacing) if wrong == "affine" else spacing


def _table(folder: Path, rows: Sequence[Sequence], names: Sequence[str], separator: str, columns) -> Path:
    lines = [["id", *names, "label", *columns]]
    for case, *files in rows:
        paths = [Path(file).relative_to(folder).as_posix() if file else "" for file in files]
        lines.append([case, *paths, *(of.get(case, "") for of in columns.values())])
    path = folder / "cases.csv"
    path.write_text("".join(separator.join(map(str, line)) + "\n" for line in lines))
    return path


def _save(path: Path, voxels: np.ndarray, spacing: Sequence[float]) -> None:
    """(x, y, z) or (x, y, z, channels), axes to the left, back and head."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith((".nii", ".nii.gz")):
        image = nib.Nifti1Image(voxels[..., 0] if voxels.shape[3:] == (1,) else voxels,
                                np.diag([-spacing[0], -spacing[1], spacing[2], 1]))
        image.header.set_xyzt_units("mm")
        nib.save(image, path)
        return
    image = sitk.GetImageFromArray(voxels.transpose(2, 1, 0, *range(3, voxels.ndim)), isVector=voxels.ndim == 4)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))
