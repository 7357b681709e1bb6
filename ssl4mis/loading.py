"""Volumes to batches: all resident in memory, no worker processes, a batch is a pure function of (seed, step).

Images stay on the device where they fit, and crops are cut there. Labels are read for labeled cases only.
"""
from functools import lru_cache

import numpy as np
import torch

from ssl4mis import augment
from ssl4mis.batch import Batch, Half
from ssl4mis.method import Needs

LABELED, UNLABELED, VIEW, NOISE = range(4)  # streams of randomness that never share a seed
NOTHING = Needs()


def stream(*key: int) -> np.random.Generator:
    """The random generator of a key of non-negative integers."""
    return np.random.default_rng(list(key))


@lru_cache(maxsize=64)
def permutation(count: int, *key: int) -> tuple[int, ...]:
    """The permutation of range(count) that belongs to a key."""
    return tuple(int(i) for i in stream(*key).permutation(count))


def chain(count: int, position: int, *key: int) -> int:
    """Entry `position` of an endless chain of permutations of range(count): every case once before any case twice."""
    return permutation(count, *key, position // count)[position % count]


class Loader:
    """Batches from a store of cases.

    Args:
        store: has image(case) -> float32 (C, *space) and label(case) -> uint8 (*space), arrays.
        labeled, unlabeled: case ids. With no unlabeled batch size, unlabeled images are not read either.
        patch: voxels per axis; batch: how many labeled and unlabeled samples.
        seed: of the run; augmentation: names in `augment.NAMES`.
        device: where batches are made; dtype: how images are kept (float32 or float16).
        needs: what the method asks for.
    """

    def __init__(self, store, labeled, unlabeled, patch, batch, seed, augmentation, device, dtype=torch.float32,
                 needs=NOTHING):
        self.cases = (tuple(labeled), tuple(unlabeled) if batch[1] else ())
        self.patch, self.sizes, self.seed, self.augmentation = tuple(patch), tuple(batch), seed, tuple(augmentation)
        self.device, self.dtype, self.needs = torch.device(device), dtype, needs
        everything = [torch.from_numpy(store.image(case)).to(dtype) for half in self.cases for case in half]
        self.home = self._home(sum(image.nbytes for image in everything))
        self.images = [image.to(self.home) for image in everything]
        self.labels = [torch.from_numpy(store.label(case)).to(self.home) for case in self.cases[0]]
        self.channels = self.images[0].shape[0]

    def _home(self, size: int) -> torch.device:
        """Where volumes live: on the device if they take less than half of what is free there."""
        if self.device.type == "cuda" and size < torch.cuda.mem_get_info(self.device)[0] // 2:
            return self.device
        return torch.device("cpu")

    def indices(self, stage: int, step: int) -> tuple[list[int], list[int]]:
        """Positions of the labeled and unlabeled cases of a step in `cases`."""
        return tuple([chain(len(cases), step * size + slot, self.seed, stage, kind) for slot in range(size)]
                     for kind, (cases, size) in enumerate(zip(self.cases, self.sizes, strict=True)))

    def names(self, stage: int, step: int) -> list[str]:
        """Case ids of a step's batch, labeled ones first."""
        return [cases[i] for cases, half in zip(self.cases, self.indices(stage, step), strict=True) for i in half]

    def batch(self, stage: int, step: int) -> Batch:
        """The batch of a step: image (B, C, *patch) float32, labels uint8."""
        labeled, unlabeled = self.indices(stage, step)
        count = len(labeled)
        image = torch.empty((count + len(unlabeled), self.channels, *self.patch), dtype=self.dtype, device=self.home)
        label = torch.empty((count, *self.patch), dtype=torch.uint8, device=self.home)
        for slot, index in enumerate(labeled + [len(self.cases[0]) + i for i in unlabeled]):
            volume = self.images[index]
            rng = stream(self.seed, stage, VIEW, step, slot)
            view = augment.draw(rng, tuple(volume.shape[1:]), self.patch, self.augmentation)
            augment.apply(volume, view, image[slot])
            if slot < count:
                augment.apply(self.labels[index], view, label[slot])
        image, label = image.to(self.device, torch.float32), label.to(self.device)
        names = self.names(stage, step)
        return Batch(image, Half(image[:count], label, tuple(names[:count])),
                     Half(image[count:], None, tuple(names[count:])))


def noise_seed(seed: int, stage: int, step: int) -> int:
    """Seed of torch's generators for one step, so that dropout and noise are functions of (seed, stage, step)."""
    return int(stream(seed, stage, NOISE, step).integers(2**62))
