"""Write cross-validation reports from the run records, one HTML page and its Markdown each; print the paths."""

import argparse
import sys


def main(argv=None) -> int:
    """Exit status: 0 done, 1 a committed report is out of date (--check), 2 a record or an argument is bad.

    A broken record is named, and the others are used; with --check nothing else is looked at.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", help="only this data set (all that have records)")
    parser.add_argument("--protocol", help="only this protocol (all)")
    parser.add_argument("--labeled", type=int, help="only this number of labeled cases (all)")
    parser.add_argument("--results", default="results", help="folder with records/, peeks/, runs/ (%(default)s)")
    parser.add_argument("--data-root", help="folder of the scans, for pictures of the worst cases ($SSL4MIS_DATA)")
    parser.add_argument("--out", help="folder for the reports (reports/ in the results folder)")
    parser.add_argument("--check", action="store_true", help="write nothing; name stale Markdown in reports/")
    options = vars(parser.parse_args(argv))
    from ssl4mis import records, report

    broken = records.Broken()
    try:
        paths = report.generate(**options, broken=None if options["check"] else broken)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options["check"]:
        print("".join(f"{path} differs from the records: run benchmarks/report.py\n" for path in paths), end="",
              file=sys.stderr)
        return 1 if paths else 0
    print("\n".join(map(str, paths)) or f"{options['results']}/records: no records that count yet")
    return 2 * bool(broken)


if __name__ == "__main__":
    sys.exit(main())
