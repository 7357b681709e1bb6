"""The main job: `python benchmarks/run.py --method ua_mt --dataset LA --labeled 16` trains, evaluates, records."""
import sys

from ssl4mis import config


def main(argv: list[str]) -> int:
    """Exit status: 0 done, 1 the loss was not finite or a record does not hold, 2 bad input, 130 resumable."""
    words = config.in_order(argv)
    named = {word.partition("=")[0] for word in words}
    if "--list" in named:
        print(config.catalog())
        return 0
    if "--describe" in named:
        from ssl4mis import cards

        return cards.show(argv)
    if "--reproduce" in named:
        from ssl4mis import reproduce

        return reproduce.main(argv)
    specs, options = config.parse(argv)
    from ssl4mis import run  # torch is loaded here, after bad input has been turned away

    jobs = [run.show_plan] if "--memory_plan" in named else [run.run, run.peek_test][: 1 + ("--peek_test" in named)]
    return run.exit_status(lambda: [job(spec, options) for spec in specs for job in jobs])


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before the run has begun, such as while torch is loaded
        sys.exit(130)
