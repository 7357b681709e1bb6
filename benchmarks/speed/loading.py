"""Time a training batch of LA (2 labeled and 2 unlabeled crops of 112x112x80) against the peers' loader, on one core.

The peers' way is written anew here: per sample, open the h5 file, decompress image and label, turn and flip the whole
volume, crop, and convert; unlabeled samples come with their labels, too. Both make the same random draws.
"""

import argparse
import dataclasses
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import common  # isort: skip  (before numpy)
import h5py
import numpy as np
import torch

from data_prep import DataError, dataset
from data_prep.la import FILE, LAStore
from data_prep.volumes import write_case
from ssl4mis import config, memory, run
from ssl4mis.leaderboard import markdown_table
from ssl4mis.loading import VIEW, Loader, stream
from ssl4mis.method import Task
from ssl4mis.trainer import Trainer

PEERS, READ, CACHED = "peers (rewritten)", "of it, reading the files", "peers' transforms of volumes in memory"
OURS, HALF = "ours", "ours, stored as float16"
BATCH = (2, 2)
QUICK = ("--patch", "[32,32,16]", "--width", "2", "--hp.passes", "2")


class Sample(NamedTuple):
    """What the peers' loader gives: image (1, *patch) float32, label (*patch) int64."""

    image: torch.Tensor
    label: torch.Tensor


def main(argv=None) -> int:
    """Exit status: 0 done, 1 a batch of ours differs from the peers', 2 an argument is bad."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of LA (default: that of SSL4MIS_DATA, else phantoms)")
    parser.add_argument("--cases", type=int, default=16, help="that batches are drawn from (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="batches of each way (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny phantoms, one round: does it run?")
    options = parser.parse_args(argv)
    if options.cases < 4 or options.rounds < 1:
        parser.error(f"--cases {options.cases} --rounds {options.rounds}, expected at least 4 and 1")
    [spec], _ = config.parse(["--method", "ua_mt", "--dataset", "LA", *(QUICK if options.quick else ())], parser.prog)
    spec = dataclasses.replace(spec, precision=run.pick_precision("auto", torch.device("cpu")))
    memory.keep_pages()  # as every training run does
    with tempfile.TemporaryDirectory() as folder:
        try:
            title, store, ids = published(options, Path(folder))
        except DataError as error:
            print(error, file=sys.stderr)
            return 2
        return compare(title, store, ids, spec, 1 if options.quick else options.rounds, Path(folder))


def published(options: argparse.Namespace, scratch: Path) -> tuple[str, LAStore, list[str]]:
    """What the scans are, a store of files as the field publishes them, and the training cases taken from it.

    Prepared cases and phantoms are written as published (gzip) into the folder `scratch`. Raises DataError.
    """
    store, ids = common.la(options.data, "train", options.cases)
    if isinstance(store, LAStore) and not options.quick:
        return f"LA, full resolution, {len(ids)} training cases as published", store, ids
    if store and not options.quick:
        title, made = "LA, full resolution, training cases", ((store.image(case), store.label(case)) for case in ids)
    else:
        title, drawn = common.cases(options.data, len(ids), common.TINY if options.quick else common.SHAPE)
        made = ((case.image, case.label) for case in drawn)
    for case, (image, label) in zip(ids, made, strict=True):
        write_case(scratch / case / FILE, image, label)
    return f"{title}, written as published ones are", LAStore(scratch), ids


def compare(title: str, store: LAStore, ids: list[str], spec: config.RunSpec, rounds: int, folder: Path) -> int:
    """Time all ways, print tables and the closing line; returns the exit status."""
    labeled, unlabeled = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    start = time.process_time()
    ours, half = (Loader(store, labeled, unlabeled, spec.patch, BATCH, spec.seed, spec.augmentation, "cpu", kind)
                  for kind in (torch.float32, torch.float16))
    ready = (time.process_time() - start) / 2 / len(ids)
    peers = Peers(store, ours)
    cached = Peers(store, ours, {case: peers.read(case) for case in ids}.__getitem__)
    calls = {PEERS: peers.batch, READ: lambda step: [peers.read(case) for case in ours.names(0, step)],
             CACHED: cached.batch, OURS: lambda step: ours.batch(0, step), HALF: lambda step: half.batch(0, step)}
    for step in range(2):  # what the first calls set up is no part of a batch
        ours.batch(0, step), half.batch(0, step)
    seconds, _ = common.interleave({name: counted(call) for name, call in calls.items()}, rounds)
    off = {name: max(difference(peers.batch(step), calls[name](step)) for step in range(rounds))
           for name in (CACHED, OURS, HALF)}
    exact = off[OURS] == off[CACHED] == 0

    per_batch = {name: float(np.median(values)) for name, values in seconds.items()}
    ratio = {name: per_batch[PEERS] / value for name, value in per_batch.items()}
    shape = "x".join(map(str, spec.patch))
    print(f"{title}; crops of {shape}. Milliseconds of CPU time per sample, median [range], in batches of four.")
    print(common.machine(), end="\n\n")
    print(markdown_table(
        ["way", "ms per sample", "times faster", "largest difference"],
        [[name, common.milliseconds(s / sum(BATCH) for s in values), "" if name == READ else f"{ratio[name]:.3g}",
          f"{off[name]:.0e}" if name in off else ""] for name, values in seconds.items()]))
    print(f"Ours reads all volumes once, before training: {1000 * ready:.0f} ms of CPU time per case.")

    step = training_step(ours, spec, folder)
    share = per_batch[OURS] / step
    print(f"The first step of UA-MT at {shape}, batch 2+2, {spec.precision}, takes {step:.3g} s of CPU time, of which "
          f"loading is {1000 * per_batch[OURS]:.3g} ms, {100 * share:.2g} %; with the peers' loader "
          f"{1000 * per_batch[PEERS]:.3g} ms.")
    common.close("loading", ratio[OURS], exact, {"ratio": 15}, limits={"share_of_step": 0.02}, share_of_step=share,
                 ms_per_sample=1000 * per_batch[OURS] / sum(BATCH),
                 peers_ms_per_sample=1000 * per_batch[PEERS] / sum(BATCH), half_ratio=ratio[HALF], data=title)
    return 0 if exact else 1


class Peers:
    """The loader of the field's code, with this suite's random draws.

    Source: UA-MT dataloaders/la_heart.py, LAHeart, RandomRotFlip, RandomCrop and ToTensor, and torch's default collate.
    `read` gives image and label of a case, (x, y, z) as stored; by default from its file.
    """

    def __init__(self, store: LAStore, loader: Loader, read=None):
        self.store, self.loader, self.read = store, loader, read or self.read

    def read(self, case: str) -> tuple[np.ndarray, np.ndarray]:
        with h5py.File(self.store.path(case), "r") as file:
            return file["image"][:], file["label"][:]

    def sample(self, case: str, rng: np.random.Generator) -> Sample:
        """A case read, turned as a whole, then cut, with the draws of ours in their order."""
        image, label = self.read(case)
        turns, axis = int(rng.integers(4)), int(rng.integers(2))
        image, label = (np.flip(np.rot90(array, turns), axis).copy() for array in (image, label))
        patch = np.array(self.loader.patch)
        if (label.shape <= patch).any():
            margin = [(side, side) for side in np.maximum((patch - label.shape) // 2 + 3, 0)]
            image, label = np.pad(image, margin), np.pad(label, margin)
        starts = [int(rng.integers(max(span, 1))) for span in label.shape - patch]
        box = [slice(start, start + side) for start, side in zip(starts, patch, strict=True)]
        image, label = image[tuple(box)], label[tuple(box)]
        image = image.reshape(1, *image.shape).astype(np.float32)
        return Sample(torch.from_numpy(image), torch.from_numpy(label.astype(np.int64)))

    def batch(self, step: int) -> Sample:
        samples = [self.sample(case, stream(self.loader.seed, 0, VIEW, step, slot))
                   for slot, case in enumerate(self.loader.names(0, step))]
        return Sample(*map(torch.stack, zip(*samples, strict=True)))


def counted(call):
    """A function of no arguments that calls with 0, 1, 2 and so on."""
    numbers = itertools.count()
    return lambda: call(next(numbers))


def difference(theirs: Sample, ours) -> float:
    """Largest difference of the images; infinite where a label differs, or the half without labels has one."""
    if isinstance(ours, Sample):
        labels_equal = torch.equal(theirs.label, ours.label)
    else:
        labels_equal = ours.unlabeled.label is None and torch.equal(theirs.label[: BATCH[0]], ours.labeled.label.long())
    return (theirs.image - ours.image).abs().max().item() if labels_equal else float("inf")


def training_step(loader: Loader, spec: config.RunSpec, folder: Path) -> float:
    """Seconds of CPU time of one UA-MT step, its batch included, by the trainer of real runs."""
    torch.manual_seed(spec.seed)
    method = run.build_method(spec, Task(2, 3, 1, BATCH), dataset(spec.dataset).spacing)
    step = common.steps(Trainer(method, loader, spec, folder))
    start = time.process_time()
    step()
    return time.process_time() - start


if __name__ == "__main__":
    sys.exit(main())
