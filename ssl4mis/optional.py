"""Modules of compiled kernels, which have a slower substitute where their compiler is absent."""

import warnings
from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def optional(name: str) -> ModuleType | None:
    """The module, or None without its compiler (numba, Triton) or, of numba, without a place for its cache."""
    try:
        return import_module(name)
    except (ImportError, RuntimeError):  # the latter from numba, which would compile anew in every process
        return None


@cache
def cuda_kernels() -> ModuleType | None:
    """`ssl4mis.kernels`, or None without Triton or, after a warning, where it does not work: it wants a C compiler."""
    module = optional("ssl4mis.kernels")
    try:
        if module:
            module.try_out()
    except Exception as error:  # Triton has no type of its own for all that can be missing
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        warnings.warn(f"distances and components are left to slower code, since Triton fails ({reason})", stacklevel=2)
        return None
    return module
