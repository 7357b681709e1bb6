"""Kills a run at chosen moments and starts it again: `crashes.py METHOD OUT [COUNT|NAME ...]`, a JSON line for each.

A moment is a step, the middle of a write, and before and after each rename; each run is a process forked from this one,
which has the libraries loaded, and ends by SIGKILL. A number stands for so many random moments, a name for one of those
that begin so.
"""
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ssl4mis import checkpoint, config, leaderboard, progress, records, run, trainer  # noqa: E402

ITERATIONS = 6
RUN = ("--dataset", "phantom-2d2c", "--labeled", "2", "--width", "2", "--iterations", str(ITERATIONS), "--patch",
       "[32,32]", "--stride", "[32,32]", "--device", "cpu", "--log_every", "1", "--save_every", "2", "--keep_every",
       "3")  # fmt: skip
APART = ("timing", "memory", "code")  # entries of a record that are of the time and not of the run
TIMED = ("iterations_per_s", "train_hours", "peak_mib")  # columns of the leaderboard


class Moments:
    """Names what a run does, and kills it at the moment of that number."""

    def __init__(self, target: int | None):
        self.target, self.names = target, []

    def __call__(self, name: str) -> None:
        if len(self.names) == self.target:
            os.kill(os.getpid(), signal.SIGKILL)
        self.names.append(name)

    def around(self, name, function):
        def wrapped(*words, **options):
            self(f"{name} before")
            found = function(*words, **options)
            self(f"{name} after")
            return found
        return wrapped

    def opener(self, name):
        """`open` whose files stop in the middle of each write."""
        def opened(path, mode="r", *words, **options):
            file = open(path, mode, *words, **options)
            if mode == "r" or Path(path).name == "lock":
                return file
            write = file.write

            def in_two(content):
                write(content[:len(content) // 2])
                file.flush()
                self(f"{name} half")
                return write(content[len(content) // 2:])

            return Slow(file, in_two)
        return opened

    def watch(self) -> None:
        """Patch the parts of this process."""
        os.replace, os.link = self.around("rename", os.replace), self.around("link", os.link)
        checkpoint.open, records.open, progress.open = map(self.opener, ("checkpoint", "json", "events"))
        whole = Path.write_bytes

        def in_two(path, data):
            whole(path, data[:len(data) // 2])
            self("prediction half")
            return whole(path, data)

        Path.write_bytes = in_two
        for place, name in ((trainer.Trainer, "_train_step"), (trainer.Trainer, "_make_optimizers"),
                            (run, "write_prediction"), (records, "write"), (checkpoint, "drop_previous")):
            setattr(place, name, self.around(name, getattr(place, name)))


class Slow:
    """A file with another `write`."""

    def __init__(self, file, write):
        self.file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def start(method: str, out: Path, target: int | None = None) -> int:
    """Make a run in a process of its own; returns how that ended, as `os.waitstatus_to_exitcode` has it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 99
    try:
        moments = Moments(target)
        moments.watch()
        run.costs = lambda *parts: {"parameters": 1} | dict.fromkeys(records.PASSES, 1.0)  # as long as the rest
        specs, options = config.parse(["--method", method, *RUN, "--out", str(out)])
        with contextlib.redirect_stdout(io.StringIO()), open(out / "said", "w") as said:
            with contextlib.redirect_stderr(said):
                status = run.exit_status(lambda: run.run(specs[0], options))
        (out / "moments").write_text("\n".join(moments.names))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def result(out: Path) -> dict:
    """What a finished run leaves, without what takes other times."""
    (record,) = records.read_all(out / "records")
    (folder,) = (out / "runs").iterdir()
    table = [{key: value for key, value in row.items() if key not in TIMED} for row in leaderboard.rows([record])]
    record = {key: value for key, value in record.items() if key not in APART}
    for event in record["curve"]:
        del event["rate"]
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    files = [name for name in files if name not in ("said", "moments")]
    predictions = {path.name: path.read_bytes().hex() for path in (folder / run.PREDICTIONS).iterdir()}
    kept = {done: checkpoint.fingerprint(checkpoint.read(path)["weights"])
            for done, path in checkpoint.kept(folder).items()}
    return {"record": record, "table": table, "files": files, "predictions": predictions, "kept": kept}


def chosen(names: list[str], wanted: list[str], seed: str) -> list[int]:
    """Numbers of moments."""
    rng, found = random.Random(seed), []
    for want in sorted(wanted, key=str.isdecimal):  # names first, of which there may be one
        if want.isdecimal():
            found += rng.sample(sorted({*range(len(names))} - {*found}), int(want))
        else:
            found.append(rng.choice([number for number, name in enumerate(names)
                                     if name.startswith(want) and number not in found]))
    return sorted(found)


def main(method: str, out: Path, wanted: list[str]) -> None:
    import nibabel  # noqa: F401

    import networks.fused  # noqa: F401, so that the runs need not

    whole = out / "whole"
    whole.mkdir(parents=True)
    assert start(method, whole) == 0, (whole / "said").read_text()
    names, expected = (whole / "moments").read_text().splitlines(), result(whole)
    for number in chosen(names, wanted, method):
        killed = out / f"{number}"
        killed.mkdir()
        ended = [start(method, killed, number), start(method, killed)]
        found = result(killed) if ended == [-signal.SIGKILL, 0] else {}
        wrong = [key for key in expected if found.get(key) != expected[key]]
        print(json.dumps({"moment": f"{number} {names[number]}", "of": len(names), "ended": ended, "wrong": wrong,
                          "said": (killed / "said").read_text() if wrong else ""}), flush=True)
        if not wrong:
            shutil.rmtree(killed)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
