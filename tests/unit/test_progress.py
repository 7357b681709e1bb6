"""Events that survive a crash, and times as people say them."""

import json

import pytest

from ssl4mis.progress import Reporter, duration


def event(done):
    return {"done": done, "stage": "train", "rate": 2.0, "terms": {"supervised": 1 / done}, "watch": {}}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "events.jsonl"


def test_events_are_one_json_line_each(path):
    with Reporter(path, 40, "test") as reporter:
        for done in (10, 20):
            reporter.step(event(done))
    assert lines(path) == [event(10), event(20)]


@pytest.mark.parametrize(("done", "kept"), [(0, []), (19, [10]), (20, [10, 20]), (99, [10, 20, 30])])
def test_rewind_drops_what_comes_later(path, done, kept):
    path.write_text("".join(json.dumps(event(step)) + "\n" for step in (10, 20, 30)))
    assert Reporter(path, 40, "test").rewind(done) == [event(step) for step in kept]
    assert lines(path) == [event(step) for step in kept]


@pytest.mark.parametrize("broken", ['{"done": 20, "ter', "\0\0\0", '{"done": 20}}'])
def test_rewind_drops_a_broken_line_and_goes_on(path, broken):
    path.write_text(json.dumps(event(10)) + "\n" + broken)
    reporter = Reporter(path, 40, "test")
    assert reporter.rewind(40) == [event(10)]
    reporter.step(event(20))
    assert lines(path) == [event(10), event(20)]


def test_rewind_without_events(path):
    assert Reporter(path, 40, "test").rewind(10) == []


def test_numbers_are_kept_exactly(path):
    Reporter(path, 40, "test").step(event(3))
    assert Reporter(path, 40, "test").rewind(3)[0]["terms"]["supervised"] == 1 / 3


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0 s"), (45, "45 s"), (89.4, "89 s"), (90, "2 min"), (720, "12 min"), (5399, "90 min"), (5400, "1.5 h"),
    (12240, "3.4 h"), (360000, "100.0 h"),
])
def test_duration(seconds, text):
    assert duration(seconds) == text
