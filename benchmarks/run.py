"""The main job: `python benchmarks/run.py --method ua_mt --dataset LA --labeled 16` trains, evaluates, records."""
import sys

import data_prep
from ssl4mis import config
from ssl4mis.errors import UserError


def main(argv: list[str]) -> int:
    """Exit status: 0 done, 1 the loss was not finite, 2 bad input, 130 stopped and resumable."""
    if "--list" in argv:
        print(config.catalog())
        return 0
    if any(word.partition("=")[0] == "--describe" for word in argv):
        from ssl4mis import cards

        return cards.show(argv)
    specs, options = config.parse(argv)
    from ssl4mis.run import run, show_plan  # torch is loaded here, after bad input has been turned away
    from ssl4mis.trainer import TrainingStopped

    try:
        for spec in specs:
            (show_plan if "--memory_plan" in config.in_order(argv) else run)(spec, options)
    except (UserError, data_prep.DataError) as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2
    except TrainingStopped as stop:
        print(stop, file=sys.stderr)
        return 130 if stop.resumable else 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
