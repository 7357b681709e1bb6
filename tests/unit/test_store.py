"""The stored case and the store: known answers, exact round trips, and one line for everything that does not fit."""

import hashlib
import json
import os
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import h5py
import numpy as np
import pytest

import data_prep
from data_prep import DataError, store, volumes
from data_prep.geometry import Geometry, to_scanner, to_store
from data_prep.recipes import Recipe, Stored
from data_prep.scans import Scan
from data_prep.spec import Protocol

PAPER, CLEAN = (Recipe("Tumors", name, 3, "nothing is done") for name in ("paper", "clean"))
CLASSES = ("background", "edema", "core", "enhancing")
FULL = Protocol("full", "all classes", "cv5", (4, 4, 4), (2, 2, 2), 10, (1, 2))
CARD = {
    "schema": 1, "name": "Tumors", "title": "Tumors of nobody", "modality": "MRI", "modalities": ["t1", "t2", "flair"],
    "classes": list(CLASSES), "regions": {"whole": [1, 2, 3], "inner": [2, 3]}, "citation": "none", "source": "raw",
    "spacing": [1.0, 2.0, 3.0], "spacing_known": True, "label_guided": False, "recipe": PAPER.to_dict(),
    "replay": PAPER.to_dict(),
    "protocols": {"full": asdict(FULL)},
}
# oblique, axes permuted and flipped: no rounding may creep in
AFFINE = np.array([[0.1, -1.9, 0.3, 5.25], [0.9, 0.2, 0.1, -7.0], [0.0, 0.3, -3.1, 1 / 3], [0, 0, 0, 1]])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL4MIS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SSL4MIS_DATA", raising=False)
    return tmp_path / "cache"


def scan(shape=(9, 7, 8), channels=3, seed=0):
    voxels = np.random.default_rng(seed).normal(size=(channels, *shape)).astype(np.float32)
    return Scan(voxels, AFFINE, Path("scan.nii"))


def case(shape=(9, 7, 8), channels=3, seed=0):
    """A case cropped by a voxel on each side; label values 0 to 3."""
    image = scan(shape, channels, seed)
    geometry = Geometry.of(image, [(1, n - 1) for n in Geometry.of(image).stored])
    label = np.random.default_rng(seed + 1).integers(0, 4, size=shape).astype(np.uint8)
    return Stored(to_store(image, geometry, 0), to_store(Scan(label, AFFINE, image.path), geometry, 0), geometry)


def make(folder, cases=("a", "b"), recipe=PAPER, dtype="float32", compression=None, **entries):
    """A prepared data set."""
    card = CARD | {"recipe": recipe.to_dict(), "replay": recipe.to_dict()} | entries
    checksums = {}
    for number, name in enumerate(cases):
        content = case(seed=number, channels=len(card["modalities"]))
        content = content._replace(label=np.minimum(content.label, len(card["classes"]) - 1).astype(np.uint8))
        checksums[name] = store.write_stored(
            folder / "cases" / f"{name}.h5", content, recipe.id, card["modalities"], dtype, compression)
    outputs = {name: {"output": {"file": f"cases/{name}.h5", "sha256": found}} for name, found in checksums.items()}
    store.write_json(folder / "manifest.json", {"recipe": recipe.id, "cases": outputs})
    store.write_card(folder, card)
    return folder


def opened(folder, **changes):
    spec = store.spec_of(folder)
    return store.CaseStore(folder, spec, replace(FULL, **changes))


def line(call, *parts):
    """What a DataError says: one line with all the parts."""
    with pytest.raises(DataError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and "expected" in text, text
    for part in parts:
        assert str(part) in text
    return text


# the stored case


@pytest.mark.parametrize("compression", [None, "lzf"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("labeled", [True, False])
def test_written_is_read(tmp_path, dtype, compression, labeled):
    image, label, geometry = case()
    label = label if labeled else None
    path = tmp_path / "cases" / "a.h5"
    store.write_stored(path, Stored(image, label, geometry), PAPER.id, CARD["modalities"], dtype, compression)
    found = store.read_stored(path)
    assert found.image.dtype == np.float32 and np.array_equal(found.image, image.astype(dtype).astype(np.float32))
    assert found.geometry == geometry
    if labeled:
        assert found.label.dtype == np.uint8 and np.array_equal(found.label, label)
        assert np.array_equal(volumes.read_label(path, 4), label)
    else:
        assert found.label is None
    assert np.array_equal(volumes.read_image(path), found.image)
    assert [entry.name for entry in path.parent.iterdir()] == ["a.h5"]


def test_the_way_back_to_the_scanner_is_lossless(tmp_path):
    image = scan()
    store.write_stored(tmp_path / "a.h5", case(), PAPER.id, CARD["modalities"])
    found = store.read_stored(tmp_path / "a.h5")
    back = to_scanner(found.image, found.geometry, outside=np.nan)
    inside = ~np.isnan(back)
    assert inside.sum() == found.image.size and np.array_equal(back[inside], image.voxels[inside])


def test_attributes_say_where_the_case_comes_from(tmp_path):
    image = Scan(np.arange(2 * 6 * 5 * 4, dtype=np.float32).reshape(2, 6, 5, 4), np.diag([-2.0, 1.5, 4, 1]), Path("x"))
    geometry = Geometry.of(image, [(1, 5), (0, 3), (2, 4)])
    content = Stored(to_store(image, geometry, 0), None, geometry)
    checksum = store.write_stored(tmp_path / "a.h5", content, "LA-paper-1", ["t1", "t2"])
    with h5py.File(tmp_path / "a.h5") as file:
        found = dict(file.attrs)
        assert not any(isinstance(kind := file.attrs.get_id(name).get_type(), h5py.h5t.TypeStringID)
                       and kind.is_variable_str() for name in found)
        assert file["image"].chunks is None and file["image"].shape == (2, 4, 3, 2)
    # of a fixed length: of other text HDF5 can hang when a byte is damaged
    assert found["recipe"] == b"LA-paper-1" and found["sha256"] == checksum.encode()
    assert list(found["modalities"]) == [b"t1", b"t2"]
    assert found["orientation"] == b"RAS" and found["spacing"].tolist() == [2, 1.5, 4]
    assert found["crop"].tolist() == [[1, 5], [0, 3], [2, 4]] and found["original_shape"].tolist() == [6, 5, 4]
    # the first axis is flipped: index 0 of the box is voxel 4 of the scanner, at -2 * 4 mm, z begins at 2 * 4 mm
    assert found["origin"].tolist() == [-8, 0, 8]
    assert found["affine"].tolist() == [[2, 0, 0, -8], [0, 1.5, 0, 0], [0, 0, 4, 8], [0, 0, 0, 1]]
    assert Geometry.from_dict(json.loads(found["geometry"])) == geometry


def test_the_checksum_is_that_of_the_content(tmp_path):
    content = case()
    image, label, geometry = content

    def write(stored, **options):
        return store.write_stored(tmp_path / "a.h5", stored, PAPER.id, CARD["modalities"], **options)

    plain = write(content)
    first = (tmp_path / "a.h5").read_bytes()
    assert write(content, compression="lzf") == plain and write(content) == plain
    assert (tmp_path / "a.h5").read_bytes() == first
    half = content._replace(image=image.astype(np.float16).astype(np.float32))
    assert write(half, dtype="float16") != write(half)
    other = Geometry.from_dict(geometry.to_dict() | {"flips": [not flip for flip in geometry.flips]})
    sums = {plain, write(content._replace(label=None)), write(content._replace(image=image + 1)),
            write(content._replace(label=label // 2)), write(content._replace(geometry=other))}
    assert len(sums) == 5
    # as anyone would compute it from the arrays alone
    digest = hashlib.sha256()
    digest.update(f"image <f4 {image.shape}\n".encode() + image.tobytes())
    digest.update(f"label |u1 {label.shape}\n".encode() + label.tobytes())
    digest.update(json.dumps(geometry.to_dict(), sort_keys=True, separators=(",", ":")).encode())
    assert digest.hexdigest() == plain


def test_compressed_chunks_are_small_and_of_one_channel(tmp_path):
    shape = (70, 10, 90)
    affine = np.eye(4)
    image = Scan(np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32), affine, Path("x"))
    content = Stored(image.voxels, np.zeros(shape, np.uint8), Geometry.of(image))
    store.write_stored(tmp_path / "a.h5", content, "x", ["t1", "t2"], compression="lzf")
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["image"].chunks == (1, 64, 10, 64) and file["label"].chunks == (64, 10, 64)
        assert file["image"].compression == "lzf"


IMAGE, LABEL, _ = case()


def changed(value):
    image = IMAGE.copy()
    image[1, 2, 3, 4] = value
    return image


@pytest.mark.parametrize("change, options, message", [
    ({"image": np.full_like(IMAGE, 2)}, {}, "is 2 everywhere"),
    ({"image": changed(np.nan)}, {}, "1 voxels with NaN or infinity"),
    ({"image": changed(-7e4)}, {"dtype": "float16"}, "values up to 70000, expected at most 65504 for float16"),
    ({"image": IMAGE[..., :-1]}, {}, f"shape {IMAGE[..., :-1].shape}, expected {IMAGE.shape}"),
    ({"label": LABEL[0]}, {}, f"label has shape {LABEL[0].shape}"),
    ({"label": LABEL.astype(np.int64)}, {}, "type int64"),
    ({}, {"dtype": "int8"}, "type int8"),
    ({}, {"compression": "gzip"}, "compression gzip"),
])
def test_writing_refuses_what_does_not_fit(tmp_path, change, options, message):
    path = tmp_path / "a.h5"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        line(lambda: store.write_stored(path, case()._replace(**change), "x", "abc", **options), path, message)
    assert not any(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(volumes.os, "replace", fail)
    path = tmp_path / "a.h5"
    line(lambda: store.write_stored(path, case(), "x", CARD["modalities"]), path, "disk full")
    line(lambda: store.write_card(tmp_path, CARD), tmp_path / "dataset.json", "disk full")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("compression", [None, "lzf"])
def test_a_flipped_bit_is_found(tmp_path, compression):
    path = tmp_path / "a.h5"
    store.write_stored(path, case(), PAPER.id, CARD["modalities"], compression=compression)
    content = path.read_bytes()
    for name in ("image", "label"):
        with h5py.File(path) as file:
            data = file[name].id
            place = data.get_offset() if compression is None else data.get_chunk_info(0).byte_offset
        damaged = bytearray(content)
        damaged[place + 100] ^= 1
        path.write_bytes(damaged)
        line(lambda: store.read_stored(path), path)
        path.write_bytes(content)
    with h5py.File(path, "r+") as file:
        file.attrs["geometry"] = file.attrs["geometry"].decode().replace("[[1,", "[[0,", 1)
    line(lambda: store.read_stored(path), path, "sha256")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.h5"
    line(lambda: store.read_stored(path), path, "no such file")
    path.write_text("not h5")
    line(lambda: store.read_stored(path), path, "not an h5 file")
    volumes.write_case(path, *case()[:2])
    line(lambda: store.read_stored(path), path, "no readable attribute 'sha256'")
    store.write_stored(path, case(), PAPER.id, CARD["modalities"])
    path.write_bytes(path.read_bytes()[:-10])
    line(lambda: store.read_stored(path), path, "truncated")


# the card


def test_the_card_is_read_as_written(tmp_path):
    store.write_card(tmp_path, CARD)
    assert store.read_card(tmp_path) == json.loads(json.dumps(CARD))
    text = (tmp_path / "dataset.json").read_text()
    assert text.endswith("}\n") and list(json.loads(text)) == list(CARD)


@pytest.mark.parametrize("change, message", [
    ({"schema": 2}, "schema is 2, expected 1"),
    ({"classes": "all"}, "classes is 'all'"),
    ({"name": "my scans"}, "name is 'my scans'"),
    ({"classes": [1]}, "classes is [1], expected names"),
    ({"classes": ["background"], "regions": {}}, "classes is ['background'], expected names, at least 2"),
    ({"modalities": []}, "modalities is [], expected names, at least 1"),
    ({"regions": {"whole": [4]}}, "region whole is [4], expected a list of classes, 0 to 3"),
    ({"regions": {"whole": 1}}, "region whole is 1"),
    ({"spacing": [1, 0, 1]}, "spacing is [1, 0, 1]"),
    ({"spacing": [1, 1]}, "spacing is [1, 1]"),
    ({"recipe": {"name": "paper"}}, "recipe"),
])
def test_a_broken_card_is_refused(tmp_path, change, message):
    path = tmp_path / "dataset.json"
    line(lambda: store.write_card(tmp_path, CARD | change), path, message)
    assert not path.exists()
    path.write_text(json.dumps(CARD | change))
    line(lambda: store.read_card(tmp_path), path, message)


def test_names_that_are_not_utf8_are_kept(tmp_path):
    store.write_json(tmp_path / "file.json", [os.fsdecode(b"M\xfcller"), "M\xfcller"])
    assert json.loads((tmp_path / "file.json").read_text("utf-8")) == [os.fsdecode(b"M\xfcller"), "M\xfcller"]


def test_no_card_is_refused(tmp_path):
    path = tmp_path / "dataset.json"
    line(lambda: store.read_card(tmp_path), path, "no such file", "data_prep.prepare")
    for text, message in (("{", "damaged"), ("[]", "a JSON list"), ('{"channel_names": {}}', "no entry 'schema'")):
        path.write_text(text)
        line(lambda: store.read_card(tmp_path), path, message)
    path.write_bytes(b"\xff\xfe")
    line(lambda: store.read_card(tmp_path), path, "damaged")
    path.unlink()
    path.mkdir()
    line(lambda: store.read_card(tmp_path), path, "damaged")


def test_own_data_is_described_by_its_card(tmp_path):
    folder = make(tmp_path / "own")
    spec = store.spec_of(folder)
    assert (spec.name, spec.title, spec.modality) == ("Tumors", "Tumors of nobody", "MRI")
    assert spec.classes == CLASSES and spec.modalities == ("t1", "t2", "flair") and spec.spacing == (1, 2, 3)
    assert spec.regions == {"whole": (1, 2, 3), "inner": (2, 3)}
    assert spec.protocols == {"full": FULL} and spec.splits == folder / "splits" and str(folder) in spec.how_to_get
    for root in (None, tmp_path / "elsewhere"):
        assert spec.open(root, spec.protocols["full"]).image("a").shape == (3, *case().geometry.stored)
    for entry, message in (({"patch": [1]}, "missing"), (asdict(FULL) | {"pitch": 1}, "pitch"), (None, "protocol odd"),
                           (asdict(FULL) | {"patch": ["4"]}, "patch is"), (asdict(FULL) | {"labeled": []}, "labeled"),
                           (asdict(FULL) | {"iterations": "many"}, "iterations is 'many'")):
        store.write_card(folder, CARD | {"protocols": {"odd": entry}})
        line(lambda: store.spec_of(folder), folder / "dataset.json", "protocol odd", message)
    store.write_card(folder, CARD | {"protocols": {}})
    line(lambda: store.spec_of(folder), folder / "dataset.json", "no protocol to train by, expected one")


# the store


@pytest.mark.parametrize("dtype, compression", [("float32", None), ("float32", "lzf"), ("float16", None)])
def test_a_case_is_what_was_stored(tmp_path, dtype, compression):
    cases = opened(make(tmp_path, dtype=dtype, compression=compression))
    cases.check(["a", "b"])
    for seed, name in enumerate("ab"):
        image, label, geometry = case(seed=seed)
        found = cases.image(name)
        assert found.dtype == np.float32 and np.array_equal(found, image.astype(dtype).astype(np.float32))
        assert cases.label(name).dtype == np.uint8 and np.array_equal(cases.label(name), label)
        assert cases.spacing(name) == geometry.stored_spacing


def base(array):
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


@pytest.mark.parametrize("shape", [(9, 7, 8), (5, 5, 5), (16, 3, 11)])
def test_plain_images_are_mapped_and_the_file_is_safe(tmp_path, shape):
    import torch

    store.write_card(tmp_path, CARD)
    path = tmp_path / "cases" / "a.h5"
    content = case(shape)
    store.write_stored(path, content, PAPER.id, CARD["modalities"])
    before = path.read_bytes()
    found = opened(tmp_path).image("a")
    assert isinstance(found, np.memmap) and found.mode == "c" and np.array_equal(found, content.image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = torch.from_numpy(found)
    tensor += 1
    assert np.array_equal(found, content.image + 1)
    assert path.read_bytes() == before and np.array_equal(opened(tmp_path).image("a"), content.image)


def test_a_written_file_may_be_replaced_under_a_map(tmp_path):
    cases = opened(make(tmp_path))
    found = cases.image("a")
    store.write_stored(cases.path("a"), case(seed=5), PAPER.id, CARD["modalities"])
    assert np.array_equal(found, case(seed=0).image) and np.array_equal(cases.image("a"), case(seed=5).image)


def test_more_cases_are_mapped_than_files_may_be_open(tmp_path):
    pytest.importorskip("resource")
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from data_prep import store
spec = store.spec_of(sys.argv[1])
cases = store.CaseStore(sys.argv[1], spec, spec.protocols["full"])
print(len([cases.image("a") for _ in range(200)]))
"""
    done = subprocess.run([sys.executable, "-c", code, make(tmp_path)], capture_output=True, text=True,
                          cwd=Path(data_prep.__file__).parents[1])
    assert done.stdout == "200\n", done.stderr


@pytest.mark.parametrize("compression", [None, "lzf"])
@pytest.mark.parametrize("names", [("flair",), ("t1", "t2"), ("flair", "t1"), ("t2", "flair", "t1")])
def test_modalities_come_in_the_order_of_the_protocol(tmp_path, names, compression):
    cases = opened(make(tmp_path, compression=compression), modalities=names)
    found = cases.image("a")
    assert np.array_equal(found, case().image[[CARD["modalities"].index(name) for name in names]])
    assert isinstance(base(found), np.memmap) == (compression is None and names in (("flair",), ("t1", "t2")))


@pytest.mark.parametrize("names", [("t1", "dwi"), ("t1", "t1")])
def test_modalities_that_are_not_there_are_refused(tmp_path, names):
    cases = opened(make(tmp_path), modalities=names)
    for call in (lambda: cases.check(["a"]), lambda: cases.image("a")):
        line(call, tmp_path / "dataset.json", "t1, t2, flair", f"expected {', '.join(names)}")


def test_a_store_with_fewer_modalities_than_the_data_set_is_refused(tmp_path):
    spec = store.spec_of(make(tmp_path / "all"))
    single = make(tmp_path / "one", modalities=["flair"])
    line(lambda: store.CaseStore(single, spec, FULL).check([]), "modalities flair, expected t1, t2, flair")
    found = store.CaseStore(single, spec, replace(FULL, modalities=("flair",))).image("a")
    assert found.shape == (1, *case().geometry.stored)


HAND = np.array([[[0, 1], [2, 3]], [[3, 0], [1, 2]]], np.uint8)


@pytest.mark.parametrize("region, expected", [
    ("whole", [[[0, 1], [1, 1]], [[1, 0], [1, 1]]]),
    ("inner", [[[0, 0], [1, 1]], [[1, 0], [0, 1]]]),
    ("", HAND.tolist()),
])
def test_classes_are_merged_to_regions(tmp_path, region, expected):
    image = Scan(np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2), np.eye(4), Path("x"))
    store.write_card(tmp_path, CARD | {"modalities": ["t1"]})
    store.write_stored(tmp_path / "cases" / "a.h5", Stored(image.voxels, HAND, Geometry.of(image)), PAPER.id, ["t1"])
    found = opened(tmp_path, region=region).label("a")
    assert found.dtype == np.uint8 and found.tolist() == expected


def test_a_binary_store_is_taken_as_it_is(tmp_path):
    spec = store.spec_of(make(tmp_path / "all"))
    binary = make(tmp_path / "binary", classes=["background", "whole"], regions={})
    with h5py.File(binary / "cases" / "a.h5") as file:
        stored = file["label"][()]
    assert stored.max() == 1
    assert np.array_equal(store.CaseStore(binary, spec, replace(FULL, region="whole")).label("a"), stored)
    for protocol, expected in ((FULL, "the classes background, edema"), (replace(FULL, region="inner"), "'inner'")):
        cases = store.CaseStore(binary, spec, protocol)
        for call in (lambda cases=cases: cases.check(["a"]), lambda cases=cases: cases.label("a")):
            line(call, binary / "dataset.json", "classes background, whole", expected)


def test_an_unknown_region_is_refused(tmp_path):
    line(lambda: opened(make(tmp_path), region="rim").check(["a"]), tmp_path / "dataset.json", "'rim'")


def test_label_values_beyond_the_classes_are_refused(tmp_path):
    folder = make(tmp_path)
    store.write_card(folder, CARD | {"classes": list(CLASSES[:3]), "regions": {}})
    line(lambda: opened(folder).label("a"), "has the value 3, expected 0 to 2")


def test_labels_are_read_only_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "read_label", lambda *_, **__: pytest.fail("a label was read"))
    monkeypatch.setattr(store, "read_array", lambda *_, **__: pytest.fail("a checksum was gone through"))
    cases = opened(make(tmp_path))
    cases.check(["a", "b"])
    cases.image("a"), cases.spacing("a"), cases.provenance(["a"])


def test_a_case_without_label_has_an_image(tmp_path):
    folder = make(tmp_path)
    store.write_stored(folder / "cases" / "a.h5", case()._replace(label=None), PAPER.id, CARD["modalities"])
    opened(folder).image("a")
    line(lambda: opened(folder).label("a"), folder / "cases" / "a.h5", "no array 'label'")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_lower_resolution_is_that_of_volumes(tmp_path, cache, dtype):
    folder = make(tmp_path / "store", dtype=dtype)
    image, label, geometry = case()
    image = image.astype(dtype).astype(np.float32)
    cases = opened(folder, downsample=2, modalities=("flair", "t1"))
    for _ in range(2):  # made, then from the cache
        assert np.array_equal(cases.image("a"), volumes.downsample_image(image, 2)[[2, 0]])
        assert np.array_equal(cases.label("a"), volumes.downsample_label(label, 2))
    assert cases.spacing("a") == tuple(2 * mm for mm in geometry.stored_spacing)
    merged = opened(folder, downsample=2, region="inner").label("a")
    assert np.array_equal(merged, volumes.downsample_label((label >= 2).astype(np.uint8), 2))
    assert np.array_equal(opened(folder, downsample=2).label("a"), volumes.downsample_label(label, 2))
    assert not np.array_equal(merged, volumes.downsample_label(label, 2) >= 2)  # the order matters in this case
    assert sorted(entry.name for entry in cache.iterdir()) == ["Tumors-paper-3+2+3-x2", "Tumors-paper-3-x2"]


def test_recipes_do_not_share_the_cache(tmp_path):
    paper, clean = make(tmp_path / "paper"), make(tmp_path / "clean", recipe=CLEAN, cases=("b", "a"))
    first = opened(paper, downsample=2).image("a")
    second = opened(clean, downsample=2).image("a")
    assert np.array_equal(first, volumes.downsample_image(case(seed=0).image, 2))
    assert np.array_equal(second, volumes.downsample_image(case(seed=1).image, 2))
    assert np.array_equal(opened(paper, downsample=2).image("a"), first)


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("what, message", [
    ("missing", "no such file"),
    ("truncated", "truncated"),
    ("recipe", "recipe Tumors-clean-3, expected Tumors-paper-3"),
    ("foreign", "no readable attribute 'recipe'"),
])
def test_a_bad_case_is_refused(tmp_path, what, message, factor):
    folder = make(tmp_path)
    path = folder / "cases" / "b.h5"
    opened(folder, downsample=2).image("b"), opened(folder, downsample=2).label("b")  # no cache hides it
    if what == "missing":
        path.unlink()
    elif what == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif what == "recipe":
        store.write_stored(path, case(), CLEAN.id, CARD["modalities"])
    else:
        volumes.write_case(path, *case()[:2])
    cases = opened(folder, downsample=factor)
    cases.check(["a"])
    for call in (lambda: cases.image("b"), lambda: cases.label("b"), lambda: cases.spacing("b")):
        line(call, path, message)
    if what == "missing":
        line(lambda: cases.check(["a", "b", "c"]), folder, "2 of 3 cases are missing", "cases/b.h5")
    else:
        line(lambda: cases.check(["a", "b"]), path, message)


def test_a_case_other_than_that_of_the_manifest_is_refused(tmp_path):
    cases = opened(make(tmp_path))
    store.write_stored(cases.path("a"), case(seed=5), PAPER.id, CARD["modalities"])
    assert cases.provenance(["b"])["recipe"] == PAPER.id
    line(lambda: cases.provenance(["a", "b"]), cases.path("a"), "content", "as manifest.json says: prepare")


def test_a_case_with_other_channels_than_the_card_is_refused(tmp_path):
    folder = make(tmp_path)
    store.write_stored(folder / "cases" / "a.h5", case(channels=2), PAPER.id, ["t1", "t2"])
    line(lambda: opened(folder).image("a"), folder / "cases" / "a.h5", "2 channels, expected 3")


def test_cases_of_another_recipe_than_the_protocol_are_refused(tmp_path):
    cases = opened(make(tmp_path), recipe="clean")
    line(lambda: cases.check(["a"]), tmp_path / "dataset.json", "recipe paper, expected clean")


def test_published_files_go_with_the_recipe_that_new_scans_go_through(tmp_path):
    published = replace(PAPER, name="published", version=1)
    folder = make(tmp_path / "Tumors" / "paper", recipe=published, replay=PAPER.to_dict(), source="h5")
    assert store.find(tmp_path, "Tumors", "paper") == folder and store.find(folder, "Tumors", "published") is None
    cases = opened(folder)
    cases.check(["a", "b"])
    assert np.array_equal(cases.image("a"), case().image)
    assert cases.replay() == PAPER.to_dict() and cases.provenance(["a"])["recipe"] == "Tumors-published-1"


def test_provenance_follows_the_cases_and_not_their_order(tmp_path):
    one, two, other = make(tmp_path / "1"), make(tmp_path / "2"), make(tmp_path / "3", cases=("b", "a"))
    found = opened(one).provenance(["a", "b"])
    assert found["recipe"] == "Tumors-paper-3" and len(found["sha256"]) == 64
    assert (found["label_guided"], found["spacing_known"]) == (False, True)
    sums = json.loads((one / "manifest.json").read_text())["cases"]
    listed = "".join(f"{case} {sums[case]['output']['sha256']}\n" for case in "ab")
    assert found["sha256"] == hashlib.sha256(listed.encode()).hexdigest()
    assert opened(one).provenance(["a"])["sha256"] != found["sha256"]
    manifest = json.loads((two / "manifest.json").read_text())
    manifest["cases"] = dict(reversed(manifest["cases"].items()))
    store.write_json(two / "manifest.json", manifest)
    assert opened(two).provenance(["b", "a"]) == found
    assert opened(other).provenance(["a", "b"])["sha256"] != found["sha256"]


def test_a_missing_or_broken_manifest_is_one_line(tmp_path):
    cases = opened(make(tmp_path))
    path = tmp_path / "manifest.json"
    for text, message in (("{", "damaged"), ("[]", "a JSON list"), ('{"cases": 3}', "no checksum"),
                          ('{"cases": {"a": {}}}', "no checksum"), ('{"cases": {}}', "no checksum of a case ('a')")):
        path.write_text(text)
        line(lambda: cases.provenance(["a"]), path, message)
    path.unlink()
    line(lambda: cases.provenance(["a"]), path, "no such file")


# finding a store


def test_a_store_is_found_in_three_places(tmp_path):
    folder = make(tmp_path / "DATA" / "Tumors" / "paper")
    for root in (tmp_path / "DATA", tmp_path / "DATA" / "Tumors", folder):
        assert store.find(root, "Tumors", "paper") == folder
        assert store.find(root, "Tumors", "clean") is None
        assert store.find(root, "Livers", "paper") is None
    assert store.find(tmp_path, "Tumors", "paper") is None


def test_cards_are_believed_and_not_names_of_folders(tmp_path):
    clean = make(tmp_path / "Tumors" / "clean")
    make(tmp_path / "Tumors" / "paper", recipe=CLEAN)
    assert store.find(tmp_path, "Tumors", "paper") is None
    assert store.find(clean, "Tumors", "paper") == clean
    # a foreign dataset.json is no card, a damaged one only matters where nothing else is found
    (tmp_path / "dataset.json").write_text('{"name": "Tumors", "channel_names": {}}')
    assert store.find(tmp_path, "Tumors", "paper") is None
    (tmp_path / "Tumors" / "dataset.json").write_text("{")
    line(lambda: store.find(tmp_path / "Tumors", "Tumors", "paper"), tmp_path / "Tumors" / "dataset.json", "damaged")


def test_the_folder_that_is_meant(tmp_path):
    folder = make(tmp_path / "Tumors" / "clean", recipe=CLEAN)
    assert store.folder_of(folder) == store.folder_of(tmp_path / "Tumors") == folder
    assert store.folder_of(tmp_path) is None


@pytest.fixture
def tumors(monkeypatch, tmp_path):
    """The data set of these tests as a built-in one."""
    spec = store.spec_of(make(tmp_path / "spec"))
    spec = replace(spec, open=store.opener("Tumors"), how_to_get="expected to be made by you")
    monkeypatch.setattr(data_prep, "dataset", lambda name: {"Tumors": spec}[name])
    return spec


def test_a_built_in_data_set_is_opened_below_a_folder(tmp_path, tumors, monkeypatch):
    folder = make(tmp_path / "DATA" / "Tumors" / "paper")
    for root in (tmp_path / "DATA", str(folder), folder.parent):
        assert tumors.open(root, FULL).folder == folder
    monkeypatch.setenv("SSL4MIS_DATA", str(tmp_path / "DATA"))
    assert np.array_equal(tumors.open(None, FULL).image("a"), case().image)


def test_what_is_not_there_is_said(tmp_path, tumors):
    line(lambda: tumors.open(None, FULL), "no data folder", tumors.how_to_get)
    line(lambda: tumors.open(tmp_path / "no", FULL), tmp_path / "no", "is not a folder", tumors.how_to_get)
    root = tmp_path / "DATA"
    root.mkdir()
    places = f"expected recipe paper in {root}, {root / 'paper'} or {root / 'Tumors' / 'paper'}"
    line(lambda: tumors.open(root, FULL), "found nothing prepared", places, tumors.how_to_get)
    make(root / "Tumors" / "clean", recipe=CLEAN)
    for place in (root, root / "Tumors", root / "Tumors" / "clean"):
        line(lambda place=place: tumors.open(place, FULL), "found recipe clean, expected recipe paper", place)
