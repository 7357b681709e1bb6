"""Prepared data sets: the stored case with the checksum of its content, the card, and the cases as a protocol asks."""

import functools
import hashlib
import json
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.geometry import Geometry
from data_prep.recipes import Recipe, Stored
from data_prep.spec import DataError, DatasetSpec, Protocol, ids_sha256
from data_prep.volumes import (
    cached_image,
    cached_label,
    check_image,
    find_array,
    open_h5,
    read_array,
    read_image,
    read_label,
    whole_file,
    write_h5,
)

SCHEMA = 1  # of the card
CARD, MANIFEST = "dataset.json", "manifest.json"
DEFAULT = "data"  # where data sets are prepared, and looked for, without a word on it
ENTRIES = {  # of the card, in this order
    "schema": int, "name": str, "title": str, "modality": str, "modalities": list, "classes": list, "regions": dict,
    "citation": str, "source": str, "spacing": list, "spacing_known": bool, "label_guided": bool, "recipe": dict,
    "replay": dict, "protocols": dict,
}
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"  # of a data set, which files, folders and records are named after
TYPES = {"float32": "<f4", "float16": "<f2"}  # one byte order, so that the checksum is the same on any machine
CHUNK = 64  # voxels per axis and channel of a compressed case: a crop touches few, and one fits into h5py's cache
MAPPED = 10240  # open files that a process asks for when it maps cases


def write_stored(
    path: Path | str, stored: Stored, recipe_id: str, modalities: Sequence[str], dtype: str = "float32",
    compression: str | None = None,
) -> str:
    """Write a case, whole or not at all; returns the SHA-256 of its content, which no file layout changes.

    Image (C, x, y, z) as float32 or float16, contiguous or with `compression` "lzf" in chunks; label (x, y, z) uint8.
    Raises DataError where the parts do not fit each other, for NaN, infinity, no contrast, values beyond the type, and
    where the folder is not writable.
    """
    path, (image, label, geometry) = Path(path), stored
    if dtype not in TYPES or compression not in (None, "lzf"):
        raise DataError(f"{path}: type {dtype} with compression {compression}, "
                        f"expected {' or '.join(TYPES)} with lzf or none")
    if image.shape != (len(modalities), *geometry.stored):
        raise DataError(f"{path}: image has shape {image.shape}, expected {(len(modalities), *geometry.stored)}")
    if label is not None and (label.shape, label.dtype) != (geometry.stored, np.uint8):
        raise DataError(f"{path}: label has shape {label.shape} and type {label.dtype}, "
                        f"expected {geometry.stored} and uint8")
    check_image(image, path)
    highest, limit = max(abs(float(image.min())), abs(float(image.max()))), float(np.finfo(TYPES[dtype]).max)
    if highest > limit:
        raise DataError(f"{path}: image has values up to {highest:g}, expected at most {limit:g} for {dtype}")
    arrays = {"image": np.ascontiguousarray(image, TYPES[dtype])}
    if label is not None:
        arrays["label"] = np.ascontiguousarray(label)
    text = json.dumps(geometry.to_dict(), sort_keys=True, separators=(",", ":"))
    content = _sha256(arrays, text)
    affine = geometry.stored_affine
    attributes = {
        "recipe": recipe_id, "sha256": content, "geometry": text, "modalities": list(modalities),
        "spacing": geometry.stored_spacing, "affine": affine, "origin": affine[:3, 3],
        "orientation": geometry.orientation, "crop": geometry.crop, "original_shape": geometry.shape,
    }
    chunks = [min(CHUNK, n) for n in geometry.stored]
    packed = {"compression": compression, "shuffle": True}
    options = {"image": packed | {"chunks": (1, *chunks)}, "label": packed | {"chunks": tuple(chunks)}}
    write_h5(path, arrays, attributes, options if compression else None, "a writable folder with space left")
    return content


def read_stored(path: Path | str) -> Stored:
    """A case as written, image as float32. Raises DataError for a damaged file and another checksum than the stated."""
    with open_h5(path) as file:
        stated, text = attribute(file, path, "sha256"), attribute(file, path, "geometry")
        arrays = {"image": read_array(file, path, "image", (4,))}
        if "label" in file:
            arrays["label"] = read_array(file, path, "label", (3,))
    found = _sha256(arrays, text)
    if found != stated:
        raise DataError(f"{path}: content has sha256 {found}, expected {stated} as when it was written")
    return Stored(arrays["image"].astype(np.float32, copy=False), arrays.get("label"), _geometry(path, text))


def read_card(folder: Path | str) -> dict[str, Any]:
    """What dataset.json of a prepared data set says. Raises DataError for none, a damaged one and one of others."""
    path = Path(folder) / CARD
    return _checked(_read_json(path, "the card of a prepared data set"), path)


def write_card(folder: Path | str, card: Mapping[str, Any]) -> None:
    """Write dataset.json, whole or not at all. Raises DataError for a card that `read_card` would refuse."""
    write_json(Path(folder) / CARD, _checked(json.loads(json.dumps(card)), Path(folder) / CARD))


def write_json(path: Path, content: Any) -> None:
    """Write JSON with a final newline, whole or not at all. Raises DataError where the folder is not writable."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with whole_file(path) as temporary:
        # names of files that are not UTF-8 (surrogates): JSON has the same escapes as Python
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def find(root: Path, name: str, recipe: str) -> Path | None:
    """The folder of a data set prepared with a recipe, by what the cards say: root, root/recipe or root/name/recipe.

    The recipe is that for new scans, which files published by others count to, too. Raises DataError where none of the
    places is it and a card there is damaged.
    """
    damaged = None
    for place in _places(root, name, recipe):
        try:
            if recipe_at(place, name) == recipe:
                return place
        except DataError as error:
            damaged = damaged or error
    if damaged:
        raise damaged
    return None


def folder_of(place: Path) -> Path | None:
    """The folder of the card that `place` means: itself, or the first below it with one (DIR/NAME for its recipe)."""
    return next((path.parent for path in (place / CARD, *sorted(place.glob(f"*/{CARD}"))) if path.is_file()), None)


class CaseStore:
    """The cases of a prepared data set as a protocol asks for them: channels, region and resolution.

    Checksums are not gone through at each reading: whoever prepares, or `read_stored`, does that.
    """

    def __init__(self, folder: Path | str, spec: DatasetSpec, protocol: Protocol) -> None:
        """Raises DataError like `read_card`."""
        self.folder, self.spec, self.protocol = Path(folder), spec, protocol
        self.card = read_card(self.folder)
        self.recipe = Recipe.from_dict(self.card["recipe"])

    def image(self, case: str) -> np.ndarray:
        """The scan: float32, (channels, x, y, z), writable without a change of the file.

        What is stored as float32 without compression comes as a memory map, so that only what is used is read. Raises
        DataError for a case that is missing, damaged or of another recipe.
        """
        channels, path, factor = self._channels(), self.path(case), self.protocol.downsample
        with self._open(case) as file:
            data = find_array(file, path, "image", (4,))
            if len(data) != len(self.card["modalities"]):
                raise DataError(f"{path}: 'image' has {len(data)} channels, expected {len(self.card['modalities'])}, "
                                f"the modalities of {CARD}")
            offset = data.id.get_offset() if data.dtype == np.float32 else None  # None where it is in chunks
        if factor > 1:
            image = cached_image(path, self._cache(), case, factor)
        elif offset is None or offset % np.dtype(np.float32).itemsize:
            image = read_image(path)
        else:
            image = _map(path, offset, data.shape)
        first = channels[0]
        if channels == list(range(first, first + len(channels))):
            return image[first : first + len(channels)]  # a view: a map stays one
        return image[channels]

    def label(self, case: str) -> np.ndarray:
        """The classes, or 1 in the protocol's region and 0 elsewhere: uint8, (x, y, z). Raises DataError."""
        region, path, factor, classes = self._region(), self.path(case), self.protocol.downsample, self.card["classes"]
        with self._open(case):
            pass
        if factor == 1:
            return read_label(path, len(classes), region=region)
        # merged first: the most frequent of all classes may be none of a region that fills most of the block
        cache = self._cache() + "".join(f"+{value}" for value in region)
        return cached_label(path, cache, case, factor, len(classes), region=region)

    def spacing(self, case: str) -> tuple[float, ...]:
        """Voxel distance in mm, (x, y, z), after downsampling. Raises DataError."""
        with self._open(case) as file:
            geometry = _geometry(self.path(case), attribute(file, self.path(case), "geometry"))
        return tuple(mm * self.protocol.downsample for mm in geometry.stored_spacing)

    def check(self, cases: Sequence[str]) -> None:
        """Raises DataError where a case is missing, truncated or of another recipe, or the protocol asks for others."""
        kind = self.card["replay"]["name"]  # of published files too, whose own recipe was somebody's
        if kind != self.protocol.recipe:
            raise DataError(f"{self.folder / CARD}: cases of recipe {kind}, expected {self.protocol.recipe}")
        self._channels(), self._region()
        missing = [case for case in cases if not self.path(case).is_file()]
        if missing:
            raise DataError(f"{self.folder}: {len(missing)} of {len(cases)} cases are missing, the first is "
                            f"{self.path(missing[0]).relative_to(self.folder)}; expected all of the split: "
                            "prepare the data set again and see what it says of them")
        for case in cases:
            with self._open(case):
                pass

    def provenance(self, cases: Sequence[str]) -> dict[str, Any]:
        """As in `spec.Store`; "sha256" is over sorted ids and their checksums in manifest.json.

        Raises DataError, also for a case whose own checksum is another, as after a preparation that was killed.
        """
        path = self.folder / MANIFEST
        manifest = _read_json(path, "the manifest of a prepared data set")
        lines = []
        for case in sorted(cases):
            try:
                stated = manifest["cases"][case]["output"]["sha256"]
            except (KeyError, TypeError) as error:
                raise DataError(f"{path}: no checksum of a case ({error}), expected cases: id: output: sha256") \
                    from None
            with self._open(case) as file:
                found = attribute(file, self.path(case), "sha256")
            if found != stated:
                raise DataError(f"{self.path(case)}: content {found:.8}, expected {stated!s:.8} as {MANIFEST} says: "
                                "prepare the data set again")
            lines.append(f"{case} {stated}")
        return {"recipe": self.recipe.id, "sha256": ids_sha256(lines), "label_guided": self.card["label_guided"],
                "spacing_known": self.card["spacing_known"]}

    def replay(self) -> dict[str, Any]:
        """What `Recipe.from_dict` takes: the recipe for new scans."""
        return self.card["replay"]

    def path(self, case: str) -> Path:
        """File of a case, whether it is there or not."""
        return self.folder / "cases" / f"{case}.h5"

    @contextmanager
    def _open(self, case: str) -> Iterator:
        """The h5 file of a case of this recipe."""
        path = self.path(case)
        with open_h5(path) as file:
            found = attribute(file, path, "recipe")
            if found != self.recipe.id:
                raise DataError(f"{path}: recipe {found}, expected {self.recipe.id} as {CARD} says")
            yield file

    def _cache(self) -> str:
        """Name of the data set in the cache, another one for each recipe."""
        return f"{self.card['name']}-{self.recipe.name}-{self.recipe.version}"

    def _channels(self) -> list[int]:
        """Where the modalities of the protocol are in a stored image."""
        have, wanted = self.card["modalities"], self.spec.channels(self.protocol)
        if len(set(wanted)) != len(wanted) or not set(wanted) <= set(have):
            raise DataError(f"{self.folder / CARD}: modalities {', '.join(have)}, expected {', '.join(wanted)}, each "
                            f"once, for protocol {self.protocol.name}")
        return [have.index(modality) for modality in wanted]

    def _region(self) -> tuple[int, ...]:
        """Classes to merge into 1, () where the labels are what the protocol asks for already."""
        have, region = tuple(self.card["classes"]), self.protocol.region
        if region and len(have) == 2 and have[1] == region:
            return ()
        if have != self.spec.classes or region and region not in self.spec.regions:
            wanted = f"a region {region!r} of" if region else "the classes"
            raise DataError(f"{self.folder / CARD}: classes {', '.join(have)}, expected {wanted} "
                            f"{', '.join(self.spec.classes)} for protocol {self.protocol.name}")
        return self.spec.regions[region] if region else ()


def opener(name: str) -> Callable[[Path | None, Protocol], CaseStore]:
    """For `DatasetSpec.open`: the prepared cases of a built-in data set below a folder or the one of SSL4MIS_DATA.

    The opener raises DataError with what was found, the places looked at and how to get the data.
    """

    def open_store(root: Path | None, protocol: Protocol) -> CaseStore:
        from data_prep import dataset  # which imports the module that calls this

        spec = dataset(name)
        folder = data_folder(name, root, spec.how_to_get)
        found = find(folder, name, protocol.recipe)
        if found is None:
            others = _others(folder, name)
            have = f"recipe {' and '.join(others)}" if others else "nothing prepared"
            places = "{}, {} or {}".format(*_places(folder, name, protocol.recipe))
            raise DataError(f"{name}: found {have}, expected recipe {protocol.recipe} in {places}: {spec.how_to_get}")
        return CaseStore(found, spec, protocol)

    return open_store


def data_folder(name: str, root: Path | None, how_to_get: str) -> Path:
    """The given folder or that of SSL4MIS_DATA. Raises DataError where there is none."""
    place = root or os.environ.get("SSL4MIS_DATA") or (DEFAULT if Path(DEFAULT).is_dir() else None)
    if not place:
        raise DataError(f"{name}: no data folder is given (--data-root DIR or SSL4MIS_DATA=DIR): {how_to_get}")
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise DataError(f"{name}: {folder} is not a folder: {how_to_get}")
    return folder


def spec_of(folder: Path | str) -> DatasetSpec:
    """Own data as its card describes them; `open` takes the cases of this very folder. Raises DataError."""
    folder = Path(folder)
    card = read_card(folder)
    protocols = {}
    for name, entry in card["protocols"].items():
        try:
            protocols[name] = _protocol(entry)
        except (AttributeError, TypeError) as error:
            raise DataError(f"{folder / CARD}: protocol {name} is none ({error}), "
                            "expected the entries of data_prep.spec.Protocol") from None
    if not protocols:
        raise DataError(f"{folder / CARD}: no protocol to train by, expected one, which takes folds: labels of at "
                        "least two patients")
    return DatasetSpec(
        name=card["name"],
        title=card["title"],
        modality=card["modality"],
        classes=tuple(card["classes"]),
        spacing=tuple(card["spacing"]),
        citation=card["citation"],
        how_to_get=f"prepared in {folder}",
        open=lambda root, protocol: CaseStore(folder, spec_of(folder), protocol),
        protocols=protocols,
        modalities=tuple(card["modalities"]),
        regions={name: tuple(values) for name, values in card["regions"].items()},
        splits=folder / "splits",
    )


def _protocol(entry: Mapping[str, Any]) -> Protocol:
    """Raises AttributeError or TypeError for what is no protocol."""
    found = Protocol(**{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()})
    for part in fields(Protocol):
        value, (kind, *_) = getattr(found, part.name), typing.get_args(part.type) or (part.type,)
        several = kind is not part.type
        if several != isinstance(value, tuple) or not all(
                isinstance(each, int | float if kind is float else kind) for each in (value if several else [value])):
            raise TypeError(f"{part.name} is {value!r}")
    if not (found.patch and found.stride and found.labeled):
        raise TypeError("patch, stride or labeled is empty")
    return found


def _places(root: Path, name: str, recipe: str) -> tuple[Path, Path, Path]:
    return root, root / recipe, root / name / recipe


def recipe_at(place: Path, name: str) -> str:
    """Name of the recipe that a data set in a folder goes with, "" where the card is of another or missing."""
    path = place / CARD
    card = _read_json(path, "the card of a prepared data set") if path.is_file() else {}
    if card.get("name") != name or "schema" not in card:  # other tools have a dataset.json, too
        return ""
    return _checked(card, path)["replay"]["name"]


def _others(root: Path, name: str) -> list[str]:
    """Recipes that a data set is prepared with in or below a folder, where `find` could have met them."""
    found = set()
    for path in (root, *root.glob("*/"), *(root / name).glob("*/")):
        with suppress(DataError):
            found.add(recipe_at(path, name))
    return sorted(found - {""})


def _sha256(arrays: Mapping[str, np.ndarray], geometry: str) -> str:
    """Over name, type, shape and bytes of each array and the geometry as JSON."""
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    digest.update(geometry.encode("utf-8", "surrogateescape"))  # as h5py reads damaged text
    return digest.hexdigest()


def attribute(file, path: Path | str, name: str) -> str:
    """A text that `write_stored` has put into a file. Raises DataError where there is none."""
    value = file.attrs.get(name)
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if not isinstance(value, str):  # which h5py writes unless told otherwise
        raise DataError(f"{path}: no readable attribute '{name}', expected a case as data_prep.prepare writes it")
    return value


def _geometry(path: Path | str, text: str) -> Geometry:
    try:
        return Geometry.from_dict(json.loads(text))
    except ValueError:
        raise DataError(f"{path}: attribute 'geometry' is no JSON, expected what Geometry.to_dict gives") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _map(path: Path, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 values in a file as a memory map, whose changes stay in memory."""
    _allow_many_maps()
    try:
        return np.memmap(path, np.float32, "c", offset, shape)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be mapped into memory ({reason}), expected a readable file") from None


@functools.cache
def _allow_many_maps() -> None:
    """Raise the soft limit of open files: each map holds one, and the usual 256 to 1024 are soon used up."""
    with suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows, where maps are not counted

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MAPPED if hard == resource.RLIM_INFINITY else min(MAPPED, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _read_json(path: Path, expected: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, expected {expected} (python -m data_prep.prepare)") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: damaged or unreadable ({reason}), expected {expected}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: a JSON {type(content).__name__}, expected {expected}")
    return content


def _checked(card: dict[str, Any], path: Path) -> dict[str, Any]:
    """The card, if it is complete. Raises DataError naming the first entry that is not."""
    for name, kind in ENTRIES.items():
        if name not in card:
            raise DataError(f"{path}: no entry '{name}', expected the card of a prepared data set "
                            "(python -m data_prep.prepare)")
        if not isinstance(card[name], kind) or kind is int and card[name] != SCHEMA:
            wanted = SCHEMA if kind is int else f"a {kind.__name__}"
            raise DataError(f"{path}: {name} is {card[name]!r}, expected {wanted}")
    if not re.fullmatch(NAME, card["name"]):
        raise DataError(f"{path}: name is {card['name']!r}, expected letters, digits, '.', '_' and '-'")
    for name, least in (("modalities", 1), ("classes", 2)):
        if len(card[name]) < least or not all(isinstance(text, str) for text in card[name]):
            raise DataError(f"{path}: {name} is {card[name]!r}, expected names, at least {least}")
    count = len(card["classes"])
    for name, part in card["regions"].items():
        if not isinstance(part, list) or not part or not all(value in range(count) for value in part):
            raise DataError(f"{path}: region {name} is {part!r}, expected a list of classes, 0 to {count - 1}")
    if len(card["spacing"]) != 3 or not all(isinstance(mm, int | float) and mm > 0 for mm in card["spacing"]):
        raise DataError(f"{path}: spacing is {card['spacing']}, expected 3 numbers above 0 mm")
    for name in ("recipe", "replay"):
        try:
            Recipe.from_dict(card[name])
        except DataError as error:
            raise DataError(f"{path}: {name}: {error}") from None
    return card
