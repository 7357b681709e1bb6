"""Data sets as frozen descriptions and stores of cases; no torch, and file formats are only imported when opened."""

import difflib
import importlib
import os
from pathlib import Path

from data_prep.spec import DataError, DatasetSpec, Protocol, Split, Store, load_split

__all__ = ["DataError", "DatasetSpec", "Protocol", "Split", "Store", "dataset", "load_split", "locate", "names",
           "recipe_at"]

# A data set is in SPECS of a module; adding one takes its file and a line here.
_MODULES = {
    "LA": "la",
    "Pancreas": "pancreas",
    "ACDC": "acdc",
    "BraTS": "brats",
    "PROMISE12": "promise12",
    "ISLES2022": "isles2022",
    "phantom": "phantom",
    **dict.fromkeys(("phantom-2d2c", "phantom-2d4c", "phantom-3d2c", "phantom-3d4c"), "phantom"),
}


def names() -> list[str]:
    """Names of the data sets."""
    return list(_MODULES)


def module(name: str):
    """The module of the data set of that name, in any case. Raises DataError naming the nearest one."""
    return importlib.import_module(f"data_prep.{_MODULES[_known(name)]}")


def dataset(name: str) -> DatasetSpec:
    """The data set of that name, in any case. Raises DataError naming the nearest one."""
    return module(name).SPECS[_known(name)]


def locate(text: str, root: Path | str | None = None) -> tuple[DatasetSpec, Path | None]:
    """A data set by name or by the folder of its store, and the folder to look for its cases in.

    Own data is found by its name under `root`, else the folder that SSL4MIS_DATA names, else `data`. Raises DataError.
    """
    if text.lower() in _LOWER:
        return dataset(text), Path(root) if root else None
    try:
        return _locate_own(text, root)
    except OSError as error:  # a name that is too long for any file
        raise DataError(f"data set {text:.40}: {error.strerror}, expected a name or a folder") from None


def _locate_own(text: str, root: Path | str | None) -> tuple[DatasetSpec, Path | None]:
    from data_prep import store

    place = Path(text).expanduser()
    folder, below = None, root or os.environ.get("SSL4MIS_DATA") or store.DEFAULT
    if place.name == text:  # before a folder of that name that happens to be here, such as the raw scans
        folder = store.find(Path(below).expanduser(), text, "clean")
    if folder is None and place.is_dir():
        folder = store.folder_of(place)
    if folder is None:
        if place.is_dir() or place.name != text:
            raise DataError(f"data set {text}: no prepared data set there, expected the folder of a dataset.json, as "
                            "`python -m data_prep.prepare NAME --raw DIR` writes it")
        _known(text)
    name = store.read_card(folder)["name"]
    return (dataset(name), place) if name in _MODULES else (store.spec_of(folder), folder)


def recipe_at(folder: Path, name: str) -> str:
    """What --recipe calls the recipe of a data set's store in this very folder, "" where there is none of it."""
    from data_prep import store

    return store.recipe_at(folder, name)


_LOWER = {known.lower(): known for known in _MODULES}


def _known(name: str) -> str:
    if name.lower() not in _LOWER:
        meant = _LOWER[difflib.get_close_matches(name.lower(), _LOWER, n=1, cutoff=0.0)[0]]
        raise DataError(f"data set {name!r} is unknown, did you mean {meant!r}? (known: {', '.join(_MODULES)})")
    return _LOWER[name.lower()]
