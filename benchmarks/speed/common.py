"""What the scripts of this folder share: scans, interleaved timing, tables and the closing line.

A script imports this first: numpy and torch read the number of threads when they are loaded.
"""

import gc
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import numpy as np  # noqa: E402

from data_prep import DataError, Store, dataset, load_split  # noqa: E402

SHAPE = (176, 136, 88)  # of the phantom, a usual one of LA
TINY = (40, 36, 24)  # of the phantom where a script is only tried


class Case(NamedTuple):
    """A scan: image (1, x, y, z) float32, label (x, y, z) uint8 of 0 and 1, spacing in mm."""

    id: str
    image: np.ndarray
    label: np.ndarray
    spacing: tuple[float, ...]


def cases(folder: Path | str | None, count: int, shape: Sequence[int] | None = None) -> tuple[str, list[Case]]:
    """What the scans are, and the first test cases of LA at full resolution, or phantoms of their size.

    With a `shape` they are phantoms of that. Raises DataError where a given folder has no LA.
    """
    store, ids = la(folder, "test", count)
    if store and not shape:
        read = [Case(case, store.image(case), store.label(case), store.spacing(case)) for case in ids]
        return f"LA, full resolution, {count} test cases", read
    from data_prep.phantom import SEED, generate

    spacing, size = dataset("LA").spacing, tuple(shape or SHAPE)
    drawn = ((f"phantom {n}", *generate(SEED, n, classes=2, shape=size)) for n in range(count))
    return f"phantom of {'x'.join(map(str, size))}, {count} cases", [Case(*case, spacing) for case in drawn]


def la(folder: Path | str | None, part: str, count: int | None = None) -> tuple[Store | None, list[str]]:
    """The scans of LA at full resolution, None where there are none, and the first cases of "train" or "test".

    Without a folder LA is looked for where SSL4MIS_DATA says. Raises DataError where a given folder has no LA.
    """
    spec = dataset("LA")
    protocol = spec.protocols["paper"]
    ids = list(getattr(load_split(protocol.split, 0), part)[:count])
    try:
        store = spec.open(Path(folder) if folder else None, protocol)
        store.check(ids)
    except DataError:
        if folder:
            raise
        return None, ids
    return store, ids


class Timed(NamedTuple):
    """What a way gave that was timed where it ran."""

    seconds: float
    given: Any


class Apart:
    """A way in a process of its own, for settings that are a whole process's; calling it gives a `Timed`.

    Args:
        make: a function of a module, which gives the way, a function of no arguments, from these arguments. All
            processes make theirs at once; what the way gives must be picklable.
    """

    def __init__(self, make: Callable[..., Callable[[], Any]], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self.process.start()
        theirs.close()  # or the end of the process would not be seen here

    def __call__(self) -> Timed:
        self.connection.send(None)
        return Timed(*self.connection.recv())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.terminate()
        self.process.join()


def _serve(connection, make, arguments) -> None:
    way = make(*arguments)
    gc.collect()
    gc.disable()
    while True:
        connection.recv()
        start = time.process_time()
        given = way()
        connection.send((time.process_time() - start, given))


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
                spent = clock() - start
                if isinstance(given[name], Timed):
                    spent, given[name] = given[name]
                seconds[name].append(spent)
    finally:
        gc.enable()
    return seconds, given


def ratio(base: str, runs: Sequence[tuple], way: str) -> float:
    """Time of the way `base` over that of another one; of medians per run of `interleave`, all runs together."""
    total = {name: sum(statistics.median(seconds[name]) for seconds, *_ in runs) for name in (base, way)}
    return total[base] / total[way]


def faster(base: str, runs: Sequence[tuple], way: str) -> tuple[str, str]:
    """The `ratio` of all runs and its range over single ones."""
    each = [ratio(base, [run], way) for run in runs]
    return f"{ratio(base, runs, way):.3g}", f"[{min(each):.3g}-{max(each):.3g}]"


def milliseconds(seconds: Iterable[float]) -> str:
    """Median and range."""
    ms = [1000 * value for value in seconds]
    return f"{_three(statistics.median(ms))} [{_three(min(ms))}-{_three(max(ms))}]"


def machine() -> str:
    """One line on the processor, the load and the versions that the numbers depend on."""
    import scipy

    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (f"{_cpuinfo('model name') or platform.processor() or platform.machine()}, {os.cpu_count()} cores{load}, "
            f"{os.environ['OMP_NUM_THREADS']} thread(s); "
            f"Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}")


def limits(side: int = 2048, rounds: int = 5) -> dict[str, str]:
    """What bounds every number that comes from a network: the processor, its bf16 instructions and matmul peaks.

    Peaks are the best of several products of two square matrices in GFLOP/s of CPU time, on the threads of this
    process.
    """
    import torch

    flags = _cpuinfo("flags").split()
    found = {
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "bf16 instructions": ", ".join(flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags) or "none known",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }
    for kind in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, side, side).to(kind)
        seconds, _ = interleave({"matmul": lambda a=a, b=b: a @ b}, rounds)
        name = f"matmul peak, {str(kind).removeprefix('torch.')}, {torch.get_num_threads()} thread(s)"
        found[name] = f"{2e-9 * side**3 / min(seconds['matmul']):.0f} GFLOP/s"
    return found


def _cpuinfo(key: str) -> str:
    """What /proc/cpuinfo says of the first processor, "" where it says nothing."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def steps(trainer: Any, stage: int = -1) -> Callable[[], dict[str, Any]]:
    """A function that makes the next step of a stage of a `Trainer`, by default its last one, and gives its terms.

    The steps are those from the middle of the stage on, where ramps and warm-ups are under way, with batches loaded as
    in a run, but without logs and checkpoints.
    """
    import torch

    from ssl4mis.batch import Clock

    trainer.stage = stage % len(trainer.plan)
    current, total = trainer.plan[stage]
    trainer.method.enter(current.name)
    trainer.method.train()
    trainer._make_optimizers(current)
    trainer.bad, first = None, total // 2
    numbers = itertools.count(first)
    clock = Clock(torch.tensor(first, device=trainer.loader.device), total, current.name)

    def step() -> dict[str, Any]:
        nonlocal clock
        trainer.step = next(numbers) % total
        torch.compiler.cudagraph_mark_step_begin()
        terms, _ = trainer._train_step(clock, current)
        clock = clock._replace(step=clock.step + 1)
        return terms

    return step


def close(subject: str, ratio: float, exact: bool, targets: Mapping[str, float],
          limits: Mapping[str, float] | None = None, **more: Any) -> None:
    """Print the last line: one JSON object with the ratio peers / ours and whether the results are the same.

    Args:
        targets, limits: by the name of a figure (`ratio`, or one of `more`), what it should reach or not pass.
        more: other figures.
    """
    figures = {key: _rounded(value) for key, value in more.items()}
    print(json.dumps({"subject": subject, "ratio": _rounded(ratio), "exact": bool(exact), **figures,
                      "targets": dict(targets), "limits": dict(limits or {})}))


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _three(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
