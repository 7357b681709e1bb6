"""Paired comparisons, cliques, the selection gap, efficiency and controls: numbers by hand, and SciPy as the oracle."""

import copy
import math
import random
from itertools import combinations
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from scipy import stats
from unit.making import DIAGONAL, make_peek, make_record

from ssl4mis import analysis, leaderboard, records, selection

ROOT = Path(__file__).resolve().parents[2]
UP = [0.61, 0.62, 0.63, 0.64, 0.65, 0.66]  # 0.01 to 0.06 above 0.6


def group_of(*runs):
    (group,) = leaderboard.groups(runs)
    return group


def groups_of(*runs):
    return leaderboard.groups(runs)


def found(pairs):
    """(method, method) -> pair."""
    return {(pair.first.runs[0]["spec"]["method"], pair.second.runs[0]["spec"]["method"]): pair for pair in pairs}


def method(group):
    return group.runs[0]["spec"]["method"]


def same(one, other):
    """Equality of pairs' numbers, NaN included; the groups by their first record."""
    def flat(pair):
        return [pair.first.runs[0]["id"], pair.second.runs[0]["id"], *map(str, pair[2:])]

    return [flat(pair) for pair in one] == [flat(pair) for pair in other]


# scores


def test_a_case_score_is_the_mean_over_classes_and_runs():
    runs = [make_record(dice={"a": {"x": 0.5, "y": 0.9}, "b": {"x": 0.2, "y": 0.4}}, cases=["b", "a"],
                        classes=("x", "y"), seed=0),
            make_record(dice={"a": {"x": 0.7, "y": 0.9}, "b": {"x": 0.2, "y": 0.4}}, cases=["b", "a"],
                        classes=("x", "y"), seed=1)]  # fmt: skip
    scores = analysis.case_scores(group_of(*runs))
    assert scores == pytest.approx({"a": (0.7 + 0.8) / 2, "b": 0.3}) and list(scores) == ["a", "b"]


def test_folds_bring_their_own_cases():
    scores = analysis.case_scores(group_of(make_record(dice=0.5, cases=2, folds=2, fold=0),
                                           make_record(dice=0.7, cases=1, folds=2, fold=1)))  # fmt: skip
    assert scores == {"f0c00": 0.5, "f0c01": 0.5, "f1c00": 0.7}


def test_a_missed_structure_counts_as_the_policy_says():
    group = group_of(make_record(cases=["a", "b"], missed=["a"], distance=3.0))
    assert analysis.case_scores(group, "hd95_voxel") == {"a": DIAGONAL, "b": 3}
    assert analysis.case_scores(group, "assd_mm") == {"a": 2 * DIAGONAL, "b": 6}
    assert analysis.case_scores(group, "hd95_voxel", "legacy") == {"a": 0, "b": 3}
    assert analysis.case_scores(group) == {"a": 0, "b": 0.8}


def test_unknown_metrics_and_units_are_refused():
    with pytest.raises(ValueError, match="metric 'volume' is unknown, expected one of dice, jaccard"):
        analysis.case_scores(group_of(make_record()), "volume")
    blind = group_of(make_record(top={"data": {"recipe": "r", "sha256": "", "spacing_known": False}}))
    with pytest.raises(ValueError, match=f"{blind.runs[0]['id']}: asd_mm of voxels of unknown size"):
        analysis.case_scores(blind, "asd_mm")
    pair = analysis.compare(blind, blind, "asd_mm")
    assert pair.n == 0 and math.isnan(pair.p) and pair.note == "voxels of unknown size: no mm"
    assert analysis.compare(blind, blind, "asd_voxel").n == 6


@pytest.mark.parametrize("metric", ["dice", "hd95_voxel"])
def test_nan_is_never_averaged_away(metric):
    run = make_record()
    group = group_of(run)
    run["cases"][2][metric] = float("nan")
    with pytest.raises(ValueError, match=f"{run['id']}: {metric} of case f0c02, class organ, is NaN"):
        analysis.compare(group, group_of(make_record("cps")), metric)


def test_the_metrics_are_those_of_the_scores():
    assert tuple(analysis.LARGER_IS_BETTER) == selection.METRICS
    assert [name for name, larger in analysis.LARGER_IS_BETTER.items() if larger] == ["dice", "jaccard"]


# pairs


def test_a_pair_by_hand():
    pair = analysis.compare(*groups_of(make_record("bcp", UP), make_record("cps", 0.6)))
    assert (method(pair.first), method(pair.second), pair.metric, pair.n) == ("bcp", "cps", "dice", 6)
    assert pair.mean == pytest.approx(0.035) and pair.p == pair.p_holm == 2 / 64
    assert (pair.wins, pair.ties, pair.losses) == (6, 0, 0)
    wanted = stats.bootstrap(([0.01, 0.02, 0.03, 0.04, 0.05, 0.06],), np.mean, method="BCa", n_resamples=9999,
                             rng=np.random.default_rng(0)).confidence_interval  # fmt: skip
    assert (pair.low, pair.high) == (wanted.low, wanted.high)


def test_a_smaller_distance_wins():
    pair = analysis.compare(*groups_of(make_record("bcp", distance=[1, 2, 3, 4, 5, 9]),
                                       make_record("cps", distance=[2, 4, 6, 8, 10, 9])), "hd95_voxel")  # fmt: skip
    assert pair.mean == -15 / 6 and (pair.wins, pair.ties, pair.losses) == (5, 1, 0) and pair.p == 2 / 32


@pytest.mark.parametrize("metric", ["dice", "jaccard", "asd_voxel"])
def test_swapping_the_groups_flips_the_sign(metric):
    groups = groups_of(make_record("bcp", 0.7, spread=0.1, cases=30, distance=[n % 7 + 1 for n in range(30)]),
                       make_record("cps", 0.68, spread=0.1, cases=30, distance=[n % 5 + 2 for n in range(30)]))
    there, back = analysis.compare(*groups, metric), analysis.compare(*groups[::-1], metric)
    assert back.mean == -there.mean and (back.low, back.high) == pytest.approx((-there.high, -there.low))
    assert (back.wins, back.ties, back.losses) == (there.losses, there.ties, there.wins)
    assert back.p == pytest.approx(there.p, rel=1e-12) and there.wins and there.losses


def test_differences_that_differ_in_the_last_bit_are_ties():
    """0.3 - 0.2 is not 0.2 - 0.1, but the ranks of the test must take them as one."""
    first, second = [0.3, 0.2, 0.5, 0.9, 0.7, 0.6], [0.2, 0.1, 0.6, 0.5, 0.4, 0.8]
    assert 0.3 - 0.2 != 0.2 - 0.1
    pair = analysis.compare(*groups_of(make_record("bcp", first), make_record("cps", second)))
    assert pair.p == stats.wilcoxon([0.1, 0.1, -0.1, 0.4, 0.3, -0.2]).pvalue


def test_no_difference_at_all():
    pair = analysis.compare(*groups_of(make_record("bcp", UP), make_record("cps", UP)))
    assert (pair.mean, pair.low, pair.high, pair.ties) == (0, 0, 0, 6) and math.isnan(pair.p)
    assert pair.note.startswith("all differences are 0; one run of bcp and of cps: nothing is known about the spread")


def test_few_cases_and_few_differences_say_so():
    few = analysis.compare(*groups_of(make_record("bcp", UP[:4], cases=4), make_record("cps", 0.6, cases=4)))
    assert few.n == 4 and math.isnan(few.p) and few.note.startswith("n = 4 cases, at least 5 are needed")
    assert few.low < few.mean < few.high
    two = analysis.compare(*groups_of(make_record("bcp", UP[:2], cases=2), make_record("cps", 0.6, cases=2)))
    assert two.mean == pytest.approx(0.015) and math.isnan(two.low) and math.isnan(two.high)
    ties = analysis.compare(*groups_of(make_record("bcp", [*UP[:4], 0.6, 0.6]), make_record("cps", 0.6)))
    assert math.isnan(ties.p) and ties.note.startswith("4 of 6 differences are not 0, at least 5 are needed")


def test_a_group_without_the_others_cases():
    pair = analysis.compare(*groups_of(make_record("bcp", fold=0, folds=2), make_record("cps", fold=1, folds=2)))
    assert pair.n == 0 and pair.note == "no common cases" and all(map(math.isnan, pair[4:9]))


def test_missing_folds_leave_the_common_cases():
    whole = [make_record("bcp", 0.7, spread=0.05, fold=fold, folds=3) for fold in range(3)]
    part = [make_record("cps", 0.6, spread=0.05, fold=fold, folds=3) for fold in (0, 2)]
    pair = analysis.compare(group_of(*whole), group_of(*part))
    assert pair.n == 12 and pair.note == "fold(s) missing: compared over 12 common cases"
    rows = [(one["dice"], two["dice"]) for left, right in zip(whole[::2], part, strict=True)
            for one, two in zip(left["cases"], right["cases"], strict=True)]  # fmt: skip
    assert pair.mean == pytest.approx(fmean(one - two for one, two in rows))
    full = analysis.compare(group_of(*whole), group_of(*part, make_record("cps", 0.6, fold=1, folds=3)))
    assert full.n == 18 and full.note == ""


def test_runs_are_averaged_and_a_single_one_says_so():
    two = group_of(make_record("bcp", UP, seed=0), make_record("bcp", [value + 0.02 for value in UP], seed=1))
    pair = analysis.compare(two, group_of(make_record("cps", 0.6)))
    assert pair.mean == pytest.approx(0.045) and pair.n == 6  # six cases, not twelve
    assert pair.note == "one run of cps: nothing is known about the spread over runs"


def test_two_frames_of_a_patient_are_one_sample():
    """Twelve cases of six patients: the frames' differences cancel for one patient and add up for the others."""
    frames = [0.7, 0.5, 0.61, 0.63, 0.62, 0.66, 0.63, 0.69, 0.64, 0.72, 0.65, 0.75]
    groups = groups_of(make_record("bcp", frames, cases=12, per_patient=2),
                       make_record("cps", 0.6, cases=12, per_patient=2))  # fmt: skip
    pair = analysis.compare(*groups)
    assert (pair.n, pair.wins, pair.ties, pair.losses) == (6, 5, 1, 0) and pair.p == 2 / 32
    assert analysis.patient_scores(groups[0])["f0c02"] == pytest.approx(0.62)
    assert len(analysis.case_scores(groups[0])) == 12 and len(analysis.patient_scores(groups[0])) == 6
    wanted = stats.bootstrap(([0, 0.02, 0.04, 0.06, 0.08, 0.1],), np.mean, method="BCa", n_resamples=9999,
                             rng=np.random.default_rng(0)).confidence_interval  # fmt: skip
    assert (pair.low, pair.high) == (wanted.low, wanted.high)
    few = groups_of(make_record("bcp", UP, per_patient=2), make_record("cps", 0.6, per_patient=2))
    assert analysis.compare(*few).note.startswith("n = 3 patients, at least 5 are needed")


# tables


def test_only_equal_conditions_share_a_table():
    runs = [make_record("bcp"), make_record("cps"), make_record("cps", hp={"weight": 2}), make_record("cps", labeled=8),
            make_record("cps", unlabeled=4), make_record("cps", control="noise"), make_record("cps", dataset="ACDC"),
            make_record("cps", protocol="paper"), make_record("cps", split="other"), make_record("cps", folds=5),
            make_record("cps", top={"data": {"recipe": "LA-clean-1", "sha256": ""}})]  # fmt: skip
    sizes = sorted(map(len, analysis.tables(groups_of(*runs))))
    assert sizes == [1] * 7 + [3]
    (pair,) = [pair for pair in analysis.all_pairs(groups_of(*runs)) if method(pair.first) == method(pair.second)]
    assert pair.first.runs[0]["hp_hash"] != pair.second.runs[0]["hp_hash"]


def test_the_best_comes_first():
    groups = groups_of(make_record("bcp", 0.7, distance=4), make_record("cps", 0.9, distance=5),
                       make_record("dtc", 0.8, distance=1))  # fmt: skip
    assert [(method(group), mean) for group, mean in analysis.ranked(groups)] == [
        ("cps", pytest.approx(0.9)), ("dtc", pytest.approx(0.8)), ("bcp", pytest.approx(0.7))]
    assert [method(group) for group, _ in analysis.ranked(groups, "hd95_mm")] == ["dtc", "bcp", "cps"]


def many(seeds=1):
    means = {"supervised": 0.6, "bcp": 0.64, "cps": 0.7, "dtc": 0.705, "urpc": 0.8}
    return [make_record(name, mean, spread=0.04, cases=12, seed=seed,
                        distance=[80 * (1 - mean) * (1 + n / 10) for n in range(12)])
            for name, mean in means.items() for seed in range(seeds)]  # fmt: skip


@pytest.mark.parametrize("metric", ["dice", "hd95_voxel"])
def test_families_are_corrected_as_by_hand(metric):
    groups = groups_of(*many(2))
    scores = {method(group): list(analysis.case_scores(group, metric).values()) for group in groups}

    def p(one, two):
        return stats.wilcoxon(np.round(np.subtract(scores[one], scores[two]), 12)).pvalue

    planned = found(analysis.versus_supervised(groups, metric))
    assert set(planned) == {(name, "supervised") for name in ("bcp", "cps", "dtc", "urpc")}
    wanted = stats_holm([p(*names) for names in planned])
    assert [pair.p_holm for pair in planned.values()] == pytest.approx(wanted)
    every = found(analysis.all_pairs(groups, metric))
    assert len(every) == 10
    assert [pair.p_holm for pair in every.values()] == pytest.approx(stats_holm([p(*names) for names in every]))
    best = found(analysis.versus_best(groups, metric))
    assert set(best) == {(name, "urpc") for name in ("bcp", "cps", "dtc", "supervised")}
    for (name, _), pair in best.items():
        other = every["urpc", name]
        assert (pair.p_holm, pair.mean, pair.wins) == (other.p_holm, -other.mean, other.losses)
        assert (pair.low, pair.high) == (-other.high, -other.low)


def stats_holm(ps):
    """Holm by its definition: the largest of (m - i) p over all that are not larger, at most 1."""
    ordered = sorted(ps)
    return [min(1, max((len(ps) - i) * q for i, q in enumerate(ordered) if q <= p)) for p in ps]


def test_each_table_has_its_own_family():
    sixteen = [make_record(name, dice, cases=6) for name, dice in (("bcp", UP), ("cps", UP), ("supervised", 0.6))]
    eight = [make_record(name, dice, cases=6, labeled=8) for name, dice in (("bcp", UP), ("supervised", 0.6))]
    pairs = analysis.versus_supervised(groups_of(*sixteen, *eight))
    ps = {(pair.first.runs[0]["spec"]["labeled"], method(pair.first)): pair.p_holm for pair in pairs}
    assert ps == {(16, "bcp"): 4 / 64, (16, "cps"): 4 / 64, (8, "bcp"): 2 / 64}


def test_an_incomplete_group_is_compared_but_is_not_the_best():
    runs = [make_record("bcp", 0.7, spread=0.1, fold=fold, folds=2) for fold in range(2)]
    runs += [make_record("cps", 0.6, spread=0.1, fold=fold, folds=2) for fold in range(2)]
    groups = groups_of(*runs, make_record("dtc", 0.9, spread=0.1, fold=0, folds=2))
    pairs = found(analysis.versus_best(groups))
    assert set(pairs) == {("cps", "bcp"), ("dtc", "bcp")}
    pair = pairs["dtc", "bcp"]
    assert pair.mean > 0 and pair.note.startswith("fold(s) missing: compared over 6 common cases")
    alone = groups_of(make_record("bcp", 0.7, folds=2), make_record("cps", 0.6, folds=2))
    assert set(found(analysis.versus_best(alone))) == {("cps", "bcp")}


def test_the_order_of_records_and_groups_does_not_matter():
    runs = many(2) + [make_record("cps", 0.7, spread=0.05, cases=12, control="noise", seed=seed) for seed in range(2)]
    reference = [function(groups_of(*runs)) for function in (analysis.all_pairs, analysis.versus_best)]
    planned = analysis.versus_supervised(groups_of(*runs))
    for seed in range(3):
        random.Random(seed).shuffle(runs)
        for run in runs:
            random.Random(seed).shuffle(run["cases"])
        groups = groups_of(*runs)
        assert same(analysis.versus_supervised(groups), planned)
        assert same(analysis.all_pairs(groups[::-1]), reference[0])
        assert sorted(map(str, found(analysis.versus_best(groups[::-1])))) == sorted(map(str, found(reference[1])))


def test_one_group_and_none():
    alone = groups_of(make_record())
    for function in (analysis.versus_supervised, analysis.versus_best, analysis.all_pairs, analysis.negative_controls,
                     analysis.label_efficiency, analysis.unlabeled_efficiency):  # fmt: skip
        assert function(alone) == function([]) == []
    assert analysis.cliques(alone, []) == [] and analysis.selection_gaps(alone, []) == []


# the supervised baseline


def test_the_baseline_is_trained_alike():
    mine = make_record("bcp")
    (group,) = groups_of(mine)
    other = {
        "network": "unet", "width": 16, "precision": "bf16-mixed", "labeled_batch": 4, "augmentation": [],
        "iterations": 6000,
        "dataset": "ACDC", "protocol": "paper", "labeled": 8, "split": "other", "folds": 5, "control": "noise",
    }  # fmt: skip
    wrong = [make_record("supervised", **{key: value}) for key, value in other.items()]
    assert analysis.baseline(group, groups_of(mine, *wrong)) is None
    assert analysis.versus_supervised(groups_of(mine, *wrong)) == []
    right = make_record("supervised")
    assert analysis.baseline(group, groups_of(mine, *wrong, right)).runs == [right]
    fewer = group_of(make_record("bcp", unlabeled=4))
    assert analysis.baseline(fewer, groups_of(right)).runs == [right]


def test_of_several_baselines_the_most_alike_is_taken_and_differences_are_named():
    for patch in ([8, 8, 8], [4, 4, 4]):  # whichever id comes first
        mine = make_record("bcp", learning_rate=0.1, patch=patch)
        pool = {size: make_record("supervised", learning_rate=0.2, patch=[size] * 3) for size in (4, 8)}
        (pair,) = analysis.versus_supervised(groups_of(mine, *pool.values()))
        assert pair.second.runs == [pool[patch[0]]] and pair.note.endswith("spread over runs; learning_rate differ")
    (pair,) = analysis.versus_supervised(groups_of(make_record("bcp", UP), make_record("supervised", 0.6)))
    assert pair.note == "one run of bcp and of supervised: nothing is known about the spread over runs"


# cliques


def shifted(**means):
    """Groups whose cases are as far apart as their means, so that every pair differs with p = 2/64 or not at all."""
    return groups_of(*(make_record(name, [mean + 0.001 * n for n in range(6)]) for name, mean in means.items()))


def judged(groups, *different, metric="dice"):
    """All pairs of the groups with p_holm 0.01 for those named, and 1 for others."""
    names = [set(pair.split("-")) for pair in different]
    return [pair._replace(p_holm=0.01 if {method(pair.first), method(pair.second)} in names else 1.0)
            for pair in analysis.all_pairs(groups, metric)]  # fmt: skip


def named(cliques):
    return [[method(group) for group in clique] for clique in cliques]


def test_cliques_are_the_largest_runs_of_neighbours_without_a_difference():
    groups = shifted(a=0.9, b=0.8, c=0.7, d=0.6)
    assert named(analysis.cliques(groups, judged(groups))) == [["a", "b", "c", "d"]]
    assert named(analysis.cliques(groups, judged(groups, "a-d"))) == [["a", "b", "c"], ["b", "c", "d"]]
    assert named(analysis.cliques(groups, judged(groups, "a-c", "a-d", "b-d"))) == [["a", "b"], ["b", "c"], ["c", "d"]]
    assert named(analysis.cliques(groups, judged(groups, "b-c", "a-c", "b-d", "a-d"))) == [["a", "b"], ["c", "d"]]
    assert named(analysis.cliques(groups, judged(groups, "a-b", "a-c", "a-d"))) == [["b", "c", "d"]]
    every = [f"{one}-{two}" for one in "abcd" for two in "abcd" if one < two]
    assert analysis.cliques(groups, judged(groups, *every)) == []


def test_a_difference_inside_breaks_a_clique_even_where_its_ends_do_not_differ():
    groups = shifted(a=0.9, b=0.8, c=0.7)
    assert named(analysis.cliques(groups, judged(groups, "a-b"))) == [["b", "c"]]


def test_cliques_follow_the_metric_the_level_and_the_table():
    groups = groups_of(make_record("a", 0.9, distance=9), make_record("b", 0.8, distance=1),
                       make_record("c", 0.7, distance=5), make_record("b", 0.5, labeled=8),
                       make_record("c", 0.6, labeled=8))  # fmt: skip
    pairs = judged(groups, "a-b", metric="asd_voxel")
    assert named(analysis.cliques(groups, pairs)) == [["b", "c"], ["b", "c"], ["c", "a"]]  # 8 labels, and 16
    assert named(analysis.cliques(groups, pairs, level=0.005)) == [["b", "c"], ["b", "c", "a"]]
    assert named(analysis.cliques(groups, judged(groups, "a-b"))) == [["c", "b"], ["b", "c"]]


def test_pairs_that_were_not_tested_do_not_separate_and_missing_ones_are_refused():
    groups = groups_of(*(make_record(name, dice, cases=4) for name, dice in (("a", 0.9), ("b", 0.5))))
    pairs = analysis.all_pairs(groups)
    assert math.isnan(pairs[0].p_holm) and named(analysis.cliques(groups, pairs)) == [["a", "b"]]
    with pytest.raises(ValueError, match="no pair of them, expected every pair of the table"):
        analysis.cliques(groups, [])


# the selection gap


def test_the_gap_of_one_run_by_hand():
    """The second of three checkpoints is 0.02 better in every case: all of it is kept."""
    run = make_record("bcp", UP)
    (gap,) = analysis.selection_gaps(groups_of(run), [make_peek(run, (-0.1, 0.02))])
    assert (gap.runs, gap.ids, gap.checkpoints, gap.over) == (1, [run["id"]], [3], "cases")
    assert (gap.last, gap.best) == pytest.approx((0.635, 0.655))
    assert (gap.gain, gap.low, gap.high) == pytest.approx((0.02,) * 3)
    assert (gap.kept, gap.kept_low, gap.kept_high) == pytest.approx((0.02,) * 3)


def test_a_last_checkpoint_that_is_the_best_leaves_no_gap():
    run = make_record("bcp", UP)
    (gap,) = analysis.selection_gaps(groups_of(run), [make_peek(run, (-0.1, -0.02))])
    assert gap.best == gap.last and (gap.gain, gap.low, gap.high, gap.kept, gap.kept_low, gap.kept_high) == (0,) * 6


def test_what_one_case_chose_is_not_kept_on_the_other():
    """Two cases, one better by 0.1 and the other worse by 0.1 or 0.04: who chooses loses the other."""
    run = make_record("bcp", [0.7, 0.7], cases=2)
    (gap,) = analysis.selection_gaps(groups_of(run), [make_peek(run, ([0.1, -0.04], [-0.1, 0.1]))])
    assert gap.gain == pytest.approx(0.03) and gap.kept == pytest.approx((-0.04 - 0.1) / 2)
    assert all(map(math.isnan, (gap.low, gap.high, gap.kept_low, gap.kept_high)))


def test_kept_is_two_fold_cross_validation_of_the_choice():
    """Against every split of five cases in halves of two and three."""
    rng = np.random.default_rng(2)
    scores = rng.uniform(0.6, 0.8, (4, 5))
    run = make_record("bcp", scores[-1].tolist(), cases=5)
    peek = make_peek(run, [(row - scores[-1]).tolist() for row in scores[:-1]])
    (gap,) = analysis.selection_gaps(groups_of(run), [peek])
    held = []
    for half in combinations(range(5), 2):
        rest = [n for n in range(5) if n not in half]
        for choose, score in ((list(half), rest), (rest, list(half))):
            best = scores[:, choose].mean(1).argmax()
            held.append((len(score), (scores[best] - scores[-1])[score].mean()))
    assert gap.kept == pytest.approx(sum(n * value for n, value in held) / sum(n for n, _ in held), abs=0.004)
    assert gap.gain == pytest.approx(scores.mean(1).max() - scores[-1].mean()) and gap.gain > gap.kept


def test_noise_gains_and_keeps_nothing():
    """Checkpoints that are equally good: choosing by the test list wins, and not one bit of it is real."""
    rng = np.random.default_rng(4)
    runs = [make_record("bcp", 0.7, spread=0.05, cases=40, seed=seed) for seed in range(20)]
    peeks = [make_peek(run, rng.normal(0, 0.05, (10, 40)).tolist()) for run in runs]
    (gap,) = analysis.selection_gaps(groups_of(*runs), peeks)
    assert gap.runs == 20 and gap.over == "runs" and gap.low > 0.005
    assert gap.kept_low < 0 < gap.kept_high and abs(gap.kept) < gap.gain / 3


def test_a_gap_over_runs_is_students_t():
    runs = [make_record("bcp", UP, seed=seed) for seed in range(4)]
    (gap,) = analysis.selection_gaps(groups_of(*runs), [make_peek(run, (0.01 * n,)) for n, run in enumerate(runs[:3])])
    assert (gap.runs, gap.ids, gap.over) == (3, [run["id"] for run in runs[:3]], "runs")
    wanted = stats.t.interval(0.95, 2, 0.01, stats.sem([0, 0.01, 0.02]))
    for values in ((gap.gain, gap.low, gap.high), (gap.kept, gap.kept_low, gap.kept_high)):
        assert values == pytest.approx((0.01, *wanted))


def test_a_gap_is_in_the_mean_over_classes_and_over_patients():
    dice = {f"f0c0{n}": {"x": 0.5, "y": 0.7} for n in range(4)}
    run = make_record("bcp", dice, cases=4, classes=("x", "y"), per_patient=2)
    shift = {"f0c00": {"x": 0.2, "y": 0.0}, "f0c01": {"x": 0.0, "y": 0.0}, "f0c02": 0.0, "f0c03": 0.0}
    (gap,) = analysis.selection_gaps(groups_of(run), [make_peek(run, (shift,))])
    assert gap.last == pytest.approx(0.6) and gap.gain == pytest.approx(0.1 / 4)
    assert gap.kept == pytest.approx(0.0)  # the first patient alone chooses it, and gains nothing on the second
    assert math.isnan(gap.low)  # of two patients nothing is known


def test_runs_without_a_choice_have_no_gap():
    runs = [make_record("bcp", UP), make_record("cps", UP)]
    only_last = make_peek(runs[1], ())
    stranger = make_peek(make_record("dtc"))
    gaps = analysis.selection_gaps(groups_of(*runs), [make_peek(runs[0]), only_last, stranger])
    assert [gap.ids for gap in gaps] == [[runs[0]["id"]]]
    assert analysis.selection_gaps(groups_of(*runs), []) == []


def test_a_peek_that_is_not_of_its_record_is_refused():
    run = make_record("bcp", UP)
    groups, peek = groups_of(run), make_peek(run)

    def refused(change, message):
        broken = copy.deepcopy(peek)
        change(broken["checkpoints"])
        with pytest.raises(ValueError, match=f"peek {run['id']}: {message}") as error:
            analysis.selection_gaps(groups, [broken])
        assert "\n" not in str(error.value)

    refused(lambda points: points[-1]["cases"][0].update(dice=0.5), "the rows of its last checkpoint are not those")
    refused(lambda points: points.pop(), "the rows of its last checkpoint are not those")
    refused(lambda points: points.clear(), "the rows of its last checkpoint are not those")
    refused(lambda points: points[0]["cases"].pop(), "iteration 1000 has 5 rows, expected the 6 cases and classes")
    refused(lambda points: points[0]["cases"].append(points[0]["cases"][0]), "iteration 1000 has 7 rows")
    refused(lambda points: points[0]["cases"][0].update(dice=float("nan")), "dice of case f0c00, class organ, is NaN")
    with pytest.raises(ValueError, match=f"peek {run['id']}: occurs twice"):
        analysis.selection_gaps(groups, [peek, peek])


# efficiency


def test_the_label_curve_by_hand():
    runs = [make_record("bcp", dice + 0.1 * seed, labeled=labeled, seed=seed)
            for labeled, dice in ((4, 0.55), (8, 0.75), (16, 0.85)) for seed in range(2)]  # fmt: skip
    runs.append(make_record("bcp", 0.2, labeled=16, control="noise"))
    runs.append(make_record("supervised", 0.5, labeled=16))
    curve, single = analysis.label_efficiency(groups_of(*runs))
    assert (curve.method, curve.span, curve.comparable) == ("bcp", (4, 16), True)
    assert [(point.x, point.n) for point in curve.points] == [(4, 2), (8, 2), (16, 2)]
    assert [point.mean for point in curve.points] == pytest.approx([0.6, 0.8, 0.9])
    assert curve.area == pytest.approx((0.7 + 0.85) / 2)
    assert (curve.points[0].low, curve.points[0].high) == pytest.approx((0.6 - 0.635310, 0.6 + 0.635310), abs=1e-6)
    assert [group.runs[0]["spec"]["labeled"] for group in curve.groups] == [4, 8, 16]
    assert single.method == "supervised" and len(single.points) == 1 and not single.comparable
    assert math.isnan(single.area) and math.isnan(single.points[0].low) and single.points[0].n == 1


def test_areas_over_other_numbers_are_not_comparable():
    def curves(*counts):
        runs = [make_record(name, 0.5, labeled=labeled) for name, labels in zip(("bcp", "cps"), counts, strict=True)
                for labeled in labels]  # fmt: skip
        return [curve.comparable for curve in analysis.label_efficiency(groups_of(*runs))]

    assert curves((4, 16), (4, 16)) == [True, True]
    assert curves((4, 16), (8, 16)) == [False, False]
    assert curves((4, 16), (4, 8, 16)) == [False, False]  # a bend that one curve cannot show
    assert curves((4, 16), (4,)) == [True, False]
    assert curves((4,), (16,)) == []


def test_settings_data_and_unlabeled_counts_have_their_own_curves():
    runs = [make_record("bcp", 0.5, labeled=labeled, **settings) for labeled in (4, 8)
            for settings in ({}, {"hp": {"weight": 2}}, {"network": "unet"}, {"dataset": "ACDC"}, {"unlabeled": 8},
                             {"precision": "bf16-mixed"}, {"split": "other"})]  # fmt: skip
    curves = analysis.label_efficiency(groups_of(*runs))
    assert len(curves) == 7 and all(len(curve.points) == 2 and curve.comparable for curve in curves)


def test_a_run_without_unlabeled_cases_stands_on_the_curve_of_its_method():
    """It draws none, and so has another hash: all 80 labeled, or 0 unlabeled asked for."""
    runs = [make_record("bcp", 0.6, labeled=8), make_record("bcp", 0.8, labeled=80, unlabeled_batch=0),
            make_record("bcp", 0.7, labeled=8, unlabeled_batch=4), make_record("cps", 0.5, labeled=8),
            make_record("bcp", 0.9, labeled=80, unlabeled_batch=0, hp={"weight": 2}),
            make_record("dtc", 0.3, labeled=8, unlabeled_batch=0), make_record("dtc", 0.2, labeled=8),
            make_record("supervised", 0.4, labeled=8), make_record("supervised", 0.8, labeled=80)]  # fmt: skip
    curves = analysis.label_efficiency(groups_of(*runs))
    found = sorted((curve.method, [(point.x, round(point.mean, 3)) for point in curve.points]) for curve in curves)
    assert found == [("bcp", [(8, 0.6), (80, 0.8)]), ("bcp", [(8, 0.7), (80, 0.8)]), ("bcp", [(80, 0.9)]),
                     ("cps", [(8, 0.5)]), ("dtc", [(8, 0.2)]), ("dtc", [(8, 0.3)]),
                     ("supervised", [(8, 0.4), (80, 0.8)])]  # fmt: skip
    runs = [make_record("bcp", 0.6, unlabeled=32), make_record("bcp", 0.7), make_record("supervised", 0.5),
            make_record("bcp", 0.4, unlabeled=0, unlabeled_batch=0)]  # fmt: skip
    (curve,) = analysis.unlabeled_efficiency(groups_of(*runs))
    assert [(point.x, round(point.mean, 3)) for point in curve.points] == [(0, 0.4), (32, 0.6), (64, 0.7)]


def test_the_unlabeled_curve_starts_at_the_supervised_baseline():
    runs = [make_record("bcp", 0.6, unlabeled=16), make_record("bcp", 0.7, unlabeled=32), make_record("bcp", 0.8),
            make_record("bcp", 0.1, unlabeled=16, control="copies"), make_record("cps", 0.9),
            make_record("supervised", 0.5), make_record("supervised", 0.4, labeled=8),
            make_record("bcp", 0.6, labeled=8)]  # fmt: skip
    bcp, cps = analysis.unlabeled_efficiency(groups_of(*runs))
    assert [(point.x, pytest.approx(point.mean)) for point in bcp.points] == [(0, 0.5), (16, 0.6), (32, 0.7), (64, 0.8)]
    assert bcp.area == pytest.approx((16 * 0.55 + 16 * 0.65 + 32 * 0.75) / 64) and bcp.span == (0, 64)
    assert bcp.method == "bcp" and method(bcp.groups[0]) == "supervised" and not bcp.comparable
    assert cps.method == "cps" and [point.x for point in cps.points] == [0, 64]


def test_unlabeled_curves_without_a_baseline_and_with_patients():
    runs = [make_record("bcp", 0.6, unlabeled=16, per_patient=2), make_record("bcp", 0.8, per_patient=2)]
    (curve,) = analysis.unlabeled_efficiency(groups_of(*runs))
    assert [point.x for point in curve.points] == [16, 64] and curve.area == pytest.approx(0.7) and curve.comparable
    assert analysis.unlabeled_efficiency(groups_of(runs[1], make_record("supervised", per_patient=2))) == []


def test_curves_of_another_metric():
    runs = [make_record("bcp", distance=distance, labeled=labeled) for labeled, distance in ((4, 8.0), (8, 4.0))]
    (curve,) = analysis.label_efficiency(groups_of(*runs), "hd95_mm")
    assert [point.mean for point in curve.points] == [16, 8] and curve.area == 12


# negative controls


def test_a_control_that_gains_is_flagged():
    higher = [value + 0.1 for value in UP]
    runs = [make_record("supervised", 0.6), make_record("bcp", higher), make_record("bcp", UP, control="noise"),
            make_record("cps", 0.55, spread=0.01, control="noise"),
            make_record("cps", UP, control="copies")]  # fmt: skip
    controls = {(method(one.group), one.control): one for one in analysis.negative_controls(groups_of(*runs))}
    assert set(controls) == {("bcp", "noise"), ("cps", "noise"), ("cps", "copies")}
    one = controls["bcp", "noise"]
    assert method(one.baseline) == "supervised" and one.pair.second is one.baseline
    assert one.pair.first is one.group and one.pair.mean == pytest.approx(0.035)
    assert one.pair.p == 2 / 64 and one.pair.p_holm == 6 / 64 and not one.gains  # three controls are one family
    assert one.regular.mean == pytest.approx(0.135) and one.regular.p_holm == 2 / 64
    assert controls["cps", "copies"].regular is None
    (alone,) = analysis.negative_controls(groups_of(*runs[:3]))
    assert alone.pair.p_holm == 2 / 64 and alone.gains
    (loss,) = analysis.negative_controls(groups_of(runs[0], runs[3]))
    assert loss.pair.p_holm == 2 / 64 and loss.pair.mean < 0 and not loss.gains


def test_a_control_that_brings_the_surface_closer_gains():
    near = make_record("bcp", distance=[1, 2, 3, 4, 5, 6], control="copies")
    (one,) = analysis.negative_controls(groups_of(make_record("supervised", distance=8.0), near), "asd_voxel")
    assert one.pair.mean < 0 and one.gains
    (one,) = analysis.negative_controls(groups_of(make_record("supervised", distance=0.5), near), "asd_voxel")
    assert one.pair.mean > 0 and one.pair.p_holm < 0.05 and not one.gains


def test_controls_of_other_tables_are_other_families_and_need_a_baseline():
    runs = [make_record("supervised", 0.6, labeled=labeled) for labeled in (8, 16)]
    runs += [make_record("bcp", UP, labeled=labeled, control="other:ACDC") for labeled in (4, 8, 16)]
    controls = {one.group.runs[0]["spec"]["labeled"]: one for one in analysis.negative_controls(groups_of(*runs))}
    assert controls[8].pair.p_holm == controls[16].pair.p_holm == 2 / 64 and controls[8].control == "other:ACDC"
    assert controls[4].baseline is controls[4].pair is None and not controls[4].gains


def test_the_regular_run_saw_as_many_unlabeled_images():
    runs = [make_record("supervised", 0.6), make_record("bcp", 0.9), make_record("bcp", UP, unlabeled=8),
            make_record("bcp", UP, unlabeled=8, control="noise"), make_record("bcp", UP, control="noise")]  # fmt: skip
    controls = {one.group.runs[0]["spec"].get("unlabeled"): one for one in analysis.negative_controls(groups_of(*runs))}
    assert controls[8].regular.mean == pytest.approx(0.035) and controls[None].regular.mean == pytest.approx(0.3)


# the committed records


def committed():
    runs = [run for run in records.read_all(ROOT / "results" / "records") if run["spec"]["dataset"] == "LA"]
    if not runs:
        pytest.skip("no records of LA")
    return leaderboard.groups(runs)


@pytest.mark.parametrize(("metric", "unit"), [("dice", ""), ("hd95_voxel", "diagonal_voxel")])
def test_the_comparisons_of_the_committed_runs_are_scipys(metric, unit):
    groups = committed()
    pairs = analysis.versus_supervised(groups, metric)
    families = {}
    for pair in pairs:
        scores = []
        for group in (pair.first, pair.second):
            table = {}
            for run in group.runs:
                for row in run["cases"]:
                    value = row[unit] if row[metric] is None else row[metric]
                    table.setdefault(row["case"], []).append(value)
            scores.append({case: np.mean(values) for case, values in table.items()})
        cases = sorted(scores[0].keys() & scores[1].keys())
        differences = np.array([scores[0][case] - scores[1][case] for case in cases]).round(12)
        assert pair.n == len(cases) and pair.mean == pytest.approx(differences.mean())
        assert pair.p == pytest.approx(stats.wilcoxon(differences).pvalue)
        wanted = stats.bootstrap((differences,), np.mean, method="BCa", n_resamples=9999,
                                 rng=np.random.default_rng(0)).confidence_interval  # fmt: skip
        assert (pair.low, pair.high) == pytest.approx((wanted.low, wanted.high))
        better = differences > 0 if metric == "dice" else differences < 0
        assert (pair.wins, pair.wins + pair.ties + pair.losses) == (better.sum(), len(cases))
        spec = pair.first.runs[0]["spec"]
        families.setdefault((spec["protocol"], spec["labeled"], pair.first.data), []).append(pair)
    assert pairs
    for family in families.values():
        assert [pair.p_holm for pair in family] == pytest.approx(stats_holm([pair.p for pair in family]))


def test_the_best_committed_run_leads_its_table():
    groups = committed()
    for table in analysis.tables(groups):
        (best, mean), *others = analysis.ranked(table)
        assert mean == pytest.approx(max(fmean(score["dice"] for score in group.scores) for group in table))
        against = [pair for pair in analysis.versus_best(groups) if pair.second is best]
        assert len(against) == len(others) and all(pair.mean < 0 for pair in against)
