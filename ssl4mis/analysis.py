"""Findings from groups of runs: paired comparisons, cliques, the selection gap, efficiency and negative controls.

A score of a group is the mean over classes and over its runs (seeds, folds). What is tested and resampled are patients:
cases of one patient are averaged first, for two frames of one heart are not two samples. So a p-value speaks of these
trained networks on other patients, and not of other runs; intervals over runs say that they are.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from statistics import fmean
from typing import NamedTuple

import numpy as np

from ssl4mis import statistics as stats
from ssl4mis.leaderboard import Group
from ssl4mis.records import DISTANCES, OVERLAPS
from ssl4mis.selection import row_scores

LARGER_IS_BETTER = dict.fromkeys(OVERLAPS, True) | dict.fromkeys(DISTANCES, False)  # and all metrics there are
LEVEL = 0.05
SPLITS = 500  # random splits of the test patients in halves, each used in both directions
# of a method and its baseline
SAME_SETTINGS = ("network", "width", "precision", "labeled_batch", "augmentation", "iterations")
# what is no setting of the training alone: of the method, and of the data
OTHERS = ("method", "hp", "unlabeled_batch",
          "dataset", "protocol", "recipe", "labeled", "unlabeled", "control", "fold", "seed")  # fmt: skip


class Pair(NamedTuple):
    """Two groups on the same n patients; `mean`, `low` and `high` are of first - second in the metric's own unit.

    `wins` counts patients for whom `first` is better, whichever way the metric goes. `p` is of the signed-rank test
    over patients, `p_holm` after Holm's correction for the family of its table; `note` says why one is NaN, and what
    else a reader has to know.
    """

    first: Group
    second: Group
    metric: str
    n: int
    mean: float
    low: float
    high: float
    p: float
    p_holm: float
    wins: int
    ties: int
    losses: int
    note: str


class Gap(NamedTuple):
    """What choosing the checkpoint by the test list would have gained a group, in Dice (0..1).

    `ids` are the runs with a peek, `runs` their number, `checkpoints` how many each chose from. `last` and `best` are
    mean Dice of the last and of the best checkpoint, `gain` their difference; `kept` is what is left of it on patients
    that had no part in the choice. Intervals are over `over`: runs, or the cases of the only one.
    """

    group: Group
    runs: int
    last: float
    best: float
    gain: float
    low: float
    high: float
    kept: float
    kept_low: float
    kept_high: float
    over: str
    ids: list[str]
    checkpoints: list[int]


class Point(NamedTuple):
    """Mean score of a group's n runs at x labeled (or unlabeled) patients; the t interval over runs, NaN with one."""

    x: float
    mean: float
    low: float
    high: float
    n: int


class Curve(NamedTuple):
    """One method with one set of hyper-parameters over a number of patients; `groups` are those of the points.

    `area` is the mean height between the ends of `span`, NaN with one point. Areas of curves with `comparable` stand
    on the same numbers of patients; others must not be compared.
    """

    method: str
    groups: list[Group]
    points: list[Point]
    area: float
    span: tuple[float, float]
    comparable: bool


class Control(NamedTuple):
    """A method with replaced unlabeled images against its supervised baseline, and `regular`: with the real ones."""

    group: Group
    control: str
    baseline: Group | None
    pair: Pair | None
    regular: Pair | None
    gains: bool


def case_scores(group: Group, metric: str = "dice", policy: str = "penalty") -> dict[str, float]:
    """Case -> mean over classes and over the runs that tested it, in the metric's own unit, sorted by case.

    Raises ValueError for an unknown metric or policy, and for mm where the size of a voxel is unknown.
    """
    if metric not in LARGER_IS_BETTER:
        raise ValueError(f"metric {metric!r} is unknown, expected one of {', '.join(LARGER_IS_BETTER)}")
    if not _measurable(group, metric):
        raise ValueError(f"{group.runs[0]['id']}: {metric} of voxels of unknown size, expected a metric in voxels")
    found = defaultdict(list)
    for run in group.runs:
        for case, score in _means(run["cases"], run["id"], metric, policy).items():
            found[case].append(score)
    return {case: fmean(found[case]) for case in sorted(found)}


def patient_scores(group: Group, metric: str = "dice", policy: str = "penalty") -> dict[str, float]:
    """First case of a patient -> mean of `case_scores` over the patient's cases, the sample of every test here.

    Cases of a patient are neighbours in the test list, `per_patient` of them; records that do not know it have 1.
    """
    scores = case_scores(group, metric, policy)
    return {cases[0]: fmean(scores[case] for case in cases) for cases in sorted(_patients(group.runs))}


def ranked(groups: Iterable[Group], metric: str = "dice", policy: str = "penalty") -> list[tuple[Group, float]]:
    """Groups and their mean over patients, best first; ties keep their order."""
    means = [(group, fmean(patient_scores(group, metric, policy).values())) for group in groups]
    return sorted(means, key=lambda entry: -entry[1] if LARGER_IS_BETTER[metric] else entry[1])


def tables(groups: Iterable[Group]) -> list[list[Group]]:
    """Groups that may be compared: the same cases and the same labeled and unlabeled counts; no negative controls."""
    found = defaultdict(list)
    for group in groups:
        if not control_of(group):
            found[(*_place(group), _spec(group).get("unlabeled"))].append(group)
    return list(found.values())


def control_of(group: Group) -> str:
    """What replaced the unlabeled images; "" for nothing."""
    return _spec(group).get("control") or ""


def baseline(group: Group, groups: Iterable[Group]) -> Group | None:
    """The supervised group on the same cases and labels that is equal in SAME_SETTINGS; a supervised group is its own.

    Of several, the one with most other settings in common. None where there is none.
    """
    candidates = [
        other for other in groups
        if _spec(other)["method"] == "supervised" and not control_of(other) and _place(other) == _place(group)
        and all(_spec(other).get(key) == _spec(group).get(key) for key in SAME_SETTINGS)
    ]  # fmt: skip
    return min(candidates, key=lambda other: (len(_differing(group, other)), _key(other)), default=None)


def compare(first: Group, second: Group, metric: str = "dice", policy: str = "penalty") -> Pair:
    """Paired comparison over the common patients, with p_holm as for a family of one; ValueError as `case_scores`."""
    nan = float("nan")
    if not (_measurable(first, metric) and _measurable(second, metric)):
        return Pair(first, second, metric, 0, nan, nan, nan, nan, nan, 0, 0, 0, "voxels of unknown size: no mm")
    left, right = (patient_scores(group, metric, policy) for group in (first, second))
    common = sorted(left.keys() & right.keys())
    if not common:
        return Pair(first, second, metric, 0, nan, nan, nan, nan, nan, 0, 0, 0, "no common cases")
    # rounded, so that differences that are equal but for the last bit are ties
    differences = [round(left[name] - right[name], 12) for name in common]
    wins, ties, losses = stats.win_rate(differences)
    if not LARGER_IS_BETTER[metric]:
        wins, losses = losses, wins
    p = stats.wilcoxon(differences)
    note = "; ".join(_notes(first, second, len(common), wins + losses))
    return Pair(first, second, metric, len(common), fmean(differences), *stats.mean_interval(differences), p, p,
                wins, ties, losses, note)  # fmt: skip


def versus_supervised(groups: Sequence[Group], metric: str = "dice", policy: str = "penalty") -> list[Pair]:
    """Every method against its supervised baseline: planned pairs, with Holm over those of a table and this metric.

    A method without a baseline has no pair; a note names settings of the training in which the two differ.
    """
    found = []
    for table in tables(groups):
        pairs = []
        for group in table:
            other = baseline(group, groups)
            if other is not None and _spec(group)["method"] != "supervised":
                pair = compare(group, other, metric, policy)
                if differing := _differing(group, other):
                    pair = pair._replace(note="; ".join(filter(None, [pair.note, f"{', '.join(differing)} differ"])))
                pairs.append(pair)
        found += _corrected(pairs)
    return found


def versus_best(groups: Iterable[Group], metric: str = "dice", policy: str = "penalty") -> list[Pair]:
    """Every group against the one with the best mean of its table, a complete one where there is one.

    As the best is chosen by looking at all, the family of Holm's correction is every pair of the table: p_holm is the
    one of `all_pairs`.
    """
    found = []
    for table in tables(groups):
        order = [group for group, _ in ranked(_measured(table, metric), metric, policy)]
        best = next((group for group in order if group.complete), order[0] if order else None)
        for pair in all_pairs(table, metric, policy):
            if pair.second is best:
                found.append(pair)
            elif pair.first is best:
                found.append(_swapped(pair))
    return found


def all_pairs(groups: Iterable[Group], metric: str = "dice", policy: str = "penalty") -> list[Pair]:
    """Every pair of a table, the one with the better mean first; Holm over all pairs of the table."""
    found = []
    for table in tables(groups):
        order = [group for group, _ in ranked(_measured(table, metric), metric, policy)]
        found += _corrected([compare(first, second, metric, policy) for first, second in combinations(order, 2)])
    return found


def cliques(
    groups: Iterable[Group], pairs: Iterable[Pair], level: float = LEVEL, policy: str = "penalty"
) -> list[list[Group]]:
    """Largest runs of neighbours, ordered by mean, in which no pair differs with p_holm below `level`; best first.

    `pairs` are those of `all_pairs`, all of one metric. A pair that could not be tested is not known to differ, and two
    groups may not differ and yet share no clique, where one between them does: the pairs say more than the picture. A
    group that differs from both neighbours is in none. Raises ValueError where a pair of one table is missing.
    """
    pairs = list(pairs)
    differ = {frozenset((_key(pair.first), _key(pair.second))): pair.p_holm < level for pair in pairs}
    found = []
    for table in tables(groups):
        metric = pairs[0].metric if pairs else "dice"
        order = [group for group, _ in ranked(_measured(table, metric), metric, policy)]
        reached = 0
        for start in range(len(order)):
            stop = start + 1
            while stop < len(order) and not any(_looked_up(differ, other, order[stop]) for other in order[start:stop]):
                stop += 1
            if stop > max(reached, start + 1):
                found.append(order[start:stop])
            reached = max(reached, stop)
    return found


def selection_gaps(groups: Iterable[Group], peeks: Iterable[dict]) -> list[Gap]:
    """The gap of every group that has peeks with at least two checkpoints; runs without one do not take part.

    The gain of a run is the best of its checkpoints' mean Dice over patients minus that of the last one, so never
    negative: choosing by the list that is then reported can only win. `kept` is a two-fold cross-validation of the
    choice, repeated over 500 random splits of the test patients with a fixed seed: one half chooses, the other is
    scored. Intervals are Student's t over runs; for a single run they are over its patients: of the gain by percentile
    bootstrap that chooses again in each resample, of what is kept by BCa bootstrap of each patient's mean.

    Raises ValueError naming the id where two peeks have it, where a peek lacks rows, or where the rows of its last
    checkpoint are not those of the record.
    """
    by_id = {}
    for peek in peeks:
        if peek["id"] in by_id:
            raise ValueError(f"peek {peek['id']}: occurs twice, expected one per record")
        by_id[peek["id"]] = peek
    found = []
    for group in groups:
        courses = {run["id"]: _course(run, by_id[run["id"]]) for run in group.runs if run["id"] in by_id}
        courses = {name: scores for name, scores in courses.items() if len(scores) > 1}
        if courses:
            found.append(_gap(group, courses))
    return found


def label_efficiency(groups: Iterable[Group], metric: str = "dice") -> list[Curve]:
    """Mean score against the number of labeled patients, per method and settings; the area is over log2 of it.

    Groups of a curve are equal in all but that number, and what is left of the training list is unlabeled: nothing,
    where all are labeled. Data sets on which no method has two numbers are left out; where one has, the others stand
    beside it with one point.
    """
    families = defaultdict(list)
    for group in _measured(groups, metric):
        if not control_of(group):
            *family, _ = _place(group)
            families[(*family, _spec(group).get("unlabeled"))].append(group)
    curves = (_members(family, lambda group: _spec(group)["labeled"]) for family in families.values())
    return [curve for members in curves for curve in _curves(members, metric, log2=True)]


def unlabeled_efficiency(groups: Sequence[Group], metric: str = "dice") -> list[Curve]:
    """Mean score against the number of unlabeled patients, at one labeled count; the area is over the number itself.

    The point at 0 is the method without any or, where that was not run, the supervised baseline. Data sets on which no
    method has two numbers of its own are left out.
    """
    families = defaultdict(list)
    for group in _measured(groups, metric):
        if not control_of(group) and _spec(group)["method"] != "supervised":
            families[_place(group)].append(group)
    found = []
    for family in families.values():
        curves = _members(family, _unlabeled)
        if any(len(curve) > 1 for curve in curves):
            for curve in curves:
                without = baseline(next(iter(curve.values())), groups)
                if without is not None:
                    curve.setdefault(0, without)
            found += _curves(curves, metric, log2=False)
    return found


def negative_controls(groups: Sequence[Group], metric: str = "dice", policy: str = "penalty") -> list[Control]:
    """Every group with replaced unlabeled images against its supervised baseline.

    Holm's family are the controls on the same cases and labels; `gains` is a better mean with p_holm below 0.05. A
    control that gains asks for an explanation, and is not yet a fault: a larger batch or a consistency loss on copies
    can regularise honestly, but a leak of labels looks the same. `regular` is the same method with the real unlabeled
    images, as `versus_supervised` has it.
    """
    regular = {_but_control(pair.first): pair for pair in versus_supervised(groups, metric, policy)}
    families = defaultdict(list)
    for group in groups:
        if control_of(group):
            families[_place(group)].append(group)
    found = []
    for family in families.values():
        compared = [(group, baseline(group, groups)) for group in family]
        pairs = [compare(group, other, metric, policy) for group, other in compared if other is not None]
        pairs = {_key(pair.first): pair for pair in _corrected(pairs)}
        for group, other in compared:
            pair = pairs.get(_key(group))
            gains = pair is not None and pair.p_holm < LEVEL and (pair.mean > 0) == LARGER_IS_BETTER[metric]
            found.append(Control(group, control_of(group), other, pair, regular.get(_but_control(group)), gains))
    return found


def _gap(group, courses):
    lasts = [scores[-1].mean() for scores in courses.values()]
    gains = [stats.gain(*scores) for scores in courses.values()]
    held = [_held_out(scores) for scores in courses.values()]
    kept = [values.mean() if len(values) > 1 else float("nan") for values in held]
    if len(courses) > 1:
        over, interval = "runs", stats.t_interval(gains)
        kept_interval = stats.UNKNOWN if np.isnan(kept).any() else stats.t_interval(kept)
    else:
        over, interval = "cases", stats.choice_interval(*courses.values())
        kept_interval = stats.UNKNOWN if np.isnan(kept).any() else stats.mean_interval(*held)
    numbers = fmean(lasts), fmean(lasts) + fmean(gains), fmean(gains), *interval, fmean(kept), *kept_interval
    return Gap(group, len(courses), *map(float, numbers), over, list(courses), list(map(len, courses.values())))


def _course(run, peek):
    """Mean Dice over classes of every checkpoint and patient, as an array (checkpoints, patients)."""
    rows = {(row["case"], row["class"]): row for row in run["cases"]}
    for point in peek["checkpoints"]:
        found = sorted((row["case"], row["class"]) for row in point["cases"])
        if found != sorted(rows):
            raise ValueError(f"peek {run['id']}: iteration {point['iteration']} has {len(found)} rows, expected the"
                             f" {len(rows)} cases and classes of the record")  # fmt: skip
    last = peek["checkpoints"][-1] if peek["checkpoints"] else {"cases": []}
    if {(row["case"], row["class"]): row for row in last["cases"]} != rows:
        raise ValueError(f"peek {run['id']}: the rows of its last checkpoint are not those of the record")
    means = [_means(point["cases"], f"peek {run['id']}") for point in peek["checkpoints"]]
    patients = sorted(_patients([run]))
    return np.array([[fmean(scores[case] for case in cases) for cases in patients] for scores in means])


def _held_out(scores):
    """Per patient the mean gain over the last checkpoint of those that halves without the patient chose: (patients,).

    Of checkpoints that are equally good the latest is chosen. NaN for a single patient.
    """
    count = scores.shape[1]
    if count < 2:
        return np.full(count, np.nan)
    orders = np.random.default_rng(0).permuted(np.tile(np.arange(count), (SPLITS, 1)), axis=1)
    left, right = orders[:, : count // 2], orders[:, count // 2 :]
    total = np.zeros(count)
    for choosing, scored in ((left, right), (right, left)):
        best = len(scores) - 1 - scores[::-1][:, choosing].mean(-1).argmax(0)
        np.add.at(total, scored, scores[best[:, None], scored] - scores[-1][scored])
    return total / SPLITS


def _members(groups, number):
    """Groups of one family by settings and number of patients, one {number: group} per curve.

    A run that was given no unlabeled case draws none, which is no other setting: it joins the curves of its method.
    """
    curves = defaultdict(dict)
    for group in groups:
        curves[_settings(group)][number(group)] = group
    for group in groups:
        if not _spec(group)["unlabeled_batch"] and not any(run["split"]["unlabeled"] for run in group.runs):
            joined = [curve for curve in curves.values() if any(
                _spec(other)["unlabeled_batch"] and _same_method(group, other) for other in curve.values())]
            for curve in joined:
                curve.setdefault(number(group), group)
            if joined:
                curves.pop(_settings(group), None)
    return list(curves.values())


def _curves(curves, metric, log2):
    """Curves of one family; none where no method has two points."""
    found = []
    for members in curves:
        members = dict(sorted(members.items()))
        points = []
        for x, group in members.items():
            scores = [score[metric] for score in group.scores]
            points.append(Point(x, fmean(scores), *stats.t_interval(scores), len(scores)))
        xs = list(members)
        height = stats.area(xs, [point.mean for point in points], log2)
        groups = list(members.values())
        # the last one: the first may be the supervised baseline
        found.append(Curve(_spec(groups[-1])["method"], groups, points, height, (xs[0], xs[-1]), False))
    long = {tuple(point.x for point in curve.points) for curve in found if len(curve.points) > 1}
    if not long:
        return []
    return [curve._replace(comparable=len(long) == 1 and len(curve.points) > 1) for curve in found]


def _corrected(pairs):
    adjusted = stats.holm([pair.p for pair in pairs])
    return [pair._replace(p_holm=p) for pair, p in zip(pairs, adjusted, strict=True)]


def _swapped(pair):
    return pair._replace(first=pair.second, second=pair.first, mean=0.0 - pair.mean, low=0.0 - pair.high,
                         high=0.0 - pair.low, wins=pair.losses, losses=pair.wins)  # fmt: skip


def _looked_up(differ, first, second):
    names = frozenset((_key(first), _key(second)))
    if names not in differ:
        raise ValueError(f"{' and '.join(sorted(names))}: no pair of them, expected every pair of the table")
    return differ[names]


def _notes(first, second, n, nonzero):
    what = "patients" if _per_patient(first.runs[0]) > 1 else "cases"
    if n < stats.NEEDED:
        yield f"n = {n} {what}, at least {stats.NEEDED} are needed"
    elif not nonzero:
        yield "all differences are 0"
    elif nonzero < stats.NEEDED:
        yield f"{nonzero} of {n} differences are not 0, at least {stats.NEEDED} are needed"
    if any(len({run["spec"]["fold"] for run in group.runs}) < _folds(group) for group in (first, second)):
        yield f"fold(s) missing: compared over {n} common {what}"
    single = [_spec(group)["method"] for group in (first, second) if len(group.runs) == 1]
    if single:
        yield f"one run of {' and of '.join(single)}: nothing is known about the spread over runs"


def _means(rows, name, metric="dice", policy="penalty"):
    """Case -> mean over classes; ValueError naming the record where a score is NaN, which policies do not fill."""
    found = defaultdict(list)
    for row in rows:
        score = row_scores(row, policy)[metric]
        if np.isnan(score):
            raise ValueError(f"{name}: {metric} of case {row['case']}, class {row['class']}, is NaN, expected a number")
        found[row["case"]].append(score)
    return {case: fmean(values) for case, values in found.items()}


def _patients(runs):
    """The test cases of each patient, as a set of tuples."""
    found = set()
    for run in runs:
        test, step = run["split"]["test"], _per_patient(run)
        found |= {tuple(test[start : start + step]) for start in range(0, len(test), step)}
    return found


def _per_patient(run):
    return run["split"].get("per_patient") or 1


def _spec(group):
    return group.runs[0]["spec"]


def _folds(group):
    return group.runs[0]["split"]["folds"]


def _key(group):
    return group.runs[0]["id"]


def _place(group):
    spec = _spec(group)
    return spec["dataset"], spec["protocol"], group.split, group.data, _folds(group), spec["labeled"]


def _but_control(group):
    return *_place(group), _spec(group).get("unlabeled"), *_settings(group)


def _settings(group):
    return tuple(_spec(group)[key] for key in ("method", "network", "precision")) + (group.runs[0]["hp_hash"],)


def _differing(group, other):
    """Settings of the training in which two groups differ, sorted."""
    one, two = _spec(group), _spec(other)
    return sorted(key for key in (one.keys() | two.keys()) - set(OTHERS) if one.get(key) != two.get(key))


def _same_method(group, other):
    """Whether two groups differ in nothing but the data and the number of unlabeled samples in a step."""
    one, two = _spec(group), _spec(other)
    return (one["method"], one["hp"]) == (two["method"], two["hp"]) and not _differing(group, other)


def _unlabeled(group):
    """Unlabeled patients that a run draws from: as many as asked for, or the mean over runs, as folds may differ."""
    spec = _spec(group)
    if not spec["unlabeled_batch"]:
        return 0
    every = fmean(len(run["split"]["unlabeled"]) / _per_patient(run) for run in group.runs)
    return spec.get("unlabeled", every)


def _measurable(group, metric):
    """Whether the metric has a unit: voxels of unknown size have no distance in mm."""
    return not metric.endswith("_mm") or all(run.get("data", {}).get("spacing_known", True) for run in group.runs)


def _measured(groups, metric):
    return [group for group in groups if _measurable(group, metric)]
