"""Export a trained model: `python benchmarks/export.py --run ID` writes safetensors and a JSON card."""
import sys
from pathlib import Path

from data_prep import DataError
from ssl4mis import config
from ssl4mis.errors import UserError


def main(argv: list[str]) -> int:
    """Exit status: 0 done, 2 bad input."""
    parser = config.Parser(prog="export.py", allow_abbrev=False, description=__doc__)
    parser.add_argument("--run", required=True, help="id of a run, the beginning of one, or its folder")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where runs and records are")
    parser.add_argument("--output", type=Path, help="ID is written into this folder; default RESULTS/exported")
    options = parser.parse_args(config.in_order(argv))
    from ssl4mis import export  # which loads torch

    try:
        folder = export.export(options.run, options.results, options.output or options.results / "exported")
    except (UserError, DataError) as error:
        print(f"export.py: error: {error}", file=sys.stderr)
        return 2
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
