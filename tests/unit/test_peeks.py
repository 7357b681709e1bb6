"""The store of what kept checkpoints score on the test list, which no ranking can read."""

import json

import pytest
from unit.making import make_peek, make_record

from ssl4mis import leaderboard, peeks, records


@pytest.fixture
def record():
    return make_record("ua_mt", dice=0.8, spread=0.05)


def checkpoints(peek):
    return {entry["iteration"]: entry["cases"] for entry in peek["checkpoints"]}


def test_what_is_written_is_read(record, tmp_path):
    peek = make_peek(record)
    shuffled = dict(sorted(checkpoints(peek).items(), reverse=True))
    path = peeks.write(tmp_path / "peeks", record["id"], shuffled)
    assert path == tmp_path / "peeks" / f"{record['id']}.json"
    assert peeks.read_all(tmp_path / "peeks") == [peek]
    assert peeks.read_all(tmp_path / "nowhere") == []


def test_peeks_are_written_once(record, tmp_path):
    found = checkpoints(make_peek(record))
    peeks.write(tmp_path, record["id"], found)
    peeks.write(tmp_path, record["id"], found)
    with pytest.raises(FileExistsError, match=record["id"]):
        peeks.write(tmp_path, record["id"], checkpoints(make_peek(record, (-0.2,))))


@pytest.mark.parametrize(("change", "expected"), [
    (lambda peek: peek.update(schema=2), "schema is 2, expected 1"),
    (lambda peek: peek.update(checkpoints=[]), "checkpoints is empty, expected at least one"),
    (lambda peek: peek.pop("checkpoints"), "record lacks 'checkpoints', expected list"),
    (lambda peek: peek["checkpoints"].reverse(), r"checkpoints\[1\].iteration is 2000, expected more than 3000"),
    (lambda peek: peek["checkpoints"][1]["cases"][2].update(dice=1.5),
     r"checkpoints\[1\].cases\[2\].dice is 1.5, expected a number from 0 to 1"),
    (lambda peek: peek["checkpoints"][0]["cases"][0].update(asd_mm=None),
     r"checkpoints\[0\].cases\[0\].asd_mm is None, expected null exactly where one mask is empty"),
])  # fmt: skip
def test_a_broken_file_is_named_in_one_line(record, tmp_path, change, expected):
    peek = make_peek(record)
    change(peek)
    path = tmp_path / f"{record['id']}.json"
    path.write_text(json.dumps(peek))
    with pytest.raises(ValueError, match=expected) as error:
        peeks.read_all(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_no_ranking_reads_them(record, tmp_path):
    """The table of a results folder is the same bytes with peeks that are far better than the record."""
    records.write(record, tmp_path / "records")
    table, texts = leaderboard.outputs(tmp_path)
    peeks.write(tmp_path / "peeks", record["id"], checkpoints(make_peek(record, (0.19, 0.19))))
    assert leaderboard.outputs(tmp_path) == (table, texts)


def test_a_record_cannot_hold_them(record):
    """A peek in the place of a record is turned away, so that no copied file gets into a ranking."""
    with pytest.raises(ValueError, match="record lacks"):
        records.validate(make_peek(record), "peek")
