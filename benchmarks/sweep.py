"""A suite of runs: `python benchmarks/sweep.py lite` makes those that are not done; `--dry-run` only lists them."""
import sys

from ssl4mis.sweep import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
