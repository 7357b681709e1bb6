"""A suite from its file to its records: all runs, a failed one among them, a stop and what is left."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssl4mis import checkpoint, records, suites

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


def test_a_sweep_makes_the_runs_that_are_not_done_and_goes_on_after_a_failure(tmp_path):
    suite = tiny(tmp_path, ["mean_teacher"], 'controls = ["other:LA", "", "copies"]')
    failing, plain, copies = suites.read(suite).runs
    words = [suite, "--device", "cpu", "--log-every", "1"]

    out, _ = sweep(tmp_path, *words, "--dry-run")
    assert "tiny: small\n3 runs: 0 done, 0 unfinished, 3 waiting\n" in out
    assert f"waiting     {copies.spec.id}  --method mean_teacher --dataset phantom" in out
    assert out.count("--control copies") == 1 and out.count("--device cpu --log_every 1\n") == 3
    assert list(tmp_path.iterdir()) == [suite]

    out, err = sweep(tmp_path, *words, expected=1)
    assert "[1/3] run.py --method mean_teacher" in out and "[3/3] run.py" in out
    last = err.splitlines()[-1]
    assert last.startswith(f"failed: {failing.spec.id}: run.py: error: control other:LA: LA: no data folder is given")
    found = {record["id"]: record for record in records.read_all(tmp_path / "results" / "records")}
    assert set(found) == {plain.spec.id, copies.spec.id}
    assert [event["done"] for event in found[plain.spec.id]["curve"]] == [1, 2]

    out, _ = sweep(tmp_path, *words, "--status")
    assert "3 runs: 2 done, 0 unfinished, 1 waiting" in out
    assert f"done        {plain.spec.id}\n" in out and f"waiting     {failing.spec.id}" in out


def test_a_peek_is_part_of_being_done(tmp_path):
    suite = tiny(tmp_path, ["supervised"])
    words = [suite, "--out", "made here", "--peek-test", "--keep-every", "1"]
    sweep(tmp_path, *words)
    (record,) = records.read_all(tmp_path / "made here" / "records")
    assert (tmp_path / "made here" / "peeks" / f"{record['id']}.json").exists()
    assert "1 runs: 1 done" in sweep(tmp_path, *words)[0]  # and nothing to do


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_leaves_a_run_that_goes_on(tmp_path, number):
    suite = tiny(tmp_path, ["supervised", "mean_teacher"], iterations=100000)
    first, second = suites.read(suite).runs
    process = start(tmp_path, suite, "--save_every", "5", "--device", "cpu")
    folder, deadline = tmp_path / "results" / "runs" / first.spec.id, time.monotonic() + 240
    while not (folder / checkpoint.PREVIOUS).exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err.splitlines()[-1] == "stopped; the same command goes on", err
    assert "Traceback" not in err and "of 100000; the same command goes on from there\n" in err
    assert checkpoint.read(folder / checkpoint.LATEST)["done"] >= 10
    out, _ = sweep(tmp_path, suite, "--device", "cpu", "--status")
    assert f"unfinished  {first.spec.id}" in out and f"waiting     {second.spec.id}" in out
    assert not (tmp_path / "results" / "records").exists()


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
