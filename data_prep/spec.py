"""Frozen descriptions of data sets, protocols and case lists; standard library only, so importing is instant."""

import hashlib
import json
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if typing.TYPE_CHECKING:
    import numpy as np

SPLITS = Path(__file__).parent / "splits"


class DataError(Exception):
    """Data that cannot be used; the message is one line for the user."""


def names_a_file(text) -> bool:
    """Whether this is a name for a file in any folder, and not a way out of it; ids of cases are."""
    return isinstance(text, str) and text.isprintable() and len(text.encode()) <= 200 \
        and re.fullmatch(r"[^/\\.][^/\\]*", text) is not None


@dataclass(frozen=True)
class Protocol:
    """How a data set is trained and evaluated, so that two results of one protocol can be compared.

    `patch` and `stride` (of the sliding window) are in voxels after downsampling; `labeled` are the label counts in
    use, smallest first; `schedule` is "step" (x0.1 after every 2500/6000 of the run), "poly" or "constant"; `network`
    is the usual backbone, `width` its base width; `precision` "auto" takes bfloat16 where the processor has it;
    `published` says that it follows the publications, so that a method's own published number of iterations goes over
    `iterations`.

    `recipe` names how raw scans became the cases; `modalities` are the channels read, () for all; `region` makes the
    task binary: that region of the data set against the rest; `slices` trains a 2D network on the planes across the
    last axis, each resized to the patch (nearest), and puts its predictions together to volumes before scoring.
    """

    name: str
    about: str
    split: str
    patch: tuple[int, ...]
    stride: tuple[int, ...]
    iterations: int
    labeled: tuple[int, ...]
    labeled_batch: int = 2
    unlabeled_batch: int = 2
    learning_rate: float = 0.01
    schedule: str = "step"
    network: str = "vnet"
    augmentation: tuple[str, ...] = ("rotflip",)
    width: int = 16
    precision: str = "auto"
    downsample: int = 1
    published: bool = False
    recipe: str = "paper"
    modalities: tuple[str, ...] = ()
    region: str = ""
    slices: bool = False


class Store(typing.Protocol):
    """Read access to the cases of one data set.

    Image and label are separate calls on purpose: the labels of unlabeled and test cases are never read by training.
    """

    def image(self, case: str) -> "np.ndarray":
        """The scan of a case: float32, (channels, *space). Raises DataError."""
        ...

    def label(self, case: str) -> "np.ndarray":
        """The classes of a case: uint8, (*space). Raises DataError."""
        ...

    def spacing(self, case: str) -> tuple[float, ...]:
        """Distance of neighboring voxels in mm, one number per axis."""
        ...

    def check(self, cases: Sequence[str]) -> None:
        """Raises DataError at once when a case is missing, before any training time is spent."""
        ...

    def provenance(self, cases: Sequence[str]) -> dict:
        """What a record says of these cases.

        "recipe", its id, and "sha256" of the cases, both "" where they are made by the program or not known;
        "label_guided", whether the boxes of the scans follow the labels, and "spacing_known", whether mm are those of
        the scanner.
        """
        ...

    def replay(self) -> dict | None:
        """The recipe that a new scan goes through before a network trained here sees it, as plain values, or None."""
        ...


@dataclass(frozen=True)
class DatasetSpec:
    """What there is to know of a data set without opening a file of it.

    `classes` are the names of the label values of a stored case, background first; `regions` are unions of classes by
    name, which are scored in place of the classes where there are any; `modalities` name the channels of a stored case;
    `spacing` is the usual one in mm; `splits` is the folder of its case lists.
    """

    name: str
    title: str
    modality: str
    classes: tuple[str, ...]
    spacing: tuple[float, ...]
    citation: str
    how_to_get: str
    open: Callable[[Path | None, Protocol], Store] = field(repr=False, compare=False)
    protocols: dict[str, Protocol] = field(default_factory=dict, hash=False)
    spatial_dims: int = 3
    modalities: tuple[str, ...] = ("image",)
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    splits: Path = SPLITS

    def channels(self, protocol: Protocol) -> tuple[str, ...]:
        """The modalities that a protocol reads, in the order of the network's input."""
        return protocol.modalities or self.modalities

    def dims(self, protocol: Protocol) -> int:
        """Spatial dimensions of the network, 2 where a protocol goes by slices."""
        return 2 if protocol.slices else self.spatial_dims

    def task(self, protocol: Protocol) -> tuple[str, ...]:
        """The classes that the network of a protocol tells apart, background first."""
        return (self.classes[0], protocol.region) if protocol.region else self.classes

    def targets(self, protocol: Protocol) -> dict[str, tuple[int, ...]]:
        """What is scored: by name, the classes of `task` whose union it is."""
        if self.regions and not protocol.region:
            return self.regions
        return {name: (value,) for value, name in enumerate(self.task(protocol)) if value}


@dataclass(frozen=True)
class Split:
    """One fold of a frozen case list; the order of `train` decides which cases are labeled.

    Where every patient has several cases (`per_patient`, one after the other in the lists), labels are counted in
    patients. `extra` are training cases without a label of their own, unlabeled in every run.
    """

    name: str
    fold: int
    folds: int
    train: tuple[str, ...]
    test: tuple[str, ...]
    sha256: str
    per_patient: int = 1
    extra: tuple[str, ...] = ()

    @property
    def patients(self) -> int:
        """How many training patients can be labeled; with one case each, the number of training cases."""
        return len(self.train) // self.per_patient

    def labeled(self, n: int) -> tuple[str, ...]:
        """All cases of the first n training patients. Raises DataError unless 1 <= n <= the number of them."""
        if not 1 <= n <= self.patients:
            what = "patients" if self.per_patient > 1 else "cases"
            raise DataError(f"split {self.name} fold {self.fold}: labeled={n}, expected 1 to {self.patients} {what}")
        return self.train[: n * self.per_patient]

    def unlabeled(self, n: int) -> tuple[str, ...]:
        """The training cases after the labeled ones. Raises DataError like `labeled`."""
        return self.train[len(self.labeled(n)) :] + self.extra


def ids_sha256(ids: Sequence[str]) -> str:
    """Full hex SHA-256 of the ids joined by a newline, plus a final newline."""
    return hashlib.sha256(("\n".join(ids) + "\n").encode()).hexdigest()


def load_split(name: str, fold: int, folder: Path | None = None) -> Split:
    """One fold of <folder>/<name>.json (default: splits/ of this package); its hash covers those of its lists.

    Raises DataError for an unknown name, a wrong fold number, a checksum that does not fit, a case listed twice and an
    id that is no file name.
    """
    folder = folder or SPLITS
    path = folder / f"{name}.json"
    known = sorted(p.stem for p in folder.glob("*.json"))
    if not known:
        raise DataError(f"{path}: no such file, expected folds, which take at least two patients with a label")
    if name not in known:
        raise DataError(f"split {name!r} is unknown, expected one of {', '.join(known)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        folds, per_patient = content["folds"], content.get("per_patient", 1)
        if not (isinstance(folds, list) and type(per_patient) is int and per_patient >= 1):
            raise TypeError("folds is no list or per_patient no number of at least 1")
        count = len(folds)
        if not (isinstance(fold, int) and 0 <= fold < count):
            raise DataError(f"split {name}: fold {fold!r}, expected 0 to {count - 1}")
        entry = folds[fold]
        parts = [part for part in ("train", "test", "extra") if part in entry or part != "extra"]
        for part in parts:
            wrong = [case for case in entry[part] if not names_a_file(case)]
            if wrong or not isinstance(entry[part], list):
                raise DataError(f"{path}: {part} list of fold {fold} has the case {(wrong or [entry[part]])[0]!r:.80}, "
                                "expected ids that can name a file")
            found, stated = ids_sha256(entry[part]), entry[f"sha256_{part}"]
            if found != stated:
                raise DataError(f"{path}: {part} list of fold {fold} has sha256 {found}, expected {stated}")
        train, test, extra = (tuple(entry.get(part, ())) for part in ("train", "test", "extra"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: not a split file ({type(error).__name__}: {error}), expected folds") from None
    if len({*train, *test, *extra}) != len(train) + len(test) + len(extra):
        raise DataError(f"{path}: fold {fold} lists a case twice, expected every case once in train or test")
    if len(train) % per_patient:
        raise DataError(f"{path}: fold {fold} trains on {len(train)} cases, expected a multiple of {per_patient}")
    sha256 = ids_sha256([entry[f"sha256_{part}"] for part in parts])
    return Split(name, fold, count, train, test, sha256, per_patient, extra)
