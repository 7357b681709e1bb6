"""Batches: a pure function of seed, stage and step; what is read and what is not; image and label aligned."""

import numpy as np
import pytest
import torch

from ssl4mis import augment
from ssl4mis.loading import VIEW, Loader, chain, noise_seed, stream

SIZES = {"a": (20, 24, 18), "b": (18, 17, 20), "c": (12, 30, 16), "d": (19, 19, 19), "e": (9, 9, 9), "f": (17, 17, 33)}
LABELED, UNLABELED = ("a", "b", "c"), ("d", "e", "f")
PATCH = (16, 16, 16)


class Store:
    """Every voxel of a case has its own value from 1 up, and the label is that value modulo 251."""

    def __init__(self, sizes=SIZES, scale=1.0):
        self.sizes, self.scale, self.images, self.labels = sizes, scale, [], []

    def values(self, case):
        return np.arange(1, np.prod(self.sizes[case]) + 1).reshape(self.sizes[case])

    def image(self, case):
        self.images.append(case)
        return (self.values(case) * self.scale).astype(np.float32)[None]

    def label(self, case):
        self.labels.append(case)
        return (self.values(case) % 251).astype(np.uint8)


def make(store=None, batch=(2, 2), seed=0, patch=PATCH, augmentation=("rotflip",), dtype=torch.float32):
    return Loader(store or Store(), LABELED, UNLABELED, patch, batch, seed, augmentation, "cpu", dtype)


def same(one, two) -> bool:
    return (torch.equal(one.image, two.image) and torch.equal(one.labeled.label, two.labeled.label)
            and one.labeled.cases == two.labeled.cases and one.unlabeled.cases == two.unlabeled.cases)


def test_a_batch_is_a_function_of_stage_and_step():
    loader, keys = make(), [(stage, step) for stage in (0, 1) for step in range(6)]
    first = {key: loader.batch(*key) for key in keys}
    fresh = make()
    for key in np.random.default_rng(0).permutation(keys):
        key = tuple(int(n) for n in key)
        assert same(fresh.batch(*key), first[key])
    assert not any(same(first[a], first[b]) for a in keys for b in keys if a < b)
    assert not any(same(make(seed=1).batch(*key), first[key]) for key in keys)


def test_the_parts_of_a_batch():
    batch = make(batch=(2, 3)).batch(0, 4)
    assert batch.image.shape == (5, 1, *PATCH) and batch.image.dtype == torch.float32
    assert batch.labeled.label.shape == (2, *PATCH) and batch.labeled.label.dtype == torch.uint8
    assert batch.unlabeled.label is None
    assert torch.equal(batch.image, torch.cat([batch.labeled.image, batch.unlabeled.image]))
    assert set(batch.labeled.cases) <= set(LABELED) and set(batch.unlabeled.cases) <= set(UNLABELED)
    assert make(batch=(2, 3)).names(0, 4) == [*batch.labeled.cases, *batch.unlabeled.cases]


def test_labeled_samples_do_not_depend_on_the_unlabeled_ones():
    for step in range(4):
        alone, both = make(batch=(2, 0)).batch(0, step), make(batch=(2, 2)).batch(0, step)
        assert torch.equal(alone.image, both.labeled.image)
        assert torch.equal(alone.labeled.label, both.labeled.label)


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_every_case_once_before_any_twice(count):
    drawn = [chain(count, position, 3, 0) for position in range(4 * count)]
    for start in range(0, 4 * count, count):
        assert sorted(drawn[start:start + count]) == list(range(count))


def test_chains_differ_by_key_and_by_round():
    def orders(*key):
        return [[chain(16, position, *key) for position in range(start, start + 16)] for start in (0, 16)]

    found = [order for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)) for order in orders(*key)]
    assert all(found[i] != found[j] for i in range(len(found)) for j in range(i))


@pytest.mark.parametrize("batch", [(1, 1), (2, 2), (3, 2)])
def test_steps_walk_the_chain_without_gaps(batch):
    loader = make(batch=batch)
    for kind in range(len(batch)):
        drawn = [index for step in range(6) for index in loader.indices(0, step)[kind]]
        for start in range(0, len(drawn) - 2, 3):
            assert sorted(drawn[start:start + 3]) == [0, 1, 2]


def test_only_labels_of_labeled_cases_are_read():
    store = Store()
    loader = make(store)
    for step in range(10):
        loader.batch(0, step)
    assert sorted(store.labels) == sorted(LABELED)
    assert sorted(store.images) == sorted(LABELED + UNLABELED)


def test_unlabeled_images_are_not_read_without_an_unlabeled_batch():
    store = Store()
    loader = make(store, batch=(2, 0))
    for step in range(10):
        batch = loader.batch(0, step)
    assert sorted(store.images) == sorted(store.labels) == sorted(LABELED)
    assert batch.unlabeled.cases == () and batch.unlabeled.image.shape == (0, 1, *PATCH)


def turned(volume, view):
    """The volume as np.rot90 and np.flip turn it for a view."""
    for turns in range(4):
        for axis in range(2):
            if augment.rotflip(turns, axis) == (view.transpose, view.flips):
                return np.flip(np.rot90(volume, turns), axis)
    assert not view.transpose and not view.flips
    return volume


@pytest.mark.parametrize("augmentation", [(), ("rotflip",)])
def test_samples_are_crops_of_the_turned_volume(augmentation):
    store, loader = Store(), make(augmentation=augmentation)
    for step in range(8):
        batch = loader.batch(1, step)
        for slot, case in enumerate(batch.labeled.cases + batch.unlabeled.cases):
            view = augment.draw(stream(0, 1, VIEW, step, slot), SIZES[case], PATCH, augmentation)
            whole = np.pad(turned(store.values(case), view), [(m, m) for m in view.margin])
            crop = whole[tuple(slice(s, s + p) for s, p in zip(view.start, PATCH, strict=True))]
            assert np.array_equal(batch.image[slot, 0].numpy(), crop)
        assert torch.equal(batch.labeled.image[:, 0].long() % 251, batch.labeled.label.long())


def test_small_volumes_are_padded_with_zeros():
    loader = Loader(Store({"e": (9, 9, 9)}), ["e"], [], PATCH, (1, 0), 0, ("rotflip",), "cpu")
    for step in range(20):
        batch = loader.batch(0, step)
        values = batch.image[batch.image > 0]
        assert len(values.unique()) == len(values) <= 9**3
        assert (batch.labeled.label[batch.image[:, 0] == 0] == 0).all()


def test_two_dimensions():
    loader = Loader(Store({"x": (20, 30), "y": (12, 40)}), ["x", "y"], [], (16, 16), (2, 0), 0, ("rotflip",), "cpu")
    batch = loader.batch(0, 0)
    assert batch.image.shape == (2, 1, 16, 16)
    assert torch.equal(batch.image[:, 0].long() % 251, batch.labeled.label.long())


def test_half_precision_storage_rounds_the_images_only():
    full, half = make(Store(scale=1e-4)).batch(0, 0), make(Store(scale=1e-4), dtype=torch.float16)
    assert {image.dtype for image in half.images} == {torch.float16}
    half = half.batch(0, 0)
    assert half.image.dtype == torch.float32
    assert torch.equal(half.image, full.image.half().float()) and not torch.equal(half.image, full.image)
    assert torch.equal(half.labeled.label, full.labeled.label)


def test_noise_seeds_differ_by_seed_stage_and_step():
    keys = [(seed, stage, step) for seed in range(3) for stage in range(3) for step in range(100)]
    seeds = [noise_seed(*key) for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [noise_seed(*key) for key in keys]
    assert all(0 <= seed < 2**63 for seed in seeds)
