"""A suite -> its runs, one after the other, each in a process of its own; the results folder is all that is kept."""
import dataclasses
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ssl4mis import config, suites
from ssl4mis.config import RunOptions
from ssl4mis.errors import UserError
from ssl4mis.suites import Run

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "run.py"


def main(argv: list[str]) -> int:
    """Exit status: 0 all runs are done, 1 some failed, 2 bad input, 130 stopped and resumable."""
    parser = config.Parser(prog="sweep.py", allow_abbrev=False, description="Make the runs of a suite that are not "
                           "done, one after the other. The same command again goes on.")
    names = ", ".join(sorted(path.stem for path in suites.FOLDER.glob("*.toml")))
    parser.add_argument("suite", help=f"a TOML file, or one of benchmarks/suites: {names}")
    parser.add_argument("--dry_run", "--status", action="store_true",
                        help="only say which runs are done, unfinished and waiting")
    parser.add_argument("--peek_test", action="store_true", help="as of run.py, for every run")
    parser.add_class_arguments(RunOptions)
    chosen = parser.parse_args(config.in_order(argv)).as_dict()
    options = RunOptions(**{field.name: chosen[field.name] for field in dataclasses.fields(RunOptions)})
    try:
        suite = suites.read(suites.find(chosen["suite"]), passed_on(options, chosen["peek_test"]))
        runs = as_here(suite.runs, options)
    except UserError as error:
        parser.error(error)
    states = [state(run.spec.id, options.out, chosen["peek_test"]) for run in runs]
    counts = ", ".join(f"{states.count(name)} {name}" for name in ("done", "unfinished", "waiting"))
    print(f"{suite.name}: {suite.about}\n{len(runs)} runs: {counts}", flush=True)
    if chosen["dry_run"]:
        for run, found in zip(runs, states, strict=True):
            print(f"{found:10}  {run.spec.id}" + ("" if found == "done" else f"  {shlex.join(run.words)}"))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failed = local([run for run, found in zip(runs, states, strict=True) if found != "done"])
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    for run, reason in failed:
        print(f"failed: {run.spec.id}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def passed_on(options: RunOptions, peek: bool) -> list[str]:
    """The options that are not the default, as words for run.py."""
    stated = {name: str(value) for name, value in dataclasses.asdict(options).items()
              if value != getattr(RunOptions(), name)}
    return suites.words(stated) + ["--peek_test"] * peek


def as_here(runs: Sequence[Run], options: RunOptions) -> list[Run]:
    """The runs with the precision that auto means on this device, as their records have it."""
    from ssl4mis.run import pick_device, pick_precision

    device = pick_device(options.device)
    return [run._replace(spec=dataclasses.replace(run.spec, precision=pick_precision(run.spec.precision, device)))
            for run in runs]


def state(name: str, out: Path, peek: bool = False) -> str:
    """Of the run with that id: done (and peeked at, if asked), unfinished (there is a checkpoint) or waiting."""
    record, peeks = (out / folder / f"{name}.json" for folder in ("records", "peeks"))
    if record.exists() and (peeks.exists() or not peek):
        return "done"
    return "unfinished" if record.exists() or any((out / "runs" / name).glob("*.ckpt")) else "waiting"


def local(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    """Make runs one after the other; returns those that failed, each with why. KeyboardInterrupt where one is stopped.

    An engine: it gets runs, whose words do all the rest, and the results folder tells any other one what is done.
    """
    failed = []
    for number, run in enumerate(runs, 1):
        print(f"\n[{number}/{len(runs)}] run.py {shlex.join(run.words)}", flush=True)
        status, line = attempt(run.words)
        if status == 130:
            raise KeyboardInterrupt
        if status:
            failed.append((run, line))
    return failed


def attempt(words: Sequence[str]) -> tuple[int, str]:
    """One run in a process of its own: its exit status, and its last line of errors or the signal that ended it."""
    process = subprocess.Popen([sys.executable, SCRIPT, *words], stderr=subprocess.PIPE, text=True, errors="replace")
    last = ""
    try:
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            last = line.strip() or last
        status = process.wait()
    except KeyboardInterrupt:
        process.terminate()  # the run saves its state, also where the signal reached this process alone
        print(process.communicate()[1], end="", file=sys.stderr)
        raise
    return status, f"ended by {signal.Signals(-status).name}" if status < 0 else last
