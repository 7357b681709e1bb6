"""A record run again: whether its result holds, and whether the weights are the same to the last bit.

The new run is kept beside the results, in `reproductions`, where no ranking looks.
"""
import dataclasses
from difflib import get_close_matches
from pathlib import Path

import torch

from ssl4mis import analysis, config, leaderboard, records, statistics
from ssl4mis.config import RunOptions, RunSpec
from ssl4mis.errors import UserError
from ssl4mis.run import exit_status, run
from ssl4mis.selection import run_scores

FOLDER = "reproductions"
SAME = 1e-9  # Dice below which two results are one, where the row is too small for an interval


def main(argv: list[str]) -> int:
    """`run.py --reproduce RECORD`; exit status: 0 the result holds, 1 it does not, 2 bad input."""
    parser = config.Parser(prog="run.py", allow_abbrev=False, description=__doc__)
    parser.add_argument("--reproduce", metavar="RECORD", required=True, help="id of a record, or the beginning of one")
    parser.add_class_arguments(RunOptions, skip={"compile", "checkpointing"})
    settings = parser.parse_args(config.in_order(argv)).as_dict()
    name = settings.pop("reproduce")
    held = []
    status = exit_status(lambda: held.append(reproduce(name, RunOptions(**settings))))
    return status or int(not held[0])



def reproduce(name: str, options: RunOptions, say=print) -> bool:
    """Run a record again with its settings, and say whether the new result lies in the interval of the record's row.

    Threads, compilation and checkpointing are those of the record. UserError or DataError, one line, where it cannot
    be run; TrainingStopped as of `run`.
    """
    folder = options.out / "records"
    try:
        record = records.read(find(name, folder))
        group = row_of(record, records.read_all(folder, say))
    except ValueError as error:
        raise UserError(str(error)) from None
    spec, before = spec_of(record), record["environment"]
    if record["device"]["type"] == "cpu" and "threads" in before:
        torch.set_num_threads(before["threads"])
    say(f"{record['id']} was made on {record['device']['name']} by commit {record['code'].get('commit') or 'unknown'}")
    again = dataclasses.replace(options, out=options.out / FOLDER, compile=before.get("compile", "none"),
                                checkpointing=before.get("checkpointing", False))
    new = records.read(run(spec, again, say))
    holds, lines = verdict(record, new, group)
    say("\n".join(lines))
    return holds


def find(name: str, folder: Path) -> Path:
    """The file of a record by its id or the beginning of one; UserError naming the nearest id."""
    known = sorted(path.stem for path in folder.glob("*.json"))
    found = [name] if name in known else [key for key in known if key.startswith(name)]
    if len(found) == 1:
        return folder / f"{found[0]}.json"
    if found:
        more = ", ..." if len(found) > 4 else ""
        raise UserError(f"record {name!r}: {len(found)} begin so, expected one: {', '.join(found[:4])}{more}")
    nearest = get_close_matches(name, known, 1, 0)
    raise UserError(f"record {name!r} is not in {folder}: "
                    + (f"did you mean {nearest[0]}?" if nearest else "there are none, --out names another folder"))


def spec_of(record: dict) -> RunSpec:
    """The settings of a record; UserError where this version reads them as another run."""
    try:
        spec = RunSpec(**record["spec"])
    except TypeError as error:
        raise UserError(f"record {record['id']}: not the settings of a run of this version ({error})") from None
    if spec.id != record["id"]:
        raise UserError(f"record {record['id']}: its settings are those of {spec.id}, expected its own id")
    return spec


def row_of(record: dict, found: list[dict]) -> leaderboard.Group:
    """The group of runs that a record is in."""
    return next(group for group in leaderboard.groups(found) if any(run["id"] == record["id"] for run in group.runs))


def verdict(record: dict, new: dict, group: leaderboard.Group) -> tuple[bool, list[str]]:
    """Whether a new result holds, and lines that say why.

    It does if its mean Dice lies in the 95 % interval of the row's mean over test cases, or is the same where those
    are too few for an interval.
    """
    old_dice, new_dice = (100 * run_scores(entry)["dice"] for entry in (record, new))
    low, high = (100 * end for end in statistics.mean_interval(list(analysis.patient_scores(group).values())))
    runs = f"{len(group.runs)} run{'s' * (len(group.runs) > 1)}"
    if low == low:
        holds = low <= new_dice <= high
        where = f"{'inside' if holds else 'outside'} the row's 95 % interval, {low:.2f} to {high:.2f} ({runs})"
    else:
        holds = abs(new_dice - old_dice) < 100 * SAME
        where = f"{'the same' if holds else 'not the same'}; too few test cases for an interval"
    return holds, [f"Dice {old_dice:.2f} % in the record, {new_dice:.2f} % again: {where}", weights_line(record, new),
                   f"{new['id']}: the result {'holds' if holds else 'does not hold'}"]


def weights_line(record: dict, new: dict) -> str:
    """Whether the weights are equal, and what else differs where they are not."""
    before = record.get("weights_sha256")
    if not before:
        return "weights: the record is from before their checksum was kept"
    if before == new["weights_sha256"]:
        return f"weights: equal, sha256 {before[:16]}"
    return f"weights: not equal; {differences(record, new) or 'versions, threads and device are the same'}"


def differences(record: dict, new: dict) -> str:
    """What two records say differently of code, device and environment."""
    pairs = {"commit": [entry["code"].get("commit") for entry in (record, new)],
             "device": [entry["device"]["name"] for entry in (record, new)]}
    old, young = record["environment"], new["environment"]
    for name in sorted({*old, *young} - {"packages"}):
        pairs[name] = [old.get(name), young.get(name)]
    for name in sorted({*old.get("packages", {}), *young.get("packages", {})}):
        pairs[name] = [entry.get("packages", {}).get(name) for entry in (old, young)]
    return ", ".join(f"{name} {one} then, {two} now" for name, (one, two) in pairs.items() if one != two)
