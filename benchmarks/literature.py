"""Regenerate docs/literature.md, the field's reading list, from results/literature.csv; or print part of it."""

import argparse
import sys
from pathlib import Path

from ssl4mis import literature
from ssl4mis.errors import UserError


def main(argv=None) -> int:
    """Exit status: 0 done or up to date, 1 the file would change (--check), 2 the table or an argument is bad."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--table", type=Path, default=Path("results/literature.csv"), help="the list (%(default)s)")
    add("--out", type=Path, default=Path("docs/literature.md"), help="the file to write (%(default)s)")
    add("--check", action="store_true", help="write nothing; say whether the file would change")
    add("--year", metavar="Y", help="print papers of a year, or of years such as 2020-2022")
    add("--task", action="append", default=[], metavar="WORD", help="print papers of tasks such as medical")
    add("--code", action="store_true", help="print papers with public code")
    add("--implemented", action="store_true", help="print papers that the suite implements")
    options = parser.parse_args(argv)
    try:
        if options.year or options.task or options.code or options.implemented:
            found = literature.select(literature.read(options.table), options.year, options.task, options.code,
                                      options.implemented)
            print(literature.lines(found), end="")
            return 0
        return literature.regenerate(options.table, options.out, options.check)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
