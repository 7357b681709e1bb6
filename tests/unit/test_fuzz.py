"""Every reader on what no careful user would give it: a valid object, or the reader's own error in one line.

SSL4MIS_FUZZ sets the number of examples of each test; by default they are few and the same every time.
"""

import io
import json
import os
import random
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.making import make_peek, make_record

import data_prep
from data_prep import scans, store, volumes
from data_prep.geometry import Geometry
from data_prep.recipes import Stored
from data_prep.spec import DataError, ids_sha256
from ssl4mis import checkpoint, config, export, leaderboard, peeks, records, selection, suites
from ssl4mis.errors import UserError
from ssl4mis.progress import Reporter

ASKED = int(os.environ.get("SSL4MIS_FUZZ", 0))
few = settings(max_examples=ASKED or 60, derandomize=not ASKED, database=None, deadline=timedelta(seconds=20),
               suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**32 - 1)
ODD = (None, True, False, 0, -1, 2, 1.5, -0.0, 1e308, 10**400, float("nan"), float("inf"), "", "x", "\ud800", "é\n\0",
       "../../x", "/etc/passwd", "1e999", "9" * 5000, [], {}, [[]], {"": None}, [1, "a", None], "x" * 300, 2**70)


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(data, rng):
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if raw:
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(raw)


def cut(data, rng):
    return data[:rng.randrange(len(data) + 1)]


def tail(data, rng):
    return data[rng.randrange(len(data) + 1):]


def drop(data, rng):
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.randrange(64):]


def insert(data, rng):
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.randbytes(rng.randrange(1, 20)) + data[start:]


def repeat(data, rng):
    start = rng.randrange(len(data) + 1)
    return data[:start] + 3 * data[start:start + rng.randrange(200)] + data[start:]


def blank(data, rng):
    start = rng.randrange(len(data) + 1)
    size = rng.randrange(1, 40)
    return data[:start] + bytes([rng.choice((0, 255))]) * len(data[start:start + size]) + data[start + size:]


def noise(data, rng):
    return rng.randbytes(rng.randrange(300))


def nothing(data, rng):
    return b""


def encode(data, rng):
    text = data.decode("latin-1")
    return rng.choice((text.encode("utf-16"), b"\xef\xbb\xbf" + data, text.encode("utf-8") + b"\xff"))


def number(data, rng):
    """Another number or word in place of one."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?|true|false|null|\w+", data[:20000]))
    if not found:
        return data
    place = rng.choice(found)
    other = rng.choice((b"NaN", b"-Infinity", b"1e999", b"-1", b"0", b"9" * 30, b"9" * 5000, b"null", b"true", b'"a"',
                        b"1_0", b"0x10", b"\xc3\x28", b"[]", b"{}", b"99999999", b"-0.0"))
    return data[:place.start()] + other + data[place.end():]


def deep(data, rng):
    return rng.choice((b"[" * 100_000, b'{"a":' * 20_000, b"[" * 300 + b"]" * 300,
                       data.replace(b":", b":" + b"[" * 900 + b"]" * 900 + b",", 1)))


DAMAGES = (flip, flip, flip, cut, tail, drop, insert, repeat, blank, noise, nothing, encode, number, number, deep)


def damaged(data: bytes, seed: int) -> bytes:
    rng = random.Random(seed)
    for _ in range(rng.choice((1, 1, 1, 2))):
        data = rng.choice(DAMAGES)(data, rng)
    return data


def twisted(value, seed: int):
    """The same JSON value with one part of it, at any depth, of another type, gone or under another name."""
    rng, value = random.Random(seed), json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2))):
        part = value
        while isinstance(part, dict | list) and part:
            key = rng.choice(list(part) if isinstance(part, dict) else range(len(part)))
            if not isinstance(part[key], dict | list) or not part[key] or rng.random() < 0.3:
                if rng.random() < 0.2:
                    del part[key]
                else:
                    part[key] = rng.choice(ODD)
                break
            part = part[key]
    return value


def one_of_both(value, seed: int) -> bytes:
    """JSON with a twist, or its text with damage."""
    if seed % 2:
        return json.dumps(twisted(value, seed)).encode()
    return damaged(json.dumps(value, indent=1).encode(), seed)


def obeys(read, *errors):
    """What a reader returns, None where it raised one of its own errors in one line; any other exception fails."""
    try:
        return read()
    except errors as error:
        assert str(error) and "\n" not in str(error), repr(str(error))[:500]
        assert type(error) is not UnicodeEncodeError
    return None


def command(words) -> int:
    """Exit status 0 or 2 of a command line; more than one line on stderr fails."""
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        try:
            config.parse(list(map(str, words)))
        except SystemExit as stop:
            assert stop.code in (0, 2)
            assert stop.code == 0 or said.getvalue().count("\n") == 1, said.getvalue()
            return stop.code
    return 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# --- JSON, CSV and text ----------------------------------------------------------------------------------------------

RECORD = make_record("ua_mt", cases=2, calibration=True, curve=[{"done": 1, "terms": {"a": 1.0}, "watch": {"b": None}}])


@few
@given(seed=seeds)
def test_records(place, seed):
    path = put(place / "records" / f"{RECORD['id']}.json", one_of_both(RECORD, seed))
    found = obeys(lambda: records.read(path), UserError)
    if found:  # what is read can be written again, scored and put into the table
        selection.run_scores(found)
        obeys(lambda: leaderboard.to_csv(leaderboard.rows([found])).encode(), ValueError)
        assert records.write(found, place / "again").exists()
        shutil.rmtree(place / "again")


@few
@given(seed=seeds)
def test_peeks(place, seed):
    path = put(place / "peeks" / f"{RECORD['id']}.json", one_of_both(make_peek(RECORD), seed))
    obeys(lambda: peeks.read(path), UserError)


SPLIT = {"name": "tiny", "folds": [
    {part: cases, f"sha256_{part}": ids_sha256(cases)} | {"test": ["z"], "sha256_test": ids_sha256(["z"])}
    for part, cases in (("train", ["a", "b"]), ("train", ["b", "c"]))]}


@few
@given(seed=seeds, fold=st.sampled_from([0, 1, -1, 2, "0", None]))
def test_splits(place, seed, fold):
    put(place / "splits" / "tiny.json", one_of_both(SPLIT, seed))
    found = obeys(lambda: data_prep.load_split("tiny", fold, place / "splits"), DataError)
    for case in (*found.train, *found.test) if found else ():
        assert (place / case).resolve().parent == place.resolve()


@few
@given(seed=seeds)
def test_published_numbers(place, seed):
    text = ",".join(leaderboard.REPORTED) + "\n"
    row = dict.fromkeys(leaderboard.REPORTED, "x") | {"labeled": "16", "unlabeled": "64", "dice": "90.1",
                                                       "jaccard": "82", "hd95": "", "asd": "1.5"}
    text += (",".join(row.values()) + "\n") * 2
    path = put(place / "reported.csv", damaged(text.encode(), seed))
    obeys(lambda: leaderboard.read_reported(path), ValueError)


@few
@given(seed=seeds)
def test_events_of_a_crashed_run(place, seed):
    lines = "".join(json.dumps({"done": n, "terms": {"a": 1.0}}) + "\n" for n in range(5))
    path = put(place / "events.jsonl", damaged(lines.encode(), seed))
    kept = Reporter(path, 9, "test").rewind(3)
    assert all(event["done"] <= 3 for event in kept)
    assert [json.loads(line) for line in path.read_text().splitlines()] == kept


@few
@given(seed=seeds)
def test_cards_of_data_sets(place, seed):
    shape = Geometry((4, 4, 4), tuple(map(tuple, np.eye(4).tolist())), (0, 1, 2), (False,) * 3, ((0, 4),) * 3,
                     (4, 4, 4))
    card = {"schema": 1, "name": "mine", "title": "t", "modality": "MRI", "modalities": ["a"], "classes": ["b", "o"],
            "regions": {}, "citation": "", "source": "", "spacing": [1.0, 1.0, 1.0], "spacing_known": True,
            "label_guided": False, "recipe": recipe(), "replay": recipe(), "protocols": {"cv5": PROTOCOL}}
    assert shape.stored == (4, 4, 4)
    put(place / "card" / store.CARD, one_of_both(card, seed))
    obeys(lambda: store.spec_of(place / "card"), DataError)


def recipe() -> dict:
    return data_prep.module("LA").RECIPES["clean"].to_dict()


PROTOCOL = {"name": "cv5", "about": "x", "split": "mine-cv5", "patch": [8, 8, 8], "stride": [4, 4, 4],
            "iterations": 10, "labeled": [1]}


# --- scans and tensors -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def h5_files(place):
    image = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    label = (image > 0).astype(np.uint8)
    volumes.write_case(place / "packed.h5", image, label)
    volumes.write_h5(place / "plain.h5", {"image": image, "label": label})
    shape = Geometry((5, 6, 7), tuple(map(tuple, np.eye(4).tolist())), (0, 1, 2), (False,) * 3,
                     ((0, 5), (0, 6), (0, 7)), (5, 6, 7))
    store.write_stored(place / "stored.h5", Stored(image[None], label, shape), "LA-clean-1", ["mri"])
    return [(place / name).read_bytes() for name in ("packed.h5", "plain.h5", "stored.h5")]


@few
@given(seed=seeds)
def test_h5_cases(place, h5_files, seed):
    path = put(place / "case.h5", damaged(h5_files[seed % 3], seed // 3))
    image = obeys(lambda: volumes.read_image(path), DataError)
    assert image is None or image.dtype == np.float32 and np.isfinite(image).all()
    label = obeys(lambda: volumes.read_label(path, 2), DataError)
    assert label is None or label.max() < 2
    obeys(lambda: store.read_stored(path), DataError)
    volumes._cache_read(path, {}, "image")


@pytest.mark.parametrize("kind", [KeyError, OSError, RuntimeError, TypeError, UnicodeDecodeError, ValueError])
def test_what_h5py_raises_for_one_flipped_bit(place, h5_files, kind):
    error = kind("utf-8", b"\xff", 0, 1, "why") if kind is UnicodeDecodeError else kind("why")
    path = put(place / "flipped.h5", h5_files[0])
    with pytest.raises(DataError, match=r"flipped\.h5: damaged \(.*why.*\), expected"), volumes.open_h5(path):
        raise error


@pytest.mark.parametrize("text", [b"sizes: 5 6 " + b"7" * 5000, b"type: " + b"x" * 5000])
def test_nrrd_headers_at_which_itk_ends_the_process(place, text):
    path = put(place / "c.nrrd", b"NRRD0004\ntype: float\ndimension: 3\n" + text + b"\nencoding: raw\n\n" + bytes(840))
    with pytest.raises(DataError, match=r"c\.nrrd: a line of the header has 50\d\d characters, expected at most 800"):
        scans.read_scan(path)


@pytest.mark.parametrize("make", [
    lambda file: file.create_dataset("image", shape=(2**20, 2**20, 2**20), chunks=(64, 64, 64), dtype="f4"),
    lambda file: file.create_dataset("image", data=np.array([["a"]], dtype=object), dtype=h5py.string_dtype()),
    lambda file: file.create_dataset("image", data=np.zeros((3, 3, 3), complex)),
    lambda file: file.create_group("image"),
    lambda file: file.__setitem__("image", h5py.SoftLink("/image")),
    lambda file: file.__setitem__("image", h5py.ExternalLink("/nowhere.h5", "/image")),
], ids=["huge", "text", "complex", "group", "loop", "elsewhere"])
def test_h5_that_holds_something_else(place, make):
    with h5py.File(place / "odd.h5", "w") as file:
        make(file)
    for read in (lambda: volumes.read_image(place / "odd.h5"), lambda: volumes.read_label(place / "odd.h5", 2)):
        with pytest.raises(DataError, match=r"odd\.h5") as error:
            read()
        assert "\n" not in str(error.value)


def test_h5_that_holds_less_than_it_says(place):
    """Nothing is allocated: 256 GiB of zeros could be had of some machines, and end others."""
    with h5py.File(place / "huge.h5", "w") as file:
        file.create_dataset("image", shape=(2**12,) * 3, chunks=(64, 64, 64), dtype="f4")[0, 0, 0] = 1
    with pytest.raises(DataError, match=r"shape \(4096, 4096, 4096\) and 1048576 bytes in the file, expected all"):
        volumes.read_image(place / "huge.h5")


@pytest.fixture(scope="module")
def scan_files(place):
    voxels = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    for name in ("a.nii", "a.nii.gz"):
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([2.0, 2.0, 3.0, 1.0])), place / name)
    for name in ("a.nrrd", "a.mha"):
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels), place / name)
    return {name: (place / name).read_bytes() for name in ("a.nii", "a.nii.gz", "a.nrrd", "a.mha")}


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha"])
@few
@given(seed=seeds)
def test_scans(place, scan_files, name, seed):
    # most of a file is voxels, and its header is what can be wrong
    head, rest = scan_files[name][:400], scan_files[name][400:]
    data = damaged(head, seed // 2) + rest if seed % 2 else damaged(head + rest, seed // 2)
    path = put(place / f"b{name[1:]}", data)
    found = obeys(lambda: scans.read_scan(path), DataError)
    assert found is None or found.voxels.ndim == 3 and np.isfinite(found.affine).all()


@few
@given(seed=seeds)
def test_checkpoints(place, seed):
    (place / "run").mkdir(exist_ok=True)
    if not (place / "sound.ckpt").exists():
        checkpoint.save(place / "run", {"run": "r", "method": {"w": torch.ones(3)}, "done": 1})
        shutil.copy(place / "run" / checkpoint.LATEST, place / "sound.ckpt")
    sound = (place / "sound.ckpt").read_bytes()
    put(place / "run" / checkpoint.LATEST, damaged(sound, seed))
    put(place / "run" / checkpoint.PREVIOUS, sound)
    said = []
    assert checkpoint.load(place / "run", said.append, "r")["done"] == 1
    assert len(said) <= 1 and "\n" not in "".join(said)


@few
@given(seed=seeds)
def test_checkpoints_whose_checksum_is_right(place, seed):
    """The checksum keeps nobody from writing another file."""
    buffer = io.BytesIO()
    torch.save({"run": "r", "method": {"w": torch.ones(3)}, "done": 1}, buffer)
    data = damaged(buffer.getvalue(), seed)
    obeys(lambda: checkpoint.read(put(place / "forged.ckpt", checkpoint.sealed(data))), UserError)


CARD = {"schema": export.SCHEMA, "id": "r", "spec": {"method": "ua_mt"}, "task": {"classes": ["b", "o"], "dims": 3,
        "channels": ["mri"], "targets": {"o": [1]}, "slices": False}, "weights": {"sha256": "0" * 64},
        "input": {"replay": None, "spacing": [1.0], "spacing_known": True, "downsample": 1}}  # fmt: skip


@few
@given(seed=seeds)
def test_cards_of_exported_models(place, seed):
    put(place / "model" / export.WEIGHTS, b"")
    put(place / "model" / export.CARD, one_of_both(CARD, seed))
    obeys(lambda: export.read_exported(place / "model"), UserError)


# --- the command line and its files ----------------------------------------------------------------------------------

WORDS = ("--method", "ua_mt", "--dataset", "phantom", "--labeled", "2", "--patch", "[32,32,16]", "--iterations", "5",
         "--fold", "0", "--hp.decay", "0.9", "--learning_rate", "0.1", "--augmentation", "[rotflip]", "--seed", "1",
         "--unlabeled", "50%", "--control", "noise", "--width", "2", "--keep_every", "2")  # fmt: skip
VALUES = ("", " ", "-1", "0", "nan", "-inf", "1e999", "9" * 30, "9" * 5000, "[", "[1,2", "{}", "[[[]]]", "null", "true",
          "é", "\ud800", "a:b", "../../x", "%", "999%", "nan%", "-5%", "all", "--", "-", "=", "!!python/object:os.x",
          "&a [*a]", "[32,32,1.5]", "'", '"', "x\ny", "\0", "*", "a.b:C", "os:system", "other:", "other:phantom",
          "other:/etc", "[rotflip,rotflip]", "[1e999,1,1]", "{a: 1}")  # fmt: skip


@few
@given(seed=seeds)
def test_the_command_line(seed):
    rng, words = random.Random(seed), list(WORDS)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(words))
        match rng.randrange(5):
            case 0:
                del words[at]
            case 1:
                words.insert(at, rng.choice(VALUES))
            case 2:
                words[at] = rng.choice(words)
            case _:
                words[at - at % 2 + 1 if at - at % 2 + 1 < len(words) else at] = rng.choice(VALUES)
    command(words)


@few
@given(seed=seeds)
def test_yaml_files(place, seed):
    rng = random.Random(seed)
    settings = {"method": "ua_mt", "dataset": "phantom", "labeled": 2, "patch": [32, 32, 16], "hp": {"decay": 0.9},
                "seed": 1, "unlabeled": "50%", "learning_rate": 0.1}
    if rng.random() < 0.5:
        data = damaged(yaml.safe_dump(settings).encode(), seed)
    else:
        data = yaml.dump(twisted(settings, seed)).encode("utf-8", "surrogatepass")
    command(["--config", put(place / "run.yaml", data)])


@few
@given(seed=seeds)
def test_suites(place, seed):
    text = ('about = "x"\n[[runs]]\nmethods = ["ua_mt", "supervised"]\ndatasets = ["phantom"]\nlabeled = [2, "20%"]\n'
            'folds = [0]\nseeds = [0, 1]\n[runs.options]\niterations = 5\npatch = [32, 32, 16]\n')  # fmt: skip
    path = put(place / "suite.toml", damaged(text.encode(), seed))
    said = io.StringIO()
    with redirect_stderr(said):
        try:
            suites.read(path)
        except SystemExit as stop:
            assert stop.code == 2 and said.getvalue().count("\n") == 1, said.getvalue()
        except UserError as error:
            assert "\n" not in str(error) and "suite.toml" in str(error)
