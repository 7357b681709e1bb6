"""Time what the host adds to a training step: DTC's signed distance and BCP's largest component, on one core.

Batches are those of the authors' runs on LA: two labels of 112x112x80, cut as the loader cuts them, and four pseudo
labels, made from labels. The peers' ways are written anew here: DTC takes SciPy's distance transform of both sides of a
mask and scikit-image's inner boundary, BCP the largest of scikit-image's components.
"""

import argparse
import sys
import time
from unittest import mock

import common  # isort: skip  (before numpy)
import numpy as np
import torch
from scipy import ndimage

from data_prep import DataError
from ssl4mis import augment, distance, memory, ops
from ssl4mis.leaderboard import markdown_table

PATCH, TINY = (112, 112, 80), (32, 32, 16)
LABELS, PSEUDO = 2, 4  # in a batch of DTC and of BCP
SIGMA, NOISE = 2.0, 0.35  # of predictions: width of blobs in voxels, their weight against the label
CONNECTIVITY = 3  # BCP's on LA: 26 neighbors
PEERS, OURS, FALLBACK = "peers (rewritten)", "ours (numba)", "ours (SciPy, without numba)"
LIMIT = 2e-7  # the peers round to float32 at the end, we do so with the distances

try:
    from skimage import measure
except ImportError:
    measure = None


def main(argv=None) -> int:
    """Exit status: 0 done, 1 a result of ours differs from the peers', 2 an argument is bad."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of LA (default: that of SSL4MIS_DATA, else phantoms)")
    parser.add_argument("--cases", type=int, default=8, help="a crop of each, 4 at least (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="calls of each way per batch (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny phantoms, one round: does it run?")
    options = parser.parse_args(argv)
    if options.cases < PSEUDO or options.rounds < 1:
        parser.error(f"--cases {options.cases} --rounds {options.rounds}, expected at least {PSEUDO} and 1")
    count, rounds, patch = (PSEUDO, 1, TINY) if options.quick else (options.cases, options.rounds, PATCH)
    try:
        title, cases = common.cases(options.data, count, common.TINY if options.quick else None)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    memory.keep_pages()  # as every training run does
    start = time.perf_counter()
    for call in (ours_distance, ours_component):
        call(torch.eye(3, dtype=torch.uint8)[None])
    ready = time.perf_counter() - start

    rng = np.random.default_rng(0)
    crops = [crop(rng, case.label, patch) for case in cases]
    labels = batches(crops, LABELS)
    maps = [common.interleave(distances(batch), rounds) for batch in labels]
    parts = [common.interleave(components(batch), rounds)
             for batch in batches([predict(rng, label) for label in crops], PSEUDO)]
    exact = all(torch.equal(given[way], reference(batch)) for batch, (_, given) in zip(labels, maps, strict=True)
                for way in (OURS, FALLBACK))
    off = max(difference(given, way) for _, given in maps for way in given)
    exact = exact and off <= LIMIT and not any(difference(given, way) for _, given in parts for way in given)

    print(f"{title}, a crop of {'x'.join(map(str, patch))} of each. Milliseconds of CPU time per batch of "
          f"{LABELS} labels and of {PSEUDO} predictions, median [range].")
    print(common.machine(), end="\n\n")
    for name, runs in ("DTC: signed distance", maps), ("BCP: largest component", parts):
        print(markdown_table([name, "ms", "times faster", "[range]", "largest difference"], [
            [way, common.milliseconds(s for seconds, _ in runs for s in seconds[way]), *common.faster(PEERS, runs, way),
             f"{max(difference(given, way) for _, given in runs):.0e}"] for way in runs[0][0]]))
    print("Our distances are those of SciPy to the last bit; DTC scales them in float64, we in float32.")
    if measure is None:
        print("scikit-image, which BCP takes, is not installed: SciPy labels in its place.")
    print(f"numba's first calls in this process took {ready:.1f} s (about 10 s where its cache is empty).")
    common.close("distance", common.ratio(PEERS, maps, OURS), exact, {"ratio": 5, "component_ratio": 2.5},
                 component_ratio=common.ratio(PEERS, parts, OURS), fallback_ratio=common.ratio(PEERS, maps, FALLBACK),
                 component_fallback_ratio=common.ratio(PEERS, parts, FALLBACK), largest_difference=off,
                 components_of="SciPy" if measure is None else "scikit-image", data=title)
    return 0 if exact else 1


def crop(rng: np.random.Generator, label: np.ndarray, patch: tuple[int, ...]) -> np.ndarray:
    """A random crop as the loader makes it, uint8."""
    out = torch.empty(patch, dtype=torch.uint8)
    augment.apply(torch.from_numpy(label), augment.draw(rng, label.shape, patch, ("rotflip",)), out)
    return out.numpy()


def predict(rng: np.random.Generator, label: np.ndarray) -> np.ndarray:
    """A guess at a label, uint8: its border is rough, and there are holes and blobs."""
    noise = ndimage.gaussian_filter(rng.standard_normal(label.shape), SIGMA)
    return (ndimage.gaussian_filter(label.astype(float), 1) + NOISE * noise / noise.std() > 0.5).astype(np.uint8)


def batches(crops: list[np.ndarray], size: int) -> list[np.ndarray]:
    """Whole batches, (size, *space)."""
    return [np.stack(crops[n : n + size]) for n in range(0, len(crops) - size + 1, size)]


def distances(labels: np.ndarray) -> dict:
    """By name, what gives the signed distance of labels, float32; the peers' labels are int64."""
    wide, ours = labels.astype(np.int64), torch.from_numpy(labels)
    return {PEERS: lambda: torch.from_numpy(peers_distance(wide)).float(),
            FALLBACK: lambda: without_numba(ours_distance, ours), OURS: lambda: ours_distance(ours)}


def components(guesses: np.ndarray) -> dict:
    """By name, what gives the largest component of each prediction; the peers' predictions are int64."""
    wide, ours = guesses.astype(np.int64), torch.from_numpy(guesses)
    return {PEERS: lambda: torch.from_numpy(peers_component(wide)),
            FALLBACK: lambda: without_numba(ours_component, ours), OURS: lambda: ours_component(ours)}


def ours_distance(labels: torch.Tensor) -> torch.Tensor:
    return distance.signed_distance(labels == 1, "legacy")


def ours_component(guesses: torch.Tensor) -> torch.Tensor:
    return ops.largest_component(guesses, CONNECTIVITY)


def without_numba(call, batch: torch.Tensor) -> torch.Tensor:
    with mock.patch.object(distance, "optional", return_value=None), mock.patch.object(ops, "optional",
                                                                                       return_value=None):
        return call(batch)


def peers_distance(labels: np.ndarray) -> np.ndarray:
    found = np.zeros(labels.shape)
    for mask, out in zip(labels.astype(np.uint8).astype(bool), found, strict=True):
        if mask.any():
            inside, outside = ndimage.distance_transform_edt(mask), ndimage.distance_transform_edt(~mask)
            out[...] = (outside - outside.min()) / (outside.max() - outside.min())
            out -= (inside - inside.min()) / (inside.max() - inside.min())
            out[inner_boundary(mask)] = 0
    return found


def inner_boundary(mask: np.ndarray) -> np.ndarray:
    """As scikit-image's find_boundaries does it."""
    cross, values = ndimage.generate_binary_structure(mask.ndim, 1), mask.astype(np.uint8)
    largest, least = (call(values, footprint=cross) for call in (ndimage.grey_dilation, ndimage.grey_erosion))
    return (largest != least) & mask


def peers_component(guesses: np.ndarray) -> np.ndarray:
    parts = map(parts_of, guesses)
    return np.stack([part == np.argmax(np.bincount(part.flat)[1:]) + 1 if part.any() else part > 0 for part in parts])


def parts_of(guess: np.ndarray) -> np.ndarray:
    if measure is not None:
        return measure.label(guess, connectivity=CONNECTIVITY)
    return ndimage.label(guess, ndimage.generate_binary_structure(guess.ndim, CONNECTIVITY))[0]


def reference(labels: np.ndarray) -> torch.Tensor:
    """The signed distance by its definition, in float32."""
    found = torch.zeros(labels.shape)
    for mask, out in zip(labels == 1, found, strict=True):
        if mask.any() and not mask.all():
            sides = (ndimage.distance_transform_edt(side) for side in (mask, ~mask))
            inside, outside = (torch.from_numpy(side).float() for side in sides)
            out[:] = (outside / outside.max() - inside / inside.max()).masked_fill(inside == 1, 0)
    return found


def difference(given: dict, way: str) -> float:
    """The largest one to what the peers give."""
    return float((given[way].float() - given[PEERS].float()).abs().max())


if __name__ == "__main__":
    sys.exit(main())
