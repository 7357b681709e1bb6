"""Regenerate results/leaderboard.csv and the README's table from the run records; print the table, or part of it."""

import argparse
import sys

from ssl4mis import leaderboard, records


def main(argv=None) -> int:
    """Exit status: 0 done or up to date, 1 a file would change (--check), 2 a record or an argument is bad."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--results", default="results", help="folder with records/ and reported.csv (%(default)s)")
    add("--readme", help="file with the leaderboard markers (README.md beside the results folder)")
    add("--check", action="store_true", help="write nothing; name the files that would change")
    add("--format", choices=leaderboard.FORMATS, help="print rows in this form; the committed files stay as they are")
    add("--out", help="a file for what --format or a filter prints")
    for name in leaderboard.FILTERS:
        add(f"--{name}", action="append", metavar="A,B", help=f"only rows of this {name} or these; implies --format")
    options = parser.parse_args(argv)
    wanted = {name: getattr(options, name) for name in leaderboard.FILTERS if getattr(options, name)}
    part = bool(wanted or options.format or options.out)
    if part and (options.check or options.readme):
        parser.error("--check and --readme are about all rows: expected no filter, --format or --out beside them")
    broken = records.Broken()  # named, and the others make the table; --check stops at the first one
    try:
        if part:
            leaderboard.show(options.results, wanted, options.format, options.out, broken)
            return 2 * bool(broken)
        status = leaderboard.regenerate(
            options.results, options.readme, options.check, None if options.check else broken)
        return 2 if broken else status
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
