"""Weights that were kept are scored beside the ranking, and a record is run again to the last bit."""

import json

import nibabel
import numpy as np
import pytest
from commands import command

import data_prep
from ssl4mis import leaderboard, peeks, records

RUN = ("--method", "ua_mt", "--dataset", "phantom", "--labeled", "2", "--width", "2", "--iterations", "20", "--patch",
       "[32,32,16]", "--stride", "[32,32,16]", "--seed", "3")  # fmt: skip


def run(*words, expected=0):
    done = command("benchmarks/run.py", *words)
    assert done.returncode == expected, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A results folder with one run, its peeks, and what was printed."""
    out = tmp_path_factory.mktemp("trained") / "results"
    return out, run(*RUN, "--out", out, "--peek-test").stdout


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A results folder with the same run, which kept no weights."""
    out = tmp_path_factory.mktemp("plain") / "results"
    run(*RUN, "--out", out)
    return out


def only(folder):
    (path,) = folder.glob("*.json")
    return path


def test_peeks_end_with_the_record(trained):
    out, said = trained
    record, (peek,) = records.read(only(out / "records")), peeks.read_all(out / "peeks")
    assert peek["id"] == record["id"]
    assert [entry["iteration"] for entry in peek["checkpoints"]] == list(range(2, 21, 2))
    assert peek["checkpoints"][-1]["cases"] == record["cases"]
    assert peek["checkpoints"][0]["cases"] != record["cases"]
    assert "peeks of 10 checkpoints" in said and "scoring the weights of iteration 18" in said


def test_peeking_changes_neither_record_nor_table(trained, plain):
    out, _ = trained
    unpeeked, peeked = records.read(only(plain / "records")), records.read(only(out / "records"))
    for key in ("cases", "calibration", "weights_sha256", "costs", "spec", "id"):
        assert unpeeked[key] == peeked[key]
    before = leaderboard.outputs(out)
    (out / "peeks").rename(out / "away")
    try:
        assert leaderboard.outputs(out) == before
    finally:
        (out / "away").rename(out / "peeks")


def test_what_was_scored_is_not_scored_again(trained):
    out, _ = trained
    assert "has peeks" in run(*RUN, "--out", out, "--peek-test").stdout
    whole = only(out / "peeks").read_bytes()
    only(out / "peeks").unlink()
    (done,) = (out / "runs").glob("*/weights/000006.json")
    done.unlink()
    said = run(*RUN, "--out", out, "--peek-test").stdout
    assert said.count("scoring the weights of") == 1 and "iteration 6 " in said
    assert only(out / "peeks").read_bytes() == whole


def test_without_kept_weights_there_is_one_line(plain):
    done = run(*RUN, "--out", plain, "--peek-test", expected=2)
    assert "no weights, expected those that a run with --peek_test or --keep_every keeps" in done.stderr
    assert done.stderr.count("\n") == 1


def test_predictions_are_kept_on_the_grid_of_the_case(trained):
    out, _ = trained
    record = records.read(only(out / "records"))
    dataset, root = data_prep.locate("phantom")
    store = dataset.open(root, dataset.protocols["demo"])
    (folder,) = (out / "runs").glob("*/predictions")
    for case in record["split"]["test"]:
        image = nibabel.load(folder / f"{case}.nii.gz")
        predicted, truth = np.asarray(image.dataobj), store.label(case)
        assert predicted.dtype == np.uint8 and predicted.shape == truth.shape
        assert np.allclose(image.header.get_zooms(), store.spacing(case))
        for value, name in enumerate(record["classes"][1:], 1):
            (row,) = [row for row in record["cases"] if (row["case"], row["class"]) == (case, name)]
            mine, theirs = predicted == value, truth == value
            assert row["dice"] == pytest.approx(2 * (mine & theirs).sum() / max(1, mine.sum() + theirs.sum()))


def test_a_record_is_reproduced_to_the_last_bit(trained):
    out, _ = trained
    before = {path: path.read_bytes() for path in out.glob("records/*")}
    name = only(out / "records").stem
    said = run("--reproduce", name[:-4], "--out", out).stdout
    assert "weights: equal" in said and "the result holds" in said
    again = records.read(out / "reproductions" / "records" / f"{name}.json")
    assert again["cases"] == records.read(out / "records" / f"{name}.json")["cases"]
    assert before == {path: path.read_bytes() for path in out.glob("records/*")}


def test_a_record_that_was_edited_does_not_hold(trained, tmp_path):
    """Dice of 0.99 on every case, as nobody gets it in 20 iterations."""
    out, _ = trained
    record = json.loads(only(out / "records").read_text())
    for row in record["cases"]:
        row["dice"] = 0.99
    records.write(record, tmp_path / "records")
    said = run("--reproduce", record["id"], "--out", tmp_path, expected=1).stdout
    assert "weights: equal" in said and "the result does not hold" in said and "outside" in said


@pytest.mark.parametrize(("words", "expected"), [
    (("--reproduce", "LA-nothing"), "record 'LA-nothing' is not in"),
    (("--reproduce", "LA", "--labeled", "8"), "labeled"),
])  # fmt: skip
def test_what_cannot_be_reproduced_is_one_line(trained, words, expected):
    done = run(*words, "--out", trained[0], expected=2)
    assert expected in done.stderr and done.stderr.count("\n") == 1
