"""From an archive to the store: the same bytes however it ran, nothing done twice, no bad case that stops others."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest

import data_prep
from data_prep import DataError, load_split, parallel, prepare, store
from data_prep.raw import Archive, RawCase
from data_prep.recipes import Recipe, Step

ROOT = Path(__file__).parents[2]
SHAPE, AFFINE = (12, 10, 8), np.diag([-1.0, -1.0, 2.0, 1.0])  # an LPS scan, so that RAS turns two axes
RECIPE = Recipe("fake", "clean", 1, "z-score", after=(Step("zscore", {"over": "all"}),))


def scan(number):
    """Image (int16) and label (classes 0 to 2) of a case."""
    label = np.zeros(SHAPE, np.uint8)
    label[3:7, 2:6, 2:5], label[5:8, 3:6, 3:6] = 1, 2
    return (np.random.default_rng(number).normal(size=SHAPE) * 10 + 100 * label).astype(np.int16), label


def write(raw, case, image, label):
    """The two files of a case, as RawCase."""
    files = []
    for name, voxels in (("image", image), ("label", label)):
        if voxels is not None:
            files.append(raw / f"{case}_{name}.nii.gz")
            nib.save(nib.Nifti1Image(voxels, AFFINE), files[-1])
    return RawCase(case, files[:1], files[1] if files[1:] else None, patient=case)


def build(raw, name="fake", ids=("c0", "c1", "c2", "c3"), recipe=RECIPE):
    raw.mkdir(parents=True)
    cases = tuple(write(raw, case, *scan(number)) for number, case in enumerate(ids))
    return Archive(name, "Fake scans", "MRI", ("image",), ("background", "a", "b"), {}, "nobody", "raw", True, cases,
                   recipe, recipe)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def made(folder):
    """When each stored case was written: a case that is made again gets another inode."""
    return {path.stem: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (folder / "cases").iterdir()}


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """An archive that was prepared with one worker: (archive, raw folder, prepared folder)."""
    place = tmp_path_factory.mktemp("first")
    archive = build(place / "raw")
    assert prepare.prepare(archive, place / "store", place / "raw") == []
    return archive, place / "raw", place / "store"


@pytest.fixture
def again(first, tmp_path):
    """A copy of it to change."""
    shutil.copytree(first[1], tmp_path / "raw")
    shutil.copytree(first[2], tmp_path / "store")
    cases = tuple(replace(case, images=tuple(tmp_path / "raw" / path.name for path in case.images),
                          label=tmp_path / "raw" / case.label.name) for case in first[0].cases)
    return replace(first[0], cases=cases), tmp_path / "raw", tmp_path / "store"


def test_cases_are_what_the_recipe_says(first):
    _, _, folder = first
    image, label = scan(1)
    with h5py.File(folder / "cases" / "c1.h5") as file:
        turned = image[::-1, ::-1].astype(np.float64)
        expected = (turned - turned.mean()) / turned.std()
        np.testing.assert_allclose(file["image"][0], expected, rtol=0, atol=1e-5)
        assert np.array_equal(file["label"][()], label[::-1, ::-1])
        assert file.attrs["recipe"] == b"fake-clean-1"


def test_any_number_of_workers_gives_the_same_bytes(first, tmp_path):
    archive, raw, folder = first
    assert prepare.prepare(archive, tmp_path / "other", raw, workers=2) == []
    assert contents(tmp_path / "other") == contents(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "cases", "contact_sheet.png", "dataset.json", "manifest.json", "splits", "splits_final.json", "summary.json",
        "summary.md"]


def test_manifest_holds_the_checksums_of_inputs_and_outputs(first):
    _, raw, folder = first
    found = manifest(folder)
    assert list(found["cases"]) == ["c0", "c1", "c2", "c3"]
    assert found["recipe"] == RECIPE.to_dict() and found["dtype"] == "float32"
    for case, entry in found["cases"].items():
        files = [raw / f"{case}_{name}.nii.gz" for name in ("image", "label")]
        data = [file.read_bytes() for file in files]
        assert entry["inputs"] == [
            {"file": file.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for file, content in zip(files, data, strict=True)]
        assert entry["output"]["file"] == f"cases/{case}.h5"
        with h5py.File(folder / entry["output"]["file"]) as file:
            assert file.attrs["sha256"].decode() == entry["output"]["sha256"]
            content = hashlib.sha256()
            for name in ("image", "label"):
                array = file[name][()]
                content.update(f"{name} {array.dtype.str} {array.shape}\n".encode() + array.tobytes())
            content.update(file.attrs["geometry"])
            assert content.hexdigest() == entry["output"]["sha256"]


def test_folds_card_and_store_of_own_data(first):
    _, _, folder = first
    card = store.read_card(folder)
    assert (card["name"], card["source"], card["spacing"], card["classes"]) == (
        "fake", "raw", [1.0, 1.0, 2.0], ["background", "a", "b"])
    assert card["recipe"] == card["replay"] == RECIPE.to_dict()
    folds = json.loads((folder / "splits_final.json").read_text())
    assert len(folds) == 4 and sorted(case for fold in folds for case in fold["val"]) == ["c0", "c1", "c2", "c3"]
    for number, fold in enumerate(folds):
        split = load_split("cv5", number, folder / "splits")
        assert (list(split.train), list(split.test)) == (fold["train"], fold["val"])
        assert sorted(split.train + split.test) == ["c0", "c1", "c2", "c3"]
    spec = store.spec_of(folder)
    cases = spec.open(None, spec.protocols["cv5"])
    cases.check(["c0", "c3"])
    assert cases.image("c0").shape == (1, *SHAPE) and cases.provenance(["c0"])["recipe"] == "fake-clean-1"


def test_a_second_call_makes_only_what_is_gone_damaged_or_of_other_inputs(again, first, capsys):
    archive, raw, folder = again
    before = made(folder)
    (folder / "cases" / "c0.h5").unlink()
    with h5py.File(folder / "cases" / "c1.h5", "r+") as file:
        file["image"][0, 0, 0, 0] += 1
    write(raw, "c2", *scan(7))
    (folder / "cases" / ".c9.h5.0.tmp").write_bytes(b"left by a killed run")
    assert prepare.prepare(archive, folder, raw, workers=2) == []
    assert "4 of 4 cases" in (told := capsys.readouterr().err) and "1 as before" in told
    after = made(folder)
    assert after["c3"] == before["c3"] and all(after[case] != before[case] for case in ("c1", "c2"))
    assert sorted(after) == ["c0", "c1", "c2", "c3"]
    now, then = manifest(folder)["cases"], manifest(first[2])["cases"]
    assert [now[case] == then[case] for case in now] == [True, True, False, True]

    write(raw, "c2", *scan(2))
    assert prepare.prepare(archive, folder, raw) == []
    assert contents(folder) == contents(first[2])


def test_other_settings_make_all_cases_again(again):
    archive, raw, folder = again
    other = replace(archive, cases=archive.cases[:2])
    assert prepare.prepare(other, folder, raw, dtype="float16", compression="lzf", replace_others=True) == []
    with h5py.File(folder / "cases" / "c1.h5") as file:
        assert file["image"].dtype == np.float16 and file["image"].compression == "lzf"
    found = manifest(folder)
    assert (found["dtype"], found["compression"], list(found["cases"])) == ("float16", "lzf", ["c0", "c1"])


def test_cases_that_are_gone_leave_but_no_file_of_others(again):
    archive, raw, folder = again
    (folder / "cases" / "mine.h5").write_bytes(b"mine")
    (folder / "notes.txt").write_text("mine")
    before = made(folder)
    fewer = replace(archive, cases=archive.cases[:3])
    with pytest.raises(DataError) as error:
        prepare.prepare(fewer, folder, raw)
    assert "holds 4 cases, 1 of them are not in this archive, the first is c3" in str(error.value)
    with pytest.raises(DataError, match="holds 4 cases made with --raw, expected another --out for --from-h5"):
        prepare.prepare(replace(archive, source="h5"), folder, raw)
    assert made(folder) == before and store.read_card(folder)["name"] == archive.name
    assert prepare.prepare(fewer, folder, raw, replace_others=True) == []
    assert sorted(manifest(folder)["cases"]) == ["c0", "c1", "c2"]
    assert made(folder) == {case: before[case] for case in ("c0", "c1", "c2", "mine")}
    assert (folder / "notes.txt").read_text() == "mine"
    assert "c3" not in (folder / "splits_final.json").read_text()


@pytest.fixture
def helpers(tmp_path, monkeypatch):
    """A module that workers find: functions in place of `RawCase.align` that do not do what they should."""
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers" / "misbehave.py").write_text(textwrap.dedent("""
        import os, signal, time
        from pathlib import Path

        def die(image, label):
            os.kill(os.getpid(), signal.SIGKILL)

        def fail(image, label):
            raise ValueError("a\\nbug")

        def wait(image, label):
            parent = os.getppid()
            while not Path(os.environ["GATE"]).exists():
                time.sleep(0.02)
                if os.getppid() != parent:
                    os._exit(1)
            return label
    """))
    monkeypatch.syspath_prepend(str(tmp_path / "helpers"))
    import misbehave

    yield misbehave
    del sys.modules["misbehave"]


def test_bad_cases_are_told_in_the_order_of_the_archive_and_stop_no_other(again, helpers):
    archive, raw, folder = again
    wrong, damaged, lost, broken = archive.cases[0], archive.cases[1], archive.cases[2], archive.cases[3]
    image, label = scan(0)
    nib.save(nib.Nifti1Image(label + 5, AFFINE), wrong.label)
    damaged.images[0].write_bytes(damaged.images[0].read_bytes()[:50])
    more = [write(raw, case, *scan(number)) for number, case in enumerate(("g4", "g5"), start=4)]
    cases = (wrong, damaged, replace(lost, align=helpers.die), replace(broken, align=helpers.fail),
             RawCase("p6", problem="p6: no label, expected one"), *more, RawCase("g5", more[1].images, more[1].label),
             RawCase("a/b", more[0].images, more[0].label))
    found = prepare.prepare(replace(archive, cases=cases), folder, raw, workers=2)
    starts = [f"{wrong.label}: ", f"{damaged.images[0]}: ",
              "c2: the process that prepared it was lost (killed by SIGKILL)", "c3: ValueError: a bug", "p6: no label",
              "g5: two cases of that name", "'a/b': no file can have that name"]
    assert len(found) == len(starts) and all(map(str.startswith, found, starts)), found
    assert all("\n" not in line for line in found)
    assert list(made(folder)) == list(manifest(folder)["cases"]) == ["g4"]
    told = json.loads((folder / "summary.json").read_text())
    assert list(told["bad"]) == ["c0", "c1", "c2", "c3", "p6", "g5", "a/b"]
    assert told["bad"]["c1"].startswith("c1_image.nii.gz: ")


def test_nothing_stays_of_an_archive_without_a_good_case(tmp_path):
    archive = build(tmp_path / "raw", ids=("c0",))
    archive.cases[0].label.write_bytes(b"")
    assert len(prepare.prepare(archive, tmp_path / "out" / "fake" / "clean", tmp_path / "raw")) == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_the_same_scan_twice_is_bad_in_own_data_and_told_of_an_archive(tmp_path, capsys):
    split = load_split("LA-cv5", 0)
    ids = sorted((*split.train[:2], split.test[0]))
    own = build(tmp_path / "raw", ids=ids)
    image, label = scan(0)
    write(tmp_path / "raw", ids[2], image.astype(np.float32), (label > 0).astype(np.uint8))
    [line] = prepare.prepare(own, tmp_path / "own", tmp_path / "raw")
    assert line == f"{ids[2]}: the same scan as {ids[0]}, expected every scan once"
    assert list(manifest(tmp_path / "own")["cases"]) == sorted(made(tmp_path / "own")) == ids[:2]
    unlabeled = replace(own, cases=(replace(own.cases[0], label=None), *own.cases[1:]))
    [line] = prepare.prepare(unlabeled, tmp_path / "own", tmp_path / "raw")
    assert line == f"{ids[0]}: the same scan as {ids[2]}, expected every scan once"
    capsys.readouterr()

    recipe = replace(RECIPE, dataset="LA", name="paper")
    archive = replace(own, name="LA", recipe=recipe, replay=recipe)
    assert prepare.prepare(archive, tmp_path / "known", tmp_path / "raw") == []
    told = capsys.readouterr().err
    assert f"the same scan: {ids[0]}, {ids[2]}" in told
    missing = sorted(set(split.train + split.test) - set(ids))
    assert ("LA: 100 cases are listed in LA-paper, LA-cv5, LA-mcf5, 97 of them are not here, the first is "
            f"{missing[0]}\n") in told
    assert json.loads((tmp_path / "known" / "summary.json").read_text())["odd"]["duplicates"] == [[ids[0], ids[2]]]
    folds = json.loads((tmp_path / "known" / "splits_final.json").read_text())
    assert len(folds) == 5
    assert folds[0] == {"train": [c for c in split.train if c in ids], "val": [c for c in split.test if c in ids]}
    assert not (tmp_path / "known" / "splits").exists()


SCRIPT = """
import pickle, sys
from data_prep import prepare
if __name__ == "__main__":
    prepare.SAVE_EVERY = 0
    sys.path.insert(0, sys.argv[1])
    archive, raw = pickle.load(open(sys.argv[2], "rb"))
    prepare.find_archive = lambda *_: (archive, raw)
    sys.exit(prepare.main(["fake", "--raw", str(raw), "--out", sys.argv[3], "--workers", "1"]))
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups on this system")
def test_stopped_or_killed_it_goes_on_where_it_was(first, tmp_path, helpers):
    import pickle

    archive, raw, reference = first
    folder = tmp_path / "out" / "fake" / "clean"
    # the gate is shut: the third case does not end
    gated = replace(archive, cases=tuple(replace(case, align=helpers.wait) if case.id == "c2" else case
                                         for case in archive.cases))
    (tmp_path / "archive").write_bytes(pickle.dumps((gated, raw)))
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "run.py", tmp_path / "helpers", tmp_path / "archive", tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GATE": str(tmp_path / "gate")}

    def run_until_stuck(kill, *kept):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        end = time.monotonic() + 60
        while not (folder / "manifest.json").is_file() or list(manifest(folder)["cases"]) != ["c0", "c1"]:
            assert process.poll() is None and time.monotonic() < end, process.stderr.read()
            time.sleep(0.02)
        while kept and not (folder / kept[0]).exists():
            time.sleep(0.02)
        kill(process.pid)
        return process.wait(60), process.stderr.read()

    status, told = run_until_stuck(lambda pid: os.killpg(pid, signal.SIGINT))
    assert (status, told) == (130, "stopped; the same command goes on\n")
    assert sorted(contents(folder)) == ["cases/c0.h5", "cases/c1.h5", "manifest.json"]
    before = made(folder)

    status, _ = run_until_stuck(lambda pid: os.kill(pid, signal.SIGKILL))
    assert status == -signal.SIGKILL
    visible = [name for name in contents(folder) if not Path(name).name.startswith(".")]
    assert sorted(visible) == ["cases/c0.h5", "cases/c1.h5", "manifest.json"]

    (tmp_path / "gate").touch()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "2 as before" in done.stderr
    assert {case: made(folder)[case] for case in before} == before
    found = contents(folder)
    # the settings of a case name the function that was waiting
    for name, expected in contents(reference).items():
        if name != "manifest.json":
            assert found.pop(name) == expected, name
    assert list(found) == ["manifest.json"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit of a file's size is set as Linux does")
def test_without_space_it_ends_with_one_line(first, tmp_path):
    import pickle

    (tmp_path / "archive").write_bytes(pickle.dumps(first[:2]))
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
    (tmp_path / "run.py").write_text(limit + SCRIPT)
    command = [sys.executable, tmp_path / "run.py", tmp_path, tmp_path / "archive", tmp_path / "out"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2
    path = tmp_path / "out" / "fake" / "clean" / "cases" / "c0.h5"
    assert done.stderr == (
        f"prepare: error: {path}: cannot be written (File too large), expected a writable place with space\n")
    assert [name for name in contents(tmp_path / "out") if "case" in name] == []


# The command line.


def own_folder(place, cases=3):
    """Own data in nnU-Net's layout."""
    for part in ("imagesTr", "labelsTr"):
        (place / part).mkdir(parents=True)
    for number in range(cases):
        image, label = scan(number)
        nib.save(nib.Nifti1Image(image, AFFINE), place / "imagesTr" / f"s{number}_0000.nii.gz")
        nib.save(nib.Nifti1Image(label, AFFINE), place / "labelsTr" / f"s{number}.nii.gz")
    (place / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "T2"}, "labels": {"background": 0, "a": 1, "b": 2}, "numTraining": cases,
        "file_ending": ".nii.gz"}))
    return place


def test_own_data_from_the_command_line(tmp_path, capsys, monkeypatch):
    raw = own_folder(tmp_path / "raw")
    monkeypatch.setenv("SSL4MIS_DATA", str(tmp_path / "data"))
    assert prepare.main(["mine", "--raw", str(raw), "--workers", "2"]) == 0
    folder = tmp_path / "data" / "mine" / "clean"
    assert sorted(manifest(folder)["cases"]) == ["s0", "s1", "s2"]
    assert {entry["inputs"][0]["file"] for entry in manifest(folder)["cases"].values()} == {
        f"imagesTr/s{n}_0000.nii.gz" for n in range(3)}

    (raw / "labelsTr" / "s1.nii.gz").write_bytes(b"no scan")
    capsys.readouterr()
    assert prepare.main(["mine", "--raw", str(raw), "--workers", "1"]) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[-2] == "1 of 3 cases is bad:" and str(raw / "labelsTr" / "s1.nii.gz") in told[-1]
    assert sorted(manifest(folder)["cases"]) == sorted(made(folder)) == ["s0", "s2"]


def test_data_without_folds_are_prepared_and_not_trained_on(tmp_path, capsys):
    raw = own_folder(tmp_path / "raw", 1)
    assert prepare.main(["mine", "--raw", str(raw), "--out", str(tmp_path), "--workers", "1"]) == 0
    assert "mine: no folds to train on: mine: 1 patients with labels, expected at least 2" in capsys.readouterr().err
    with pytest.raises(DataError, match="no protocol to train by, .* labels of at least two patients"):
        data_prep.locate(str(tmp_path / "mine"))


def test_published_files_are_taken_as_they_are(tmp_path, capsys):
    ids = load_split("LA-paper", 0).train[:2]
    for number, case in enumerate(ids):
        image, label = scan(number)
        (tmp_path / "raw" / case).mkdir(parents=True)
        with h5py.File(tmp_path / "raw" / case / "mri_norm2.h5", "w") as file:
            file["image"], file["label"] = (image / 50).astype(np.float32), (label > 0).astype(np.uint8)
    command = ["LA", "--from-h5", str(tmp_path / "raw"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert prepare.main(command) == 0
    folder = tmp_path / "out" / "LA" / "paper"
    card = store.read_card(folder)
    paper = data_prep.module("LA").RECIPES["paper"].to_dict()
    assert (card["source"], card["recipe"]["name"], card["replay"], card["protocols"]) == ("h5", "published", paper, {})
    with h5py.File(folder / "cases" / f"{ids[1]}.h5") as file:
        assert np.array_equal(file["image"][0], (scan(1)[0] / 50).astype(np.float32))
        assert file.attrs["recipe"] == b"LA-published-1"
    assert "98 of them are not here" in capsys.readouterr().err


def test_published_files_and_their_data_set_may_share_a_folder(tmp_path):
    from archives import brats

    raw = brats.build_h5(tmp_path, ["BraTS19_CBICA_AAB_1", "BraTS19_CBICA_AAG_1"])
    command = ["BraTS", "--from-h5", str(raw), "--out", str(raw), "--workers", "1"]
    assert prepare.main(command) == 0
    before = contents(tmp_path)
    assert prepare.main(command) == 0 and contents(tmp_path) == before


def refused(capsys, *command):
    try:
        assert prepare.main(list(map(str, command))) == 2
    except SystemExit as stop:  # argparse
        assert stop.code == 2
    told = capsys.readouterr().err
    assert told.startswith("prepare: error: ") and told.count("\n") == 1
    return told.removeprefix("prepare: error: ").rstrip("\n")


def test_what_cannot_be_done_is_one_line(tmp_path, capsys, first):
    empty, raw = tmp_path / "empty", own_folder(tmp_path / "raw", 1)
    empty.mkdir()
    assert refused(capsys, "Pancras", "--raw", empty).startswith("data set 'Pancras' is unknown, did you mean 'Pancre")
    assert "'PROMISE12'" in refused(capsys, "promise", "--raw", tmp_path / "nix")
    assert refused(capsys, "LA", "--raw", tmp_path / "nix").startswith(f"{tmp_path / 'nix'}: no such folder, expected")
    assert refused(capsys, "LA", "--raw", raw / "dataset.json").startswith(f"{raw / 'dataset.json'}: a file, expected")
    assert refused(capsys, "la", "--raw", empty).startswith(f"{empty}: found nothing, expected the archive")
    assert refused(capsys, "LA", "--raw", raw, "--recipe", "clear") == (
        "recipe 'clear' is unknown for LA, expected paper or clean")
    assert "expected paper" in refused(capsys, "LA", "--from-h5", raw, "--recipe", "clean")
    assert "expected --raw" in refused(capsys, "PROMISE12", "--from-h5", raw)
    assert "expected one of LA, Pancreas" in refused(capsys, "mine", "--from-h5", raw)
    assert "expected clean" in refused(capsys, "mine", "--raw", raw, "--recipe", "paper")
    for name in ("phantom", "../x", ".x", "a b"):
        assert refused(capsys, name, "--raw", raw).startswith(f"data set '{name}', expected a name")
    assert str(empty) in refused(capsys, "mine", "--raw", empty)
    assert "'0', expected a number from 1" in refused(capsys, "mine", "--raw", raw, "--workers", 0)

    file = tmp_path / "file"
    file.write_text("")
    assert refused(capsys, "mine", "--raw", raw, "--out", file).startswith(f"{file / 'mine' / 'clean'}: cannot be used")
    foreign = tmp_path / "out" / "mine" / "clean"
    foreign.mkdir(parents=True)
    (foreign / "thesis.tex").write_text("")
    assert refused(capsys, "mine", "--raw", raw, "--out", tmp_path / "out") == (
        f"{foreign}: holds thesis.tex, expected nothing or a prepared data set")
    assert os.listdir(foreign) == ["thesis.tex"]


def test_a_folder_without_permission_is_one_line(tmp_path, capsys, monkeypatch):
    raw, iterdir = own_folder(tmp_path / "raw", 1), Path.iterdir

    def locked(folder):
        if folder == raw / "imagesTr":
            raise PermissionError(13, "Permission denied", str(folder))
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", locked)
    assert refused(capsys, "mine", "--raw", raw, "--out", tmp_path / "out") == (
        f"{raw / 'imagesTr'}: Permission denied, expected access to it")


def test_a_store_of_others_and_a_damaged_one_stay_as_they_are(again):
    archive, raw, folder = again
    before = contents(folder)
    with pytest.raises(DataError, match="holds the data set fake, expected other or nothing"):
        prepare.prepare(replace(archive, name="other"), folder, raw)
    with prepare._alone(folder), pytest.raises(DataError, match="another process prepares it"):
        prepare.prepare(archive, folder, raw)
    assert contents(folder) == before
    text = (folder / "manifest.json").read_text()
    for damage in (text[:-20], text.replace("cases/c0.h5", "../c0.h5"), "[]"):
        (folder / "manifest.json").write_text(damage)
        with pytest.raises(DataError, match="manifest.json: damaged, expected what this command wrote; remove"):
            prepare.prepare(archive, folder, raw)
    assert {name: data for name, data in contents(folder).items() if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"}


def test_help_needs_no_numpy():
    code = "import sys, data_prep.prepare as p\ntry: p.main(['-h'])\nexcept SystemExit: print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("usage: python -m data_prep.prepare") and done.stdout.endswith("\nFalse\n")


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(parallel.time, "monotonic", lambda: next(clock))
    with parallel.Progress("LA", 4) as progress:
        for case in "abcd":
            progress.step(case)
    # after 40 s two of four are done; the next line would come with the last one
    assert capsys.readouterr().err == "LA  2/4 (b), 0.7 min left\n"
