"""Batches: a pure function of seed, stage and step; what is read and what is not; image and label aligned."""

import hashlib

import numpy as np
import pytest
import torch

from ssl4mis import augment
from ssl4mis.errors import UserError
from ssl4mis.loading import PARTNER_STRONG, PARTNER_VIEW, STRONG, VIEW, Loader, as_tensor, chain, noise_seed, stream
from ssl4mis.method import Needs

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


def make(store=None, batch=(2, 2), seed=0, patch=PATCH, augmentation=("rotflip",), dtype=torch.float32, slices=False,
         **needs):
    return Loader(store or Store(), LABELED, UNLABELED, patch, batch, seed, augmentation, "cpu", dtype, Needs(**needs),
                  slices)


def make_slices(store=None, patch=(24, 16), augmentation=("rotflip_or_rotate",), **options):
    return make(store, patch=patch, augmentation=augmentation, slices=True, **options)


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


@pytest.mark.parametrize(("batch", "key", "cases", "sha256"), [
    ((2, 2), (0, 0), ("b", "c", "d", "e"), "cd4427a45c222685"),
    ((2, 2), (1, 3), ("b", "a", "d", "f"), "2062ea9a86e5f01a"),
    ((1, 3), (0, 7), ("c", "f", "e", "d"), "4904feea847e74ba"),
])
@pytest.mark.parametrize("needs", [{}, {"strong": 2, "partner": True}])
def test_batches_of_recorded_runs_stay_what_they_are(batch, key, cases, sha256, needs):
    made = make(batch=batch, seed=5, **needs).batch(*key)
    assert made.labeled.cases + made.unlabeled.cases == cases
    content = made.image.numpy().tobytes() + made.labeled.label.numpy().tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == sha256
    assert noise_seed(5, 1, 3) == 3992927421057959829


def halves(loader, keys):
    for key in keys:
        batch = loader.batch(*key)
        yield key, batch.unlabeled, STRONG, VIEW, len(batch.labeled.cases)
        yield key, batch.partner, PARTNER_STRONG, PARTNER_VIEW, 0


def test_strong_views_and_what_is_valid():
    """Of unlabeled samples and of their partners, each from streams of its own."""
    store, strong = Store(), set()
    for (stage, step), half, kind, view_kind, first in halves(make(store, strong=2, partner=True, batch=(1, 2)),
                                                              [(0, 0), (0, 1), (1, 0)]):
        assert half.label is None and half.image.shape == (2, 1, *PATCH) and len(half.strong) == 2
        assert half.valid.dtype == torch.bool
        for slot, case in enumerate(half.cases):
            view = augment.draw(stream(0, stage, view_kind, step, first + slot), SIZES[case], PATCH, ("rotflip",))
            whole = np.pad(turned(store.values(case), view), [(m, m) for m in view.margin])
            crop = whole[tuple(slice(s, s + p) for s, p in zip(view.start, PATCH, strict=True))]
            assert np.array_equal(half.image[slot, 0], crop)
            assert np.array_equal(half.valid[slot], crop > 0)
            rng = stream(0, stage, kind, step, slot)
            for image in half.strong:
                drawn = augment.draw_strong(rng)
                strong.add(drawn)
                assert torch.equal(image[slot], augment.apply_strong(half.image[slot], drawn))
    assert len(strong) > 20, "strong views share their randomness"


def test_partners_come_from_a_chain_of_their_own():
    loader = make(partner=True, batch=(1, 2))
    batches = [loader.batch(0, step) for step in range(9)]
    mine = [case for batch in batches for case in batch.unlabeled.cases]
    theirs = [case for batch in batches for case in batch.partner.cases]
    for start in range(0, 18, 3):
        assert sorted(theirs[start:start + 3]) == sorted(UNLABELED)
    assert mine != theirs
    assert not any(torch.equal(batch.partner.image, batch.unlabeled.image) for batch in batches)
    assert batches[0].partner.strong == () and batches[0].partner.valid is None


def test_strong_views_and_partners_are_functions_of_stage_and_step():
    keys, first, fresh = [(0, 0), (0, 1), (1, 0)], make(strong=1, partner=True), make(strong=1, partner=True)
    found = {key: first.batch(*key) for key in keys}
    for key in reversed(keys):
        again = fresh.batch(*key)
        for half in ("unlabeled", "partner"):
            mine, theirs = getattr(found[key], half), getattr(again, half)
            assert torch.equal(mine.image, theirs.image) and torch.equal(mine.strong[0], theirs.strong[0])
            assert torch.equal(mine.valid, theirs.valid) and mine.cases == theirs.cases
    other = make(strong=1, partner=True, seed=1).batch(0, 0)
    assert not torch.equal(other.partner.image, found[0, 0].partner.image)


def test_only_what_a_method_needs_is_made():
    plain, all_labeled = make().batch(0, 0), make(batch=(2, 0), strong=1, partner=True).batch(0, 0)
    assert plain.partner is None and plain.unlabeled.strong == () and plain.unlabeled.valid is None
    assert all_labeled.partner is None and len(all_labeled.unlabeled.image) == 0
    strong = make(strong=1).batch(0, 0)
    assert strong.partner is None and strong.labeled.strong == () and strong.labeled.valid is None


def test_strong_views_are_of_the_rounded_image_where_storage_is_half():
    batch = make(Store(scale=1e-4), dtype=torch.float16, strong=1).batch(0, 0)
    assert batch.unlabeled.strong[0].dtype == torch.float32
    drawn = augment.draw_strong(stream(0, 0, STRONG, 0, 0))
    assert torch.equal(batch.unlabeled.strong[0][0], augment.apply_strong(batch.unlabeled.image[0], drawn))


def planes_of(cases):
    return tuple(f"{case}/{number}" for case in cases for number in range(SIZES[case][-1]))


def test_planes_are_cases_and_each_volume_is_read_once():
    store = Store()
    loader = make_slices(store)
    assert loader.cases == (planes_of(LABELED), planes_of(UNLABELED))
    for step in range(30):
        loader.batch(0, step)
    assert store.images == [*LABELED, *UNLABELED] and store.labels == [*LABELED]


def test_every_plane_once_before_any_twice():
    loader = make_slices(batch=(3, 3))
    drawn = [name for step in range(18) for name in loader.batch(0, step).labeled.cases]
    assert len(drawn) == 54 and sorted(drawn) == sorted(planes_of(LABELED))
    assert len({name.split("/")[0] for name in drawn[:6]}) > 1, "volume after volume"


def resized(store, name, view, patch, of="image"):
    case, number = name.split("/")
    plane = torch.from_numpy((store.values(case) % 251).astype(np.uint8) if of == "label" else store.image(case))
    out = torch.empty(patch if of == "label" else (1, *patch), dtype=plane.dtype)
    augment.apply_plane(plane[..., int(number)], view, out)
    return out


@pytest.mark.parametrize(("augmentation", "fewest"), [((), 1), (("rotflip",), 4), (("rotflip_or_rotate",), 20)])
def test_samples_are_whole_planes_turned_and_resized(augmentation, fewest):
    store, loader, views = Store(), make_slices(augmentation=augmentation), set()
    for step in range(20):
        batch = loader.batch(1, step)
        assert batch.image.shape == (4, 1, 24, 16) and batch.image.dtype == torch.float32
        assert batch.labeled.label.shape == (2, 24, 16) and batch.labeled.label.dtype == torch.uint8
        for slot, name in enumerate(batch.labeled.cases + batch.unlabeled.cases):
            view = augment.draw_plane(stream(0, 1, VIEW, step, slot), augmentation)
            views.add(view)
            assert torch.equal(batch.image[slot], resized(store, name, view, (24, 16)))
            if slot < 2:
                assert torch.equal(batch.labeled.label[slot], resized(store, name, view, (24, 16), "label"))
        assert torch.equal(batch.labeled.image[:, 0].long() % 251, batch.labeled.label.long())
    assert len(views) >= fewest
    assert any(view.angle for view in views) == (augmentation == ("rotflip_or_rotate",))


def test_strong_views_and_partners_of_planes():
    store, angles = Store(), set()
    for (stage, step), half, kind, view_kind, first in halves(make_slices(strong=2, partner=True, batch=(1, 2)),
                                                              [(0, step) for step in range(8)]):
        assert half.label is None and half.image.shape == (2, 1, 24, 16)
        assert set(half.cases) <= set(planes_of(UNLABELED))
        for slot, name in enumerate(half.cases):
            view = augment.draw_plane(stream(0, stage, view_kind, step, first + slot), ("rotflip_or_rotate",))
            angles.add(view.angle)
            assert torch.equal(half.image[slot], resized(store, name, view, (24, 16)))
            assert torch.equal(half.valid[slot], half.image[slot, 0] > 0)
            rng = stream(0, stage, kind, step, slot)
            for image in half.strong:
                expected = augment.apply_strong(half.image[slot], augment.draw_strong(rng))
                assert torch.equal(image[slot], expected)
    assert len(angles) > 4


def test_batches_of_planes_are_functions_of_stage_and_step():
    first, fresh = make_slices(), make_slices()
    found = {step: first.batch(0, step) for step in range(4)}
    for step in (2, 0, 3, 1):
        assert same(fresh.batch(0, step), found[step])
    assert not same(fresh.batch(1, 0), found[0]) and not same(make_slices(seed=1).batch(0, 0), found[0])


@pytest.mark.parametrize(("augmentation", "sha256"), [
    (("rotflip_or_rotate",), "e2237b7cc0ff1d72"), (("rotflip",), "da7418a84e656a22"), ((), "9e3912482d9acac3"),
])
def test_batches_of_planes_stay_what_they_are(augmentation, sha256):
    loader, content = make_slices(augmentation=augmentation, seed=5), b""
    for step in range(4):
        batch = loader.batch(0, step)
        content += batch.image.numpy().tobytes() + batch.labeled.label.numpy().tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == sha256


def test_crops_are_not_rotated_by_small_angles():
    with pytest.raises(UserError, match="^augmentation rotflip_or_rotate: .* rotflip, dihedral or none for crops$"):
        make(augmentation=("rotflip_or_rotate",))


class Mapped(Store):
    """The images lie in files, those of labeled cases read-only."""

    def __init__(self, folder):
        super().__init__()
        self.maps = {}
        for case, size in SIZES.items():
            Store.image(self, case).tofile(folder / case)
            mode = "r" if case in LABELED else "c"
            self.maps[case] = np.memmap(folder / case, np.float32, mode, shape=(1, *size))

    def image(self, case):
        return self.maps[case]


@pytest.fixture
def always_warn():
    """torch says only once in a process that an array is not writable."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("slices", [False, True])
def test_mapped_volumes_stay_in_their_files(tmp_path, always_warn, slices):
    """No copy of a volume is made, and batches are those of volumes in memory."""
    store, build = Mapped(tmp_path), make_slices if slices else make
    loader, expected = build(store), build()
    for name, image in zip(loader.cases[0] + loader.cases[1], loader.images, strict=True):
        case, _, number = name.partition("/")
        start = store.maps[case][..., int(number)] if slices else store.maps[case]
        assert image.data_ptr() == start.__array_interface__["data"][0] and tuple(image.shape) == start.shape
    for step in range(4):
        assert same(loader.batch(0, step), expected.batch(0, step))


@pytest.mark.filterwarnings("error")
def test_read_only_labels(always_warn):
    label = np.arange(6, dtype=np.uint8)
    label.flags.writeable = False
    assert as_tensor(label).tolist() == [0, 1, 2, 3, 4, 5]
