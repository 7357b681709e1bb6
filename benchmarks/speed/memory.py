"""Measure the memory of one UA-MT step against the peers' way, with and without checkpointing, and against its plan.

The peers' way is that of step.py: float32 in torch's own layout, int64 labels, malloc as it is. Ours is what the
trainer does in every step. Each way has a process of its own, which first makes a tiny step, so that libraries are
loaded. What counts is the largest resident memory in the step, less what is resident before it.
"""

import argparse
import dataclasses
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common  # isort: skip  (before numpy)
import step
import torch

from data_prep import DataError
from networks.checkpointing import recompute_stages
from ssl4mis import memory, run
from ssl4mis.leaderboard import markdown_table

METHOD = "ua_mt"
PEERS, OURS, LEAST = step.PEERS, "ours", "ours, checkpointing"
SIZE, SMALL = ("--patch", "[112,112,80]"), ("--patch", "[48,48,32]", "--width", "8")


def main(argv=None) -> int:
    """Exit status: 0 done, 1 a loss differs, 2 an argument is bad."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of LA (default: that of SSL4MIS_DATA, else phantoms)")
    parser.add_argument("--quick", action="store_true", help="small crops of phantoms: does it run?")
    options = parser.parse_args(argv)
    setting = step.Setting(options.data, SMALL if options.quick else SIZE, options.quick)
    try:
        title, _ = step.scans(setting.data, setting.tiny)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    spec = setting.trainer(METHOD).spec
    with ThreadPoolExecutor(2) as pool:  # memory does not depend on what else runs
        ways = {way: pool.submit(apart, way, setting) for way in (PEERS, OURS, LEAST)}
        planned = {way: plan(spec, way) for way in (OURS, LEAST)}
        peak, terms = zip(*(future.result() for future in ways.values()), strict=True)
    peak, terms = dict(zip(ways, peak, strict=True)), dict(zip(ways, terms, strict=True))

    same = step.relative(terms[PEERS], {name: torch.tensor(value) for name, value in terms[OURS].items()}) <= step.HALF
    exact = terms[OURS] == terms[LEAST] and same
    off = {way: mib / peak[way] - 1 for way, mib in planned.items()}
    print(f"{title}; one step of {METHOD} on {spec.labeled_batch} + {spec.unlabeled_batch} crops of "
          f"{'x'.join(map(str, spec.patch))}, {spec.network} of width {spec.width}; ours in {spec.precision}.")
    print(common.machine(), end="\n\n")
    print(markdown_table(
        ["way", "MiB", "times less", "planned MiB", "off by", *terms[OURS]],
        [[way, f"{mib:.0f}", f"{peak[PEERS] / mib:.3g}",
          *([f"{planned[way]:.0f}", f"{100 * off[way]:+.0f} %"] if way in planned else ["", ""]),
          *(f"{value:.7g}" for value in terms[way].values())] for way, mib in peak.items()]))
    print("Weights, teacher and batch are there before and not counted. What kernels need inside is not planned. With "
          "and without checkpointing losses are equal to the bit.")
    common.close("memory", peak[PEERS] / peak[LEAST], exact, {"ratio": 2},
                 without_checkpointing=peak[PEERS] / peak[OURS], plan_off=max(map(abs, off.values())), data=title)
    return 0 if exact else 1


def apart(way: str, setting: step.Setting) -> tuple[float, dict[str, float]]:
    """MiB and loss terms of a step in a process of its own."""
    with common.Apart(measured, way, setting) as call:
        return call().given


def measured(way: str, setting: step.Setting) -> Callable[[], tuple[float, dict[str, float]]]:
    """A function that makes a step and gives its MiB and loss terms."""
    if way != PEERS:
        memory.keep_pages()
    steps(way, dataclasses.replace(setting, words=step.TINY))()
    one = steps(way, setting)

    def call() -> tuple[float, dict[str, float]]:
        before = resident()
        terms = {name: float(torch.as_tensor(value).detach()) for name, value in one().items()}
        return resident(most=True) - before, terms

    return call


def steps(way: str, setting: step.Setting) -> Callable[[], dict]:
    """A function that makes a step and gives its loss terms."""
    if way == PEERS:
        return step.Published(setting.trainer(METHOD, "32-true"))
    trainer = setting.trainer(METHOD)
    if way == LEAST:
        recompute_stages(trainer.method)
    return common.steps(trainer)


def resident(most: bool = False) -> float:
    """MiB of this process in memory, or the most since this was last asked for without `most`."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    if not most:
        Path("/proc/self/clear_refs").write_text("5")
    [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:" if most else "VmRSS:")]
    return int(line.split()[1]) / 2**10


def plan(spec, way: str) -> float:
    """MiB of a step above weights, teacher, momentum and batch, without making it."""
    from ssl4mis import memory_plan

    def build():
        method = run.build_method(spec, memory_plan.Task(2, 3, 1, (spec.labeled_batch, spec.unlabeled_batch)), None)
        if way == LEAST:
            recompute_stages(method)
        return method

    training = memory_plan.plan(build, spec, torch.device("cpu")).training
    counted = ("gradients", memory_plan.KEPT, memory_plan.TEMPORARY, memory_plan.GAPS)
    return sum(training[name] for name in counted) / 2**20


if __name__ == "__main__":
    sys.exit(main())
