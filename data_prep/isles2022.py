"""ISLES-2022: diffusion-weighted MRI of the brain after a stroke, the 250 training cases of the challenge."""

import re
from collections import defaultdict
from pathlib import Path

from data_prep.raw import RawCase, below, wrong_folder
from data_prep.recipes import Crop, Recipe, Step
from data_prep.spec import DatasetSpec, Protocol
from data_prep.store import opener

SPACING = (2.0, 2.0, 2.0)  # of 193 of the 250 cases; the others have planes 4.8 mm apart or finer pixels
FILE = re.compile(r"(sub-strokecase\d{4})_ses-\d+_(dwi|adc|msk)\.nii(?:\.gz)?")
KINDS = ("dwi", "adc", "msk")
HOW_TO_GET = (
    "ISLES-2022.zip from zenodo.org/records/7960856, then `python -m data_prep.prepare ISLES2022 --raw DIR --out DATA`"
)


def raw_cases(root: Path) -> list[RawCase]:
    """The cases at any depth below a folder, sorted, with the channels DWI and ADC and the lesion mask.

    These three share a grid; FLAIR lies on another one in every case and is not used. Masks may be empty: in three
    cases no lesion was found. Raises DataError where there is no case at all; a missing or repeated file is the
    problem of its case.
    """
    files = defaultdict(lambda: {kind: [] for kind in KINDS})
    for folder, names in below(root):
        for name in names:
            if found := FILE.fullmatch(name):
                files[found[1]][found[2]].append(folder / name)
    if not files:
        raise wrong_folder(root, f"sub-strokecase0001/ses-0001/dwi and derivatives at any depth: {HOW_TO_GET}")
    return [_case(case, files[case]) for case in sorted(files)]


def _case(case: str, files: dict[str, list[Path]]) -> RawCase:
    problem = ""
    for kind in KINDS:
        name = f"{case}_ses-0001_{kind}.nii.gz"
        if not files[kind]:
            near = next(found[0] for found in files.values() if found)
            problem = problem or f"{near.parent}: no {name} for this case, expected DWI, ADC and mask"
        elif len(files[kind]) > 1:
            problem = problem or f"{files[kind][1]}: {kind} of {case} again, expected {files[kind][0]} only"
    images = tuple(path for kind in ("dwi", "adc") for path in files[kind][:1])
    label = next(iter(files["msk"]), None)
    return RawCase(case, images, label, {0: 0, 1: 1}, case, may_be_empty=True, problem=problem)


CLEAN = Recipe(
    dataset="ISLES2022",
    name="clean",
    version=1,
    about="RAS, 2 mm, the grid of three quarters of the scans; the box around the head by intensity with 5 mm to "
    "spare; z-score per channel, which also takes away that ADC maps come in three different units; bright ends are "
    "kept, since fresh lesions are what is brightest in DWI",
    spacing=SPACING,
    crop=Crop("foreground", margin=(5, 5, 5)),
    after=(Step("zscore", {"over": "foreground"}),),
)
RECIPES = {CLEAN.name: CLEAN}

CV5 = Protocol(
    name="cv5",
    about="Five folds, DWI and ADC: patches of 160 x 160 x 128 mm, most of a brain",
    split="ISLES2022-cv5",
    patch=(80, 80, 64),
    stride=(40, 40, 32),
    iterations=30000,
    labeled=(10, 20, 40),
    schedule="poly",
    recipe="clean",
)

SPEC = DatasetSpec(
    name="ISLES2022",
    title="Stroke lesions in diffusion-weighted MRI, challenge ISLES 2022",
    modality="DWI MRI",
    classes=("background", "stroke lesion"),
    spacing=SPACING,
    citation="Hernandez Petzsche et al., ISLES 2022: A multi-center magnetic resonance imaging stroke lesion "
    "segmentation dataset, Scientific Data 9, 2022",
    how_to_get=HOW_TO_GET,
    open=opener("ISLES2022"),
    protocols={CV5.name: CV5},
    modalities=("DWI", "ADC"),
)

SPECS = {SPEC.name: SPEC}
