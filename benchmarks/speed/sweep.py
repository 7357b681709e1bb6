"""What a sweep costs per run: a suite of stub commands, some of which are killed on the way, through both engines.

A stub does the steps of a chain of checksums, saves a checkpoint and logs after each, kills itself or the worker that
started it where it is told to, goes on from its checkpoint and ends with a record: it equals that of an undisturbed
chain, or the engine is wrong. The overhead is the time of the sweep beyond that of the same commands without one.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ssl4mis import engines, sweep
from ssl4mis.engines import Job
from ssl4mis.errors import UserError
from ssl4mis.leaderboard import markdown_table

STEPS = 5
PROCESSES = 2
ENGINES: dict[str, Callable] = {
    "local": lambda: engines.Local(engines.environments(PROCESSES, 0)),
    "ray": lambda: engines.Ray("local", 0.0, 1.0, PROCESSES, retries=2),
}  # fmt: skip
STUB = '''import json, os, signal, sys, time, zlib
name, folder, record, victims = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4].split(",")
state = os.path.join(folder, "latest.ckpt")
done, value, kills = json.load(open(state)) if os.path.exists(state) else (0, 0, 0)
def save(path, content):
    with open(path + ".partial", "w") as file:
        json.dump(content, file)
    os.replace(path + ".partial", path)
while done < %d:
    if kills < len(victims) and victims[kills] and done == 2 + kills:
        save(state, (done, value, kills + 1))
        os.kill(os.getppid() if victims[kills] == "parent" else os.getpid(), signal.SIGKILL)
        time.sleep(60)
    time.sleep(0.002)
    done, value = done + 1, zlib.crc32(f"{name} {done} {value}".encode())
    save(state, (done, value, kills))
    with open(os.path.join(folder, "events.jsonl"), "a") as file:
        file.write(json.dumps({"done": done, "rate": 500.0}) + chr(10))
save(record, {"id": name, "value": value})
''' % STEPS  # noqa: UP031


def main(argv=None) -> int:
    """Exit status: 0 done, 1 a run was lost or its record is not that of an undisturbed one, 2 bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--engines", default=",".join(ENGINES), help="default: %(default)s")
    chosen = parser.parse_args(argv)
    names = chosen.engines.split(",")
    if chosen.runs < 1 or not set(names) <= set(ENGINES):
        parser.error(f"--runs {chosen.runs} --engines {chosen.engines}: expected at least 1, some of "
                     f"{','.join(ENGINES)}")
    rows, figures = [], {"subject": "sweep", "runs": chosen.runs, "processes": PROCESSES}
    with tempfile.TemporaryDirectory() as folder:
        alone = figures["command_ms"] = bare(Path(folder), min(chosen.runs, 200))
        for name in names:
            try:
                found = measure(name, Path(folder) / name, chosen.runs)
            except UserError as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            found["overhead_ms"] = 1000 * PROCESSES * found["seconds"] / found["attempts"] - alone
            figures[name] = {key: round(value, 2) for key, value in found.items()}
            rows.append([name, *(f"{found[key]:.4g}" for key in ("complete", "killed", "start_seconds", "seconds",
                                                                 "overhead_ms"))])
    print(f"{chosen.runs} runs on {PROCESSES} processes, {alone:.3g} ms a command without a sweep\n")
    print(markdown_table(["engine", "complete", "killed on the way", "start of the engine (s)", "sweep (s)",
                          "overhead per process (ms)"], rows))
    exact = bool(rows) and all(figures[row[0]]["complete"] == chosen.runs for row in rows)
    print(json.dumps(figures | {"exact": exact}))
    return 0 if exact else 1


def make(folder: Path, number: int, engine: str) -> Job:
    """A stub: of a hundred, nine are killed once and one twice; Ray loses a worker, too."""
    name = f"run{number}"
    victims = ["self"] * (2 if number % 100 == 3 else number % 10 == 3) + ["parent"] * (engine == "ray" and
                                                                                     number % 100 == 7)
    place, record = folder / "runs" / name, folder / "records" / f"{name}.json"
    return Job(name, [sys.executable, "-I", "-S", "-c", STUB, name, str(place), str(record), ",".join(victims)], place,
               [record], STEPS)


def undisturbed(name: str) -> dict:
    """The record of a stub, computed here."""
    value = 0
    for done in range(STEPS):
        value = zlib.crc32(f"{name} {done} {value}".encode())
    return {"id": name, "value": value}


def measure(engine: str, folder: Path, runs: int) -> dict[str, float]:
    """A sweep of so many stubs; UserError where the engine is not there."""
    (folder / "records").mkdir(parents=True)
    jobs = [make(folder, number, engine) for number in range(runs)]
    started = time.monotonic()
    hands = ENGINES[engine]()
    show = sweep.Board(lambda name: None, runs, 0)
    try:
        with open(os.devnull, "w") as show.console.file:
            begun = time.monotonic()
            assert set(sweep.states([job.name for job in jobs], folder).values()) == {"waiting"}
            outcome = sweep.dispatch(jobs, hands, 2, show)
            ended = time.monotonic()
    finally:
        hands.close()
    for name, reason in outcome.failed.items():
        print(f"{name}: {reason}", file=sys.stderr)
    complete = sum(job.done and json.loads(job.products[0].read_text()) == undisturbed(job.name) for job in jobs)
    attempts = sum((job.folder / engines.LOG).read_text().count(f"{job.name} on ") for job in jobs)
    return {"complete": complete, "killed": attempts - runs, "attempts": attempts, "start_seconds": begun - started,
            "seconds": ended - begun}


def bare(folder: Path, count: int) -> float:
    """Milliseconds of a process for one command, with nothing but the command."""
    jobs = [make(folder / "bare", 10 * number, "local") for number in range(count)]
    for job in jobs:
        job.folder.mkdir(parents=True)
        job.products[0].parent.mkdir(exist_ok=True)
    started = time.monotonic()
    with ThreadPoolExecutor(PROCESSES) as pool:
        list(pool.map(lambda job: subprocess.run(job.command, check=True), jobs))
    return 1000 * PROCESSES * (time.monotonic() - started) / count


if __name__ == "__main__":
    sys.exit(main())
