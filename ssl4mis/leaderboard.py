"""The leaderboard: a pure, byte-stable function of the run records and of the numbers papers report."""

import csv
import io
import math
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from ssl4mis import records as store
from ssl4mis.selection import run_scores, select

METRICS = {  # column: key of the scores, factor, digits; a distance without a unit is in voxels, as the field prints it
    "Dice": ("dice", 100, 2), "Jaccard": ("jaccard", 100, 2),
    "95HD": ("hd95_voxel", 1, 2), "95HD_max": ("hd95_max_voxel", 1, 2),
    "ASD": ("asd_voxel", 1, 2), "ASSD": ("assd_voxel", 1, 2),
    "95HD_mm": ("hd95_mm", 1, 2), "95HD_max_mm": ("hd95_max_mm", 1, 2),
    "ASD_mm": ("asd_mm", 1, 2), "ASSD_mm": ("assd_mm", 1, 2),
    "ECE": ("ece", 1, 4), "NLL": ("nll", 1, 4),
}  # fmt: skip
SPREADS = ("fold", "seed")
COLUMNS = [
    *"rank,source,dataset,protocol,split,data,labeled,unlabeled,control,method,network,batch".split(","),
    *"augmentation,precision".split(","),
    "Dice", "Dice_low", "Dice_high", *(f"Dice_sd_{over}s" for over in SPREADS),
    *(column for name in METRICS if name != "Dice" for column in (name, *(f"{name}_sd_{over}s" for over in SPREADS))),
    *"missed,false_alarms,cases,folds,seeds,runs,complete,selection,hp_hash,iterations".split(","),
    *"parameters,forward_passes,backward_passes,iterations_per_s,train_hours,peak_mib,device".split(","),
    *"published,published_source,versus_published,reference".split(","),
]  # fmt: skip
REPORTED = "method,dataset,labeled,unlabeled,dice,jaccard,hd95,asd,backbone,split,source".split(",")
# Which published case lists are ours, in the words of reported.csv; other words there name other lists, or none.
PUBLISHED_SPLITS = {
    "LA-paper": ("UA-MT 80/20 fixed list",),
    "LA-mcf5": ("MCF 5-fold LA (80/20 per fold)",),
    "Pancreas-coranet": ("CoraNet 62/18 list (80 scans)",),
    "Pancreas-mcnet": ("MC-Net 62/20 list (82 scans)", "MC-Net 62/20 (82 volumes)"),
    "ACDC-paper": ("SSL4MIS 70/10/20 patients", "SSL4MIS 70/10/20"),
    "BraTS2019-paper": ("SSL4MIS 250/25/60",),
}
SEPARATOR = " | "  # between published values, and in the same order between their sources
FILTERS = ("dataset", "protocol", "labeled", "method", "network")
FORMATS = ("table", "csv", "md", "html")
COMPACT = {  # column: header
    "method": "method", "labeled": "labeled", "unlabeled": "unlabeled", "control": "control", "network": "network",
    "batch": "batch", "augmentation": "augmentation", "iterations": "iterations", "precision": "precision",
    "Dice": "Dice ± sd", "Dice_sd_folds": "sd of folds", "interval": "95 % CI", "95HD": "95HD", "ASD": "ASD",
    "missed": "missed", "cases": "cases", "folds": "folds", "seeds": "seeds", "complete": "complete",
    "published": "published", "hp_hash": "settings",
}  # fmt: skip
OWN = ("method", "Dice", "interval", "95HD", "ASD", "hp_hash")  # compact columns that are there even if all is the same
LEFT = ("method", "Dice ± sd", "settings")
SHORT = {"bf16-mixed": "bf16", "16-mixed": "fp16", "32-true": "fp32"}
EMPTY = {"penalty": "the image diagonal", "legacy": "0"}
BEGIN, END = "<!-- leaderboard:begin -->", "<!-- leaderboard:end -->"


class Group(NamedTuple):
    """Runs that differ in fold and seed only, sorted by them, and their `run_scores`; `data` names their cases."""

    split: str
    data: str
    runs: list[dict]
    scores: list[dict]

    @property
    def complete(self) -> bool:
        """Whether every fold of the split is there for every seed that occurs."""
        found = {(run["spec"]["fold"], run["spec"]["seed"]) for run in self.runs}
        return len(found) == self.runs[0]["split"]["folds"] * len({seed for _, seed in found})

    def mean(self, key: str) -> float | None:
        """Mean of a score over the runs; None where a run lacks it, for part of the runs is another mean."""
        values = [scores[key] for scores in self.scores]
        return None if None in values else fmean(values)

    def sd(self, key: str, over: str) -> float | None:
        """Sample standard deviation of a score over folds or seeds.

        Over "seed": of the means of each seed over its folds; over "fold": of the means of each fold over its seeds.
        None with one of them, where a run lacks the score, and where seeds have different folds, whose means differ
        by that, too.
        """
        places = [(run["spec"]["fold"], run["spec"]["seed"]) for run in self.runs]
        found = [set(axis) for axis in zip(*places, strict=True)]
        if self.mean(key) is None or len(places) != len(found[0]) * len(found[1]):
            return None
        parts = defaultdict(list)
        for place, scores in zip(places, self.scores, strict=True):
            parts[place[SPREADS.index(over)]].append(scores[key])
        return stdev(map(fmean, parts.values())) if len(parts) > 1 else None


def groups(records, rule: str = "last", policy: str = "penalty") -> list[Group]:
    """Records that count, grouped by all that defines a method's result but fold and seed.

    Cases that different recipes made are different cases, so their runs never meet; nor do those of different
    numbers of unlabeled cases, or of a negative control and the real unlabeled images.

    Raises ValueError when two records of a group share fold and seed.
    """
    counted = select(records, rule)
    splits = _labels(counted, lambda run: (run["split"]["name"], run["split"]["sha256"]))
    data = _labels(counted, lambda run: (data_of(run), run.get("data", {}).get("sha256", "")))
    gathered = defaultdict(dict)
    for run, split, cases in zip(counted, splits, data, strict=True):
        spec = run["spec"]
        key = (spec["dataset"], spec["protocol"], split, cases, run["split"]["folds"], spec["labeled"],
               *_unlabeled(spec), spec["method"], spec["network"], spec["precision"], run["hp_hash"])  # fmt: skip
        place = (spec["fold"], spec["seed"])
        if place in gathered[key]:
            other = gathered[key][place]["id"]
            raise ValueError(f"records {other} and {run['id']} are the same run, expected one per fold and seed")
        gathered[key][place] = run
    found = []
    for key, runs in sorted(gathered.items()):
        runs = [runs[place] for place in sorted(runs)]
        found.append(Group(key[2], key[3], runs, [run_scores(run, policy) for run in runs]))
    return found


def data_of(record: dict) -> str:
    """Id of the recipe that made the cases; "" where they are made by the program itself."""
    spec = record["spec"]
    # records without the entry are older than the recipes: LA was then read from the published files only
    return record["data"]["recipe"] if "data" in record else {"LA": "LA-published-1"}.get(spec["dataset"], "")


def rows(records, reported=(), rule: str = "last", policy: str = "penalty") -> list[dict[str, str]]:
    """Table rows with the keys COLUMNS as formatted text: measured ones first, then reported ones.

    A score is the mean over runs of the mean over classes of the mean over cases: Dice and Jaccard in percent,
    distances in voxels and mm, ECE from 0 to 1, NLL in nats. `_sd_folds` and `_sd_seeds` are `Group.sd`; `Dice_low`
    and `Dice_high` the 95 % interval of the mean Dice over patients. `missed` and `false_alarms` are summed over runs;
    `cases` counts different test cases. Passes are samples through a network per step, `train_hours` a mean over runs,
    `peak_mib` the largest of them. What one run of a row lacks stays empty.

    `published` are the Dice values that papers print for the same method, label count and case list, ascending, and
    `versus_published` says whether ours is "in" their range, "below" or "above" at their digits. Both are empty unless
    the row follows the publications: a published protocol at its patch, stride and width with at least its iterations,
    their recipe of the data, all folds, no control. A small or shortened run is not comparable.
    Raises ValueError like `groups`.
    """
    reported = list(reported)
    return _ranked(groups(records, rule, policy), reported) + sorted(map(_reported_row, reported), key=_reported_order)


def to_csv(table) -> str:
    """CSV text of rows, with \\n line ends."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def read_reported(path) -> list[dict[str, str]]:
    """Rows of a CSV file of published numbers, as text; ValueError of one line where it is not one."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            found = list(reader)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable, expected a CSV file of reported numbers ({error})") from None
    if reader.fieldnames != REPORTED:
        raise ValueError(f"{path}: columns {reader.fieldnames}, expected {','.join(REPORTED)}")
    for number, row in enumerate(found, 2):
        if None in row or None in row.values():
            raise ValueError(f"{path}: row {number} has the wrong number of fields, expected {len(REPORTED)}")
        for key in ("labeled", "unlabeled", "dice", "jaccard", "hd95", "asd"):
            if not _is_number(row[key], whole=key.endswith("labeled")):
                raise ValueError(f"{path}: row {number}, {key} is {row[key]!r}, expected a number")
    return found


def read_table(results, broken=None) -> list[dict[str, str]]:
    """The rows of a results folder; one without reported.csv has measured rows only.

    Raises ValueError; for a broken record only where `broken` is not given, as of `records.read_all`.
    """
    results = Path(results)
    if not results.is_dir():
        raise ValueError(f"{results}: no such folder, expected a results folder with records/ in it")
    published = results / "reported.csv"
    return rows(store.read_all(results / "records", broken), read_reported(published) if published.exists() else ())


def outputs(results, readme=None, broken=None) -> tuple[list[dict[str, str]], dict[Path, str]]:
    """The rows of a results folder, and the text that each generated file should hold.

    The README is by default the one beside the folder, so that a demo's results never reach it; an absent
    one is left out. Raises ValueError like `read_table`.
    """
    table, path = read_table(results, broken), Path(results) / "leaderboard.csv"
    texts = {path: to_csv(table)}
    if readme is not None and not Path(readme).is_file():
        raise ValueError(f"{readme}: no such file, expected a text file with the leaderboard markers")
    readme = path.absolute().parents[1] / "README.md" if readme is None else Path(readme)
    if readme.is_file():
        texts[readme] = replace_block(_text(readme), markdown(table))
    return table, texts


def choose(table, wanted: dict[str, list[str]]) -> list[dict[str, str]]:
    """The rows that have one of the wanted values in each column named, in any case; ranks stay those of all rows.

    A text may hold several values with commas between them.

    Raises ValueError for a value that no row has, and where no row has all that is wanted.
    """
    wanted = {column: [value.strip() for value in ",".join(texts).split(",")] for column, texts in wanted.items()}
    for column, values in wanted.items():
        known = {row[column].lower(): row[column] for row in table if row[column]}
        for value in values:
            if value.lower() not in known:
                names = sorted(known.values(), key=lambda name: (name.isdecimal() and int(name), name))
                raise ValueError(f"{column} {value!r} is in no row, expected one of {', '.join(names) or 'none'}")
    chosen = [row for row in table
              if all(row[column].lower() in map(str.lower, values) for column, values in wanted.items())]
    if not chosen:
        both = ", ".join(f"{column} {' or '.join(values)}" for column, values in wanted.items())
        raise ValueError(f"no row has {both}, expected values that occur together")
    return chosen


def show(results, wanted, form: str | None = None, out=None, broken=None) -> None:
    """Print the chosen rows of a results folder, or write them to a file, in one of FORMATS; the table by default.

    The table and md show measured rows in short, csv and html all columns of all rows. Raises ValueError like `choose`,
    and where the file is a folder or one that stands for all rows.
    """
    table = read_table(results, broken)
    table = choose(table, wanted) if wanted else table
    if out is None and form in (None, "table"):
        return print_table(table)
    text = {"csv": to_csv, "md": markdown, "html": html, "table": _printed}[form or "table"](table)
    if out is None:
        return print(text, end="")
    committed = (Path(results) / "leaderboard.csv", Path(results).absolute().parent / "README.md")
    if Path(out).resolve() in {path.resolve() for path in committed}:
        raise ValueError(f"{out}: holds all rows, expected another file for a choice or a format")
    if Path(out).is_dir():
        raise ValueError(f"{out}: a folder, expected a file")
    store.write_text(out, text)


def stale(texts) -> list[Path]:
    """The files whose content differs from the text they should hold."""
    return [path for path, text in texts.items() if not path.is_file() or path.read_bytes() != text.encode()]


def regenerate(results, readme=None, check: bool = False, broken=None) -> int:
    """Write the generated files that changed and print the table; with `check` only name those files on stderr.

    Returns the exit status, 1 where `check` found one. Raises ValueError like `outputs`.
    """
    table, texts = outputs(results, readme, broken)
    changed = stale(texts)
    if check:
        for path in changed:
            print(f"{path} differs from the records: run benchmarks/leaderboard.py", file=sys.stderr)
        return 1 if changed else 0
    for path in changed:
        store.write_text(path, texts[path])
    print_table(table)
    return 0


def replace_block(text: str, block: str) -> str:
    """The text with `block` between the leaderboard markers; unchanged without them."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{begin}\n{block}{end}{after}" if end else text


def markdown(table, policy: str = "penalty") -> str:
    """Markdown of the measured rows: a compact table per data set, protocol, split and recipe, and a note on units.

    What is the same in all rows of a table stands above it once.
    """
    parts = [f"### {', '.join(title)}\n\n{shared}{markdown_table(header, cells)}"
             for title, shared, header, cells in _sections(table)]
    return "\n".join([*parts, note(policy)]) if parts else "No measured rows yet.\n"


def note(policy: str = "penalty") -> str:
    """What the columns of a compact table mean."""
    return (
        "Dice in %, 95HD and ASD in voxels, means over runs of the last weights. ± sd: over seeds, each a mean over "
        "folds. 95 % CI: of the mean Dice over patients, bootstrap. A distance to or from an empty mask counts as "
        f"{EMPTY[policy]}; missed: empty predictions of structures that are there, all runs together. Batch: labeled "
        "+ unlabeled samples per step. Settings: hash of all hyper-parameters. Published Dice stand only beside rows "
        "that follow the publications.\n"
    )


def markdown_table(header, body) -> str:
    """A Markdown table of text cells, ending in a newline."""
    lines = [list(header), *body]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def html(table) -> str:
    """One self-contained page with all rows and every column that is not empty."""
    import pandas

    used = [column for column in COLUMNS if any(row[column] for row in table)]
    body = pandas.DataFrame(table, columns=used).to_html(index=False, border=0, justify="left")
    return f'''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Leaderboard</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 1rem }}
div {{ overflow: auto; max-height: 90vh }}
table {{ border-collapse: collapse; width: max-content; font-variant-numeric: tabular-nums }}
th, td {{ padding: .2rem .6rem; max-width: 20rem; text-align: left; border-bottom: 1px solid #ddd }}
th {{ position: sticky; top: 0; background: #fff }}
</style>
</head>
<body>
<h1>Leaderboard</h1>
<p>Ranks hold among complete rows of one data set, protocol, split and number of labeled and unlabeled cases.</p>
<div>
{body}
</div>
</body>
</html>
'''


def print_table(table, console=None) -> None:
    """Print the measured rows as rich tables, one per label count, and how many reported rows there are beside them."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    if not console.is_terminal:
        console.width = 200  # a pipe has no width of its own; 80 would break the lines
    for title, shared, header, cells in _sections(table, "labeled"):
        console.print(escape(f"{', '.join(title)}\n{shared.strip()}"), style="bold", highlight=False)
        view = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)  # fits 80 columns
        for name in header:
            view.add_column(name, justify="left" if name in LEFT else "right")
        for line in cells:
            view.add_row(*map(escape, line))
        console.print(view, "")
    measured = sum(row["source"] == "measured" for row in table)
    console.print(f"{measured} measured rows, {len(table) - measured} reported rows")


def score_text(column: str, value: float | None) -> str:
    """A score as text with the digits of its column, in its unit; empty where it is unknown (None or NaN)."""
    _, factor, digits = METRICS[column]
    return "" if value is None or math.isnan(value) else f"{value * factor:.{digits}f}"


def hours(timing: dict) -> float | None:
    """Hours of training of one run, None where they are unknown."""
    return None if timing["train_seconds"] is None else timing["train_seconds"] / 3600


def mean_text(values, digits: int) -> str:
    """The mean as text, empty where a value is unknown."""
    return "" if None in values else f"{fmean(values):.{digits}f}"


def unlabeled_of(group: Group) -> str:
    """How many unlabeled cases its runs draw from (patients as `labeled`); 49/50 where the folds differ."""
    def count(run):
        spec, split = run["spec"], run["split"]
        if not spec["unlabeled_batch"]:
            return 0
        given = spec.get("unlabeled")
        return len(split["unlabeled"]) // split.get("per_patient", 1) if given is None else given

    return _distinct(map(count, group.runs))


def _unlabeled(spec):
    """What of the unlabeled cases a run asks for: their number, -1 for all, and the control in their place."""
    given = spec.get("unlabeled")
    return -1 if given is None else given, spec.get("control", "")


def _distinct(values):
    """The different values as text, empty where one is unknown."""
    values = set(values)
    return "" if None in values else "/".join(map(str, sorted(values)))


def _sections(table, *more):
    """Title words, a line of what all rows share, header and cells of each compact table, in table order.

    A table is for one data set, protocol, split and recipe, and one value of each further column named.
    """
    found = defaultdict(list)
    for row in table:
        if row["source"] == "measured":
            words = (f"{word} {row[word]}" for word in ("protocol", "split", "data", *more) if row[word])
            found[row["dataset"], *words].append(row)
    for title, lines in found.items():
        cells = [_compact(row) for row in lines]
        same = {column for column in COMPACT if column not in OWN and len({line[column] for line in cells}) == 1}
        counts = defaultdict(set)
        for line in cells:
            counts[line["labeled"]].add(line["unlabeled"])
        if all(len(numbers - {"0"}) <= 1 for numbers in counts.values()):
            same.add("unlabeled")  # all there are, or none: the batch tells
        shared = {column: cells[0][column] for column in COMPACT
                  if column in same and column not in (*more, "unlabeled") and cells[0][column]}
        line = ", ".join(f"{COMPACT[column]} {text}" for column, text in shared.items())
        kept = [column for column in COMPACT if column not in same]
        yield (title, f"Same in all rows: {line}.\n\n" if line else "", [COMPACT[column] for column in kept],
               [[row[column] for column in kept] for row in cells])


def _text(path):
    return path.read_bytes().decode()  # line ends as they are


def _labels(records, part):
    """Per record the name of a part of it; with the checksum added where one fold occurs with two checksums.

    `part` gives name and checksum of a record's part.
    """
    def place(run):
        return run["spec"]["dataset"], run["split"]["name"], run["split"]["folds"], part(run)[0]

    seen = defaultdict(set)
    for run in records:
        seen[place(run), run["split"]["fold"]].add(part(run)[1])
    changed = {where for (where, _), sums in seen.items() if len(sums) > 1}
    return [part(run)[0] + (f"@{part(run)[1][:8]}" if place(run) in changed else "") for run in records]


def _ranked(found, reported):
    """Measured rows in table order, complete ones ranked by Dice among the same data, split and numbers of cases."""
    fields = defaultdict(list)
    for group in found:
        run = group.runs[0]
        spec = run["spec"]
        place = (spec["dataset"], spec["protocol"], group.split, group.data, run["split"]["folds"], spec["labeled"],
                 *_unlabeled(spec))
        fields[place].append((group.mean("dice"), group))
    table = []
    for place, entries in sorted(fields.items()):
        counts = [group.complete and not place[-1] for _, group in entries]  # a control is no competitor
        ranked = [dice for (dice, _), count in zip(entries, counts, strict=True) if count]
        lines = [(not group.complete, -dice, str(1 + sum(other > dice for other in ranked)) if count else "", group)
                 for (dice, group), count in zip(entries, counts, strict=True)]
        lines.sort(key=lambda line: line[:2])  # stable: ties keep the order of groups
        table += [_measured_row(group, rank, reported) for _, _, rank, group in lines]
    return table


def augmentation_of(run) -> str:
    """What is done to training crops, none for nothing."""
    return " + ".join(run["spec"].get("augmentation") or ()) or "none"


def precision_of(run) -> str:
    """Precision of training, and of the scored predictions where it is not float32."""
    scored = run["evaluation"].get("precision", "32-true")
    return run["spec"]["precision"] + ("" if scored == "32-true" else f", scored in {scored}")


def _measured_row(group, rank, reported):
    run, runs = group.runs[0], group.runs
    spec = run["spec"]
    low, high = _interval(group)
    costs = [item.get("costs", {}) for item in runs]
    peaks = [item["memory"].get("peak_mib") for item in runs]
    row = dict.fromkeys(COLUMNS, "") | {
        "rank": rank, "source": "measured", "dataset": spec["dataset"], "protocol": spec["protocol"],
        "split": group.split, "data": group.data, "labeled": str(spec["labeled"]),
        "unlabeled": unlabeled_of(group), "control": spec.get("control", ""),
        "method": spec["method"], "network": spec["network"], "precision": precision_of(run),
        "batch": f"{spec['labeled_batch']}+{spec['unlabeled_batch']}", "augmentation": augmentation_of(run),
        "Dice_low": score_text("Dice", low), "Dice_high": score_text("Dice", high),
        "missed": str(sum(score["missed"] for score in group.scores)),
        "false_alarms": str(sum(score["false_alarm"] for score in group.scores)),
        "cases": str(len({case for item in runs for case in item["split"]["test"]})),
        "folds": str(len({item["spec"]["fold"] for item in runs})),
        "seeds": str(len({item["spec"]["seed"] for item in runs})), "runs": str(len(runs)),
        "complete": "yes" if group.complete else "no",
        "selection": run["selection"], "hp_hash": run["hp_hash"], "iterations": str(spec["iterations"]),
        "parameters": _distinct(cost.get("parameters") for cost in costs),
        **{key: mean_text([cost.get(key) for cost in costs], 2) for key in store.PASSES},
        "iterations_per_s": mean_text([item["timing"]["iterations_per_second"] for item in runs], 2),
        "train_hours": mean_text([hours(item["timing"]) for item in runs], 3),
        "peak_mib": "" if None in peaks else f"{max(peaks):.0f}",
        "device": " + ".join(sorted({f"{item['device']['type']}: {item['device']['name']}" for item in runs})),
    }  # fmt: skip
    for column, (key, *_) in METRICS.items():
        if key.endswith("_mm") and not run.get("data", {}).get("spacing_known", True):
            continue  # voxels of unknown size have no distance in mm
        row[column] = score_text(column, group.mean(key))
        row |= {f"{column}_sd_{over}s": score_text(column, group.sd(key, over)) for over in SPREADS}
    return row | _published(group, row, reported)


def _interval(group):
    from ssl4mis.analysis import patient_scores  # which loads numpy
    from ssl4mis.statistics import mean_interval

    return mean_interval(list(patient_scores(group, "dice").values()))


def _published(group, row, reported):
    """The cells of what papers print for the same; none where the row does not follow them."""
    if not _follows(group):
        return {}
    asked = {column: row[column] for column in ("dataset", "method", "labeled", "unlabeled")}
    found = sorted((float(entry["dice"]), entry["dice"], entry["source"]) for entry in reported
                   if entry["dice"] and entry["split"] in PUBLISHED_SPLITS.get(group.split, ())
                   and asked == {column: entry[column] for column in asked})
    if not found:
        return {}
    texts = [text for _, text, _ in found]
    return {"published": SEPARATOR.join(texts), "published_source": SEPARATOR.join(source for *_, source in found),
            "versus_published": _versus(group.mean("dice") * 100, texts[0], texts[-1])}


def _versus(value, low, high):
    """Where a number stands to two numbers in print, each compared at its own digits."""
    def printed(limit):
        return float(f"{value:.{len(limit.partition('.')[2])}f}")

    return "below" if printed(low) < float(low) else "above" if printed(high) > float(high) else "in"


def _follows(group):
    """Whether a group is what the publications did, apart from the method."""
    import data_prep

    spec = group.runs[0]["spec"]
    try:
        protocol = data_prep.dataset(spec["dataset"]).protocols[spec["protocol"]]
    except (data_prep.DataError, KeyError):
        return False  # own data, or a protocol that is gone
    recipe = data_of(group.runs[0]).rpartition("-")[0]  # without its version
    kept = (spec.get("width") == protocol.width and spec["iterations"] >= protocol.iterations
            and all(tuple(spec.get(key, ())) == getattr(protocol, key) for key in ("patch", "stride")))
    prepared = recipe in {f"{spec['dataset']}-{name}" for name in ("published", "paper")}
    return protocol.published and kept and prepared and group.complete and not spec.get("control")


def _reported_row(row):
    names = {"method": "method", "dataset": "dataset", "labeled": "labeled", "unlabeled": "unlabeled",
             "split": "split", "network": "backbone", "reference": "source", "Dice": "dice", "Jaccard": "jaccard",
             "95HD": "hd95", "ASD": "asd"}  # fmt: skip
    # the digits stay as published: 13.4 must not become 13.40
    return dict.fromkeys(COLUMNS, "") | {"source": "reported"} | {new: row[old] for new, old in names.items()}


def _reported_order(row):
    return row["dataset"], int(row["labeled"] or 0), row["method"], *(row[column] for column in COLUMNS)


def _compact(row):
    """A row in short, by the keys of COMPACT."""
    cells = {column: row.get(column, "") for column in COMPACT}
    if row["Dice_sd_seeds"]:
        cells["Dice"] += f" ± {row['Dice_sd_seeds']}"
    if row["Dice_low"]:
        cells["interval"] = f"{row['Dice_low']}-{row['Dice_high']}"
    if row["published"]:
        low, *_, high = 2 * row["published"].split(SEPARATOR)
        cells["published"] = f"{row['versus_published']} {low}" + f"-{high}" * (high != low)
    for name, short in SHORT.items():
        cells["precision"] = cells["precision"].replace(name, short)
    return cells


def _printed(table):
    from rich.console import Console

    console = Console(file=io.StringIO())
    print_table(table, console)
    return console.file.getvalue()


def _is_number(text, whole):
    if not text:
        return not whole
    try:
        return (int(text) if whole else float(text)) >= 0
    except ValueError:
        return False
