"""The report: its figures computed again from the records it names, by hand and by SciPy, and what it cannot know."""

import copy
import csv
import html
import html.parser
import random
import re
import runpy
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev

import nibabel
import numpy as np
import pytest
from scipy import stats
from unit.making import DIAGONAL, make_curve, make_peek, make_record

import data_prep
from ssl4mis import leaderboard, records, report
from ssl4mis.pictures import Scans

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "img", "br", "link", "input", "hr"}


def page(runs, peeks=(), reported=(), scans=None, **options):
    """HTML and Markdown of the only page."""
    texts = report.render(runs, peeks, reported, scans, **options)
    (first, second) = texts
    assert first.endswith(".html") and second == first.removesuffix("html") + "md"
    return texts[first], texts[second]


def tables(markdown):
    """(section, text above) -> rows as dicts, of all tables of a Markdown report."""
    found, section, above, lines = {}, "", "", markdown.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("## "):
            section = line[3:]
        if line.startswith("| ---"):
            header, rows = cells(lines[number - 1]), []
            for row in lines[number + 1 :]:
                if not row.startswith("|"):
                    break
                rows.append(dict(zip(header, cells(row), strict=True)))
            assert (section, above) not in found
            found[section, above] = rows
        elif line and not line.startswith("|"):
            above = line
    return found


def cells(line):
    """The cells of a line, where \\| is a pipe of its text."""
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def table(markdown, section, above=""):
    (rows,) = [rows for (title, text), rows in tables(markdown).items() if title == section and text.startswith(above)]
    return rows


class Reader(html.parser.HTMLParser):
    """Tags, attributes, ids, cells and text of a page; an assertion where a tag is not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.tables, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *entry) for entry in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *entry) for entry in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += text
        if "style" not in self.open:
            self.text += text


def real():
    """The committed LA runs, as the page of 16 labels has them."""
    return records.read_all(ROOT / "results" / "records")


@pytest.fixture(scope="module")
def la():
    runs = real()
    text, markdown = page(runs, dataset="LA", protocol="lite", labeled=16)
    return {run["id"]: run for run in runs}, text, markdown


@pytest.fixture(scope="module")
def named(la):
    """R number -> record, as the end of the page lists them."""
    by_id, _, markdown = la
    return {row["run"]: by_id[row["record id"]] for row in table(markdown, "How it was computed", "All records")}


def of(row, named):
    """The records that a row names: R1, R3 to R5."""
    found = []
    for part in row["records"].split(", "):
        first, _, last = part.partition(" to ")
        found += [named[f"R{number}"] for number in range(int(first[1:]), int((last or first)[1:]) + 1)]
    return found


def mean_of(runs, key):
    """Mean over the runs of the mean over classes of the mean over cases; a null distance is the diagonal."""
    def value(row):
        return row[f"diagonal_{key.rpartition('_')[2]}"] if row[key] is None else row[key]

    return fmean(
        fmean(fmean(value(row) for row in run["cases"] if row["class"] == name) for name in run["classes"][1:])
        for run in runs
    )


def dice_of(runs):
    """Case -> mean Dice over classes and runs."""
    names = sorted({row["case"] for run in runs for row in run["cases"]})
    return {name: fmean(fmean(row["dice"] for row in run["cases"] if row["case"] == name) for run in runs
                        if any(row["case"] == name for row in run["cases"])) for name in names}


COLUMNS = {"Dice [%]": ("dice", 100), "Jaccard [%]": ("jaccard", 100), "95HD": ("hd95_voxel", 1),
           "ASD": ("asd_voxel", 1), "95HD [voxel]": ("hd95_voxel", 1), "ASD [voxel]": ("asd_voxel", 1),
           "95HD [mm]": ("hd95_mm", 1), "ASD [mm]": ("asd_mm", 1)}  # fmt: skip


def check_scores(row, runs):
    seen = [name for name in COLUMNS if name in row]
    assert len(seen) >= 4
    for name in seen:
        key, factor = COLUMNS[name]
        assert row[name] == f"{factor * mean_of(runs, key):.2f}"


def test_the_leaderboard_of_the_real_runs(la, named):
    rows = table(la[2], "Leaderboard", "Best first")
    assert len(rows) > 6
    for row in rows:
        runs = of(row, named)
        check_scores(row, runs)
        seeds = [100 * mean_of([run], "dice") for run in runs]
        assert row["sd seeds"] == (f"{stdev(seeds):.2f}" if len(seeds) > 1 else "")
        assert row["95 % interval"] == interval(list(dice_of(runs).values()), 100, "")
    means = [float(row["Dice [%]"]) for row in rows]
    assert means == sorted(means, reverse=True) and [row["rank"] for row in rows][0] == "1"


def interval(values, factor, sign="+"):
    found = stats.bootstrap((np.array(values),), np.mean, n_resamples=9999, method="BCa",
                            rng=np.random.default_rng(0)).confidence_interval  # fmt: skip
    return f"[{factor * found.low:{sign}.2f}, {factor * found.high:{sign}.2f}]"


def holm(ps):
    """By the definition: the k-th smallest of m times m - k + 1, no smaller than the ones before, at most 1."""
    order = np.argsort(ps)
    steps = np.maximum.accumulate([(len(ps) - k) * ps[place] for k, place in enumerate(order)])
    found = np.empty(len(ps))
    found[order] = np.minimum(steps, 1)
    return found


def p_text(p):
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def plain(cell):
    """What Markdown shows for the text of a cell."""
    return html.unescape(cell)


@pytest.mark.parametrize("above", ["Dice against supervised", "Dice against the row", "Dice, every pair"])
def test_the_paired_comparisons_of_the_real_runs_agree_with_scipy(la, named, above):
    """The differences of the cases are taken from the records behind the two names, and tested here again."""
    names = {row["method"]: of(row, named) for row in table(la[2], "Leaderboard", "Best first")}
    rows = table(la[2], "Paired comparisons", above)
    assert len(rows) >= 6
    ps = []
    for row in rows:
        first, second = (dice_of(names[row[key]]) for key in ("first", "second"))
        differences = np.round([first[case] - second[case] for case in sorted(first)], 12)
        assert row["n"] == str(len(differences))
        assert row["first - second [points]"] == f"{100 * differences.mean():+.2f}"
        assert row["95 % interval"] == interval(differences, 100)
        counts = (differences > 0).sum(), (differences == 0).sum(), (differences < 0).sum()
        assert row["wins / ties / losses"] == " / ".join(map(str, counts))
        ps.append(stats.wilcoxon(differences, zero_method="wilcox").pvalue)
        assert plain(row["p"]) == p_text(ps[-1])
    if above == "Dice against the row":  # of the family of all pairs, which the next table has
        whole = {frozenset((row["first"], row["second"])): row["p (Holm)"]
                 for row in table(la[2], "Paired comparisons", "Dice, every pair")}  # fmt: skip
        assert [row["p (Holm)"] for row in rows] == [whole[frozenset((r["first"], r["second"]))] for r in rows]
    else:
        assert [plain(row["p (Holm)"]) for row in rows] == list(map(p_text, holm(ps)))


def test_the_best_row_and_the_baselines_of_the_real_runs(la, named):
    board = table(la[2], "Leaderboard", "Best first")
    assert {row["second"] for row in table(la[2], "Paired comparisons", "Dice against the row")} == {board[0]["method"]}
    names = {row["method"]: of(row, named)[0]["spec"] for row in board}
    for row in table(la[2], "Paired comparisons", "Dice against supervised"):
        first, second = names[row["first"]], names[row["second"]]
        assert second["method"] == "supervised" and first["method"] != "supervised"
        for key in ("network", "precision", "labeled_batch", "iterations", "labeled"):
            assert first[key] == second[key]


def test_the_cliques_of_the_real_runs(la):
    """All runs of neighbours, without those within a larger one, by the p-values of the table of all pairs."""
    p = {frozenset((row["first"], row["second"])): 0 if row["p (Holm)"].startswith("&lt;") else float(row["p (Holm)"])
         for row in table(la[2], "Paired comparisons", "Dice, every pair")}  # fmt: skip
    order = [row["method"] for row in table(la[2], "Leaderboard", "Best first")]
    runs = [order[a:b] for a in range(len(order)) for b in range(a + 2, len(order) + 1)
            if all(p[frozenset(pair)] >= 0.05 for pair in combinations(order[a:b], 2))]  # fmt: skip
    largest = [run for run in runs if not any(set(run) < set(other) for other in runs)]
    assert f"Joined: {'; '.join(', '.join(run) for run in largest)}." in la[2]


def test_the_other_tables_of_the_real_runs(la, named):
    text = la[2]
    names = {row["method"]: of(row, named) for row in table(text, "Leaderboard", "Best first")}
    for row in table(text, "Runs, folds, classes and cases", "Runs"):
        check_scores(row, [named[row["run"]]])
        assert named[row["run"]] in names[row["method"]] and row["seed"] == str(named[row["run"]]["spec"]["seed"])
    for row in table(text, "Runs, folds, classes and cases", "Classes"):
        check_scores(row, [run | {"classes": ["", row["class"]]} for run in names[row["method"]]])
    for row in table(text, "Worst cases", "Worst"):
        assert row["Dice [%]"] == f"{100 * dice_of(of(row, named))[row['case']]:.2f}"
        assert of(row, named) == names[row["method"]]
    for name, runs in names.items():
        lowest = sorted((value, case) for case, value in dice_of(runs).items())[:5]
        rows = [row for row in table(text, "Worst cases", "Worst") if row["method"] == name]
        assert [row["case"] for row in rows] == [case for _, case in lowest]
    for row in table(text, "Cost", "Means over"):
        runs = of(row, named)
        assert row["hours per run"] == f"{fmean(run['timing']['train_seconds'] for run in runs) / 3600:.3f}"
        assert row["peak memory [MiB]"] == f"{fmean(run['memory']['peak_mib'] for run in runs):.0f}"
        assert row["Dice [%]"] == f"{100 * mean_of(runs, 'dice'):.2f}"
        assert {f"cpu: {run['device']['name']}" in row["device"] for run in runs} == {True}


def test_the_cases_of_the_real_runs(la, named):
    names = {row["method"]: of(row, named) for row in table(la[2], "Leaderboard", "Best first")}
    rows = table(la[2], "Runs, folds, classes and cases", "Dice [%], mean over classes")
    assert [row["case"] for row in rows] == sorted(dice_of([named["R1"]]))
    for row in rows:
        for name, runs in names.items():
            assert row[name] == f"{100 * dice_of(runs)[row['case']]:.2f}"


def test_the_distances_of_every_case_of_the_real_runs(la, named):
    names = {row["method"]: of(row, named) for row in table(la[2], "Leaderboard", "Best first")}
    rows = table(la[2], "Runs, folds, classes and cases", "95HD [voxel], mean over classes")
    assert [row["case"] for row in rows] == sorted(dice_of([named["R1"]]))
    for row in rows:
        for name, runs in names.items():  # one class; an empty mask is as far away as the image is long
            found = [entry["diagonal_voxel"] if entry["hd95_voxel"] is None else entry["hd95_voxel"]
                     for run in runs for entry in run["cases"] if entry["case"] == row["case"]]  # fmt: skip
            assert len(found) == len(runs) and row[name] == f"{sum(found) / len(found):.2f}"


def test_all_columns_of_the_real_runs_are_those_of_the_committed_table(la, named):
    rows = table(la[2], "Leaderboard", "As in leaderboard.csv")
    with open(ROOT / "results" / "leaderboard.csv", encoding="utf-8", newline="") as file:
        committed = [line for line in csv.DictReader(file) if line["source"] == "measured"
                     and (line["dataset"], line["protocol"], line["labeled"]) == ("LA", "lite", "16")]  # fmt: skip
    shown = {name: {row["column"]: row[name] for row in rows} for name in rows[0] if name != "column"}
    assert len(shown) == len(committed) > 1
    for name, row in shown.items():
        (line,) = [line for line in committed if line["hp_hash"] == row["hp_hash"] and not line["control"]]
        assert name.split(" (")[0] == line["method"]
        assert {key: value for key, value in line.items() if value and key != "method"} == {
            key: value for key, value in row.items() if value}, name


def test_the_label_efficiency_of_the_real_runs(la, named):
    by_id, _, text = la
    rows = table(text, "Label efficiency", "Mean Dice")
    assert {row["labeled cases"] for row in rows} >= {"16", "80"}
    here = {row["method"]: of(row, named) for row in table(text, "Leaderboard", "Best first")}
    heights = {}
    for row in rows:
        hashes = {run["hp_hash"] for run in here[row["method"]]}
        runs = [run for run in by_id.values() if run["hp_hash"] in hashes and "control" not in run["spec"]
                and run["spec"]["dataset"] == "LA" and run["spec"]["labeled"] == int(row["labeled cases"])]  # fmt: skip
        scores = [100 * mean_of([run], "dice") for run in runs]
        assert row["runs"] == str(len(runs)) and row["Dice [%]"] == f"{fmean(scores):.2f}"
        if len(runs) > 1:
            low, high = stats.t.interval(0.95, len(scores) - 1, fmean(scores), stats.sem(scores))
            assert row["95 % interval"] == f"[{low:.2f}, {high:.2f}]"
        heights.setdefault(row["method"], {})[int(row["labeled cases"])] = fmean(scores)
    for row in table(text, "Label efficiency", "Area"):
        points = sorted(heights[row["method"]].items())
        xs, ys = np.log2([x for x, _ in points]), [y for _, y in points]
        assert row["area [%]"] == f"{np.trapezoid(ys, xs) / (xs[-1] - xs[0]):.2f}"
        assert (row["from"], row["to"]) == (str(points[0][0]), str(points[-1][0]))


def test_the_summary_of_the_real_runs_says_what_the_tables_say(la):
    text = la[2].split("## Summary\n\n")[1].split("\n\n")[0].replace("\n- ", " ")
    rows = table(la[2], "Paired comparisons", "Dice against supervised")
    for row in rows:
        significant = plain(row["p (Holm)"]).startswith("<") or float(row["p (Holm)"]) < 0.05
        said = f"{row['first']} ({row['first - second [points]']} points, 95 % interval {row['95 % interval']}"
        assert (said in text) == significant
    board = table(la[2], "Leaderboard", "Best first")
    assert f"The highest mean Dice is {board[0]['Dice [%]']} % ({board[0]['method']})" in text


def test_the_page_loads_nothing_and_is_well_formed(la):
    text = la[1]
    read = Reader(text)
    assert not {"script", "link", "iframe", "object", "base"} & set(read.tags)
    for tag, name, value in read.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "data", "action", "srcset"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:50])
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    ids = [value for _, name, value in read.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = {value[1:] for tag, name, value in read.attributes if tag == "a" and name == "href"}
    assert links <= set(ids) and len(links) == 12
    used = {value[1:] for _, name, value in read.attributes if name == "xlink:href"}
    assert used and used | set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)
    assert ("meta", "name", "viewport") in read.attributes and "@media print" in text
    assert len(text) < 3_000_000


def test_html_and_markdown_have_the_same_tables(la):
    read = Reader(la[1])
    markdown = []
    for (_, _), rows in tables(la[2]).items():
        markdown.append([list(rows[0]), *(list(row.values()) for row in rows)])
    assert len(read.tables) == len(markdown) > 12
    assert [[[" ".join(cell.split()) for cell in row] for row in found] for found in read.tables] == [
        [list(map(plain, row)) for row in found] for found in markdown]


# Small records with numbers worked out by hand.


def test_scores_per_class_run_and_fold():
    """c0's `one` is missed: Dice 0, distances of the diagonal, 50 voxels."""
    dice = {f"c{n}": {"one": n / 10, "two": 0.8} for n in range(7)}
    runs = [make_record(dice=dice, cases=[f"c{n}" for n in range(7)], classes=("one", "two"), distance=3.0,
                        missed=[("c0", "one")], seed=seed) for seed in (0, 1)]  # fmt: skip
    assert DIAGONAL == 50
    _, text = page(runs)
    one, two = table(text, "Runs, folds, classes and cases", "Classes")
    # one: 2.1 / 7 = 0.3; distances (50 + 6 * 3) / 7; missed once in each of the two runs
    assert (one["class"], one["Dice [%]"], one["95HD [voxel]"], one["95HD [mm]"]) == ("one", "30.00", "9.71", "19.43")
    assert (one["missed"], two["missed"], two["Dice [%]"], two["ASD [voxel]"]) == ("2", "0", "80.00", "3.00")
    first = table(text, "Runs, folds, classes and cases", "Runs")[0]
    assert (first["Dice [%]"], first["95HD [voxel]"], first["missed"]) == ("55.00", "6.36", "1")
    worst = table(text, "Worst cases", "Worst")
    assert [row["case"] for row in worst] == ["c0", "c1", "c2", "c3", "c4"]
    assert (worst[0]["Dice [%]"], worst[0]["95HD [voxel]"], worst[0]["missed"], worst[0]["runs"]) == (
        "40.00", "26.50", "2", "2")  # fmt: skip
    assert "Structures of which a prediction has no voxel, all runs together: ua_mt 2." in text


def test_the_policy_is_named_with_the_numbers():
    runs = [make_record(missed=["f0c00"], cases=5, distance=5.0)]
    texts = {policy: page(runs, policy=policy)[1] for policy in ("penalty", "legacy")}
    assert "policy penalty: a distance to or from an empty mask counts as the image diagonal" in texts["penalty"]
    assert "policy legacy: a distance to or from an empty mask counts as 0" in texts["legacy"]
    found = {policy: table(text, "Runs, folds, classes and cases", "Runs")[0] for policy, text in texts.items()}
    assert (found["penalty"]["95HD [voxel]"], found["legacy"]["95HD [voxel]"]) == ("14.00", "4.00")


def test_folds_are_shown_and_missing_ones_are_named():
    runs = [make_record("supervised", 0.7, fold=fold, folds=3, spread=0.01) for fold in range(3)]
    runs += [make_record("ua_mt", 0.8 + fold / 100, fold=fold, folds=3, seed=seed)
             for fold in (0, 2) for seed in (0, 1)]  # fmt: skip
    _, text = page(runs)
    rows = {row["method"]: row for row in table(text, "Runs, folds, classes and cases", "Mean Dice [%] by fold")}
    assert [rows["ua_mt"][fold] for fold in "012"] == ["80.00", "", "82.00"]
    assert "ua_mt: fold 1 of 3 (counted from 0) without a run." in text
    (row,) = table(text, "Paired comparisons", "Dice against supervised")
    assert row["n"] == "12" and "compared over 12 common cases" in row["note"]
    board = {row["method"]: row for row in table(text, "Leaderboard", "Best first")}
    assert (board["ua_mt"]["complete"], board["ua_mt"]["rank"]) == ("no", "")
    assert board["supervised"]["rank"] == "1"


def test_one_method_with_one_run_says_what_is_unknown():
    html_text, text = page([make_record(dice=0.8, cases=2)])
    assert "1 run of 1 method make 1 row" not in text  # grammar
    assert "1 run of 1 method makes 1 row: 2 test cases, 1 of 1 fold, 1 seed (0)." in text
    assert "There is no supervised run with the same settings for ua_mt" in text
    assert "Only one row: no comparison with the best" in text
    assert "One seed only, so that the spread over seeds is unknown: ua_mt." in text
    assert table(text, "Leaderboard", "Best first")[0]["95 % interval"] == "unknown"
    for sentence in ("train with --peek-test", "at least two label counts", "at least two numbers of unlabeled cases",
                     "the suite named controls", "Without a curve in the records: ua_mt",
                     "Not measured, calibration (ECE, NLL): all runs.",
                     "Not measured, parameters and passes per step: all runs."):  # fmt: skip
        assert sentence in text and sentence in Reader(html_text).text


def test_fewer_than_five_differences_and_ties_are_not_tested():
    few = [make_record("supervised", [0.5, 0.6, 0.7, 0.5], cases=4), make_record("ua_mt", 0.8, cases=4)]
    (row,) = table(page(few)[1], "Paired comparisons", "Dice against supervised")
    assert (row["p"], row["p (Holm)"], row["wins / ties / losses"]) == ("unknown", "unknown", "4 / 0 / 0")
    assert "4 cases" in row["note"] and "5" in row["note"]
    same = [make_record("supervised", 0.8), make_record("ua_mt", 0.8)]
    text = page(same)[1]
    (row,) = table(text, "Paired comparisons", "Dice against supervised")
    assert (row["p"], row["wins / ties / losses"], row["95 % interval"]) == ("unknown", "0 / 6 / 0", "[+0.00, +0.00]")
    assert "all differences are 0" in row["note"]
    assert "Not tested against supervised training: ua_mt (all differences are 0" in text
    assert "A pair that could not be tested is not known to differ, and is joined." in text


def test_folds_that_share_no_case_cannot_be_compared():
    runs = [make_record("supervised", 0.7, folds=2), make_record("ua_mt", 0.8, fold=1, folds=2)]
    _, text = page(runs)
    (row,) = table(text, "Paired comparisons", "Dice against supervised")
    assert (row["n"], row["first - second [points]"], row["95 % interval"], row["p"]) == ("0", *["unknown"] * 3)
    assert "no common cases" in row["note"]


def test_runs_are_named_in_ranges():
    runs = [make_record(method, seed=seed) for method, count in (("a", 4), ("b", 2), ("c", 1)) for seed in range(count)]
    rows = {row["method"]: row["records"] for row in table(page(runs)[1], "Leaderboard", "Best first")}
    assert rows == {"a": "R1 to R4", "b": "R5, R6", "c": "R7"}


def test_what_one_case_cannot_tell():
    runs = [make_record(method, dice, cases=1, costs={}) for method, dice in (("supervised", 0.7), ("ua_mt", 0.8))]
    _, text = page(runs, [make_peek(runs[1])])
    (row,) = table(text, "What choosing the checkpoint on the test list would buy", "Dice in %")
    assert (row["gain"], row["kept on other cases"], row["interval of kept"]) == ("+2.00", "unknown", "unknown")


def test_times_and_memory_that_are_not_known():
    nothing = {"timing": dict.fromkeys(("train_seconds", "evaluate_seconds", "iterations_per_second")), "memory": {},
               "environment": {}, "code": {}, "evaluation": {}}  # fmt: skip
    _, text = page([make_record(top=nothing, curve=[{"done": 1, "stage": "train"}])])
    (row,) = table(text, "Cost", "Means over")
    assert (row["hours per run"], row["iterations/s"], row["peak memory [MiB]"]) == ("", "", "")


def test_without_a_baseline_of_the_same_settings():
    runs = [make_record("supervised", 0.7, precision="bf16-mixed"), make_record("ua_mt", 0.8)]
    _, text = page(runs)
    assert "No supervised run with the same settings: ua_mt." in text
    assert ("Paired comparisons", "Dice against supervised training") not in tables(text)


def test_distances_of_missed_structures_take_part_in_the_comparison():
    """The missed case has null distances; the pair of 95HD is of 50 voxels against 2."""
    runs = [make_record("supervised", 0.7), make_record("ua_mt", 0.8, missed=["f0c00"])]
    _, text = page(runs)
    (row,) = table(text, "Paired comparisons", "95HD [voxel] against supervised")
    assert row["first - second [voxel]"] == "+8.00" and row["wins / ties / losses"] == "0 / 5 / 1"
    assert row["p"] == "unknown" and "1 of 6 differences" in row["note"]
    assert row["95 % interval"] == interval([48, 0, 0, 0, 0, 0], 1)


def test_the_summary_goes_by_the_corrected_p():
    """Six cases of one sign have p = 2 / 64, twice of which is above 0.05."""
    up = [0.71, 0.72, 0.73, 0.74, 0.75, 0.76]
    runs = [make_record("supervised", 0.7), make_record("ua_mt", up)]
    _, text = page(runs)
    assert "the Dice of ua_mt (+3.50 points" in text and "p = 0.0312) differs significantly" in text
    _, text = page([*runs, make_record("cps", up[::-1])])
    rows = table(text, "Paired comparisons", "Dice against supervised")
    assert [(row["p"], row["p (Holm)"]) for row in rows] == [("0.0312", "0.0625")] * 2
    assert "no significant difference in Dice was found for cps and ua_mt." in text


def test_the_selection_gap():
    runs = [make_record("ua_mt", 0.8, seed=seed, cases=8) for seed in (0, 1)]
    # seed 0: the first checkpoint is 0.02 better; seed 1: 0.04
    peeks = [make_peek(run, shifts=[0.02 * (n + 1), -0.1]) for n, run in enumerate(runs)]
    html_text, text = page([*runs, make_record("supervised", 0.7, cases=8)], peeks)
    (row,) = table(text, "What choosing the checkpoint on the test list would buy", "Dice in %")
    assert (row["method"], row["last"], row["best on test"], row["gain"]) == ("ua_mt", "80.00", "83.00", "+3.00")
    low, high = stats.t.interval(0.95, 1, 3, stats.sem([2, 4]))
    assert row["interval of gain"] == row["interval of kept"] == f"[{low:+.2f}, {high:+.2f}]"
    assert row["kept on other cases"] == "+3.00"  # every case gains the same, so halves choose as the whole
    assert row["records"] == "R2, R3" and row["checkpoints"] == "3, 3"
    sentence = "This is what choosing the checkpoint on the test list would have bought."
    assert sentence in text and sentence in Reader(html_text).text
    assert "nobody has published this measurement" in " ".join(text.split())
    assert "Choosing the checkpoint on the test list would have gained 3.00 points of Dice for ua_mt." in text
    assert "- No checkpoint but the last was scored on the test list (no peeks) for supervised." in text


def test_a_method_that_gains_with_a_control_is_flagged():
    up = [0.70 + n / 100 for n in range(10)]
    runs = [make_record("supervised", 0.6, cases=10), make_record("ua_mt", up, cases=10),
            make_record("ua_mt", up, cases=10, control="noise"),
            make_record("mean_teacher", 0.6, cases=10, control="copies", spread=0.001)]  # fmt: skip
    html_text, text = page(runs)
    rows = {row["method"]: row for row in table(text, "Negative controls", "Dice with replaced")}
    flagged, quiet = rows["ua_mt (control noise)"], rows["mean_teacher (control copies)"]
    assert (flagged["gains"], quiet["gains"], flagged["control"]) == ("yes", "no", "noise")
    assert flagged["difference [points]"] == "+14.50" == flagged["with its own unlabeled data [points]"]
    assert "**Flag.** ua_mt (control noise) gains 14.50 points" in text
    assert "mean_teacher (control copies) gains" not in text
    assert ("p", "class", "flag") in Reader(html_text).attributes
    assert "With replaced unlabeled images ua_mt (control noise) still gains" in text
    pairs = {(row["first"], row["second"]) for row in table(text, "Paired comparisons", "Dice, every pair")}
    assert pairs == {("ua_mt", "supervised")}  # a control is no method to rank
    board = {row["method"]: row["rank"] for row in table(text, "Leaderboard", "Best first")}
    assert board["ua_mt"] == "1" and board["ua_mt (control noise)"] == ""


def test_both_efficiency_curves():
    runs = [make_record("ua_mt", 0.5 + labeled / 100, labeled=labeled) for labeled in (4, 8, 16)]
    runs += [make_record("supervised", 0.6), make_record("ua_mt", 0.62, unlabeled=32)]
    _, text = page(runs, labeled=16)
    rows = table(text, "Label efficiency", "Mean Dice [%] against labeled")
    assert [(row["method"], row["labeled cases"], row["Dice [%]"]) for row in rows] == [
        ("ua_mt", "4", "54.00"), ("ua_mt", "8", "58.00"), ("ua_mt", "16", "66.00")]
    (row,) = table(text, "Label efficiency", "Area under the curve: mean height [%] over the logarithm")
    assert (row["area [%]"], row["from"], row["to"]) == ("59.00", "4", "16")  # (56 + 62) / 2
    rows = table(text, "Label efficiency", "Mean Dice [%] against unlabeled")
    assert [(row["method"], row["unlabeled cases"], row["Dice [%]"]) for row in rows] == [
        ("ua_mt", "0", "60.00"), ("ua_mt", "32", "62.00"), ("ua_mt", "64", "66.00")]
    (row,) = table(text, "Label efficiency", "Area under the curve: mean height [%] over the number")
    assert (row["area [%]"], row["from"], row["to"]) == ("62.50", "0", "64")  # (61 * 32 + 64 * 32) / 64
    assert "Records of other label counts" in text
    board = {row["method"]: row["rank"] for row in table(text, "Leaderboard", "Best first")}
    assert board == {"ua_mt": "1", "supervised": "2", "ua_mt (32 unlabeled)": ""}


def test_cost_is_told_apart_by_device_and_threads():
    top = {"environment": {"threads": 2}}
    runs = [make_record("ua_mt", 0.8, costs={"parameters": 9_450_000, "forward_passes": 6.0}, top=top),
            make_record("ua_mt", 0.9, seed=1, top={"environment": {"threads": 1}}, costs={}),
            make_record("cps", 0.7, top={"device": {"type": "cuda", "name": "H"}})]  # fmt: skip
    _, text = page(runs)
    rows = {(row["method"], row["device"]): row for row in table(text, "Cost", "Means over")}
    assert set(rows) == {("cps", "cuda: H"), ("ua_mt", "cpu: test, 1 thread"), ("ua_mt", "cpu: test, 2 threads")}
    two = rows["ua_mt", "cpu: test, 2 threads"]
    assert (two["hours per run"], two["parameters [M]"], two["forward passes per step"], two["Dice [%]"]) == (
        "1.500", "9.450", "6.00", "80.00")  # fmt: skip
    assert rows["cps", "cuda: H"]["parameters [M]"] == ""
    assert "Times were taken on 3 different devices or numbers of threads" in text


def test_recipes_and_splits_make_pages_of_their_own():
    clean = {"data": {"recipe": "LA-clean-1", "sha256": "cd" * 32, "label_guided": False, "spacing_known": True}}
    texts = report.render([make_record(), make_record(top=clean, id="clean")])
    assert list(texts) == ["LA-lite-16-LA-clean-1.html", "LA-lite-16-LA-clean-1.md", "LA-lite-16-LA-published-1.html",
                           "LA-lite-16-LA-published-1.md"]  # fmt: skip
    assert "| boxes of the scans follow the labels | no |" in texts["LA-lite-16-LA-clean-1.md"]
    texts = report.render([make_record(), make_record(labeled=8), make_record(protocol="cv5", dataset="B/..d e")])
    assert [name for name in texts if name.endswith(".md")] == ["B_..d_e-cv5-16.md", "LA-lite-8.md", "LA-lite-16.md"]


def test_rows_of_unknown_spacing_have_no_mm():
    data = {"recipe": "x", "sha256": "", "label_guided": True, "spacing_known": False}
    _, text = page([make_record(top={"data": data}), make_record("supervised", 0.7, top={"data": data})])
    assert "95HD [mm]" not in text and "95HD [voxel]" in text


@pytest.mark.parametrize(("changes", "names"), [
    ([{}, {"method": "cps"}], ["ua_mt", "cps"]),
    ([{}, {"precision": "bf16-mixed"}], ["ua_mt (32-true)", "ua_mt (bf16-mixed)"]),
    ([{}, {"labeled_batch": 4}, {"method": "cps"}], ["ua_mt (2+2)", "ua_mt (4+2)", "cps"]),
    ([{}, {"network": "unet"}], ["ua_mt (vnet)", "ua_mt (unet)"]),
    ([{}, {"hp_hash": "ffff0000", "id": "other"}], ["ua_mt ({})", "ua_mt (ffff0000)"]),
    ([{"control": "noise"}], ["ua_mt (control noise)"]),
    ([{}, {"unlabeled": 16}], ["ua_mt", "ua_mt (16 unlabeled)"]),
])  # fmt: skip
def test_names_say_as_much_as_tells_rows_apart(changes, names):
    runs = [make_record(**change) for change in changes]
    found = report.names_of(leaderboard.groups(runs))
    expected = [name.format(run["hp_hash"]) for name, run in zip(names, runs, strict=True)]
    assert [found[run["id"]] for run in runs] == expected


EVIL = ("<script>alert(1)</script>", "a|b", "c\\|d", "`x` [y](z) &amp;", 'q" onload="x', "$x^2$")


def test_names_from_records_never_become_markup():
    runs = [make_record(method, 0.7 + n / 100, spread=0.05, id=f"r{n}", classes=("<b>one|two</b>",), curve=make_curve(),
                        top={"device": {"type": "cpu", "name": "<i>|"}})
            for n, method in enumerate(EVIL)]  # fmt: skip
    html_text, text = page(runs)
    read = Reader(html_text)
    assert not {"script", "b", "i"} & set(read.tags) and not any(name == "onload" for _, name, _ in read.attributes)
    for method in EVIL:
        assert method in read.text
    found = tables(text)  # strict: every row has as many cells as its header
    assert "<" not in text.replace("<=", "") and "](" not in text
    assert len(found) > 10
    assert sorted(plain(row["method"]) for row in table(text, "Leaderboard", "Best first")) == sorted(EVIL)


def many():
    runs = []
    for method, dice in (("supervised", 0.6), ("ua_mt", 0.8), ("cps", 0.7)):
        runs += [make_record(method, dice, fold=fold, folds=2, seed=seed, spread=0.1, costs={}, calibration=True,
                             curve=make_curve(), classes=("one", "two"))
                 for fold in (0, 1) for seed in (0, 1)]  # fmt: skip
    return runs


def test_the_bytes_do_not_depend_on_the_order_of_records():
    runs = many()
    peeks = [make_peek(run) for run in runs[4:8]]
    first = report.render(runs, peeks)
    for seed in range(2):
        mixed, order = copy.deepcopy(runs), random.Random(seed)
        order.shuffle(mixed)
        order.shuffle(peeks)
        for run in mixed:
            order.shuffle(run["cases"])
        assert report.render(mixed, peeks) == first


def test_the_records_are_left_as_they_are():
    runs = many()
    before = copy.deepcopy(runs)
    report.render(runs)
    assert runs == before


def test_published_numbers_stand_apart():
    published = {"method": "ua_mt", "dataset": "LA", "labeled": "16", "unlabeled": "64", "dice": "88.88",
                 "jaccard": "80.21", "hd95": "7.32", "asd": "2.26", "backbone": "VNet", "split": "UA-MT 80/20",
                 "source": "a paper"}  # fmt: skip
    others = [published | {"labeled": "8", "dice": "1.00"}, published | {"dataset": "ACDC", "dice": "2.00"}]
    _, text = page([make_record()], reported=[published, *others])
    (row,) = table(text, "Leaderboard", "As papers print them")
    assert (row["method"], row["Dice [%]"], row["source"]) == ("ua_mt", "88.88", "a paper")
    assert len(table(text, "Leaderboard", "Best first")) == 1


def phantom(tmp_path, predicted=None, case="phantom_032", **options):
    """A record of the phantom, and a prediction of its first test case in the folder of runs."""
    run = make_record(dataset="phantom", protocol="demo", labeled=2, cases=[case, "phantom_033"],
                      classes=("chamber", "vessels"), dice={case: 0.1, "phantom_033": 0.9}, **options)  # fmt: skip
    folder = tmp_path / "runs" / run["id"] / "predictions"
    folder.mkdir(parents=True)
    if predicted is not None:
        nibabel.save(nibabel.Nifti1Image(predicted, np.eye(4)), folder / f"{case}.nii.gz")
    return run, folder


def truth(case="phantom_032"):
    dataset, root = data_prep.locate("phantom")
    return dataset.open(root, dataset.protocols["demo"]).label(case)


def test_pictures_of_the_worst_cases(tmp_path):
    run, _ = phantom(tmp_path, truth())
    html_text, text = page([run], scans=Scans(tmp_path / "runs"))
    read = Reader(html_text)
    assert read.tags.count("img") == 1
    assert "phantom_032, run R1: Dice 10.00 %" in read.text
    assert "No picture (phantom_033 of R1):" in read.text and "/predictions/<case>.nii.gz is not there" in read.text
    assert text == page([run])[1]  # what predictions are there is no matter of the records


def test_the_picture_is_of_the_worst_run_that_left_a_prediction(tmp_path):
    good, folder = phantom(tmp_path, truth())
    bad = make_record(dataset="phantom", protocol="demo", labeled=2, cases=["phantom_032", "phantom_033"],
                      classes=("chamber", "vessels"), dice=0.05, seed=1)  # fmt: skip
    read = Reader(page([good, bad], scans=Scans(tmp_path / "runs"))[0])
    assert "phantom_032, run R1: Dice 10.00 %" in read.text and "phantom_032 of R2" in read.text
    other = tmp_path / "runs" / bad["id"] / "predictions"
    other.mkdir(parents=True)
    (folder / "phantom_032.nii.gz").rename(other / "phantom_032.nii.gz")
    read = Reader(page([good, bad], scans=Scans(tmp_path / "runs"))[0])
    assert "phantom_032, run R2: Dice 5.00 %" in read.text and "phantom_032 of R1" not in read.text


@pytest.mark.parametrize(("predicted", "options", "said"), [
    (np.zeros((3, 4, 5), np.uint8), {}, "has the shape (3, 4, 5), expected"),
    ("broken", {}, "cannot be read (ImageFileError"),
    (np.zeros((3, 4, 5), np.uint8), {"case": "nobody"}, "the scans cannot be read: phantom: 1 of 1 cases are unknown"),
])
def test_what_is_wrong_with_a_picture_is_said(tmp_path, predicted, options, said):
    run, folder = phantom(tmp_path, None if isinstance(predicted, str) else predicted, **options)
    if isinstance(predicted, str):
        (folder / "phantom_032.nii.gz").write_text(predicted)
    assert said in Reader(page([run], scans=Scans(tmp_path / "runs"))[0]).text


def test_scans_that_are_not_there_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("SSL4MIS_DATA", raising=False)
    run = make_record(cases=1)
    folder = tmp_path / run["id"] / "predictions"
    folder.mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)), folder / "f0c00.nii.gz")
    said = Reader(page([run], scans=Scans(tmp_path))[0]).text
    assert "the scans cannot be read: LA: no data folder is given (--data-root DIR or SSL4MIS_DATA=DIR)" in said
    assert "No picture" in Reader(page([make_record(cases=1, protocol="strange")], scans=Scans(tmp_path))[0]).text


@pytest.fixture
def main():
    return runpy.run_path(str(ROOT / "benchmarks" / "report.py"))["main"]


@pytest.mark.parametrize(("options", "said"), [
    (["--dataset", "ACDC"], "dataset ACDC: no records that count, expected one of LA, phantom"),
    (["--labeled", "7"], "labeled 7: no records that count, expected one of 4, 8, 16"),
    (["--dataset", "LA", "--labeled", "4"], "labeled 4: no records that count with dataset LA, expected one of 8, 16"),
    (["--protocol", "cv5"], "protocol cv5: no records that count, expected one of demo, lite"),
])
def test_unknown_values_are_one_line_and_status_2(main, tmp_path, capsys, options, said):
    for run in (make_record(), make_record(labeled=8), make_record(dataset="phantom", protocol="demo", labeled=4)):
        records.write(run, tmp_path / "records")
    assert main(["--results", str(tmp_path), *options]) == 2
    assert capsys.readouterr().err == said + "\n"
    assert not (tmp_path / "reports").exists()


def test_command_prints_the_paths(main, tmp_path, capsys):
    for run in (make_record(), make_record(labeled=8), make_record(selection="peeked", id="other")):
        path = records.write(run, tmp_path / "records")
    assert main(["--results", str(tmp_path), "--dataset", "la", "--labeled", "16"]) == 0
    paths = [tmp_path / "reports" / f"LA-lite-16.{kind}" for kind in ("html", "md")]
    assert capsys.readouterr().out.splitlines() == list(map(str, paths))
    assert main(["--results", str(tmp_path), "--out", str(tmp_path / "there")]) == 0
    assert sorted(found.name for found in (tmp_path / "there").iterdir()) == [
        "LA-lite-16.html", "LA-lite-16.md", "LA-lite-8.html", "LA-lite-8.md"]
    path.write_text("{}")
    for folder in (tmp_path, tmp_path / "absent"):
        assert main(["--results", str(folder)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_check_names_markdown_that_the_records_do_not_give(main, tmp_path, capsys):
    first, second = make_record(), make_record(seed=1)
    records.write(first, tmp_path / "records")
    options = ["--results", str(tmp_path)]
    assert main(options) == 0 and main([*options, "--check"]) == 0
    page = tmp_path / "reports" / "LA-lite-16.md"
    before = page.read_bytes()
    records.write(second, tmp_path / "records")
    page.with_name("gone.md").write_text("of records that are gone")
    capsys.readouterr()
    assert main([*options, "--check"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" differs")[0] for line in said] == [str(page), str(page.with_name("gone.md"))]
    assert page.read_bytes() == before


def test_nothing_to_report(main, tmp_path, capsys):
    assert main(["--results", str(tmp_path)]) == 0
    assert "no records that count yet" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["leaderboard", "report"])
def test_commands_stay_thin(name):
    assert len((ROOT / "benchmarks" / f"{name}.py").read_text().splitlines()) < 40
