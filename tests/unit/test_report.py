"""The cross-validation report, with numbers worked out by hand."""

import random
import runpy
from pathlib import Path

import pytest

from ssl4mis import records, report

ROOT = Path(__file__).resolve().parents[2]
DISTANCES = [f"{name}_{unit}" for name in ("hd95", "hd95_max", "asd", "assd") for unit in ("voxel", "mm")]


def row(case, label, dice, missed=False):
    """One voxel is 2 mm; a missed structure counts with 50 voxels."""
    distances = {key: None if missed else 6.0 if key.endswith("mm") else 3.0 for key in DISTANCES}
    return {
        "case": case, "class": label, "dice": dice, "jaccard": dice / 2, **distances, "empty_prediction": missed,
        "empty_truth": False, "diagonal_voxel": 50.0, "diagonal_mm": 100.0,
    }  # fmt: skip


def make(method="ua_mt", seed=0, protocol="lite", selection="last", shift=0.0):
    """Seven cases c0 .. c6: dice of `one` is 0, 0.1, .. 0.6 (c0 missed), dice of `two` 0.8."""
    cases = [f"c{number}" for number in range(7)]
    rows = [row(case, "one", n / 10 + shift * (n > 0), missed=n == 0) for n, case in enumerate(cases)]
    rows += [row(case, "two", 0.8) for case in cases]
    return {
        "schema": 1, "id": f"LA-{protocol}-16-vnet-{method}-f0-s{seed}-0123abcd",
        "spec": {"method": method, "dataset": "LA", "protocol": protocol, "labeled": 16, "fold": 0, "seed": seed,
                 "network": "vnet", "labeled_batch": 2, "unlabeled_batch": 2,
                 "iterations": 10, "precision": "32-true"},
        "hp_hash": "0123abcd",
        "split": {"name": "LA-paper", "fold": 0, "folds": 1, "sha256": "ab" * 32, "labeled": [], "unlabeled": [],
                  "test": cases},
        "selection": selection, "evaluation": {}, "classes": ["background", "one", "two"], "cases": rows,
        "timing": {"train_seconds": 3600.0, "evaluate_seconds": None, "iterations_per_second": 2.5},
        "memory": {}, "device": {"type": "cpu", "name": "test"},
        "code": {"version": "1.0", "commit": "abcdef0123456789", "dirty": True}, "environment": {}, "curve": [],
    }  # fmt: skip


def test_one_file_per_data_set_and_protocol(tmp_path):
    runs = [make(), make(protocol="cv5"), make(protocol="peek", selection="test")]
    paths = report.write_reports(runs, tmp_path / "reports")
    assert [path.name for path in paths] == ["LA-cv5.md", "LA-lite.md"]
    assert all(path.read_text().startswith(f"# LA, protocol {path.stem[3:]}\n\n1 runs") for path in paths)


def test_scores_per_class_and_run():
    text = report.render([make(), make(seed=1, shift=0.07)])["LA-lite.md"]
    # one: (2.1 / 7 + 2.52 / 7) / 2 = 0.33, distances (50 + 6 * 3) / 7; missed once in each of the two runs
    group = "| ua_mt (vnet, 32-true, 0123abcd) | LA-published-1 | 16 |"
    assert f"{group} one | 33.00 | 16.50 | 9.71 | 9.71 | 19.43 | 19.43 | 2 | 0 |" in text
    assert f"{group} two | 80.00 | 40.00 | 3.00 | 3.00 | 6.00 | 6.00 | 0 | 0 |" in text
    start = "| LA-lite-16-vnet-ua_mt-f0-s0-0123abcd | LA-paper | LA-published-1 | 0 of 1 | 0 | 55.00 | 27.50 | 6.36 |"
    assert start in text and "| 1 | 0 |  | 1.0 abcdef01 dirty |" in text
    assert "56.50 ± 2.12" in text  # runs of 55 and 58


def test_recipes_are_told_apart_in_every_table():
    """Of one run on other cases only the recipe differs, the settings do not."""
    clean = make() | {"id": "clean", "data": {"recipe": "LA-clean-1", "sha256": "cd" * 32}}
    text = report.render([make(), clean])["LA-lite.md"]
    for data in ("LA-published-1", "LA-clean-1"):
        assert f"0123abcd) | {data} | 16 | one | 30.00 |" in text and f" | LA-paper | {data} | 0 of 1 |" in text
        assert f"### ua_mt (vnet, 32-true, 0123abcd), 16 labeled, split LA-paper, data {data}\n" in text


def test_the_policy_is_named_with_the_numbers():
    texts = {policy: report.render([make()], policy=policy)["LA-lite.md"] for policy in ("penalty", "legacy")}
    assert "counts as the image diagonal" in texts["penalty"] and "counts as 0" in texts["legacy"]
    assert "empty-mask policy `legacy`" in texts["legacy"]
    assert "| one | 30.00 | 15.00 | 2.57 |" in texts["legacy"]  # 6 * 3 / 7


def test_the_worst_five_cases_over_classes_and_runs():
    text = report.render([make(), make(seed=1)])["LA-lite.md"]
    table = text.split("### ua_mt (vnet, 32-true, 0123abcd), 16 labeled")[1]
    found = [line.split(" | ") for line in table.splitlines() if line.startswith("| c") and "Dice" not in line]
    assert [cells[0].removeprefix("| ") for cells in found] == ["c0", "c1", "c2", "c3", "c4"]
    assert found[0][1:] == ["40.00", "26.50", "2", "2 |"] and found[4][1:] == ["60.00", "3.00", "0", "2 |"]


def test_the_text_does_not_depend_on_the_order_of_records():
    runs = [make(method, seed, shift=0.01 * seed) for method in ("cps", "ua_mt") for seed in range(4)]
    text = report.render(runs)
    for seed in range(5):
        random.Random(seed).shuffle(runs)
        for run in runs:
            random.Random(seed).shuffle(run["cases"])
        assert report.render(runs) == text


def test_command_prints_the_paths(tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "benchmarks" / "report.py"))["main"]
    path = records.write(make(), tmp_path / "records")
    assert main(["--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'reports' / 'LA-lite.md'}\n"
    path.write_text("{}")
    for folder in (tmp_path, tmp_path / "absent"):
        assert main(["--results", str(folder)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["leaderboard", "report"])
def test_commands_stay_thin(name):
    assert len((ROOT / "benchmarks" / f"{name}.py").read_text().splitlines()) < 40
