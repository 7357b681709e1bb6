"""Recipes: how a raw scan becomes a stored case, as plain values, so that a prediction can replay them."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from data_prep.geometry import Geometry, to_store
from data_prep.scans import Scan, same_grid
from data_prep.spec import DataError

BODY = -500.0  # HU, halfway between air and soft tissue
PART = 0.1  # of the largest connected part: smaller ones are specks of noise, tables and cables
TAILS = (0.005, 0.995)  # quantiles between which the threshold of an MR scan is looked for
RATIO = 300.0  # of the brightest to the darkest intensity that this threshold tells from zero
BINS = 256
MOST = 1 << 27  # voxels of a stored case that is resampled beyond reason: half a gigabyte
CHUNK = 1 << 22  # values squared at a time, in float64
OVER = ("all", "positive", "foreground")


class Step(NamedTuple):
    """One change of intensities: the name of a function of this module and its arguments."""

    name: str
    arguments: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Crop:
    """The box that is kept.

    `around` is "label" (its foreground; a scan without a label is kept whole), "foreground" (by intensity), "body" (of
    a CT in HU), "nonzero" or "" (no crop); all but the label are looked for in every channel, or in that of index
    `channel`. The box grows evenly to the size `smallest`, in voxels of the stored case, then by `margin`, both up to
    the borders of the scan, and is rounded up to voxels of the scanner. `margin` is in mm or, with `voxels`, in voxels
    of the stored case: per axis of the store a number for both sides, a pair (low, high), or None for the whole axis.
    `exclusive` is the arithmetic of the field's scripts: the last index of what is boxed is where the slice stops, so
    that without a margin a plane is lost; growth is rounded, halves down, and ends to the nearest voxel. Raises
    ValueError for anything else.
    """

    around: str = ""
    margin: tuple[float | tuple[float, float] | None, ...] = (0, 0, 0)
    voxels: bool = False
    smallest: tuple[int, ...] = (0, 0, 0)
    channel: int | None = None
    exclusive: bool = False

    def __post_init__(self) -> None:
        known = ("", "label", *MASKS)
        if self.around not in known:
            raise ValueError(f"crop around {self.around!r}, expected one of {', '.join(map(repr, known))}")
        sides = [side for side in self.margin if side is not None] + list(self.smallest)
        axes = len(self.margin) == len(self.smallest) == 3
        if not axes or not all((np.broadcast_to(side, 2) >= 0).all() for side in sides):
            raise ValueError(f"margin {self.margin}, smallest {self.smallest}, expected 3 times no number below 0")


@dataclass(frozen=True)
class Recipe:
    """How raw scans of a data set become stored cases; `version` is raised whenever the stored voxels change.

    `orientation` is the order of the axes ("RAS", None keeps the scanner's); `spacing` in mm, None keeps it; `before`
    are steps on the whole scan, then comes the crop, then resampling (splines of this `order`), then `after`. Raises
    ValueError for a step or argument that there is not.
    """

    dataset: str
    name: str
    version: int
    about: str
    orientation: str | None = "RAS"
    spacing: tuple[float | None, ...] | None = None
    order: int = 3
    before: tuple[Step, ...] = ()
    crop: Crop = field(default_factory=Crop)
    after: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        for name, arguments in (*self.before, *self.after):
            if name not in STEPS:
                raise ValueError(f"step {name!r}, expected one of {', '.join(STEPS)}")
            try:
                inspect.signature(STEPS[name]).bind(None, **arguments)
            except TypeError as error:
                raise ValueError(f"step {name}: {error}") from None
            if arguments.get("over", "all") not in OVER:
                raise ValueError(f"step {name} over {arguments['over']!r}, expected one of {', '.join(OVER)}")

    @property
    def id(self) -> str:
        """What manifest, stored case and record call the recipe: LA-paper-1."""
        return f"{self.dataset}-{self.name}-{self.version}"

    @property
    def label_guided(self) -> bool:
        """Whether the box follows the label, which a new scan does not have."""
        return self.crop.around == "label"

    def to_dict(self) -> dict[str, Any]:
        """Strings, numbers, lists and None, which JSON keeps exactly."""
        steps = {part: [{"name": name, "arguments": dict(arguments)} for name, arguments in getattr(self, part)]
                 for part in ("before", "after")}
        return _lists(asdict(self) | steps)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> "Recipe":
        """What `to_dict` gave. Raises DataError for a missing or unknown entry, an unknown step or crop."""
        try:
            values = {key: _tuples(value) for key, value in entry.items()}
            for part in ("before", "after"):
                values[part] = tuple(Step(**_tuples(step)) for step in entry.get(part, ()))
            values["crop"] = Crop(**_tuples(entry.get("crop", {})))
            return cls(**values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"recipe: {type(error).__name__} {error}, expected what Recipe.to_dict gives") from None


class Stored(NamedTuple):
    """A case as stored: image (C, *stored) float32, label (*stored) uint8 or None, and the way back to the scanner."""

    image: np.ndarray
    label: np.ndarray | None
    geometry: Geometry


def apply(recipe: Recipe, image: Scan, label: Scan | None = None) -> Stored:
    """What a recipe makes of an image, voxels (C, i, j, k) or (i, j, k), and of its label on the same grid.

    The image depends on the label only where the recipe is label-guided; without a label such a crop keeps the whole
    scan. Nothing given is changed. Raises DataError for another grid, a label that is no class or that is empty
    though the box follows it, a scan without contrast where intensities are measured, a box without a voxel.
    """
    if image.voxels.ndim == 3:
        image = replace(image, voxels=image.voxels[None])
    mask = _mask(recipe, image)
    geometry = Geometry.of(image, _box(recipe, image, mask, label), recipe.spacing, recipe.orientation)
    growth = math.prod(geometry.stored) / math.prod(geometry.cropped)
    if growth < 1e-4 or growth > 100 and math.prod(geometry.stored) > MOST:
        mm, wanted = (" x ".join(f"{n:g}" for n in spacing) for spacing in (image.spacing, geometry.stored_spacing))
        raise DataError(f"{image.path}: voxels of {mm} mm would become {math.prod(geometry.stored)} of {wanted} mm, "
                        "expected a header in mm (or in the unit that it names)")
    if recipe.before:
        image = replace(image, voxels=_run(recipe.before, _float32(image.voxels), mask, image))
    if mask is not None:
        mask = to_store(replace(image, voxels=mask), geometry, 0)
    voxels = _run(recipe.after, _float32(to_store(image, geometry, recipe.order)), mask, image)
    if not np.isfinite(voxels).all():
        raise DataError(f"{image.path}: NaN or infinite values after the steps of {recipe.id}, expected finite ones")
    return Stored(voxels, None if label is None else to_store(_classes(label), geometry, 0), geometry)


def foreground(volume: np.ndarray) -> np.ndarray:
    """Where a scan without fixed units (MR) is brighter than the air around the body: (*space) to bool of that shape.

    Otsu's threshold (IEEE Trans. Syst. Man Cybern. 9, 1979) on the logarithm of intensities: air and body differ by
    their order of magnitude, whatever coils and fat do to the brightness of the body. Only connected parts of some size
    count. Where there is no air the darkest tissue is left out, where noise is strong some of the air is kept.
    """
    low, high = map(float, np.quantile(volume, TAILS))
    if low == high:
        low, high = float(volume.min()), float(volume.max())
    if low == high:
        return np.zeros(volume.shape, bool)
    scaled = _linear(volume, low, (high - low) / RATIO)
    np.log1p(np.clip(scaled, 0, RATIO, out=scaled), out=scaled)
    counts, edges = np.histogram(scaled, BINS, (0, math.log1p(RATIO)))
    below, weighted = np.cumsum(counts)[:-1], np.cumsum(counts * (edges[1:] + edges[:-1]) / 2)
    above, moment = volume.size - below, weighted[-1]
    apart = (moment * below - weighted[:-1] * volume.size) ** 2 / (below * above).clip(1)
    return _parts(scaled >= edges[1 + int(apart.argmax())])


def body(volume: np.ndarray) -> np.ndarray:
    """Where a CT in HU is denser than -500 and part of something large, (*space) to bool: no air, no table."""
    return _parts(volume > BODY)


def nonzero(volume: np.ndarray) -> np.ndarray:
    """Where a scan without its background (BraTS: skull-stripped) is not zero, (*space) to bool."""
    return volume != 0


def zscore(image: np.ndarray, over: str = "all", mask: np.ndarray | None = None) -> np.ndarray:
    """Zero mean and unit (population) standard deviation per channel over some voxels, applied to all of them.

    `over` is "all", "positive" or "foreground", whose voxels are true in `mask`, shaped as the image. Raises ValueError
    where these voxels are none or all the same.
    """
    result = np.empty(image.shape, np.float32)
    for channel, values, out in zip(image, _measured(image, over, mask), result, strict=True):
        mean, deviation = _moments(values)
        if not deviation > 0:
            raise ValueError(f"the same value in all {values.size} voxels that count ({over}), expected contrast")
        out[...] = _linear(channel, mean, deviation)
    return result


def minmax(image: np.ndarray) -> np.ndarray:
    """[0, 1] per channel, from the least to the greatest intensity. Raises ValueError where they are the same."""
    result = np.empty(image.shape, np.float32)
    for channel, out in zip(image, result, strict=True):
        low, high = float(channel.min()), float(channel.max())
        if low == high:
            raise ValueError(f"the same value in all {channel.size} voxels, expected contrast")
        out[...] = _linear(channel, low, high - low)
    return result


def clip(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Intensities cut off at low and high: a window of a CT in HU."""
    return np.clip(image, np.float32(low), np.float32(high))


def rescale(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """low becomes 0 and high becomes 1; nothing is cut off."""
    return _linear(image, low, high - low)


def clip_share(image: np.ndarray, share: float) -> np.ndarray:
    """Per channel cut off above the least intensity that at least this share of all voxels does not exceed."""
    size = image[0].size
    place = math.ceil(share * size)
    place += -1 if (place - 1) / size >= share else int(place / size < share)  # the product was rounded
    tops = [np.partition(channel, place - 1, axis=None)[place - 1] for channel in image]
    return np.stack([np.minimum(channel, top) for channel, top in zip(image, tops, strict=True)])


def clip_quantiles(
    image: np.ndarray, low: float, high: float, over: str = "all", mask: np.ndarray | None = None
) -> np.ndarray:
    """Per channel cut off at two quantiles (0 to 1, linear in between) of some voxels, as in `zscore`."""
    tails = [np.quantile(values, (low, high)) for values in _measured(image, over, mask)]
    return np.stack([clip(channel, *tail) for channel, tail in zip(image, tails, strict=True)])


MASKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {f.__name__: f for f in (foreground, body, nonzero)}
STEPS: dict[str, Callable[..., np.ndarray]] = {
    f.__name__: f for f in (zscore, minmax, clip, rescale, clip_share, clip_quantiles)}


def _mask(recipe: Recipe, image: Scan) -> np.ndarray | None:
    """What the crop goes around and what steps measure "over foreground", (C, i, j, k); None where neither is asked."""
    around = recipe.crop.around
    measured = any(step.arguments.get("over") == "foreground" for step in (*recipe.before, *recipe.after))
    if around not in MASKS and not measured:
        return None
    return np.stack([MASKS.get(around, foreground)(channel) for channel in image.voxels])


def _box(
    recipe: Recipe, image: Scan, mask: np.ndarray | None, label: Scan | None
) -> list[tuple[int, int]] | None:
    """(start, stop) along the axes of the store in voxels of the scanner; None keeps the whole scan."""
    crop = recipe.crop
    if not crop.around or (recipe.label_guided and label is None):
        return None
    if recipe.label_guided:
        same_grid(image, label, "label")
        kept, what = label.voxels != 0, f"{label.path}: the label is empty, expected a foreground"
    else:
        if crop.channel is not None and not 0 <= crop.channel < len(mask):
            raise DataError(f"{image.path}: {len(mask)} channels, expected one of index {crop.channel} to crop around")
        kept = mask.any(axis=0) if crop.channel is None else mask[crop.channel]
        what = f"{image.path}: no voxel is {crop.around}, expected some"
    if not kept.any():
        raise DataError(f"{what} to crop around ({recipe.id})")
    whole = Geometry.of(image, None, recipe.spacing, recipe.orientation)
    box = []
    for n, (axis, flip) in enumerate(zip(whole.axes, whole.flips, strict=True)):
        hit = np.flatnonzero(kept.any(axis=tuple({0, 1, 2} - {axis})))
        size, start, stop = image.space[axis], int(hit[0]), int(hit[-1]) + 1
        ends = (size - stop, size - start) if flip else (start, stop)
        box.append(_grown(crop, n, ends, size, image.spacing[axis], (recipe.spacing or (None,) * 3)[n]))
    return box


def _grown(
    crop: Crop, n: int, ends: tuple[int, int], size: int, old: float, new: float | None
) -> tuple[int, int]:
    """(start, stop) of the box along axis n of the store around what lies from ends[0] to ends[1] of its voxels.

    `old` and `new` are the distances in mm of voxels before and after resampling.
    """
    if crop.margin[n] is None:
        return 0, size
    unit = 1.0 if new is None else new / old  # a voxel of the store in voxels of the scanner
    start, stop = ends[0] / unit, ends[1] / unit - crop.exclusive
    more = max(crop.smallest[n] - (stop - start), 0) / 2
    more = math.ceil(more - 0.5) if crop.exclusive else more  # halves down
    low, high = np.broadcast_to(crop.margin[n], 2) / (1.0 if crop.voxels else unit * old)
    start, stop = (start - more - low) * unit, (stop + more + high) * unit
    if crop.exclusive:
        start, stop = math.floor(start + 0.5), math.floor(stop + 0.5)
    else:
        start, stop = math.floor(start + 1e-6), math.ceil(stop - 1e-6)
    return max(start, 0), min(stop, size)


def _run(steps: tuple[Step, ...], voxels: np.ndarray, mask: np.ndarray | None, image: Scan) -> np.ndarray:
    for name, arguments in steps:
        measured = {"mask": mask} if arguments.get("over") == "foreground" else {}
        try:
            voxels = STEPS[name](voxels, **arguments, **measured)
        except ValueError as error:
            raise DataError(f"{image.path}: {name}: {error}") from None
    return voxels


def _float32(voxels: np.ndarray) -> np.ndarray:
    """A copy; what is beyond the range becomes infinite."""
    with np.errstate(over="ignore"):
        return voxels.astype(np.float32)


def _classes(label: Scan) -> Scan:
    with np.errstate(invalid="ignore"):
        classes = label.voxels.astype(np.uint8)
    if not np.array_equal(classes, label.voxels):
        raise DataError(f"{label.path}: label values beyond whole numbers from 0 to 255, expected classes")
    return replace(label, voxels=classes)


def _measured(image: np.ndarray, over: str, mask: np.ndarray | None) -> Iterator[np.ndarray]:
    """Per channel the values that count, (n,). Raises ValueError where there is none."""
    for n, channel in enumerate(image):
        values = channel.ravel() if over == "all" else channel[channel > 0 if over == "positive" else mask[n]]
        if not values.size:
            raise ValueError(f"no voxel of channel {n} counts ({over}), expected some")
        yield values


def _moments(values: np.ndarray) -> tuple[float, float]:
    """Mean and population standard deviation, summed in float64 so that the order of the voxels does not matter."""
    mean = values.mean(dtype=np.float64)
    parts = (values[i : i + CHUNK] for i in range(0, values.size, CHUNK))
    squares = sum(np.square(np.subtract(part, mean, dtype=np.float64)).sum() for part in parts)
    return float(mean), math.sqrt(squares / values.size)


def _linear(array: np.ndarray, shift: float, scale: float) -> np.ndarray:
    """(array - shift) / scale in float32, where the difference is rounded only once."""
    result = np.subtract(array, shift, np.empty(array.shape, np.float32), dtype=np.float64, casting="same_kind")
    result /= scale
    return result


def _parts(mask: np.ndarray) -> np.ndarray:
    """The connected parts (by faces) of a mask that have at least a tenth of the voxels of the largest one."""
    from scipy import ndimage

    numbers, count = ndimage.label(mask)
    sizes = np.bincount(numbers[mask], minlength=count + 1)
    return (sizes >= max(1, PART * sizes.max()))[numbers]


def _lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _lists(inner) for key, inner in value.items()}
    return [_lists(inner) for inner in value] if isinstance(value, list | tuple) else value


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(_tuples(inner) for inner in value) if isinstance(value, list | tuple) else value
