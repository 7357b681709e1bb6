"""Cross-validation reports: one Markdown file per data set and protocol, with numbers from records only."""

from collections import defaultdict
from pathlib import Path
from statistics import fmean

from ssl4mis import leaderboard, selection
from ssl4mis.leaderboard import markdown_table, score_text
from ssl4mis.records import write_text

SCORES = ("Dice", "Jaccard", "95HD", "ASD", "95HD_mm", "ASD_mm")
WORST = 5


def write_reports(records, folder, rule: str = "last", policy: str = "penalty") -> list[Path]:
    """Write `folder`/<dataset>-<protocol>.md for all records that count; return the paths, sorted."""
    reports = render(records, rule, policy)
    return [write_text(Path(folder) / name, text) for name, text in sorted(reports.items())]


def render(records, rule: str = "last", policy: str = "penalty") -> dict[str, str]:
    """File name -> Markdown text; the order of the records does not matter. Raises ValueError like `groups`."""
    chapters = defaultdict(list)
    for record in selection.select(records, rule):
        chapters[record["spec"]["dataset"], record["spec"]["protocol"]].append(record)
    return {
        f"{dataset}-{protocol}.md": _report(dataset, protocol, runs, rule, policy)
        for (dataset, protocol), runs in chapters.items()
    }


def _report(dataset, protocol, records, rule, policy):
    found = leaderboard.groups(records, rule, policy)
    rules = f"selection rule `{rule}`, empty-mask policy `{policy}`"
    parts = [
        f"# {dataset}, protocol {protocol}\n",
        f"{len(records)} runs, {rules}. Generated from the run records.\n",
        "## Scores\n",
        leaderboard.markdown(leaderboard.rows(records, rule=rule, policy=policy), policy),
        "## Per class\n",
        markdown_table(
            ["method", "data", "labeled", "class", *map(_header, SCORES), "missed", "false alarms"], _class_lines(found)
        ),
        "## Runs\n",
        markdown_table(
            ["run", "split", "data", "fold", "seed", *map(_header, SCORES), "missed", "false alarms", "hours", "code"],
            _run_lines(found),
        ),
        "## Worst cases\n",
        f"The {WORST} lowest Dice per method, mean over classes and over the n runs that tested the case.\n",
    ]
    for group in found:
        parts += [f"### {_title(group)}\n", _worst_table(group, policy)]
    return "\n".join(parts)


def _class_lines(found):
    for group in found:
        spec = group.runs[0]["spec"]
        for name in group.runs[0]["classes"][1:]:
            scores = [score["classes"][name] for score in group.scores]
            counts = (str(sum(score[key] for score in scores)) for key in ("missed", "false_alarm"))
            means = (score_text(column, fmean(score[_key(column)] for score in scores)) for column in SCORES)
            yield [_name(spec, group), group.data, str(spec["labeled"]), name, *means, *counts]


def _run_lines(found):
    for group in found:
        for run, score in zip(group.runs, group.scores, strict=True):
            split, timing, code = run["split"], run["timing"], run["code"]
            values = (score_text(column, score[_key(column)]) for column in SCORES)
            version = f"{code.get('version', '')} {(code.get('commit') or '')[:8]}{' dirty' * bool(code.get('dirty'))}"
            yield [
                run["id"], group.split, group.data, f"{split['fold']} of {split['folds']}", str(run["spec"]["seed"]),
                *values, str(score["missed"]), str(score["false_alarm"]),
                leaderboard.mean_text([leaderboard.hours(timing)], 3),
                " ".join(version.split()),
            ]  # fmt: skip


def _worst_table(group, policy):
    cases = defaultdict(list)
    for run in group.runs:
        for row in run["cases"]:
            cases[row["case"]].append(row)
    classes = len(group.runs[0]["classes"]) - 1
    scored = [(case, selection.mean_scores(rows, policy), len(rows) // classes) for case, rows in cases.items()]
    scored.sort(key=lambda entry: (entry[1]["dice"], entry[0]))
    lines = [
        [case, score_text("Dice", mean["dice"]), score_text("95HD", mean["hd95_voxel"]), str(mean["missed"]), str(n)]
        for case, mean, n in scored[:WORST]
    ]
    return markdown_table(["case", "Dice", _header("95HD"), "missed", "n"], lines)


def _header(column):
    name, _, unit = column.partition("_")
    return f"{name} [{unit or 'voxel'}]" if name in ("95HD", "ASD") else f"{name} [%]"


def _key(column):
    return leaderboard.METRICS[column][0]


def _name(spec, group):
    run = group.runs[0]
    return f"{spec['method']} ({spec['network']}, {leaderboard.precision_of(run)}, {run['hp_hash']})"


def _title(group):
    spec, data = group.runs[0]["spec"], f", data {group.data}" if group.data else ""
    return f"{_name(spec, group)}, {spec['labeled']} labeled, split {group.split}{data}"
