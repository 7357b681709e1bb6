"""From the folder of a run to a card and tensors, and back."""

import hashlib
import json
import os
import shutil
import struct

import pytest
import torch
from safetensors import safe_open

import data_prep
from data_prep.la import RECIPES
from ssl4mis import checkpoint, config, export, records, selection
from ssl4mis.checkpoint import LATEST
from ssl4mis.config import RunOptions
from ssl4mis.errors import UserError
from ssl4mis.export import CARD, WEIGHTS
from ssl4mis.run import keep_description, run

SMALL = "--width 2 --patch [16,16,16] --stride [16,16,16] --iterations 2 --labeled 2 --precision 32-true"


def settings(text):
    """The RunSpec of a command line."""
    return config.parse(text.split())[0][0]


def fake_run(results, text, tensors=None, done=2, data=None):
    """The folder of a run that never took place, with one or any tensors."""
    spec = settings(text)
    folder = results / "runs" / spec.id
    if data is None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(spec.stated))
    else:
        keep_description(folder, spec, data)
    if done is not None:
        checkpoint.save(folder, {"method": tensors or {"weight": torch.arange(6.0)}, "done": done})
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Results of a short run on phantoms."""
    results = tmp_path_factory.mktemp("trained")
    spec = settings(f"--method supervised --dataset phantom {SMALL} --stride [16,16,16]")
    run(spec, RunOptions(device="cpu", out=results), say=lambda text: None)
    return results, spec.id


@pytest.fixture
def quiet(capsys):
    yield
    assert capsys.readouterr().out == ""


def error_of(call, *words):
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message, message
    for word in words:
        assert str(word) in message, (word, message)


# --- what is written


def test_every_tensor_of_the_method_is_in_the_file(trained, tmp_path, quiet):
    results, name = trained
    folder = export.export(name, results, tmp_path)
    assert folder == tmp_path / name and sorted(p.name for p in folder.iterdir()) == [CARD, WEIGHTS]
    expected = checkpoint.read(results / "runs" / name / LATEST)["method"]
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert set(file.keys()) == set(expected)
        for key, tensor in expected.items():
            found = file.get_tensor(key)
            assert found.dtype == tensor.dtype and torch.equal(found, tensor), key


def test_the_card_of_a_run(trained, tmp_path, quiet):
    results, name = trained
    folder = export.export(name, results, tmp_path)
    card, record = json.loads((folder / CARD).read_text()), records.read(results / "records" / f"{name}.json")
    data = (folder / WEIGHTS).read_bytes()
    assert (folder / CARD).read_text().endswith("}\n")
    assert card["id"] == name and card["spec"] == record["spec"] and card["code"] == record["code"]
    assert card["task"] == {"classes": ["background", "chamber", "vessels"], "dims": 3, "channels": ["image"],
                            "targets": {"chamber": [1], "vessels": [2]}, "slices": False}
    assert card["input"] == {"replay": None, "spacing": [1.25, 1.25, 2.5], "spacing_known": True, "downsample": 1}
    assert card["training"] == {"iterations": 2, "of": 2, "precision": "32-true"}
    assert card["data"]["split"] == {"name": "phantom-demo", "fold": 0, "folds": 1,
                                     "sha256": data_prep.load_split("phantom-demo", 0).sha256}
    assert card["scores"] == selection.run_scores(record)
    assert card["method"]["title"].startswith("Supervised") and "Apache-2.0" in card["license"]
    assert card["weights"]["sha256"] == hashlib.sha256(data).hexdigest()
    assert export.run_spec(card).id == name


def test_the_paper_and_the_data_are_cited(tmp_path, capsys):
    fake_run(tmp_path, f"--method ua_mt --dataset LA --protocol lite {SMALL}")
    card, _ = export.read("LA", tmp_path)
    assert card["method"]["title"].startswith("UA-MT") and "arXiv 1907.07034" in card["method"]["paper"]
    assert "Xiong" in card["citation"] and "no record" in capsys.readouterr().out
    assert card["scores"] is None and "split" not in card["data"]


def test_the_same_run_gives_the_same_bytes(trained, tmp_path, quiet):
    results, name = trained
    one, two = (export.export(name, results, tmp_path / part) for part in "ab")
    again = export.export(name, results, tmp_path / "a")
    for file in (CARD, WEIGHTS):
        assert (one / file).read_bytes() == (two / file).read_bytes() == (again / file).read_bytes()


def test_tensors_of_any_kind_survive(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"whole": base, "view": base[1:3], "same": base, "turned": base.T, "count": torch.tensor(7),
               "mask": torch.tensor([True, False]), "half": base.to(torch.bfloat16), "empty": torch.empty(0, 3),
               "last": torch.rand(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d)}
    fake_run(tmp_path, f"--method supervised --dataset phantom {SMALL}", tensors)
    folder = export.export("phantom", tmp_path, tmp_path / "out", say=lambda text: None)
    card, found = export.read(str(folder), tmp_path)
    assert set(found) == set(tensors) and card["weights"]["tensors"] == 9
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    found["whole"][0, 0] = -1
    assert found["same"][0, 0] == 0


def test_nothing_is_unpickled(trained, tmp_path, monkeypatch, quiet):
    folder = export.export(trained[1], trained[0], tmp_path)
    size = struct.unpack("<Q", (folder / WEIGHTS).read_bytes()[:8])[0]
    json.loads((folder / WEIGHTS).read_bytes()[8 : 8 + size])
    monkeypatch.setattr(torch, "load", lambda *rest, **more: pytest.fail("torch.load"))
    assert export.read(str(folder), tmp_path)[1]


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    folder = fake_run(tmp_path, f"--method supervised --dataset phantom {SMALL}")
    checkpoint.save(folder, {"method": Evil(), "done": 2})
    (folder / checkpoint.PREVIOUS).unlink()
    error_of(lambda: export.read("phantom", tmp_path), folder, "holds more than tensors and plain values")
    assert not (tmp_path / "evil").exists()


# --- which run


def test_a_run_by_id_beginning_or_path(trained, quiet):
    results, name = trained
    folder = results / "runs" / name
    for word in (name, name[:-3], "phantom", str(folder)):
        assert export.find(word, results) == folder


def test_one_run_may_begin_as_another(tmp_path):
    folder = fake_run(tmp_path, f"--method supervised --dataset phantom {SMALL}")
    longer = folder.with_name(folder.name + "0")
    shutil.copytree(folder, longer)
    assert export.find(folder.name, tmp_path) == folder and export.find(longer.name, tmp_path) == longer
    error_of(lambda: export.find("phantom", tmp_path), "'phantom'", "2 runs begin so", longer.name)


def test_where_only_the_record_is(trained, tmp_path):
    results, name = trained
    shutil.copytree(results / "records", tmp_path / "records")
    error_of(lambda: export.find("phantom", tmp_path), name, "only its record is in", "expected its last checkpoint in",
             tmp_path / "runs" / name)
    error_of(lambda: export.find(name.replace("vnet", "vnte"), tmp_path), f"did you mean {name}?")
    error_of(lambda: export.find("x", tmp_path / "elsewhere"), "no runs in", "--results")


def test_a_folder_that_is_no_model(tmp_path):
    error_of(lambda: export.find(str(tmp_path), tmp_path), f"{tmp_path}: no model", "expected a run's folder")


def test_a_folder_of_the_same_name_is_in_nobodys_way(trained, tmp_path, monkeypatch):
    (tmp_path / "phantom").mkdir()
    monkeypatch.chdir(tmp_path)
    assert export.find("phantom", trained[0]).name == trained[1]
    monkeypatch.chdir(trained[0] / "runs" / trained[1])
    assert export.read(".", tmp_path, lambda text: None)[0]["scores"]


def test_a_record_that_is_none(tmp_path):
    folder = fake_run(tmp_path, f"--method supervised --dataset phantom {SMALL}")
    path = tmp_path / "records" / f"{folder.name}.json"
    path.parent.mkdir()
    path.write_text("{}")
    error_of(lambda: export.read("phantom", tmp_path), path, "expected")


# --- what a run's folder holds


def test_a_run_that_did_not_end(tmp_path):
    said = []
    fake_run(tmp_path, f"--method supervised --dataset phantom {SMALL}", done=1)
    card, _ = export.read("phantom", tmp_path, said.append)
    assert card["training"]["iterations"] == 1 and len(said) == 1 and "unfinished: iteration 1 of 2" in said[0]


def test_without_a_checkpoint(tmp_path):
    folder = fake_run(tmp_path, f"--method supervised --dataset phantom {SMALL}", done=None)
    error_of(lambda: export.read("phantom", tmp_path), folder, f"no checkpoint, expected {LATEST}")


def test_a_damaged_checkpoint(tmp_path):
    folder = fake_run(tmp_path, f"--method supervised --dataset phantom {SMALL}")
    (folder / LATEST).write_bytes((folder / LATEST).read_bytes()[:-5])
    error_of(lambda: export.read("phantom", tmp_path, lambda text: None), folder / LATEST, "damaged")


@pytest.mark.parametrize(("text", "expected"), [
    ("{", "expected a JSON file"), ("[]", "expected a JSON object"),
    ('{"method": "supervised", "tomorrow": 1}', "not the settings of a run of this version"),
])
def test_settings_that_are_none(tmp_path, text, expected):
    folder = fake_run(tmp_path, f"--method supervised --dataset phantom {SMALL}")
    (folder / "config.json").write_text(text)
    error_of(lambda: export.read(str(folder), tmp_path), folder / "config.json", expected)


DATA = {"recipe": "LA-clean-1", "sha256": "ab" * 32, "replay": RECIPES["clean"].to_dict(), "modalities": ["LGE-MRI"],
        "classes": ["background", "left atrium"], "targets": {"left atrium": [1]}, "slices": False, "downsample": 1,
        "spacing": [0.5, 0.5, 2.0], "spacing_known": False}


def test_what_the_run_tells_of_its_data_counts(tmp_path):
    fake_run(tmp_path, f"--method supervised --dataset LA --protocol lite {SMALL}", data=DATA)
    card, _ = export.read("LA", tmp_path, lambda text: None)
    assert card["input"] == {"replay": DATA["replay"], "spacing": [0.5, 0.5, 2.0], "spacing_known": False,
                             "downsample": 1}
    assert card["data"]["recipe"] == "LA-clean-1" and card["data"]["sha256"] == "ab" * 32


@pytest.mark.parametrize("data", [None, {"replay": None}])
def test_a_run_older_than_data_json(tmp_path, data):
    """It was trained on the published files, which `paper` describes."""
    fake_run(tmp_path, f"--method supervised --dataset LA --protocol lite {SMALL}", data=data)
    card, _ = export.read("LA", tmp_path, lambda text: None)
    assert card["input"] == {"replay": RECIPES["paper"].to_dict(), "spacing": [1.25] * 3, "spacing_known": True,
                             "downsample": 2}
    assert card["task"]["classes"] == ["background", "left atrium"] and len(card["task"]["channels"]) == 1


def test_a_run_older_than_data_json_with_another_recipe_or_in_slices(tmp_path):
    for text in ("--dataset LA --recipe clean", "--dataset ACDC --protocol slices --patch [16,16] --stride [16,16]"):
        fake_run(tmp_path, f"--method supervised {SMALL} {text}")
    card, _ = export.read("LA", tmp_path, lambda text: None)
    assert card["input"]["replay"] == RECIPES["clean"].to_dict()
    card, _ = export.read("ACDC", tmp_path, lambda text: None)
    assert card["task"]["slices"] and card["task"]["dims"] == 2 and card["input"]["spacing"] == [1.5625, 1.5625]


def test_own_data_is_what_its_data_json_says(tmp_path):
    folder = fake_run(tmp_path, f"--method supervised --dataset LA --protocol lite {SMALL}", data=DATA)
    spec = json.loads((folder / "config.json").read_text()) | {"dataset": "mine", "protocol": "cv5"}
    (folder / "config.json").write_text(json.dumps(spec))
    card, _ = export.read(str(folder), tmp_path, lambda text: None)
    assert card["spec"]["dataset"] == "mine" and card["input"]["spacing"] == [0.5, 0.5, 2.0]
    (folder / "data.json").unlink()
    error_of(lambda: export.read(str(folder), tmp_path), folder / "data.json", "tells nothing of classes, modalities")


# --- an exported model


@pytest.fixture
def exported(trained, tmp_path):
    return export.export(trained[1], trained[0], tmp_path / "exported", say=lambda text: None)


@pytest.mark.parametrize(("what", "expected"), [
    ("cut", "damaged or of another export"), ("missing", "cannot be read"), ("other", "damaged or of another export"),
])
def test_tensors_that_are_not_those_of_the_card(exported, what, expected):
    path = exported / WEIGHTS
    if what == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif what == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"\x42")
    error_of(lambda: export.read(str(exported), exported), path, expected)


@pytest.mark.parametrize("text", ["{}", '{"schema": 2}', '{"schema": 1, "id": "x"}'])
def test_a_card_that_is_none(exported, text):
    (exported / CARD).write_text(text)
    error_of(lambda: export.read(str(exported), exported), exported / CARD, "expected the card of an export")


def test_half_an_export_is_none(trained, tmp_path, monkeypatch):
    def killed(path, write=export.whole_file):
        return write(path) if path.name == WEIGHTS else pytest.fail("killed")

    monkeypatch.setattr(export, "whole_file", killed)
    with pytest.raises(pytest.fail.Exception):
        export.export(trained[1], trained[0], tmp_path)
    folder = tmp_path / trained[1]
    assert [path.name for path in folder.iterdir()] == [WEIGHTS]
    error_of(lambda: export.find(str(folder), tmp_path), "no model")
