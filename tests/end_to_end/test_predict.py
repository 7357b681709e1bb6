"""From the archive to a segmentation on the scanner's own grid: prepare, train three steps, predict, export."""

import json
import runpy
from pathlib import Path

import commands
import nibabel as nib
import numpy as np
import pytest
import torch
from archives import acdc, brats, isles2022, la, pancreas, promise12
from commands import ROOT

import data_prep
from data_prep import prepare
from data_prep.geometry import labels_to_scanner, to_scanner
from data_prep.scans import read_scan
from data_prep.spec import Split
from data_prep.store import find, read_stored
from ssl4mis import config, evaluator
from ssl4mis.predict import load, predict
from ssl4mis.run import run

SMALL = "--width 2 --iterations 3 --labeled_batch 2 --device cpu --precision 32-true"


def on_scanner(model, path):
    """What the evaluation makes of a stored case, brought to the scanner's grid by the geometry that is stored with it.

    Class map and probabilities, which a run by slices does not have.
    """
    image, _, geometry = read_stored(path)
    wanted = [read_modalities(path).index(name) for name in model.channels]
    image, stride = np.ascontiguousarray(image[wanted]), [side // 2 for side in model.patch]
    if model.slices:
        labels = evaluator.segment_slices(model.predict, image, model.patch, model.device).numpy()
        return to_scanner(labels, geometry), None
    found = evaluator.probabilities(model.predict, image, model.patch, stride, model.device).numpy()
    return labels_to_scanner(found, geometry), to_scanner(found, geometry, 1, [1.0] + [0.0] * (len(found) - 1))


def read_modalities(path):
    import h5py

    with h5py.File(path) as file:
        return [name if isinstance(name, str) else name.decode() for name in file.attrs["modalities"]]


# data set, its archive, settings of the run, recipe, and the scan of the last test case as a user gives it
SETS = {
    "LA": (la, "--patch [16,16,16] --stride [16,16,16] --recipe clean", "clean", "**/{}/lgemri.nrrd"),
    "Pancreas": (pancreas, "--patch [16,16,16] --stride [16,16,16] --recipe clean", "clean", "**/{}"),
    "ACDC slices": (acdc, "--protocol slices --patch [32,32] --stride [32,32]", "paper", "**/{}/*_frame04.nii.gz"),
    "ACDC volumes": (acdc, "--protocol volumes --patch [32,32,16] --stride [32,32,16]", "paper",
                     "**/{}/*_frame04.nii.gz"),
    "BraTS FLAIR": (brats, "--protocol paper --network vnet --patch [16,16,16] --stride [16,16,16]", "paper", "**/{}"),
    "BraTS regions": (brats, "--protocol regions --network vnet --patch [16,16,16] --stride [16,16,16] --recipe clean",
                      "clean", "**/{}"),
    "PROMISE12": (promise12, "--patch [32,32,16] --stride [32,32,16]", "clean", "**/{}.mhd"),
    "ISLES2022": (isles2022, "--patch [32,32,32] --stride [32,32,32]", "clean", "*/{}"),
}


@pytest.mark.parametrize("key", SETS)
def test_from_the_archive_and_back(tmp_path, monkeypatch, key):
    archive, settings, recipe, scan = SETS[key]
    name = key.split()[0]
    spec = data_prep.dataset(name)
    protocol = settings.split("--protocol ")[1].split()[0] if "--protocol" in settings else next(iter(spec.protocols))
    whole = data_prep.load_split(spec.protocols[protocol].split, 0)
    count = 2 * whole.per_patient
    train, test = whole.train[:count], whole.test[: whole.per_patient]
    patients = list(dict.fromkeys(case.split("_frame")[0] for case in (*train, *test)))
    archive.build(tmp_path / "raw", patients)
    words = [name, "--raw", tmp_path / "raw", "--out", tmp_path / "data", "--recipe", recipe, "--workers", "1"]
    assert prepare.main(list(map(str, words))) == 0
    few = Split("few", 0, 1, train, test, "0" * 64, whole.per_patient)
    monkeypatch.setattr(data_prep, "load_split", lambda *rest: few)
    line = f"--method supervised --dataset {name} --labeled 1 --data_root {tmp_path / 'data'} --out {tmp_path} {SMALL}"
    [spec], options = config.parse(f"{line} {settings}".split())
    run(spec, options, say=lambda text: None)

    [source] = (tmp_path / "raw").glob(scan.format(patients[-1]))
    said = []
    model = load(spec.id, tmp_path, torch.device("cpu"), say=said.append)
    assert model.recipe.id == f"{name}-{recipe}-1"
    assert predict(spec.id, [source], tmp_path / "out", results=tmp_path, probabilities=not model.slices,
                   say=said.append) == [], said
    stored = find(tmp_path / "data", name, recipe) / "cases" / f"{test[-1]}.h5"
    labels, likely = on_scanner(model, stored)
    [result] = (tmp_path / "out").glob("*_seg*")
    found, geometry = read_scan(result, contrast=False), read_stored(stored).geometry
    assert found.space == geometry.shape and np.allclose(found.affine, geometry.affine, atol=1e-4)
    assert np.array_equal(found.voxels, labels)
    if likely is not None:
        [result] = (tmp_path / "out").glob("*_prob*")
        found = read_scan(result, channels=True)
        assert found.voxels.shape == (len(model.classes), *geometry.shape) and likely.std() > 1e-3
        assert np.allclose(found.voxels, likely, atol=1e-6) and np.allclose(found.affine, geometry.affine, atol=1e-4)


# --- own data by the commands alone


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Ten oblique scans with thick slices in nnU-Net's layout, prepared, and a run on them: all by command line."""
    place = tmp_path_factory.mktemp("own")
    raw = place / "raw"
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    cases = [f"case_{number}" for number in range(10)]
    for case in cases:
        image, label = la.anatomy(case, (40, 36, 20))
        for folder, end, array in (("imagesTr", "_0000", image), ("labelsTr", "", label // 255)):
            nib.save(nib.Nifti1Image(array.astype(np.int16), AFFINE), raw / folder / f"{case}{end}.nii.gz")
    (raw / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "MRI"}, "labels": {"background": 0, "organ": 1}, "numTraining": 10,
        "file_ending": ".nii.gz"}))
    command("-m", "data_prep.prepare", "mine", "--raw", raw, "--out", place / "data")
    command("benchmarks/run.py", "--method", "ua_mt", "--dataset", place / "data" / "mine", "--fold", "0", "--labeled",
            "2", "--patch", "[16,16,16]", "--stride", "[16,16,16]", "--out", place, *SMALL.split())
    return place


COS, SIN = np.cos(0.4), np.sin(0.4)
AFFINE = np.array([[-COS, 0, 2.5 * SIN, -20], [0, -1.2, 0, 30], [SIN, 0, 2.5 * COS, 5], [0, 0, 0, 1]])


def command(*words, expected=0):
    done = commands.command(*words)
    assert done.returncode == expected, done.stderr
    return done


def test_own_data_by_command(own, tmp_path):
    scans = own / "raw" / "imagesTr"
    done = command("benchmarks/predict.py", "--run", "mine", "--results", own, "--input", scans / "case_3_0000.nii.gz",
                   "--output", tmp_path, "--probabilities", "--preview", "--device", "cpu")
    assert done.stderr == "" and "recipe mine-clean-1" in done.stdout
    source, found = nib.load(scans / "case_3_0000.nii.gz"), nib.load(tmp_path / "case_3_0000_seg.nii.gz")
    assert found.shape == source.shape and np.array_equal(found.affine, source.affine)
    likely = nib.load(tmp_path / "case_3_0000_prob.nii.gz").get_fdata()
    assert np.array_equal(likely.argmax(-1), np.asanyarray(found.dataobj))
    assert (tmp_path / "case_3_0000_preview.png").stat().st_size > 10_000


def here(capsys, file, *words):
    """Exit status, output and errors of a command run in this process, which has loaded torch already."""
    try:
        status = runpy.run_path(str(ROOT / "benchmarks" / file))["main"](list(map(str, words)))
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_an_exported_model_needs_neither_run_nor_data(own, tmp_path, capsys):
    status, out, _ = here(capsys, "export.py", "--run", "mine", "--results", own, "--output", tmp_path)
    folder = Path(out.strip())
    assert status == 0 and sorted(path.name for path in folder.iterdir()) == ["card.json", "model.safetensors"]
    scan = own / "raw" / "imagesTr" / "case_4_0000.nii.gz"
    for run_, results, part in (("mine", own, "one"), (folder, tmp_path / "none", "two")):
        assert here(capsys, "predict.py", "--run", run_, "--results", results, "--input", scan, "--output",
                    tmp_path / part, "--device", "cpu")[0] == 0
    assert len({(tmp_path / part / "case_4_0000_seg.nii.gz").read_bytes() for part in ("one", "two")}) == 1


def test_bad_scans_and_bad_words(own, tmp_path, capsys):
    scans = tmp_path / "scans"
    scans.mkdir()
    (scans / "a.nii.gz").write_bytes((own / "raw" / "imagesTr" / "case_0_0000.nii.gz").read_bytes())
    (scans / "b.nii.gz").write_bytes((scans / "a.nii.gz").read_bytes()[:5000])
    words = ("predict.py", "--results", own, "--output", tmp_path / "out", "--input")
    status, _, errors = here(capsys, *words, scans, "--run", "mine")
    assert status == 1 and errors.splitlines()[0] == "scans that could not be segmented: 1"
    assert str(scans / "b.nii.gz") in errors and errors.count("\n") == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_seg.nii.gz", "predictions.json"]
    for line, more in (("b.nii.gz: truncated", (scans / "b.nii.gz", "--run", "mine")),
                       ("did you mean mine-cv5", (scans, "--run", "mien")),
                       ("did you mean stride?", (scans, "--run", "mine", "--strde", "[8,8,8]")),
                       ("stride x: expected list", (scans, "--run", "mine", "--stride", "x")),
                       ("no model, expected a run's folder", (scans, "--run", scans)),
                       ("no such file or folder", (scans / "c.nii", "--run", "mine"))):
        status, out, errors = here(capsys, *words, *more)
        assert status == 2 and errors.startswith("predict.py: error: ") and errors.count("\n") == 1, errors
        assert line in errors and "error" not in out
    status, _, errors = here(capsys, "export.py", "--run", "mien", "--results", own, "--output", tmp_path)
    assert status == 2 and errors.startswith("export.py: error: run 'mien' is not known") and errors.count("\n") == 1


@pytest.mark.parametrize("file", ["predict.py", "export.py"])
def test_help_needs_no_torch(file):
    spy = "import runpy, sys; sys.argv = sys.argv[1:]\n" \
          "try: runpy.run_path(sys.argv[0], run_name='__main__')\n" \
          "except SystemExit: print('torch' in sys.modules)"
    done = command("-c", spy, f"benchmarks/{file}", "--help")
    assert "--run" in done.stdout and done.stdout.endswith("False\n")
