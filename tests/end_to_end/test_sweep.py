"""A suite from its file to its records: all runs, a failed one among them, a stop and what is left."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssl4mis import checkpoint, lock, records, suites

ROOT = Path(__file__).resolve().parents[2]
TINY = """about = "small"
[[runs]]
methods = {methods}
datasets = ["phantom"]
labeled = [2]
{more}
options = {{ width = 2, patch = [32, 32, 16], stride = [32, 32, 16], iterations = {iterations} }}
"""


def tiny(folder, methods, more="", iterations=2) -> Path:
    (folder / "tiny.toml").write_text(TINY.format(methods=methods, more=more, iterations=iterations))
    return folder / "tiny.toml"


def start(folder, *words) -> subprocess.Popen:
    env = {name: value for name, value in os.environ.items() if name != "SSL4MIS_DATA"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, ROOT / "benchmarks" / "sweep.py", *words], cwd=folder, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def sweep(folder, *words, expected=0) -> tuple[str, str]:
    process = start(folder, *words)
    said = process.communicate(timeout=300)
    assert process.returncode == expected, said
    return said


@pytest.mark.long
def test_a_sweep_makes_the_runs_that_are_not_done_and_goes_on_after_a_failure(tmp_path):
    suite = tiny(tmp_path, ["mean_teacher"], 'controls = ["other:LA", "", "copies"]')
    failing, plain, copies = suites.read(suite).runs
    words = [suite, "--device", "cpu", "--log-every", "1"]

    out, _ = sweep(tmp_path, *words, "--dry-run")
    assert "tiny: small\n3 runs: 0 done, 0 unfinished, 3 waiting\nno estimate of 3 runs" in out
    assert f"waiting           ?  {copies.spec.id}  --method mean_teacher --dataset phantom" in out
    assert out.count("--control copies") == 1 and out.count("--device cpu --log_every 1\n") == 3
    assert list(tmp_path.iterdir()) == [suite]

    with lock.alone(tmp_path / "results" / "runs" / copies.spec.id, copies.spec.id):
        out, err = sweep(tmp_path, *words, "--processes", "2", expected=1)
    log = tmp_path / "results" / "runs" / failing.spec.id / "log.txt"
    reason = "run.py: error: control other:LA: LA: no data folder is given"
    assert f"in other hands: {copies.spec.id}: another process is at it\n" in err
    assert f"\nfailed: {failing.spec.id}: {reason}" in err
    assert err.endswith(f"(all of it: {log.relative_to(tmp_path)})\n")
    assert reason in log.read_text() and log.read_text().endswith(" exit status 2\n") and "1 of 3 runs are done" in out
    (record,) = records.read_all(tmp_path / "results" / "records")
    assert record["id"] == plain.spec.id and [event["done"] for event in record["curve"]] == [1, 2]

    out, _ = sweep(tmp_path, *words, "--status")
    assert "3 runs: 1 done, 0 unfinished, 2 waiting\nabout " in out  # one and the other are of the same work
    assert re.search(f"\ndone +{plain.spec.id}\n", out) and re.search(f"\nwaiting +[0-9]+ s  {copies.spec.id}  --", out)


@pytest.mark.long
def test_a_peek_is_part_of_being_done(tmp_path):
    suite = tiny(tmp_path, ["supervised"])
    words = [suite, "--out", "made here", "--peek-test", "--keep-every", "1"]
    sweep(tmp_path, *words)
    (record,) = records.read_all(tmp_path / "made here" / "records")
    assert (tmp_path / "made here" / "peeks" / f"{record['id']}.json").exists()
    assert "1 runs: 1 done" in sweep(tmp_path, *words)[0]  # and nothing to do


def wait_for(process, path) -> None:
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def test_a_stopped_sweep_leaves_runs_that_go_on(tmp_path):
    suite = tiny(tmp_path, ["supervised", "mean_teacher"], "seeds = [0, 1]", iterations=100000)
    begun = suites.read(suite).runs[:2]
    process = start(tmp_path, suite, "--save_every", "5", "--device", "cpu", "--processes", "2")
    folders = [tmp_path / "results" / "runs" / run.spec.id for run in begun]
    for folder in folders:
        wait_for(process, folder / checkpoint.PREVIOUS)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err.splitlines()[-1] == "stopped; the same command goes on", err
    assert "Traceback" not in err and "stopping: 2 save their state" in err
    for folder in folders:
        assert " of 100000; the same command goes on from there\n" in (folder / "log.txt").read_text()
        assert checkpoint.read(folder / checkpoint.LATEST)["done"] >= 10
    out, _ = sweep(tmp_path, suite, "--device", "cpu", "--status")
    assert out.count("\nunfinished ") == 2 and out.count("\nwaiting ") == 2 and "4 at a time" not in out
    assert not list(tmp_path.glob("results/records/*"))


def without_times(record: dict) -> dict:
    curve = [{key: event[key] for key in event if key != "rate"} for event in record["curve"]]
    return {key: value for key, value in record.items() if key not in ("timing", "memory")} | {"curve": curve}


@pytest.mark.long
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path, engine):
    if engine == "ray":
        pytest.importorskip("ray", reason="the extra sweep is not installed")
    suite = tiny(tmp_path, ["mean_teacher"], iterations=12)
    (run,) = suites.read(suite).runs
    words = ["--device", "cpu", "--save_every", "1", "--log_every", "1"]
    process = start(tmp_path, suite, *words, "--engine", engine)
    folder = tmp_path / "results" / "runs" / run.spec.id
    wait_for(process, folder / checkpoint.PREVIOUS)
    pid = int((folder / lock.FILE).read_text().split()[1])
    os.kill(pid, signal.SIGKILL)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert f"again {run.spec.id}: ended by SIGKILL\n" in err and f"done {run.spec.id}\n" in err
    log = (folder / "log.txt").read_text()
    assert log.count(f"{run.spec.id} on ") == 2 and "exit status -9\n" in log and log.endswith("exit status 0\n")
    assert "resum" in log

    env = {name: value for name, value in os.environ.items() if name != "SSL4MIS_DATA"} | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, ROOT / "benchmarks" / "run.py", *run.words, *words, "--out", "alone"], cwd=tmp_path,
                   env=env, check=True, capture_output=True)
    (killed,), (alone,) = (records.read_all(tmp_path / out / "records") for out in ("results", "alone"))
    assert without_times(killed) == without_times(alone)


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_suite_with_kills_ends_complete(engine):
    if engine == "ray":
        pytest.importorskip("ray", reason="the extra sweep is not installed")
    script = ROOT / "benchmarks" / "speed" / "sweep.py"
    done = subprocess.run([sys.executable, script, "--runs", "50", "--engines", engine],
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    lost = 6 + (engine == "ray")  # 3, 13, 23, 33, 43; the first of them twice; a worker of Ray
    assert figures["exact"] and figures[engine]["complete"] == 50 and figures[engine]["killed"] == lost
    assert 0 < figures["command_ms"] and f"| {engine} | 50 | {lost} |" in done.stdout


@pytest.mark.parametrize(("words", "expected"), [
    (["lte"], "suite 'lte' is not known: did you mean lite?"), ([], "suite"),
    (["lite", "--dry-rn"], "did you mean dry_run?"), (["lite", "--device", "gpu"], "expected one of auto, cpu"),
    (["lite", "--iterations", "3"], "iterations"), (["absent.toml"], "absent.toml: cannot be read (No such file"),
])
def test_a_command_that_cannot_work_is_one_line(tmp_path, words, expected):
    out, err = sweep(tmp_path, *words, expected=2)
    assert out == "" and err.count("\n") == 1 and err.startswith("sweep.py: error: ") and expected in err


def test_help_is_quick_and_names_the_suites(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out, _ = sweep(tmp_path, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2  # of the processor, not of the clock
    assert all(path.stem in out for path in suites.FOLDER.glob("*.toml")) and "--data_root" in out
