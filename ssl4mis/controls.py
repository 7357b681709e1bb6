"""Which unlabeled images a run sees: all, a part of them, or those of a negative control.

A control puts images without new anatomy of the task in their place. A method that still gains does not gain from
unlabeled data.
"""
import hashlib
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

import data_prep
from data_prep import DataError, DatasetSpec, Protocol, Split, Store
from ssl4mis import registry
from ssl4mis.errors import UserError

KINDS = {
    "noise": "Gaussian noise of their shape, mean and standard deviation",
    "copies": "copies of the labeled ones",
    "other": "those of data set {}",
}


def canonical(control: str, dataset: str) -> str:
    """A control in its one spelling, "" for none; UserError for an unknown one and for the run's own data set."""
    kind, _, name = control.partition(":")
    if control not in ("", "noise", "copies") and not re.fullmatch(r"other:[A-Za-z0-9][A-Za-z0-9_.-]*", control):
        raise UserError(registry.nearest("control", control, ("noise", "copies", "other:DATASET")))
    name = {known.lower(): known for known in data_prep.names()}.get(name.lower(), name)
    if name == dataset:
        raise UserError(f"control {control}: the data set of the run itself, expected another one")
    return f"{kind}:{name}" if name else kind


def describe(control: str) -> str:
    """A control in words."""
    kind, _, name = control.partition(":")
    return f"negative control: the unlabeled images are {KINDS[kind].format(name)}"


def unlabeled_cases(split: Split, spec) -> tuple[str, ...]:
    """The cases that a run has without labels, before any control: the first ones of the list, so that parts nest."""
    left = split.unlabeled(spec.labeled)
    return left if spec.unlabeled == "all" else left[: spec.unlabeled * split.per_patient]


def for_training(store: Store, split: Split, spec, dataset: DatasetSpec, protocol: Protocol,
                 root: Path | None) -> tuple[Store, tuple[str, ...]]:
    """What training reads: a store and the ids of the unlabeled cases in it, as many as without a control.

    A control's images have ids of their own, case#noise, case#copy1 or DATASET:case#1, and no labels. Another data set
    is read as its first protocol says and looked for below `root`, above it, and where it is without --data-root; where
    it has too few training cases they come again. UserError, one line, where it is not there or does not fit.
    """
    cases = unlabeled_cases(split, spec)
    kind, _, name = spec.control.partition(":")
    match kind:
        case "":
            return store, cases
        case "noise":
            images = {f"{case}#noise": partial(noise, store, case) for case in cases}
        case "copies":
            images = repeated(store, split.labeled(spec.labeled), len(cases), "{case}#copy{turn}")
        case "other":
            try:
                other, training = find(name, (len(dataset.channels(protocol)), dataset.spatial_dims), root)
            except DataError as error:
                raise UserError(f"control {spec.control}: {error}") from None
            images = repeated(other, training, len(cases), name + ":{case}#{turn}")
    return Controlled(store, images), tuple(images)


def noise(store: Store, case: str) -> np.ndarray:
    """Gaussian noise with a scan's shape (channels, *space) and each channel's mean and sd; it follows from the id."""
    image = store.image(case)
    space = tuple(range(1, image.ndim))
    rng = np.random.default_rng(int(hashlib.sha256(case.encode()).hexdigest(), 16))
    drawn = rng.standard_normal(image.shape, dtype=np.float32)
    drawn *= image.std(axis=space, dtype=np.float64, keepdims=True)
    drawn += image.mean(axis=space, dtype=np.float64, keepdims=True)
    return drawn


def repeated(store: Store, cases: Sequence[str], count: int, name: str) -> dict[str, Callable[[], np.ndarray]]:
    """So many images by new ids, from these cases in turn; `name` makes an id of `case` and its `turn`, from 1."""
    chosen = [(cases[n % len(cases)], n // len(cases) + 1) for n in range(count)]
    return {name.format(case=case, turn=turn): partial(store.image, case) for case, turn in chosen}


def find(name: str, shape: tuple[int, int], root: Path | None) -> tuple[Store, tuple[str, ...]]:
    """The store of a data set and its training cases, all of them there.

    DataError where they are not, and unless its images have that `shape`, so many channels and spatial dimensions.
    """
    first = None
    for place in [root, *root.absolute().parents[:2], None] if root else [None]:  # a root may be DIR/NAME/RECIPE
        try:
            dataset, folder = data_prep.locate(name, place)
            protocol = next(iter(dataset.protocols.values()))
            split = data_prep.load_split(protocol.split, 0, dataset.splits)
            store, cases = dataset.open(folder, protocol), split.train + split.extra
            store.check(cases)
        except DataError as error:
            first = first or error
            continue
        found = len(dataset.channels(protocol)), dataset.spatial_dims
        if found != shape:
            raise DataError("{} has {} channels in {}D, expected {} in {}D".format(name, *found, *shape))
        return store, cases
    raise first


class Controlled:
    """A store with images put in place of unlabeled ones; they have no labels."""

    def __init__(self, store: Store, images: dict[str, Callable[[], np.ndarray]]) -> None:
        self.store, self.images = store, images

    def image(self, case: str) -> np.ndarray:
        """The scan of a case or of a control: float32, (channels, *space). Raises DataError."""
        return self.images[case]() if case in self.images else self.store.image(case)

    def label(self, case: str) -> np.ndarray:
        """As in `spec.Store`; DataError for an image of a control."""
        if case in self.images:
            raise DataError(f"case {case}: an image of a negative control, expected no one to ask for its label")
        return self.store.label(case)
