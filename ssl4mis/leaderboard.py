"""The leaderboard: a pure, byte-stable function of the run records and of the numbers papers report."""

import csv
import io
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from ssl4mis import records as store
from ssl4mis.selection import run_scores, select

COLUMNS = (
    "rank,source,dataset,protocol,split,data,labeled,unlabeled,method,network,batch,precision,Dice,Dice_sd,Jaccard,"
    "Jaccard_sd,95HD,95HD_sd,ASD,ASD_sd,95HD_mm,ASD_mm,missed,n,folds,seeds,complete,selection,hp_hash,iterations,"
    "iterations_per_s,device,hours,reference"
).split(",")
REPORTED = "method,dataset,labeled,unlabeled,dice,jaccard,hd95,asd,backbone,split,source".split(",")
METRICS = {  # column: key of the scores, factor; 95HD and ASD are in voxels, as the field prints them
    "Dice": ("dice", 100), "Jaccard": ("jaccard", 100), "95HD": ("hd95_voxel", 1), "ASD": ("asd_voxel", 1),
    "95HD_mm": ("hd95_mm", 1), "ASD_mm": ("asd_mm", 1),
}  # fmt: skip
COMPACT = {
    "method": "method", "labeled": "labeled", "network": "network", "batch": "batch",
    "iterations": "iterations", "precision": "precision",
    "Dice": "Dice ± sd", "Jaccard": "Jaccard", "95HD": "95HD", "ASD": "ASD", "missed": "missed", "n": "n",
    "complete": "complete",
    "iterations_per_s": "it/s", "device": "device", "hours": "hours", "hp_hash": "settings",
}  # fmt: skip
EMPTY = {"penalty": "the image diagonal", "legacy": "0"}
BEGIN, END = "<!-- leaderboard:begin -->", "<!-- leaderboard:end -->"


class Group(NamedTuple):
    """Runs that differ in fold and seed only, sorted by them, and the scores of each; `data` names their cases."""

    split: str
    data: str
    runs: list[dict]
    scores: list[dict]

    @property
    def complete(self) -> bool:
        """Whether every fold of the split is there for every seed that occurs."""
        found = {(run["spec"]["fold"], run["spec"]["seed"]) for run in self.runs}
        return len(found) == self.runs[0]["split"]["folds"] * len({seed for _, seed in found})


def groups(records, rule: str = "last", policy: str = "penalty") -> list[Group]:
    """Records that count, grouped by all that defines a method's result but fold and seed.

    Cases that different recipes made are different cases, so their runs never meet.

    Raises ValueError when two records of a group share fold and seed.
    """
    counted = select(records, rule)
    splits = _labels(counted, lambda run: (run["split"]["name"], run["split"]["sha256"]))
    data = _labels(counted, lambda run: (data_of(run), run.get("data", {}).get("sha256", "")))
    gathered = defaultdict(dict)
    for run, split, cases in zip(counted, splits, data, strict=True):
        spec = run["spec"]
        key = (spec["dataset"], spec["protocol"], split, cases, run["split"]["folds"], spec["labeled"],
               spec["method"], spec["network"], spec["precision"], run["hp_hash"])  # fmt: skip
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

    Dice and Jaccard in percent, 95HD and ASD in voxels and mm, hours per run (training and evaluation);
    standard deviations are over runs. Raises ValueError like `groups`.
    """
    measured = _ranked(groups(records, rule, policy))
    return measured + sorted(map(_reported_row, reported), key=_reported_order)


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


def outputs(results, readme=None) -> tuple[list[dict[str, str]], dict[Path, str]]:
    """The rows of a results folder, and the text that each generated file should hold.

    The README is by default the one beside the folder, so that a demo's results never reach it; an absent
    one is left out, and a folder without reported.csv has measured rows only. Raises ValueError.
    """
    results = Path(results)
    if not results.is_dir():
        raise ValueError(f"{results}: no such folder, expected a results folder with records/ in it")
    published = results / "reported.csv"
    table = rows(store.read_all(results / "records"), read_reported(published) if published.exists() else ())
    texts = {results / "leaderboard.csv": to_csv(table)}
    if readme is not None and not Path(readme).is_file():
        raise ValueError(f"{readme}: no such file, expected a text file with the leaderboard markers")
    readme = results.absolute().parent / "README.md" if readme is None else Path(readme)
    if readme.is_file():
        texts[readme] = replace_block(_text(readme), markdown(table))
    return table, texts


def stale(texts) -> list[Path]:
    """The files whose content differs from the text they should hold."""
    return [path for path, text in texts.items() if not path.is_file() or path.read_bytes() != text.encode()]


def replace_block(text: str, block: str) -> str:
    """The text with `block` between the leaderboard markers; unchanged without them."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{begin}\n{block}{end}{after}" if end else text


def update_readme(path, table) -> bool:
    """Put the Markdown of rows between the markers of a file; return whether the file changed."""
    path = Path(path)
    old = _text(path)
    new = replace_block(old, markdown(table))
    if new != old:
        store.write_text(path, new)
    return new != old


def markdown(table, policy: str = "penalty") -> str:
    """Markdown of the measured rows: a compact table per data set, protocol, split and recipe, and a note on units."""
    sections = _sections(table)
    if not sections:
        return "No measured rows yet.\n"
    parts = [
        f"### {', '.join(title)}\n\n{markdown_table(COMPACT.values(), cells)}" for title, cells in sections.items()
    ]
    note = (
        "Batch: labeled + unlabeled samples per step. Dice and Jaccard in %, 95HD and ASD in voxels: mean over n runs "
        f"(folds and seeds), sd over runs; a distance to or from an empty mask counts as {EMPTY[policy]}. "
        "Hours per run on the device named. Settings: hash of all hyper-parameters.\n"
    )
    return "\n".join([*parts, note])


def markdown_table(header, body) -> str:
    """A Markdown table of text cells, ending in a newline."""
    lines = [list(header), *body]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def print_table(table, console=None) -> None:
    """Print the measured rows as a rich table, and how many reported rows the CSV file has beside them."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    if not console.is_terminal:
        console.width = 200  # a pipe has no width of its own; 80 would break the lines
    for name, cells in _sections(table).items():
        view = Table(*COMPACT.values(), title=" / ".join(name), title_justify="left", box=box.SIMPLE_HEAD)
        for line in cells:
            view.add_row(*map(escape, line))
        console.print(view)
    measured = sum(row["source"] == "measured" for row in table)
    console.print(f"{measured} measured rows, {len(table) - measured} reported rows")


def score_text(column: str, value: float) -> str:
    """A score as text with two decimals, in the unit of its column."""
    return f"{value * METRICS[column][1]:.2f}"


def hours(timing: dict) -> float | None:
    """Hours of training and evaluation of one run, None where a time is unknown."""
    parts = timing["train_seconds"], timing["evaluate_seconds"]
    return None if None in parts else sum(parts) / 3600


def mean_text(values, digits: int) -> str:
    """The mean as text, empty where a value is unknown."""
    return "" if None in values else f"{fmean(values):.{digits}f}"


def _sections(table):
    """Words of a title (data set, protocol, split, data) -> the compact cells of its measured rows, in table order."""
    sections = defaultdict(list)
    for row in table:
        if row["source"] == "measured":
            words = [row["dataset"], *(f"{word} {row[word]}" for word in ("protocol", "split", "data") if row[word])]
            sections[tuple(words)].append(_compact(row))
    return sections


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


def _ranked(found):
    """Measured rows in table order, complete ones ranked by Dice among the same data, split and label count."""
    fields = defaultdict(list)
    for group in found:
        run = group.runs[0]
        spec = run["spec"]
        place = (spec["dataset"], spec["protocol"], group.split, group.data, run["split"]["folds"], spec["labeled"])
        fields[place].append((fmean(score["dice"] for score in group.scores), group))
    table = []
    for _, entries in sorted(fields.items()):
        ranked = sorted(dice for dice, group in entries if group.complete)
        entries.sort(key=lambda entry: (not entry[1].complete, -entry[0]))  # stable: ties keep the order of groups
        for dice, group in entries:
            rank = str(1 + sum(other > dice for other in ranked)) if group.complete else ""
            table.append(_measured_row(group, rank))
    return table


def precision_of(run) -> str:
    """Precision of training, and of the scored predictions where it is not float32."""
    scored = run["evaluation"].get("precision", "32-true")
    return run["spec"]["precision"] + ("" if scored == "32-true" else f", scored in {scored}")


def _measured_row(group, rank):
    run, runs = group.runs[0], group.runs
    spec, split = run["spec"], run["split"]
    row = dict.fromkeys(COLUMNS, "") | {
        "rank": rank, "source": "measured", "dataset": spec["dataset"], "protocol": spec["protocol"],
        "split": group.split, "data": group.data, "labeled": str(spec["labeled"]),
        "unlabeled": str(len(split["unlabeled"]) // split.get("per_patient", 1)),
        "method": spec["method"], "network": spec["network"], "precision": precision_of(run),
        "batch": f"{spec['labeled_batch']}+{spec['unlabeled_batch']}",
        "missed": str(sum(score["missed"] for score in group.scores)), "n": str(len(runs)),
        "folds": str(len({item["spec"]["fold"] for item in runs})),
        "seeds": str(len({item["spec"]["seed"] for item in runs})), "complete": "yes" if group.complete else "no",
        "selection": run["selection"], "hp_hash": run["hp_hash"], "iterations": str(spec["iterations"]),
        "iterations_per_s": mean_text([item["timing"]["iterations_per_second"] for item in runs], 2),
        "device": " + ".join(sorted({f"{item['device']['type']}: {item['device']['name']}" for item in runs})),
        "hours": mean_text([hours(item["timing"]) for item in runs], 3),
    }  # fmt: skip
    for column, (key, _) in METRICS.items():
        if key.endswith("_mm") and not run.get("data", {}).get("spacing_known", True):
            continue  # voxels of unknown size have no distance in mm
        values = [score[key] for score in group.scores]
        row[column] = score_text(column, fmean(values))
        if f"{column}_sd" in row and len(values) > 1:
            row[f"{column}_sd"] = score_text(column, stdev(values))
    return row


def _reported_row(row):
    names = {"method": "method", "dataset": "dataset", "labeled": "labeled", "unlabeled": "unlabeled",
             "split": "split", "network": "backbone", "reference": "source", "Dice": "dice", "Jaccard": "jaccard",
             "95HD": "hd95", "ASD": "asd"}  # fmt: skip
    # the digits stay as published: 13.4 must not become 13.40
    return dict.fromkeys(COLUMNS, "") | {"source": "reported"} | {new: row[old] for new, old in names.items()}


def _reported_order(row):
    return row["dataset"], int(row["labeled"] or 0), row["method"], *(row[column] for column in COLUMNS)


def _compact(row):
    cells = {key: row[key] for key in COMPACT}
    if row["Dice_sd"]:
        cells["Dice"] += f" ± {row['Dice_sd']}"
    return list(cells.values())


def _is_number(text, whole):
    if not text:
        return not whole
    try:
        return (int(text) if whole else float(text)) >= 0
    except ValueError:
        return False
