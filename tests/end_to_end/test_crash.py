"""A run that was killed, interrupted or lost a checkpoint, and then started again, is the same run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import ROOT, command

from ssl4mis import checkpoint, records, registry

ITERATIONS = 45
RUN = ("--method", "ua_mt", "--dataset", "LA", "--labeled", "4", "--width", "2", "--iterations", str(ITERATIONS),
       "--patch", "[16,16,16]", "--stride", "[16,16,16]", "--device", "cpu")  # fmt: skip


def words(data, out, save_every=6, log_every=1):
    return ["benchmarks/run.py", *RUN, "--data-root", str(data), "--out", str(out), "--save_every", str(save_every),
            "--log_every", str(log_every)]


def run(data, out, expected=0, **options) -> str:
    """Start a run and wait for its end; returns what was said on stderr."""
    done = command(*words(data, out, **options))
    assert done.returncode == expected, done.stderr
    return done.stderr


def start(data, out):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *words(data, out)], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def finish(process, expected) -> str:
    """Wait for the end of a process that was sent a signal; returns what was said on stderr."""
    _, said = process.communicate(timeout=300)
    assert process.returncode == expected, said
    return said


def folder(out) -> Path:
    (found,) = (out / "runs").iterdir()
    return found


def stop(process, out, number, iteration) -> None:
    """Send a signal once `iteration` is logged and two generations of checkpoints are there."""
    deadline = time.monotonic() + 240
    try:
        while time.monotonic() < deadline:
            assert process.poll() is None, f"ended before iteration {iteration} was seen: {process.stderr.read()}"
            if list(out.glob("runs/*/previous.ckpt")) and logged(out)[-1] >= iteration:
                process.send_signal(number)
                return
            time.sleep(0.005)
        raise AssertionError(f"iteration {iteration} was not reached in time")
    except BaseException:
        process.kill()
        process.communicate()
        raise


def logged(out) -> list[int]:
    """Iterations in the events so far; the last line may be half written."""
    lines = (folder(out) / "events.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line)["done"] for line in lines if line.endswith("\n")] or [0]


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    """The run without any interruption; it logs and saves at other iterations, which must not matter."""
    out = tmp_path_factory.mktemp("whole")
    run(prepared, out, save_every=20, log_every=4)
    return out


def assert_same_run(out, whole):
    (found,), (expected,) = records.read_all(out / "records"), records.read_all(whole / "records")
    for key in ("id", "spec", "split", "cases", "hp_hash", "evaluation", "classes"):
        assert found[key] == expected[key], key
    curve = {event["done"]: (event["stage"], event["terms"], event["watch"]) for event in found["curve"]}
    assert list(curve) == list(range(1, ITERATIONS + 1)) == [event["done"] for event in found["curve"]]
    assert len(expected["curve"]) >= ITERATIONS // 4
    for event in expected["curve"]:
        assert curve[event["done"]] == (event["stage"], event["terms"], event["watch"]), event["done"]
    assert_same_state(checkpoint.read(folder(out) / checkpoint.LATEST),
                      checkpoint.read(folder(whole) / checkpoint.LATEST))
    assert not (folder(out) / checkpoint.PREVIOUS).exists()


def assert_same_state(one, two):
    """Weights, teacher, statistics and momentum are equal to the last bit; only the time spent may differ."""
    tensors = [{f"{part}.{name}": value for part in ("method", "optimizers") for name, value in walk(state[part])}
               for state in (one, two)]
    assert tensors[0].keys() == tensors[1].keys() and len(tensors[0]) > 50
    for name, value in tensors[0].items():
        assert value.dtype == tensors[1][name].dtype and torch.equal(value, tensors[1][name]), name
    assert [one[key] for key in ("stage", "step", "done")] == [two[key] for key in ("stage", "step", "done")]


def walk(tree, prefix=""):
    """(name, tensor) of a nested mapping."""
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, dict | list):
            yield from walk(value, f"{prefix}{name}.")


def test_killed_and_then_a_checkpoint_is_cut(prepared, whole, tmp_path):
    process = start(prepared, tmp_path)
    stop(process, tmp_path, signal.SIGKILL, 14)
    finish(process, -signal.SIGKILL)
    assert not (tmp_path / "records").exists()

    saved = checkpoint.read(folder(tmp_path) / checkpoint.LATEST)["done"]
    assert saved >= 12
    process = start(prepared, tmp_path)
    stop(process, tmp_path, signal.SIGKILL, 27)
    assert f"resuming at iteration {saved} of 45" in finish(process, -signal.SIGKILL)

    latest = folder(tmp_path) / checkpoint.LATEST
    saved = checkpoint.read(folder(tmp_path) / checkpoint.PREVIOUS)["done"]
    latest.write_bytes(latest.read_bytes()[:latest.stat().st_size // 2])
    said = run(prepared, tmp_path)
    assert f"{latest}: damaged checkpoint" in said and "trying the generation before it" in said
    assert f"resuming at iteration {saved} of 45" in said
    assert_same_run(tmp_path, whole)


def test_interrupted(prepared, whole, tmp_path):
    process = start(prepared, tmp_path)
    stop(process, tmp_path, signal.SIGINT, 16)
    said = finish(process, 130)
    stopped = checkpoint.read(folder(tmp_path) / checkpoint.LATEST)["done"]
    assert 16 <= stopped < ITERATIONS
    assert f"stopped at iteration {stopped} of {ITERATIONS}; the same command goes on from there\n" in said
    assert "Traceback" not in said
    assert not (tmp_path / "records").exists()

    assert f"resuming at iteration {stopped} of {ITERATIONS}" in run(prepared, tmp_path)
    assert_same_run(tmp_path, whole)


def test_only_damaged_checkpoints_are_one_line(prepared, whole, tmp_path):
    """Nothing is thrown away silently: the user decides whether to start over."""
    place = tmp_path / "runs" / folder(whole).name
    place.mkdir(parents=True)
    for name in (checkpoint.LATEST, checkpoint.PREVIOUS):
        (place / name).write_bytes(b"SSL4MIS1 but nothing else")
    said = run(prepared, tmp_path, 2)
    assert "Traceback" not in said and said.splitlines()[-1].startswith("run.py: error: ")
    assert "previous.ckpt: damaged checkpoint" in said.splitlines()[-1]


def killed_at(method, out, *moments) -> list[dict]:
    """What became of a run killed at each of the moments (see crashes.py) and started again."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("crashes.py")
    done = subprocess.run([sys.executable, "-W", "ignore", script, method, out, *moments], cwd=ROOT, env=env, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for moment in found:
        assert moment["ended"] == [-signal.SIGKILL, 0] and not moment["wrong"], moment
    return found


def test_killed_in_a_write_between_stages_and_in_the_evaluation(tmp_path):
    """Weights, record, table, predictions and the files that are left are those of the undisturbed run."""
    found = killed_at("bcp", tmp_path, "checkpoint half", "rename after", "prediction half")
    assert len(found) == 3


@pytest.mark.long
@pytest.mark.parametrize("method", registry.names())
def test_killed_anywhere(method, tmp_path):
    """Fourteen random moments, and one of each kind of which there are few."""
    kinds = ("checkpoint half", "rename before", "rename after", "link before", "link after", "_make_optimizers",
             "write_prediction", "drop_previous")  # fmt: skip
    assert len(killed_at(method, tmp_path, "14", *kinds)) >= 20
