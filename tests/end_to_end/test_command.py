"""The commands as a user runs them: train to the end, look at the table, make mistakes."""

import csv
import dataclasses
import resource

import pytest
from commands import ROOT, command

import data_prep
import networks
from ssl4mis import records, registry
from ssl4mis.config import RunOptions, RunSpec

TINY = ("--width", "2", "--iterations", "6", "--labeled", "2", "--log_every", "2", "--save_every", "3")
PHANTOM = ("--dataset", "phantom", "--patch", "[32,32,16]", "--stride", "[32,32,16]", *TINY)
LA = ("--dataset", "LA", "--patch", "[16,16,16]", "--stride", "[16,16,16]", *TINY)
# Runs a command and then writes which of the named modules it has imported, also after a SystemExit.
SPY = """
import runpy, sys
names, sys.argv = sys.argv[1].split(","), sys.argv[2:]
sys.path.insert(0, "benchmarks")
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    code = stop.code
print("IMPORTED", code, sorted(set(names) & set(sys.modules)))
"""


def train(method, out, *options, expected=0, fresh=False):
    done = command("benchmarks/run.py", "--method", method, "--out", out, *options, fresh=fresh)
    assert done.returncode == expected, done.stderr
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A results folder with a supervised and a UA-MT run, and what the two commands printed."""
    out = tmp_path_factory.mktemp("trained") / "results"
    return out, [train("supervised", out, *PHANTOM, fresh=True), train("ua_mt", out, *PHANTOM)]


def test_the_record_of_a_run(trained):
    out, printed = trained
    found = {record["spec"]["method"]: record for record in records.read_all(out / "records")}
    assert set(found) == {"supervised", "ua_mt"}
    split = data_prep.load_split("phantom-demo", 0)
    for record, done in zip((found["supervised"], found["ua_mt"]), printed, strict=True):
        assert str(out / "records" / f"{record['id']}.json") in done.stdout
        assert record["split"]["labeled"] == list(split.train[:2])
        assert record["split"]["test"] == list(split.test)
        assert record["split"]["sha256"] == split.sha256
        assert len(record["cases"]) == 2 * len(split.test)
        assert [event["done"] for event in record["curve"]] == [2, 4, 6]
        assert record["device"]["type"] in ("cpu", "cuda")
        assert all(record["timing"][key] > 0 for key in record["timing"])
        assert record["memory"]["peak_mib"] > 0
    assert set(found["ua_mt"]["curve"][0]["terms"]) == {"supervised", "consistency"}
    assert found["ua_mt"]["spec"]["hp"]["decay"] == 0.99
    assert found["supervised"]["spec"]["unlabeled_batch"] == 0


def test_a_finished_run_is_left_alone(trained):
    out, _ = trained
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()}
    done = train("ua_mt", out, *PHANTOM, "--log_every", "1", "--save_every", "1")
    assert "finished" in done.stdout and done.stdout.count("\n") == 1
    assert files == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()}


def test_leaderboard_and_report(trained):
    out, _ = trained
    table = out / "leaderboard.csv"
    assert command("benchmarks/leaderboard.py", "--results", out).returncode == 0
    first = table.read_bytes()
    rows = list(csv.DictReader(first.decode().splitlines()))
    assert [row["source"] for row in rows] == ["measured", "measured"]
    assert {row["method"] for row in rows} == {"supervised", "ua_mt"}
    assert [row["complete"] for row in rows] == ["yes", "yes"]

    again = command("benchmarks/leaderboard.py", "--results", out)
    assert again.returncode == 0 and table.read_bytes() == first
    assert "2 measured rows" in again.stdout
    assert command("benchmarks/leaderboard.py", "--results", out, "--check").returncode == 0
    tampered = first.replace(b"ua_mt", b"ua_mu")
    table.write_bytes(tampered)
    check = command("benchmarks/leaderboard.py", "--results", out, "--check")
    assert check.returncode == 1 and "leaderboard.csv" in check.stderr
    assert table.read_bytes() == tampered

    report = command("benchmarks/report.py", "--results", out)
    assert report.returncode == 0
    text = (out / "reports" / "phantom-demo-2.md").read_text()
    assert str(out / "reports" / "phantom-demo-2.md") in report.stdout
    assert "ua_mt" in text and "supervised" in text and "| " in text


def test_training_on_prepared_files_loads_no_toolkit_but_the_one_that_writes_predictions(prepared, tmp_path):
    done = command("-c", SPY, "monai,nibabel,SimpleITK,pandas,ray,matplotlib", "benchmarks/run.py", "--method",
                   "supervised", "--out", tmp_path, *LA, "--data-root", prepared)
    assert "IMPORTED 0 ['nibabel']" in done.stdout, done.stdout + done.stderr
    assert len(records.read_all(tmp_path / "records")) == 1


@pytest.mark.parametrize("word", ["--help", "--list"])
def test_help_and_list_are_quick_and_load_no_torch(word):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command("-c", SPY, "torch,monai,scipy,h5py,pandas", "benchmarks/run.py", word)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "IMPORTED 0 []" in done.stdout, done.stdout + done.stderr
    # processor time: the clock of a busy machine says nothing about the command
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_help_names_every_option():
    text = command("benchmarks/run.py", "--help").stdout
    for field in (*dataclasses.fields(RunSpec), *dataclasses.fields(RunOptions)):
        assert f"--{field.name}" in text or field.name == "hp"
    assert "--config" in text and "--list" in text


def test_help_of_a_method_shows_its_hyper_parameters():
    text = command("benchmarks/run.py", "--method", "ua_mt", "--help").stdout
    assert "--hp.decay" in text and "--hp.threshold" in text


def test_the_list_is_complete():
    done = command("benchmarks/run.py", "--list")
    assert done.returncode == 0
    for name in (*registry.names(), *networks.NAMES, *data_prep.names()):
        assert f"  {name} " in done.stdout + " " or f"  {name}\n" in done.stdout
    for name in data_prep.names():
        for protocol in data_prep.dataset(name).protocols.values():
            assert protocol.about in done.stdout


def test_missing_data_is_one_line_before_anything_is_written(tmp_path):
    (tmp_path / "empty").mkdir()
    done = train("ua_mt", tmp_path / "out", *LA, "--data-root", tmp_path / "empty", expected=2)
    assert done.stderr.count("\n") == 1 and "100 of 100 case files are missing" in done.stderr
    assert done.stdout == "" and not (tmp_path / "out").exists()


def test_the_folder_of_the_caller_does_not_matter(tmp_path):
    done = command(ROOT / "benchmarks" / "run.py", "--list", cwd=tmp_path)
    assert done.returncode == 0 and "ua_mt" in done.stdout


def test_a_typing_error_is_one_line():
    done = command("benchmarks/run.py", "--method", "ua_mt", "--labelled", "16")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "run.py: error: option 'labelled' is not known: did you mean labeled?\n"
