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
    words = config.in_order(argv)
    again = any(word.partition("=")[0] == "--reproduce" for word in words)
    specs, options = ([], None) if again else config.parse(argv)
    from ssl4mis.run import peek_test, run, show_plan  # torch is loaded here, after bad input has been turned away
    from ssl4mis.trainer import TrainingStopped

    try:
        if again:
            from ssl4mis import reproduce

            return reproduce.main(argv)
        for spec in specs:
            if "--memory_plan" in words:
                show_plan(spec, options)
                continue
            run(spec, options)
            if "--peek_test" in words:
                peek_test(spec, options)
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
