"""PROMISE12: T2-weighted MRI of the prostate from four centers, the 50 training cases of the challenge of 2012."""

import re
from collections import defaultdict
from pathlib import Path

from data_prep.make_splits import PROMISE12_CENTERS
from data_prep.raw import RawCase, below, wrong_folder
from data_prep.recipes import Recipe, Step
from data_prep.spec import DatasetSpec, Protocol
from data_prep.store import opener

SPACING = (0.625, 0.625, 3.6)  # the most common one; 0.27 to 0.75 mm in the plane, 2.2 to 4 mm across
FILE = re.compile(r"Case(\d\d)(_segmentation)?\.mhd")
TEST = re.compile(r"(livechallenge_?)?test_?data", re.IGNORECASE)
HOW_TO_GET = (
    "training_data.zip from zenodo.org/records/8026660 (or the parts 1 to 3 from promise12.grand-challenge.org), then "
    "`python -m data_prep.prepare PROMISE12 --raw DIR --out DATA`"
)


def raw_cases(root: Path) -> list[RawCase]:
    """The training cases at any depth below a folder, sorted: Case00 to Case49, `group` is the center.

    Folders with the challenge's test data are passed over, since their cases have the same names. Raises DataError
    where there is no case at all; a missing or repeated file is the problem of its case.
    """
    images, labels = defaultdict(list), defaultdict(list)
    for folder, names in below(root):
        if any(map(TEST.fullmatch, folder.relative_to(root).parts)):
            continue
        for name in names:
            if found := FILE.fullmatch(name):
                (labels if found[2] else images)[int(found[1])].append(folder / name)
    if not images and not labels:
        raise wrong_folder(root, f"Case00.mhd and Case00_segmentation.mhd at any depth: {HOW_TO_GET}")
    return [_case(number, images[number], labels[number]) for number in sorted({*images, *labels})]


def _case(number: int, images: list[Path], labels: list[Path]) -> RawCase:
    case, problem = f"Case{number:02d}", ""
    for files, name in ((images, f"{case}.mhd"), (labels, f"{case}_segmentation.mhd")):
        if not files:
            problem = problem or f"{(images + labels)[0].parent}: no {name}, expected a scan and its segmentation"
        elif len(files) > 1:
            problem = problem or f"{files[1]}: {name} again, expected it in {files[0].parent} only"
    center = next((name for name, numbers in PROMISE12_CENTERS.items() if number in numbers), "")
    return RawCase(case, tuple(images[:1]), labels[0] if labels else None, {0: 0, 1: 1}, case, center, problem=problem)


CLEAN = Recipe(
    dataset="PROMISE12",
    name="clean",
    version=1,
    about="RAS, 0.625 x 0.625 x 3.6 mm, the grid of half the scans; nothing cropped, since the field of view is all "
    "pelvis and coils in the rectum leave its front too dark for a threshold; outermost half percent clipped, z-score",
    spacing=SPACING,
    after=(Step("clip_quantiles", {"low": 0.005, "high": 0.995, "over": "all"}), Step("zscore", {"over": "all"})),
)
RECIPES = {CLEAN.name: CLEAN}

CV5 = Protocol(
    name="cv5",
    about="Five folds with equal shares of the four centers: patches of 80 x 80 x 58 mm, a prostate with some margin",
    split="PROMISE12-cv5",
    patch=(128, 128, 16),
    stride=(64, 64, 8),
    iterations=6000,
    labeled=(4, 8),
    schedule="poly",
    recipe="clean",
)

SPEC = DatasetSpec(
    name="PROMISE12",
    title="Prostate in T2-weighted MRI, challenge PROMISE12",
    modality="T2 MRI",
    classes=("background", "prostate"),
    spacing=SPACING,
    citation="Litjens et al., Evaluation of prostate segmentation algorithms for MRI: the PROMISE12 challenge, Medical "
    "Image Analysis 18(2), 2014",
    how_to_get=HOW_TO_GET,
    open=opener("PROMISE12"),
    protocols={CV5.name: CV5},
    modalities=("T2",),
)

SPECS = {SPEC.name: SPEC}
