"""BraTS: brain tumors in four MRI modalities, 2019 by its case lists; archives of other years are read too."""

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from data_prep.make_splits import is_lgg
from data_prep.raw import H5Case, RawCase, below, wrong_folder
from data_prep.recipes import Crop, Recipe, Step
from data_prep.spec import DatasetSpec, Protocol
from data_prep.store import opener

MODALITIES = ("FLAIR", "T1", "T1ce", "T2")
SPACING = (1.0, 1.0, 1.0)  # of every case, since the archive is resampled and skull-stripped
# Until 2021 the enhancing tumor is 4 and nothing is 3; from 2023 on it is 3, and a 4 (2024) is no tumor but a cavity.
UNTIL_2021 = ("_flair", "_t1", "_t1ce", "_t2", "_seg"), {0: 0, 1: 1, 2: 2, 4: 3}
FROM_2023 = ("-t2f", "-t1n", "-t1c", "-t2w", "-seg"), {0: 0, 1: 1, 2: 2, 3: 3}
HOW_TO_GET = (
    "register at www.med.upenn.edu/cbica/brats2019 for the training data with the folders HGG and LGG, then "
    "`python -m data_prep.prepare BraTS --raw DIR --out DATA`, or --from-h5 DIR for the files published with SSL4MIS"
)
H5_MODALITIES = MODALITIES[:1]  # what the files published with SSL4MIS have
H5_CLASSES = ("background", "whole tumor")

RECIPES = {
    "paper": Recipe(
        dataset="BraTS",
        name="paper",
        version=1,
        about="SSL4MIS's, for every modality: the box of FLAIR's voxels other than 0 without its last planes, the "
        "upper 0.1 percent of the box clipped, z-scored by the voxels above 0; the axes as in the file",
        orientation="LPS",  # that of the archive
        crop=Crop("nonzero", channel=0, exclusive=True),
        after=(Step("clip_share", {"share": 0.999}), Step("zscore", {"over": "positive"})),
    ),
    "clean": Recipe(
        dataset="BraTS",
        name="clean",
        version=1,
        about="without the label: the box of the voxels other than 0 in any modality, 1 mm, z-scored over these voxels",
        spacing=SPACING,  # what all cases of the archive have: only a new scan is resampled
        crop=Crop("nonzero"),
        after=(Step("zscore", {"over": "foreground"}),),
    ),
}


def raw_cases(root: Path) -> list[RawCase]:
    """Every case folder BraTS... at any depth below a folder, sorted; the layouts of 2017 to 2021 and of 2023 on.

    Cases below a folder named after Validation may lack the label. Raises DataError where there is no case at
    all; what is missing in a case is its problem.
    """
    folders = defaultdict(list)
    for folder, _ in below(root):
        named = folder != root and folder.name.lower().startswith("brats")
        if named and not any(sub.is_dir() for sub in folder.iterdir()):
            folders[folder.name].append(folder)
    if not folders:
        raise wrong_folder(root, "the archive of BraTS with HGG/BraTS19_.../BraTS19_..._flair.nii.gz or a later year's")
    return [_case(root, folders[case]) for case in sorted(folders)]


def h5_cases(root: Path) -> list[H5Case]:
    """The files published with SSL4MIS, `data/*.h5`, sorted: FLAIR against the whole tumor.

    Raises DataError where there is no such file.
    """
    files = defaultdict(list)
    for folder, names in below(root):
        for name in names:
            if name.startswith("BraTS") and name.endswith(".h5"):
                files[name.removesuffix(".h5")].append(folder / name)
    if not files:
        raise wrong_folder(root, "SSL4MIS's data/BraTS19_2013_0_1.h5 and others")
    return [
        H5Case(
            id=case,
            files=tuple(paths[:1]),
            axes=(2, 1, 0),  # SimpleITK's arrays: slices, rows, columns
            spacing=SPACING,
            values={0: 0, 1: 1},
            patient=_patient(case),
            group=_grade(case),
            problem=f"{paths[1]}: {case} again, expected it in {paths[0].parent} only" if paths[1:] else "",
        )
        for case, paths in sorted(files.items())
    ]


def _case(root: Path, folders: list[Path]) -> RawCase:
    folder, *others = folders
    case = folder.name
    endings, values = FROM_2023 if re.fullmatch(r"BraTS(-\w+){3}", case, re.IGNORECASE) else UNTIL_2021
    found = {path.name.removesuffix(".gz").removesuffix(".nii"): path for path in sorted(folder.iterdir())}
    files = [found.get(case + ending) for ending in endings]
    missing = [what for what, file in zip((*MODALITIES, "label"), files, strict=True) if file is None]
    if missing == ["label"] and "Validation" in str(folder.relative_to(root.parent)):
        missing = []
    problem = ""
    if others:
        problem = f"{others[0]}: {case} again, expected it in {folder} only"
    elif missing:
        problem = f"{folder}: no {', '.join(missing)}, expected {case} with {', '.join(endings)} and .nii.gz or .nii"
    group = folder.parent.name if folder.parent.name in ("HGG", "LGG") else _grade(case)
    images = tuple(file for file in files[:-1] if file)
    return RawCase(case, images, files[-1], values, _patient(case), group, problem=problem)


def _patient(case: str) -> str:
    """Cases of 2023 on end in the number of the visit."""
    return re.sub(r"^(BraTS-\w+-\w+)-\d+$", r"\1", case)


def _grade(case: str) -> str:
    if not case.startswith("BraTS19_"):
        return ""
    return "LGG" if is_lgg(case) else "HGG"


PAPER = Protocol(
    name="paper",
    about="The published recipe: whole tumor in FLAIR, fixed split, 30000 iterations",
    split="BraTS2019-paper",
    patch=(96, 96, 96),
    stride=(64, 64, 64),
    iterations=30000,
    labeled=(25, 50),
    learning_rate=0.1,  # as SSL4MIS ran its U-Net; 0.01 suits networks with batch normalization
    schedule="poly",
    network="unet",
    precision="32-true",
    published=True,
    modalities=("FLAIR",),
    region="whole tumor",
)
CV5 = replace(
    PAPER,
    name="cv5",
    about="The published sizes on five folds with equal shares of both grades, other labeled cases in every fold, "
    "30000 iterations for every method",
    split="BraTS2019-cv5",
    published=False,
)
PARTS = replace(
    CV5,
    name="regions",
    about="Five folds; all four modalities and tumor parts, scored as whole tumor, tumor core and enhancing tumor",
    precision="auto",
    modalities=(),
    region="",
)

SPEC = DatasetSpec(
    name="BraTS",
    title="Brain tumor, Multimodal Brain Tumor Segmentation Challenge 2019",
    modality="MRI",
    classes=("background", "necrotic core", "edema", "enhancing tumor"),
    spacing=SPACING,
    citation="Menze et al., The multimodal brain tumor image segmentation benchmark (BRATS), IEEE Transactions on "
    "Medical Imaging 34(10), 2015; Bakas et al., Advancing The Cancer Genome Atlas glioma MRI collections with expert "
    "segmentation labels and radiomic features, Scientific Data 4, 2017; Bakas et al., arXiv 1811.02629, 2018",
    how_to_get=HOW_TO_GET,
    open=opener("BraTS"),
    protocols={protocol.name: protocol for protocol in (PAPER, CV5, PARTS)},
    modalities=MODALITIES,
    regions={"whole tumor": (1, 2, 3), "tumor core": (1, 3), "enhancing tumor": (3,)},
)

SPECS = {SPEC.name: SPEC}
