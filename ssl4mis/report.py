"""The cross-validation report: one self-contained HTML page and its Markdown per data set, protocol and label count.

Numbers come from the leaderboard and from `analysis`; here they are only put into words, tables and pictures.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from ssl4mis import analysis, leaderboard, peeks, plots, records, selection
from ssl4mis.document import UNKNOWN, Bullets, Charts, Fold, Pictures, Section, Table, Text, to_html, to_markdown
from ssl4mis.leaderboard import METRICS, Group, score_text
from ssl4mis.pictures import Scans

SHOWN = ("Dice", "Jaccard", "95HD", "ASD")  # compared and drawn
SCORES = (*SHOWN, "95HD_mm", "ASD_mm")
WORST = 5
UNITS = {"Dice": "%", "Jaccard": "%", "95HD": "voxel", "ASD": "voxel", "95HD_mm": "mm", "ASD_mm": "mm"}
BOARD = {  # column of the leaderboard: header
    "rank": "rank", "method": "method", "Dice": "Dice [%]", "interval": "95 % interval",
    "Dice_sd_folds": "sd folds", "Dice_sd_seeds": "sd seeds", "Jaccard": "Jaccard [%]", "95HD": "95HD", "ASD": "ASD",
    "95HD_mm": "95HD [mm]", "ASD_mm": "ASD [mm]", "missed": "missed", "false_alarms": "false alarms", "ECE": "ECE",
    "NLL": "NLL", "cases": "cases", "folds": "folds", "seeds": "seeds", "complete": "complete",
    "published": "published Dice", "versus_published": "ours is", "records": "records",
}  # fmt: skip
CONSTANT = ("missed", "false_alarms", "cases", "folds", "seeds", "complete")  # above the table where rows agree
MEANING = {  # what a column holds, in one sentence
    "Dice": "twice the overlap of prediction and truth over the sum of their volumes, in %.",
    "Jaccard": "their overlap over their union, in %.",
    "95HD": "95th percentile of the distances of both surfaces to each other, pooled, as medpy has it; in voxels, or "
    "in mm where the column says so.",
    "ASD": "mean distance of the surface of the prediction to that of the truth, as medpy has it, in voxels or mm.",
    "missed": "structures that are there and of which the prediction has no voxel.",
    "false alarms": "structures that are absent and of which the prediction has voxels.",
    "ECE": "expected calibration error of the most probable class over all voxels, 15 equal bins, 0 to 1.",
    "NLL": "mean of -log p(true class) over all voxels, in nats.",
}


class Field(NamedTuple):
    """What all rows of a page share: only within it a comparison is fair."""

    dataset: str
    protocol: str
    split: str
    data: str
    folds: int
    labeled: int


def generate(
    results, out=None, data_root=None, dataset=None, protocol=None, labeled=None, check: bool = False, broken=None
) -> list[Path]:
    """Write the reports of a results folder into `out` (reports/ in it); return the paths, HTML before Markdown.

    With `check` nothing is written; returned are the Markdown files there that the records do not give (any more).

    Args:
        results: folder with records/ and, where they are, peeks/, reported.csv and runs/ with predictions.
        data_root: folder of the scans, for the pictures of the worst cases.
        dataset, protocol, labeled: only these; ValueError of one line that names what there is.
        broken: called with the error of a broken file, as of `records.read_all`; without it the error is raised.
    """
    results = Path(results)
    if not results.is_dir():
        raise ValueError(f"{results}: no such folder, expected a results folder with records/ in it")
    published = results / "reported.csv"
    found = render(
        records.read_all(results / "records", broken), peeks.read_all(results / "peeks", broken),
        leaderboard.read_reported(published) if published.exists() else (), Scans(results / "runs", data_root),
        dataset=dataset, protocol=protocol, labeled=labeled,
    )  # fmt: skip
    folder = Path(out) if out else results / "reports"
    if check:
        return [path for path in sorted(folder.glob("*.md"))
                if path.read_bytes() != found.get(path.name, "").encode()]
    return [records.write_text(folder / name, text) for name, text in found.items()]


def render(
    runs: Iterable[dict], peeked: Iterable[dict] = (), reported: Iterable[dict] = (), scans: Scans | None = None,
    rule: str = "last", policy: str = "penalty", dataset=None, protocol=None, labeled=None,
) -> dict[str, str]:
    """File name -> text of all pages, HTML before Markdown; the order of the records does not matter.

    Raises ValueError like `leaderboard.groups`, and for a data set, protocol or label count without records.
    """
    counted = selection.select(runs, rule)
    found = leaderboard.groups(counted, rule, policy)
    table = leaderboard.rows(counted, list(reported), rule, policy)
    wanted = {"dataset": dataset, "protocol": protocol, "labeled": labeled}
    fields = _wanted(sorted({_field(group) for group in found}), wanted)
    pages = {}
    for name, field in _file_names(fields).items():
        page = Page(field, found, table, list(peeked), scans, rule, policy)
        title, sections = page.title, page.sections()
        pages[f"{name}.html"] = to_html(title, sections)
        pages[f"{name}.md"] = to_markdown(title, sections)
    return pages


def _wanted(fields, wanted):
    """The fields with the wanted values, names in any case; ValueError naming what there is."""
    applied = ""
    for key, value in wanted.items():
        if value is None:
            continue
        known = sorted({getattr(field, key) for field in fields})
        fields = [field for field in fields if str(getattr(field, key)).casefold() == str(value).casefold()]
        if not fields:
            there = f"expected one of {', '.join(map(str, known))}" if known else "there are no records"
            raise ValueError(f"{key} {value}: no records that count{applied}, {there}")
        applied += f"{' and' if applied else ' with'} {key} {value}"
    return fields


def _field(group):
    run = group.runs[0]
    spec = run["spec"]
    return Field(spec["dataset"], spec["protocol"], group.split, group.data, run["split"]["folds"], spec["labeled"])


def _file_names(fields):
    """Name -> field: data set, protocol, label count, and what else tells two fields apart."""
    names = {}
    for _, same in groupby(fields, key=lambda field: (field.dataset, field.protocol)):
        same = list(same)
        more = [key for key in ("split", "data", "folds") if len({getattr(field, key) for field in same}) > 1]
        for field in same:
            words = (field.dataset, field.protocol, field.labeled, *(getattr(field, key) for key in more))
            name = re.sub(r"[^\w.@-]+", "_", "-".join(str(word) for word in words if word != ""))
            while name in names:
                name += "_"
            names[name] = field
    return names


def _identity(group):
    """What makes a row of its own beside fold, seed and label count, from the most to the least telling."""
    run = group.runs[0]
    spec = run["spec"]
    return {
        "method": spec["method"], "control": f"control {spec['control']}" if spec.get("control") else "",
        "unlabeled": "" if spec.get("unlabeled") is None else f"{spec['unlabeled']} unlabeled",
        "network": spec["network"], "precision": leaderboard.precision_of(run),
        "batch": f"{spec['labeled_batch']}+{spec['unlabeled_batch']}",
        "augmentation": f"augmentation {leaderboard.augmentation_of(run)}",
        "iterations": f"{spec['iterations']} iterations", "settings": run["hp_hash"],
    }  # fmt: skip


def names_of(groups: Iterable[Group], shares: bool = True) -> dict[str, str]:
    """Id of each group's first record -> its name: the method, and as little more as tells the rows apart.

    Controls are always said, and with `shares` how many unlabeled cases were used where it was not all of them. Rows
    that differ in their labels only have one name.
    """
    found = {}
    by_method = defaultdict(list)
    for group in groups:
        by_method[group.runs[0]["spec"]["method"]].append((group.runs[0]["id"], _identity(group)))
    for method, entries in by_method.items():
        rows = [identity for _, identity in entries]
        keys = ["control", *["unlabeled"] * shares]
        for key in ("network", "precision", "batch", "augmentation", "iterations", "settings"):
            # another key only where rows still look alike
            if _alike(rows, keys) and len({row[key] for row in rows}) > 1:
                keys.append(key)
        for key, identity in entries:
            words = ", ".join(identity[word] for word in keys if identity[word])
            found[key] = f"{method} ({words})" if words else method
    return found


def _alike(rows, keys):
    return len({tuple(row[key] for key in keys) for row in rows}) < len({tuple(row.values()) for row in rows})


def _number(value, digits=2, signed=False):
    return UNKNOWN if not math.isfinite(value) else f"{value:{'+' * signed}.{digits}f}"


def _interval(low, high, factor=1.0, signed=False):
    if not (math.isfinite(low) and math.isfinite(high)):
        return UNKNOWN
    return f"[{_number(low * factor, signed=signed)}, {_number(high * factor, signed=signed)}]"


def _p(p):
    return UNKNOWN if math.isnan(p) else "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def _and(words):
    words = list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _count(number, word):
    return f"{number} {word}{'s' * (number != 1)}"


def _header(column):
    name = column.partition("_")[0]
    return f"{name} [{UNITS[column]}]"


def _device(run):
    threads = run["environment"].get("threads")
    kind, name = run["device"]["type"], run["device"]["name"]
    return f"{kind}: {name}" + (f", {_count(threads, 'thread')}" if threads and kind == "cpu" else "")


class Page:
    """What one page says of the rows of a field; the other label counts are for its curves."""

    def __init__(self, field: Field, found, table, peeked, scans, rule, policy):
        self.field, self.peeked, self.scans, self.rule, self.policy = field, peeked, scans, rule, policy
        self.family = [group for group in found if _field(group)._replace(labeled=0) == field._replace(labeled=0)]
        self.groups = [group for group in self.family if _field(group) == field]
        self.names = names_of(self.family)
        # controls and shares of the data answer other questions than the comparison of methods
        self.main = [group for group in self.groups if not _identity(group)["control"] + _identity(group)["unlabeled"]]
        self.shares = names_of(self.family, shares=False)  # of curves, on which the share is the axis
        shown = {(names[group.runs[0]["id"]], group.runs[0]["spec"]["method"])
                 for names in (self.names, self.shares) for group in self.family}  # fmt: skip
        self.looks = plots.looks(sorted(shown, key=lambda entry: entry[::-1]))
        self.runs = [run for group in self.groups for run in group.runs]
        self.labels = {run["id"]: f"R{number}" for number, run in enumerate(self.runs, 1)}
        self.table = [row for row in table if row["dataset"] == field.dataset]
        self.patients = any(run["split"].get("per_patient", 1) > 1 for run in self.runs)
        counted = f"{field.labeled} labeled {'patients' if self.patients else 'cases'}"
        self.title = f"{field.dataset}, protocol {field.protocol}, {counted}"

    def name(self, group: Group) -> str:
        """The row's name on this page."""
        return self.names[group.runs[0]["id"]]

    def _labels(self, runs):
        """Numbers of runs, in the order of the page: R1, R3 to R5."""
        places = sorted(int(self.labels[run["id"]][1:]) for run in runs)
        parts = []
        for _, entries in groupby(enumerate(places), key=lambda entry: entry[1] - entry[0]):
            row = [f"R{place}" for _, place in entries]
            parts += [f"{row[0]} to {row[-1]}"] if len(row) > 2 else row
        return ", ".join(parts)

    @cached_property
    def against_supervised(self):
        return analysis.versus_supervised(self.groups, "dice", self.policy)

    @cached_property
    def pairs(self):
        return analysis.all_pairs(self.main, "dice", self.policy)

    @cached_property
    def against_best(self):
        return analysis.versus_best(self.main, "dice", self.policy)

    @cached_property
    def ranked(self):
        return analysis.ranked(self.main, "dice", self.policy)

    @cached_property
    def gaps(self):
        return analysis.selection_gaps(self.groups, self.peeked)

    @cached_property
    def controls(self):
        return analysis.negative_controls(self.groups)

    def sections(self) -> list[Section]:
        """All sections, in order."""
        parts = (
            ("summary", "Summary", self.summary), ("leaderboard", "Leaderboard", self.leaderboard),
            ("gap", "What choosing the checkpoint on the test list would buy", self.gap),
            ("cases", "Scores of the cases", self.distributions), ("pairs", "Paired comparisons", self.comparisons),
            ("runs", "Runs, folds, classes and cases", self.details), ("worst", "Worst cases", self.worst),
            ("curves", "Learning curves", self.curves), ("labels", "Label efficiency", self.efficiency),
            ("controls", "Negative controls", self.negative), ("cost", "Cost", self.cost),
            ("how", "How it was computed", self.how),
        )  # fmt: skip
        return [Section(anchor, title, list(make())) for anchor, title, make in parts]

    # 1

    def summary(self):
        """What the numbers say in sentences, the protocol, and what is incomplete."""
        runs, field = self.runs, self.field
        cases = sorted({case for run in runs for case in run["split"]["test"]})
        folds = sorted({run["spec"]["fold"] for run in runs})
        seeds = sorted({run["spec"]["seed"] for run in runs})
        methods = sorted({run["spec"]["method"] for run in runs})
        sentences = [
            f"{_count(len(runs), 'run')} of {_count(len(methods), 'method')} "
            f"{'makes' if len(runs) == 1 else 'make'} {_count(len(self.groups), 'row')}: "
            f"{_count(len(cases), 'test case')}, {len(folds)} of {_count(field.folds, 'fold')}, "
            f"{_count(len(seeds), 'seed')} ({', '.join(map(str, seeds))})."
        ]
        if self.ranked:
            (best, high), (worst, low) = self.ranked[0], self.ranked[-1]
            sentences.append(f"The highest mean Dice is {100 * high:.2f} % ({self.name(best)})" + (
                f", the lowest {100 * low:.2f} % ({self.name(worst)})." if len(self.ranked) > 1 else "."))
        sentences += self._said_of_supervised() + self._said_of_best()
        missed = {self.name(group): sum(score["missed"] for score in group.scores) for group in self.main}
        told = _and(f"{name} {number}" for name, number in missed.items() if number)
        sentences.append(f"Structures of which a prediction has no voxel, all runs together: {told}." if told else
                         "No structure was missed altogether.")
        if self.gaps:
            told = _and(f"{100 * gap.gain:.2f} points of Dice for {self.name(gap.group)}" for gap in self.gaps)
            sentences.append(f"Choosing the checkpoint on the test list would have gained {told}.")
        gains = [self.name(control.group) for control in self.controls if control.gains]
        if gains:
            sentences.append(f"With replaced unlabeled images {_and(gains)} still "
                             f"{'gains' if len(gains) == 1 else 'gain'} over supervised training: see the flag below.")
        yield Bullets(sentences)
        yield Text("p-values and intervals over cases speak of these trained networks on other patients; how much "
                   "another seed or fold would change is in the columns over seeds and folds.", "note")
        yield Table("Protocol", ["what", "value"], self._facts())
        missing = self._incomplete()
        yield Text("Incomplete:" if missing else "Nothing is missing: every fold, two seeds or more, all measurements.")
        if missing:
            yield Bullets(missing)

    def _said_of_supervised(self):
        pairs = [pair for pair in self.against_supervised if pair.first in self.main]
        found = []
        if pairs:
            differ = [pair for pair in pairs if pair.p_holm < analysis.LEVEL]
            same = [pair for pair in pairs if pair.p_holm >= analysis.LEVEL]
            untested = [pair for pair in pairs if math.isnan(pair.p_holm)]
            said = _and(f"{self.name(pair.first)} ({_number(100 * pair.mean, signed=True)} points, 95 % interval "
                        f"{_interval(pair.low, pair.high, 100, True)}, p = {_p(pair.p_holm)})".replace("= <", "<")
                        for pair in differ)
            intro = ("Against supervised training with the same network, precision, labeled batch, augmentation and "
                     "iterations, after Holm's correction,")
            if differ:
                found.append(f"{intro} the Dice of {said} differs significantly (p < {analysis.LEVEL}).")
            if same:
                told = _and(self.name(pair.first) for pair in same)
                found.append(f"No significant difference from it was found for {told}." if differ else
                             f"{intro} no significant difference in Dice was found for {told}.")
            if untested:
                found.append("Not tested against supervised training: " + "; ".join(
                    f"{self.name(pair.first)} ({pair.note})" for pair in untested) + ".")
        alone = self._without_baseline()
        if alone:
            found.append(f"There is no supervised run with the same settings for {_and(map(self.name, alone))}, so "
                         "that what the unlabeled cases are worth to them is unknown.")
        return found

    def _without_baseline(self):
        return [group for group in self.main if group.runs[0]["spec"]["method"] != "supervised"
                and analysis.baseline(group, self.groups) is None]

    def _said_of_best(self):
        if not self.against_best:
            return []
        best = self.against_best[0].second
        differ = [self.name(pair.first) for pair in self.against_best if pair.p_holm < analysis.LEVEL]
        same = [self.name(pair.first) for pair in self.against_best if pair.p_holm >= analysis.LEVEL]
        parts = [f"{_and(differ)} {'differs' if len(differ) == 1 else 'differ'} significantly"] if differ else []
        parts += [f"no significant difference was found for {_and(same)}"] if same else []
        return [f"Compared with {self.name(best)}, the row of the highest mean Dice among those with all their folds, "
                f"{'; '.join(parts)}."] if parts else []

    def _facts(self):
        def all_of(read):
            return "; ".join(sorted({str(value) for value in map(read, self.runs)} - {"", "None"})) or UNKNOWN

        def sizes(value):
            return "x".join(map(str, value)) if value else ""

        def guided(run):
            return {True: "yes", False: "no"}.get(run.get("data", {}).get("label_guided"), "")

        facts = {
            "data set": self.field.dataset,
            "cases made by recipe": self.field.data or "made by the program itself",
            "boxes of the scans follow the labels": all_of(guided),
            "split": f"{self.field.split}, {_count(self.field.folds, 'fold')}",
            "labeled": f"{self.field.labeled} {'patients' if self.patients else 'cases'}",
            "network, base width": all_of(lambda run: f"{run['spec']['network']}, {run['spec'].get('width', UNKNOWN)}"),
            "patch [voxels]": all_of(lambda run: sizes(run["evaluation"].get("patch") or run["spec"].get("patch"))),
            "stride of the sliding window [voxels]": all_of(
                lambda run: sizes(run["evaluation"].get("stride") or run["spec"].get("stride"))),
            "iterations": all_of(lambda run: run["spec"]["iterations"]),
            "augmentation of training crops": all_of(leaderboard.augmentation_of),
            "precision of training": all_of(lambda run: run["spec"]["precision"]),
            "precision of the scored predictions": all_of(lambda run: run["evaluation"].get("precision", "32-true")),
            "checkpoint": f"selection rule {self.rule}: " + (
                "the weights after the last iteration" if self.rule == "last" else "by that rule"),
            "post-processing": all_of(lambda run: run["evaluation"].get("postprocess", "none")),
            "empty masks": f"policy {self.policy}: a distance to or from an empty mask counts as "
                           f"{leaderboard.EMPTY[self.policy]}",
        }  # fmt: skip
        return [[key, str(value)] for key, value in facts.items()]

    def _incomplete(self):
        lines = []
        open_rows = [group for group in self.groups if not group.complete]
        for group in open_rows:
            found = {run["spec"]["fold"] for run in group.runs}
            absent = sorted(set(range(self.field.folds)) - found)
            lines.append(f"{self.name(group)}: " + (f"{'folds' if len(absent) > 1 else 'fold'} "
                         f"{_and(map(str, absent))} of {self.field.folds} (counted from 0) without a run." if absent
                         else "some folds lack a run for some seed."))
        single = [self.name(group) for group in self.groups if len({run["spec"]["seed"] for run in group.runs}) == 1]
        if single:
            lines.append(f"One seed only, so that the spread over seeds is unknown: {_and(single)}.")
        peeked = {name for gap in self.gaps for name in gap.ids}
        lacking = [group for group in self.groups if peeked.isdisjoint(run["id"] for run in group.runs)]
        if lacking:
            some = "" if len(lacking) == len(self.groups) else f" for {_and(map(self.name, lacking))}"
            lines.append(f"No checkpoint but the last was scored on the test list (no peeks){some}.")
        for key, what in (("calibration", "calibration (ECE, NLL)"), ("costs", "parameters and passes per step")):
            absent = [self.labels[run["id"]] for run in self.runs if not run.get(key)]
            if absent:
                some = "all runs" if len(absent) == len(self.runs) else f"runs {', '.join(absent)}"
                lines.append(f"Not measured, {what}: {some}.")
        return lines

    # 2

    def leaderboard(self):
        """The rows of the leaderboard on this page, all their columns, and what papers print."""
        rows = {_row_key(row): (place, row) for place, row in enumerate(self.table)
                if row["source"] == "measured" and self._on_page(row)}
        entries = [(*rows[_group_key(group)], group) for group in self.groups]
        # ranks hold among equal numbers of unlabeled cases; here they would stand beside each other
        entries = [(row | {"rank": row["rank"] if group in self.main else "", "method": self.name(group),
                           "interval": f"[{row['Dice_low']}, {row['Dice_high']}]" if row["Dice_low"] else UNKNOWN,
                           "records": self._labels(group.runs)}, group)
                   for _, row, group in sorted(entries, key=lambda entry: entry[0])]
        rows = [row for row, _ in entries]
        filled = [column for column in BOARD if column == "rank" or any(row[column] for row in rows)]
        same = [column for column in filled if column in CONSTANT and len({row[column] for row in rows}) == 1]
        shown = [column for column in filled if column not in same]
        yield Table("Best first among rows with all their folds; means over runs",
                    [BOARD[column] for column in shown], [[row[column] for column in shown] for row in rows])
        others = len(self.main) < len(self.groups)
        told = "Negative controls and smaller shares of the unlabeled data are not ranked. " if others else ""
        told += f"The same in all rows: {', '.join(f'{BOARD[key]} {rows[0][key]}' for key in same)}. " if same else ""
        yield Text(f"{told}sd: standard deviation, of the means of folds or of seeds; empty with one of them. 95 % "
                   "interval: of the mean Dice over patients, bootstrap. 95HD and ASD in voxels where no unit is "
                   "named. Missed and false alarms: structures, all runs together. Rows with different settings, "
                   "splits or precisions are never merged; R numbers are the runs, whose record ids stand at the end.",
                   "note")
        used = [column for column in leaderboard.COLUMNS if column != "method" and any(row[column] for row in rows)]
        yield Fold("All columns of these rows, costs included", [Table(
            "As in leaderboard.csv, a column per row", ["column", *(row["method"] for row in rows)],
            [[column, *(row[column] for row in rows)] for column in used])])  # fmt: skip
        published = [row for row in self.table if row["source"] == "reported"
                     and row["labeled"] == str(self.field.labeled)]  # fmt: skip
        if published:
            columns = ["method", "network", *SHOWN, "split", "reference"]
            header = ["method", "network", *map(_header, SHOWN), "split", "source"]
            yield Fold(f"Published numbers on {self.field.dataset} with {self.field.labeled} labeled "
                       f"({len(published)})", [
                Text("As papers print them: other splits, other checkpoints (often the best one on the test list) and "
                     "other treatment of empty masks. They rank nothing here.", "note"),
                Table("", header, [[row[key] for key in columns] for row in published])])  # fmt: skip

    def _on_page(self, row):
        field = self.field
        return (row["protocol"], row["split"], row["data"], row["labeled"]) == (
            field.protocol, field.split, field.data, str(field.labeled))

    # 3

    def gap(self):
        """What choosing the checkpoint on the test list would have bought, or how to measure it."""
        if not self.gaps:
            yield Text("Not measured for these runs: train with --peek-test, which scores the kept checkpoints on the "
                       "test list into results/peeks, where no ranking can read them.")
            return
        yield Text("This is what choosing the checkpoint on the test list would have bought. To our knowledge nobody "
                   "has published this measurement for these methods. The leaderboard above does not use it.")
        yield Table("Dice in %, gains in points, 95 % intervals",
                    ["method", "last", "best on test", "gain", "interval of gain", "kept on other cases",
                     "interval of kept", "runs", "checkpoints", "interval over", "records"],
                    [[self.name(gap.group), _number(100 * gap.last), _number(100 * gap.best),
                      _number(100 * gap.gain, signed=True), _interval(gap.low, gap.high, 100, True),
                      _number(100 * gap.kept, signed=True), _interval(gap.kept_low, gap.kept_high, 100, True),
                      str(gap.runs), ", ".join(map(str, gap.checkpoints)), gap.over,
                      ", ".join(self.labels[name] for name in gap.ids)] for gap in self.gaps])  # fmt: skip
        yield Text("Gain: the best of a run's checkpoints by mean Dice on the test list, minus the last. It cannot be "
                   "negative. Kept: the checkpoint is chosen on one half of the test cases and scored on the other "
                   "half against the last, over many halves: what would hold on cases that did not choose.", "note")
        yield Charts([
            ("Gain of choosing on the test list", plots.intervals(
                [plots.Bar(self.name(gap.group), 100 * gap.gain, 100 * gap.low, 100 * gap.high) for gap in self.gaps],
                self.looks, "gain in Dice [points]")),
            ("What of it holds on cases that did not choose", plots.intervals(
                [plots.Bar(self.name(gap.group), 100 * gap.kept, 100 * gap.kept_low, 100 * gap.kept_high)
                 for gap in self.gaps], self.looks, "gain in Dice on other cases [points]")),
        ])  # fmt: skip

    # 4

    def distributions(self):
        yield Text("Every point is a test case, its score the mean over classes and over the runs that tested it. Box: "
                   "the middle half of the cases and their median.", "note")
        charts = []
        for column in SHOWN:
            key, factor, _ = METRICS[column]
            values = {self.name(group): [factor * value for value in
                                         analysis.case_scores(group, key, self.policy).values()]
                      for group, _ in self.ranked}  # fmt: skip
            charts.append((_header(column), plots.strips(values, self.looks, _header(column))))
        yield Charts(charts)

    # 5

    def comparisons(self):
        """Paired comparisons with supervised training and with the best row, and the critical differences."""
        pairs = self.against_supervised
        if pairs:
            yield self._pair_table("Dice against supervised training on the same labels, with the same network, "
                                   "precision, labeled batch, augmentation and iterations", pairs, 100, "points")
            bars = [plots.Bar(self.name(pair.first), 100 * pair.mean, 100 * pair.low, 100 * pair.high)
                    for pair in pairs if pair.n]  # fmt: skip
            if bars:
                yield Charts([("Difference to supervised training",
                               plots.intervals(bars, self.looks, "difference in Dice [points]"))])  # fmt: skip
            more = []
            for column in SHOWN[1:]:
                key, factor, _ = METRICS[column]
                found = analysis.versus_supervised(self.groups, key, self.policy)
                unit = "points" if factor == 100 else UNITS[column]
                more.append(self._pair_table(f"{_header(column)} against supervised training", found, factor, unit))
            yield Fold("The same for Jaccard, 95HD and ASD", more)
        alone = self._without_baseline()
        if alone:
            yield Text(f"No supervised run with the same settings: {_and(map(self.name, alone))}.")
        if not pairs and not alone:
            yield Text("No method but supervised training has runs here: nothing to compare with it.")
        if not self.pairs:
            yield Text("Only one row: no comparison with the best, and no picture of critical differences.")
            return
        yield self._pair_table("Dice against the row with the best mean; Holm's correction for all pairs of rows, as "
                               "the best is chosen by looking at all", self.against_best, 100, "points")
        found = analysis.cliques(self.main, self.pairs)
        means = [(self.name(group), 100 * mean) for group, mean in self.ranked]
        names = [[self.name(group) for group in clique] for clique in found]
        yield Charts([("Critical differences", plots.critical(means, names, self.looks, "mean Dice [%]"))])
        joined = [clique for clique in names if len(clique) > 1]
        yield Text("Means on the axis; a bar on the right joins neighbouring rows of which no pair differs "
                   "significantly (Wilcoxon over cases, Holm-corrected over all pairs, not Nemenyi). " +
                   ("Joined: " + "; ".join(", ".join(clique) for clique in joined) + "." if joined else
                    "No rows are joined."), "note")  # fmt: skip
        if any(math.isnan(pair.p_holm) for pair in self.pairs):
            yield Text("A pair that could not be tested is not known to differ, and is joined.", "note")
        yield Fold("All pairs", [self._pair_table("Dice, every pair of rows", self.pairs, 100, "points")])

    def _pair_table(self, caption, pairs, factor, unit):
        header = ["first", "second", "n", f"first - second [{unit}]", "95 % interval", "p", "p (Holm)",
                  "wins / ties / losses", "note"]
        return Table(caption, header, [
            [self.name(pair.first), self.name(pair.second), str(pair.n), _number(factor * pair.mean, signed=True),
             _interval(pair.low, pair.high, factor, True), _p(pair.p), _p(pair.p_holm),
             f"{pair.wins} / {pair.ties} / {pair.losses}", pair.note] for pair in pairs])  # fmt: skip

    # 6

    def details(self):
        """Scores of every run, class and case."""
        columns = [column for column in SCORES if not column.endswith("_mm") or self._has_mm()]
        yield Table("Runs", ["run", "method", "fold", "seed", *map(_header, columns), "missed", "false alarms"],
                    list(self._run_lines(columns)))
        if self.field.folds > 1:
            yield Table("Mean Dice [%] by fold, over seeds", ["method", *map(str, range(self.field.folds))],
                        [[self.name(group), *self._fold_cells(group)] for group in self.groups])
        yield Table("Classes, mean over runs", ["method", "class", *map(_header, columns), "missed", "false alarms"],
                    list(self._class_lines(columns)))
        for column in ("Dice", "95HD"):
            key, factor, _ = METRICS[column]
            scores = [analysis.case_scores(group, key, self.policy) for group in self.groups]
            cases = sorted(set().union(*scores))
            yield Fold(f"{_header(column)} of every case ({len(cases)})", [Table(
                f"{_header(column)}, mean over classes and over the runs that tested the case",
                ["case", *map(self.name, self.groups)],
                [[case, *(score_text(column, found[case]) if case in found else "" for found in scores)]
                 for case in cases])])  # fmt: skip

    def _has_mm(self):
        return all(run.get("data", {}).get("spacing_known", True) for run in self.runs)

    def _run_lines(self, columns):
        for group in self.groups:
            for run, score in zip(group.runs, group.scores, strict=True):
                values = (score_text(column, score[METRICS[column][0]]) for column in columns)
                yield [self.labels[run["id"]], self.name(group), f"{run['split']['fold']} of {run['split']['folds']}",
                       str(run["spec"]["seed"]), *values, str(score["missed"]), str(score["false_alarm"])]  # fmt: skip

    def _fold_cells(self, group):
        found = defaultdict(list)
        for run, score in zip(group.runs, group.scores, strict=True):
            found[run["spec"]["fold"]].append(score["dice"])
        return [score_text("Dice", fmean(found[fold])) if found[fold] else "" for fold in range(self.field.folds)]

    def _class_lines(self, columns):
        for group in self.groups:
            for name in group.runs[0]["classes"][1:]:
                scores = [score["classes"][name] for score in group.scores]
                means = (score_text(column, fmean(score[METRICS[column][0]] for score in scores)) for column in columns)
                counts = (str(sum(score[key] for score in scores)) for key in ("missed", "false_alarm"))
                yield [self.name(group), name, *means, *counts]

    # 7

    def worst(self):
        """The worst cases of every row, with pictures where scans and predictions are there."""
        yield Text(f"The {WORST} lowest Dice of each row, mean over classes and over the runs that tested the case.",
                   "note")
        yield Text("Pictures: yellow is the truth, blue the prediction of the run with the lowest Dice on the case, of "
                   "those whose prediction is there; planes through the middle of the truth (of the prediction where "
                   "the truth is empty), across the third, second and first axis of the stored scan.", "aside")
        absent, lines, folds = defaultdict(list), [], []
        for group in self.groups:
            pictures = []
            scores = {key: analysis.case_scores(group, key, self.policy) for key in ("dice", "hd95_voxel")}
            order = sorted(scores["dice"], key=lambda case, dice=scores["dice"]: (dice[case], case))[:WORST]
            for case in order:
                tested = [(run, rows) for run in group.runs
                          if (rows := [row for row in run["cases"] if row["case"] == case])]
                lines.append([self.name(group), case, score_text("Dice", scores["dice"][case]),
                              score_text("95HD", scores["hd95_voxel"][case]),
                              str(sum(selection.missed(row) for _, rows in tested for row in rows)), str(len(tested)),
                              self._labels(run for run, _ in tested)])  # fmt: skip
                tried = sorted(tested, key=lambda entry: fmean(row["dice"] for row in entry[1])) if self.scans else []
                for run, rows in tried:
                    png, why = self.scans.picture(run, case)
                    if png:
                        dice = 100 * fmean(row["dice"] for row in rows)
                        pictures.append((f"{case}, run {self.labels[run['id']]}: Dice {dice:.2f} %", png))
                        break
                    absent[why].append(f"{case} of {self.labels[run['id']]}")
            if pictures:
                folds.append(Fold(f"Pictures of {self.name(group)} ({len(pictures)} of {len(order)})",
                                  [Pictures(pictures)]))  # fmt: skip
        yield Table("Worst cases", ["method", "case", "Dice [%]", "95HD [voxel]", "missed", "runs", "records"], lines)
        yield from folds
        for why, which in absent.items():
            told = f"{', '.join(which[:3])} and {len(which) - 3} more" if len(which) > 4 else _and(which)
            yield Text(f"No picture ({told}): {why}", "aside")

    # 8

    def curves(self):
        """Loss terms and watched values over the iterations."""
        charts, missing = [], []
        for group in self.groups:
            panels = defaultdict(lambda: defaultdict(list))
            for run in group.runs:
                for kind, quantity in (("terms", "loss {}"), ("watch", "watched {}")):
                    found = defaultdict(list)
                    for event in run["curve"]:
                        for name, value in (event.get(kind) or {}).items():
                            if value is not None:
                                found[name].append((event["done"], value))
                    seed = f"seed {run['spec']['seed']}"
                    for name, points in sorted(found.items()):
                        panels[quantity.format(name)][seed].append(tuple(zip(*points, strict=True)))
            if panels:
                color = self.looks[self.name(group)].color
                charts.append((self.name(group), plots.courses(panels, color, self.name(group))))
            else:
                missing.append(self.name(group))
        if charts:
            yield Text("Terms of the loss as they are added up, and values that are only watched, such as weights and "
                       "thresholds; a line per run, dashes by seed.", "note")
            yield Charts(charts)
        if missing:
            yield Text(f"Without a curve in the records: {_and(missing)}.")

    # 9

    def efficiency(self):
        who = "patients" if self.patients else "cases"
        yield from self._curves(
            analysis.label_efficiency(self.family), f"labeled {who}", self.names, True,
            f"Dice against labeled {who} needs runs of one method with at least two label counts.")  # fmt: skip
        yield from self._curves(
            analysis.unlabeled_efficiency(self.groups), f"unlabeled {who}", self.shares, False,
            f"Dice against the share of the unlabeled data needs runs of one method with at least two numbers of "
            f"unlabeled {who} (--unlabeled).")  # fmt: skip

    def _curves(self, curves, xlabel, names, doublings, sentence):
        # the last group: the first may be the supervised baseline at 0 unlabeled cases
        drawn = {names[curve.groups[-1].runs[0]["id"]]: curve for curve in curves if len(curve.points) > 1}
        if not drawn:
            yield Text(sentence)
            return
        points = {name: [(p.x, 100 * p.mean, 100 * p.low, 100 * p.high) for p in curve.points]
                  for name, curve in drawn.items()}  # fmt: skip
        yield Charts([(f"Dice against {xlabel}",
                       plots.lines(points, self.looks, xlabel, "mean Dice [%]", doublings))])  # fmt: skip
        yield Table(f"Mean Dice [%] against {xlabel}; 95 % t interval over runs",
                    ["method", xlabel, "Dice [%]", "95 % interval", "runs"],
                    [[name, f"{p.x:g}", _number(100 * p.mean), _interval(p.low, p.high, 100), str(p.n)]
                     for name, curve in drawn.items() for p in curve.points])  # fmt: skip
        scale = "the logarithm of the number" if doublings else "the number"
        yield Table(f"Area under the curve: mean height [%] over {scale} of {xlabel}, between the ends of the curve",
                    ["method", "area [%]", "from", "to", "comparable"],
                    [[name, _number(100 * curve.area), f"{curve.span[0]:g}", f"{curve.span[1]:g}",
                      "yes" if curve.comparable else "no, the curves stand on different numbers"]
                     for name, curve in drawn.items()])  # fmt: skip

    # 10

    def negative(self):
        """Negative controls, with a flag for what gains."""
        if not self.controls:
            yield Text("No run with replaced unlabeled images (noise, copies of labeled scans, another data set) is "
                       "here: the suite named controls makes them.")
            return
        header = ["method", "control", "baseline", "n", "difference [points]", "95 % interval", "p (Holm)",
                  "with its own unlabeled data [points]", "gains", "note"]
        lines = []
        for control in self.controls:
            pair, regular = control.pair, control.regular
            cells = [str(pair.n), _number(100 * pair.mean, signed=True), _interval(pair.low, pair.high, 100, True),
                     _p(pair.p_holm)] if pair else ["0", UNKNOWN, UNKNOWN, UNKNOWN]  # fmt: skip
            lines.append([
                self.name(control.group), control.control,
                self.name(control.baseline) if control.baseline else "no supervised run", *cells,
                _number(100 * regular.mean, signed=True) if regular else UNKNOWN, "yes" if control.gains else "no",
                pair.note if pair else "nothing to compare with",
            ])  # fmt: skip
        yield Table("Dice with replaced unlabeled images minus supervised training", header, lines)
        for control in self.controls:
            if control.gains:
                yield Text(f"{self.name(control.group)} gains {_number(100 * control.pair.mean)} points of Dice over "
                           "supervised training although its unlabeled images were replaced "
                           f"({control.control}). So a gain of this method need not come from unlabeled data: it "
                           "may come from regularisation, from more network passes or a larger effective batch, from "
                           "an average of weights, or from a leak of labels.", "flag")  # fmt: skip

    # 11

    def cost(self):
        """Time, memory, parameters and passes against Dice."""
        header = ["method", "device", "hours per run", "iterations/s", "peak memory [MiB]", "parameters [M]",
                  "forward passes per step", "backward passes per step", "Dice [%]", "records"]
        lines, points = [], defaultdict(list)
        for group in self.groups:
            by_device = defaultdict(list)
            for run, score in zip(group.runs, group.scores, strict=True):
                by_device[_device(run)].append((run, score))
            for device, entries in sorted(by_device.items()):
                runs = [run for run, _ in entries]
                hours = [leaderboard.hours(run["timing"]) for run in runs]
                memory = [run["memory"].get("peak_mib") for run in runs]
                dice = 100 * fmean(score["dice"] for _, score in entries)
                costs = [run.get("costs") or {} for run in runs]
                lines.append([
                    self.name(group), device, leaderboard.mean_text(hours, 3),
                    leaderboard.mean_text([run["timing"]["iterations_per_second"] for run in runs], 2),
                    leaderboard.mean_text(memory, 0),
                    leaderboard.mean_text([None if entry.get("parameters") is None else entry["parameters"] / 1e6
                                           for entry in costs], 3),
                    *(leaderboard.mean_text([entry.get(key) for entry in costs], 2)
                      for key in ("forward_passes", "backward_passes")),
                    f"{dice:.2f}", self._labels(runs),
                ])  # fmt: skip
                if None not in hours:
                    points["hours", device].append((self.name(group), fmean(hours), dice))
                if None not in memory:
                    kind = device.partition(",")[0]
                    points["memory", kind].append((self.name(group), fmean(memory), dice))
        yield Table("Means over the runs on one device; empty where the records lack it", header, lines)
        devices = sorted({device for what, device in points if what == "hours"})
        if len(devices) > 1:
            yield Text(f"Times were taken on {len(devices)} different devices or numbers of threads "
                       f"({'; '.join(devices)}): they are not comparable, so each has a picture of its own.")
        if any(run["device"]["type"] == "cpu" for run in self.runs):
            yield Text("On a CPU the peak is that of the whole process, on CUDA that of PyTorch's tensors. Other work "
                       "on the same machine slows a run, and a record does not know of it.", "note")
        labels = {"hours": "hours of training", "memory": "peak memory [MiB]"}
        yield Charts([(f"{labels[what].partition(' [')[0].capitalize()}, {device}",
                       plots.scatter(_merged(entries), self.looks, labels[what], "mean Dice [%]"))
                      for (what, device), entries in sorted(points.items())])  # fmt: skip

    # 12

    def how(self):
        """Definitions, statistics, and the record behind every run number."""
        yield Bullets([f"{name}: {sentence}" for name, sentence in MEANING.items()])
        yield Bullets([
            "A row's score is the mean over cases per class, then over classes, then over runs (folds and seeds). sd "
            "over folds is of the folds' means over seeds, sd over seeds of the seeds' means over folds.",
            "A case's score for plots and tests is the mean over classes and over the runs that tested it. Cases of "
            "one patient are averaged before tests and intervals, for two scans of one patient are not two samples.",
            "Paired comparison: Wilcoxon's signed-rank test, two-sided, over the common cases, zero differences "
            "dropped (scipy.stats.wilcoxon); not made with fewer than 5 differences that are not 0.",
            "p (Holm): Holm's step-down correction over all tests of a table, over all pairs of rows where the best or "
            "cliques are concerned. Significant means below 0.05.",
            "95 % interval of a difference: BCa bootstrap of the mean over cases with a fixed seed "
            "(scipy.stats.bootstrap); over runs: Student's t. Unknown where too few values tell nothing.",
            "Wins, ties and losses count cases for which the first is better, equal or worse.",
            "Negative control: a method whose unlabeled images were replaced gains where its mean difference to "
            "supervised training is above 0 and significant.",
        ])
        yield Table("All records of this page; every number above is of the runs named beside it", [
            "run", "record id", "commit", "device", "selection", "settings"], [
            [self.labels[run["id"]], run["id"], _commit(run["code"]), _device(run), run["selection"], run["hp_hash"]]
            for run in self.runs])
        others = [run for group in self.family if group not in self.groups for run in group.runs]
        if others:
            yield Table("Records of other label counts, used by the label efficiency only", [
                "record id", "commit", "device"], [[run["id"], _commit(run["code"]), _device(run)] for run in others])


def _row_key(row):
    """What tells the leaderboard's rows of a page apart; twins that agree in all of it look the same."""
    return (*(row[key] for key in ("method", "network", "precision", "hp_hash", "unlabeled", "control", "runs")),
            row["Dice"])


def _group_key(group):
    run = group.runs[0]
    spec = run["spec"]
    return (spec["method"], spec["network"], leaderboard.precision_of(run), run["hp_hash"],
            leaderboard.unlabeled_of(group), spec.get("control", ""), str(len(group.runs)),
            score_text("Dice", group.mean("dice")))


def _commit(code):
    words = code.get("version", ""), (code.get("commit") or "")[:10], "dirty" * bool(code.get("dirty"))
    return " ".join(filter(None, words))


def _merged(entries):
    """Points of one name (several devices of a kind) as one, their mean."""
    found = defaultdict(list)
    for name, x, y in entries:
        found[name].append((x, y))
    return [(name, fmean(x for x, _ in places), fmean(y for _, y in places)) for name, places in found.items()]
