"""Data sets as frozen descriptions and stores of cases; no torch, and file formats are only imported when opened."""

import difflib
import importlib

from data_prep.spec import DataError, DatasetSpec, Protocol, Split, Store, load_split

__all__ = ["DataError", "DatasetSpec", "Protocol", "Split", "Store", "dataset", "load_split", "names"]

# A data set is in SPECS of a module; adding one takes its file and a line here.
_MODULES = {
    "LA": "la",
    "phantom": "phantom",
    **dict.fromkeys(("phantom-2d2c", "phantom-2d4c", "phantom-3d2c", "phantom-3d4c"), "phantom"),
}


def names() -> list[str]:
    """Names of the data sets."""
    return list(_MODULES)


def dataset(name: str) -> DatasetSpec:
    """The data set of that name, in any case. Raises DataError naming the nearest one."""
    lower = {known.lower(): known for known in _MODULES}
    if name.lower() not in lower:
        meant = lower[difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.0)[0]]
        raise DataError(f"data set {name!r} is unknown, did you mean {meant!r}? (known: {', '.join(_MODULES)})")
    known = lower[name.lower()]
    return importlib.import_module(f"data_prep.{_MODULES[known]}").SPECS[known]
