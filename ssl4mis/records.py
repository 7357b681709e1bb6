"""Run records: one strict JSON file per finished run, written once and never edited."""

import hashlib
import json
import math
import os
import re
import sys
import uuid
from contextlib import suppress
from pathlib import Path

from data_prep.spec import names_a_file
from ssl4mis.errors import UserError, not_written

SCHEMA = 1
ROWS = ("cases", "calibration", "curve", "checkpoints")  # lists of flat mappings, written one per line
TOP = {
    "schema": int, "id": str, "spec": dict, "hp_hash": str, "split": dict, "selection": str, "evaluation": dict,
    "classes": list, "cases": list, "timing": dict, "memory": dict, "device": dict, "code": dict,
    "environment": dict, "curve": list,
}  # fmt: skip
NESTED = {
    "spec": {"method": str, "dataset": str, "protocol": str, "labeled": int, "fold": int, "seed": int,
             "network": str, "labeled_batch": int, "unlabeled_batch": int, "iterations": int, "precision": str},
    "split": {"name": str, "fold": int, "folds": int, "sha256": str, "labeled": list, "unlabeled": list, "test": list},
    "timing": {"train_seconds": float, "evaluate_seconds": float, "iterations_per_second": float},
    "device": {"type": str, "name": str},
}  # fmt: skip
OPTIONAL = {  # what older records, or those of some runs, have not
    "spec": {"unlabeled": int, "control": str, "recipe": str, "width": int, "patch": list, "stride": list, "hp": dict},
    "split": {"per_patient": int}, "memory": {"peak_mib": float}, "environment": {"threads": int},
    "evaluation": {"precision": str, "postprocess": str, "patch": list, "stride": list},
    "code": {"version": str, "commit": str, "dirty": bool}, "data": {"label_guided": bool, "spacing_known": bool},
    "record": {"data": dict, "costs": dict, "calibration": list, "weights_sha256": str},
}  # fmt: skip
EVENT = {"done": int, "stage": str, "rate": float, "terms": dict, "watch": dict}  # of the curve
NULLABLE = ("peak_mib", "commit")  # of these: where the system does not tell
OVERLAPS = ("dice", "jaccard")
UNITS = ("voxel", "mm")
DISTANCES = tuple(f"{name}_{unit}" for name in ("hd95", "hd95_max", "asd", "assd") for unit in UNITS)
PASSES = ("forward_passes", "backward_passes")
FLAGS = ("empty_prediction", "empty_truth")
DEPTH = 20  # of lists and mappings in each other; whatever goes through them once more has room for it


def digest(mapping, length: int = 8) -> str:
    """First `length` hex digits of the SHA-256 of the canonical JSON (sorted keys, compact).

    Raises ValueError for values that strict JSON cannot hold.
    """
    text = _dump(plain(mapping), separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def write(record: dict, folder, check=None) -> Path:
    """Write `folder`/<id>.json atomically and once, NaN as null; return its path.

    `check` is `validate`, or what stands in its place for another store with the same rules.

    Raises FileExistsError when the file holds other content, ValueError when the record breaks the schema, UserError
    where it cannot be written.
    """
    record = plain(record)
    name = f"record {record['id']}" if isinstance(record, dict) and "id" in record else "record"
    (check or validate)(record, name)
    folder = Path(folder)
    path = folder / f"{record['id']}.json"
    try:
        text = _render(record)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    temporary = _stage(path, text)
    try:
        os.link(temporary, path)  # unlike a rename, fails where another process was first
    except OSError:  # it exists, or the file system has no hard links
        if not path.exists():
            _rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if path.read_bytes() != text.encode():
        raise FileExistsError(f"{path}: exists with other content; a record is never rewritten")
    return path


def read(path, check=None) -> dict:
    """The record in `path`, validated by `check` as of `write`; UserError of one line naming a file that is broken."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        record = json.loads(text, parse_constant=_no_constant, parse_float=_float, parse_int=_int)
        _check_depth(record, DEPTH)
        if "\\u" in text:
            _dump(record, ensure_ascii=False).encode()  # half a character cannot be written again
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable record, expected strict JSON ({error})") from None
    try:
        (check or validate)(record, str(path))
    except ValueError as error:
        raise UserError(str(error)) from None
    if record["id"] != path.stem:
        raise UserError(f"{path}: holds id {record['id']!r:.80}, expected the name of the file")
    return record


def read_all(folder, broken=None, check=None) -> list[dict]:
    """All records of a folder, sorted by id; an absent folder holds none.

    Args:
        broken: called with the UserError of each file that `read` refuses, the others are read; without it the first
            one is raised.
        check: as of `read`.
    """
    found = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            found.append(read(path, check))
        except UserError as error:
            if broken is None:
                raise
            broken(error)
    return sorted(found, key=lambda record: record["id"])


class Broken(list):
    """Collects the errors of broken files for `read_all`, and tells each on stderr."""

    def __call__(self, error: Exception) -> None:
        print(error, file=sys.stderr)
        self.append(error)


def read_json(path: Path) -> dict:
    """A JSON object from a file of a run; UserError where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}), expected a JSON file") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: a {type(found).__name__}, expected a JSON object")
    return found


def write_text(path, text: str) -> Path:
    """Replace a generated file atomically, with \\n line ends on every system; UserError where it cannot be written."""
    path = Path(path)
    temporary = _stage(path, text)
    try:
        _rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def check_folder(path) -> None:
    """UserError where a file could not be written to its folder, or to the one above where that is not there yet."""
    place = Path(path).parent
    while not place.exists() and place != place.parent:
        place = place.parent
    _stage(place / Path(path).name, "").unlink()


def validate(record, name: str) -> None:
    """Raise ValueError naming `name`, the key and what was expected, unless the record follows the schema."""
    check_header(record, name, TOP)
    for key, fields in NESTED.items():
        check(record[key], fields, name, key, nullable=key == "timing")
    split, spec = record["split"], record["spec"]
    for key, fields in OPTIONAL.items():
        check_optional(record if key == "record" else record.get(key, {}), fields, name, key)
    if split.get("per_patient", 1) < 1:
        raise ValueError(f"{name}: split.per_patient is {split['per_patient']}, expected at least 1")
    for key in ("method", "dataset", "protocol", "network"):
        _check_name(spec[key], name, f"spec.{key}")
    for key in ("labeled", "unlabeled", "test"):
        for number, case in enumerate(split[key]):
            _check_name(case, name, f"split.{key}[{number}]")
    for number, label in enumerate(record["classes"]):
        if not (isinstance(label, str) and label.isprintable()):
            raise ValueError(f"{name}: classes[{number}] is {label!r:.40}, expected a name")
    if spec["fold"] != split["fold"] or not 0 <= split["fold"] < split["folds"]:
        raise ValueError(
            f"{name}: spec.fold {spec['fold']}, split.fold {split['fold']} of {split['folds']} folds,"
            " expected equal and below the number of folds"
        )
    if "data" in record:  # older ones have none
        check(record["data"], {"recipe": str, "sha256": str}, name, "data")
    if "costs" in record:
        check(record["costs"], {"parameters": int}, name, "costs")
        check(record["costs"], dict.fromkeys(PASSES, float), name, "costs", nullable=True)
    for number, row in enumerate(record["cases"]):
        check_case(row, name, f"cases[{number}]")
    for number, event in enumerate(record["curve"]):
        check(event, {}, name, f"curve[{number}]")
        check_optional(event, EVENT, name, f"curve[{number}]")
        for key in ("terms", "watch"):
            check(event.get(key, {}), dict.fromkeys(event.get(key, ()), float), name, f"curve[{number}].{key}", True)
    for number, row in enumerate(record.get("calibration", ())):
        check(row, {"case": str, "ece": float, "nll": float}, name, f"calibration[{number}]")
    _check_coverage(record, name)


def check_header(found, name: str, fields) -> None:
    """Raise ValueError like `validate` unless this is an object of our schema with an id that is a file name."""
    if not isinstance(found, dict):
        raise ValueError(f"{name}: is a {type(found).__name__}, expected a JSON object")
    if found.get("schema") != SCHEMA:
        raise ValueError(f"{name}: schema is {found.get('schema')!r}, expected {SCHEMA}")
    check(found, {"id": str, **fields}, name, "record")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", found["id"]):
        raise ValueError(f"{name}: id {found['id']!r}, expected letters, digits, '.', '_' and '-'")


def check_case(row, name: str, where: str) -> None:
    """Raise ValueError like `validate` unless the row holds the scores of one case and class."""
    numbers = dict.fromkeys((*OVERLAPS, "diagonal_voxel", "diagonal_mm"), float)
    check(row, {"case": str, "class": str, **numbers, **dict.fromkeys(FLAGS, bool)}, name, where)
    check(row, dict.fromkeys(DISTANCES, float), name, where, nullable=True)
    for key in OVERLAPS:
        if not 0 <= row[key] <= 1:
            raise ValueError(f"{name}: {where}.{key} is {row[key]!r}, expected a number from 0 to 1")
    undefined = row["empty_prediction"] != row["empty_truth"]
    for key in DISTANCES:  # a null elsewhere would be a silent failure, a number here an unnamed policy
        if (row[key] is None) != undefined:
            raise ValueError(f"{name}: {where}.{key} is {row[key]!r}, expected null exactly where one mask is empty")
        if row[key] is not None and row[key] < 0:
            raise ValueError(f"{name}: {where}.{key} is {row[key]!r}, expected a distance of at least 0")


def _check_name(text, name, where):
    if not names_a_file(text):
        raise ValueError(f"{name}: {where} is {text!r:.40}, expected a name that a file can have")


def _check_coverage(record, name):
    found = sorted((row["case"], row["class"]) for row in record["cases"])
    expected = sorted((case, label) for case in record["split"]["test"] for label in record["classes"][1:])
    if not expected or found != expected:
        raise ValueError(
            f"{name}: cases holds {len(found)} rows, expected exactly one for each of the"
            f" {len(record['split']['test'])} test cases and {len(record['classes'][1:])} foreground classes"
        )
    calibrated = sorted(row["case"] for row in record.get("calibration", ()))
    if "calibration" in record and calibrated != sorted(record["split"]["test"]):
        raise ValueError(
            f"{name}: calibration holds {len(calibrated)} rows, expected exactly one for each of the"
            f" {len(record['split']['test'])} test cases"
        )


def check(mapping, fields, name: str, where: str, nullable: bool = False) -> None:
    """Raise ValueError like `validate` unless the mapping has these fields of these types."""
    if not isinstance(mapping, dict):
        raise ValueError(f"{name}: {where} is {mapping!r:.40}, expected a JSON object")
    for key, kind in fields.items():
        if key not in mapping:
            raise ValueError(f"{name}: {where} lacks {key!r}, expected {kind.__name__}")
        value = mapping[key]
        if nullable and value is None:
            continue
        kinds = (int, float) if kind is float else kind
        if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name}: {where}.{key} is {value!r:.40}, expected {kind.__name__}")


def check_optional(mapping, fields, name: str, where: str) -> None:
    """Raise ValueError like `validate` unless what the mapping has of these fields is of these types."""
    there = [key for key in fields if key in mapping and not (key in NULLABLE and mapping[key] is None)]
    check(mapping, {key: fields[key] for key in there}, name, where)


def plain(value):
    """The same data as dict, list, str, int, float, bool or None: NaN as None, array scalars unpacked."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if not isinstance(value, str | int | float | None) and hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and math.isnan(value) else value


def _render(record):
    order = [*(key for key in TOP if key in record), *sorted(set(record) - set(TOP))]
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {_value(key, record[key])}" for key in order) + "\n}\n"


def _value(key, value):
    if key in ROWS and value:
        return "[\n  " + ",\n  ".join(map(_dump, value)) + "\n ]"
    return _dump(value, indent=1).replace("\n", "\n ")


def _dump(value, **layout):
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False, **layout)
    except (TypeError, ValueError) as error:
        raise ValueError(f"not strict JSON, expected finite numbers, text, lists and mappings ({error})") from None


def _no_constant(name):
    raise ValueError(f"{name} is not strict JSON")


def _float(text):
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text:.40} is beyond the range of numbers")
    return value


def _int(text):
    value = int(text)
    if abs(value) >= 2**64:
        raise ValueError(f"{text:.40} is beyond the range of numbers")
    return value


def _check_depth(value, left):
    if not isinstance(value, dict | list):
        return
    if not left:
        raise ValueError(f"lists and mappings more than {DEPTH} deep")
    for item in value.values() if isinstance(value, dict) else value:
        _check_depth(item, left - 1)


def _rename(temporary, path):
    try:
        os.replace(temporary, path)
    except OSError as error:
        raise not_written(path, error) from None


def _stage(path, text):
    """A temporary file beside `path` with the text on disk, so that the final step is one directory entry.

    The folder is made. UserError where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise not_written(path, error) from None
        raise
    return temporary
