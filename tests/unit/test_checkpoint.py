"""Checkpoints that are cut, flipped or half renamed."""

import hashlib
import io
import os

import pytest
import torch

from ssl4mis import checkpoint
from ssl4mis.checkpoint import LATEST, MAGIC, PREVIOUS
from ssl4mis.errors import UserError


def state(number):
    return {"method": {"weight": torch.full((3, 2), float(number))}, "done": number, "names": ["a", {"b": None}]}


@pytest.fixture
def folder(tmp_path):
    """Two generations: 1 and 2."""
    for number in (1, 2):
        checkpoint.save(tmp_path, state(number))
    return tmp_path


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def empty(path):
    path.write_bytes(b"")


def foreign(path):
    torch.save(state(9), path)


def test_round_trip(folder):
    got = checkpoint.load(folder)
    assert got["done"] == 2 and got["names"] == ["a", {"b": None}]
    assert torch.equal(got["method"]["weight"], torch.full((3, 2), 2.0))
    assert checkpoint.read(folder / PREVIOUS)["done"] == 1
    assert sorted(p.name for p in folder.iterdir()) == sorted([LATEST, PREVIOUS])


def test_nothing_there(tmp_path):
    assert checkpoint.load(tmp_path) is None


@pytest.mark.parametrize("damage", [cut, flip, empty, foreign])
def test_a_damaged_latest_falls_back(folder, damage):
    damage(folder / LATEST)
    said = []
    assert checkpoint.load(folder, said.append)["done"] == 1
    assert len(said) == 1 and LATEST in said[0] and "\n" not in said[0]


@pytest.mark.parametrize("damage", [cut, flip, empty, foreign])
def test_both_damaged_is_an_error_that_names_a_file(folder, damage):
    damage(folder / LATEST), damage(folder / PREVIOUS)
    with pytest.raises(UserError) as error:
        checkpoint.load(folder, lambda text: None)
    assert ".ckpt" in str(error.value) and "\n" not in str(error.value)


def test_a_single_damaged_one_is_an_error(tmp_path):
    checkpoint.save(tmp_path, state(1))
    cut(tmp_path / LATEST)
    with pytest.raises(UserError, match=LATEST):
        checkpoint.load(tmp_path, lambda text: None)


class Crash(Exception):
    """Stands for a power cut."""


def crash_at_rename(monkeypatch, number):
    original, calls = os.replace, iter(range(10))

    def replace(source, target):
        if next(calls) == number:
            raise Crash
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("rename", [0, 1])
def test_a_crash_at_a_rename_loses_no_generation(folder, monkeypatch, rename):
    crash_at_rename(monkeypatch, rename)
    with pytest.raises(Crash):
        checkpoint.save(folder, state(3))
    monkeypatch.undo()
    assert (folder / LATEST).exists() == (rename == 0)
    assert checkpoint.load(folder)["done"] == 2
    checkpoint.save(folder, state(4))
    assert checkpoint.load(folder)["done"] == 4 and checkpoint.read(folder / PREVIOUS)["done"] == 2


def test_a_crash_while_writing_leaves_the_latest(folder, monkeypatch):
    def fsync(number):
        raise Crash

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(Crash):
        checkpoint.save(folder, state(3))
    assert checkpoint.load(folder)["done"] == 2


def test_the_whole_generation_outlives_the_save_after_a_fallback(folder, monkeypatch):
    """The damaged latest must not take the place of the whole previous one before a new latest is there."""
    cut(folder / LATEST)
    assert checkpoint.load(folder, lambda text: None)["done"] == 1
    crash_at_rename(monkeypatch, 1)
    try:
        checkpoint.save(folder, state(3))
    except Crash:
        pass
    monkeypatch.undo()
    assert checkpoint.load(folder, lambda text: None)["done"] in (1, 3)


def test_pickled_code_is_not_run(tmp_path):
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    buffer = io.BytesIO()
    torch.save({"method": Evil()}, buffer)
    data = buffer.getvalue()
    (tmp_path / LATEST).write_bytes(MAGIC + hashlib.sha256(data).digest() + data)
    with pytest.raises(Exception, match="(?i)weights.only|unsupported|damaged"):
        checkpoint.load(tmp_path, lambda text: None)
    assert not marker.exists()


def test_drop_previous(folder):
    checkpoint.drop_previous(folder)
    checkpoint.drop_previous(folder)
    assert [p.name for p in folder.iterdir()] == [LATEST]


def test_kept_weights_stay_and_are_found_in_order(folder):
    for done in (1000, 20, 300):
        checkpoint.keep(folder, done, state(done)["method"])
    checkpoint.save(folder, state(3))
    checkpoint.drop_previous(folder)
    found = checkpoint.kept(folder)
    assert list(found) == [20, 300, 1000]
    assert all(checkpoint.read(path)["weight"].eq(done).all() for done, path in found.items())
    cut(found[300])
    with pytest.raises(UserError, match="000300.ckpt: damaged"):
        checkpoint.read(found[300])


def test_no_weights_kept(tmp_path):
    assert checkpoint.kept(tmp_path) == {}


def test_the_fingerprint_is_of_names_types_shapes_and_values():
    weights = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(7)}
    found = checkpoint.fingerprint(weights)
    assert len(found) == 64 and found == checkpoint.fingerprint(dict(sorted(weights.items())))
    strided = torch.arange(6.0).reshape(2, 3).t().contiguous().t()  # the same values elsewhere in memory
    assert found == checkpoint.fingerprint(weights | {"b": strided})
    others = [weights | {"b": weights["b"].reshape(3, 2)}, weights | {"b": weights["b"].double()},
              weights | {"b": weights["b"] + torch.tensor([[0, 0, 0], [0, 0, 1e-6]])}, weights | {"a": torch.tensor(8)},
              {"c": weights["b"], "a": weights["a"]}, {"a": weights["a"]}]
    assert len({found, *map(checkpoint.fingerprint, others)}) == 1 + len(others)
    assert checkpoint.fingerprint({"x": torch.ones(2, dtype=torch.bfloat16)})
