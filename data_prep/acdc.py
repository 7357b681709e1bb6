"""ACDC: cine MRI of the heart, the frames ED and ES of every patient, with both ventricles and the myocardium."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data_prep.make_splits import ACDC_GROUPS
from data_prep.raw import H5Case, RawCase, below, wrong_folder
from data_prep.recipes import Crop, Recipe, Step
from data_prep.spec import DataError, DatasetSpec, Protocol
from data_prep.store import opener

SPACING = (1.5625, 1.5625, 10.0)  # the usual one; 0.7 to 1.9 mm in the plane, 5 to 10 mm across
CLASSES = ("background", "right ventricle", "myocardium", "left ventricle")
VALUES = {value: value for value in range(len(CLASSES))}
PATIENT = re.compile(r"patient(\d{3})")
LABEL = re.compile(r"patient\d{3}_frame(\d+)_gt")
H5_SPACING_KNOWN = False  # the published files do not tell it
H5_FILE = re.compile(r"(patient\d{3}_frame0[12])(?:_slice_(\d+))?\.h5")
HOW_TO_GET = (
    "register at humanheart-project.creatis.insa-lyon.fr/database for the folders training and testing, then "
    "`python -m data_prep.prepare ACDC --raw DIR --out DATA`, or --from-h5 DIR for the files published with SSL4MIS"
)

RECIPES = {
    "paper": Recipe(
        dataset="ACDC",
        name="paper",
        version=1,
        about="SSL4MIS's: every frame from 0 to 1 by its own least and greatest value, nothing cropped or resampled; "
        "the axes as in the file",
        orientation=None,
        after=(Step("minmax"),),
    ),
    "clean": Recipe(
        dataset="ACDC",
        name="clean",
        version=1,
        about="without the label: the box of the body in the plane, 1.5625 mm in the plane and the slices as acquired, "
        "since what lies between planes 5 to 10 mm apart is not known; the outermost half percent of the body's voxels "
        "clipped, z-scored over them",
        spacing=(*SPACING[:2], None),
        crop=Crop("foreground", margin=(5, 5, None)),
        after=(Step("clip_quantiles", {"low": 0.005, "high": 0.995, "over": "foreground"}),
               Step("zscore", {"over": "foreground"})),
    ),
}


def raw_cases(root: Path) -> list[RawCase]:
    """Both annotated frames of every patient at any depth below a folder, sorted; the earlier one is frame01.

    Patients of a folder `testing` without any label are unlabeled, as the older download has them. Raises DataError
    where there is no patient at all; what is wrong with a patient is the problem of its cases.
    """
    folders = defaultdict(list)
    for folder, _ in below(root):
        if PATIENT.fullmatch(folder.name):
            folders[folder.name].append(folder)
    if not folders:
        raise wrong_folder(root, "the archive of ACDC with training/patient001/Info.cfg")
    return [case for patient in sorted(folders) for case in _frames(root, patient, folders[patient])]


def h5_cases(root: Path) -> list[H5Case]:
    """The frames published with SSL4MIS, `data/*.h5`, else put together from `data/slices/*.h5`, sorted.

    Nothing in these files tells the spacing, so it is the usual one. Raises DataError where there is no such file.
    """
    files = defaultdict(lambda: defaultdict(list))
    for folder, names in below(root):
        for name in names:
            if found := H5_FILE.fullmatch(name):
                case, number = found.groups()
                files[case][number and int(number)].append(folder / name)
    if not files:
        raise wrong_folder(root, "SSL4MIS's data/patient001_frame01.h5 or data/slices/patient001_frame01_slice_1.h5")
    return [_h5_case(case, files[case]) for case in sorted(files)]


def _frames(root: Path, patient: str, folders: list[Path]) -> Iterator[RawCase]:
    ids = [f"{patient}_frame0{n}" for n in (1, 2)]
    folder, *others = folders
    try:
        if others:
            raise DataError(f"{others[0]}: {patient} again, expected it in {folder} only")
        frames, group = _info(folder)
        files = {path.name.removesuffix(".gz").removesuffix(".nii"): path for path in sorted(folder.iterdir())}
        annotated = sorted(int(found[1]) for name in files if (found := LABEL.fullmatch(name)))
        if not set(annotated) <= set(frames):
            raise DataError(f"{folder}: annotated frames {', '.join(map(str, annotated))}, expected "
                            f"{frames[0]} and {frames[1]}, ED and ES of Info.cfg")
    except DataError as error:
        yield from (RawCase(case, patient=patient, problem=str(error)) for case in ids)
        return
    unlabeled = not annotated and "testing" in folder.relative_to(root.parent).parts
    for case, frame in zip(ids, frames, strict=True):
        named = f"{patient}_frame{frame:02d}"
        own, whole, label = (files.get(name) for name in (named, f"{patient}_4d", f"{named}_gt"))
        problem = ""
        if not (own or whole):
            problem = f"{folder}: neither {named}.nii.gz nor {patient}_4d.nii.gz, expected one of them"
        elif not (label or unlabeled):
            problem = f"{folder}: no {named}_gt.nii.gz, expected the label of each of the frames ED and ES"
        images = (own or whole,) if own or whole else ()
        yield RawCase(case, images, label, VALUES, patient, group, None if own else frame - 1, problem=problem)


def _info(folder: Path) -> tuple[list[int], str]:
    """The frames ED and ES in their order of time, counted from 1, and the pathology group, "" where none is told."""
    path = folder / "Info.cfg"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        raise DataError(f"{path}: no such file, expected one with the frames ED and ES") from None
    entries = dict(re.findall(r"^\s*(\w+)\s*:\s*(\S+)", text, re.MULTILINE))
    told = [entries.get(name, "missing") for name in ("ED", "ES")]
    frames = sorted(int(number) for number in told if number.isdecimal() and int(number) > 0)
    if len(set(frames)) != 2:
        raise DataError(f"{path}: ED {told[0]} and ES {told[1]}, expected the numbers of two frames")
    return frames, entries.get("Group", "")


def _h5_case(case: str, files: dict[int | None, list[Path]]) -> H5Case:
    """A frame from its volume, which has no number, or from its slices in the order of their numbers."""
    numbers = [None] if None in files else sorted(files)
    paths = [files[number][0] for number in numbers]
    again = next((path for number in numbers for path in files[number][1:]), None)
    problem = ""
    if again:
        problem = f"{again}: {again.stem} again, expected it in {paths[0].parent} only"
    elif None not in files and (gaps := sorted(set(range(min(numbers[0], 1), numbers[-1])) - set(numbers))):
        problem = f"{paths[0].parent}: no {case}_slice_{gaps[0]}.h5, expected all slices up to {numbers[-1]}"
    patient = case.split("_")[0]
    group = (int(patient.removeprefix("patient")) - 1) // 20
    return H5Case(
        id=case,
        files=tuple(paths),
        axes=(2, 1, 0),  # SimpleITK's arrays: slices, rows, columns
        spacing=SPACING,
        values=VALUES,
        patient=patient,
        group=ACDC_GROUPS[group] if group < len(ACDC_GROUPS) else "",
        problem=problem,
    )


VOLUMES = Protocol(
    name="volumes",
    about="Whole stacks, fixed split by patients: patches of few planes and many pixels, about 250 x 250 x 160 mm",
    split="ACDC-paper",
    # the heart with room to spare in the plane, and nearly every whole stack; shorter ones are filled up with zeros
    patch=(160, 160, 16),
    stride=(80, 80, 8),
    iterations=30000,
    labeled=(1, 3, 7, 14),
    schedule="poly",
)
CV5 = replace(
    VOLUMES,
    name="cv5",
    about="Whole stacks on five folds by patients, with other labeled patients in every fold",
    split="ACDC-cv5",
)
SLICES = Protocol(
    name="slices",
    about="The published recipe: 2D, slices of 256 x 256, fixed split by patients, scored as volumes",
    split="ACDC-paper",
    patch=(256, 256),
    stride=(256, 256),
    iterations=30000,
    labeled=(3, 7, 14),
    labeled_batch=12,
    unlabeled_batch=12,
    schedule="poly",
    network="unet",
    augmentation=("rotflip_or_rotate",),
    precision="32-true",
    published=True,
    slices=True,
)
SLICES_CV5 = replace(
    SLICES,
    name="slices_cv5",
    about="The published 2D sizes on five folds by patients, other labeled patients in every fold, 30000 iterations "
    "for every method",
    split="ACDC-cv5",
    published=False,
)
LITE = replace(
    SLICES,
    name="lite",
    about="2D slices of 128 x 128, 14 training and 7 test patients, half the width, 3000 iterations for every method",
    split="ACDC-lite",
    patch=(128, 128),
    stride=(128, 128),
    iterations=3000,
    labeled=(3, 7),
    width=8,
    precision="auto",
    published=False,
)

SPEC = DatasetSpec(
    name="ACDC",
    title="Heart in cine MRI, Automated Cardiac Diagnosis Challenge",
    modality="cine MRI",
    modalities=("cine MRI",),
    classes=CLASSES,
    spacing=SPACING,
    citation="Bernard et al., Deep learning techniques for automatic MRI cardiac multi-structures segmentation and "
    "diagnosis: is the problem solved?, IEEE Transactions on Medical Imaging 37(11), 2018",
    how_to_get=HOW_TO_GET,
    open=opener("ACDC"),
    protocols={protocol.name: protocol for protocol in (VOLUMES, CV5, SLICES, SLICES_CV5, LITE)},
)

SPECS = {SPEC.name: SPEC}
