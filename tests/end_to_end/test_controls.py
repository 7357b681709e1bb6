"""Negative controls and parts of the unlabeled data, from the command to the record."""

import pytest
from commands import ROOT, command

import data_prep
from ssl4mis import config, records
from ssl4mis.loading import Loader
from ssl4mis.run import run

TINY = ("--method", "mean_teacher", "--dataset", "phantom", "--labeled", "2", "--width", "2", "--patch", "[32,32,16]",
        "--stride", "[32,32,16]", "--iterations", "2", "--device", "cpu")  # fmt: skip
SPLIT = data_prep.load_split("phantom-demo", 0)


def train(out, *options):
    return command(ROOT / "benchmarks" / "run.py", *TINY, *options, "--out", out, cwd=out)


@pytest.mark.parametrize(("control", "unlabeled", "said"), [
    ("noise", [f"{case}#noise" for case in SPLIT.train[2:]], "Gaussian noise"),
    ("copies", [f"{case}#copy{turn}" for turn in range(1, 16) for case in SPLIT.train[:2]], "copies of the labeled"),
    ("other:phantom-3d4c", [f"phantom-3d4c:{case}#1" for case in SPLIT.train[:30]], "data set phantom-3d4c"),
])
def test_a_control_is_a_record_of_its_own(tmp_path, control, unlabeled, said):
    done = train(tmp_path, "--control", control)
    assert done.returncode == 0, done.stderr
    assert f"negative control: the unlabeled images are {said}" in done.stdout.replace("those of ", "")
    (record,) = records.read_all(tmp_path / "records")
    (spec,), _ = config.parse([*TINY, "--control", control])
    assert record["id"] == spec.id and record["spec"]["control"] == control
    assert record["split"]["unlabeled"] == unlabeled and record["split"]["labeled"] == list(SPLIT.train[:2])
    assert record["split"]["test"] == list(SPLIT.test)


def train_here(out, *options) -> tuple[dict, str]:
    """The record of a run in this process, and what was said."""
    (spec,), chosen = config.parse([*TINY, *options, "--out", str(out)])
    said = []
    return records.read(run(spec, chosen, said.append)), "\n".join(said)


def test_a_part_of_the_unlabeled_cases(tmp_path):
    record, said = train_here(tmp_path, "--unlabeled", "20%")
    assert (record["spec"]["unlabeled"], record["split"]["unlabeled"]) == (6, list(SPLIT.train[2:8]))
    assert "2 labeled and 6 unlabeled" in said and "consistency" in record["curve"][-1]["terms"]

    record, said = train_here(tmp_path, "--unlabeled", "0")
    assert (record["spec"]["unlabeled"], record["split"]["unlabeled"], record["spec"]["unlabeled_batch"]) == (0, [], 0)
    assert "no unlabeled samples: mean_teacher" in said and "consistency" not in record["curve"][-1]["terms"]


@pytest.mark.parametrize(("options", "expected"), [
    (("--control", "other:LA"), "control other:LA: LA: no data folder is given"),
    (("--control", "other:phantom-2d2c"), "phantom-2d2c has 1 channels in 2D, expected 1 in 3D"),
    (("--control", "noise", "--unlabeled", "0"), "no unlabeled images to replace"),
])
def test_a_control_that_cannot_be_is_one_line_before_anything_is_written(tmp_path, options, expected):
    done = train(tmp_path, *options)
    assert done.returncode == 2 and done.stderr.startswith("run.py: error: ") and done.stderr.count("\n") == 1
    assert expected in done.stderr and done.stdout == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--control", "noise"], ["--control", "copies", "--unlabeled", "5"]])
def test_a_stopped_run_goes_on_as_the_same_run(tmp_path, monkeypatch, words):
    words, batch = ["--iterations", "4", "--save_every", "2", *words], Loader.batch

    def stops(loader, stage, step):
        if step == 3:
            raise KeyboardInterrupt
        return batch(loader, stage, step)

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "batch", stops)
        with pytest.raises(KeyboardInterrupt):
            train_here(tmp_path / "stopped", *words)
    whole, again = (train_here(tmp_path / name, *words)[0] for name in ("whole", "stopped"))
    for key in ("id", "split", "cases", "weights_sha256"):
        assert again[key] == whole[key], key
