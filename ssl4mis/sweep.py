"""A suite -> its runs, each in a process of its own, by an engine; the results folder is all that is kept."""
import dataclasses
import json
import math
import os
import shlex
import signal
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from ssl4mis import config, engines, suites
from ssl4mis.config import RunOptions, RunSpec
from ssl4mis.engines import Ended, Job
from ssl4mis.errors import UserError
from ssl4mis.progress import LINE_EVERY, duration
from ssl4mis.suites import Run

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "run.py"
LEAN = ("--compile", "none", "--checkpointing", "True")  # windows of a test case are made fewer by the run itself
HELD = "another process is at it"  # as ssl4mis.lock says it
HELD_AGAIN = 10.0  # seconds until a run that another process had is tried once more, after all others
EVENT = 4096  # bytes of the end of events.jsonl that hold its last line
PRICE = ("method", "dataset", "protocol", "network", "width", "patch", "labeled_batch", "unlabeled_batch", "precision")
STATES = ("done", "unfinished", "waiting")


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """How the runs of a suite are handed out.

    Args:
        engine: local, or ray (the extra sweep), which also takes several machines that see the same files.
        processes: runs at a time; without a number one per GPU, else one, and for ray as many as there is room for.
        address: of a Ray cluster, auto, host:port or ray://host:port; local starts Ray here.
        gpus_per_run: for ray, such as 0.5; 1 without a number where there are GPUs.
        cpus_per_run: for ray; without a number those that go with the share of a GPU, else 1.
        retries: of a run whose process was killed; it goes on from its checkpoint.
    """

    engine: Literal["local", "ray"] = "local"
    processes: int | None = None
    address: str = "local"
    gpus_per_run: float | None = None
    cpus_per_run: float | None = None
    retries: int = 2


def main(argv: list[str]) -> int:
    """Exit status: 0 all runs are done or in other hands, 1 some failed, 2 bad input, 130 stopped and resumable."""
    parser = config.Parser(prog="sweep.py", allow_abbrev=False, description="Make the runs of a suite that are not "
                           "done, each in a process of its own. The same command again goes on.")
    names = ", ".join(sorted(path.stem for path in suites.FOLDER.glob("*.toml")))
    parser.add_argument("suite", help=f"a TOML file, or one of benchmarks/suites: {names}")
    parser.add_argument("--dry_run", "--status", action="store_true",
                        help="only say which runs are done, unfinished and waiting, and how long they will take")
    parser.add_argument("--peek_test", action="store_true", help="as of run.py, for every run")
    parser.add_class_arguments(SweepOptions)
    parser.add_class_arguments(RunOptions)
    chosen = parser.parse_args(config.in_order(argv)).as_dict()
    how, options = (kind(**{field.name: chosen[field.name] for field in dataclasses.fields(kind)})
                    for kind in (SweepOptions, RunOptions))
    engine = None
    with suppress(ValueError):  # no handler outside the main thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        check(how)
        suite = suites.read(suites.find(chosen["suite"]), passed_on(options, chosen["peek_test"]))
        if how.engine == "local" or how.address != "local" or not chosen["dry_run"]:  # starting Ray takes a while
            engine = make_engine(how, options)
        device, precision = engine.ask(machine, options.device) if how.address != "local" else machine(options.device)
        runs = [run._replace(spec=dataclasses.replace(run.spec, precision=precision))
                if run.spec.precision == "auto" else run for run in suite.runs]
        return sweep(suite, runs, how, options, chosen, device, engine)
    except UserError as error:
        parser.error(error)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    finally:
        if engine:
            engine.close()


def check(how: SweepOptions) -> None:
    """UserError on values that cannot work."""
    for name, least in (("processes", 1), ("gpus_per_run", 0), ("cpus_per_run", 0), ("retries", 0)):
        value = getattr(how, name)
        if value is not None:
            config.at_least(least, name, value)
    if how.engine == "local":
        for name in ("address", "gpus_per_run", "cpus_per_run"):
            if getattr(how, name) != getattr(SweepOptions(), name):
                raise UserError(f"{name} {getattr(how, name)}: expected --engine ray with it")


def sweep(suite: suites.Suite, runs: Sequence[Run], how: SweepOptions, options: RunOptions, chosen: dict, device: str,
          engine) -> int:
    """List the runs, or make those that are not done; exit status as of `main`."""
    peek = chosen["peek_test"]
    found = states([run.spec.id for run in runs], options.out, peek)
    left = [run for run in runs if found[run.spec.id] != "done"]
    past = Past(device, [options.out / "records", ROOT / "results" / "records"])
    counts = ", ".join(f"{list(found.values()).count(name)} {name}" for name in STATES)
    print(f"{suite.name}: {suite.about}\n{len(runs)} runs: {counts}", flush=True)
    times = {run.spec.id: remaining(run.spec, options, peek, past) for run in left}
    at_once = engine.capacity if engine else how.processes or 1
    print(how_long(list(times.values()), at_once), flush=True)
    if chosen["dry_run"]:
        lines = []
        for run in runs:
            name, rest = run.spec.id, ""
            if name in times:
                seconds, rest = times[name], f"  {shlex.join(run.words)}"
                took = "?" if seconds is None else duration(seconds)
            lines.append(f"{found[name]:10}  {took if rest else '':>7}  {name}{rest}")
        try:
            print("\n".join(lines), flush=True)
        except BrokenPipeError:  # a pager that has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    specs = {run.spec.id: run.spec for run in left}
    show = Board(lambda name: remaining(specs[name], options, peek, past), len(runs), len(runs) - len(left))
    outcome = dispatch([as_job(run, options, peek) for run in left], engine, how.retries, show, past.add)
    print(f"{len(runs) - len(left) + outcome.done} of {len(runs)} runs are done", flush=True)
    for name in outcome.held:
        print(f"in other hands: {name}: another process is at it", file=sys.stderr)
    for name, reason in outcome.failed.items():
        print(f"failed: {name}: {reason} (all of it: {options.out / 'runs' / name / engines.LOG})", file=sys.stderr)
    if outcome.stopped:
        raise KeyboardInterrupt
    return 1 if outcome.failed else 0


def passed_on(options: RunOptions, peek: bool) -> list[str]:
    """The options that are not the default, as words for run.py."""
    stated = {name: str(value) for name, value in dataclasses.asdict(options).items()
              if value != getattr(RunOptions(), name)}
    return suites.words(stated) + ["--peek_test"] * peek


def machine(device: str) -> tuple[str, str]:
    """The type of device behind auto, cpu or cuda, and the precision that auto means on it, as records have it."""
    from ssl4mis.run import pick_device, pick_precision

    found = pick_device(device)
    return found.type, pick_precision("auto", found)


def make_engine(how: SweepOptions, options: RunOptions):
    """The engine that the options name; UserError where it does not work here."""
    gpus = gpu_count(options.device)
    if how.engine == "local":
        return engines.Local(engines.environments(how.processes, gpus))
    share = 0.0 if options.device == "cpu" else how.gpus_per_run
    return engines.Ray(how.address, share, how.cpus_per_run, how.processes, how.retries)


def gpu_count(device: str) -> int:
    """GPUs that runs may take here."""
    if device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def as_job(run: Run, options: RunOptions, peek: bool) -> Job:
    """A run as an engine takes it; precision as in its id, whatever processor it meets."""
    products = [options.out / folder / f"{run.spec.id}.json" for folder in ("records", "peeks")[: 1 + peek]]
    command = [sys.executable, str(SCRIPT), *run.words, "--precision", run.spec.precision]
    return Job(run.spec.id, command, options.out / "runs" / run.spec.id, products, run.spec.iterations, LEAN)


def states(names: Sequence[str], out: Path, peek: bool = False) -> dict[str, str]:
    """By id: done (and peeked at, if asked), unfinished (there is a checkpoint) or waiting; a folder is read once."""
    def listed(folder: str) -> set[str]:
        with suppress(OSError):
            return set(os.listdir(out / folder))
        return set()

    records, peeks, folders, found = listed("records"), listed("peeks"), listed("runs"), {}
    for name in names:
        known, file = name in folders, f"{name}.json"
        if file in records and (file in peeks or not peek):
            found[name] = "done"
        elif file in records or known and any(entry.endswith(".ckpt") for entry in listed(f"runs/{name}")):
            found[name] = "unfinished"
        else:
            found[name] = "waiting"
    return found


# --- how long ---------------------------------------------------------------------------------------------------------


class Price(NamedTuple):
    """Seconds of training per iteration and of one evaluation."""

    iteration: float
    evaluation: float


class Past:
    """What runs of the same work took on the same type of device, from the records in some folders."""

    def __init__(self, device: str, folders: Iterable[Path] = ()):
        self.device, self.known, self.seen, self.rates = device, defaultdict(list), set(), {}
        for path in (path for folder in folders for path in folder.glob("*.json")):
            self.add(path)

    def add(self, path: Path) -> None:
        """Count a record; one that cannot be read, or is known, says nothing."""
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError):
            record = json.loads(path.read_text(encoding="utf-8"))
            spec, timing = record["spec"], record["timing"]
            if record["device"]["type"] == self.device and path.name not in self.seen:
                self.known[price_key(spec)].append(Price(timing["train_seconds"] / spec["iterations"],
                                                         float(timing["evaluate_seconds"])))
                self.seen.add(path.name)

    def price(self, spec: RunSpec, rate: float = 0.0) -> Price | None:
        """The median of each, or the rate of the run, else of one now where there is no record; None without any."""
        key = price_key(dataclasses.asdict(spec))
        if rate:
            self.rates[key] = rate
        rate, known = rate or (key not in self.known and self.rates.get(key, 0.0)), self.known.get(key)
        found = Price(*map(statistics.median, zip(*known, strict=True))) if known else Price(0.0, 0.0)
        return found._replace(iteration=1 / rate) if rate else found if known else None


def price_key(spec: dict) -> str:
    """What two runs share whose iterations take as long."""
    return json.dumps([spec[name] for name in PRICE])


def remaining(spec: RunSpec, options: RunOptions, peek: bool, past: Past) -> float | None:
    """Seconds of what is left of a run, at the rate that it last had or of runs before it; None where none is known."""
    done, rate = progress(options.out / "runs" / spec.id)
    price = past.price(spec, rate)
    evaluations = 1 + (spec.iterations - 1) // (options.keep_every or max(1, spec.iterations // 10)) if peek else 1
    return price and (spec.iterations - done) * price.iteration + evaluations * price.evaluation


def progress(folder: Path) -> tuple[int, float]:
    """Iterations that a run has logged, and its rate per second; 0 where it has not."""
    with suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        with open(folder / "events.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - EVENT))
            lines = file.read().splitlines(keepends=True)
        event = json.loads([line for line in lines if line.endswith(b"\n")][-1])
        return int(event["done"]), float(event["rate"])
    return 0, 0.0


def how_long(times: Sequence[float | None], at_once: int) -> str:
    """What is left, in words; runs of no known time are counted apart."""
    known = [seconds for seconds in times if seconds is not None]
    unknown = len(times) - len(known)
    parts = [f"about {duration(together(known, at_once))} left, {at_once} at a time"] if known else []
    parts += [f"no estimate of {unknown} runs, of whose like there is no record"] if unknown else []
    return "; ".join(parts) or "nothing left"


def together(times: Sequence[float], at_once: int) -> float:
    """Seconds that so many runs at a time take: at least the longest one."""
    return max(sum(times) / max(1, at_once), max(times, default=0.0))


# --- handing out ------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of the jobs of a sweep, by name: reasons of failures, and those in the hands of other processes."""

    done: int = 0
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    held: list[str] = dataclasses.field(default_factory=list)
    stopped: bool = False


@dataclass
class Try:
    """A job on its way: how often its process was killed, how long its log was, when it may start."""

    job: Job
    killed: int = 0
    lean: bool = False
    held: bool = False
    log: int = 0
    after: float = 0.0

    def next(self) -> Job:
        return self.job._replace(command=[*self.job.command, *(self.job.lean if self.lean else ())])

    @property
    def running(self) -> bool:
        """Whether its process has begun, which the engine may still be making room for."""
        return log_size(self.job) != self.log


def log_size(job: Job) -> int:
    with suppress(OSError):
        return (job.folder / engines.LOG).stat().st_size
    return 0


def dispatch(jobs: Iterable[Job], engine, retries: int, show, finished=lambda path: None) -> Outcome:
    """Hand all jobs to an engine and wait for them; returns what became of each.

    A killed job goes on up to `retries` times; one that was short of memory, or killed twice, gets its lean words.
    After Ctrl-C or SIGTERM processes save their state and nothing new starts; after a second one they end at once, and
    after a third one they are not waited for.
    """
    waiting, busy, outcome = deque(map(Try, jobs)), {}, Outcome()
    with Signals() as stop:
        asked = 0
        while busy and stop.asked < 3 or waiting and not stop.asked:
            if stop.asked > asked:
                asked = stop.asked
                running = sum(one.running for one in busy.values())
                show.say(f"stopping: {running} {'end at once' if asked > 1 else 'save their state'}")
                engine.stop(kill=asked > 1)
            now = time.monotonic()
            while waiting and not stop.asked and len(busy) < engine.places and waiting[0].after <= now:
                one = waiting.popleft()
                if one.job.done:  # by another sweep
                    outcome.done += 1
                    continue
                one.log, busy[one.job.name] = log_size(one.job), one
                engine.start(one.next())
            for job, end in engine.ended(0.2) if busy else pause(0.2):
                one = busy.pop(job.name)
                settle(one, end, waiting, outcome, retries, show, stop.asked)
                if one.job.done:
                    finished(one.job.products[0])
            show(list(busy.values()), waiting, outcome, engine.capacity)
        show(list(busy.values()), waiting, outcome, engine.capacity, last=True)
    outcome.stopped = stop.asked > 0
    return outcome


def pause(seconds: float) -> list:
    """Nothing has ended, but a little later."""
    time.sleep(seconds)
    return []


def settle(one: Try, end: Ended, waiting: deque, outcome: Outcome, retries: int, show, stopping: int) -> None:
    """Note how a process ended: its job is done, has failed or is put back to go on."""
    name, killed = one.job.name, end.status < 0 or end.status == 130
    if end.status == 0 and one.job.done:
        outcome.done += 1
        show.say(f"done {name}")
    elif stopping and (killed or end.status == 0):
        return
    elif end.status == 2 and HELD in end.line:
        if one.held:
            outcome.held.append(name)
            show.say(f"in other hands {name}")
        else:
            one.held, one.after = True, time.monotonic() + HELD_AGAIN
            waiting.append(one)
    elif end.memory and not one.lean:
        one.lean = True
        waiting.append(one)  # not at once, for a neighbour may have the memory
        show.say(f"again {name}, with less memory: {end.line}")
    elif killed and one.killed < retries:
        one.killed += 1
        # one kill may be a person's, two in a row are those of a system without memory
        one.lean = one.lean or one.killed > 1 and end.status == -signal.SIGKILL
        waiting.appendleft(one)
        show.say(f"again {name}: {end.line}")
    else:
        missing = [str(path) for path in one.job.products if not path.exists()]
        outcome.failed[name] = end.line if end.status else f"it ended well without {', '.join(missing)}"
        show.say(f"failed {name}: {outcome.failed[name]}")


class Signals:
    """Counts the signals that ask to stop."""

    def __init__(self):
        self.asked, self.former = 0, {}

    def __enter__(self):
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                with suppress(ValueError):  # no handler outside the main thread
                    self.former[number] = signal.signal(number, self._count)
        return self

    def _count(self, number, frame):
        self.asked += 1

    def __exit__(self, *error):
        for number, handler in self.former.items():
            signal.signal(number, handler)


# --- what people see --------------------------------------------------------------------------------------------------


class Board:
    """Shows a sweep: a table on a terminal, else a line when a run ends and one now and then.

    `left` gives the seconds that are left of a run by its id, or None.
    """

    def __init__(self, left, total: int, before: int):
        from rich.console import Console
        from rich.live import Live

        self.left, self.total, self.before = left, total, before
        self.console = Console(stderr=True, soft_wrap=True)
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None
        self.shown = self.asked = time.monotonic()
        self.times: dict[str, float | None] = {}

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, highlight=False, markup=False)

    def __call__(self, running: list[Try], waiting: deque, outcome: Outcome, at_once: int, last: bool = False) -> None:
        now = time.monotonic()
        if last and self.live:
            self.live.stop()
        if last or now - self.shown < (1 if self.live else LINE_EVERY):
            return
        from rich.console import Group
        from rich.text import Text

        self.shown = now
        begun = [one for one in running if one.running]
        times = [self.left(one.job.name) for one in running] + self.later(waiting)
        known = [seconds for seconds in times if seconds is not None]
        rest = f"about {duration(together(known, at_once))} left" if known else "time left unknown"
        unknown = f" but for {len(times) - len(known)} runs" if 0 < len(known) < len(times) else ""
        line = (f"{self.before + outcome.done}/{self.total} done, {len(begun)} running, "
                f"{len(waiting) + len(running) - len(begun)} waiting, {len(outcome.failed)} failed, {rest}{unknown}")
        if self.live:
            self.live.start()
            self.live.update(Group(Text(line), self.table(begun)), refresh=True)
        else:
            self.say(line)

    def later(self, waiting: deque) -> list[float | None]:
        """Seconds of waiting runs, asked now and then, for there may be a thousand."""
        if not self.times or time.monotonic() - self.asked > LINE_EVERY:
            self.times, self.asked = {one.job.name: self.left(one.job.name) for one in waiting}, time.monotonic()
        return [self.times.get(one.job.name) for one in waiting]

    def table(self, begun: list[Try]):
        """A row for each running job."""
        from rich.table import Table

        table = Table(box=None)
        for heading in ("run", "iteration", "it/s", "left"):
            table.add_column(heading, justify="left" if heading == "run" else "right")
        for one in begun[: max(3, self.console.height - 5)]:
            done, rate = progress(one.job.folder)
            seconds = self.left(one.job.name)
            table.add_row(one.job.name, f"{done}/{one.job.total}" if done < one.job.total else "evaluating",
                          f"{rate:.2f}" if math.isfinite(rate) and rate else "", "" if seconds is None else
                          duration(seconds))
        return table
