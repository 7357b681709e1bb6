"""Volumes to batches: no worker processes, a batch is a pure function of (seed, step).

Images stay on the device where they fit, and crops are cut there; mapped files stay on the disk where they do not, and
a crop reads its own part of them. Labels are read for labeled cases only.
"""
import warnings
from functools import lru_cache

import numpy as np
import torch

from ssl4mis import augment
from ssl4mis.batch import Batch, Half
from ssl4mis.errors import UserError
from ssl4mis.method import Needs

# Streams of randomness that never share a seed; new ones go to the end, or recorded runs would be other runs.
LABELED, UNLABELED, VIEW, NOISE, STRONG, PARTNER, PARTNER_VIEW, PARTNER_STRONG = range(8)
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


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """The array as a tensor on its own memory, be it read-only or mapped from a file; it must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


class Loader:
    """Batches from a store of cases.

    Args:
        store: has image(case) -> float32 (C, *space) and label(case) -> uint8 (*space), arrays.
        labeled, unlabeled: case ids. With no unlabeled batch size, unlabeled images are not read either.
        patch: voxels per axis; batch: how many labeled and unlabeled samples.
        seed: of the run; augmentation: names in `augment.NAMES`.
        device: where batches are made; dtype: how images are kept (float32 or float16).
        needs: what the method asks for.
        slices: whether samples are the planes across the last axis of the volumes, each resized to the patch. A plane
            is then a case, "volume/number".
    """

    def __init__(self, store, labeled, unlabeled, patch, batch, seed, augmentation, device, dtype=torch.float32,
                 needs=NOTHING, slices=False):
        self.patch, self.sizes, self.seed, self.augmentation = tuple(patch), tuple(batch), seed, tuple(augmentation)
        self.device, self.dtype, self.needs, self.slices = torch.device(device), dtype, needs, slices
        if "rotflip_or_rotate" in self.augmentation and not slices:
            raise UserError("augmentation rotflip_or_rotate: turns whole slices, expected rotflip, dihedral or none for"
                            " crops")
        halves = [self._samples(cases, lambda case: as_tensor(store.image(case)).to(dtype))
                  for cases in (labeled, unlabeled if batch[1] else ())]
        self.cases = tuple(map(tuple, halves))
        everything = [image for half in halves for image in half.values()]
        self.home = self._home(sum(image.nbytes for image in everything))
        self.images = [image.to(self.home) for image in everything]
        labels = self._samples(labeled, lambda case: as_tensor(store.label(case)))
        self.labels = [label.to(self.home) for label in labels.values()]
        self.channels = self.images[0].shape[0]

    def _samples(self, cases, read) -> dict[str, torch.Tensor]:
        """The volumes or their planes by id; planes are views of their volume."""
        volumes = {case: read(case) for case in cases}
        if not self.slices:
            return volumes
        return {f"{case}/{n}": plane for case, volume in volumes.items() for n, plane in enumerate(volume.unbind(-1))}

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
        count, first = len(labeled), len(self.cases[0])
        indices = labeled + [first + index for index in unlabeled]
        views = self._views(indices, stage, VIEW, step)
        image, names = self._crops(indices, views), self.names(stage, step)
        label = torch.empty((count, *self.patch), dtype=torch.uint8, device=self.home)
        for slot, index in enumerate(labeled):
            self._apply(self.labels[index], views[slot], label[slot])
        return Batch(image, Half(image[:count], label.to(self.device), tuple(names[:count])),
                     self._unlabeled(image[count:], indices[count:], views[count:], stage, STRONG, step),
                     self._partner(stage, step) if self.needs.partner and unlabeled else None)

    def _partner(self, stage: int, step: int) -> Half:
        """Another draw of unlabeled samples, from a chain of its own."""
        cases, size = self.cases[1], self.sizes[1]
        indices = [len(self.cases[0]) + chain(len(cases), step * size + slot, self.seed, stage, PARTNER)
                   for slot in range(size)]
        views = self._views(indices, stage, PARTNER_VIEW, step)
        return self._unlabeled(self._crops(indices, views), indices, views, stage, PARTNER_STRONG, step)

    def _views(self, indices, stage: int, kind: int, step: int) -> list:
        return [self._draw(stream(self.seed, stage, kind, step, slot), tuple(self.images[index].shape[1:]))
                for slot, index in enumerate(indices)]

    def _draw(self, rng: np.random.Generator, size: tuple[int, ...]) -> augment.View | augment.Plane:
        if self.slices:
            return augment.draw_plane(rng, self.augmentation)
        return augment.draw(rng, size, self.patch, self.augmentation)

    def _apply(self, image: torch.Tensor, view: augment.View | augment.Plane, out: torch.Tensor) -> None:
        (augment.apply_plane if self.slices else augment.apply)(image, view, out)

    def _crops(self, indices, views) -> torch.Tensor:
        """(B, C, *patch) float32 on the device."""
        image = torch.empty((len(indices), self.channels, *self.patch), dtype=self.dtype, device=self.home)
        for slot, (index, view) in enumerate(zip(indices, views, strict=True)):
            self._apply(self.images[index], view, image[slot])
        return image.to(self.device, torch.float32)

    def _unlabeled(self, image, indices, views, stage: int, kind: int, step: int) -> Half:
        """A half without labels, with strong views and what is inside the volumes where the method needs them."""
        names = tuple(self.cases[1][index - len(self.cases[0])] for index in indices)
        if not self.needs.strong:
            return Half(image, None, names)
        strong = torch.empty((self.needs.strong, *image.shape), device=self.device)
        valid = torch.empty((len(indices), *self.patch), dtype=torch.bool, device=self.device)
        inside = torch.ones((), dtype=torch.bool, device=self.device)
        for slot, (index, view) in enumerate(zip(indices, views, strict=True)):
            rng = stream(self.seed, stage, kind, step, slot)
            for one in strong:
                one[slot] = augment.apply_strong(image[slot], augment.draw_strong(rng))
            self._apply(inside.expand(self.images[index].shape[1:]), view, valid[slot])
        return Half(image, None, names, tuple(strong), valid)


def noise_seed(seed: int, stage: int, step: int) -> int:
    """Seed of torch's generators for one step, so that dropout and noise are functions of (seed, stage, step)."""
    return int(stream(seed, stage, NOISE, step).integers(2**62))
