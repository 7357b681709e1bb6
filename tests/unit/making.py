"""Synthetic records and peeks: small, valid by `ssl4mis.records.validate`, the same for the same arguments."""

import random

from ssl4mis.records import DISTANCES, digest

# what the runs of one group may differ in, as in ssl4mis.config
NOT_HYPER = ("dataset", "protocol", "recipe", "labeled", "unlabeled", "control", "fold", "seed")
DIAGONAL = 50.0  # voxels; a voxel is 2 mm wide


def make_record(method="ua_mt", dice=0.8, *, cases=6, classes=("organ",), distance=2.0, spread=0.0, missed=(),
                false_alarms=(), dataset="LA", protocol="lite", split="LA-paper", labeled=16, total=80, fold=0, folds=1,
                seed=0, per_patient=1, control=None, unlabeled=None, calibration=False, costs=None, curve=(), hp=None,
                hp_hash=None, id=None, top=None, **spec):  # fmt: skip
    """A record of one run; `top` replaces or adds whole entries, further keywords are settings of the spec.

    Args:
        dice: one number for all rows, or one per case, or {case: number or {class: number}}.
        cases: how many are tested, or their names; those of fold f are named after it, so that folds share none.
        classes: of the foreground.
        distance: like dice, in voxels; every distance of a row has this value, those in mm twice as much.
        spread: half the width of the noise on each Dice, the same for the same method, fold and seed.
        missed, false_alarms: cases, or pairs of case and class, whose prediction, or truth, is empty.
        total: training cases; those that are not labeled are unlabeled, of which the run saw `unlabeled` (all: None).
        per_patient: test cases of one patient, which stand side by side; labels and unlabeled count patients, too.
        calibration: whether to add it, worse where Dice is.
    """
    names = [f"f{fold}c{number:02d}" for number in range(cases)] if isinstance(cases, int) else list(cases)
    spec = {
        "method": method, "dataset": dataset, "protocol": protocol, "labeled": labeled, "fold": fold, "seed": seed,
        "network": "vnet", "width": 8, "labeled_batch": 2, "unlabeled_batch": 0 if method == "supervised" else 2,
        "iterations": 3000, "precision": "32-true", "patch": [64, 64, 32], "hp": hp or {},
    } | spec  # fmt: skip
    spec |= {key: value for key, value in (("control", control), ("unlabeled", unlabeled)) if value is not None}
    noise = random.Random(digest([method, dataset, fold, seed, control, unlabeled, labeled]))
    rows = []
    for number, case in enumerate(names):
        for label in classes:
            value = _of(dice, number, case, label) + spread * (2 * noise.random() - 1)
            blank = {(case, label), case}
            rows.append(_row(case, label, value, _of(distance, number, case, label),
                             not blank.isdisjoint(missed), not blank.isdisjoint(false_alarms)))  # fmt: skip
    hidden = (total - labeled) if unlabeled is None else unlabeled
    record = {
        "schema": 1,
        "id": id or f"{dataset}-{protocol}-{labeled}-{spec['network']}-{method}-f{fold}-s{seed}-{digest(spec)}",
        "spec": spec,
        "hp_hash": hp_hash or digest({key: value for key, value in spec.items() if key not in NOT_HYPER}),
        "split": {"name": split, "fold": fold, "folds": folds, "sha256": f"{fold:064x}", "per_patient": per_patient,
                  "labeled": [f"l{number}" for number in range(labeled * per_patient)],
                  "unlabeled": [f"u{number}" for number in range(hidden * per_patient)], "test": names},
        "selection": "last", "evaluation": {"precision": "32-true"}, "classes": ["background", *classes],
        "cases": rows, "timing": {"train_seconds": 5400.0, "evaluate_seconds": 1800.0, "iterations_per_second": 2.5},
        "memory": {"peak_mib": 712.5}, "device": {"type": "cpu", "name": "test"},
        "code": {"version": "0.1.0", "commit": "c" * 40, "dirty": False}, "environment": {}, "curve": list(curve),
        "weights_sha256": f"{noise.getrandbits(256):064x}",
    }  # fmt: skip
    if calibration:
        record["calibration"] = [
            {"case": case, "ece": round((1 - mean) / 4, 6), "nll": round((1 - mean) / 2, 6)}
            for case in names
            for mean in [sum(row["dice"] for row in rows if row["case"] == case) / len(classes)]
        ]
    if costs is not None:
        record["costs"] = {"parameters": 9_450_000, "forward_passes": 4.0, "backward_passes": 4.0} | costs
    return record | (top or {})


def make_curve(iterations=3000, points=5, terms=("supervised", "consistency"), watch=("weight",)):
    """Events of a run: terms that fall from 1, watched values that rise to 1; the first is unknown, as it may be."""
    steps = [iterations * (number + 1) // points for number in range(points)]
    return [
        {"done": done, "stage": "train", "rate": 2.5, "terms": dict.fromkeys(terms, 1 - done / iterations / 2),
         "watch": dict.fromkeys(watch, done / iterations if number else None)}
        for number, done in enumerate(steps)
    ]  # fmt: skip


def make_peek(record, shifts=(-0.1, 0.02)):
    """A peek of a record: one checkpoint per shift, whose Dice is the record's plus it, then the end of the run.

    A shift is a number for all rows, or one per case; Dice stays within 0 and 1, distances as they are.
    """
    iterations, test = record["spec"]["iterations"], record["split"]["test"]
    checkpoints = []
    for number, shift in enumerate(shifts):
        rows = [dict(row) for row in record["cases"]]
        for row in rows:
            if row["empty_prediction"] == row["empty_truth"]:  # a missed structure stays one
                place = test.index(row["case"])
                _set_overlap(row, row["dice"] + _of(shift, place, row["case"], row["class"]))
        checkpoints.append({"iteration": iterations * (number + 1) // (len(shifts) + 1), "cases": rows})
    checkpoints.append({"iteration": iterations, "cases": [dict(row) for row in record["cases"]]})
    return {"schema": 1, "id": record["id"], "checkpoints": checkpoints}


def _of(value, number, case, label):
    if isinstance(value, dict):
        value = value[case]
    elif not isinstance(value, int | float):
        value = value[number]
    return value[label] if isinstance(value, dict) else value


def _row(case, label, dice, distance, empty_prediction, empty_truth):
    row = {
        "case": case, "class": label, **{key: distance * (2 if key.endswith("mm") else 1) for key in DISTANCES},
        "empty_prediction": empty_prediction, "empty_truth": empty_truth,
        "diagonal_voxel": DIAGONAL, "diagonal_mm": 2 * DIAGONAL,
    }  # fmt: skip
    _set_overlap(row, dice)
    if empty_prediction != empty_truth:
        row |= {"dice": 0.0, "jaccard": 0.0, **dict.fromkeys(DISTANCES)}
    return row


def _set_overlap(row, dice):
    dice = min(1.0, max(0.0, dice))
    row |= {"dice": dice, "jaccard": dice / (2 - dice)}
