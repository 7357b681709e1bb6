"""Phantom: synthetic anatomy with a known truth, generated in memory; for demonstrations and tests.

A chamber with vessels lies among organs and tubes of the same intensity that are not labeled. Gray values alone do not
separate them: what does is the wall around the chamber and that its vessels start there, and both vary from
case to case. All lengths are in half fields of view, so that any shape holds the whole anatomy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from data_prep.spec import DataError, DatasetSpec, Protocol
from data_prep.volumes import downsample_image, downsample_label

SEED = 2024  # of the registered data set
CASES = 40
SPACING = (1.25, 1.25, 2.5)

# Knobs of the difficulty: intensities before the z-score, where the tissue has mean 0.
CONTRAST = (0.8, 1.8)  # chamber against tissue, drawn per case
CONFUSION = 0.5  # sd of a distractor's mean intensity around that of the chamber
TISSUE = 0.5  # sd of the smooth texture of the tissue
TEXTURE = 0.25  # sd of the smooth texture inside the structures
NOISE = 0.3  # sd of the voxel noise, slightly blurred
BIAS = 0.4  # amplitude of the field that multiplies the image
VESSEL_CONTRAST = (1.3, 2.0)  # vessels relative to the chamber, per case
WALL = (0.6, 1.2)  # how much darker than tissue the wall around the chamber is, per case
TILT = 0.6  # sd of the rotation about every axis, in radians
DEFORMATION = 0.22  # of the chamber's surface, relative to its radius
BLOBS = (3, 5)  # distractors of the chamber
TUBES = (2, 4)  # distractors of the vessels

# Sizes, in half fields of view.
CHAMBER_RADII = (0.4, 0.58)
VESSEL_RADIUS = (0.2, 0.3)
BLOB_RADII = (0.15, 0.4)
TUBE_RADIUS = (0.08, 0.16)

_WALL_THICKNESS = 0.11  # half fields of view; at least one voxel
_CURVE_POINTS = 48


@dataclass(frozen=True)
class _Scene:
    """Masks and levels of one case on a grid (*space)."""

    chamber: np.ndarray  # radius relative to the surface: below 1 is inside
    vessels: np.ndarray  # bool, outside of the chamber as well as inside
    blobs: np.ndarray  # 0, or the number of the distractor
    tubes: np.ndarray  # bool


def generate(
    seed: int, case_index: int, classes: int = 3, spatial_dims: int = 3, shape: tuple[int, ...] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One case, always the same for the same arguments: image (1, *space) float32, z-scored; label (*space) uint8.

    `classes` counts the background: 2 is chamber with vessels, 3 is chamber, vessels, and 4 is wall, chamber,
    vessels. Without `shape` a size around 64 x 64 x 32 (64 x 64 in 2D) is drawn. Every class is present.
    Raises ValueError for other numbers of classes or axes and for an axis below 16 voxels.
    """
    if classes not in (2, 3, 4) or spatial_dims not in (2, 3):
        raise ValueError(f"classes={classes}, spatial_dims={spatial_dims}, expected 2 to 4 classes in 2 or 3 axes")
    rng = np.random.default_rng([seed, case_index])
    drawn = (*(int(n) for n in rng.integers(58, 71, size=2)), int(rng.integers(28, 37)))[:spatial_dims]
    shape = tuple(shape or drawn)
    if len(shape) != spatial_dims or min(shape) < 16:
        raise ValueError(f"shape={shape}, expected {spatial_dims} axes of at least 16 voxels")
    scene = _scene(rng, shape)
    wall = (scene.chamber >= 1) & (scene.chamber < 1 + max(_WALL_THICKNESS, 2 / min(shape)) / 0.4) & ~scene.vessels
    return _image(rng, scene, wall), _label(scene, wall, classes)


def _scene(rng: np.random.Generator, shape: tuple[int, ...]) -> _Scene:
    """Chamber and vessels, tilted together, then distractors around them."""
    dims = len(shape)
    axes = [(np.arange(n) + 0.5) / n * 2 - 1 for n in shape]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    turn = _rotation(rng, dims)
    center = rng.uniform(-0.18, 0.18, size=dims)
    radii = rng.uniform(*CHAMBER_RADII, size=dims)
    inner = (grid - center) @ turn
    level = _one_piece(np.linalg.norm(inner / radii, axis=-1) * _dents(rng, shape))

    curves = []
    count = int(rng.integers(2, 5))
    start = rng.uniform(0, 2 * np.pi)
    for i in range(count):
        # spread around the chamber, so that vessels rarely touch each other
        angle = start + 2 * np.pi * (i + rng.uniform(-0.2, 0.2)) / count
        way = np.array([np.cos(angle), np.sin(angle), rng.uniform(-0.4, 0.4)][:dims])
        bend = way + rng.normal(0, 0.35, size=dims)
        points = np.stack([0.7 * radii * way, 1.5 * radii * bend, 0.45 * way + 1.5 * radii * bend])
        curves.append((_curve(points @ turn.T + center), rng.uniform(*VESSEL_RADIUS)))

    blobs = np.zeros(shape, np.uint8)
    for number in range(1, int(rng.integers(BLOBS[0], BLOBS[1] + 1)) + 1):
        place = _around(rng, center, dims)
        size = rng.uniform(*BLOB_RADII, size=dims)
        near = np.linalg.norm(((grid - place) @ _rotation(rng, dims)) / size, axis=-1)
        blobs[(near * _dents(rng, shape) < 1) & (blobs == 0)] = number
    distractors = []
    for _ in range(int(rng.integers(TUBES[0], TUBES[1] + 1))):
        middle = _around(rng, center, dims)
        way = rng.normal(size=dims)
        way *= rng.uniform(0.5, 0.9) / np.linalg.norm(way)
        points = np.stack([middle - way, middle + rng.normal(0, 0.3, size=dims), middle + way])
        distractors.append((_curve(points), rng.uniform(*TUBE_RADIUS)))
    return _Scene(level, _tubes(grid, curves), blobs, _tubes(grid, distractors))


def _image(rng: np.random.Generator, scene: _Scene, wall: np.ndarray) -> np.ndarray:
    """Intensities of a scene: (1, *space) float32, mean 0, standard deviation 1."""
    from scipy.ndimage import gaussian_filter

    shape = wall.shape
    contrast = rng.uniform(*CONTRAST)
    clean = TISSUE * _smooth(rng, shape, 6)
    inside = TEXTURE * _smooth(rng, shape, 8)
    for number in range(1, int(scene.blobs.max()) + 1):
        mask = scene.blobs == number
        clean[mask] = contrast + CONFUSION * rng.normal() + inside[mask]
    clean[scene.tubes] = contrast * rng.uniform(*VESSEL_CONTRAST) + inside[scene.tubes]
    clean[wall] -= rng.uniform(*WALL) + np.maximum(clean[wall], 0)
    clean[scene.vessels] = contrast * rng.uniform(*VESSEL_CONTRAST) + inside[scene.vessels]
    chamber = scene.chamber < 1
    clean[chamber] = contrast + inside[chamber]
    # point spread of the scanner, then noise, then coil sensitivity
    seen = gaussian_filter(clean, 0.6) + NOISE * gaussian_filter(rng.normal(size=shape), 0.4)
    seen = (seen + 1) * np.exp(BIAS * _smooth(rng, shape, 3))
    return ((seen - seen.mean()) / seen.std()).astype(np.float32)[None]


def _label(scene: _Scene, wall: np.ndarray, classes: int) -> np.ndarray:
    """Truth of a scene: (*space) uint8; the chamber goes over the vessels, these over the wall."""
    chamber_value, vessel_value = {2: (1, 1), 3: (1, 2), 4: (2, 3)}[classes]
    label = np.zeros(wall.shape, np.uint8)
    if classes == 4:
        label[wall] = 1
    label[scene.vessels] = vessel_value
    label[scene.chamber < 1] = chamber_value
    return label


def _dents(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Factor (*space) on the distance from the center that makes an ellipsoid irregular, 1 on average."""
    return 1 + DEFORMATION * np.clip(_smooth(rng, shape, 5), -1.5, 1.5)


def _one_piece(level: np.ndarray) -> np.ndarray:
    """The level with everything below 1 raised to 2 that is apart from the largest piece."""
    from scipy.ndimage import label

    pieces, _ = label(level < 1)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    level[(pieces > 0) & (pieces != sizes.argmax())] = 2
    return level


def _around(rng: np.random.Generator, center: np.ndarray, dims: int) -> np.ndarray:
    """A place beside the chamber, up to the border of the volume."""
    way = rng.normal(size=dims)
    return np.clip(center + way / np.linalg.norm(way) * rng.uniform(0.6, 1.1), -0.95, 0.95)


def _rotation(rng: np.random.Generator, dims: int) -> np.ndarray:
    """Product of one rotation per pair of axes, angles from N(0, TILT): (dims, dims)."""
    turn = np.eye(dims)
    for i in range(dims):
        for j in range(i + 1, dims):
            angle = rng.normal(0, TILT)
            step = np.eye(dims)
            step[[i, j], [i, j]] = np.cos(angle)
            step[i, j], step[j, i] = -np.sin(angle), np.sin(angle)
            turn = turn @ step
    return turn


def _smooth(rng: np.random.Generator, shape: tuple[int, ...], knots: int) -> np.ndarray:
    """Smooth random field (*space), standard deviation 1: normal numbers on a coarse grid, blurred to this one."""
    values = rng.normal(size=(knots,) * len(shape))
    for n in shape:
        # one axis after the other: a few small matrix products instead of a spline over the whole volume
        distance = (np.arange(n)[:, None] + 0.5) / n * knots - (np.arange(knots) + 0.5)
        weights = np.exp(-0.5 * (distance / 0.6) ** 2)
        values = np.tensordot(values, weights / weights.sum(axis=1, keepdims=True), axes=(0, 1))
    return values / values.std()


def _curve(points: np.ndarray) -> np.ndarray:
    """Quadratic Bezier curve of three points (3, dims) as a polyline (_CURVE_POINTS, dims)."""
    t = np.linspace(0, 1, _CURVE_POINTS)[:, None]
    return (1 - t) ** 2 * points[0] + 2 * t * (1 - t) * points[1] + t**2 * points[2]


def _tubes(grid: np.ndarray, curves: Sequence[tuple[np.ndarray, float]]) -> np.ndarray:
    """Mask (*space) of the points closer to a curve than its radius; a thin tube still covers its nearest voxels."""
    from scipy.spatial import cKDTree

    shape = np.array(grid.shape[:-1])
    mask = np.zeros(shape, bool)
    for curve, radius in curves:
        low, high = np.floor((np.stack([curve.min(0) - radius, curve.max(0) + radius]) + 1) / 2 * shape).astype(int)
        box = tuple(slice(max(a, 0), max(b + 1, 0)) for a, b in zip(low, high, strict=True))
        near, _ = cKDTree(curve).query(grid[box], distance_upper_bound=radius)
        mask[box] |= near < radius
        index = np.floor((curve + 1) / 2 * shape).astype(int)
        index = index[((index >= 0) & (index < shape)).all(axis=1)]
        mask[tuple(index.T)] = True
    return mask


class PhantomStore:
    """The registered cases phantom_000, phantom_001 and so on; each is generated once in a process and then kept.

    `classes` and `spatial_dims` are those of `generate`.
    """

    def __init__(self, downsample: int = 1, classes: int = 3, spatial_dims: int = 3) -> None:
        self.downsample, self.classes, self.spatial_dims = downsample, classes, spatial_dims

    def image(self, case: str) -> np.ndarray:
        """The scan: float32, (1, *space), z-scored. Raises DataError for an unknown case."""
        return self._case(case)[0].copy()

    def label(self, case: str) -> np.ndarray:
        """The classes: uint8, (*space). Raises DataError for an unknown case."""
        return self._case(case)[1].copy()

    def spacing(self, case: str) -> tuple[float, ...]:
        """Voxel distance in mm, an axis each, after downsampling; the same for all cases."""
        return tuple(mm * self.downsample for mm in SPACING[: self.spatial_dims])

    def check(self, cases: Sequence[str]) -> None:
        """Raises DataError naming how many of the cases do not exist and the first of them."""
        unknown = [case for case in cases if case not in _INDEX]
        if unknown:
            raise DataError(
                f"phantom: {len(unknown)} of {len(cases)} cases are unknown, the first is {unknown[0]!r}, "
                f"expected phantom_000 to phantom_{CASES - 1:03d}"
            )

    def provenance(self, cases: Sequence[str]) -> dict:
        """The cases follow from this file."""
        return {"recipe": "", "sha256": "", "label_guided": False, "spacing_known": True}

    def replay(self) -> None:
        """There is no raw scan of a phantom."""

    def _case(self, case: str) -> tuple[np.ndarray, np.ndarray]:
        self.check([case])
        return _registered(_INDEX[case], self.classes, self.spatial_dims, self.downsample)


@cache
def _registered(index: int, classes: int, spatial_dims: int, downsample: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and label of a registered case, to be copied before they leave this file."""
    image, label = generate(SEED, index, classes, spatial_dims)
    if downsample > 1:
        image, label = downsample_image(image, downsample), downsample_label(label, downsample)
    return image, label


_INDEX = {f"phantom_{index:03d}": index for index in range(CASES)}
CLASSES = {  # by their number, background included
    2: ("background", "chamber with vessels"),
    3: ("background", "chamber", "vessels"),
    4: ("background", "wall", "chamber", "vessels"),
}

DEMO = Protocol(
    name="demo",
    about="Synthetic anatomy, 32 training and 8 test cases, a few minutes a run without a GPU",
    split="phantom-demo",
    patch=(32, 32, 16),
    stride=(16, 16, 8),
    iterations=1000,
    learning_rate=0.03,
    schedule="poly",
    labeled=(2, 4),
    width=8,
    precision="32-true",
    recipe="",
)
CV5 = replace(DEMO, name="cv5", about="Synthetic anatomy, 40 cases in five folds", split="phantom-cv5")


def _open(protocol: Protocol, classes: int, dims: int) -> PhantomStore:
    if protocol.recipe:
        raise DataError(f"phantom: recipe {protocol.recipe}, expected none, since the cases are generated")
    return PhantomStore(protocol.downsample, classes, dims)


def _spec(name: str, classes: int, dims: int) -> DatasetSpec:
    """The phantom with this many classes in 2 or 3 dimensions."""
    protocols = [replace(p, patch=p.patch[:dims], stride=p.stride[:dims]) for p in (DEMO, CV5)]
    return DatasetSpec(
        name=name,
        title=f"Synthetic chamber with vessels, {dims}D, {classes} classes",
        modality="synthetic",
        classes=CLASSES[classes],
        spacing=SPACING[:dims],
        citation="generated by data_prep/phantom.py",
        how_to_get="nothing to get: the cases are generated in memory",
        open=lambda root, protocol: _open(protocol, classes, dims),
        protocols={protocol.name: protocol for protocol in protocols},
        spatial_dims=dims,
    )


SPEC = _spec("phantom", 3, 3)
_VARIANTS = [_spec(f"phantom-{dims}d{classes}c", classes, dims) for dims in (2, 3) for classes in (2, 4)]
SPECS = {spec.name: spec for spec in (SPEC, *_VARIANTS)}
