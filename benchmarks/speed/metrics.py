"""Time the scores of a case (Dice, Jaccard, hd95, asd) against the peers' four calls of medpy, on one core.

The peers' way is written anew here: every call turns the whole masks to bool, erodes them and takes a distance
transform of the whole volume. Ours gives six distances more (mm, assd and the other hd95) in the same time.
"""

import argparse
import sys
import time
import warnings
from unittest import mock

import common  # isort: skip  (before numpy)
import numpy as np
from scipy.ndimage import (
    binary_dilation,
    binary_erosion,
    distance_transform_edt,
    gaussian_filter,
    generate_binary_structure,
)

from data_prep import DataError
from ssl4mis import metrics
from ssl4mis.leaderboard import markdown_table

NAMES = ("dice", "jaccard", "hd95", "asd")
PEERS, MEDPY, MONAI = "peers (medpy's four calls, rewritten)", "medpy", "MONAI"
COMPILED, FALLBACK = "ours (numba)", "ours (SciPy, without numba)"
LIMIT = 1e-9


def main(argv=None) -> int:
    """Exit status: 0 done, 1 a result of ours differs from the peers', 2 an argument is bad."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of LA (default: that of SSL4MIS_DATA, else phantoms)")
    parser.add_argument("--cases", type=int, default=3, help="with five predictions each (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="calls of each way per prediction (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one tiny phantom, one round: does it run?")
    options = parser.parse_args(argv)
    if options.quick:
        options.cases = options.rounds = 1
    if min(options.cases, options.rounds) < 1:
        parser.error(f"--cases {options.cases} --rounds {options.rounds}, expected at least 1 of each")
    try:
        title, cases = common.cases(options.data, options.cases, common.TINY if options.quick else None)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    ready = first_call()

    kinds: dict[str, list] = {}
    for case in cases:
        for kind, pred in predictions(case.label > 0).items():
            kinds.setdefault(kind, []).append(
                common.interleave(ways(pred, case.label), options.rounds, once=(MEDPY, MONAI)))
    runs = [run for some in kinds.values() for run in some]
    names = list(runs[0][0])
    off = {name: np.max([np.abs(given[name] - given[PEERS]) for _, given in runs], axis=0) for name in names}
    exact = all(off[name].max() <= LIMIT for name in (COMPILED, FALLBACK))

    print(f"{title}; five predictions made from each label. Milliseconds of CPU time per case, median [range].")
    print(common.machine(), end="\n\n")
    print(markdown_table(
        ["way", "ms", "times faster", "[range]", *(f"largest difference: {name}" for name in NAMES)],
        [[name, common.milliseconds(s for seconds, _ in runs for s in seconds[name]), *common.faster(PEERS, runs, name),
          *(f"{value:.0e}" for value in off[name])] for name in names]))
    print(markdown_table(
        ["prediction", PEERS, COMPILED, "times faster"],
        [[kind, *(common.milliseconds(s for seconds, _ in some for s in seconds[name]) for name in (PEERS, COMPILED)),
          common.faster(PEERS, some, COMPILED)[0]] for kind, some in kinds.items()]))
    print(f"numba's first call in this process took {ready:.1f} s (about 7 s where its cache is empty).")
    print("MONAI takes the larger of two directed percentiles for hd95, the others that of the pooled list.")
    common.close(
        "metrics", common.ratio(PEERS, runs, COMPILED), exact, {"ratio": 60, "fallback_ratio": 4},
        fallback_ratio=common.ratio(PEERS, runs, FALLBACK),
        lowest_ratio=min(common.ratio(PEERS, [run], COMPILED) for run in runs),
        largest_difference=float(max(off[COMPILED].max(), off[FALLBACK].max())), data=title)
    return 0 if exact else 1


def first_call() -> float:
    """Seconds until the compiled way is ready."""
    start = time.perf_counter()
    tiny = np.eye(3, dtype=np.uint8)
    metrics.score(tiny, tiny, (1, 2))
    return time.perf_counter() - start


def predictions(truth: np.ndarray) -> dict[str, np.ndarray]:
    """Masks as networks make them, uint8, from a true one."""
    rng = np.random.default_rng(0)
    middle = [int(place.mean()) for place in np.nonzero(truth)]
    small, large = binary_erosion(truth, iterations=2), binary_dilation(truth, iterations=2)
    hole, stray = (tuple(slice(m - 7, m + 7) for m in place) for place in (middle, (14, 14, 14)))
    noise = gaussian_filter(rng.standard_normal(truth.shape), 1.5)
    made = {
        "eroded and shifted": np.roll(small, (1, -2, 1), (0, 1, 2)),
        "dilated with a far blob": large.copy(),
        "noisy boundary": np.where(large & ~small, noise > 0, truth),
        "shifted with a hole": np.roll(truth, (3, 2, -1), (0, 1, 2)),
        "half missing": truth & (np.arange(len(truth)) >= middle[0])[:, None, None],
    }
    made["dilated with a far blob"][stray] = True
    made["shifted with a hole"][hole] = False
    return {kind: mask.astype(np.uint8) for kind, mask in made.items()}


def ways(pred: np.ndarray, truth: np.ndarray) -> dict:
    """By name, what gives the four scores of a pair of masks; the peers predict int64, as argmax does."""
    wide = pred.astype(np.int64)
    return {PEERS: lambda: peers(wide, truth), **medpy(wide, truth), **monai(pred, truth),
            FALLBACK: lambda: by_scipy(pred, truth), COMPILED: lambda: ours(pred, truth)}


def ours(pred: np.ndarray, truth: np.ndarray) -> np.ndarray:
    row = metrics.score(pred, truth, (0.625, 0.625, 0.625))
    return np.array([row[name if name in row else f"{name}_voxel"] for name in NAMES])


def by_scipy(pred: np.ndarray, truth: np.ndarray) -> np.ndarray:
    with mock.patch.object(metrics, "_compiled", return_value=None):
        return ours(pred, truth)


def peers(pred: np.ndarray, truth: np.ndarray) -> np.ndarray:
    pooled = np.hstack([peers_distances(pred, truth), peers_distances(truth, pred)])
    hd95 = np.percentile(pooled, 95)
    return np.array([*peers_overlap(pred, truth), hd95, peers_distances(pred, truth).mean()])


def peers_overlap(pred: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    a, b = pred.astype(bool), truth.astype(bool)
    dice = 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))
    a, b = pred.astype(bool), truth.astype(bool)
    return dice, np.count_nonzero(a & b) / np.count_nonzero(a | b)


def peers_distances(start: np.ndarray, goal: np.ndarray) -> np.ndarray:
    start, goal = start.astype(bool), goal.astype(bool)
    cross = generate_binary_structure(start.ndim, 1)
    start, goal = (mask ^ binary_erosion(mask, cross) for mask in (start, goal))
    return distance_transform_edt(~goal)[start]


def medpy(pred: np.ndarray, truth: np.ndarray) -> dict:
    try:
        from medpy.metric import binary
    except ImportError:
        return {}
    return {MEDPY: lambda: np.array([call(pred, truth) for call in (binary.dc, binary.jc, binary.hd95, binary.asd)])}


def monai(pred: np.ndarray, truth: np.ndarray) -> dict:
    """MONAI's four scores as a way to be timed; nothing where MONAI is not installed."""
    try:
        import torch
        from monai import metrics as tool
    except ImportError:
        return {}
    warnings.filterwarnings("ignore", module="monai")
    pair = [torch.from_numpy(mask)[None, None] for mask in (pred, truth)]

    def scores():
        return np.array([tool.compute_dice(*pair).item(), tool.compute_iou(*pair).item(),
                         tool.compute_hausdorff_distance(*pair, include_background=True, percentile=95).item(),
                         tool.compute_average_surface_distance(*pair, include_background=True).item()])

    return {MONAI: scores}


if __name__ == "__main__":
    sys.exit(main())
