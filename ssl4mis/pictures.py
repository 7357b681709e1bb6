"""Pictures of segmented scans for the report: planes with the contours of truth and prediction."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import data_prep

TRUTH, PREDICTION = "#ffc20a", "#1aa7ff"  # told apart on gray by all kinds of colour vision
HEIGHT = 160  # pixels of a plane, at most twice as many across
GAP = 4  # pixels between planes
GRAYS = 13  # with two contours and the gap 16 colors, which half a byte holds; the noise of a scan hides the steps


class Scans:
    """Finds scans, labels and predictions of records; what is absent is told, never an error.

    Args:
        folder: of the runs, <id>/predictions/<case>.nii.gz in it.
        data_root: of the data sets; default is the environment variable SSL4MIS_DATA.
    """

    def __init__(self, folder, data_root=None):
        self.folder, self.data_root = Path(folder), data_root
        self._stores, self._cases = {}, {}

    def picture(self, record: dict, case: str) -> tuple[bytes | None, str]:
        """PNG of a test case of a record as `planes` has it, or None and one sentence on what is missing."""
        path = self.folder / record["id"] / "predictions" / f"{case}.nii.gz"
        if not path.is_file():
            where = self.folder / "<record id>" / "predictions" / "<case>.nii.gz"
            return None, (f"{where.as_posix()} is not there; a run leaves it when it is evaluated, and it is not "
                          "committed: train again where the results folder is kept.")
        try:
            dataset, protocol, store = self._open(record)
            if case not in self._cases:
                self._cases = {case: (store.image(case)[0], store.label(case), store.spacing(case))}
            image, label, spacing = self._cases[case]
        except (data_prep.DataError, OSError) as error:
            return None, f"the scans cannot be read: {error}."
        try:
            predicted = _read(path)
        except Exception as error:  # nibabel raises errors of many kinds for a broken file
            return None, f"{path.as_posix()} cannot be read ({type(error).__name__}: {error})."
        if predicted.shape != label.shape:
            return None, (f"{path.as_posix()} has the shape {predicted.shape}, expected {label.shape} as the stored "
                          "case; it is of another recipe or protocol.")
        targets = dataset.targets(protocol).values()
        masks = [[np.isin(volume, values) for values in targets] for volume in (label, predicted)]
        return planes(image, *masks, spacing), ""

    def _open(self, record):
        spec = record["spec"]
        key = spec["dataset"], spec["protocol"], spec.get("recipe", "")
        if key not in self._stores:
            self._cases = {}
            dataset, root = data_prep.locate(spec["dataset"], self.data_root)
            if spec["protocol"] not in dataset.protocols:
                raise data_prep.DataError(f"data set {spec['dataset']} has no protocol {spec['protocol']}, expected "
                                          f"one of {', '.join(dataset.protocols)}")
            protocol = dataset.protocols[spec["protocol"]]
            if spec.get("recipe"):
                protocol = dataclasses.replace(protocol, recipe=spec["recipe"])
            self._stores = {key: (dataset, protocol, dataset.open(root, protocol))}
        return self._stores[key]


def planes(
    image: np.ndarray, truth: Sequence[np.ndarray], predicted: Sequence[np.ndarray], spacing: Sequence[float]
) -> bytes:
    """PNG of the planes through the middle of a structure, contours of truth and prediction over the scan.

    The planes go through the center of mass of the truth, of the prediction where the truth is empty, and of the volume
    where both are; they stand side by side, across the last axis first, in the aspect of the voxels.

    Args:
        image: (*space) in two or three axes, shown from its 1st to its 99th percentile.
        truth, predicted: masks (*space), one for each structure.
        spacing: of the voxels in mm.
    """
    from PIL import Image

    center = _center(truth, _center(predicted, [n // 2 for n in image.shape]))
    low, high = np.percentile(image, (1, 99))
    gray = np.clip((image - low) / max(high - low, 1e-12), 0, 1)
    parts = []
    for across in reversed(range(image.ndim)) if image.ndim == 3 else (None,):
        def cut(volume, across=across):
            plane = volume if across is None else np.take(volume, center[across], axis=across)
            # rows go down; along the last axis of a volume they go up, to the head
            return plane.T[::-1] if across in (0, 1) else plane.T

        sides = [mm for axis, mm in enumerate(spacing) if axis != across]
        shape = _fit(cut(gray).shape, (sides[1], sides[0]))
        picture = np.rint(_resized(cut(gray), shape) * (GRAYS - 1)).astype(np.uint8)
        for masks, index, width in ((truth, GRAYS, 2), (predicted, GRAYS + 1, 1)):  # the thin one over the thick one
            for mask in masks:
                picture[_edge(_resized(cut(mask), shape) >= 0.5, width)] = index
        parts.append(picture)
    height = max(part.shape[0] for part in parts)
    canvas = np.full((height, sum(part.shape[1] + GAP for part in parts) - GAP), GRAYS + 2, np.uint8)
    left = 0
    for part in parts:
        canvas[: part.shape[0], left : left + part.shape[1]] = part
        left += part.shape[1] + GAP
    levels = [round(255 * n / (GRAYS - 1)) for n in range(GRAYS)]
    colors = [(level,) * 3 for level in levels] + [tuple(bytes.fromhex(c[1:])) for c in (TRUTH, PREDICTION, "#ffffff")]
    drawn = Image.fromarray(canvas).convert("P")
    drawn.putpalette([value for color in colors for value in color])
    text = io.BytesIO()
    drawn.save(text, "PNG", optimize=True, bits=4)
    return text.getvalue()


def _center(masks, otherwise):
    filled = np.any(masks, axis=0) if len(masks) else np.zeros(1, bool)
    if not filled.any():
        return otherwise
    return [round(float(where.mean())) for where in np.nonzero(filled)]


def _fit(shape, spacing):
    """Rows and columns in pixels, `HEIGHT` of them down unless the plane is more than twice as wide."""
    tall, wide = (n * mm for n, mm in zip(shape, spacing, strict=True))
    scale = min(HEIGHT / tall, 2 * HEIGHT / wide)
    return max(1, round(tall * scale)), max(1, round(wide * scale))


def _resized(plane, shape):
    from scipy import ndimage

    source, scale = np.asarray(plane, np.float32), np.array(plane.shape) / np.array(shape)
    return ndimage.affine_transform(source, scale, 0.5 * scale - 0.5, shape, order=1, mode="nearest")


def _edge(mask, width):
    from scipy import ndimage

    return mask & ~ndimage.binary_erosion(mask, iterations=width, border_value=1)


def _read(path):
    import nibabel

    return np.asarray(nibabel.load(path).dataobj)
