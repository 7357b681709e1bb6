"""Regenerate results/leaderboard.csv and the README's table from the run records; print the table."""

import argparse
import sys

from ssl4mis import leaderboard, records


def main(argv=None) -> int:
    """Exit status: 0 done or up to date, 1 a file would change (--check), 2 a record or an argument is bad."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", default="results", help="folder with records/ and reported.csv (%(default)s)")
    parser.add_argument("--readme", help="file with the leaderboard markers (README.md beside the results folder)")
    parser.add_argument("--check", action="store_true", help="write nothing; name the files that would change")
    options = parser.parse_args(argv)
    try:
        table, texts = leaderboard.outputs(options.results, options.readme)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    changed = leaderboard.stale(texts)
    if options.check:
        for path in changed:
            print(f"{path} differs from the records: run benchmarks/leaderboard.py", file=sys.stderr)
        return 1 if changed else 0
    for path in changed:
        records.write_text(path, texts[path])
    leaderboard.print_table(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
