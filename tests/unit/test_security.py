"""Attacks: files that would run code, ids that would leave their folders."""

import ast
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from unit.making import make_peek, make_record

import data_prep
from data_prep.spec import DataError, ids_sha256, names_a_file
from ssl4mis import checkpoint, config, export, peeks, records, reproduce, run
from ssl4mis.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("ssl4mis", "networks", "data_prep", "benchmarks")
FILES = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
MODULES = ("pickle", "cPickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "tarfile", "zipfile")
CALLS = ("eval", "exec", "compile", "extractall", "unpack_archive", "full_load", "unsafe_load", "load_all")
WAYS_OUT = ("../x", "/etc/passwd", "a/b", "a\\b", "..", ".", ".hidden", "", "a\nb", "a\0b", "x" * 300, "\ud800", None,
            7)  # fmt: skip


def risky(source: str) -> list[str]:
    """Lines that unpickle, run text, start a shell or unpack an archive blindly."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [f"{node.lineno}: import {name}" for name in names if name.split(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        words = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        name = ast.unparse(node.func)
        bad = {"torch.load": words.get("weights_only") != "True",
               "yaml.load": words.get("Loader") not in ("yaml.SafeLoader", "yaml.CSafeLoader")}.get(name, False)
        bad |= name in CALLS or name.rpartition(".")[2] in CALLS[3:] or name in ("os.system", "os.popen")
        bad |= words.get("allow_pickle") == "True" or words.get("shell", "False") != "False"
        found += [f"{node.lineno}: {name}"] * bad
    return found


def test_nothing_unpickles_or_runs_text():
    found = {path.relative_to(ROOT).as_posix(): risky(path.read_text()) for path in FILES}
    # ssl4mis/export.py names the error of torch.load
    assert {name: lines for name, lines in found.items() if lines} in ({}, {"ssl4mis/export.py": ["11: import pickle"]})
    assert len(found) > 60


@pytest.mark.parametrize("source", [
    "import pickle", "from marshal import loads", "torch.load(f)", "torch.load(f, weights_only=False)", "eval('1')",
    "np.load(f, allow_pickle=True)", "yaml.load(f)", "yaml.load(f, Loader=yaml.Loader)", "yaml.unsafe_load(f)",
    "subprocess.run('x', shell=True)", "tar.extractall(p)", "shutil.unpack_archive(f)", "os.system('x')",
    "import zipfile.x"])
def test_what_would_be_found(source):
    assert risky(source)


@pytest.mark.parametrize("source", [
    "torch.load(f, weights_only=True)", "model.eval()", "re.compile('x')", "torch.compile(f)", "np.load(f)",
    "yaml.safe_load(f)", "yaml.load(f, Loader=yaml.SafeLoader)", "subprocess.run(['x'])"])
def test_what_is_fine(source):
    assert not risky(source)


# --- files that would run code ---------------------------------------------------------------------------------------


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.marker),)


def plain_pickle(evil):
    return pickle.dumps(evil)


def torch_file(evil):
    buffer = io.BytesIO()
    torch.save({"run": "r", "method": evil, "done": 1}, buffer)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("pack", [plain_pickle, torch_file])
def test_checkpoints_run_nothing(pack, tmp_path):
    data = checkpoint.sealed(pack(Evil(tmp_path / "marker")))
    for name in (checkpoint.LATEST, checkpoint.PREVIOUS):
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match="more than tensors and plain values"):
        checkpoint.load(tmp_path, lambda text: None)
    (tmp_path / checkpoint.KEPT).mkdir()
    (tmp_path / checkpoint.KEPT / "000002.ckpt").write_bytes(data)
    with pytest.raises(UserError, match="more than tensors and plain values"):
        run.load_kept(torch.nn.Identity(), checkpoint.kept(tmp_path)[2], "a run")
    assert not (tmp_path / "marker").exists()


def test_exported_tensors_run_nothing(tmp_path):
    import hashlib

    data = plain_pickle(Evil(tmp_path / "marker"))
    (tmp_path / export.WEIGHTS).write_bytes(data)
    card = {"schema": export.SCHEMA, "id": "x", "spec": {}, "task": {}, "input": {},
            "weights": {"sha256": hashlib.sha256(data).hexdigest()}}
    (tmp_path / export.CARD).write_text(json.dumps(card))
    with pytest.raises(Exception, match="(?i)header|safetensors|weights"):
        export.read_exported(tmp_path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
@pytest.mark.parametrize("place", ["seed: {}", "hp: {{decay: {}}}", "{}"])
def test_yaml_runs_nothing(tag, place, tmp_path, capsys):
    marker = tmp_path / "marker"
    (tmp_path / "run.yaml").write_text("method: ua_mt\n" + place.format(f"{tag} ['{marker}']"))
    with pytest.raises(SystemExit) as stop:
        config.parse(["--config", str(tmp_path / "run.yaml")])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    # a value on the command line is YAML, too
    with pytest.raises(SystemExit):
        config.parse(["--method", "ua_mt", "--patch", f"{tag} ['{marker}']"])
    assert not marker.exists()
    yaml.unsafe_load(f"{tag} ['{marker}']")  # the attack works where nothing keeps it out
    assert marker.is_dir()


# --- ids that would leave their folders ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WAYS_OUT)
def test_names_that_name_no_file(name):
    assert not names_a_file(name)


@pytest.mark.parametrize("name", ["a", "case 1", "patient001_frame01", "Fälle-1.2", "BraTS19_2013_0_1", "a..b"])
def test_names_that_do(name, tmp_path):
    assert names_a_file(name)
    (tmp_path / name).write_text("")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("case", WAYS_OUT)
@pytest.mark.parametrize("part", ["train", "test", "extra"])
def test_cases_of_a_split_stay_in_their_folders(case, part, tmp_path):
    lists = {"train": ["a"], "test": ["b"], "extra": ["c"]}
    lists[part] = [case]
    sums = {f"sha256_{name}": ids_sha256([str(case).encode("utf-8", "replace").decode() for case in cases])
            for name, cases in lists.items()}
    (tmp_path / "x.json").write_text(json.dumps({"folds": [lists | sums]}))
    with pytest.raises(DataError, match="ids that can name a file") as error:
        data_prep.load_split("x", 0, tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path / "x.json") in str(error.value)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "."])
def test_the_name_of_a_split_stays_in_its_folder(name, tmp_path):
    (tmp_path / "splits").mkdir()
    for place in (tmp_path / "secret.json", tmp_path / "splits" / "x.json"):
        place.write_text(json.dumps({"folds": [{"train": ["a"], "test": ["b"], "sha256_train": ids_sha256(["a"]),
                                                "sha256_test": ids_sha256(["b"])}]}))
    with pytest.raises(DataError, match="is unknown, expected one of x"):
        data_prep.load_split(name, 0, tmp_path / "splits")


@pytest.mark.parametrize("change", [
    lambda record: record.update(id="../x"), lambda record: record.update(id="/tmp/x"),
    lambda record: record["spec"].update(dataset="../../x"), lambda record: record["spec"].update(protocol="a/b"),
    lambda record: record["split"]["test"].__setitem__(0, "../../x"),
    lambda record: record["split"]["labeled"].__setitem__(0, "/x")],
    ids=["id", "absolute id", "data set", "protocol", "test case", "labeled case"])
def test_ids_of_records_stay_in_their_folders(change, tmp_path):
    record = make_record()
    change(record)
    with pytest.raises(ValueError, match="expected (letters|a name)"):
        records.write(record, tmp_path / "records")
    (tmp_path / "x.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="expected (letters|a name)"):
        records.read(tmp_path / "x.json")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", ".x", ""])
def test_ids_of_peeks_stay_in_their_folder(name, tmp_path):
    found = {entry["iteration"]: entry["cases"] for entry in make_peek(make_record())["checkpoints"]}
    with pytest.raises(ValueError, match="expected letters"):
        peeks.write(tmp_path / "peeks", name, found)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("name", ["../secret", "../records/x", "/etc/passwd", "x/../../secret", "."])
def test_the_record_to_reproduce_is_one_of_the_folder(name, tmp_path):
    records.write(make_record(id="x"), tmp_path / "records")
    (tmp_path / "secret.json").write_text((tmp_path / "records" / "x.json").read_text())
    with pytest.raises(UserError, match="is not in"):
        reproduce.find(name, tmp_path / "records")
