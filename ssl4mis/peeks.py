"""What the kept checkpoints of a run score on the test list: a store of its own, which no ranking opens.

Choosing a checkpoint by these numbers is what the suite does not do; they are there to measure what it would buy.
"""

from pathlib import Path

from ssl4mis import records


def write(folder, record_id: str, checkpoints) -> Path:
    """Write `folder`/<id>.json, (iteration, rows as in a record's cases) for each checkpoint; return its path.

    Raises FileExistsError when the file holds other content, ValueError when a row breaks the schema.
    """
    found = [{"iteration": done, "cases": rows} for done, rows in sorted(checkpoints.items())]
    return records.write({"schema": records.SCHEMA, "id": record_id, "checkpoints": found}, folder, validate)


def read(path) -> dict:
    """The validated peeks in `path`; UserError of one line naming the file where it is broken."""
    return records.read(path, validate)


def read_all(folder, broken=None) -> list[dict]:
    """All peeks of a folder, sorted by id; an absent folder holds none. Broken files as of `records.read_all`."""
    return records.read_all(folder, broken, validate)


def validate(found, name: str) -> None:
    """Raise ValueError naming `name`, the key and what was expected, unless these are peeks, sorted by iteration."""
    records.check_header(found, name, {"checkpoints": list})
    before = 0
    for number, entry in enumerate(found["checkpoints"]):
        where = f"checkpoints[{number}]"
        records.check(entry, {"iteration": int, "cases": list}, name, where)
        if entry["iteration"] <= before:
            raise ValueError(f"{name}: {where}.iteration is {entry['iteration']}, expected more than {before}")
        before = entry["iteration"]
        for place, row in enumerate(entry["cases"]):
            records.check_case(row, name, f"{where}.cases[{place}]")
    if not found["checkpoints"]:
        raise ValueError(f"{name}: checkpoints is empty, expected at least one")
