"""What the scripts of this folder share: scans, interleaved timing, tables and the closing line.

A script imports this first: numpy and torch read the number of threads when they are loaded.
"""

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import numpy as np  # noqa: E402

from data_prep import DataError, dataset, load_split  # noqa: E402

SHAPE = (176, 136, 88)  # of the phantom, a usual one of LA


class Case(NamedTuple):
    """A scan: image (1, x, y, z) float32, label (x, y, z) uint8 of 0 and 1, spacing in mm."""

    id: str
    image: np.ndarray
    label: np.ndarray
    spacing: tuple[float, ...]


def cases(folder: Path | str | None, count: int) -> tuple[str, list[Case]]:
    """What the scans are, and the first test cases of LA at full resolution, or phantoms of their size.

    Without a folder LA is looked for where SSL4MIS_DATA says. Raises DataError where a given folder has no LA.
    """
    spec = dataset("LA")
    protocol = spec.protocols["paper"]
    ids = load_split(protocol.split, 0).test[:count]
    try:
        store = spec.open(Path(folder) if folder else None, protocol)
        store.check(ids)
    except DataError:
        if folder:
            raise
        from data_prep.phantom import SEED, generate

        drawn = ((f"phantom {n}", *generate(SEED, n, classes=2, shape=SHAPE)) for n in range(count))
        return f"phantom at the size of LA, {count} cases", [Case(*case, spec.spacing) for case in drawn]
    read = [Case(case, store.image(case), store.label(case), store.spacing(case)) for case in ids]
    return f"LA, full resolution, {count} test cases", read


def interleave(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    once: Container[str] = (),
    clock: Callable[[], float] = time.process_time,
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every call, by way, and what each way gave last.

    The ways take turns, in every round starting with another one, so that whatever else the machine does meets all of
    them. The clock counts the CPU time of this process and leaves out that of others; time.perf_counter is wall time.

    Args:
        once: ways that only take part in the first round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    given = {}
    gc.collect()
    gc.disable()  # no way pays for what another one left
    try:
        for n in range(rounds):
            names = [name for name in ways if n == 0 or name not in once]
            for name in names[n % len(names) :] + names[: n % len(names)]:
                start = clock()
                given[name] = ways[name]()
                seconds[name].append(clock() - start)
    finally:
        gc.enable()
    return seconds, given


def milliseconds(seconds: Iterable[float]) -> str:
    """Median and range."""
    ms = [1000 * value for value in seconds]
    return f"{_three(statistics.median(ms))} [{_three(min(ms))}-{_three(max(ms))}]"


def machine() -> str:
    """One line on the processor, the load and the versions that the numbers depend on."""
    import scipy

    names = [platform.processor() or platform.machine()]
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")] or names
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (f"{names[0]}, {os.cpu_count()} cores{load}, {os.environ['OMP_NUM_THREADS']} thread(s); "
            f"Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}")


def close(subject: str, ratio: float, exact: bool, **more: Any) -> None:
    """Print the last line: one JSON object with the ratio peers / ours and whether the results are the same."""
    print(json.dumps({"subject": subject, "ratio": _rounded(ratio), "exact": bool(exact),
                      **{key: _rounded(value) for key, value in more.items()}}))


def _rounded(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _three(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
