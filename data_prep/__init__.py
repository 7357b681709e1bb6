"""Data sets as frozen descriptions and stores of cases; no torch, and file formats are only imported when opened."""

import difflib
import importlib

from data_prep.spec import DataError, DatasetSpec, Protocol, Split, Store, load_split

__all__ = ["DataError", "DatasetSpec", "Protocol", "Split", "Store", "dataset", "load_split", "names"]

# A data set is a module with a SPEC; adding one takes its file and a line here.
_MODULES = {"LA": "la", "phantom": "phantom"}


def names() -> list[str]:
    """Names of the data sets."""
    return list(_MODULES)


def dataset(name: str) -> DatasetSpec:
    """The data set of that name, in any case. Raises DataError naming the nearest one."""
    lower = {known.lower(): module for known, module in _MODULES.items()}
    if name.lower() not in lower:
        nearest = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.0)[0]
        meant = next(known for known in _MODULES if known.lower() == nearest)
        raise DataError(f"data set {name!r} is unknown, did you mean {meant!r}? (known: {', '.join(_MODULES)})")
    return importlib.import_module(f"data_prep.{lower[name.lower()]}").SPEC
