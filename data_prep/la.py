"""LA: 100 late gadolinium-enhanced MRI scans with the left atrium, as preprocessed and published by UA-MT."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_prep.spec import DataError, DatasetSpec, Protocol
from data_prep.volumes import cached_image, cached_label, read_image, read_label

CLASSES = ("background", "left atrium")
SPACING = (0.625, 0.625, 0.625)
FILE = "mri_norm2.h5"
HOW_TO_GET = (
    f"expected DIR/<ID>/{FILE} or DIR/LA/<ID>/{FILE}, the files published in the repository yulequan/UA-MT, folder "
    "'data/2018LA_Seg_Training Set' (the data belong to the 2018 Atrial Segmentation Challenge); "
    "then set --data-root DIR or SSL4MIS_DATA=DIR"
)


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

    def _find(self, case: str) -> Path | None:
        places = (self.root / case / FILE, self.root / "LA" / case / FILE)
        return next((path for path in places if path.is_file()), None)


def _open(root: Path | None, protocol: Protocol) -> LAStore:
    place = root or os.environ.get("SSL4MIS_DATA")
    if not place:
        raise DataError(f"LA: no data folder is given: {HOW_TO_GET}")
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise DataError(f"LA: {folder} is not a folder: {HOW_TO_GET}")
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
    about="The published recipe on five folds, with other labeled cases in every fold",
    split="LA-cv5",
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
    classes=CLASSES,
    spacing=SPACING,
    citation="Xiong et al., A global benchmark of algorithms for segmenting the left atrium from late "
    "gadolinium-enhanced cardiac magnetic resonance imaging, Medical Image Analysis 67, 2021",
    how_to_get=HOW_TO_GET,
    open=_open,
    protocols={protocol.name: protocol for protocol in (PAPER, CV5, MCF5, LITE)},
)

SPECS = {SPEC.name: SPEC}
