"""Own data as an archive like any other: a folder in nnU-Net's or the Medical Decathlon's layout, or a CSV of paths."""

import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.make_splits import FOLDS, Fold, cv5, mixed
from data_prep.parallel import hushed
from data_prep.raw import Archive, RawCase, wrong_folder
from data_prep.recipes import Crop, Recipe, Step
from data_prep.scans import ITK, LPS, MM, NIFTI, read_scan, spacing_of
from data_prep.spec import DataError, Protocol, ids_sha256, names_a_file

ENDINGS = (*NIFTI, *ITK)
JSON, SPLITS = "dataset.json", "splits_final.json"
IMAGES, LABELS, UNLABELED = "imagesTr", "labelsTr", "imagesUnlabeled"
LAYOUTS = (f"{JSON} with {IMAGES} and {LABELS} as for nnU-Net or of the Medical Decathlon, or a CSV file with the "
           "columns id, image, label")
RESERVED = ("id", "label", "patient", "group", "fold")  # columns of a CSV; any other one is a modality
COLUMNS = "id, image (or a column for each modality), label and, where known, patient, group, fold"
CHANNEL = re.compile(r"(.+)_(\d{4})")  # nnU-Net has a file per channel: CASE_0000
CT = re.compile(r"(?:nc|ce|cb|ld|hr)?ct[ap]?\d*")  # a word in the name of a channel: CT, CTA, NCCT, and not "direct"
HU = {"low": -500, "high": 500}
BLOCK, VOXELS = 16, 112 * 112 * 80  # what networks can halve four times, and the volume of LA's patch

_log = logging.getLogger(__name__)


class _Found(NamedTuple):
    """What a layout tells: names of classes by label value, regions as unions of label values, folds as nnU-Net's."""

    modalities: tuple[str, ...]
    names: dict[int, str]
    cases: list[RawCase]
    folds: list[dict[str, list[str]]] | None
    regions: Mapping[str, tuple[int, ...]] = {}
    title: str = ""
    citation: str = ""


def archive(name: str, root: Path) -> Archive:
    """The data set in a folder with `dataset.json`, or of a CSV file (that one, or the only one in the folder).

    What is wrong with a case is its `problem`. Label values become classes in their order; `folds` are those of
    `splits_final.json` or of the column `fold`; the spacing of the recipe is the median of the headers. Raises
    DataError where nothing can be used.
    """
    root = Path(root)
    tables = sorted(path for path in root.glob("*.csv") if path.name[0] != ".") if root.is_dir() else []
    if root.is_file() and root.suffix.lower() == ".csv":
        found = _table(root)
    elif (root / JSON).is_file():
        found = _folder(root)
    elif len(tables) == 1:
        found = _table(tables[0])
    elif root.suffix.lower() == ".csv" and not root.exists():
        raise DataError(f"{root}: no such file, expected {LAYOUTS}")
    else:
        raise wrong_folder(root, LAYOUTS)
    usable = [case for case in found.cases if not case.problem]
    if not any(case.label for case in usable):
        why = next((case.problem for case in found.cases if case.problem), "no case has one")
        raise DataError(f"{root}: nothing with a label can be used ({why}), expected scans with labels")
    classes = {value: number for number, value in enumerate(sorted(found.names))}
    with hushed():
        spacing = _usual_spacing(usable)
    recipe = _recipe(name, found.modalities, spacing)
    return Archive(
        name=name,
        title=found.title or name,
        modality=", ".join(found.modalities),
        modalities=found.modalities,
        classes=tuple(found.names[value] for value in classes),
        regions={region: tuple(classes[value] for value in values) for region, values in found.regions.items()},
        citation=found.citation,
        source="raw",
        spacing_known=True,
        cases=tuple(replace(case, values=classes) for case in sorted(found.cases, key=lambda case: case.id)),
        recipe=recipe,
        replay=recipe,
        folds=found.folds,
    )


def folds(archive: Archive, done: Collection[str]) -> list[Fold]:
    """Folds over the cases with these ids, as lists "train", "test" and "extra": those given, else by rule.

    By rule there are five, or as many as patients with labels; patients stay whole, groups have equal shares, and the
    seed follows from the ids alone. "extra" are cases without label, but none of a patient under test. Raises DataError
    for fewer than two patients with labels, and for a given fold that has nothing left to train or to test.
    """
    done = set(done)
    cases = [case for case in archive.cases if case.id in done]
    patients = {case.id: case.patient for case in cases}
    labeled = [case for case in cases if case.label]
    if archive.folds:
        result = [{"train": [case for case in fold["train"] if case in patients],
                   "test": [case for case in fold["val"] if case in patients]} for fold in archive.folds]
    else:
        result = _by_rule(archive.name, labeled)
    for number, fold in enumerate(result):
        for part in ("train", "test"):
            if not fold[part]:
                raise DataError(f"{archive.name}: no usable {part} case in fold {number}, expected at least one")
        tested = {patients[case] for case in fold["test"]}
        fold["extra"] = [case.id for case in cases if not case.label and case.patient not in tested]
    return result


def per_patient(archive: Archive, folds: Sequence[Fold]) -> int:
    """How many cases every patient has, where all have the same number and it stands together in the folds; else 1."""
    patients = {case.id: case.patient for case in archive.cases}
    rows = [[patients[case] for case in fold["train"]] for fold in folds]
    counts = {count for row in rows for count in Counter(row).values()}
    count = counts.pop() if len(counts) == 1 else 1
    return count if all(row[i] == row[i - i % count] for row in rows for i in range(len(row))) else 1


def protocols(
    shapes: Sequence[Sequence[int]], spacings: Sequence[Sequence[float]], labeled: int, classes: Sequence[str] = ()
) -> dict[str, Protocol]:
    """The protocol cv5 for stored cases with these shapes (x, y, z) and spacings in mm.

    `labeled` is how many patients (cases, where each has one) the smallest train list has. Where `classes` tell left
    from right, nothing is flipped.
    """
    shape = [float(n) for n in np.median(np.array(shapes), axis=0)]
    spacing = [float(mm) for mm in np.median(np.array(spacings), axis=0)]
    patch = _patch(shape, spacing)
    words = {word for name in classes for word in re.split("[^a-z]+", name.lower())}
    turned = abs(spacing[0] - spacing[1]) <= 0.01 * spacing[0] and not {"left", "right"} <= words
    counts = [2**n for n in range(1, 20) if 4 * 2**n <= labeled][-3:]
    about = (
        f"Own data: the median case has {_product(shape)} voxels of {_product(spacing)} mm; the patch is as even in mm "
        f"as the case, sides in multiples of {BLOCK} and {VOXELS} voxels in all allow; "
        f"{'turned and flipped in the plane' if turned else 'neither turned nor flipped'}"
    )
    protocol = Protocol(
        name="cv5",
        about=about,
        split="cv5",
        patch=patch,
        stride=tuple(n // 2 for n in patch),
        iterations=6000,
        labeled=tuple(counts) or (max(1, labeled // 2),),
        augmentation=("dihedral",) if turned else (),  # rotflip has mirrored crops alone
        recipe="clean",
    )
    return {protocol.name: protocol}


def _patch(shape: Sequence[float], spacing: Sequence[float]) -> tuple[int, ...]:
    """Of all patches in whole blocks that fit into a case and into VOXELS the one whose shortest side has most mm.

    Sides as long as the case do not count, and between equals the patch with most voxels is taken.
    """
    # of an axis with 25 to 31 voxels a single block would leave out more than a third
    longest = [BLOCK * max(int(n // BLOCK), 2 if n > 1.5 * BLOCK else 1) for n in shape]
    sides = np.meshgrid(*(np.arange(BLOCK, n + 1, BLOCK) for n in longest), indexing="ij")
    patches = np.stack(sides, axis=-1).reshape(-1, len(longest))
    patches = patches[patches.prod(axis=1) <= VOXELS]
    shortest = np.where(patches == longest, np.inf, patches * spacing).min(axis=1)
    best = np.lexsort((-patches.prod(axis=1), -shortest))[0]
    return tuple(int(n) for n in patches[best])


def _product(values: Iterable[float]) -> str:
    return " x ".join(f"{round(value, 3):g}" for value in values)


def _recipe(name: str, modalities: Sequence[str], spacing: tuple[float, ...]) -> Recipe:
    """The clean recipe for CT, or for scans whose intensities have no unit."""
    grid = f"RAS, {_product(spacing)} mm, the median of the headers per axis; "
    if all(any(map(CT.fullmatch, re.split("[^a-z0-9]+", modality.lower()))) for modality in modalities):
        return Recipe(
            dataset=name,
            name="clean",
            version=1,
            about=grid + "the box of the body; HU clipped to [-500, 500], which keeps every soft tissue, contrast "
            "medium, the border of the lungs and spongy bone apart without a guess at the organ; z-score over the body",
            spacing=spacing,
            crop=Crop("body", margin=(5, 5, 5)),
            after=(Step("clip", HU), Step("zscore", {"over": "foreground"})),
        )
    over = {"over": "foreground"}
    return Recipe(
        dataset=name,
        name="clean",
        version=1,
        about=grid + "the box of what is brighter than air with 10 mm to spare; outermost half percent of it clipped, "
        "z-score over it, per channel",
        spacing=spacing,
        crop=Crop("foreground", margin=(10, 10, 10)),
        after=(Step("clip_quantiles", {"low": 0.005, "high": 0.995} | over), Step("zscore", over)),
    )


def _by_rule(name: str, cases: Sequence[RawCase]) -> list[Fold]:
    patients, groups = _patients(cases)
    if len(patients) < 2:
        raise DataError(f"{name}: {len(patients)} patients with labels, expected at least 2 for folds")
    made = cv5(_seed(cases), groups, min(FOLDS, len(patients)))
    return [{part: [case for patient in fold[part] for case in patients[patient]] for part in fold} for fold in made]


def _patients(cases: Sequence[RawCase]) -> tuple[dict[str, list[str]], list[list[str]]]:
    """Cases by patient, and the patients of each group."""
    patients, groups = defaultdict(list), defaultdict(list)
    for case in cases:
        if case.patient not in patients:
            groups[case.group].append(case.patient)
        patients[case.patient].append(case.id)
    return dict(patients), [groups[group] for group in sorted(groups)]


def _seed(cases: Sequence[RawCase]) -> int:
    return int(ids_sha256(sorted(case.id for case in cases))[:8], 16)


def _folder(root: Path) -> _Found:
    """Own data in nnU-Net's layout of version 2 or 1, or the Medical Decathlon's."""
    path = root / JSON
    content = _json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: a JSON {type(content).__name__}, expected an object with channel_names and labels")
    modalities = _modalities(path, content)
    names, regions = _labels(path, content.get("labels"))
    ending = content.get("file_ending", "")
    if ending and ending not in ENDINGS:
        raise DataError(f"{path}: file_ending {ending!r}, expected one of {', '.join(ENDINGS)}")
    explicit, listed = content.get("dataset"), content.get("training")
    if isinstance(explicit, dict) and explicit:
        cases = [_explicit(path, case, entry, modalities) for case, entry in explicit.items()]
    elif listed and "channel_names" not in content:
        cases = [_listed(path, entry, modalities) for entry in listed]
    else:
        cases = _scanned(root, ending, modalities)
    told, trained = content.get("numTraining"), sum(case.label is not None for case in cases)
    if told not in (None, trained):
        _log.warning("%s: numTraining is %s, found %d cases with a label", path, told, trained)
    # the Decathlon has one file per case, whatever its name ends in
    separate = "channel_names" in content or any(case.images and _stem(case.images[0]) != case.id for case in cases)
    known = {case.id for case in cases}
    for case, files in _grouped(root / UNLABELED, ending, separate).items():
        again = f"{root / UNLABELED}: {case} is in {IMAGES} too, expected every case once" if case in known else ""
        cases.append(_case(f"{case} ({UNLABELED})" if again else case, files, None, modalities, again))
    told = {key: " ".join(str(content.get(key) or "").split()) for key in ("name", "dataset_name", "reference")}
    title, citation = told["name"] or told["dataset_name"], told["reference"]
    return _Found(modalities, names, _checked(path, cases), _given(root, cases), regions, title, citation)


def _modalities(path: Path, content: Mapping[str, Any]) -> tuple[str, ...]:
    key = "channel_names" if "channel_names" in content else "modality"
    entry = content.get(key)
    try:
        pairs = enumerate(entry) if isinstance(entry, list) else [(int(number), name) for number, name in entry.items()]
        numbered = sorted((number, str(name)) for number, name in pairs)
        if not numbered or [number for number, _ in numbered] != list(range(len(numbered))):
            raise ValueError
    except (AttributeError, TypeError, ValueError):
        raise DataError(f"{path}: {key} is {entry!r}, expected names of channels by number from 0") from None
    names = [name for _, name in numbered]
    # channels are picked by name, so that no two may share one
    return tuple(name if names.count(name) == 1 else f"{name} {number}" for number, name in numbered)


def _labels(path: Path, entry: Any) -> tuple[dict[int, str], dict[str, tuple[int, ...]]]:
    """Names by value, and regions where a name stands for several values: `{name: value}` or `{value: name}`."""
    if not isinstance(entry, dict) or not entry:
        raise DataError(f"{path}: labels is {entry!r}, expected names and values, background 0 among them")
    first_version = all(key.isdecimal() and isinstance(name, str) for key, name in entry.items())
    pairs = [(name, key) for key, name in entry.items()] if first_version else list(entry.items())
    unions = {}
    for name, value in pairs:
        try:
            numbers = tuple(int(str(number)) for number in (value if isinstance(value, list) else [value]))
        except (TypeError, ValueError):
            numbers = ()
        if not numbers or min(numbers) < 0:
            raise DataError(f"{path}: label {name!r} is {value!r}, expected a whole number from 0 or a list of them")
        if name.lower() == "ignore":
            raise DataError(f"{path}: labels have 'ignore' ({value}), expected scans that are annotated everywhere")
        unions[name] = numbers
    single = [(numbers[0], name) for name, numbers in unions.items() if len(numbers) == 1]
    names = dict(single)
    if len(names) < len(single) or 0 not in names:
        raise DataError(f"{path}: labels are {entry!r}, expected one name for each value, background 0 among them")
    regions = {name: numbers for name, numbers in unions.items() if numbers != (0,)}
    if all(len(numbers) == 1 for numbers in regions.values()):
        regions = {}
    names |= {value: f"label {value}" for numbers in regions.values() for value in numbers if value not in names}
    return _counted(path, names), regions


def _counted(path: Path, names: dict[int, str]) -> dict[int, str]:
    if not 2 <= len(names) <= 256:
        raise DataError(f"{path}: {len(names)} label values, expected background and 1 to 255 classes")
    return names


def _scanned(root: Path, ending: str, modalities: Sequence[str]) -> list[RawCase]:
    """Cases by what is in the folders for training: images and labels of the same names."""
    if not ((root / IMAGES).is_dir() and (root / LABELS).is_dir()):
        raise wrong_folder(root, f"{IMAGES} and {LABELS} beside {JSON}")
    images, labels = _grouped(root / IMAGES, ending, True), _scans(root / LABELS, ending)
    cases = []
    for case in sorted({*images, *labels}):
        problem = ""
        if case not in images:
            problem = f"{labels[case]}: a label without an image, expected {case}_0000 in {root / IMAGES}"
        elif case not in labels:
            problem = (f"{next(iter(images[case].values()))}: an image without a label, expected {case} in "
                       f"{root / LABELS} (what has no label belongs into {UNLABELED})")
        cases.append(_case(case, images.get(case, {}), labels.get(case), modalities, problem))
    if not cases:
        raise wrong_folder(root / IMAGES, f"CASE_0000{ending or '.nii.gz'} and so on")
    return cases


def _listed(path: Path, entry: Any, modalities: Sequence[str]) -> RawCase:
    """A case of the list "training": one file, 4D where it has several channels, or nnU-Net's file per channel."""
    try:
        image, label = (path.parent / entry[key] for key in ("image", "label"))
    except (KeyError, TypeError):
        raise DataError(f"{path}: training has {entry!r}, expected paths as image and label") from None
    case = _stem(image)
    parts = {n: image.with_name(f"{case}_{n:04d}{image.name[len(case):]}") for n in range(len(modalities))}
    return _case(case, parts if parts[0].exists() and not image.exists() else {None: image}, label, modalities)


def _explicit(path: Path, case: str, entry: Any, modalities: Sequence[str]) -> RawCase:
    """A case of nnU-Net's entry "dataset", which names the files of all channels."""
    try:
        images, label = [path.parent / image for image in entry["images"]], path.parent / entry["label"]
    except (KeyError, TypeError):
        raise DataError(f"{path}: dataset has {case!r} as {entry!r}, expected paths as images and label") from None
    return _case(case, dict(enumerate(images)), label, modalities)


def _case(
    case: str, files: Mapping[int | None, Path], label: Path | None, modalities: Sequence[str], problem: str = ""
) -> RawCase:
    """A case of one file per channel, or of one file under None that holds all channels."""
    places = [*files.values(), *([label] if label else [])]
    whole = list(files) == [None]
    if not problem and not whole and set(files) != set(range(len(modalities))):
        found = ", ".join(path.name for path in files.values())
        problem = f"{places[0].parent}: {found} for {case}, expected a file per channel: " + ", ".join(
            f"_{number:04d} {name}" for number, name in enumerate(modalities))
    missing = [place for place in places if not place.exists()]
    if not problem and missing:
        problem = f"{missing[0]}: no such file, expected it for case {case}"
    channels = len(modalities) if whole and len(modalities) > 1 else None
    return RawCase(case, tuple(files.values()), label, patient=case, channels=channels, problem=problem)


def _grouped(folder: Path, ending: str, separate: bool) -> dict[str, dict[int | None, Path]]:
    """Files of a folder by case and channel; the channel is None where a file is not CASE_0000 or not `separate`."""
    cases = defaultdict(dict)
    for stem, path in _scans(folder, ending).items():
        found = CHANNEL.fullmatch(stem) if separate else None
        cases[found[1] if found else stem][int(found[2]) if found else None] = path
    # nnU-Net's own scripts read no other names, so neither may one pass here as a case of one channel
    return {case: {-1 if separate and key is None else key: path for key, path in cases[case].items()}
            for case in sorted(cases)}


def _scans(folder: Path, ending: str) -> dict[str, Path]:
    """Scans in a folder by their names without ending; hidden files (and the ._ ones of macOS) do not count."""
    endings = (ending,) if ending else ENDINGS
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return {_stem(path): path for path in paths if path.name[0] != "." and path.name.lower().endswith(endings)}


def _stem(path: Path) -> str:
    return next((path.name[: -len(end)] for end in ENDINGS if path.name.lower().endswith(end)), path.name)


def _checked(path: Path, cases: Sequence[RawCase]) -> list[RawCase]:
    """The cases with ids that name a file each; of a repeated one the first is kept, as a problem."""
    counts, kept = Counter(case.id for case in cases), {}
    for case in cases:
        problem = case.problem
        if counts[case.id] > 1:
            problem = f"{path}: case {case.id} is listed {counts[case.id]} times, expected every id once"
        elif not names_a_file(case.id):
            problem = f"{path}: case {case.id!r} cannot name a file, expected an id in UTF-8 without slashes"
        kept.setdefault(case.id, replace(case, problem=problem))
    return list(kept.values())


def _given(folder: Path, cases: Sequence[RawCase]) -> list[dict[str, list[str]]] | None:
    """The folds of nnU-Net's `splits_final.json` in a folder, if it is there. Raises DataError for unfit ones."""
    path = folder / SPLITS
    if not path.is_file():
        return None
    content = _json(path)
    try:
        found = [{part: [str(case) for case in fold[part]] for part in ("train", "val")} for fold in content]
    except (KeyError, TypeError):
        found = []
    if not found:
        raise DataError(f"{path}: no list of folds, expected lists train and val in each, as nnU-Net writes them")
    patients = {case.id: case.patient for case in cases if case.label or case.problem}
    for number, fold in enumerate(found):
        both = fold["train"] + fold["val"]
        unknown = [case for case in both if case not in patients]
        if unknown:
            raise DataError(f"{path}: fold {number} has {unknown[0]!r} ({len(unknown)} such ids), expected ids of "
                            f"cases with labels, such as {next(iter(patients))!r}")
        if len(set(both)) < len(both):
            twice = next(case for case, count in Counter(both).items() if count > 1)
            raise DataError(f"{path}: fold {number} has {twice!r} twice, expected every case once in train or val")
        shared = {patients[case] for case in fold["train"]} & {patients[case] for case in fold["val"]}
        if shared:
            raise DataError(f"{path}: fold {number} trains and tests on patient {min(shared)!r}, expected all cases of "
                            "a patient on one side")
    return found


def _table(path: Path) -> _Found:
    """Own data as a CSV lists it, with paths relative to its folder."""
    import csv

    import pandas as pd

    try:
        # without a header, or pandas renames a repeated column and takes surplus ones for an index
        frame = pd.read_csv(path, sep=None, engine="python", dtype=str, keep_default_na=False, encoding="utf-8-sig",
                            header=None)
    except (OSError, ValueError, csv.Error) as error:
        reason = "it is not in UTF-8" if isinstance(error, UnicodeDecodeError) else " ".join(str(error).split())
        raise DataError(f"{path}: not readable as a table ({reason}), expected a CSV file in UTF-8 with the columns "
                        f"{COLUMNS}") from None
    frame = frame.fillna("").map(str.strip)
    frame = frame.loc[(frame != "").any(axis=1), (frame != "").any()]  # spreadsheets append empty rows and columns
    names, frame = (list(frame.iloc[0]) if len(frame) else []), frame[1:]
    frame.columns = [name.lower() if name.lower() in RESERVED else name for name in names]
    modalities = tuple(name for name in frame.columns if name not in RESERVED)
    if not modalities or not {"id", "label"} <= set(frame.columns) or len(set(frame.columns)) < len(names):
        raise DataError(f"{path}: columns {', '.join(names) or 'none'}, expected {COLUMNS}")
    rows = frame.to_dict("records")
    for name in modalities:
        named = [row[name] for row in rows if row[name]]
        if not any((path.parent / place).exists() for place in named):
            first = f"such as {path.parent / named[0]}" if named else "it is empty"
            raise DataError(f"{path}: column {name!r} names no file that exists ({first}), expected paths from the "
                            f"folder of the table; its columns are {COLUMNS}")
    for row in rows:
        row["patient"] = row.get("patient") or row["id"]
    groups, _ = _of_patients(path, rows, "group"), _of_patients(path, rows, "fold")
    cases, images = [], {row[name] for row in rows for name in modalities} - {""}
    for row in rows:
        empty = [name for name in modalities if not row[name]]
        problem = f"{path}: case {row['id']!r} has no {empty[0]}, expected a path" if empty else ""
        if row["label"] in images:  # its values would become classes of all cases
            problem = f"{path}: case {row['id']!r} has the image {row['label']} as its label, expected a label"
        files = {number: path.parent / row[name] for number, name in enumerate(modalities)}
        label = path.parent / row["label"] if row["label"] else None
        case = _case(row["id"], files, label, modalities, problem)
        cases.append(replace(case, patient=row["patient"], group=groups.get(row["patient"], "")))
    cases = _checked(path, cases)
    return _Found(modalities, _names(path, cases), cases, _folds_of(path, rows, cases) or _given(path.parent, cases))


def _of_patients(path: Path, rows: Sequence[Mapping[str, str]], column: str) -> dict[str, str]:
    """What a column says of every patient. Raises DataError where it says two things of one."""
    found: dict[str, str] = {}
    for row in rows:
        value, patient = row.get(column), row["patient"]
        if value and found.setdefault(patient, value) != value:
            raise DataError(f"{path}: patient {patient!r} has {column} {found[patient]!r} and {value!r}, expected all "
                            f"cases of a patient in one {column}")
    return found


def _folds_of(
    path: Path, rows: Sequence[Mapping[str, str]], cases: Sequence[RawCase]
) -> list[dict[str, list[str]]] | None:
    """Folds by a column that says in which one a case is tested; cases without a number are never tested."""
    tested = {row["id"]: row["fold"] for row in rows if row.get("fold") and row["label"]}
    if not tested:
        return None
    wrong = next((value for value in tested.values() if not value.isdecimal()), None)
    if wrong is not None:
        raise DataError(f"{path}: fold {wrong!r}, expected the number of the fold in which the case is tested")
    labeled = [case for case in cases if case.label]
    patients, groups = _patients(labeled)
    folds = []
    for k, number in enumerate(sorted({int(value) for value in tested.values()})):
        test = [case for case in sorted(tested) if int(tested[case]) == number]
        away = [patient for patient in patients if set(patients[patient]) & set(test)]
        train = mixed(_seed(labeled), k, groups, away)
        folds.append({"train": [case for patient in train for case in patients[patient]], "val": test})
    return folds


def _names(path: Path, cases: Sequence[RawCase]) -> dict[int, str]:
    """Classes as the labels have them, since a table does not tell: every whole number in any of them."""
    labels = [case.label for case in cases if case.label and not case.problem]
    with hushed(), ThreadPoolExecutor(2) as pool:  # each holds a whole label
        found = dict(zip(labels, pool.map(_values, labels), strict=True))
    values = sorted(set().union(*found.values()))
    if len(values) > 256:
        most = max(found, key=lambda label: len(found[label]))
        raise DataError(f"{most}: {len(found[most])} label values, expected at most 256 in all labels of {path}")
    # nothing but background, or none that can be read: reading the cases says why
    return {value: f"label {value}" if number else "background" for number, value in enumerate(values or [0])}


def _values(path: Path) -> set[int]:
    """Values of a label from 0, none where it cannot be one: reading the case says why."""
    try:
        voxels = read_scan(path, contrast=False).voxels
    except DataError:
        return set()
    low, high = voxels.min(), voxels.max()
    if not -(2**15) <= low <= high < 2**15 or any((plane % 1).any() for plane in voxels):
        return set()
    seen = np.zeros(int(high) - int(low) + 1, bool)
    for plane in voxels:  # one at a time: as indices a whole CT takes gigabytes
        seen[plane.astype(np.intp) - int(low)] = True
    return {value for value in (np.flatnonzero(seen) + int(low)).tolist() if value >= 0}


def _usual_spacing(cases: Sequence[RawCase]) -> tuple[float, ...]:
    """Median in mm along x, y and z, a value that occurs, so that most scans stay as they are along most axes."""
    found, error = [], None
    for case in cases:
        try:
            found.append(_spacing(case.images[0]))
        except DataError as problem:
            error = error or problem
    if not found:
        raise error
    return tuple(float(f"{mm:.6g}") for mm in np.quantile(np.array(found), 0.5, axis=0, method="lower"))


def _spacing(path: Path) -> tuple[float, ...]:
    """Of one scan along x, y and z, from the header alone; a series of slices has none and is read."""
    import nibabel as nib
    import SimpleITK as sitk

    suffix = next((end for end in ENDINGS if path.name.lower().endswith(end)), "")
    try:
        if suffix in NIFTI:
            header = nib.load(path)
            affine = np.array(header.affine) * MM.get(int(header.header["xyzt_units"]) % 8, 1.0)
        elif suffix:
            reader = sitk.ImageFileReader()
            reader.SetFileName(str(path))
            reader.SetImageIO(ITK[suffix])
            reader.ReadImageInformation()
            axes = reader.GetDimension()
            affine = np.eye(4)
            affine[:3, :3] = np.array(reader.GetDirection()).reshape(axes, axes)[:3, :3] * reader.GetSpacing()[:3]
            affine = LPS @ affine
        else:
            affine = read_scan(path).affine
        axes = nib.io_orientation(affine)[:, 0]
    except Exception as error:  # damaged bytes raise anything
        raise DataError(f"{path}: no readable header ({' '.join(str(error).split())[:200]}), expected a scan") from None
    mm = np.array(spacing_of(affine))[np.argsort(axes)]
    if not np.isfinite(mm).all() or mm.min() <= 0:
        raise DataError(f"{path}: spacing {_product(mm)} mm, expected numbers above 0")
    return tuple(mm)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not readable as JSON ({reason}), expected what nnU-Net has under this name") from None
