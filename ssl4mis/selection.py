"""Named rules: which records count, and how the rows of a record become its scores."""

from statistics import fmean

from ssl4mis.records import DISTANCES, OVERLAPS

METRICS = OVERLAPS + DISTANCES
CALIBRATION = ("ece", "nll")

RULES = {
    "last": lambda record: record["selection"] == "last",  # the checkpoint after the last iteration, no peeking
}
POLICIES = {
    "penalty": lambda row, unit: row[f"diagonal_{unit}"],  # nothing in the image is farther away
    "legacy": lambda row, unit: 0.0,  # what the papers' code did: a miss improves the mean
}


def select(records, rule: str = "last") -> list[dict]:
    """The records that count under a named rule, sorted by id; ValueError for an unknown rule."""
    counts = _named(RULES, "selection rule", rule)
    return sorted((record for record in records if counts(record)), key=lambda record: record["id"])


def row_scores(row: dict, policy: str = "penalty") -> dict[str, float]:
    """All metrics of one case and class, null distances filled by the policy; distances in the unit of their name."""
    fill = _named(POLICIES, "empty-mask policy", policy)
    return {key: fill(row, key.rpartition("_")[2]) if row[key] is None else row[key] for key in METRICS}


def missed(row: dict) -> bool:
    """Whether the structure is there and the prediction is empty."""
    return row["empty_prediction"] and not row["empty_truth"]


def false_alarm(row: dict) -> bool:
    """Whether the structure is absent and the prediction is not empty."""
    return row["empty_truth"] and not row["empty_prediction"]


def mean_scores(rows, policy: str = "penalty") -> dict:
    """Means of the metrics over rows, and the counts `missed` and `false_alarm`."""
    rows = list(rows)
    filled = [row_scores(row, policy) for row in rows]
    scores = {key: fmean(row[key] for row in filled) for key in METRICS}
    return scores | {"missed": sum(map(missed, rows)), "false_alarm": sum(map(false_alarm, rows))}


def run_scores(record: dict, policy: str = "penalty") -> dict:
    """Scores of one run: mean over cases per class, then over classes; Dice and Jaccard in 0..1.

    Keys are METRICS, the counts `missed` and `false_alarm` over all rows, and `classes`, which maps
    each foreground class to the same keys; and `ece` and `nll`, means over all test cases, None in older records.
    Raises ValueError for an unknown policy.
    """
    classes = {
        name: mean_scores((row for row in record["cases"] if row["class"] == name), policy)
        for name in record["classes"][1:]
    }
    scores = {key: fmean(values[key] for values in classes.values()) for key in METRICS}
    counts = {key: sum(values[key] for values in classes.values()) for key in ("missed", "false_alarm")}
    calibration = {key: fmean(row[key] for row in record["calibration"]) if record.get("calibration") else None
                   for key in CALIBRATION}
    return scores | counts | calibration | {"classes": classes}


def _named(table, what, name):
    if name not in table:
        raise ValueError(f"{what} {name!r} is unknown, expected one of {', '.join(table)}")
    return table[name]
