"""A record run again: what is found, what is compared, and what is said."""

import copy
import math

import pytest
from unit.making import make_record

from ssl4mis import analysis, leaderboard, records, reproduce, statistics
from ssl4mis.errors import UserError

DICE = [0.60, 0.66, 0.71, 0.75, 0.78, 0.80, 0.83, 0.86, 0.88, 0.91]


def row(*found):
    (group,) = leaderboard.groups(found)
    return group


def again(record, shift=0.0, **changes):
    new = copy.deepcopy(record)
    for entry in new["cases"]:
        entry["dice"] += shift
    return new | changes


def test_a_result_inside_the_interval_of_its_row_holds():
    record = make_record(dice=DICE, cases=10)
    low, high = statistics.mean_interval(list(analysis.patient_scores(row(record)).values()))
    mean = sum(DICE) / 10
    assert low < mean < high
    for shift, expected in [(0, True), (high - mean - 1e-6, True), (high - mean + 1e-6, False),
                            (low - mean + 1e-6, True), (low - mean - 1e-6, False)]:  # fmt: skip
        holds, lines = reproduce.verdict(record, again(record, shift), row(record))
        assert holds == expected
        assert f"Dice {100 * mean:.2f} % in the record, {100 * (mean + shift):.2f} % again" in lines[0]
        assert f"{100 * low:.2f} to {100 * high:.2f}" in lines[0]
        assert ("does not hold" in lines[-1]) != expected


def test_the_interval_is_that_of_all_runs_of_the_row():
    """With a better second seed the row's interval moves up."""
    record, other = make_record(dice=DICE, cases=10), make_record(dice=[d + 0.05 for d in DICE], cases=10, seed=1)
    assert "(1 run)" in reproduce.verdict(record, record, row(record))[1][0]
    (_, alone), (_, both) = (reproduce.verdict(record, record, group) for group in (row(record), row(record, other)))
    assert "(2 runs)" in both[0] and alone[0] != both[0]
    assert reproduce.row_of(record, [other, record]).runs == row(record, other).runs


def test_too_few_cases_for_an_interval():
    record = make_record(dice=[0.5, 0.7], cases=2)
    assert math.isnan(statistics.mean_interval([0.5, 0.7]).low)
    assert reproduce.verdict(record, again(record), row(record))[0]
    holds, lines = reproduce.verdict(record, again(record, 0.001), row(record))
    assert not holds and "too few test cases" in lines[0]


def test_what_is_said_of_the_weights():
    environment = {"threads": 1, "packages": {"torch": "2.13.0", "numpy": "2.0"}}
    record = make_record(top={"environment": environment})
    assert "equal, sha256 " + record["weights_sha256"][:16] in reproduce.weights_line(record, again(record))
    old = {key: value for key, value in record.items() if key != "weights_sha256"}
    assert "from before" in reproduce.weights_line(old, record)
    other = again(record, weights_sha256="0" * 64, device={"type": "cuda", "name": "card"},
                  environment={"threads": 2, "packages": {"torch": "2.14.0", "numpy": "2.0"}})
    line = reproduce.weights_line(record, other)
    assert "not equal; device test then, card now, threads 1 then, 2 now, torch 2.13.0 then, 2.14.0 now" in line
    same = reproduce.weights_line(record, again(record, weights_sha256="0" * 64))
    assert "versions, threads and device are the same" in same


def test_a_record_is_found_by_the_beginning_of_its_id(tmp_path):
    for seed in (0, 1):
        records.write(make_record(seed=seed, id=f"LA-lite-ua_mt-s{seed}-aa"), tmp_path)
    assert reproduce.find("LA-lite-ua_mt-s1", tmp_path) == tmp_path / "LA-lite-ua_mt-s1-aa.json"
    for name, expected in [("LA-lite", "2 begin so, expected one: LA-lite-ua_mt-s0-aa, LA-lite-ua_mt-s1-aa"),
                           ("LA-light-ua_mt-s0", "did you mean LA-lite-ua_mt-s0-aa?")]:  # fmt: skip
        with pytest.raises(UserError, match=expected):
            reproduce.find(name, tmp_path)
    with pytest.raises(UserError, match="there are none"):
        reproduce.find("x", tmp_path / "nowhere")


def test_settings_of_another_version_are_refused():
    record = make_record(id="LA-lite-16-vnet-ua_mt-f0-s0-0123abcd")
    with pytest.raises(UserError, match="expected its own id"):
        reproduce.spec_of(record)
    record["spec"]["colour"] = "red"
    with pytest.raises(UserError, match="not the settings of a run of this version .*colour"):
        reproduce.spec_of(record)
