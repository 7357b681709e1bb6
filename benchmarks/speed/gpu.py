"""Measure this suite on a CUDA device, check every method's step against the CPU, and end with a verdict in one line.

The trainer, loader and evaluator are those of real runs, on LA at full size (phantoms of its size without the data).
Every section stands alone: what fails is said in a line, the rest goes on, and the exit status is 1.
"""

import argparse
import dataclasses
import functools
import gc
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))  # as in a run: the other scripts take one thread

import common  # isort: skip  (before numpy)
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import data_prep
from ssl4mis import config, registry, run
from ssl4mis.evaluator import evaluate
from ssl4mis.leaderboard import markdown_table
from ssl4mis.loading import Loader
from ssl4mis.method import Task
from ssl4mis.records import write_text
from ssl4mis.trainer import Trainer

MODEL = {"ua_mt": 11.0, "bcp": 6.0, "dtc": 4.5}  # ms per step that an H200 should take
MINUTES, SECONDS = 2.0, 3.0  # targets: 6,000 iterations of UA-MT, and 20 cases of LA
PUBLISHED = 6000
LABELED = 16  # training cases of LA with a label
PHANTOMS = 4  # that stand for all 100 cases of LA
TOLERANCE = 2e-3  # of a loss term, relative, where both devices compute in float32
UPDATE = 0.05  # of what a step changes in the weights, relative: gradients amplify rounding
TINY = ("--patch", "[32,32,16]", "--stride", "[16,16,8]", "--width", "2")
CHECKED = ("--patch", "[48,48,32]", "--width", "4", "--precision", "32-true")  # small enough for the CPU
GIB, TERA, NAN = 2**30, 1e12, float("nan")


class Wrong(Exception):
    """A check that did not hold, in one line."""


@dataclasses.dataclass
class Bench:
    """What all sections share: the device, the scans, and what was found so far."""

    device: torch.device
    store: Any
    ids: list[str]  # of training, then of test cases
    title: str
    quick: bool
    methods: list[str]
    iterations: int
    deadline: float
    ready: float  # seconds until everything was imported and all cases were read
    lines: list[str] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)
    found: dict[str, Any] = dataclasses.field(default_factory=dict)

    def say(self, text: str) -> None:
        """Print, and keep for --out."""
        print(text, flush=True)
        self.lines.append(text)

    def attempt(self, what: str, call: Callable[[], Any]) -> Any:
        """What a call gives; None, and a line, where it raises."""
        try:
            return call()
        except Exception as error:  # one method or section must not take the others along
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.failures.append(what)
            self.say(f"{what} failed: {reason[:300]}\n")
            return None

    def spec(self, method: str, *words: str) -> config.RunSpec:
        """The settings of `--method METHOD --dataset LA`, in bf16, or tiny ones."""
        common_words = ["--method", method, "--dataset", "LA", "--precision", "bf16-mixed"]
        return config.parse([*common_words, *(TINY if self.quick else ()), *words], "gpu.py")[0][0]

    def trainer(self, spec: config.RunSpec, folder: Path, device: torch.device | None = None, **settings) -> Trainer:
        """The trainer of a run with fresh weights, which are the same on every device."""
        train = self.ids[:-20]
        needs = registry.method_class(spec.method).needs
        batch = (spec.labeled_batch, spec.unlabeled_batch)
        loader = Loader(self.store, train[:spec.labeled], train[spec.labeled:], spec.patch, batch, spec.seed,
                        spec.augmentation, device or self.device, needs=needs)
        torch.manual_seed(spec.seed)
        task = Task(2, 3, 1, batch)
        method = run.build_method(spec, task, data_prep.dataset("LA").spacing)
        return Trainer(method, loader, spec, folder, save_every=250, **settings)

    @contextmanager
    def training(self, spec: config.RunSpec, **settings) -> Iterator[Trainer]:
        """The same in a folder of its own, on a device whose memory is free."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        with tempfile.TemporaryDirectory() as folder:
            yield self.trainer(spec, Path(folder), **settings)

    def seconds(self, call: Callable[[], Any], count: int) -> tuple[float, float]:
        """Seconds per call on the device, of `count` calls in a row, and seconds in which the host queued each."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(count):
                call()
            spent = (time.perf_counter() - start) / count
            return spent, spent
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        begin.record()
        for _ in range(count):
            call()
        end.record()
        queued = time.perf_counter() - start
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / count, queued / count


def main(argv=None) -> int:
    """Exit status: 0 done, 1 something failed or differs, 2 an argument is bad or there is no CUDA."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of LA (default: that of SSL4MIS_DATA, else phantoms)")
    parser.add_argument("--out", type=Path, help="file for what is printed, Markdown")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu goes with --quick")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: do all sections run?")
    parser.add_argument("--methods", help="some of all, with commas (default: all)")
    parser.add_argument("--iterations", type=int, default=300, help="of the run that is projected (%(default)s)")
    parser.add_argument("--minutes", type=float, default=5, help="after which nothing more is compiled (%(default)g)")
    options = parser.parse_args(argv)
    names = options.methods.split(",") if options.methods else registry.names()
    for name in names:
        if name not in registry.names():
            parser.error(f"--methods {options.methods}: '{name}' is unknown, expected some of "
                         f"{','.join(registry.names())}")
    if options.iterations < 1:
        parser.error(f"--iterations {options.iterations}: expected at least 1")
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu: expected --quick with it, full size takes hours there")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu.py: torch sees no CUDA device here, expected one (--device cpu --quick tries all sections without)",
              file=sys.stderr)
        return 2
    try:
        imported = time.process_time()  # so far the process has done little else
        store, ids, title, read = scans(options.data, options.quick)
    except data_prep.DataError as error:
        print(error, file=sys.stderr)
        return 2
    bench = Bench(torch.device(options.device), store, ids, title, options.quick, names,
                  4 if options.quick else options.iterations, time.monotonic() + 60 * options.minutes, imported + read)
    bench.say(f"# {run.device_name(bench.device)}: {title}\n\n{common.machine()}; torch {torch.__version__}, CUDA "
              f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}\n")
    for number, section in enumerate(SECTIONS):
        bench.say(f"{chr(10) if number else ''}## {section.__doc__.splitlines()[0].rstrip('.')}\n")
        bench.attempt(section.__name__, functools.partial(section, bench))
    verdict(bench)
    if options.out:
        write_text(options.out, "\n".join(bench.lines) + "\n")
    return 1 if bench.failures else 0


def scans(folder: str | None, quick: bool) -> tuple[Any, list[str], str, float]:
    """A store that keeps in memory what it gives, its training and then test cases, what they are, seconds of reading.

    Raises DataError where a given folder has no LA.
    """
    (store, train), (_, test) = common.la(folder, "train"), common.la(folder, "test")
    ids = train + test
    if quick or store is None:
        title, drawn = common.cases(None, PHANTOMS, common.TINY if quick else common.SHAPE)
        title = f"{title} under the {len(ids)} names of LA"
        place = dict(zip(ids, itertools.cycle(drawn), strict=False))
        store = SimpleNamespace(image=lambda case: place[case].image, label=lambda case: place[case].label,
                                spacing=lambda case: place[case].spacing)
    else:
        title = f"LA, full resolution, {len(ids)} cases"
    kept = SimpleNamespace(image=functools.cache(store.image), label=functools.cache(store.label),
                           spacing=store.spacing)
    start = time.perf_counter()
    for number, case in enumerate(ids):
        kept.image(case)
        if number < LABELED or case in test:
            kept.label(case)
    return kept, ids, title, time.perf_counter() - start


def peaks(bench: Bench) -> None:
    """Peaks: products of two square matrices, and a copy"""
    side = 256 if bench.quick else 8192
    kinds = {"bf16": (torch.bfloat16, "highest"), "fp32": (torch.float32, "highest"), "TF32": (torch.float32, "high")}
    rows, former = [], torch.get_float32_matmul_precision()
    try:
        for name, (kind, precision) in kinds.items():
            torch.set_float32_matmul_precision(precision)
            a, b = torch.randn(2, side, side, device=bench.device).to(kind)
            bench.seconds(lambda a=a, b=b: a @ b, 3)
            best = min(bench.seconds(lambda a=a, b=b: a @ b, 10)[0] for _ in range(3))
            bench.found[f"peak_{name}"] = 2 * side**3 / best / TERA
            rows.append([f"matmul {side}^3, {name}", f"{bench.found[f'peak_{name}']:.4g} TFLOP/s"])
    finally:
        torch.set_float32_matmul_precision(former)
    source = torch.zeros(2**20 if bench.quick else 2**30, dtype=torch.uint8, device=bench.device)
    goal = torch.empty_like(source)
    best = min(bench.seconds(lambda: goal.copy_(source), 10)[0] for _ in range(3))
    rows.append(["copy, read and written", f"{2 * source.nbytes / best / 1e9:.4g} GB/s"])
    bench.say(markdown_table(["", "measured"], rows).rstrip())


class DrawnByCPU(TorchDispatchMode):
    """Inside, random numbers for any device are drawn by the CPU's generator, so that two devices draw the same."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        device = torch.device(kwargs.get("device") or (tensors[0].device if tensors else "cpu"))
        if device.type == "cpu" or torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        drawn = func(*tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, args), **kwargs)
        if func._schema.is_mutable:
            return args[0].copy_(drawn)
        return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, drawn)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Convolutions and products in float32 proper, by algorithms that repeat."""
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False, fp32_precision="ieee"):
            yield
    finally:
        torch.set_float32_matmul_precision(former)


def agreement(bench: Bench) -> None:
    """Correctness: one step of every stage in float32, on the device and on the CPU

    Weights, batches and random numbers are the same.
    """
    rows, agree = [], []
    for name in bench.methods:
        compared = bench.attempt(f"step of {name} against the CPU", functools.partial(differences, bench, name))
        if compared:
            terms, update = compared
            good = terms <= TOLERANCE and update <= UPDATE
            (agree if good else bench.failures).append(name if good else f"{name} differs from the CPU")
            rows.append([name, f"{terms:.1e}", f"{update:.1e}", "yes" if good else "**no**"])
    bench.found["agree"] = agree
    bench.say(markdown_table(["method", f"loss terms (limit {TOLERANCE:g})", f"weights' change (limit {UPDATE:g})",
                              "agrees"], rows) + "\nLargest relative differences.")


def differences(bench: Bench, name: str) -> tuple[float, float]:
    """Largest relative difference of a loss term, and relative difference of what the steps change in the weights."""
    spec = bench.spec(name, *CHECKED, *(TINY if bench.quick else ()))
    runs = []
    for device in (torch.device("cpu"), bench.device):
        with bench.training(spec, device=device) as trainer, exact_arithmetic():
            before, terms = weights(trainer), {}
            for stage in range(len(trainer.plan)):
                step = common.steps(trainer, stage)
                with DrawnByCPU():
                    terms |= {f"{stage}/{term}": float(value.detach()) for term, value in step().items()}
            runs.append((terms, weights(trainer) - before))
    (expected, moved), (found, also) = runs
    off = max(abs(found[term] - value) / max(abs(value), 1e-3) for term, value in expected.items())
    return off, ((also - moved).norm() / moved.norm()).item()


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().double().cpu().flatten() for p in trainer.method.parameters()])


def training(bench: Bench) -> None:
    """Training steps: published batch, bf16"""
    bench.found["waitless"] = []
    rows = [bench.attempt(f"step of {name}", functools.partial(measured, bench, name)) for name in bench.methods]
    if "ua_mt" in bench.methods:
        rows.append(bench.attempt("step with cudnn.benchmark", functools.partial(searched, bench, "ua_mt")))
    bench.say(markdown_table(
        ["method", "batch", "ms per step", "model ms", "queued in ms", "loading ms", "TFLOP", "TFLOP/s",
         "of bf16 peak", "peak GiB", "waits for the device"], filter(None, rows)) +
        "\nQueued: what the host needs to start a step. Loading: of batches one after the other, by host and device; "
        "in a step it goes on beside the network. Peak: with the scans. Model: an H200 in bf16 with convolutions at "
        "40 % of its peak and all else fused. cudnn.benchmark: cuDNN takes the fastest algorithm that it finds; runs "
        "leave it off, since a resumed run might find another one.")


def measured(bench: Bench, name: str) -> list[str]:
    """The row of a method; what its steps wait for is a failure, too."""
    spec = bench.spec(name)
    with bench.training(spec) as trainer:
        step = common.steps(trainer)
        spent, queued = timed(bench, step)
        peak, numbers = peak_gib(bench), itertools.count()
        loading = bench.seconds(lambda: trainer.loader.batch(0, next(numbers)), 2 if bench.quick else 20)[0]
        with FlopCounterMode(display=False) as counter:
            step()
        work = counter.get_total_flops() / TERA
        waits = bench.attempt(f"{name} without waiting for the device", functools.partial(unhindered, bench, step))
    bench.found[f"{name}_ms"], bench.found[f"{name}_gib"] = 1000 * spent, peak
    if waits == "no":
        bench.found["waitless"].append(name)
    share = work / spent / bench.found.get("peak_bf16", NAN)
    return [name, f"{spec.labeled_batch}+{spec.unlabeled_batch}", f"{1000 * spent:.3g}", f"{MODEL.get(name, '')}",
            f"{1000 * queued:.3g}", f"{1000 * loading:.3g}", f"{work:.3g}", f"{work / spent:.3g}",
            f"{100 * share:.1f} %", f"{peak:.2f}", waits or "**yes**"]


def searched(bench: Bench, name: str) -> list[str]:
    """The row of a method where cuDNN looks for the fastest algorithms."""
    torch.backends.cudnn.benchmark = True
    try:
        with bench.training(bench.spec(name)) as trainer:
            spent, queued = timed(bench, common.steps(trainer))
            peak = peak_gib(bench)
    finally:
        torch.backends.cudnn.benchmark = False
    bench.found[f"{name}_benchmark_ms"] = 1000 * spent
    return [f"{name}, cudnn.benchmark", "", f"{1000 * spent:.3g}", "", f"{1000 * queued:.3g}", "", "", "", "",
            f"{peak:.2f}", ""]


def peak_gib(bench: Bench) -> float:
    """Peak of the device's memory since `timed` began."""
    return torch.cuda.max_memory_allocated(bench.device) / GIB if bench.device.type == "cuda" else NAN


def timed(bench: Bench, step: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of a step on the device and of queuing it, medians of three turns, after a warm-up; peak memory anew."""
    bench.seconds(step, 1 if bench.quick else 5)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    turns = [bench.seconds(step, 1 if bench.quick else 10) for _ in range(1 if bench.quick else 3)]
    return tuple(statistics.median(turn[part] for turn in turns) for part in range(2))


def unhindered(bench: Bench, step: Callable[[], Any]) -> str:
    """What the table says of steps in which the host never waits; RuntimeError at what waits."""
    if bench.device.type != "cuda":
        step()
        return "not known here"
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no"


def a_run(bench: Bench) -> None:
    """A run of UA-MT: iterations with logs and checkpoints, then the 20 test cases

    Steps were warmed up before, cases are in memory, and the network has learned enough for masks with a surface.
    """
    spec = bench.spec("ua_mt", "--iterations", str(bench.iterations))
    dataset = data_prep.dataset("LA")
    targets, test = dataset.targets(dataset.protocols["paper"]), bench.ids[-2 if bench.quick else -20:]
    with bench.training(spec) as trainer:
        trained = trainer.fit()
        each = trained["seconds"] / spec.iterations
        bench.say(f"{spec.iterations} iterations in {trained['seconds']:.3g} s, {1000 * each:.3g} ms each; imports and "
                  f"reading of {len(bench.ids)} cases took {bench.ready:.3g} s.\n")
        rows = []
        for precision in ("32-true", "bf16-mixed"):
            scores = functools.partial(evaluated, bench, trainer, test, targets, precision)
            row = bench.attempt(f"evaluation in {precision}", scores)
            if row:
                rows.append(row)
    bench.say(markdown_table(["evaluation in", "seconds per case", f"seconds of {len(test)} cases",
                              "mean Dice, %"], rows))
    if "evaluate_32-true" in bench.found:
        bench.found["minutes"] = projected(bench, each)
        bench.say(f"{PUBLISHED} iterations with imports, reading and evaluation in float32, projected: "
                  f"{bench.found['minutes']:.2f} minutes.")


def projected(bench: Bench, step: float) -> float:
    """Minutes of a published run of UA-MT from the seconds of a step, all included."""
    return (bench.ready + PUBLISHED * step + bench.found["evaluate_32-true"]) / 60


def evaluated(bench: Bench, trainer: Trainer, test: list[str], targets: dict, precision: str) -> list[str]:
    """The row of a precision: cases segmented and scored, after one to warm up."""
    spec, stamps = trainer.spec, []

    def scores(cases):
        return evaluate(trainer.method, bench.store, cases, targets, spec.patch, spec.stride, bench.device,
                        lambda done, case: stamps.append(time.perf_counter()), precision=precision).cases

    scores(test[:1])
    stamps[:] = [time.perf_counter()]
    rows = scores(test)
    bench.found[f"evaluate_{precision}"] = stamps[-1] - stamps[0]
    each = statistics.median(later - sooner for sooner, later in itertools.pairwise(stamps))
    return [precision, f"{each:.3g}", f"{stamps[-1] - stamps[0]:.3g}",
            f"{100 * statistics.mean(row['dice'] for row in rows):.2f}"]


class Killed(Exception):
    """Stands for a power cut."""


def resume(bench: Bench) -> None:
    """Resume: four iterations of UA-MT at once, and killed on the way"""
    spec = bench.spec("ua_mt", *CHECKED[:4], *(TINY if bench.quick else ()), "--iterations", "4")

    def whole() -> dict:
        with bench.training(spec) as trainer:
            trainer.fit()
            return state(trainer)

    def killed() -> dict:
        """The state after a run that is cut before its fourth step and started again."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            first = bench.trainer(spec, folder)
            first.save_every, load = 2, first.loader.batch

            def cut(stage, step):
                if step == 3:
                    raise Killed
                return load(stage, step)

            first.loader.batch = cut
            with suppress(Killed):
                first.fit()
            second = bench.trainer(spec, folder)
            second.fit()
            return state(second)

    with exact_arithmetic():
        at_once, again, resumed = whole(), whole(), killed()
    repeats, off = distance(at_once, again), distance(at_once, resumed)
    bench.found["resume"] = off <= 10 * repeats  # 0 where the device repeats itself, as it should
    bench.say(f"Largest difference of a weight or statistic: {off:.2g} (two runs without a kill: {repeats:.2g}).")
    if not bench.found["resume"]:
        raise Wrong(f"a resumed run is another run, by {off:.2g}")


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().double() for name, value in trainer.method.state_dict().items()}


def distance(first: dict, second: dict) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first)


def compiled(bench: Bench) -> None:
    """Compiled steps: --compile reduce-overhead, bf16"""
    rows = []
    for name in [name for name in MODEL if name in bench.methods]:
        if time.monotonic() > bench.deadline:
            bench.say(f"{name} is left out: the time is over (--minutes)\n")
            continue
        row = bench.attempt(f"compiled step of {name}", functools.partial(compile_one, bench, name))
        if row:
            rows.append(row)
    bench.say(markdown_table(["method", "ms per step", "not compiled", "peak GiB", "first steps, s"], rows))
    if "ua_mt_compiled_ms" in bench.found and "minutes" in bench.found:
        bench.found["minutes_compiled"] = total = (
            projected(bench, bench.found["ua_mt_compiled_ms"] / 1000) + bench.found["ua_mt_compile_seconds"] / 60)
        bench.say(f"{PUBLISHED} iterations of UA-MT, compiled, all included, projected: {total:.2f} minutes.")


def compile_one(bench: Bench, name: str) -> list[str]:
    """The row of a method; --quick runs what would be compiled as it is, since compiling takes minutes."""
    stance = torch.compiler.set_stance("force_eager") if bench.quick else nullcontext()
    with stance, bench.training(bench.spec(name), compile="reduce-overhead") as trainer:
        step = common.steps(trainer)
        start = time.perf_counter()
        bench.seconds(step, 2)
        first = time.perf_counter() - start
        spent, _ = timed(bench, step)
        peak = peak_gib(bench)
    bench.found[f"{name}_compiled_ms"], bench.found[f"{name}_compile_seconds"] = 1000 * spent, first
    return [name, f"{1000 * spent:.3g}", f"{bench.found.get(f'{name}_ms', NAN):.3g}", f"{peak:.2f}", f"{first:.3g}"]


SECTIONS = (peaks, agreement, training, a_run, resume, compiled)


def verdict(bench: Bench) -> None:
    """One line for people and one for programs."""
    found, device = bench.found, run.device_name(bench.device)
    minutes, seconds = found.get("minutes", NAN), found.get("evaluate_32-true", NAN)
    steps = []
    for name in [name for name in MODEL if f"{name}_ms" in found]:
        compiled = f", compiled {found[f'{name}_compiled_ms']:.3g}" if f"{name}_compiled_ms" in found else ""
        steps.append(f"{name} {found[f'{name}_ms']:.3g} ms (model {MODEL[name]:g}{compiled})")
    agree, waitless = len(found.get("agree", ())), len(found.get("waitless", ()))
    parts = [
        f"{agree} of {len(bench.methods)} methods agree with the CPU",
        f"{waitless} never wait for the device" if bench.device.type == "cuda" else "waits not known here",
        f"resume is {'' if found.get('resume') else 'not '}exact", f"steps {', '.join(steps) or 'not measured'}",
        f"{PUBLISHED} iterations of UA-MT in {minutes:.2f} min ({held(minutes, MINUTES)}" +
        (f", compiled {found['minutes_compiled']:.2f})" if "minutes_compiled" in found else ")"),
        f"20 cases in {seconds:.2f} s ({held(seconds, SECONDS)})", f"failed: {', '.join(bench.failures) or 'nothing'}"]
    bench.say(f"\nVerdict on {device}, {bench.title}: {'; '.join(parts)}")
    figures = {key: value for key, value in found.items() if isinstance(value, float) and value == value}
    common.close("gpu", MINUTES / minutes if minutes == minutes else 0.0, agree == len(bench.methods),
                 {"ratio": 1, "cases_ratio": 1}, cases_ratio=SECONDS / seconds if seconds == seconds else 0.0,
                 device=device, data=bench.title, failures=bench.failures, **figures)


def held(value: float, target: float) -> str:
    """Whether a target was reached; a value that is not known reaches none."""
    return f"target {target:g}: {'holds' if value <= target else 'missed'}"


if __name__ == "__main__":
    sys.exit(main())
