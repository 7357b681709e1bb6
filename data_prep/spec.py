"""Frozen descriptions of data sets, protocols and case lists; standard library only, so importing is instant."""

import hashlib
import json
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if typing.TYPE_CHECKING:
    import numpy as np

SPLITS = Path(__file__).parent / "splits"


class DataError(Exception):
    """Data that cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class Protocol:
    """How a data set is trained and evaluated, so that two results of one protocol can be compared.

    `patch` and `stride` (of the sliding window) are in voxels after downsampling; `labeled` are the label counts in
    use, smallest first; `schedule` is "step" (x0.1 after every 2500/6000 of the run), "poly" or "constant"; `precision`
    "auto" takes bfloat16 where the processor has it; `width` is the base width of the network; `published` says that it
    follows the publications, so that a method's own published number of iterations goes over `iterations`.
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
    augmentation: tuple[str, ...] = ("rotflip",)
    width: int = 16
    precision: str = "auto"
    downsample: int = 1
    published: bool = False


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


@dataclass(frozen=True)
class DatasetSpec:
    """What there is to know of a data set without opening a file of it; `classes` starts with the background."""

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
    channels: int = 1


@dataclass(frozen=True)
class Split:
    """One fold of a frozen case list; the order of `train` decides which cases are labeled."""

    name: str
    fold: int
    folds: int
    train: tuple[str, ...]
    test: tuple[str, ...]
    sha256: str

    def labeled(self, n: int) -> tuple[str, ...]:
        """The first n training cases. Raises DataError unless 1 <= n <= the number of training cases."""
        if not 1 <= n <= len(self.train):
            raise DataError(f"split {self.name} fold {self.fold}: labeled={n}, expected 1 to {len(self.train)} cases")
        return self.train[:n]

    def unlabeled(self, n: int) -> tuple[str, ...]:
        """The training cases after the first n. Raises DataError like `labeled`."""
        return self.train[len(self.labeled(n)) :]


def ids_sha256(ids: Sequence[str]) -> str:
    """Full hex SHA-256 of the ids joined by a newline, plus a final newline."""
    return hashlib.sha256(("\n".join(ids) + "\n").encode()).hexdigest()


def load_split(name: str, fold: int) -> Split:
    """One fold of data_prep/splits/<name>.json; its hash covers the hashes of the train and of the test list.

    Raises DataError for an unknown name, a wrong fold number, a checksum that does not fit or a case listed twice.
    """
    path = SPLITS / f"{name}.json"
    known = sorted(p.stem for p in SPLITS.glob("*.json"))
    if name not in known:
        raise DataError(f"split {name!r} is unknown, expected one of {', '.join(known)}")
    try:
        folds = json.loads(path.read_text(encoding="utf-8"))["folds"]
        count = len(folds)
        if not (isinstance(fold, int) and 0 <= fold < count):
            raise DataError(f"split {name}: fold {fold!r}, expected 0 to {count - 1}")
        entry = folds[fold]
        for part in ("train", "test"):
            found, stated = ids_sha256(entry[part]), entry[f"sha256_{part}"]
            if found != stated:
                raise DataError(f"{path}: {part} list of fold {fold} has sha256 {found}, expected {stated}")
        train, test = tuple(entry["train"]), tuple(entry["test"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a split file ({type(error).__name__}: {error}), expected folds") from None
    if len({*train, *test}) != len(train) + len(test):
        raise DataError(f"{path}: fold {fold} lists a case twice, expected every case once in train or test")
    return Split(name, fold, count, train, test, ids_sha256([entry["sha256_train"], entry["sha256_test"]]))
