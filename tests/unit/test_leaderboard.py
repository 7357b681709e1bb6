"""Selection, aggregation and the table, with numbers worked out by hand."""

import csv
import io
import random
import runpy
from pathlib import Path

import pytest

from ssl4mis import leaderboard, records, selection

ROOT = Path(__file__).resolve().parents[2]
DISTANCES = [f"{name}_{unit}" for name in ("hd95", "hd95_max", "asd", "assd") for unit in ("voxel", "mm")]


def case(name, dice, distance=2.0, label="organ", empty_prediction=False, empty_truth=False):
    """Distances in mm are twice those in voxels; the diagonal is 50 voxels, 100 mm."""
    distances = {key: distance * (2 if key.endswith("mm") else 1) for key in DISTANCES}
    if empty_prediction != empty_truth:
        dice, distances = 0.0, dict.fromkeys(DISTANCES)
    return {
        "case": name, "class": label, "dice": dice, "jaccard": dice / 2, **distances,
        "empty_prediction": empty_prediction, "empty_truth": empty_truth, "diagonal_voxel": 50.0, "diagonal_mm": 100.0,
    }  # fmt: skip


def make(dice=0.8, method="ua_mt", fold=0, seed=0, labeled=16, folds=1, rows=None, split="LA-paper", **changes):
    rows = rows or [case("a", dice), case("b", dice)]
    spec = {"method": method, "dataset": "LA", "protocol": "lite", "labeled": labeled, "fold": fold, "seed": seed,
            "network": "vnet", "labeled_batch": 2, "unlabeled_batch": 2,
            "iterations": 3000, "precision": "32-true"}  # fmt: skip
    record = {
        "schema": 1, "id": f"LA-lite-{labeled}-vnet-{method}-f{fold}-s{seed}-0123abcd", "spec": spec,
        "hp_hash": "0123abcd",
        "split": {"name": split, "fold": fold, "folds": folds, "sha256": f"{fold:064x}",
                  "labeled": [f"l{n}" for n in range(labeled)], "unlabeled": [f"u{n}" for n in range(80 - labeled)],
                  "test": list(dict.fromkeys(row["case"] for row in rows))},
        "selection": "last", "evaluation": {}, "classes": ["background", *dict.fromkeys(row["class"] for row in rows)],
        "cases": rows, "timing": {"train_seconds": 5400.0, "evaluate_seconds": 1800.0, "iterations_per_second": 2.5},
        "memory": {}, "device": {"type": "cpu", "name": "test"}, "code": {}, "environment": {}, "curve": [],
    }  # fmt: skip
    for path, value in changes.items():
        *parents, key = path.split("__")
        target = record
        for name in parents:
            target = target[name]
        target[key] = value
    return record


def two_classes():
    """Class one: dice 1 and 0.5; class two: one missed, one false alarm."""
    return make(rows=[
        case("a", 1.0, 1.0, "one"), case("b", 0.5, 4.0, "one"),
        case("a", 0.0, label="two", empty_prediction=True), case("b", 0.0, label="two", empty_truth=True),
    ])  # fmt: skip


def test_run_scores_average_cases_then_classes_and_punish_empty_masks():
    scores = selection.run_scores(two_classes())
    assert scores["dice"] == (0.75 + 0) / 2 and scores["jaccard"] == (0.375 + 0) / 2
    assert scores["hd95_voxel"] == (2.5 + 50) / 2 and scores["assd_mm"] == (5 + 100) / 2
    assert (scores["missed"], scores["false_alarm"]) == (1, 1)
    assert scores["classes"]["one"]["asd_mm"] == 5 and scores["classes"]["one"]["missed"] == 0
    assert scores["classes"]["two"]["asd_voxel"] == 50 and scores["classes"]["two"]["missed"] == 1


def test_the_legacy_policy_puts_zero_and_changes_nothing_else():
    penalty, legacy = (selection.run_scores(two_classes(), policy) for policy in ("penalty", "legacy"))
    assert legacy["hd95_voxel"] == 2.5 / 2 and legacy["asd_mm"] == 5 / 2
    assert legacy["dice"] == penalty["dice"] and legacy["missed"] == penalty["missed"] == 1


def test_two_empty_masks_agree():
    scores = selection.run_scores(make(rows=[case("a", 1.0, 0.0, empty_prediction=True, empty_truth=True)]))
    assert scores["dice"] == 1 and scores["hd95_mm"] == 0 and scores["missed"] == scores["false_alarm"] == 0


def test_unknown_rules_and_policies_name_the_known_ones():
    with pytest.raises(ValueError, match="'best' is unknown, expected one of last"):
        selection.select([], "best")
    with pytest.raises(ValueError, match="expected one of penalty, legacy"):
        selection.run_scores(make(), "zero")


def test_only_records_of_the_rule_count():
    peeked = make(0.99, seed=1, selection="test")
    assert selection.select([peeked, make()]) == [make()]
    (row,) = leaderboard.rows([peeked, make()])
    assert (row["Dice"], row["n"], row["selection"]) == ("80.00", "1", "last")


def test_mean_and_sample_sd_over_two_runs():
    first = make(0.8, seed=0, timing__iterations_per_second=2.0)
    second = make(rows=[case("a", 0.9, 4.0), case("b", 0.9, 4.0)], seed=1, timing__train_seconds=1800.0)
    (row,) = leaderboard.rows([first, second])
    assert (row["Dice"], row["Dice_sd"]) == ("85.00", "7.07")  # sd of 80 and 90 is 10 / sqrt 2
    assert (row["Jaccard"], row["Jaccard_sd"]) == ("42.50", "3.54")
    assert (row["95HD"], row["95HD_sd"], row["ASD"], row["ASD_sd"]) == ("3.00", "1.41", "3.00", "1.41")
    assert (row["95HD_mm"], row["ASD_mm"]) == ("6.00", "6.00")
    assert (row["n"], row["folds"], row["seeds"], row["complete"]) == ("2", "1", "2", "yes")
    assert (row["iterations_per_s"], row["hours"]) == ("2.25", "1.500")
    assert (row["device"], row["iterations"], row["labeled"], row["unlabeled"]) == ("cpu: test", "3000", "16", "64")
    assert list(row) == leaderboard.COLUMNS


def test_one_run_has_no_sd_and_unknown_speed_stays_empty():
    (row,) = leaderboard.rows([make(timing__iterations_per_second=None)])
    assert [row[key] for key in ("Dice_sd", "Jaccard_sd", "95HD_sd", "ASD_sd", "iterations_per_s")] == [""] * 5


def test_missed_structures_are_summed_over_runs():
    runs = [make(seed=seed, rows=[case("a", 0.8), case("b", 0, empty_prediction=True)]) for seed in range(3)]
    (row,) = leaderboard.rows(runs)
    assert row["missed"] == "3" and row["95HD"] == "26.00"
    assert leaderboard.rows(runs, policy="legacy")[0]["95HD"] == "1.00"


def test_complete_means_every_fold_for_every_seed():
    runs = [make(fold=fold, seed=seed, folds=3) for fold in range(3) for seed in (0, 1)]
    assert leaderboard.rows(runs)[0]["complete"] == "yes"
    (row,) = leaderboard.rows(runs[:-1])
    assert (row["complete"], row["rank"], row["n"], row["folds"], row["seeds"]) == ("no", "", "5", "3", "2")
    assert leaderboard.rows(runs[:1])[0]["complete"] == "no"


def test_ranks_are_by_dice_among_complete_rows_of_one_split_and_label_count():
    runs = [make(0.7, "cps"), make(0.9, "bcp"), make(0.7, "dtc"), make(0.5, "supervised"),
            make(0.6, "cps", labeled=8), make(0.95, "cps", split="LA-other", id="x"),
            make(0.99, "ua_mt", folds=2)]  # fmt: skip
    table = leaderboard.rows(runs, [reported(dice="99.9", labeled="16", unlabeled="64")])
    ranks = {(row["method"], row["split"], row["labeled"], row["source"]): row["rank"] for row in table}
    assert ranks == {
        ("bcp", "LA-paper", "16", "measured"): "1", ("cps", "LA-paper", "16", "measured"): "2",
        ("dtc", "LA-paper", "16", "measured"): "2", ("supervised", "LA-paper", "16", "measured"): "4",
        ("cps", "LA-paper", "8", "measured"): "1", ("cps", "LA-other", "16", "measured"): "1",
        ("ua_mt", "LA-paper", "16", "measured"): "", ("ua_mt", "UA-MT list", "16", "reported"): "",
    }  # fmt: skip


def test_the_table_is_ordered():
    runs = [make(0.7, "cps"), make(0.9, "dtc"), make(0.8, "bcp", folds=2), make(0.6, "cps", labeled=8)]
    table = leaderboard.rows(runs, [reported(labeled="16"), reported(labeled="8"), reported(dataset="ACDC")])
    assert [(row["dataset"], row["labeled"], row["method"], row["rank"]) for row in table] == [
        ("LA", "8", "cps", "1"), ("LA", "16", "dtc", "1"), ("LA", "16", "cps", "2"), ("LA", "16", "bcp", ""),
        ("ACDC", "8", "ua_mt", ""), ("LA", "8", "ua_mt", ""), ("LA", "16", "ua_mt", ""),
    ]  # fmt: skip


def test_all_that_defines_a_result_makes_its_own_row():
    runs = [make(), make(seed=1, hp_hash="ffff0000"), make(seed=2, spec__precision="bf16-mixed"),
            make(seed=3, spec__network="unet"), make(labeled=80)]  # fmt: skip
    table = leaderboard.rows(runs)
    assert len(table) == 5 and all(row["n"] == "1" for row in table)
    assert table[-1]["labeled"] == "80" and table[-1]["unlabeled"] == "0"


def test_cases_of_another_recipe_make_their_own_row_and_rank():
    """Records without the entry are of the published files, as are those that say so."""
    old, same = make(0.8, seed=0), make(0.8, seed=1, data={"recipe": "LA-published-1", "sha256": ""})
    clean = [make(0.9, method, data={"recipe": "LA-clean-1", "sha256": "ab"}) for method in ("ua_mt", "cps")]
    table = leaderboard.rows([old, same, *clean])
    assert [(row["data"], row["method"], row["n"], row["rank"]) for row in table] == [
        ("LA-clean-1", "cps", "1", "1"), ("LA-clean-1", "ua_mt", "1", "1"), ("LA-published-1", "ua_mt", "2", "1")]
    titles = [line for line in leaderboard.markdown(table).splitlines() if line.startswith("### ")]
    assert [title.rpartition(", ")[2] for title in titles] == ["data LA-clean-1", "data LA-published-1"]


def test_patients_are_counted_as_they_were_labeled():
    (row,) = leaderboard.rows([make(split__per_patient=2)])
    assert (row["labeled"], row["unlabeled"]) == ("16", "32")


def test_a_changed_list_is_another_split():
    old, new = make(0.8), make(0.9, "cps", split__sha256="cd" * 32)
    table = leaderboard.rows([old, new])
    assert {(row["split"], row["rank"]) for row in table} == {("LA-paper@00000000", "1"), ("LA-paper@cdcdcdcd", "1")}
    assert {row["split"] for row in leaderboard.rows([old])} == {"LA-paper"}


def test_two_records_of_one_run_are_refused():
    with pytest.raises(ValueError, match="records LA-lite.* and other are the same run"):
        leaderboard.rows([make(), make(0.9, id="other")])


def test_devices_are_told_apart():
    (row,) = leaderboard.rows([make(), make(seed=1, device__type="cuda", device__name="H")])
    assert row["device"] == "cpu: test + cuda: H"


def many():
    values = random.Random(0)
    runs = []
    for method in ("cps", "ua_mt"):
        for fold in range(3):
            for seed in range(3):
                rows = [case(f"c{n}", values.random(), values.random()) for n in range(7)]
                runs.append(make(method=method, fold=fold, seed=seed, folds=3, rows=rows))
    return runs


def test_the_text_does_not_depend_on_the_order_of_records():
    runs, published = many(), leaderboard.read_reported(ROOT / "results" / "reported.csv")
    table = leaderboard.rows(runs, published)
    text, block = leaderboard.to_csv(table), leaderboard.markdown(table)
    for seed in range(5):
        order = random.Random(seed)
        order.shuffle(runs)
        order.shuffle(published)
        for run in runs:
            order.shuffle(run["cases"])
        table = leaderboard.rows(runs, published)
        assert leaderboard.to_csv(table) == text and leaderboard.markdown(table) == block
    assert "\r" not in text and text.endswith("\n")


def reported(**changes):
    row = {"method": "ua_mt", "dataset": "LA", "labeled": "8", "unlabeled": "72", "dice": "84.25", "jaccard": "73.48",
           "hd95": "13.8", "asd": "", "backbone": "VNet", "split": "UA-MT list",
           "source": "a paper, table 2"}  # fmt: skip
    return row | changes


def test_reported_rows_pass_through_as_published():
    (row,) = leaderboard.rows([], [reported()])
    filled = {key: value for key, value in row.items() if value}
    assert filled == {
        "source": "reported", "dataset": "LA", "split": "UA-MT list", "labeled": "8", "unlabeled": "72",
        "method": "ua_mt", "network": "VNet", "Dice": "84.25", "Jaccard": "73.48", "95HD": "13.8",
        "reference": "a paper, table 2",
    }  # fmt: skip


def test_every_committed_reported_row_is_in_the_table():
    published = leaderboard.read_reported(ROOT / "results" / "reported.csv")
    table = list(csv.DictReader(io.StringIO(leaderboard.to_csv(leaderboard.rows([], published)))))
    pairs = {"method": "method", "dice": "Dice", "hd95": "95HD", "asd": "ASD", "split": "split", "source": "reference"}
    assert sorted(tuple(row[old] for old in pairs) for row in published) == sorted(
        tuple(row[new] for new in pairs.values()) for row in table
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("method,dice\nx,1\n", "columns"),
        (",".join(leaderboard.REPORTED) + "\na,b\n", "row 2 has the wrong number"),
        (",".join(leaderboard.REPORTED) + "\nm,LA,8,72,high,,,,V,s,p\n", "row 2, dice is 'high'"),
        (",".join(leaderboard.REPORTED) + "\nm,LA,,72,90,,,,V,s,p\n", "row 2, labeled is ''"),
    ],
)
def test_broken_reported_files_are_named(text, message, tmp_path):
    path = tmp_path / "reported.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        leaderboard.read_reported(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_markdown_shows_measured_rows_only():
    runs = [make(0.8), make(0.9, seed=1), make(0.7, "cps", split="LA-other"), make(0.7, "dtc", device__name="a|b")]
    text = leaderboard.markdown(leaderboard.rows(runs, [reported(method="paper")]))
    assert "### LA, protocol lite, split LA-other, data LA-published-1\n\n| method | labeled |" in text
    assert (
        "| ua_mt | 16 | vnet | 2+2 | 3000 | 32-true | 85.00 ± 7.07 | 42.50 | 2.00 | 2.00 | 0 | 2 | yes | 2.50 |" in text
    )
    fast = make(0.6, evaluation__precision="bf16-mixed", evaluation__patch=[8])
    assert "| 32-true, scored in bf16-mixed | 60.00 |" in leaderboard.markdown(leaderboard.rows([fast], []))
    assert "| dtc | 16 | vnet | 2+2 | 3000 | 32-true | 70.00 |" in text and "cpu: a\\|b" in text
    assert "paper |" not in text
    assert leaderboard.markdown(leaderboard.rows([], [reported()])) == "No measured rows yet.\n"


def test_own_data_that_changed_under_its_name_makes_another_row():
    """Same recipe, same lists, other voxels: only the checksum of the cases tells."""
    first, same, other = (make(0.8, seed=seed, data={"recipe": "mine-clean-1", "sha256": sha})
                          for seed, sha in ((0, "ab" * 32), (1, "ab" * 32), (2, "cd" * 32)))
    assert [row["data"] for row in leaderboard.rows([first, same])] == ["mine-clean-1"]
    table = leaderboard.rows([first, same, other])
    found = {(row["data"], row["n"]) for row in table}
    assert found == {("mine-clean-1@abababab", "2"), ("mine-clean-1@cdcdcdcd", "1")}


def test_voxels_of_unknown_size_have_no_mm():
    known, unknown = (make(data={"recipe": "ACDC-published-1", "sha256": "", "spacing_known": told})
                      for told in (True, False))
    (shown,), (blank,) = leaderboard.rows([known]), leaderboard.rows([unknown])
    assert shown["95HD_mm"] and shown["ASD_mm"] and shown["95HD"] == blank["95HD"]
    assert blank["95HD_mm"] == blank["ASD_mm"] == ""


README = "# Title\n<!-- leaderboard:begin -->\nold\n<!-- leaderboard:end -->\ntail\n"


def test_the_readme_block_is_replaced_and_nothing_else(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(README)
    table = leaderboard.rows([make()])
    assert leaderboard.update_readme(path, table)
    block = leaderboard.markdown(table)
    assert path.read_text() == README.replace("old\n", block)
    assert not leaderboard.update_readme(path, table)
    path.write_text("no markers\n")
    assert not leaderboard.update_readme(path, table)
    assert leaderboard.replace_block("<!-- leaderboard:begin --> open", block) == "<!-- leaderboard:begin --> open"


@pytest.fixture
def main():
    return runpy.run_path(str(ROOT / "benchmarks" / "leaderboard.py"))["main"]


def test_command_writes_then_check_agrees(main, tmp_path, capsys):
    results, readme = tmp_path / "results", tmp_path / "README.md"
    records.write(make(), results / "records")
    readme.write_text(README)
    options = ["--results", str(results)]
    assert main([*options, "--check"]) == 1
    found = capsys.readouterr().err
    assert "leaderboard.csv differs" in found and "README.md differs" in found
    assert not (results / "leaderboard.csv").exists() and readme.read_text() == README
    assert main(options) == 0
    assert "1 measured rows, 0 reported rows" in capsys.readouterr().out
    assert "| ua_mt | 16 |" in readme.read_text()
    assert main([*options, "--check"]) == 0
    records.write(make(0.9, seed=1), results / "records")
    assert main([*options, "--check"]) == 1
    assert main(options) == main([*options, "--check"]) == 0


def test_a_demo_below_the_results_leaves_the_readme_alone(main, tmp_path):
    (tmp_path / "README.md").write_text(README)
    records.write(make(), tmp_path / "results" / "demo" / "records")
    assert main(["--results", str(tmp_path / "results" / "demo")]) == 0
    assert (tmp_path / "README.md").read_text() == README


def test_bad_input_is_one_line_and_status_2(main, tmp_path, capsys):
    path = records.write(make(), tmp_path / "records")
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 9'))
    for options in (["--results", str(tmp_path)], ["--results", str(tmp_path / "absent")],
                    ["--results", str(tmp_path), "--readme", str(tmp_path / "absent.md")]):  # fmt: skip
        assert main(options) == 2
        assert capsys.readouterr().err.count("\n") == 1
