"""Regenerate docs/methods.md, the cards of all methods, from the code, the published numbers and the run records."""

import argparse
import sys
from pathlib import Path

from ssl4mis import leaderboard, records
from ssl4mis.errors import UserError


def main(argv=None) -> int:
    """Exit status: 0 done or up to date, 1 the file would change (--check), 2 a record or an argument is bad."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", default="results", help="folder with records/ and reported.csv (%(default)s)")
    parser.add_argument("--out", default="docs/methods.md", help="the file to write (%(default)s)")
    parser.add_argument("--check", action="store_true", help="write nothing; say whether the file would change")
    options = parser.parse_args(argv)
    from ssl4mis import cards  # which loads torch

    broken = records.Broken()
    try:
        table = cards.numbers(Path(options.results), None if options.check else broken)
        texts = {Path(options.out): cards.document(table)}
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for path in leaderboard.stale(texts):
        if options.check:
            print(f"{path} differs from the code or the records: run benchmarks/methods.py", file=sys.stderr)
            return 1
        records.write_text(path, texts[path])
    return 2 * bool(broken)


if __name__ == "__main__":
    sys.exit(main())
