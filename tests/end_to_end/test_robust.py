"""What goes wrong around a run: one line says so, nothing that was computed is lost, and the same command goes on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssl4mis import checkpoint, config, lock, peeks, records, run, trainer

ROOT = Path(__file__).resolve().parents[2]
RUN = ("--method", "mean_teacher", "--dataset", "phantom-2d2c", "--labeled", "2", "--width", "2", "--iterations", "6",
       "--patch", "[32,32]", "--stride", "[32,32]", "--device", "cpu", "--save_every", "2", "--log_every", "2",
       "--keep_every", "2")  # fmt: skip


COSTS = run.costs


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Counting passes takes as long as such a run."""
    monkeypatch.setattr(run, "costs", lambda *parts: {"parameters": 1} | dict.fromkeys(records.PASSES, 1.0))


@pytest.fixture
def go(tmp_path, capsys):
    """go() -> exit status and the lines on stderr of the command; go.id, go.folder and go.record are of its run."""
    (spec,), options = config.parse([*RUN, "--out", str(tmp_path)])
    spec = dataclasses.replace(spec, precision=run.pick_precision(spec.precision, run.pick_device("cpu")))

    def command(job=run.run):
        capsys.readouterr()
        status = run.exit_status(lambda: job(spec, options))
        return status, [line for line in capsys.readouterr().err.splitlines() if not line.startswith("resuming")]

    command.id, command.folder = spec.id, tmp_path / "runs" / spec.id
    command.record, command.peeks = (tmp_path / name / f"{spec.id}.json" for name in ("records", "peeks"))
    command.peek = lambda: command(run.peek_test)
    return command


def weights(go) -> str:
    return records.read(go.record)["weights_sha256"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The weights of the undisturbed run."""
    (spec,), options = config.parse([*RUN, "--out", str(tmp_path_factory.mktemp("whole"))])
    return records.read(run.run(spec, options, lambda text: None))["weights_sha256"]


def stopped_once(monkeypatch, place, name, act):
    """Call `act` before a function does its work, the first time only; afterwards all is as before."""
    original = getattr(place, name)

    def wrapped(*words, **options):
        monkeypatch.setattr(place, name, original)
        act()
        return original(*words, **options)

    monkeypatch.setattr(place, name, wrapped)


def signals(*numbers):
    def act():
        for number in numbers:
            os.kill(os.getpid(), number)
    return act


# --- two processes ---------------------------------------------------------------------------------------------------


def test_a_second_process_is_turned_away(go):
    with lock.alone(go.folder, go.id):
        status, said = go()
    assert status == 2 and len(said) == 1
    assert f"run {go.id}: another process is at it (pid {os.getpid()} on " in said[0]
    assert not list(go.folder.glob("*.ckpt")) and not go.record.exists()
    assert go() == (0, []) and go.record.exists()


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    code = ("import pathlib, sys, time; from ssl4mis import lock\n"
            "with lock.alone(pathlib.Path(sys.argv[1]), 'x'): print('held', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=rf"run x: another process is at it \(pid {process.pid} on "):
        with lock.alone(tmp_path, "x"):
            pass
    process.kill()
    process.communicate()
    with lock.alone(tmp_path, "x"):
        assert f"pid {os.getpid()} " in (tmp_path / lock.FILE).read_text()


def test_without_locks_the_second_record_changes_nothing(go, monkeypatch):
    """As on a file system without locks: another process has finished the run meanwhile, with other times."""
    assert go()[0] == 0
    first = go.record.read_bytes()
    go.record.rename(go.record.with_suffix(".away"))
    stopped_once(monkeypatch, checkpoint, "fingerprint", lambda: go.record.write_bytes(first))
    status, said = go()
    assert status == 2 and len(said) == 1 and "a record is never rewritten" in said[0]
    assert go.record.read_bytes() == first and go()[0] == 0


# --- nothing can be written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", ["records", "runs"])
def test_a_file_in_place_of_a_folder_is_seen_before_training(go, tmp_path, taken):
    (tmp_path / taken).write_text("")
    status, said = go()
    assert status == 2 and len(said) == 1 and taken in said[0] and "cannot be written" in said[0]
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_patch_of_which_a_batch_norm_sees_one_voxel_is_refused_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "costs", COSTS)
    words = ["--method", "bcp", "--dataset", "phantom-2d2c", "--labeled", "2", "--patch", "[16,16]",
             "--stride", "[16,16]", "--labeled_batch", "2", "--unlabeled_batch", "2", "--device", "cpu",
             "--out", str(tmp_path)]
    (spec,), options = config.parse(words)  # half of the labeled samples go through the network at a time
    assert run.exit_status(lambda: run.run(spec, options)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "patch [16, 16], batch 2+2: bcp on vnet cannot take it" in last and "more than 1 value" in last
    assert not list(tmp_path.rglob("*.ckpt")) and not list(tmp_path.rglob("events.jsonl"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_a_checkpoint(go, expected, monkeypatch):
    partial = go.folder / (checkpoint.LATEST + ".partial")

    def fill():  # the second save meets it
        stopped_once(monkeypatch, checkpoint, "save", lambda: partial.symlink_to("/dev/full"))

    stopped_once(monkeypatch, checkpoint, "save", fill)
    status, said = go()
    assert status == 2 and len(said) == 1, said
    assert "latest.ckpt: cannot be written (No space left on device)" in said[0] and "goes on" in said[0]
    assert checkpoint.load(go.folder)["done"] == 2 and not partial.exists()
    assert go() == (0, []) and weights(go) == expected


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["records", "progress"])
def test_a_full_disk_under_the_record_and_the_log(go, expected, monkeypatch, name):
    def full(path, mode="r", *words, **options):
        record = Path(path).parent == go.record.parent or Path(path).name == "events.jsonl"
        return open("/dev/full" if record else path, mode.replace("x", "w") if record else mode, *words, **options)

    module = records if name == "records" else sys.modules["ssl4mis.progress"]
    monkeypatch.setattr(module, "open", full, raising=False)
    status, said = go()
    assert status == 2 and len(said) == 1 and "No space left on device" in said[0], said
    assert str(go.record if name == "records" else go.folder / "events.jsonl") in said[0]
    monkeypatch.undo()
    monkeypatch.setattr(run, "costs", lambda *parts: {"parameters": 1} | dict.fromkeys(records.PASSES, 1.0))
    assert go() == (0, []) and weights(go) == expected
    assert [path.name for path in go.record.parent.iterdir()] == [go.record.name]


# --- broken files ----------------------------------------------------------------------------------------------------


def test_a_torn_record(go):
    assert go()[0] == 0
    before, text = weights(go), go.record.read_text()
    go.record.write_text(text[:len(text) // 2])
    status, said = go()
    assert status == 2 and len(said) == 1 and str(go.record) in said[0] and "remove it" in said[0]
    go.record.write_text(text.replace('"schema": 1', '"schema": 2'))
    status, said = go()
    assert status == 2 and len(said) == 1 and "schema is 2, expected 1" in said[0] and "remove it" in said[0]
    go.record.unlink()
    assert go()[0] == 0 and weights(go) == before


def test_torn_kept_weights_scores_and_peeks(go):
    assert go()[0] == 0
    kept = checkpoint.kept(go.folder)
    assert list(kept) == [2, 4]
    kept[4].write_bytes(kept[4].read_bytes()[:-9])
    (kept[4].parent / "notes.ckpt").write_bytes(b"of somebody else")
    status, said = go.peek()
    assert status == 2 and len(said) == 1 and f"{kept[4]}: damaged" in said[0] and "remove it" in said[0]
    kept[4].unlink()
    scored = kept[2].with_suffix(".json")  # scored by now, and torn: it is made again
    whole = scored.read_text()
    scored.write_text(whole[:99])
    assert go.peek() == (0, []) and scored.read_text() == whole
    assert [entry["iteration"] for entry in peeks.read(go.peeks)["checkpoints"]] == [2, 6]
    go.peeks.write_text(go.peeks.read_text()[:-20])
    status, said = go.peek()
    assert status == 2 and len(said) == 1 and str(go.peeks) in said[0] and "remove it" in said[0]
    go.peeks.unlink()
    assert go.peek() == (0, [])


def test_the_checkpoint_of_another_run(go, expected, tmp_path):
    (other,), options = config.parse([*RUN, "--seed", "1", "--out", str(tmp_path)])
    foreign = tmp_path / "runs" / run.run(other, options, lambda text: None).stem / checkpoint.LATEST
    go.folder.mkdir()
    (go.folder / checkpoint.LATEST).write_bytes(foreign.read_bytes())
    status, said = go()
    assert status == 2 and len(said) == 1 and f"a checkpoint of run {foreign.parent.name}" in said[0]
    (go.folder / checkpoint.LATEST).unlink()
    assert go() == (0, []) and weights(go) == expected


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "name", "numbers"), [
    (run, "Loader", [signal.SIGINT]), (records, "_stage", [signal.SIGINT]), (run, "evaluate", [signal.SIGINT]),
    (run, "evaluate", [signal.SIGTERM]), (trainer.Trainer, "_train_step", [signal.SIGINT, signal.SIGINT])],
    ids=["loading", "settings", "evaluation", "term", "twice"])  # fmt: skip
def test_signals(go, expected, monkeypatch, place, name, numbers):
    """While data are loaded, in a write of the settings, in the evaluation, and two of them in one step."""
    former = signal.getsignal(signal.SIGTERM)
    stopped_once(monkeypatch, place, name, signals(*numbers))
    status, said = go()
    assert status == 130 and len(said) == 1 and "the same command goes on" in said[0], said
    assert signal.getsignal(signal.SIGTERM) == former
    assert not go.record.exists()
    assert go() == (0, []) and weights(go) == expected
    assert not list(go.record.parent.parent.rglob("*.tmp"))


def test_a_signal_in_the_write_of_the_record(go, expected, monkeypatch):
    stopped_once(monkeypatch, records.os, "link", signals(signal.SIGINT))
    assert go()[0] == 130
    assert not go.record.exists() and not list(go.record.parent.iterdir())
    assert go() == (0, []) and weights(go) == expected


def test_a_second_signal_while_the_first_is_told(monkeypatch, capsys):
    def again(*words, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "print", again, raising=False)
    assert run.exit_status(signals(signal.SIGINT)) == 130


# --- the machine -----------------------------------------------------------------------------------------------------


def test_clocks_that_jump_or_stand_still(go, expected, monkeypatch):
    jumps = iter(range(10**9, 0, -10**5))
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    monkeypatch.setattr(trainer.time, "monotonic", lambda: 5.0)
    assert go() == (0, []) and weights(go) == expected
    timing = records.read(go.record)["timing"]
    assert timing["train_seconds"] == 0 and timing["iterations_per_second"] > 0


def test_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run.code_version() == {"version": run.__version__, "commit": None, "dirty": False}


def test_events_of_2d_runs_and_their_predictions(go):
    """Planes have two sides, and NIfTI three."""
    import nibabel

    assert go()[0] == 0
    record = records.read(go.record)
    images = [nibabel.load(go.folder / run.PREDICTIONS / f"{case}.nii.gz") for case in record["split"]["test"]]
    assert all(len(image.shape) == 2 and image.affine[2, 2] == 1 for image in images)
    assert json.loads((go.folder / "events.jsonl").read_text().splitlines()[-1])["done"] == 6
