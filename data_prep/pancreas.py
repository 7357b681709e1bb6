"""Pancreas: the contrast-enhanced abdominal CT scans of TCIA's Pancreas-CT (NIH) with the pancreas."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_prep.geometry import Geometry, to_store
from data_prep.raw import H5Case, RawCase, below, wrong_folder
from data_prep.recipes import Crop, Recipe, Step
from data_prep.scans import LPS, Scan, same_grid
from data_prep.spec import DataError, DatasetSpec, Protocol
from data_prep.store import opener

CLASSES = ("background", "pancreas")
SPACING = (1.0, 1.0, 1.0)
WINDOW = (-125, 275)  # HU
DUPLICATES = {"PANCREAS_0025": "PANCREAS_0002", "PANCREAS_0070": "PANCREAS_0002"}
SCAN_FOLDER = re.compile(r"\W*pancreas[_-]?(\d{1,4})\W*", re.IGNORECASE)  # NBIA's tools leave quotes around names
SCAN_FILE = re.compile(r"(image|img|pancreas|)[_-]?(\d{4})(?:_0000)?\.nii(?:\.gz)?", re.IGNORECASE)
LABEL_FILE = re.compile(r"label[_-]?(\d{4})\.nii(?:\.gz)?", re.IGNORECASE)
H5_FILE = re.compile(r"(?:image|pancreas)[_-]?(\d{3,4})(?:_norm)?\.h5", re.IGNORECASE)
CORANET_FILE = re.compile(r"\d{4}\.h5")
SOFT_TISSUE = (-200.0, 300.0)  # HU; beyond it air and metal would decide alone
RIM = 2  # voxels around a label that it is compared with
FITS, CLEARLY = 0.5, 1.0  # least contrast of a label in its place, and of one that has to stand alone (`align`)
HOW_TO_GET = (
    "get images and labels at www.cancerimagingarchive.net/collection/pancreas-ct (CC BY 3.0), then "
    "`python -m data_prep.prepare Pancreas --raw DIR --out DATA`, or --from-h5 DIR for files prepared with the code of "
    "MC-Net"
)

RECIPES = {
    "paper": Recipe(
        dataset="Pancreas",
        name="paper",
        version=1,
        about="MC-Net's: 1 mm, HU clipped to [-125, 275], cropped in x and y to the label's box with a margin of 25 "
        "voxels, widened to 96 voxels before, z-scored over the box; the axes as in DICOM",
        orientation="LPS",
        spacing=SPACING,
        crop=Crop("label", margin=(25, 25, None), voxels=True, smallest=(96, 96, 0), exclusive=True),
        # the published code scales the window to [0, 1] between these two, which the z-score undoes
        after=(Step("clip", {"low": WINDOW[0], "high": WINDOW[1]}), Step("zscore", {"over": "all"})),
    ),
    "clean": Recipe(
        dataset="Pancreas",
        name="clean",
        version=1,
        about="without the label: the box of the body (above -500 HU), 1 mm, HU clipped to [-125, 275], z-scored "
        "over the voxels of the body",
        spacing=SPACING,
        crop=Crop("body", margin=(5, 5, 5)),
        after=(Step("clip", {"low": WINDOW[0], "high": WINDOW[1]}), Step("zscore", {"over": "foreground"})),
    ),
}


def raw_cases(root: Path) -> list[RawCase]:
    """Every scan of the archive at any depth below a folder, sorted by id, with what is wrong as its problem.

    Images are DICOM series below a folder PANCREAS_0001 or NIfTI files (PANCREAS_0001, image0001, 0001), labels
    label0001.nii.gz or any such NIfTI file in a folder named after labels. The release of today has 80 scans, the old
    one 82: 0025 and 0070, since withdrawn as the same scan as 0002, are returned with a note, and their labels alone
    with nothing. Raises DataError where there is no scan at all.
    """
    images, labels = _walk(root)
    if not images:
        raise wrong_folder(root, "the archive Pancreas-CT with PANCREAS_0001/.../*.dcm (or NIfTI) and label0001.nii.gz")
    cases = sorted(set(images) | set(labels) - set(DUPLICATES))
    return [_raw_case(root, case, images.get(case, ()), labels.get(case, ())) for case in cases]


def h5_cases(root: Path) -> list[H5Case]:
    """The files of MC-Net, image0001_norm.h5, at any depth below a folder, sorted by id: 1 mm, the axes of DICOM.

    CoraNet's, 0001.h5, are other data: from 0 to 1, without z-score, cropped along z as well, and with a depth that was
    scaled like the plane, so that no recipe leads a new scan there. Raises DataError for them and where there is no
    such file.
    """
    files = defaultdict(list)
    for folder, names in below(root):
        for name in names:
            if found := H5_FILE.fullmatch(name):
                files[_id(found[1])].append(folder / name)
            elif CORANET_FILE.fullmatch(name):
                raise DataError(f"{folder / name}: a file of CoraNet, whose depth is not true to scale, expected "
                                "image0001_norm.h5 and so on of MC-Net, or the archive with --raw")
    if not files:
        raise wrong_folder(root, "the files image0001_norm.h5 of MC-Net")
    return [H5Case(case, tuple(files[case][:1]), spacing=SPACING, patient=case, problem=_repeated(case, files[case]),
                   note=_note(case)) for case in sorted(files)]


def align(image: Scan, label: Scan) -> Scan:
    """The label on the voxels of its image, by its affine or, where that does not fit, by what lies inside it.

    Headers of the labels tell where the axes point to, but not always where the scan lies. Voxel (i, j, k) of a label
    is column i, row j and slice k of the DICOM series: the published code of MC-Net, CoraNet and OrganSegC2F pairs them
    so, deedsBCV flips the labels along y for images whose rows a converter has reversed, and nnU-Net pairs both after
    turning each as its header says. Where header and DICOM agree, that place is taken, unless a flip along y or z fits
    clearly better; where they do not, the place that fits clearly best. What counts is the contrast: how far the HU
    inside lie above those around, in standard deviations inside. A pancreas is one tissue in darker fat; mirrored, a
    label cuts through several tissues or lies within one, with the same on both sides of its edge. (A spleen of the
    Medical Decathlon has 6.5 in its place and at most 0.8 in the seven mirrored ones.)

    Voxels are permuted and flipped, never interpolated. Raises DataError for another shape and where nothing is clear.
    """
    turned = _turned(label, label.affine, image.orientation)
    try:
        same_grid(image, turned, "label")
        return turned
    except DataError:
        places = _places(image, label, turned)
        if not places:  # of another shape
            raise
    if not label.voxels.any():
        return Scan(turned.voxels, image.affine, label.path, label.header)
    contrast = {name: _contrast(image.voxels[0], voxels) for name, voxels in places.items()}
    best, *others = sorted(contrast, key=contrast.get, reverse=True)
    alone = contrast[best] >= max([CLEARLY, *(2 * contrast[name] for name in others)])
    directed = next((name for name, voxels in places.items() if np.array_equal(voxels, turned.voxels)), "")
    if not alone:
        best = "as DICOM" if directed == "as DICOM" else ""
    if not best or contrast[best] < FITS:
        found = ", ".join(f"{name} {value:.1f}" for name, value in contrast.items())
        raise DataError(f"{label.path}: its affine is not that of {image.path}, and the HU do not tell how it lies "
                        f"(contrast {found}), expected a label on the voxels of the image")
    return Scan(places[best], image.affine, label.path, label.header)


def _places(image: Scan, label: Scan, turned: Scan) -> dict[str, np.ndarray]:
    """The ways in which a label may lie on its image, by name."""
    stored = _turned(label, LPS, image.orientation).voxels
    y, z = (next(axis for axis, code in enumerate(image.orientation) if code in pair) for pair in ("AP", "SI"))
    places = {"as DICOM": stored, "flipped along y": np.flip(stored, y), "flipped along z": np.flip(stored, z),
              "flipped along y and z": np.flip(stored, (y, z))}
    if not any(np.array_equal(voxels, turned.voxels) for voxels in places.values()):
        places["as its header"] = turned.voxels
    return {name: voxels for name, voxels in places.items() if voxels.shape == image.space}


def _turned(scan: Scan, affine: np.ndarray, orientation: str) -> Scan:
    """A scan with its axes in another order, on the way taking an affine for its own."""
    scan = Scan(scan.voxels, affine, scan.path, scan.header)
    geometry = Geometry.of(scan, orientation=orientation)
    return Scan(to_store(scan, geometry, 0), geometry.stored_affine, scan.path, scan.header)


def _contrast(hu: np.ndarray, label: np.ndarray) -> float:
    """Mean HU inside a label above that of its rim, in standard deviations inside; 0 where there is no rim."""
    from scipy import ndimage

    box = ndimage.find_objects((label != 0).astype(np.uint8))[0]
    box = tuple(slice(max(part.start - RIM, 0), part.stop + RIM) for part in box)
    hu, label = np.clip(hu[box].astype(np.float64), *SOFT_TISSUE), label[box] != 0
    rim = ndimage.binary_dilation(label, iterations=RIM) & ~label
    if not rim.any():
        return 0.0
    return float((hu[label].mean() - hu[rim].mean()) / max(hu[label].std(), 1.0))


def _id(number: str) -> str:
    return f"PANCREAS_{int(number):04d}"


def _walk(root: Path) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Images (files and DICOM folders) and labels below a folder by their ids, in a fixed order."""
    images, labels = defaultdict(list), defaultdict(list)
    for here, names in below(root):
        if any(name.lower().endswith(".dcm") for name in names):
            for part in reversed(here.relative_to(root.parent).parts):
                if found := SCAN_FOLDER.fullmatch(part):
                    images[_id(found[1])].append(here)
                    break
        for name in names:
            if found := LABEL_FILE.fullmatch(name):
                labels[_id(found[1])].append(here / name)
            elif found := SCAN_FILE.fullmatch(name):
                named = here != root and "label" in here.name.lower() and found[1].lower() not in ("image", "img")
                (labels if named else images)[_id(found[2])].append(here / name)
    return images, labels


def _raw_case(root: Path, case: str, images: list[Path], labels: list[Path]) -> RawCase:
    problem = next(_problems(root, case, images, labels), "")
    return RawCase(case, tuple(images[:1]), labels[0] if labels else None, {0: 0, 1: 1}, patient=case, align=align,
                   problem=problem, note=_note(case))


def _note(case: str) -> str:
    return f"{case} is the same scan as {DUPLICATES[case]} and was withdrawn by TCIA" if case in DUPLICATES else ""


def _problems(root: Path, case: str, images: list[Path], labels: list[Path]) -> Iterator[str]:
    number = case.removeprefix("PANCREAS_")
    if not images:
        yield f"{labels[0]}: no image of this label below {root}, expected {case}/.../*.dcm or {case}.nii.gz"
    if len(images) > 1:
        series = "DICOM series" if all(path.is_dir() for path in images) else "images"
        yield f"{images[1]}: {case} has {len(images)} {series}, expected one, such as {images[0]} only"
    if not labels:
        yield f"{images[0]}: no label of this image below {root}, expected label{number}.nii.gz"
    if len(labels) > 1:
        yield f"{labels[1]}: {case} has {len(labels)} labels, expected one, such as {labels[0]} only"


def _repeated(case: str, files: list[Path]) -> str:
    return f"{files[1]}: {case} again, expected it in {files[0]} only" if len(files) > 1 else ""


PAPER = Protocol(
    name="paper",
    about="The 80 scans of today's release in the split of CoraNet and BCP: 62 train, 18 test, 6000 iterations",
    split="Pancreas-coranet",
    patch=(96, 96, 96),
    stride=(16, 16, 16),
    iterations=6000,
    labeled=(6, 12),
    augmentation=(),  # rotations and flips break the training on this data set
    precision="32-true",
    published=True,
)
MCNET = replace(
    PAPER,
    name="mcnet",
    about="The 82 scans of the old release in the split of MC-Net (leaks: test case 0025 is the scan of 0002 and of "
    "0070, which train, 0070 as one of 12 labeled)",
    split="Pancreas-mcnet",
)
MCF4 = replace(
    PAPER,
    name="mcf4",
    about="The 82 scans of the old release in the four folds of MCF (folds 0 to 2 leak: 0002, 0025 and 0070 are one "
    "scan)",
    split="Pancreas-mcf4",
)
CV5 = replace(
    PAPER,
    name="cv5",
    about="The published sizes on five folds of the 80 scans, other labeled cases in every fold, 6000 iterations for "
    "every method",
    split="Pancreas-cv5",
    published=False,
)

SPEC = DatasetSpec(
    name="Pancreas",
    title="Pancreas-CT, NIH Clinical Center",
    modality="CT",
    modalities=("CT",),
    classes=CLASSES,
    spacing=SPACING,
    citation="Roth et al., Data from Pancreas-CT, The Cancer Imaging Archive, 2016, doi 10.7937/K9/TCIA.2016.tNB1kqBU; "
    "Roth et al., DeepOrgan: multi-level deep convolutional networks for automated pancreas segmentation, MICCAI 2015",
    how_to_get=HOW_TO_GET,
    open=opener("Pancreas"),
    protocols={protocol.name: protocol for protocol in (PAPER, CV5, MCNET, MCF4)},
)

SPECS = {SPEC.name: SPEC}
