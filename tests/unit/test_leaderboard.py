"""Selection, aggregation and the table, with numbers worked out by hand."""

import csv
import io
import json
import random
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import data_prep
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
    assert (row["Dice"], row["runs"], row["selection"]) == ("80.00", "1", "last")


def test_mean_and_sample_sd_over_two_seeds():
    first = make(0.8, seed=0, timing__iterations_per_second=2.0)
    second = make(rows=[case("a", 0.9, 4.0), case("b", 0.9, 4.0)], seed=1, timing__train_seconds=1800.0)
    (row,) = leaderboard.rows([first, second])
    assert (row["Dice"], row["Dice_sd_seeds"]) == ("85.00", "7.07")  # sd of 80 and 90 is 10 / sqrt 2
    assert (row["Jaccard"], row["Jaccard_sd_seeds"]) == ("42.50", "3.54")
    assert (row["95HD"], row["95HD_sd_seeds"], row["ASD"], row["ASD_sd_seeds"]) == ("3.00", "1.41", "3.00", "1.41")
    assert (row["95HD_mm"], row["ASD_mm_sd_seeds"]) == ("6.00", "2.83")
    assert (row["cases"], row["folds"], row["seeds"], row["runs"], row["complete"]) == ("2", "1", "2", "2", "yes")
    assert (row["iterations_per_s"], row["train_hours"]) == ("2.25", "1.000")
    assert (row["device"], row["iterations"], row["labeled"], row["unlabeled"]) == ("cpu: test", "3000", "16", "64")
    assert list(row) == leaderboard.COLUMNS
    assert all(row[column] == "" for column in row if column.endswith("_sd_folds"))


GRID = {(0, 0): 0.8, (0, 1): 0.9, (1, 0): 0.5, (1, 1): 0.8}  # (fold, seed): Dice


def test_the_spread_of_folds_and_that_of_seeds_are_two_numbers():
    """Seeds 0 and 1 average 65 and 85, folds 0 and 1 85 and 65: means of means, each over the other axis."""
    runs = [make(dice, fold=fold, seed=seed, folds=2) for (fold, seed), dice in GRID.items()]
    (row,) = leaderboard.rows(runs)
    assert (row["Dice"], row["Dice_sd_seeds"], row["Dice_sd_folds"]) == ("75.00", "14.14", "14.14")
    runs[3] = make(1.0, fold=1, seed=1, folds=2)  # seeds 65 and 95, folds 85 and 75
    (row,) = leaderboard.rows(runs)
    assert (row["Dice"], row["Dice_sd_seeds"], row["Dice_sd_folds"]) == ("80.00", "21.21", "7.07")


def test_seeds_with_different_folds_have_no_spread():
    runs = [make(dice, fold=fold, seed=seed, folds=2) for (fold, seed), dice in GRID.items()][:-1]
    (row,) = leaderboard.rows(runs)
    assert (row["Dice_sd_seeds"], row["Dice_sd_folds"], row["complete"]) == ("", "", "no")
    (row,) = leaderboard.rows([runs[0], runs[2]])  # one seed: the folds spread as 80 and 50, seeds do not
    assert (row["Dice_sd_seeds"], row["Dice_sd_folds"]) == ("", "21.21")
    (row,) = leaderboard.rows(runs[:2])  # one of two folds, with both seeds
    assert (row["Dice_sd_seeds"], row["Dice_sd_folds"], row["complete"]) == ("7.07", "", "no")


def test_one_run_has_no_sd_and_unknown_speed_stays_empty():
    (row,) = leaderboard.rows([make(timing__iterations_per_second=None, timing__train_seconds=None)])
    assert all(row[f"{column}_sd_{over}"] == "" for column in leaderboard.METRICS for over in ("folds", "seeds"))
    assert row["iterations_per_s"] == row["train_hours"] == ""


def test_every_distance_has_its_column_in_voxels_and_mm():
    rows = [case("a", 0.8)]
    for number, key in enumerate(DISTANCES):
        rows[0][key] = 1.0 + number
    (row,) = leaderboard.rows([make(rows=rows)])
    columns = ["95HD", "95HD_mm", "95HD_max", "95HD_max_mm", "ASD", "ASD_mm", "ASSD", "ASSD_mm"]
    assert [row[column] for column in columns] == [f"{1.0 + number:.2f}" for number in range(8)]
    assert set(records.DISTANCES) < {key for key, *_ in leaderboard.METRICS.values()}


def bootstrap(values):
    found = stats.bootstrap((np.array(values),), np.mean, n_resamples=9999, method="BCa", rng=np.random.default_rng(0))
    return tuple(f"{100 * limit:.2f}" for limit in found.confidence_interval)


def test_the_interval_is_over_cases_averaged_over_seeds():
    first = [0.9, 0.8, 0.85, 0.4, 0.7, 0.88]
    runs = [make(seed=seed, rows=[case(f"c{n}", dice + 0.02 * seed) for n, dice in enumerate(first)])
            for seed in (0, 1)]
    (row,) = leaderboard.rows(runs)
    assert row["Dice"] == "76.50" and (row["Dice_low"], row["Dice_high"]) == bootstrap([d + 0.01 for d in first])
    assert float(row["Dice_low"]) < 76.5 < float(row["Dice_high"])
    assert row["cases"] == "6"


def test_two_frames_of_a_patient_are_one_sample():
    frames = [0.9, 0.7, 0.6, 0.8, 0.2, 0.4, 0.9, 0.9]
    (row,) = leaderboard.rows([make(rows=[case(f"c{n}", d) for n, d in enumerate(frames)], split__per_patient=2)])
    assert (row["Dice_low"], row["Dice_high"]) == bootstrap([0.8, 0.7, 0.3, 0.9]) and row["cases"] == "8"


def test_an_interval_of_too_few_cases_is_empty_and_one_of_equal_ones_a_point():
    (two,) = leaderboard.rows([make()])
    (same,) = leaderboard.rows([make(rows=[case(name, 0.75) for name in "abc"])])
    assert (two["Dice_low"], two["Dice_high"]) == ("", "")
    assert (same["Dice_low"], same["Dice_high"]) == ("75.00", "75.00")


def calibrated(ece, nll, **changes):
    """Two cases around the given means."""
    rows = [{"case": "a", "ece": ece - 0.01, "nll": nll - 0.1}, {"case": "b", "ece": ece + 0.01, "nll": nll + 0.1}]
    return make(calibration=rows, **changes)


def test_calibration_is_the_mean_of_cases_then_runs():
    (row,) = leaderboard.rows([calibrated(0.02, 0.3), calibrated(0.04, 0.4, seed=1)])
    assert (row["ECE"], row["NLL"]) == ("0.0300", "0.3500")
    assert (row["ECE_sd_seeds"], row["NLL_sd_seeds"]) == ("0.0141", "0.0707")
    assert (row["ECE_sd_folds"], row["NLL_sd_folds"]) == ("", "")


def test_cases_are_counted_once_over_seeds_and_added_over_folds():
    runs = [make(fold=fold, seed=seed, folds=2, rows=[case(f"f{fold}{name}", 0.8) for name in names])
            for fold, names in enumerate(("abc", "ab")) for seed in (0, 1)]  # fmt: skip
    (row,) = leaderboard.rows(runs)
    assert [row[column] for column in ("cases", "folds", "seeds", "runs")] == ["5", "2", "2", "4"]


def test_a_calibration_of_part_of_the_runs_is_no_mean():
    table = leaderboard.rows([calibrated(0.02, 0.3), make(seed=1), make(method="cps")])
    assert len(table) == 2
    assert all(row[column] == "" for row in table for column in ("ECE", "NLL", "ECE_sd_seeds", "NLL_sd_seeds"))


def test_costs_and_memory():
    costs = [{"parameters": 9449000, "forward_passes": 12.0, "backward_passes": passes} for passes in (4.0, 4.5)]
    runs = [make(seed=seed, costs=cost, memory={"peak_mib": mib})
            for seed, (cost, mib) in enumerate(zip(costs, (655.0, 700.4), strict=True))]
    (row,) = leaderboard.rows(runs)
    columns = ("parameters", "forward_passes", "backward_passes", "peak_mib")
    assert [row[column] for column in columns] == ["9449000", "12.00", "4.25", "700"]
    third = make(seed=2, costs=costs[0] | {"forward_passes": None}, memory={"peak_mib": 9.0})
    (row,) = leaderboard.rows([*runs, third])
    assert [row[column] for column in columns] == ["9449000", "", "4.17", "700"]
    (row,) = leaderboard.rows([*runs, make(seed=2)])
    assert [row[column] for column in columns] == [""] * 4


def test_missed_structures_are_summed_over_runs():
    runs = [make(seed=seed, rows=[case("a", 0.8), case("b", 0, empty_prediction=True)]) for seed in range(3)]
    (row,) = leaderboard.rows(runs)
    assert row["missed"] == "3" and row["95HD"] == "26.00" and row["false_alarms"] == "0"
    assert leaderboard.rows(runs, policy="legacy")[0]["95HD"] == "1.00"


def test_false_alarms_are_counted_apart():
    (row,) = leaderboard.rows([two_classes()])
    assert (row["missed"], row["false_alarms"]) == ("1", "1")


def test_complete_means_every_fold_for_every_seed():
    runs = [make(fold=fold, seed=seed, folds=3) for fold in range(3) for seed in (0, 1)]
    assert leaderboard.rows(runs)[0]["complete"] == "yes"
    (row,) = leaderboard.rows(runs[:-1])
    assert (row["complete"], row["rank"], row["runs"], row["folds"], row["seeds"]) == ("no", "", "5", "3", "2")
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
    assert len(table) == 5 and all(row["runs"] == "1" for row in table)
    assert table[-1]["labeled"] == "80" and table[-1]["unlabeled"] == "0"


def test_a_part_of_the_unlabeled_cases_is_its_own_row_and_rank():
    runs = [make(0.7, seed=0), make(0.9, seed=1, spec__unlabeled=32), make(0.8, "cps", spec__unlabeled=32),
            make(0.6, "supervised", spec__unlabeled_batch=0), make(0.5, seed=1, spec__unlabeled=8)]  # fmt: skip
    table = leaderboard.rows(runs)
    assert [(row["method"], row["unlabeled"], row["Dice"], row["rank"]) for row in table] == [
        ("ua_mt", "64", "70.00", "1"), ("supervised", "0", "60.00", "2"), ("ua_mt", "8", "50.00", "1"),
        ("ua_mt", "32", "90.00", "1"), ("cps", "32", "80.00", "2"),
    ]  # fmt: skip


def test_a_control_is_its_own_row_and_never_ranked():
    runs = [make(0.7, seed=0), make(0.9, seed=1, spec__control="noise"), make(0.8, seed=1, spec__control="copies"),
            make(0.6, "cps")]  # fmt: skip
    table = leaderboard.rows(runs)
    assert [(row["method"], row["control"], row["Dice"], row["rank"]) for row in table] == [
        ("ua_mt", "", "70.00", "1"), ("cps", "", "60.00", "2"), ("ua_mt", "copies", "80.00", ""),
        ("ua_mt", "noise", "90.00", ""),
    ]  # fmt: skip


def test_folds_with_different_numbers_of_unlabeled_cases_stay_together():
    runs = [make(fold=0, folds=2), make(fold=1, folds=2, split__unlabeled=["u0", "u1"])]
    (row,) = leaderboard.rows(runs)
    assert (row["unlabeled"], row["complete"]) == ("2/64", "yes")


def test_cases_of_another_recipe_make_their_own_row_and_rank():
    """Records without the entry are of the published files, as are those that say so."""
    old, same = make(0.8, seed=0), make(0.8, seed=1, data={"recipe": "LA-published-1", "sha256": ""})
    clean = [make(0.9, method, data={"recipe": "LA-clean-1", "sha256": "ab"}) for method in ("ua_mt", "cps")]
    table = leaderboard.rows([old, same, *clean])
    assert [(row["data"], row["method"], row["runs"], row["rank"]) for row in table] == [
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
        for seed in range(3):
            rows = [case(f"c{n}", values.random(), values.random()) for n in range(7)]
            calibration = [{"case": f"c{n}", "ece": values.random(), "nll": values.random()} for n in range(7)]
            runs.append(full(method=method, seed=seed, rows=rows, calibration=calibration))
    for fold in range(3):
        rows = [case(f"f{fold}c{n}", values.random(), values.random()) for n in range(7)]
        runs.append(make(fold=fold, folds=3, rows=rows, split="LA-three", calibration=[]))
    return runs


def test_the_text_does_not_depend_on_the_order_of_records():
    runs, published = many(), leaderboard.read_reported(ROOT / "results" / "reported.csv")
    table = leaderboard.rows(runs, published)
    assert {row["published"] for row in table} != {""} and {row["ECE"] for row in table} != {""}
    text, block, page = leaderboard.to_csv(table), leaderboard.markdown(table), leaderboard.html(table)
    for seed in range(5):
        order = random.Random(seed)
        order.shuffle(runs)
        order.shuffle(published)
        for run in runs:
            order.shuffle(run["cases"])
            order.shuffle(run["calibration"])
        table = leaderboard.rows(runs, published)
        assert leaderboard.to_csv(table) == text and leaderboard.markdown(table) == block
        assert leaderboard.html(table) == page
    assert "\r" not in text and text.endswith("\n")


def reported(**changes):
    row = {"method": "ua_mt", "dataset": "LA", "labeled": "8", "unlabeled": "72", "dice": "84.25", "jaccard": "73.48",
           "hd95": "13.8", "asd": "", "backbone": "VNet", "split": "UA-MT list",
           "source": "a paper, table 2"}  # fmt: skip
    return row | changes


def full(dice=0.885, method="ua_mt", **changes):
    """A run that follows the publications."""
    recipe = {"spec__protocol": "paper", "spec__width": 16, "spec__patch": [112, 112, 80], "spec__stride": [18, 18, 4],
              "spec__iterations": 6000}  # fmt: skip
    return make(dice, method, **recipe | changes)


PRINTED = [reported(labeled="16", unlabeled="64", dice=dice, split=split, source=source) for dice, split, source in (
    ("88.88", "UA-MT 80/20 fixed list", "first"), ("88.2", "UA-MT 80/20 fixed list", "second"),
    ("88.51", "UA-MT 80/20 fixed list", "third"), ("70.00", "MCF 5-fold LA (80/20 per fold)", "other list"),
)]  # fmt: skip


@pytest.mark.parametrize(("dice", "place"), [
    (0.885, "in"), (0.88156, "in"), (0.88144, "below"), (0.88884, "in"), (0.88886, "above"), (0.5, "below"),
])
def test_published_values_stand_beside_ours_with_their_sources(dice, place):
    """88.156 is 88.2 at the one digit of the lowest, 88.886 is 88.89 at the two of the highest."""
    (row, *_) = leaderboard.rows([full(dice)], PRINTED)
    assert row["published"] == "88.2 | 88.51 | 88.88" and row["published_source"] == "second | third | first"
    assert row["versus_published"] == place


def test_a_single_published_value_is_a_range_of_one():
    for dice, place in ((0.88506, "in"), (0.88494, "below"), (0.88517, "above")):
        (row, _) = leaderboard.rows([full(dice)], PRINTED[2:3])
        assert (row["published"], row["published_source"], row["versus_published"]) == ("88.51", "third", place)


@pytest.mark.parametrize("change", [
    {"spec__protocol": "lite"}, {"spec__protocol": "gone"}, {"spec__width": 8}, {"spec__patch": [64, 64, 32]},
    {"spec__stride": [9, 9, 2]}, {"spec__iterations": 5999}, {"spec__control": "noise"}, {"spec__unlabeled": 32},
    {"folds": 2}, {"split": "LA-cv5"}, {"data": {"recipe": "LA-clean-1", "sha256": ""}}, {"method": "cps"},
    {"labeled": 8}, {"spec__dataset": "ours"}, {"spec__dataset": "Pancreas"},
])  # fmt: skip
def test_what_does_not_follow_the_publications_has_no_published_value(change):
    followed, other = full(seed=1), full(**change)
    assert leaderboard.rows([followed], PRINTED)[0]["versus_published"] == "in"
    found = {row["versus_published"] for row in leaderboard.rows([other], PRINTED)}
    assert found == {""}


def test_longer_training_and_the_published_files_follow_the_publications():
    """A method's own published number of iterations goes over that of the protocol."""
    runs = [full(spec__iterations=17000, data={"recipe": recipe, "sha256": ""})
            for recipe in ("LA-published-1", "LA-paper-2")]
    assert [row["versus_published"] for row in leaderboard.rows(runs, PRINTED)[:2]] == ["in", "in"]


def test_supervised_rows_are_compared_with_those_without_unlabeled_cases():
    run = full(0.8, "supervised", spec__unlabeled_batch=0)
    (row, *_) = leaderboard.rows([run], [PRINTED[2] | {"method": "supervised", "unlabeled": "0", "dice": "80.00"}])
    assert (row["unlabeled"], row["versus_published"]) == ("0", "in")


def test_a_changed_list_is_not_the_published_one():
    runs = [full(), full(method="cps", split__sha256="cd" * 32)]
    assert {row["published"] for row in leaderboard.rows(runs, PRINTED)} == {""}


# The words of reported.csv for lists that are not ours: test on other cases, were not released, or are not stated.
OTHER_LISTS = {
    "SSL4MIS 70 train; best epoch picked AND reported on val+test (30 patients)",
    "SSL4MIS 70 train; value is on val (10 patients) per CrossMatch issue 6",
    "TraCoCo lists (train 249 of 250; test 60, its page says 20)",
    "62/20 or 62/18, not stated by the quoting source", "CoraNet-BCP lineage (12+50; test 18 or 20; mixed origins)",
    "DTC 62/20 (list not released)", "unclear (released code tests on training cases)",
}  # fmt: skip


def test_every_published_list_is_one_of_ours_or_known_to_be_another():
    published = leaderboard.read_reported(ROOT / "results" / "reported.csv")
    mapped = {text: name for name, texts in leaderboard.PUBLISHED_SPLITS.items() for text in texts}
    assert {row["split"] for row in published} == set(mapped) | OTHER_LISTS and not set(mapped) & OTHER_LISTS
    for row in published:
        if row["split"] in mapped:
            protocols = data_prep.dataset(row["dataset"]).protocols.values()
            assert mapped[row["split"]] in {protocol.split for protocol in protocols if protocol.published}


@pytest.mark.parametrize("name", leaderboard.PUBLISHED_SPLITS)
def test_the_words_of_a_published_list_give_the_numbers_of_ours(name):
    """UA-MT 80/20: 80 training and 20 test cases (patients); of three numbers the second is validation."""
    content = json.loads((data_prep.spec.SPLITS / f"{name}.json").read_text())
    for text in leaderboard.PUBLISHED_SPLITS[name]:
        numbers = [int(number) for number in re.search(r"\d+(/\d+)+", text)[0].split("/")]
        for fold in content["folds"]:
            counts = [len(fold[part]) // content.get("per_patient", 1) for part in ("train", "test")]
            assert counts == [numbers[0], numbers[-1]]


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
    runs = [make(0.8), make(0.9, seed=1), make(0.7, "cps", split="LA-other"), make(0.7, "dtc", spec__network="a|b")]
    text = leaderboard.markdown(leaderboard.rows(runs, [reported(method="paper")]))
    assert "### LA, protocol lite, split LA-other, data LA-published-1\n\nSame in all rows: labeled 16, " in text
    assert "| method | network | Dice ± sd | 95 % CI | 95HD | ASD | seeds | settings |\n" in text
    assert "| ua_mt | vnet | 85.00 ± 7.07 |  | 2.00 | 2.00 | 2 | 0123abcd |\n" in text
    assert "| dtc | a\\|b | 70.00 |  | 2.00 |" in text and "paper |" not in text
    assert leaderboard.markdown(leaderboard.rows([], [reported()])) == "No measured rows yet.\n"


def compact(runs, published=()):
    """The shared line, and the rows by column, of a table with one section."""
    lines = leaderboard.markdown(leaderboard.rows(runs, published)).splitlines()
    header, _, *body = (line.strip("| ").split(" | ") for line in lines if line.startswith("|"))
    shared = [line for line in lines if line.startswith("Same in all rows: ")]
    return shared, [dict(zip(header, map(str.strip, row), strict=True)) for row in body]


def test_what_all_rows_share_stands_above_them_once():
    dice = [0.7, 0.8, 0.9]
    rows = [case(f"c{n}", value) for n, value in enumerate(dice)]
    shared, body = compact([make(rows=rows), make(0.6, "cps", rows=rows, spec__precision="bf16-mixed")])
    assert shared == ["Same in all rows: labeled 16, network vnet, batch 2+2, augmentation none, iterations 3000, "
                      "missed 0, cases 3, folds 1, seeds 1, complete yes."]  # fmt: skip
    low, high = bootstrap(dice)
    assert body == [{"method": method, "precision": precision, "Dice ± sd": "80.00", "95 % CI": f"{low}-{high}",
                     "95HD": "2.00", "ASD": "2.00", "settings": "0123abcd"}
                    for method, precision in (("cps", "bf16"), ("ua_mt", "fp32"))]  # fmt: skip


def test_what_differs_has_a_column():
    missing = [case("a", 0), case("b", 0, empty_prediction=True)]
    _, body = compact([make(folds=2), make(fold=1, folds=2), make(0.7, "cps", labeled=8, folds=2),
                       make(rows=missing, spec__control="noise", folds=2),
                       make(0.5, spec__unlabeled=32, folds=2)])  # fmt: skip
    columns = ("labeled", "unlabeled", "control", "missed", "complete")
    assert [tuple(row[column] for column in columns) for row in body] == [
        ("8", "72", "", "0", "no"), ("16", "64", "", "0", "yes"), ("16", "64", "noise", "1", "no"),
        ("16", "32", "", "0", "no"),
    ]  # fmt: skip
    _, body = compact([make(), make(0.7, "supervised", spec__unlabeled_batch=0)])
    assert "unlabeled" not in body[0] and [row["batch"] for row in body] == ["2+2", "2+0"]
    _, body = compact([make(evaluation__precision="bf16-mixed"), make(0.7, "cps")])
    assert [row["precision"] for row in body] == ["fp32, scored in bf16", "fp32"]


def test_the_short_table_has_the_spread_of_folds_and_the_published_range():
    runs = [make(dice, fold=fold, seed=seed, folds=2) for (fold, seed), dice in GRID.items()]
    shared, body = compact([*runs, make(0.6, "cps", folds=2)])
    assert [(row["Dice ± sd"], row["sd of folds"]) for row in body] == [("75.00 ± 14.14", "14.14"), ("60.00", "")]
    _, body = compact([full(), full(method="cps")], PRINTED)
    assert [row["published"] for row in body] == ["", "in 88.2-88.88"]
    shared, _ = compact([full(0.9)], PRINTED[:1])
    assert ", published above 88.88" in shared[0]


def test_the_printed_tables_fit_80_columns():
    from rich.console import Console

    values = random.Random(0)
    kinds = ("mean_teacher", 2, "bf16-mixed", 2), ("supervised", 4, "32-true", 1)
    runs = [make(method=method, seed=seed, labeled=labeled, spec__labeled_batch=batch, spec__precision=precision,
                 rows=[case(f"c{n}", 0.7 + values.random() / 5, values.random()) for n in range(20)],
                 hp_hash=f"{batch:08x}")
            for labeled in (16, 80) for method, batch, precision, seeds in kinds for seed in range(seeds)]  # fmt: skip
    console = Console(file=io.StringIO(), width=80, force_terminal=True, no_color=True)
    leaderboard.print_table(leaderboard.rows(runs), console)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue()).splitlines()
    tables = [line.split() for line in lines if line.startswith(("method", "mean_teacher", "supervised"))]
    assert len(tables) == 6 and all(len(line.rstrip()) <= 80 for line in lines)
    assert [words[-1] for words in tables if words[0] == "method"] == ["settings"] * 2  # no header is broken
    assert {words[-1] for words in tables if words[0] != "method"} == {"00000002", "00000004"}


def cells(page):
    """The text of each cell of each row."""
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag == "tr":
                found.append([])
            elif tag in ("th", "td"):
                found[-1].append("")

        def handle_data(self, data):
            if found and found[-1] and data.strip():
                found[-1][-1] += data

    Reader().feed(page[:page.index("</table>")])
    return found


def test_html_is_one_page_with_one_table_and_escapes():
    runs = [make(device__name="<script>alert(1)</script> & co"), make(0.7, "cps")]
    table = leaderboard.rows(runs, [reported(source="a source of more than fifty characters is never cut short")])
    page = leaderboard.html(table)
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in page
    assert page.count("<table") == 1 and not re.search(r"(src|href)\s*=|url\(|https?:", page)
    header, *body = cells(page)
    assert "ECE" not in header and {column for column in table[0] if any(row[column] for row in table)} == set(header)
    assert body == [[row[column] for column in header] for row in table]


def test_own_data_that_changed_under_its_name_makes_another_row():
    """Same recipe, same lists, other voxels: only the checksum of the cases tells."""
    first, same, other = (make(0.8, seed=seed, data={"recipe": "mine-clean-1", "sha256": sha})
                          for seed, sha in ((0, "ab" * 32), (1, "ab" * 32), (2, "cd" * 32)))
    assert [row["data"] for row in leaderboard.rows([first, same])] == ["mine-clean-1"]
    table = leaderboard.rows([first, same, other])
    found = {(row["data"], row["runs"]) for row in table}
    assert found == {("mine-clean-1@abababab", "2"), ("mine-clean-1@cdcdcdcd", "1")}


def test_voxels_of_unknown_size_have_no_mm():
    known, unknown = (make(data={"recipe": "ACDC-published-1", "sha256": "", "spacing_known": told})
                      for told in (True, False))
    (shown,), (blank,) = leaderboard.rows([known]), leaderboard.rows([unknown])
    assert shown["95HD_mm"] and shown["ASD_mm"] and shown["95HD"] == blank["95HD"]
    assert blank["95HD_mm"] == blank["ASD_mm"] == ""


README = "# Title\n<!-- leaderboard:begin -->\nold\n<!-- leaderboard:end -->\ntail\n"


def test_the_readme_block_is_replaced_and_nothing_else():
    block = leaderboard.markdown(leaderboard.rows([make()]))
    text = leaderboard.replace_block(README, block)
    assert text == README.replace("old\n", block) and leaderboard.replace_block(text, block) == text
    for unmarked in ("no markers\n", "<!-- leaderboard:begin --> open"):
        assert leaderboard.replace_block(unmarked, block) == unmarked


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
    assert "| ua_mt | 80.00 |" in readme.read_text()
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
    absent = ["--results", str(tmp_path), "--readme", str(tmp_path / "absent.md")]  # beside the broken record
    for options, lines in ((absent[:2], 1), (["--results", str(tmp_path / "absent")], 1), (absent, 2)):
        assert main(options) == 2
        assert capsys.readouterr().err.count("\n") == lines


def test_a_broken_record_is_named_and_the_others_are_used(main, tmp_path, capsys):
    good, bad = make(0.8), make(0.7, "cps")
    records.write(good, tmp_path / "records")
    path = records.write(bad, tmp_path / "records")
    path.write_text("{")
    assert main(["--results", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and str(path) in said.err and "ua_mt" in said.out
    table = (tmp_path / "leaderboard.csv").read_text()
    assert table.count("measured") == 1 and "ua_mt" in table
    assert main(["--results", str(tmp_path), "--check"]) == 2


# --- part of the rows, and other forms --------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path):
    """A results folder below a README, with nothing generated yet."""
    for run in (make(0.8), make(0.7, "cps"), make(0.6, labeled=8)):
        records.write(run, tmp_path / "results" / "records")
    (tmp_path / "results" / "reported.csv").write_text(
        ",".join(leaderboard.REPORTED) + "\nua_mt,LA,8,72,84.25,73.48,13.8,,VNet,UA-MT list,a paper\n")
    (tmp_path / "README.md").write_text(README)
    return tmp_path / "results"


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("options", "expected"), [
    ([], [("ua_mt", "8", "1"), ("ua_mt", "16", "1"), ("cps", "16", "2"), ("ua_mt", "8", "")]),
    (["--method", "CPS"], [("cps", "16", "2")]),
    (["--labeled", "8"], [("ua_mt", "8", "1"), ("ua_mt", "8", "")]),
    (["--labeled", "8, 16", "--network", "vnet", "--method", "ua_mt"],
     [("ua_mt", "8", "1"), ("ua_mt", "16", "1"), ("ua_mt", "8", "")]),
    (["--method", "cps", "--method", "ua_mt", "--protocol", "lite", "--dataset", "la", "--labeled", "16"],
     [("ua_mt", "16", "1"), ("cps", "16", "2")]),
])
def test_filters_choose_rows_and_keep_their_ranks(main, results, capsys, options, expected):
    before = files(results.parent)
    assert main(["--results", str(results), "--format", "csv", *options]) == 0
    found = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["method"], row["labeled"], row["rank"]) for row in found] == expected
    assert files(results.parent) == before


@pytest.mark.parametrize(("options", "message"), [
    (["--method", "cp"], "method 'cp' is in no row, expected one of cps, ua_mt"),
    (["--labeled", "16,4"], "labeled '4' is in no row, expected one of 8, 16"),
    (["--protocol", "paper"], "protocol 'paper' is in no row, expected one of lite"),
    (["--method", "cps", "--labeled", "8"], "no row has labeled 8, method cps, expected values that occur together"),
    (["--out", "{}/leaderboard.csv"], "leaderboard.csv: holds all rows, expected another file"),
    (["--out", "{}/records"], "records: a folder, expected a file"),
    (["--format", "md", "--out", "{}/../README.md"], "README.md: holds all rows, expected another file"),
])
def test_what_cannot_be_chosen_is_one_line_and_status_2(main, results, capsys, options, message):
    before = files(results.parent)
    assert main(["--results", str(results), *(option.format(results) for option in options)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert files(results.parent) == before


def test_check_is_about_all_rows(main, results, capsys):
    for options in (["--check", "--method", "cps"], ["--check", "--format", "csv"], ["--readme", "x", "--out", "y"]):
        with pytest.raises(SystemExit) as stopped:
            main(["--results", str(results), *options])
        assert stopped.value.code == 2 and "expected no filter" in capsys.readouterr().err


@pytest.mark.parametrize("form", leaderboard.FORMATS)
def test_every_form_goes_to_standard_output_or_a_file(main, results, tmp_path, capsys, form):
    table = leaderboard.read_table(results)
    assert main(["--results", str(results), "--format", form]) == 0
    printed = capsys.readouterr().out
    assert main(["--results", str(results), "--format", form, "--out", str(tmp_path / "new" / "x")]) == 0
    assert (tmp_path / "new" / "x").read_text() == printed and capsys.readouterr().out == ""
    whole = {"csv": leaderboard.to_csv, "md": leaderboard.markdown, "html": leaderboard.html}
    assert printed == whole[form](table) if form in whole else "3 measured rows, 1 reported rows" in printed


def test_help_is_quick():
    """What loads slowly is loaded where it is needed; in the process of `--help` it never is."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import runpy\n"
            f"try: runpy.run_path({str(ROOT / 'benchmarks' / 'leaderboard.py')!r})['main'](['--help'])\n"
            "except SystemExit as done: assert done.code == 0\n"
            "slow = {'torch', 'scipy', 'pandas', 'matplotlib', 'numpy', 'jinja2', 'rich'}\n"
            "print('loaded:', sorted(slow & set(sys.modules)))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loaded: []\n") and "--format" in done.stdout
