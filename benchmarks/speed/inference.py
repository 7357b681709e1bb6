"""Time the segmentation of LA scans window by window against the peers' loop, on one core.

The peers' loop is written anew here: each window goes through the network in float32 as it was trained, probabilities
are summed by numpy. The network is a V-Net trained for some steps on the scans themselves, so that its label maps are
not a matter of rounding. Scans are cut to a few windows, which are the unit of cost.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import common  # isort: skip  (before numpy and torch)
import numpy as np
import torch

import networks
from data_prep import DataError
from networks.base import NetSpec, channels_last
from ssl4mis import memory, metrics
from ssl4mis.evaluator import predictor, segment
from ssl4mis.inference import window_starts
from ssl4mis.leaderboard import markdown_table
from ssl4mis.losses import segmentation
from ssl4mis.method import Method, Task

PATCH, STRIDE, WIDTH = (112, 112, 80), (18, 18, 4), 16
CROP, STEPS, RATE = (64, 64, 48), 40, 0.05  # of the training
PEERS, OURS, HALF = "peers (float32, window by window)", "ours (32-true)", "ours (bf16-mixed)"


class Net(Method):
    """A V-Net of LA."""

    def __init__(self, width: int):
        super().__init__(None, Task(2), None)
        self.net = networks.Build("vnet", 2, NetSpec(1, PATCH, width))()

    def predict(self, image):
        """Class probabilities."""
        return self.net(image).logits.softmax(1)


def main(argv=None) -> int:
    """Exit status: 0 done, 1 a label map of ours in float32 differs from the peers', 2 an argument is bad."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of LA (default: that of SSL4MIS_DATA, else phantoms)")
    parser.add_argument("--cases", type=int, default=2, help="scans (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="calls of each way per scan (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a small network, scan and window, one round: a trial")
    options = parser.parse_args(argv)
    if min(options.cases, options.rounds) < 1:
        parser.error(f"--cases {options.cases} --rounds {options.rounds}, expected at least 1 of each")
    patch, width, shape = PATCH, WIDTH, None
    if options.quick:
        patch, width, shape, options.rounds, options.cases = (32, 32, 32), 4, (56, 52, 40), 1, 1
    try:
        title, cases = common.cases(options.data, options.cases, shape)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    scans = [cut(case, [side + step for side, step in zip(patch, STRIDE, strict=True)]) for case in cases]
    windows = len(window_starts(scans[0][0].shape[1:], patch, STRIDE))
    torch.manual_seed(0)
    method = train(Net(width), cases, STEPS, [min(pair) for pair in zip(patch, CROP, strict=True)])
    settle(method, [image[(slice(None), *map(slice, patch))] for image, _ in scans])

    runs = []
    with tempfile.TemporaryDirectory() as folder:
        torch.save(method.state_dict(), Path(folder) / "weights.pt")
        for image, label in scans:
            np.save(Path(folder) / "image.npy", image)
            with (common.Apart(peers, folder, width, patch) as theirs,
                  common.Apart(ours, folder, width, patch, "32-true") as exact,
                  common.Apart(ours, folder, width, patch, "bf16-mixed") as half):
                seconds, given = common.interleave({PEERS: theirs, OURS: exact, HALF: half}, options.rounds)
            runs.append((seconds, given, {name: metrics.dice(found, label > 0) for name, found in given.items()}))

    names = list(runs[0][0])
    flips = {name: sum(int((given[name] != given[PEERS]).sum()) for _, given, _ in runs) for name in names}
    change = {name: float(np.mean([dice[name] - dice[PEERS] for *_, dice in runs])) for name in names}
    exact = flips[OURS] == 0 and all(given[PEERS].any() for _, given, _ in runs)  # empty maps would prove nothing
    work = flops(method, patch) / 1e9
    print(f"{title}, of each a part of {windows} windows of {'x'.join(map(str, patch))} voxels; V-Net of width "
          f"{width}, {work:.1f} GFLOP a window. Milliseconds of CPU time per window, median [range].")
    print(common.machine(), end="\n\n")
    print(markdown_table(
        ["way", "ms a window", "GFLOP/s", "times faster", "voxels of another class", "change of Dice"],
        [[name, common.milliseconds(s / windows for seconds, *_ in runs for s in seconds[name]),
          f"{work * windows * len(runs) / sum(np.median(seconds[name]) for seconds, *_ in runs):.0f}",
          f"{common.ratio(PEERS, runs, name):.3g}", str(flips[name]), f"{change[name]:+.5f}"] for name in names]))
    print(f"Mean Dice of the peers' way {100 * np.mean([dice[PEERS] for *_, dice in runs]):.1f} %.")
    common.close("inference", common.ratio(PEERS, runs, OURS), exact, {"ratio": 1.6, "bf16_ratio": 6},
                 {"bf16_dice_change": 0.0005}, bf16_ratio=common.ratio(PEERS, runs, HALF),
                 bf16_dice_change=abs(change[HALF]), data=title)
    return 0 if exact else 1


def cut(case: common.Case, shape) -> tuple[np.ndarray, np.ndarray]:
    """The part of a scan of at most this shape around the middle of its label, and its label."""
    box = []
    for length, side, places in zip(case.label.shape, shape, np.nonzero(case.label), strict=True):
        start = int(np.clip(round(places.mean()) - side // 2, 0, max(length - side, 0)))
        box.append(slice(start, start + side))
    return np.ascontiguousarray(case.image[(slice(None), *box)]), case.label[tuple(box)]


def train(method: Net, cases: list, steps: int, crop) -> Net:
    """The method after some steps on crops around random voxels of the labels."""
    rng = np.random.default_rng(0)
    net = method.net.train().to(memory_format=channels_last(3))
    optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=0.9)
    for _ in range(steps):
        images, labels = [], []
        for case in (cases[rng.integers(len(cases))] for _ in range(2)):
            inside = np.argwhere(case.label)
            low = [int(np.clip(at - rng.integers(side), 0, length - side)) for at, side, length in
                   zip(inside[rng.integers(len(inside))], crop, case.label.shape, strict=True)]
            box = tuple(slice(a, a + side) for a, side in zip(low, crop, strict=True))
            images.append(torch.from_numpy(case.image[(slice(None), *box)].copy()))
            labels.append(torch.from_numpy(case.label[box].copy()))
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(torch.stack(images)).logits
        optimizer.zero_grad()
        segmentation(logits, torch.stack(labels)).backward()
        optimizer.step()
    return method.eval()


def settle(method: Net, windows: list[np.ndarray]) -> None:
    """Let the statistics of batch norm be those of windows, which hold more background than the crops did."""
    method.train()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for n in range(10):
            method.net(torch.from_numpy(windows[n % len(windows)])[None])
    method.eval()


def read(folder: str, width: int) -> tuple[Net, np.ndarray]:
    """The trained method and the image of one scan."""
    method = Net(width)
    method.load_state_dict(torch.load(Path(folder) / "weights.pt", weights_only=True))
    return method.eval(), np.load(Path(folder) / "image.npy")


def ours(folder: str, width: int, patch, precision: str):
    """As the evaluation of a run segments a case."""
    memory.keep_pages()
    method, image = read(folder, width)
    predict = predictor(method, "cpu", precision)
    segment(predict, image[(slice(None), *map(slice, patch))], patch, STRIDE, "cpu")  # the first call is slower
    return lambda: segment(predict, image, patch, STRIDE, "cpu").numpy()


def peers(folder: str, width: int, patch):
    """As the published test loops segment a case, without the graph that UA-MT's builds."""
    method, image = read(folder, width)
    net = method.net
    with torch.no_grad():
        net(torch.zeros(1, 1, *patch))  # the first call is slower

    def way() -> np.ndarray:
        total = np.zeros((2, *image.shape[1:]), np.float32)
        count = np.zeros(image.shape[1:], np.float32)
        for start in window_starts(image.shape[1:], patch, STRIDE):
            box = tuple(slice(s, s + p) for s, p in zip(start, patch, strict=True))
            window = image[(slice(None), *box)][None].astype(np.float32)
            with torch.no_grad():
                probability = torch.softmax(net(torch.from_numpy(window)).logits, dim=1).numpy()[0]
            total[(slice(None), *box)] += probability
            count[box] += 1
        return np.argmax(total / count[None], axis=0).astype(np.uint8)

    return way


def flops(method: Net, patch) -> int:
    """Floating-point operations of the convolutions of one window."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        method.net(torch.zeros(1, 1, *patch))
    return counter.get_total_flops()


if __name__ == "__main__":
    sys.exit(main())
