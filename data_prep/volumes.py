"""The field's case files (h5 with `image` and `label`): reading, writing, validation, downsampling and its cache."""

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.spec import DataError

DENSEST = 1100  # bytes of an array in one of a file: gzip packs no more than 1032 into one
SMALL = 2**28  # bytes of an array that is read whatever the file holds of it
CACHE_VERSION = 1  # raise it when the downsampling changes: older cache files are then redone


def read_image(path: Path | str, spatial_dims: int = 3) -> np.ndarray:
    """The scan of a case file: float32, (channels, *space), where a file without a channel axis gets one.

    Raises DataError for a missing or damaged file, a missing key, a wrong number of axes, an empty or constant volume,
    NaN or infinity.
    """
    with open_h5(path) as file:
        # values beyond the range of float32 become infinite here and are refused below
        with np.errstate(over="ignore"):
            image = read_array(file, path, "image", (spatial_dims, spatial_dims + 1)).astype(np.float32, copy=False)
    check_image(image, path)
    return image if image.ndim == spatial_dims + 1 else image[None]


def read_label(path: Path | str, classes: int, spatial_dims: int = 3, region: Sequence[int] = ()) -> np.ndarray:
    """The classes of a case file: uint8, (*space), values 0 to classes-1; of the image only the shape is looked at.

    With a `region` 1 where the class is one of it and 0 elsewhere. Raises DataError like `read_image`, and for values
    that are no class and a shape other than the image's.
    """
    with open_h5(path) as file:
        label = read_array(file, path, "label", (spatial_dims,))
        space = file["image"].shape[-spatial_dims:] if "image" in file else label.shape
        if label.shape != space:
            raise DataError(f"{path}: 'label' has shape {label.shape}, expected {space}, the shape of 'image'")
    values = np.unique(label)
    for value in values.tolist():
        if value not in range(classes):
            raise DataError(f"{path}: 'label' has the value {value:g}, expected 0 to {classes - 1}")
    return np.isin(label, region).astype(np.uint8) if region else label.astype(np.uint8, copy=False)


def check_image(image: np.ndarray, path: Path | str) -> None:
    """Raises DataError for NaN, infinity and the same value everywhere."""
    bad = image.size - int(np.count_nonzero(np.isfinite(image)))
    if bad:
        raise DataError(f"{path}: 'image' has {bad} voxels with NaN or infinity, expected finite values")
    low, high = float(image.min()), float(image.max())
    if low == high:
        raise DataError(f"{path}: 'image' is {low:g} everywhere, expected a scan with contrast")


def write_case(path: Path | str, image: np.ndarray, label: np.ndarray | None = None) -> None:
    """Write a case file that appears whole or not at all; image (channels, *space) or (*space), label (*space).

    A single channel is stored without its axis, as the field does. Raises DataError where the folder is not writable.
    """
    image = np.asarray(image, dtype=np.float32)
    if label is not None:
        label = np.asarray(label)
        image = image[0] if image.ndim == label.ndim + 1 and len(image) == 1 else image
        if image.shape[image.ndim - label.ndim :] != label.shape:
            raise DataError(f"{path}: label has shape {label.shape}, expected that of the image, {image.shape}")
        if label.size and not 0 <= label.min() <= label.max() <= 255:
            raise DataError(f"{path}: label has values {label.min()} to {label.max()}, expected 0 to 255")
    arrays = {"image": image} if label is None else {"image": image, "label": label.astype(np.uint8)}
    write_h5(Path(path), arrays, options={name: {"compression": "gzip"} for name in arrays})


def downsample(image: np.ndarray, label: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """`downsample_image` and `downsample_label` of one case."""
    return downsample_image(image, factor), downsample_label(label, factor)


def downsample_image(image: np.ndarray, factor: int) -> np.ndarray:
    """Mean over blocks of factor^d voxels, (channels, *space) float32; planes beyond the last whole block are dropped.

    Raises ValueError for a factor below 1 or beyond the smallest axis.
    """
    blocks = _blocks(image, factor, first_axis=1)
    # float64: the mean must not depend on the order of summation
    return blocks.mean(axis=_inner(blocks, 1), dtype=np.float64).astype(np.float32)


def downsample_label(label: np.ndarray, factor: int) -> np.ndarray:
    """Most frequent class of every block of factor^d voxels, (*space) uint8; a tie goes to the lower class.

    Raises ValueError like `downsample_image`.
    """
    blocks = _blocks(label, factor, first_axis=0)
    inner = _inner(blocks, 0)
    result = np.zeros(blocks.shape[::2], np.uint8)
    best = np.count_nonzero(blocks == 0, axis=inner)
    for value in np.unique(label).tolist():
        count = np.count_nonzero(blocks == value, axis=inner)
        result[count > best] = value
        best = np.maximum(best, count)
    return result


def cached_image(path: Path, dataset: str, case: str, factor: int, spatial_dims: int = 3) -> np.ndarray:
    """`downsample_image` of a case file, done once and then read from the cache; the label is not touched.

    Redone when size or modification time of the case file change. Raises DataError like `read_image`.
    """
    target = _cache_folder(dataset, factor) / f"{case}.image.h5"
    key = _key(path)  # before reading: a source that changes meanwhile leaves a cache file that is redone
    found = _cache_read(target, key, "image")
    if found is None:
        found = downsample_image(read_image(path, spatial_dims), factor)
        write_h5(target, {"image": found}, key)
    return found


def cached_label(
    path: Path, dataset: str, case: str, factor: int, classes: int, spatial_dims: int = 3, region: Sequence[int] = ()
) -> np.ndarray:
    """`downsample_label` of a case file, done once and then read from the cache.

    A `region` needs a name in place of `dataset` that belongs to it alone. Redone when size or modification time of
    the case file change. Raises DataError like `read_label`.
    """
    target = _cache_folder(dataset, factor) / f"{case}.label.h5"
    key = _key(path)  # before reading: a source that changes meanwhile leaves a cache file that is redone
    found = _cache_read(target, key, "label")
    if found is None:
        found = downsample_label(read_label(path, classes, spatial_dims, region), factor)
        write_h5(target, {"label": found}, key)
    return found


def cache_root() -> Path:
    """Folder of the cache: SSL4MIS_CACHE, else ssl4mis under XDG_CACHE_HOME or ~/.cache."""
    given = os.environ.get("SSL4MIS_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssl4mis"


def _cache_folder(dataset: str, factor: int) -> Path:
    return cache_root() / f"{dataset}-x{factor}"


def _key(source: Path) -> dict[str, int]:
    try:
        stat = source.stat()
    except OSError:
        raise DataError(f"{source}: no such file, expected an h5 file with 'image' and 'label'") from None
    return {"version": CACHE_VERSION, "source_size": stat.st_size, "source_mtime_ns": stat.st_mtime_ns}


def _cache_read(target: Path, key: dict[str, int], name: str) -> np.ndarray | None:
    """The cached array, or None when there is none, when it is of an older source or damaged."""
    import h5py

    try:
        with h5py.File(target, "r") as file:
            fresh = all(int(file.attrs.get(part, -1)) == value for part, value in key.items())
            return file[name][()] if fresh else None
    except (OSError, KeyError, RuntimeError):
        return None


@contextmanager
def open_h5(path: Path | str) -> Iterator:
    """The open h5py.File. Raises DataError for a missing, truncated or other file and what h5py stumbles on in it."""
    import h5py

    if not Path(path).is_file():
        raise DataError(f"{path}: no such file, expected an h5 file with 'image' and 'label'")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: not an h5 file, truncated or unreadable ({_reason(error)}), expected an h5 file") \
            from None
    with file:
        try:
            yield file
        except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:  # one flipped bit: h5py raises any
            raise DataError(f"{path}: damaged ({_reason(error)}), expected a readable h5 file") from None


def find_array(file, path: Path | str, name: str, axes: Sequence[int]):
    """The h5py.Dataset of that name, unread.

    Raises DataError for none, no numbers, a number of axes not listed, or far more values than the file holds.
    """
    import h5py

    data = file.get(name)
    if not isinstance(data, h5py.Dataset):
        keys = ", ".join(map(str, file)) or "none"
        raise DataError(f"{path}: no array '{name}', expected the keys 'image' and 'label' (found: {keys})")
    if data.dtype.kind not in "biuf":
        raise DataError(f"{path}: '{name}' has the type {data.dtype}, expected numbers")
    if len(data.shape) not in axes or 0 in data.shape:
        allowed = " or ".join(map(str, axes))
        raise DataError(f"{path}: '{name}' has shape {data.shape}, expected {allowed} axes, none of them empty")
    stored = data.id.get_storage_size()
    if data.nbytes > max(SMALL, DENSEST * stored):  # damaged: reading it would take the memory of the machine
        raise DataError(f"{path}: '{name}' has shape {data.shape} and {stored} bytes in the file, expected all values")
    return data


def read_array(file, path: Path | str, name: str, axes: Sequence[int]) -> np.ndarray:
    """The values of `find_array`, of the stored type. Raises DataError, for damaged bytes, too."""
    data = find_array(file, path, name, axes)
    try:
        return data[()]
    except (OSError, RuntimeError, MemoryError) as error:
        raise DataError(f"{path}: '{name}' is damaged ({_reason(error)}), expected a readable array") from None


def write_h5(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    attributes: Mapping[str, Any] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    expected: str = "a writable folder (SSL4MIS_CACHE)",
) -> None:
    """Write arrays, attributes of the file and h5py's options per array; the file appears whole or not at all.

    Raises DataError naming what was `expected` where the folder is not writable.
    """
    import h5py

    # put together in memory: on a full disk HDF5 prints tracebacks, and under a compressed file it ends the process
    with h5py.File(path, "w", driver="core", backing_store=False) as file:
        for name, value in (attributes or {}).items():
            file.attrs[name] = _fixed(value)
        for name, array in arrays.items():
            file.create_dataset(name, data=array, **(options or {}).get(name, {}))
        file.flush()
        content = file.id.get_file_image()
    with whole_file(path, expected) as temporary:
        temporary.write_bytes(content)


def _fixed(value: Any) -> Any:
    """Text, or a list of texts, of a fixed length: of other text HDF5 can hang or crash when a byte is damaged."""
    import h5py

    texts = [value] if isinstance(value, str) else value
    if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        return value
    coded = [text.encode("utf-8", "surrogateescape") for text in texts]  # as h5py does
    kind = h5py.string_dtype("utf-8", max(map(len, coded), default=0) or 1)
    return np.array(coded[0] if isinstance(value, str) else coded, kind)


@contextmanager
def whole_file(path: Path, expected: str = "a writable folder") -> Iterator[Path]:
    """A place to write to, which becomes `path` when all went well and is gone otherwise.

    Raises DataError naming what was `expected` where the folder is not writable.
    """
    # in the same folder, since only there os.replace is atomic; the name is new, so that two writers never meet
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({_reason(error)}), expected {expected}") from None
    finally:
        with suppress(OSError):  # gone already, or its folder never came to be
            temporary.unlink()


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())


def _blocks(array: np.ndarray, factor: int, first_axis: int) -> np.ndarray:
    """View of (..., *space) as (..., n0, factor, n1, factor, ...), last incomplete blocks cut off."""
    lead, space = array.shape[:first_axis], array.shape[first_axis:]
    if not 1 <= factor <= min(space):
        raise ValueError(f"downsampling factor {factor}, expected 1 to {min(space)}, the smallest axis of {space}")
    counts = [size // factor for size in space]
    cut = array[(slice(None),) * first_axis + tuple(slice(n * factor) for n in counts)]
    return cut.reshape(*lead, *(size for n in counts for size in (n, factor)))


def _inner(blocks: np.ndarray, first_axis: int) -> tuple[int, ...]:
    return tuple(range(first_axis + 1, blocks.ndim, 2))
