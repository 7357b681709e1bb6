"""Write a Markdown report per data set and protocol from the run records; print the paths."""

import argparse
import sys
from pathlib import Path

from ssl4mis import records, report


def main(argv=None) -> int:
    """Exit status: 0 done, 2 a record or an argument is bad."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", default="results", help="folder with records/; reports/ goes there (%(default)s)")
    options = parser.parse_args(argv)
    results = Path(options.results)
    try:
        if not results.is_dir():
            raise ValueError(f"{results}: no such folder, expected a results folder with records/ in it")
        paths = report.write_reports(records.read_all(results / "records"), results / "reports")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(map(str, paths)) or f"{results / 'records'}: no records that count yet")
    return 0


if __name__ == "__main__":
    sys.exit(main())
