"""The synthetic data set: the same everywhere, complete, and with some difficulty."""

import numpy as np
import pytest

from data_prep import DataError, dataset, phantom
from data_prep.spec import load_split

SPEC = dataset("phantom")


@pytest.fixture(scope="module")
def store():
    return SPEC.open(None, SPEC.protocols["demo"])


def test_the_same_arguments_give_the_same_case():
    for one, other in zip(phantom.generate(3, 5), phantom.generate(3, 5), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("other", [(3, 6), (4, 5)])
def test_seed_and_case_each_give_another_case(other):
    one, two = (phantom.generate(*key, shape=(24, 24, 16))[0] for key in ((3, 5), other))
    assert not np.allclose(one, two, atol=0.5)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_every_class_is_present(classes, spatial_dims):
    for seed in range(12):
        image, label = phantom.generate(seed, seed, classes, spatial_dims)
        assert image.shape == (1, *label.shape) and label.ndim == spatial_dims
        assert image.dtype == np.float32 and label.dtype == np.uint8
        assert np.unique(label).tolist() == list(range(classes))
        assert np.isfinite(image).all()
        assert image.mean() == pytest.approx(0, abs=1e-4) and image.std() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_every_class_is_present_at_the_smallest_size(classes):
    for shape in ((16, 16), (16, 16, 16)):
        for case in range(25):
            _, label = phantom.generate(0, case, classes, len(shape), shape)
            assert label.shape == shape
            assert np.unique(label).tolist() == list(range(classes))


def test_the_numbers_of_classes_tell_the_same_anatomy():
    labels = {classes: phantom.generate(1, 2, classes)[1] for classes in (2, 3, 4)}
    assert np.array_equal(labels[2] > 0, labels[3] > 0)
    assert np.array_equal(labels[3] == 1, labels[4] == 2)
    assert np.array_equal(labels[3] == 2, labels[4] == 3)


def test_the_vessels_start_at_the_chamber():
    from scipy.ndimage import binary_dilation, label

    for case in range(10):
        _, truth = phantom.generate(phantom.SEED, case)
        pieces, count = label(truth > 0, structure=np.ones((3, 3, 3)))
        assert np.bincount(pieces.ravel())[1:].max() > 0.9 * np.count_nonzero(truth)
        assert (binary_dilation(truth == 1) & (truth == 2)).any()


@pytest.mark.parametrize(
    "arguments", [{"classes": 1}, {"classes": 5}, {"spatial_dims": 4}, {"shape": (64, 64)}, {"shape": (64, 64, 8)}]
)
def test_what_cannot_be_generated_is_refused(arguments):
    with pytest.raises(ValueError, match="expected") as error:
        phantom.generate(0, 0, **arguments)
    assert "\n" not in str(error.value)


def test_gray_values_alone_do_not_solve_it(store):
    """No threshold of the smoothed image finds the foreground well, not even one chosen with the truth."""
    from scipy.ndimage import gaussian_filter

    best = []
    for case in load_split("phantom-demo", 0).test:
        image, truth = gaussian_filter(store.image(case)[0], 1), store.label(case) > 0
        found = [image > level for level in np.linspace(-1, 3, 41)]
        best.append(max(2 * (mask & truth).sum() / (mask.sum() + truth.sum()) for mask in found))
    assert np.mean(best) < 0.65


def test_cases_differ_in_size_and_contrast(store):
    cases = load_split("phantom-demo", 0).test
    assert len({store.label(case).shape for case in cases}) > 1
    contrasts = [store.image(case)[0][store.label(case) == 1].mean() for case in cases]
    assert np.ptp(contrasts) > 0.4


def test_a_case_is_generated_once(monkeypatch):
    store, calls, generate = SPEC.open(None, SPEC.protocols["demo"]), [], phantom.generate

    def counted(*arguments):
        calls.append(arguments)
        return generate(*arguments)

    monkeypatch.setattr(phantom, "generate", counted)
    phantom._registered.cache_clear()  # other tests have asked for cases in this process
    image = store.image("phantom_000")
    kept = image.copy()
    image[:] = 0  # what the caller does to its array stays there
    store.label("phantom_000")
    assert np.array_equal(store.image("phantom_000"), kept)
    assert len(calls) == 1
    assert store.spacing("phantom_000") == SPEC.spacing


def test_every_listed_case_exists(store):
    for name in ("phantom-demo", "phantom-cv5"):
        split = load_split(name, 0)
        store.check([*split.train, *split.test])


@pytest.mark.parametrize("case", ["phantom_040", "phantom_1", "x"])
def test_an_unknown_case_is_refused(store, case):
    for call in (store.image, store.label, lambda name: store.check(["phantom_000", name])):
        with pytest.raises(DataError, match=f"{case}.*expected phantom_000 to phantom_039") as error:
            call(case)
        assert "\n" not in str(error.value)
