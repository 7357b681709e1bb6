"""Every data set from its archive to the fold, by the commands: prepare, three steps, a record, back to a raw scan."""

import hashlib
import importlib.util
import io
import json
import runpy
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import h5py
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from archives import acdc, brats, isles2022, la, owndata, pancreas, promise12

import data_prep
from data_prep import prepare, volumes
from data_prep.spec import Split
from ssl4mis import export, records
from ssl4mis.loading import Loader

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
STEPS = ("--network vnet --width 2 --iterations 3 --log_every 1 --labeled_batch 2 --unlabeled_batch 2 --device cpu "
         "--precision 32-true").split()
VOLUMES, PLANES = ("--patch [16,16,16] --stride [16,16,16]".split(), "--patch [32,32] --stride [32,32]".split())
HEART = ["right ventricle", "myocardium", "left ventricle"]
REGIONS = ["whole tumor", "tumor core", "enhancing tumor"]

# By data set and recipe: the archive and how it is built, the case list with all of its cases, a raw scan as a user
# gives it, and the runs, each with what is scored. A fold without a protocol means cv5.
SETS = {
    ("LA", "paper"): (la, {}, "LA-cv5", "**/{}/lgemri.nrrd", {
        "--protocol paper --labeled 8": ["left atrium"], "--labeled 16 --fold 3": ["left atrium"]}),
    ("LA", "clean"): (la, {}, "LA-cv5", "**/{}/lgemri.nrrd", {"--recipe clean --labeled 4 --fold 1": ["left atrium"]}),
    ("Pancreas", "paper"): (pancreas, {"shape": (24, 24, 12)}, "Pancreas-cv5", "**/{}", {
        "--protocol paper --labeled 6": ["pancreas"], "--labeled 12 --fold 2": ["pancreas"]}),
    ("Pancreas", "clean"): (pancreas, {"form": "LAS"}, "Pancreas-mcnet", "**/{}.nii.gz", {
        "--protocol mcnet --labeled 12 --recipe clean": ["pancreas"]}),
    ("ACDC", "paper"): (acdc, {"shape": (36, 32, 4)}, "ACDC-cv5", "**/{}/*_frame04.nii.gz", {
        "--protocol volumes --labeled 3": HEART, "--protocol slices --labeled 7": HEART,
        "--protocol lite --labeled 3": HEART, "--labeled 1 --fold 4": HEART}),
    ("ACDC", "clean"): (acdc, {"shape": (36, 32, 4)}, "ACDC-cv5", "**/{}/*_frame04.nii.gz", {
        "--recipe clean --labeled 3 --fold 2": HEART}),
    ("BraTS", "paper"): (brats, {"shape": (20, 22, 18)}, "BraTS2019-cv5", "**/{}", {
        "--labeled 50 --fold 0": ["whole tumor"], "--protocol regions --labeled 25 --fold 1": REGIONS}),
    ("BraTS", "clean"): (brats, {"shape": (20, 22, 18)}, "BraTS2019-cv5", "**/{}", {
        "--protocol paper --recipe clean --labeled 25": ["whole tumor"]}),
    ("PROMISE12", "clean"): (promise12, {"shape": (32, 28, 8), "tilt": 12}, "PROMISE12-cv5", "**/{}.mhd", {
        "--labeled 4 --fold 2": ["prostate"]}),
    ("ISLES2022", "clean"): (isles2022, {"shape": (22, 26, 18)}, "ISLES2022-cv5", "**/{}/ses-0001/dwi", {
        "--labeled 10 --fold 4": ["stroke lesion"]}),
}
LATER = {("ACDC", "clean"), ("BraTS", "clean")}  # their archives and protocols are seen in the others, too


@pytest.fixture(autouse=True)
def no_other_data(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL4MIS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SSL4MIS_DATA", raising=False)


def command(name, *words, expected=0):
    """What a command writes to stdout and stderr; it runs in this process, which has loaded torch already."""
    main = prepare.main if name == "prepare" else runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"))["main"]
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as errors:
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code
    assert status == expected, errors.getvalue()
    return out.getvalue(), errors.getvalue()


def store_of(name, raw, out, recipe="clean", source="--raw"):
    """The folder of a data set that was prepared."""
    command("prepare", name, source, raw, "--out", out, "--recipe", recipe, "--workers", 1)
    return out / name / recipe


def train(out, *words):
    """The record of a run that was not there before."""
    before = set(out.glob("records/*"))
    command("run", "--method", "ua_mt", "--out", out, *STEPS, *words)
    [path] = set(out.glob("records/*")) - before
    return records.read(path)


def refused(out, *words):
    """The one line that a run ends with before it begins."""
    _, errors = command("run", "--method", "ua_mt", "--out", out, *STEPS, *words, expected=2)
    assert errors.startswith("run.py: error: ") and errors.count("\n") == 1
    return errors


def finished(record, out, *words):
    """Whether a command line means the run of a record."""
    said, _ = command("run", "--method", "ua_mt", "--out", out, *STEPS, *words)
    return said.startswith(f"{record['id']} is finished: ")


def listed(name):
    """All ids of a case list."""
    count = data_prep.load_split(name, 0).folds
    folds = [data_prep.load_split(name, number) for number in range(count)]
    return sorted({case for fold in folds for case in (*fold.train, *fold.test)})


def stored(store):
    """Ids of the cases in a store."""
    return sorted(path.stem for path in (store / "cases").iterdir())


def check_folds(store, name, splits=None):
    """splits_final.json has the five folds of the case list, without the cases that are not there."""
    there = set(stored(store))
    found = json.loads((store / "splits_final.json").read_text())
    assert len(found) == 5
    for number, fold in enumerate(found):
        known = data_prep.load_split(name, number, splits)
        assert fold == {"train": [case for case in known.train if case in there],
                        "val": [case for case in known.test if case in there]}


def check_record(record, store, labeled, targets, splits=None):
    """Cases, classes and data of a record, against the case list and the manifest of the store."""
    split = data_prep.load_split(record["split"]["name"], record["split"]["fold"], splits)
    assert record["split"]["labeled"] == list(split.train[:labeled])
    assert record["split"]["unlabeled"] == [*split.train[labeled:], *split.extra]
    assert record["split"]["test"] == list(split.test)
    trained, tested = ({case.split("_frame")[0] for case in cases} for cases in (split.train, split.test))
    assert not trained & tested
    assert record["classes"] == ["background", *targets]
    assert {row["class"] for row in record["cases"]} == set(targets)
    manifest = json.loads((store / "manifest.json").read_text())
    recipe, known = manifest["recipe"], manifest["cases"]
    cases = sorted((*split.train, *split.extra, *split.test))
    lines = "".join(f"{case} {known[case]['output']['sha256']}\n" for case in cases)
    assert record["data"] == {
        "recipe": f"{recipe['dataset']}-{recipe['name']}-{recipe['version']}",
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "label_guided": recipe["name"] == "paper" and recipe["dataset"] in ("LA", "Pancreas"), "spacing_known": True}
    assert [(event["done"], set(event["terms"])) for event in record["curve"]] == [
        (done, {"supervised", "consistency"}) for done in (1, 2, 3)]


def check_prediction(record, results, scan, place, *words):
    """A raw scan is segmented on its own grid, as ITK reads it."""
    command("predict", "--run", record["id"], "--results", results, "--input", scan, "--output", place, "--device",
            "cpu", *words)
    [file] = (path for path in place.glob("*_seg.*") if path.suffix != ".raw")  # of .mhd, which is read with it
    found, source = sitk.ReadImage(str(file)), raw_image(scan)
    assert found.GetSize() == source.GetSize()[:3]
    for mine, raw in zip(grid(found), grid(source), strict=True):
        assert np.allclose(mine, raw, rtol=0, atol=1e-4)
    card, _ = export.read(record["id"], results)
    assert sitk.GetArrayFromImage(found).max() < len(card["task"]["classes"])


def raw_image(scan):
    """A scan as ITK reads it: a file, a DICOM series, or the first of the files of a folder, one for each modality."""
    if scan.is_file():
        return sitk.ReadImage(str(scan))
    series = next((path.parent for path in scan.rglob("*.dcm")), None)
    if series:
        return sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(series)))
    return sitk.ReadImage(str(min(path for path in scan.iterdir() if path.suffix != ".json")))


def grid(image):
    """Spacing, origin and direction in space, of an image in 4D too."""
    direction = np.reshape(image.GetDirection(), (image.GetDimension(), -1))
    return image.GetSpacing()[:3], image.GetOrigin()[:3], direction[:3, :3]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe"), [
    pytest.param(*which, marks=[pytest.mark.long] if which in LATER else []) for which in SETS])
def test_from_the_archive_to_the_record_and_back(tmp_path, name, recipe):
    archive, options, cases, scan, runs = SETS[name, recipe]
    raw = archive.build(tmp_path / "raw", listed(cases), **options)
    store = store_of(name, raw, tmp_path / "data", recipe)
    assert stored(store) == listed(cases)
    check_folds(store, data_prep.dataset(name).protocols["cv5"].split)
    for number, (settings, targets) in enumerate(runs.items()):
        words = settings.split()
        window = PLANES if words[1] in ("slices", "lite") else VOLUMES
        record = train(tmp_path, "--dataset", name, "--data-root", tmp_path / "data", *words, *window)
        words = [word for word in words if word not in ("--recipe", "clean")]  # the folder says it
        assert finished(record, tmp_path, "--dataset", store, *words, *window)
        labeled = int(words[words.index("--labeled") + 1]) * (2 if name == "ACDC" else 1)  # ED and ES of a patient
        check_record(record, store, labeled, targets)
        patient = record["split"]["test"][-1].split("_frame")[0]
        [source] = raw.glob(scan.format(patient))
        check_prediction(record, tmp_path, source, tmp_path / f"predicted-{number}")


def test_a_bad_case_is_left_out_of_the_folds_until_it_is_mended(tmp_path):
    """A run on what is left is refused, since its score would be another one."""
    ids, data = listed("PROMISE12-cv5")[:6], tmp_path / "data"
    raw = promise12.build(tmp_path / "raw", ids, (16, 16, 16), broken={"Case03": "truncated"})
    words = ("PROMISE12", "--raw", raw, "--out", data, "--workers", 1)
    store = data / "PROMISE12" / "clean"
    _, errors = command("prepare", *words, expected=1)
    *_, count, line = errors.splitlines()
    assert count == "1 of 6 cases is bad:" and line.startswith(f"  {raw}") and "Case03" in line
    assert stored(store) == [case for case in ids if case != "Case03"]
    check_folds(store, "PROMISE12-cv5")
    errors = refused(tmp_path, "--dataset", "PROMISE12", "--data-root", data, "--fold", 0, "--labeled", 4, *VOLUMES)
    assert "45 of 50 cases are missing, the first is cases/" in errors
    assert not (tmp_path / "runs").exists()

    shutil.rmtree(raw)
    promise12.build(raw, ids, (16, 16, 16))
    _, errors = command("prepare", *words)
    assert f"6 of 6 cases are in {store}, 5 as before" in errors
    assert stored(store) == ids
    check_folds(store, "PROMISE12-cv5")


# the files published with UA-MT


@pytest.mark.slow
def test_published_files_train_the_same_imported_or_not(prepared, tmp_path):
    places = {"direct": prepared, "imported": store_of("LA", prepared, tmp_path / "data", "paper", "--from-h5")}
    for protocol in ("paper", "lite"):
        check_batches(*places.values(), protocol, 8, (16, 16, 16))
        runs = [(train(tmp_path / kind, "--dataset", "LA", "--data-root", root, "--protocol", protocol, *VOLUMES),
                 tmp_path / kind) for kind, root in places.items()]
        assert_same_run(*runs)
        assert [run["data"]["recipe"] for run, _ in runs] == ["LA-published-1"] * 2
        assert [len(run["data"]["sha256"]) for run, _ in runs] == [0, 64]


def check_batches(published, store, protocol, labeled, patch):
    """The first three batches of LA are equal to the last bit."""
    spec, split = data_prep.dataset("LA"), data_prep.load_split("LA-paper", 0)
    stores = [spec.open(root, spec.protocols[protocol]) for root in (published, store)]
    assert [type(one).__name__ for one in stores] == ["LAStore", "CaseStore"]
    cases = split.labeled(labeled), split.unlabeled(labeled)
    one, two = (Loader(store, *cases, patch, (2, 2), 0, ("rotflip",), "cpu") for store in stores)
    for step in range(3):
        (ours, theirs) = one.batch(0, step), two.batch(0, step)
        assert torch.equal(ours.image, theirs.image) and torch.equal(ours.labeled.label, theirs.labeled.label)
        assert (ours.labeled.cases, ours.unlabeled.cases) == (theirs.labeled.cases, theirs.unlabeled.cases)


def assert_same_run(*runs):
    """Weights, losses and scores of two runs (record, results) are equal to the last bit."""
    (one, here), (two, there) = runs
    assert one["id"] == two["id"] and one["cases"] == two["cases"]
    assert [event["terms"] for event in one["curve"]] == [event["terms"] for event in two["curve"]]
    assert_same_weights(one["id"], here, there)


def assert_same_weights(run, here, there):
    first, second = (export.read(run, place)[1] for place in (here, there))
    assert first.keys() == second.keys() and len(first) > 50
    assert all(torch.equal(first[name], second[name]) for name in first)


# own data

IDS = [f"case_{number:02d}" for number in range(10)]
PATIENTS = {case: f"p{number // 2}" for number, case in enumerate(IDS)}
FREE = ["free_0", "free_1"]  # without labels
OWN = {
    "nnunet": ({"labels": {"background": 0, "whole": [1, 2], "tumor": 2}, "unlabeled": FREE}, ["whole", "tumor"]),
    "decathlon": ({"modalities": ("T2", "ADC")}, ["liver", "tumor"]),
    "csv": ({"modalities": ("T1", "T2"), "ending": ".nrrd", "columns": {"patient": PATIENTS}}, ["label 1", "label 2"]),
}
RUN = ("--fold", "1", "--labeled", "2", *VOLUMES)


@pytest.mark.parametrize("layout", OWN)
def test_own_data_from_the_folder_to_the_record_and_back(tmp_path, layout):
    options, targets = OWN[layout]
    raw = owndata.build(tmp_path / "raw", IDS, layout, **options)
    store = store_of("mine", raw, tmp_path / "data")
    assert stored(store) == IDS + FREE * (layout == "nnunet")
    check_folds(store, "cv5", store / "splits")
    record = train(tmp_path, "--dataset", store.parent, *RUN)
    check_record(record, store, 4 if layout == "csv" else 2, targets, store / "splits")  # two cases of a patient
    assert record["split"]["unlabeled"][-2:] == FREE or layout != "nnunet"
    if layout == "csv":
        assert [PATIENTS[case] for case in record["split"]["test"][::2]] == [
            PATIENTS[case] for case in record["split"]["test"][1::2]]
    files = sorted((tmp_path / "raw").glob(f"[is]*/{record['split']['test'][0]}*"))
    assert len(files) == (2 if layout == "csv" else 1)
    if layout == "csv":  # a file for each modality: a folder is the scan
        (tmp_path / "scan").mkdir()
        for file in files:
            shutil.copy(file, tmp_path / "scan")
    check_prediction(record, tmp_path, tmp_path / "scan" if layout == "csv" else files[0], tmp_path / "predicted")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Own data, raw and prepared, and a run on them: (place, store, record)."""
    place = tmp_path_factory.mktemp("own")
    store = store_of("mine", owndata.build(place / "raw", IDS, shape=(24, 22, 18)), place / "data")
    return place, store, train(place, "--dataset", store, *RUN)


def test_every_way_to_name_own_data_is_the_same_run(own, monkeypatch):
    place, store, record = own
    ways = [("--dataset", folder) for folder in (store, store.parent)]
    ways += [("--dataset", "mine", "--data-root", root) for root in (place / "data", store.parent, store)]
    assert all(finished(record, place, *words, *RUN) for words in ways)
    monkeypatch.setenv("SSL4MIS_DATA", str(place / "data"))
    assert finished(record, place, "--dataset", "mine", *RUN)
    assert (record["spec"]["dataset"], record["spec"]["protocol"], record["spec"]["fold"]) == ("mine", "cv5", 1)


def test_a_folder_without_a_prepared_data_set_is_one_line(own, tmp_path):
    place, _, _ = own
    for folder in (place / "data", place / "nothing"):
        errors = refused(tmp_path, "--dataset", folder, *RUN)
        assert f"data set {folder}: no prepared data set there, expected the folder of a dataset.json" in errors


def test_training_needs_no_label_of_unlabeled_and_test_cases(own, tmp_path):
    place, store, record = own
    shutil.copytree(store, tmp_path / "store")
    unlabeled, test = record["split"]["unlabeled"], record["split"]["test"]
    assert (len(unlabeled), len(test)) == (6, 2)
    for case in (*unlabeled, *test):
        with h5py.File(tmp_path / "store" / "cases" / f"{case}.h5", "a") as file:
            del file["label"]
    errors = refused(tmp_path, "--dataset", tmp_path / "store", *RUN)
    assert f"{test[0]}.h5: no array 'label'" in errors
    assert_same_weights(record["id"], place, tmp_path)

    for case in test:
        shutil.copy(store / "cases" / f"{case}.h5", tmp_path / "store" / "cases")
    assert_same_run((record, place), (train(tmp_path, "--dataset", tmp_path / "store", *RUN), tmp_path))


def test_a_run_on_other_data_is_refused(own, tmp_path):
    place, _, record = own
    for folder in ("raw", "data", "runs", "records"):
        shutil.copytree(place / folder, tmp_path / folder)
    run, result = tmp_path / "runs" / record["id"], tmp_path / "records" / f"{record['id']}.json"
    scan, before = tmp_path / "raw" / "imagesTr" / f"{IDS[3]}_0000.nii.gz", (run / "latest.ckpt").read_bytes()
    sitk.WriteImage(sitk.ReadImage(str(scan)) ** 2, str(scan))
    _, errors = command("prepare", "mine", "--raw", tmp_path / "raw", "--out", tmp_path / "data", "--workers", 1)
    assert "10 of 10 cases are in" in errors and "9 as before" in errors
    words = ("--dataset", tmp_path / "data" / "mine", *RUN)
    for place in (result, run):
        errors = refused(tmp_path, *words)
        line = f"run.py: error: {place}: made of other data, sha256 {record['data']['sha256']}, expected "
        assert errors.startswith(line) and "; remove it to start again" in errors
        assert (run / "latest.ckpt").read_bytes() == before
        if place == result:
            result.unlink()
    (run / "data.json").unlink()  # nothing tells what the checkpoint was made of
    assert f"{run}: made of other data, recipe none, expected mine-clean-1" in refused(tmp_path, *words)
    assert not result.exists()

    shutil.rmtree(run)
    again = train(tmp_path, *words)
    assert again["id"] == record["id"] and again["data"]["sha256"] != record["data"]["sha256"]


# real scans, where they are: no score is meant


def real(*parts):
    """A place among the real scans; the test is skipped where it is missing."""
    place = SHARED.joinpath(*parts)
    if not place.exists():
        pytest.skip(f"no real scans: they lie in ../shared/{'/'.join(parts)}")
    return place


def few(monkeypatch, train, test, per_patient=1):
    """Every case list has these cases only."""
    split = Split("few", 0, 1, tuple(train), tuple(test), "0" * 64, per_patient)
    monkeypatch.setattr(data_prep, "load_split", lambda *rest: split)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cases", "words", "scan"), [
    ("LA", ["06SR5RBREL16DQ6M8LWS"], "--recipe clean --patch [64,64,80] --stride [64,64,80]", "**/lgemri.nrrd"),
    ("ACDC", ["patient001_frame01", "patient001_frame02"], "--protocol slices --patch [64,64] --stride [64,64]",
     "**/*_frame12.nii.gz"),
], ids=["LA", "ACDC"])
def test_real_scans_of_an_archive(tmp_path, monkeypatch, name, cases, words, scan):
    raw, words = real("real", name), words.split()
    store = store_of(name, raw, tmp_path / "data", "paper" if "slices" in words else "clean")
    assert stored(store) == cases
    few(monkeypatch, cases, cases, len(cases))
    record = train(tmp_path, "--dataset", name, "--data-root", tmp_path / "data", "--labeled", "1", *words)
    [source] = raw.glob(scan)
    check_prediction(record, tmp_path, source, tmp_path / "predicted", *words[-2:] * (name == "LA"))


@pytest.mark.slow
def test_real_scans_of_ones_own(tmp_path):
    raw, table = real("real", "nrrd", "data"), tmp_path / "cases.csv"
    rows = [f"brain{n},{raw}/brain{n}_image.nrrd,{raw}/brain{n}_label.nrrd\n" for n in (1, 2)]
    table.write_text("id,image,label\n" + "".join(rows))
    store = store_of("brains", table, tmp_path / "data")
    window = "--patch [64,64,16] --stride [64,64,16]".split()
    record = train(tmp_path, "--dataset", store, "--labeled", "1", *window)
    check_prediction(record, tmp_path, raw / "brain2_image.nrrd", tmp_path / "predicted", *window[2:])


@pytest.mark.slow
def test_the_published_scans_themselves(tmp_path, monkeypatch):
    """Imported, they give the batches that they give as they are."""
    source = importlib.util.spec_from_file_location("shared_scans", real("scans.py"))
    scans = importlib.util.module_from_spec(source)
    source.loader.exec_module(scans)
    cases = data_prep.load_split("LA-paper", 0).train[:2]
    for case in cases:
        volumes.write_case(tmp_path / "h5" / case / "mri_norm2.h5", *scans.unpack(real("la", f"{case}.npz")))
    store = store_of("LA", tmp_path / "h5", tmp_path / "data", "paper", "--from-h5")
    few(monkeypatch, cases, cases)
    check_batches(tmp_path / "h5", store, "paper", 1, (112, 112, 80))
    check_batches(tmp_path / "h5", store, "lite", 1, (64, 64, 32))
