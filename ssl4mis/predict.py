"""New scans to segmentations on the scans' own grids: replay the recipe of a run, segment, go back. No label is needed.

`predict` is the command; `Model.segment` is one scan.
"""
import hashlib
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_prep import DataError, recipes, scans
from data_prep.geometry import Geometry, labels_to_scanner, to_scanner
from data_prep.raw import RawCase
from data_prep.recipes import Recipe, Step
from data_prep.scans import Scan, write_scan
from data_prep.volumes import downsample_image, whole_file
from ssl4mis import evaluator, export
from ssl4mis.errors import UserError
from ssl4mis.inference import window_starts
from ssl4mis.method import Method, Task
from ssl4mis.progress import duration, paced
from ssl4mis.run import build_method, pick_device

LISTING = "predictions.json"
# other names of the same sequence, as the years of BraTS have them
SAME = {"t2f": "flair", "t1n": "t1", "t1w": "t1", "t1c": "t1ce", "t1gd": "t1ce", "t2w": "t2"}
# names of what is written here and of what archives call their labels: in a folder these are no scans
LABEL = re.compile(r"(^|[_.-])(seg|prob|gt|label|mask|msk|segmentation)$|^label[_-]?\d|^laendo$", re.IGNORECASE)
WORD = re.compile(r"[^\W_]+")
OFF = 1.5  # factor between voxel sides from which on a network sees another size of things


class Prediction(NamedTuple):
    """On the scan's own grid: class of every voxel (i, j, k) uint8, and where asked for (classes, i, j, k) float32."""

    labels: np.ndarray
    probabilities: np.ndarray | None


@dataclass(frozen=True)
class Model:
    """A trained method, the card that came with it, and the recipe that its scans go through."""

    card: dict
    method: Method
    recipe: Recipe
    device: torch.device

    @cached_property
    def predict(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Windows (B, C, *patch) -> class probabilities (B, K, *patch), computed in float32."""
        return evaluator.predictor(self.method, self.device)

    @property
    def classes(self) -> list[str]:
        """Names of the label values, background first."""
        return self.card["task"]["classes"]

    @property
    def channels(self) -> list[str]:
        """Names of the modalities in the order of the network's input."""
        return self.card["task"]["channels"]

    @property
    def slices(self) -> bool:
        """Whether a 2D network goes through a scan plane by plane."""
        return self.card["task"]["slices"]

    @property
    def patch(self) -> list[int]:
        """Window in voxels per axis."""
        return self.card["spec"]["patch"]

    def segment(
        self, scan: Scan, stride: Sequence[int], probabilities: bool = False, say=lambda text: None
    ) -> Prediction:
        """Segment a scan (channels, i, j, k); `stride` of the windows in voxels per axis of what the recipe gives.

        `say` hears how far it is, now and then. DataError where the recipe cannot be replayed.
        """
        image, _, geometry = recipes.apply(self.recipe, scan)
        self._compare(geometry, scan.path, say)
        if self.slices:
            labels = evaluator.segment_slices(self.predict, image, self.patch, self.device).numpy()
            return Prediction(to_scanner(labels, geometry), None)
        factor, space = self.card["input"]["downsample"], image.shape[1:]
        if factor > 1:
            # to whole blocks, so that nothing at the far faces is left out
            image = np.pad(image, [(0, 0), *((0, -n % factor) for n in space)], mode="edge")
            whole, image = image.shape[1:], downsample_image(image, factor)
        starts = window_starts(np.maximum(image.shape[1:], self.patch), self.patch, stride)
        tell, seen = paced(say, f"{scan.path.name}: windows", len(starts)), 0

        def watched(windows: torch.Tensor) -> torch.Tensor:
            nonlocal seen
            answer = self.predict(windows)
            seen += len(windows)
            tell(seen, "")
            return answer

        found = evaluator.probabilities(watched, image, self.patch, stride, self.device).numpy()
        if factor > 1:
            blocks = Geometry(whole, tuple(map(tuple, np.eye(4).tolist())), (0, 1, 2), (False,) * 3,
                              tuple((0, n) for n in whole), found.shape[1:])
            found = to_scanner(found, blocks, order=1)[..., : space[0], : space[1], : space[2]]
        labels = labels_to_scanner(found, geometry)
        background = [1.0] + [0.0] * (len(found) - 1)
        return Prediction(labels, to_scanner(found, geometry, 1, background) if probabilities else None)

    def _compare(self, geometry: Geometry, path: Path, say) -> None:
        """Say where the voxels are of another size than those of the training data."""
        known = self.card["input"]
        usual = np.array(known["spacing"]) / known["downsample"]
        found = np.array(geometry.stored_spacing)[: len(usual)]
        if known["spacing_known"] and np.any(np.maximum(usual / found, found / usual) > OFF):
            say(f"{path}: voxels of {_by(found)} mm, the network was trained at {_by(usual)} mm: expect little of it")


def load(name: str, results: Path, device: torch.device, say=print) -> Model:
    """The model of a run or of an export, ready to predict; UserError where there is none or it does not fit."""
    card, tensors = export.read(name, results, say)
    spec, task, known = export.run_spec(card), card["task"], card["input"]
    if task["dims"] == 2 and not task["slices"]:
        raise UserError(f"{card['id']}: segments 2D images, expected a run in 3D or one that goes through slices")
    shape = Task(len(task["classes"]), task["dims"], len(task["channels"]), (spec.labeled_batch, spec.unlabeled_batch))
    method = build_method(spec, shape, tuple(known["spacing"]))
    try:
        method.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{card['id']}: the weights do not fit {spec.method} on {spec.network} of this version "
                        f"({' '.join(str(error).split())[:200]})") from None
    method.eval().requires_grad_(False)
    if known["replay"]:
        recipe = Recipe.from_dict(known["replay"])
    else:
        say(f"{spec.dataset} has no recipe for scans: they are taken as they are, with a z-score")
        recipe = Recipe(spec.dataset, "as-it-is", 1, "z-score", None, after=(Step("zscore", {"over": "all"}),))
    return Model(card, method, recipe, device)


def predict(
    run: str, inputs: Sequence[Path], output: Path, *, results: Path = Path("results"), device: str = "auto",
    stride: Sequence[int] | None = None, probabilities: bool = False, preview: bool = False, overwrite: bool = False,
    say=print,
) -> list[str]:
    """Segment all scans behind the inputs into a folder; returns a line for each that could not be.

    A scan whose results are there already is skipped. UserError or DataError where nothing can be done at all, which
    for a single scan is what is wrong with it.
    """
    model = load(run, results, pick_device(device), say)
    steps = _stride(model, stride)
    if model.slices and probabilities:
        raise UserError("probabilities: this run goes through slices and gives labels only, expected a run in 3D")
    cases = find_scans(inputs, model.channels, output, say)
    kinds = ["seg", *["prob"] * probabilities, *["preview"] * preview]
    files = {case.id: {kind: output / _file(case, kind) for kind in kinds} for case in cases}
    made = {"model": model.card["id"], "iterations": model.card["training"]["iterations"], "recipe": model.recipe.id,
            "stride": steps, "classes": model.classes}
    listing = Listing(output, made)
    scanned = {case.id: _content(case) for case in cases}
    left = [case for case in cases if overwrite or not listing.holds(files[case.id].values(), scanned[case.id])]
    for case in left:
        listing.check(files[case.id].values(), scanned[case.id], overwrite)
    for line in _introduction(model, steps):
        say(line)
    if len(left) < len(cases):
        say(f"{len(cases) - len(left)} of {len(cases)} scans are skipped: their results are in {output} already")
    if left:
        listing.note((), {})  # before any work: where nothing can be written is known now
    failed = []
    for number, case in enumerate(left, 1):
        started, where = time.monotonic(), f"{number}/{len(left)} {case.id}"
        try:
            volumes = _predict_case(model, case, steps, files[case.id], scanned[case.id], listing, say)
        except DataError as error:
            if len(cases) == 1:
                raise
            failed.append(str(error))
            say(f"{where}: not possible")
            continue
        say(f"{where}: {volumes}; {duration(time.monotonic() - started)}: {files[case.id]['seg']}")
    return failed


def _content(case: RawCase) -> dict[str, str]:
    """Where a scan is and the SHA-256 of its files, so that a result is not taken for that of another scan."""
    digest = hashlib.sha256()
    try:
        for file in case.files:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    except OSError:  # said where the scan is read
        return {"scan": str(case.images[0]), "sha256": ""}
    return {"scan": str(case.images[0]) if case.images else "", "sha256": digest.hexdigest()}


def _predict_case(
    model: Model, case: RawCase, stride, files: dict[str, Path], scanned: dict[str, str], listing: "Listing", say
) -> str:
    """Write the results of one scan; returns the volumes of its classes in words."""
    scan, _ = case.read()
    try:
        found = model.segment(scan, stride, "prob" in files, say)
    except (MemoryError, torch.OutOfMemoryError):
        raise DataError(f"{scan.path}: {_by(scan.space)} voxels, more than the memory of this {model.device.type} "
                        "holds, expected a smaller scan or --device cpu") from None
    for file in files.values():  # before they are listed as this model's
        file.unlink(missing_ok=True)
    listing.note(files.values(), scanned)
    if "prob" in files:
        write_scan(files["prob"], found.probabilities, None, scan)
    if "preview" in files:
        write_preview(files["preview"], scan, found.labels, model.classes, case.id, model.card["id"])
    write_scan(files["seg"], found.labels, None, scan)
    voxel = abs(np.linalg.det(scan.affine[:3, :3])) / 1000  # in ml
    counts = np.bincount(found.labels.ravel(), minlength=len(model.classes))
    return ", ".join(f"{name} {n * voxel:.3g} ml" for name, n in zip(model.classes[1:], counts[1:], strict=True))


def _stride(model: Model, stride: Sequence[int] | None) -> list[int]:
    """The stride to use, half the window without one; UserError for one that leaves voxels out."""
    if model.slices:
        if stride:
            raise UserError(f"stride {list(stride)}: expected none, this run segments whole slices")
        return []
    if stride is None:
        return _half(model.patch)
    if len(stride) != len(model.patch) or not all(1 <= n <= p for n, p in zip(stride, model.patch, strict=True)):
        raise UserError(f"stride {list(stride)}: expected {len(model.patch)} numbers from 1 to those of the window, "
                        f"{model.patch}")
    return list(stride)


def _half(patch: Sequence[int]) -> list[int]:
    return [max(1, side // 2) for side in patch]


def _introduction(model: Model, stride: list[int]) -> Iterable[str]:
    spec = model.card["spec"]
    names = ", ".join(f"{value} {name}" for value, name in enumerate(model.classes))
    yield f"{model.card['id']}: {spec['method']}, labels {names}"
    if spec["dataset"] == "BraTS" and len(model.classes) == 4:
        yield "label 3 stands for the 4 of BraTS archives until 2021"
    if model.recipe.label_guided:
        yield f"recipe {model.recipe.id} crops around the label, which a new scan does not have: all of it is segmented"
    if model.recipe.orientation is None:
        yield f"recipe {model.recipe.id} takes the axes as they come: scans must lie as those of the training data do"
    if model.slices:
        yield f"recipe {model.recipe.id}; slice by slice, each resized to {_by(model.patch)}"
        return
    half = " (half a window)" if stride == _half(model.patch) else ""
    evaluated = f", the evaluation took {_by(spec['stride'])}" if stride != spec["stride"] else ""
    yield f"recipe {model.recipe.id}; windows of {_by(model.patch)} voxels every {_by(stride)}{half}{evaluated}"


class Listing:
    """Which files of a folder were written here, of which scan and by which model: nothing else is ever replaced.

    `entry` is the model's part of what is noted of a file, `scanned` the scan's.
    """

    def __init__(self, folder: Path, entry: dict):
        self.path, self.entry = folder / LISTING, entry
        self.files = self._read()

    def _read(self) -> dict[str, dict]:
        if not self.path.exists():
            return {}
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return {name: dict(entry) for name, entry in found["files"].items()}
        except (AttributeError, OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path}: cannot be read ({error}), expected the list of the predictions beside it") \
                from None

    def holds(self, files: Iterable[Path], scanned: dict[str, str]) -> bool:
        """Whether all these files are there, made of this scan by this model in this way."""
        return all(file.exists() and self._made(file) == (self.entry, scanned["sha256"]) for file in files)

    def _made(self, file: Path) -> tuple[dict, str]:
        """What is noted of a file: the model's part, and the checksum of the scan."""
        noted = self.files.get(file.name, {})
        return {key: value for key, value in noted.items() if key not in ("scan", "sha256")}, noted.get("sha256", "")

    def check(self, files: Iterable[Path], scanned: dict[str, str], overwrite: bool) -> None:
        """UserError if one of the files is there and was not written here, or, without `overwrite`, not of this scan
        and model."""
        for file in filter(Path.exists, files):
            made = self.files.get(file.name)
            if made is None:
                raise UserError(f"{file}: is there and no prediction of this suite, expected another --output")
            model, content = self._made(file)
            if content != scanned["sha256"] and not overwrite:
                raise UserError(f"{file}: was made of {made.get('scan', 'another scan')}; expected another --output "
                                f"for {scanned['scan']}, or --overwrite to replace it")
            if model != self.entry and not overwrite:
                raise UserError(f"{file}: was made by {made.get('model')}, stride {made.get('stride')}; expected "
                                "another --output, or --overwrite to replace it")

    def note(self, files: Iterable[Path], scanned: dict[str, str]) -> None:
        """List files that are going to be written; DataError where the folder is not writable."""
        # read again: another process may write here, too
        self.files = self._read() | {file.name: self.entry | scanned for file in files}
        with whole_file(self.path) as temporary:
            content = {"schema": 1, "files": dict(sorted(self.files.items()))}
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8", newline="\n")


def find_scans(inputs: Sequence[Path], channels: Sequence[str], output: Path, say=print) -> list[RawCase]:
    """The scans behind files and folders, each with an id of its own; a scan that lacks a channel has a problem.

    A file is a scan, or where there are several modalities one of the files of a scan. So is a folder with a DICOM
    series, or with a file per modality; any other folder is searched at all depths, the folder of the results left out.
    Raises DataError where there is nothing.
    """
    found, left_out, places = {}, [], list(map(Path, inputs))
    files = defaultdict(list)
    for place in places:
        if place.is_file() and len(channels) > 1:
            files[place.parent].append(place)
    for folder, paths in files.items():
        others = []
        scanned = list(_grouped(folder, paths, channels, others, left_out))
        scanned += [(path, _case(path, channels)) for path in others]
        found |= {anchor.resolve(): case for anchor, case in sorted(scanned, key=lambda entry: entry[0])}
    for place in places:
        if place in files.get(place.parent, ()):
            continue
        if place.is_dir():
            inside, others = [], []
            for folder, paths in _walk(place, output.resolve(), left_out):
                inside += _grouped(folder, paths, channels, others, left_out)
            if inside and len(channels) > 1:
                left_out += others
            else:
                inside += [(path, _case(path, channels)) for path in others]
        else:
            inside = [(place, _case(place, channels))]
        if not inside:
            raise DataError(f"{place}: no scan in it, expected {scans.EXPECTED}")
        found |= {anchor.resolve(): case for anchor, case in sorted(inside, key=lambda entry: entry[0])}
    if left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        say(f"left out, by their names no {' or '.join(channels)}: {', '.join(map(str, left_out[:3]))}{more}")
    return [replace(case, id=name) for case, name in zip(found.values(), _names(found), strict=True)]


def _walk(folder: Path, output: Path, left_out: list[Path]) -> Iterator[tuple[Path, list[Path]]]:
    """Folders at all depths with the scans in each: files and DICOM folders, hidden ones and labels aside."""
    if _holds_dicom(folder):
        yield folder, [folder]
        return
    entries = sorted(path for path in folder.iterdir() if path.name[0] != ".")
    files = [path for path in entries if path.is_file() and _stem(path) != path.name]
    below = [path for path in entries if path.is_dir() and path.resolve() != output]
    series = [path for path in below if _holds_dicom(path)]
    labels = [path for path in files if LABEL.search(_stem(path))]
    left_out += labels
    yield folder, [path for path in (*files, *series) if path not in labels]
    for path in below:
        if path not in series:
            yield from _walk(path, output, left_out)


def _grouped(
    folder: Path, paths: list[Path], channels: Sequence[str], others: list[Path], left_out: list[Path]
) -> Iterator[tuple[Path, RawCase]]:
    """Scans put together from the files of one folder by the modality in their names, each after its path.

    Files that name none go to `others`, or are left out where they belong to a scan that is complete without them.
    """
    groups, rest = defaultdict(lambda: defaultdict(list)), []
    for path in paths:
        key, channel = _channel(_stem(path), channels)
        if channel is None:
            rest.append(path)
        else:
            groups[key][channel].append(path)
    everything = list(range(len(channels)))
    complete = {key for key, group in groups.items() if sorted(group) == everything}
    if not complete:
        # names that differ in more than the modality: one scan all the same, if there is one file for each
        merged = defaultdict(list)
        for group in groups.values():
            for channel, files in group.items():
                merged[channel] += files
        if sorted(merged) == everything:
            groups, complete = {"": merged}, {""}
    for path in rest:
        # beside x_flair a file x_t1 is another image of the same scan
        (left_out if complete & set(_shortened(_stem(path))) else others).append(path)
    for key, group in groups.items():
        if len(channels) == 1:
            yield from ((path, _case(path, channels)) for path in group[0])
        else:
            yield _scan_of(folder, key, group, channels)


def _scan_of(
    folder: Path, key: str, group: dict[int, list[Path]], channels: Sequence[str]
) -> tuple[Path, RawCase]:
    """The scan of a group of files, with a problem where it lacks a channel or has one twice."""
    twice = [files for files in group.values() if len(files) > 1]
    missing = [name for number, name in enumerate(channels) if number not in group]
    problem, where = "", folder / f"{key}*" if key else folder
    if missing:
        problem = f"{where}: no file for {', '.join(missing)}, expected one for each of {', '.join(channels)} " \
                  f"(in its name, or _0000 to _{len(channels) - 1:04d} at its end)"
    elif twice:
        problem = f"{where}: {twice[0][0].name} and {twice[0][1].name} for one modality, expected one file for each"
    images = tuple(group[number][0] for number in sorted(group))
    return folder / key, RawCase(key or folder.resolve().name, images, problem=problem)


def _case(path: Path, channels: Sequence[str]) -> RawCase:
    """A single file or DICOM folder, which holds all channels where there are several."""
    name = _stem(path) or path.resolve().name  # "." has no name
    return RawCase(name, (path,), channels=len(channels) if len(channels) > 1 else None)


def _channel(stem: str, channels: Sequence[str]) -> tuple[str, int | None]:
    """The rest of a name and the channel that it names; None where it names none."""
    names = [_plain(name) for name in channels]
    numbered = re.fullmatch(r"(.*)_(\d{4})", stem)
    if numbered and len(channels) > 1 and int(numbered[2]) < len(channels):
        return numbered[1], int(numbered[2])
    if len(set(names)) < len(names):  # not told apart by name
        return stem, None
    words = list(WORD.finditer(stem))
    for word in reversed(words):
        if _plain(word[0]) in names:
            return _without(stem, *word.span()), names.index(_plain(word[0]))
    if len(channels) > 1:
        for name in sorted({*names, *SAME}, key=len, reverse=True):  # t1ce before t1
            at = stem.lower().rfind(name)
            if at >= 0:
                found = SAME.get(name, name)
                return _without(stem, at, at + len(name)), names.index(found) if found in names else None
    return stem, None


def _shortened(stem: str) -> list[str]:
    """The name without each of its words."""
    return [_without(stem, *word.span()) for word in WORD.finditer(stem)]


def _without(stem: str, start: int, stop: int) -> str:
    return "_".join(part for part in (stem[:start].rstrip("_-. "), stem[stop:].lstrip("_-. ")) if part)


def _plain(word: str) -> str:
    """A modality's name in small letters and digits, one for all of its spellings."""
    word = "".join(WORD.findall(word.lower()))
    return SAME.get(word, word)


def _names(found: dict[Path, RawCase]) -> list[str]:
    """A name for each scan that no other has: its own, with its suffix, or with as many folders as it takes."""
    for depth in range(max(len(anchor.parts) for anchor in found)):
        for names in ([case.id for case in found.values()], [anchor.name for anchor in found]):
            names = ["_".join((*anchor.parent.parts[1:][-depth:] * (depth > 0), name))
                     for anchor, name in zip(found, names, strict=True)]
            if len({name.lower() for name in names}) == len(names):
                return names
    raise DataError(f"{next(iter(found))}: names that only differ in case, expected names that tell results apart")


def _stem(path: Path) -> str:
    """Name of a scan's file without its format; of others the whole name."""
    name = path.name
    suffix = next((suffix for suffix in (*scans.NIFTI, *scans.ITK) if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def _holds_dicom(folder: Path) -> bool:
    """Whether slices lie directly in a folder."""
    return any(path.suffix.lower() == ".dcm" or scans.is_dicom(path) for path in folder.iterdir() if path.is_file())


def _file(case: RawCase, kind: str) -> str:
    """Name of a result: in the format of the scan where that can be written, else NIfTI."""
    if kind == "preview":
        return f"{case.id}_preview.png"
    name = case.images[0].name.lower() if case.images else ""
    suffix = next((suffix for suffix in scans.WRITABLE if name.endswith(suffix)), ".nii.gz")
    return f"{case.id}_{kind}{suffix}"


def write_preview(
    path: Path, scan: Scan, labels: np.ndarray, classes: Sequence[str], name: str, title: str
) -> None:
    """A PNG with three planes through the middle of the segmentation and the contours of its classes."""
    from data_prep.summary import contact_sheet, tile

    planes = tile(name, recipes.Stored(scan.voxels, labels, Geometry.of(scan, orientation=None)))
    contact_sheet(path, [planes], title, classes, (1.0, 1.0, 1.0))  # of unequal sides it would show one plane only


def _by(numbers: Iterable[float]) -> str:
    return " x ".join(f"{number:.4g}" for number in numbers)
