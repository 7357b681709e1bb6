"""Checkpoints that are cut, flipped or half renamed."""

import contextlib
import errno
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


def of_another_run(path):
    checkpoint.save(path.parent / "other", own(9, "other"))
    os.replace(path.parent / "other" / LATEST, path)


def weights_alone(path):
    path.write_bytes(checkpoint.sealed(saved(state(9)["method"])))


def a_list(path):
    path.write_bytes(checkpoint.sealed(saved([1, 2])))


def no_torch_file(path):
    path.write_bytes(checkpoint.sealed(b"whatever"))


def a_folder(path):
    path.unlink()
    path.mkdir()


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def own(number, run="mine"):
    return state(number) | {"run": run}


@pytest.fixture
def mine(tmp_path):
    """Two generations of a run: 1 and 2."""
    (tmp_path / "other").mkdir()
    for number in (1, 2):
        checkpoint.save(tmp_path, own(number))
    return tmp_path


@pytest.mark.parametrize("damage", [cut, flip, empty, foreign, of_another_run, weights_alone, a_list, no_torch_file,
                                    a_folder])  # fmt: skip
def test_what_is_not_of_this_run_is_told_and_passed_over(mine, damage):
    damage(mine / LATEST)
    said = []
    assert checkpoint.load(mine, said.append, "mine")["done"] == 1
    assert len(said) == 1 and str(mine / LATEST) in said[0] and "the generation before it" in said[0]
    assert "\n" not in said[0]
    damage(mine / PREVIOUS)
    with pytest.raises(UserError, match=f"{PREVIOUS}.*remove it") as error:
        checkpoint.load(mine, said.append, "mine")
    assert "\n" not in str(error.value) and len(said) == 2


def test_the_checkpoint_of_another_run_is_named(mine):
    of_another_run(mine / LATEST)
    said = []
    checkpoint.load(mine, said.append, "mine")
    assert "a checkpoint of run other, expected one of mine" in said[0]
    assert checkpoint.load(mine)["done"] == 9  # whoever does not say which run it shall be
    of_no_run = checkpoint.load(mine, said.append, "other")
    assert of_no_run["done"] == 9


def test_older_checkpoints_name_no_run(folder):
    assert checkpoint.load(folder, run="mine")["done"] == 2


@pytest.mark.parametrize("damage", [of_another_run, weights_alone])
def test_what_is_not_of_this_run_takes_no_place_of_what_is(mine, damage, monkeypatch):
    """A crash between the two renames of a save leaves one generation, which must be of the run."""
    damage(mine / LATEST)
    crash_at_rename(monkeypatch, 1)
    with contextlib.suppress(Crash):
        checkpoint.save(mine, own(3))
    monkeypatch.undo()
    assert checkpoint.load(mine, lambda text: None, "mine")["done"] in (1, 3)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_what_cannot_be_written_is_one_line_and_what_was_there_stays(folder, monkeypatch, name, number):
    def refuse(*words):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, refuse)
    for write in (lambda: checkpoint.save(folder, state(3)),
                  lambda: checkpoint.keep(folder, 3, "a", state(3)["method"])):
        with pytest.raises(UserError, match=rf"ckpt: cannot be written \({os.strerror(number)}\), expected") as error:
            write()
        assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert checkpoint.load(folder)["done"] == 2 and checkpoint.read(folder / PREVIOUS)["done"] == 1
    assert checkpoint.kept(folder) == {}
    assert name == "replace" or not list(folder.rglob("*.partial"))  # of no use, and it takes room


def test_pickled_code_is_not_run(tmp_path):
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    buffer = io.BytesIO()
    torch.save({"method": Evil()}, buffer)
    data = buffer.getvalue()
    (tmp_path / LATEST).write_bytes(MAGIC + hashlib.sha256(data).digest() + data)
    with pytest.raises(UserError, match="holds more than tensors and plain values"):
        checkpoint.load(tmp_path, lambda text: None)
    assert not marker.exists()


def test_drop_previous(folder):
    checkpoint.drop_previous(folder)
    checkpoint.drop_previous(folder)
    assert [p.name for p in folder.iterdir()] == [LATEST]


def test_kept_weights_stay_and_are_found_in_order(folder):
    for done in (1000, 20, 300):
        checkpoint.keep(folder, done, "a run", state(done)["method"])
    checkpoint.save(folder, state(3))
    checkpoint.drop_previous(folder)
    found = checkpoint.kept(folder)
    assert list(found) == [20, 300, 1000]
    assert all(checkpoint.read_kept(path, "a run")["weight"].eq(done).all() for done, path in found.items())
    with pytest.raises(UserError, match="000020.ckpt: weights of run a run, expected those of another"):
        checkpoint.read_kept(found[20], "another")
    with pytest.raises(UserError, match="latest.ckpt: holds .*expected the weights of a run"):
        checkpoint.read_kept(folder / LATEST, "a run")
    cut(found[300])
    with pytest.raises(UserError, match="000300.ckpt: damaged"):
        checkpoint.read_kept(found[300], "a run")


def test_no_weights_kept(tmp_path):
    assert checkpoint.kept(tmp_path) == {}
    (tmp_path / checkpoint.KEPT).mkdir()
    (tmp_path / checkpoint.KEPT / "best.ckpt").write_bytes(b"of somebody else")
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
