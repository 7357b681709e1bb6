"""LA: 100 late gadolinium-enhanced MRI scans with the left atrium, as published by UA-MT or from the raw archive."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.raw import H5Case, RawCase, below, wrong_folder
from data_prep.recipes import Crop, Recipe, Step
from data_prep.spec import DataError, DatasetSpec, Protocol, Store
from data_prep.store import CaseStore, data_folder, find
from data_prep.volumes import cached_image, cached_label, read_image, read_label

CLASSES = ("background", "left atrium")
SPACING = (0.625, 0.625, 0.625)
FILE = "mri_norm2.h5"
SCAN, LABEL = "lgemri.nrrd", "laendo.nrrd"
PUBLISHED = "LA-published-1"  # the recipe of the published files, whose margins were drawn at random
PREPARE = "python -m data_prep.prepare LA --raw DIR --out DATA"
HOW_TO_GET = (
    f"expected DIR/<ID>/{FILE} or DIR/LA/<ID>/{FILE}, the files published in the repository yulequan/UA-MT, folder "
    "'data/2018LA_Seg_Training Set' (the data belong to the 2018 Atrial Segmentation Challenge), "
    f"or what `{PREPARE}` writes; then set --data-root DIR or SSL4MIS_DATA=DIR"
)

RECIPES = {
    "paper": Recipe(
        dataset="LA",
        name="paper",
        version=1,
        about="UA-MT's: z-scored over the whole scan, then cropped in x and y to the label's box with a margin of 15 "
        "voxels (published: 10 to 19, drawn at random), widened to 112 voxels before; the axes as in the file",
        orientation="LPS",  # that of the archive, and so of the published files
        before=(Step("zscore", {"over": "all"}),),
        crop=Crop("label", margin=(15, 15, None), voxels=True, smallest=(112, 112, 0), exclusive=True),
    ),
    "clean": Recipe(
        dataset="LA",
        name="clean",
        version=1,
        about="without the label: the box of the body, 0.625 mm, z-scored over the voxels of the body",
        spacing=SPACING,  # what all scans of the archive have: only a new scan is resampled
        crop=Crop("foreground", margin=(5, 5, 5)),
        after=(Step("zscore", {"over": "foreground"}),),
    ),
}


def raw_cases(root: Path) -> list[RawCase]:
    """Every scan of the archive at any depth below a folder, sorted by id, with what is wrong as its problem.

    Raises DataError where there is none.
    """
    folders = _folders(root, SCAN, LABEL)
    if not folders:
        raise wrong_folder(root, f"the archive of the 2018 Atrial Segmentation Challenge with <ID>/{SCAN} and {LABEL}")
    return [_raw_case(case, *folders[case]) for case in sorted(folders)]


def h5_cases(root: Path) -> list[H5Case]:
    """Every published file at any depth below a folder, sorted by id. Raises DataError where there is none."""
    folders = _folders(root, FILE)
    if not folders:
        raise wrong_folder(root, f"the published files <ID>/{FILE}")
    return [H5Case(case, tuple(folder / FILE for folder in folders[case][:1]), spacing=SPACING, patient=case,
                   problem=_repeated(case, *folders[case])) for case in sorted(folders)]


class LAStore:
    """The published h5 files under a folder, downsampled as the protocol says (once, then from the cache)."""

    def __init__(self, root: Path, downsample: int = 1) -> None:
        self.root = root
        self.downsample = downsample

    def path(self, case: str) -> Path:
        """File of a case. Raises DataError when neither place has it."""
        found = self._find(case)
        if found is None:
            raise DataError(f"LA: case {case} is missing under {self.root}: {HOW_TO_GET}")
        return found

    def image(self, case: str) -> np.ndarray:
        """The scan: float32, (1, x, y, z), z-scored over the whole uncropped scan. Raises DataError."""
        if self.downsample == 1:
            return read_image(self.path(case))
        return cached_image(self.path(case), "LA", case, self.downsample)

    def label(self, case: str) -> np.ndarray:
        """The classes: uint8, (x, y, z). Raises DataError."""
        if self.downsample == 1:
            return read_label(self.path(case), len(CLASSES))
        return cached_label(self.path(case), "LA", case, self.downsample, len(CLASSES))

    def spacing(self, case: str) -> tuple[float, ...]:
        """Voxel distance in mm, (x, y, z), after downsampling; the same for all cases."""
        return tuple(mm * self.downsample for mm in SPACING)

    def check(self, cases: Sequence[str]) -> None:
        """Raises DataError naming how many case files are missing and the first of them."""
        missing = [case for case in cases if self._find(case) is None]
        if missing:
            count = f"{len(missing)} of {len(cases)} case files are missing under {self.root}"
            raise DataError(f"LA: {count}, the first is {missing[0]}/{FILE}: {HOW_TO_GET}")

    def provenance(self, cases: Sequence[str]) -> dict[str, Any]:
        """The recipe of the published files; nothing sums them up."""
        return {"recipe": PUBLISHED, "sha256": "", "label_guided": True, "spacing_known": True}

    def replay(self) -> dict[str, Any]:
        """A new scan is z-scored as the published ones were, and kept whole, since it has no label to crop by."""
        return RECIPES["paper"].to_dict()

    def _find(self, case: str) -> Path | None:
        places = (self.root / case / FILE, self.root / "LA" / case / FILE)
        return next((path for path in places if path.is_file()), None)


def _folders(root: Path, *names: str) -> dict[str, list[Path]]:
    """Folders with one of these files by their names, which are the ids."""
    found = defaultdict(list)
    for folder, files in below(root):
        if not set(names).isdisjoint(files):
            found[folder.name].append(folder)
    return found


def _repeated(case: str, folder: Path, *others: Path) -> str:
    return f"{others[0]}: case {case} again, expected it in {folder} only" if others else ""


def _raw_case(case: str, folder: Path, *others: Path) -> RawCase:
    image, label = folder / SCAN, folder / LABEL
    # the scans that the challenge kept for testing have no labels in older downloads
    unlabeled = not label.is_file() and "test" in folder.parent.name.lower()
    missing = [path for path in (image, label) if not path.is_file() and not (path == label and unlabeled)]
    problem = _repeated(case, folder, *others)
    if missing:
        problem = f"{missing[0]}: no such file, expected {SCAN} and {LABEL} in the folder of case {case}"
    return RawCase(case, (image,), None if unlabeled else label, {0: 0, 255: 1}, patient=case, problem=problem)


def _open(root: Path | None, protocol: Protocol) -> Store:
    """What is prepared below a folder, and for the recipe of the papers else the published files there."""
    folder = data_folder("LA", root, HOW_TO_GET)
    prepared = find(folder, "LA", protocol.recipe)
    if prepared:
        return CaseStore(prepared, SPEC, protocol)
    if protocol.recipe not in RECIPES:
        raise DataError(f"LA: recipe {protocol.recipe!r} is unknown, expected {' or '.join(RECIPES)}")
    if protocol.recipe != "paper":
        raise DataError(f"LA: nothing is prepared with recipe {protocol.recipe} under {folder}, expected what "
                        f"`{PREPARE} --recipe {protocol.recipe}` writes")
    return LAStore(folder, protocol.downsample)


PAPER = Protocol(
    name="paper",
    about="The published recipe: fixed 80/20 split, full resolution, 6000 iterations",
    split="LA-paper",
    patch=(112, 112, 80),
    stride=(18, 18, 4),
    iterations=6000,
    labeled=(4, 8, 16),
    precision="32-true",
    published=True,
)
CV5 = replace(
    PAPER,
    name="cv5",
    about="The published sizes on five folds, other labeled cases in every fold, 6000 iterations for every method",
    split="LA-cv5",
    published=False,
)
MCF5 = replace(
    PAPER,
    name="mcf5",
    about="The published recipe on the five folds published with MCF (folds 1-4 share their labeled cases)",
    split="LA-mcf5",
)
LITE = replace(
    PAPER,
    name="lite",
    about="Fixed 80/20 split at 1.25 mm with half the width and 3000 iterations for every method",
    patch=(64, 64, 32),
    stride=(16, 16, 4),
    iterations=3000,
    width=8,
    precision="auto",
    downsample=2,
    published=False,
)

SPEC = DatasetSpec(
    name="LA",
    title="Left atrium, 2018 Atrial Segmentation Challenge",
    modality="LGE-MRI",
    modalities=("LGE-MRI",),
    classes=CLASSES,
    spacing=SPACING,
    citation="Xiong et al., A global benchmark of algorithms for segmenting the left atrium from late "
    "gadolinium-enhanced cardiac magnetic resonance imaging, Medical Image Analysis 67, 2021",
    how_to_get=HOW_TO_GET,
    open=_open,
    protocols={protocol.name: protocol for protocol in (PAPER, CV5, MCF5, LITE)},
)

SPECS = {SPEC.name: SPEC}
