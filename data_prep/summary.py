"""What a prepared data set looks like: ranges and oddities as JSON and Markdown, and a contact sheet."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.geometry import Geometry, to_store
from data_prep.recipes import Stored
from data_prep.scans import Scan, spacing_of
from data_prep.spec import Protocol
from data_prep.volumes import whole_file

SHARES = (0, 1, 5, 50, 95, 99, 100)  # % of the voxels: the quantiles of the intensities
SPACING_FACTOR = 1.5  # a spacing this many times the median, or one part of it, differs much
STACK = 3.0  # planes this many times as far apart as pixels make a stack, which is read plane by plane
LISTED = 6  # ids per line of the Markdown; the JSON has all

AT_MOST = 60  # cases of a contact sheet
# by class from 1; to be seen on black, gray and white
COLORS = ("#ff453a", "#22b8ff", "#39d353", "#ff9f0a", "#c77dff", "#ffd60a", "#ff6ec7", "#00d6c2")
BACKGROUND, INK, FAINT = "#14161a", "#f2f2f2", "#9aa0a8"
GAP, MARGIN, CAPTION, HEADER = 4, 14, 15, 66  # pixels of the sheet
WIDTH = 1920  # of the sheet, which the tiles of a row stay below
DPI = 100


class Plane(NamedTuple):
    """A plane of a case as shown: `image` (rows, columns) uint8, `label` the same with classes, `spacing` in mm.

    `across` is the axis of the stored case that the plane cuts.
    """

    across: int
    image: np.ndarray
    label: np.ndarray
    spacing: tuple[float, float]


class Tile(NamedTuple):
    """A case on the contact sheet: its id and the planes through it, axial, coronal, sagittal."""

    case: str
    planes: tuple[Plane, ...]


def facts(stored: Stored, modalities: Sequence[str], classes: Sequence[str]) -> dict[str, Any]:
    """Shape, spacing (mm), intensities at `SHARES` by modality and, by class, voxels and ml of a stored case."""
    spacing = stored.geometry.stored_spacing
    entry = {
        "shape": [int(n) for n in stored.image.shape[1:]],
        "spacing": [_short(mm) for mm in spacing],
        "intensities": {name: [_short(value) for value in np.percentile(channel, SHARES)]
                        for name, channel in zip(modalities, stored.image, strict=True)},
        "voxels": None,
        "ml": None,
    }
    if stored.label is not None:
        counts = np.bincount(stored.label.ravel(), minlength=len(classes)).tolist()
        entry["voxels"] = {name: counts[value] for value, name in enumerate(classes) if value}
        milliliters = float(np.prod(spacing)) / 1000
        entry["ml"] = {name: _short(count * milliliters) for name, count in entry["voxels"].items()}
    return entry


def summarize(
    cases: Mapping[str, Mapping[str, Any]], duplicates: Sequence[Sequence[str]], protocol: Protocol | None
) -> dict[str, Any]:
    """Ranges over all cases (least, median, greatest) and what is odd, from the `facts` of cases by id.

    `protocol` is the one whose patch the volumes are compared with.
    """
    spacings = np.array([entry["spacing"] for entry in cases.values()])
    median = np.median(spacings, axis=0)
    labeled = {case: entry for case, entry in cases.items() if entry["voxels"] is not None}
    first = next(iter(cases.values()))
    classes = list(next(iter(labeled.values()))["voxels"]) if labeled else []
    ratio = np.maximum(spacings / median, median / spacings).max(axis=1)
    odd = {
        "duplicates": [list(group) for group in duplicates],
        "empty": {name: [case for case, entry in labeled.items() if not entry["voxels"][name]] for name in classes},
        "spacing": [case for case, times in zip(cases, ratio, strict=True) if times >= SPACING_FACTOR],
        "smaller_than_patch": [case for case, entry in cases.items()
                               if protocol and _smaller(entry["shape"], protocol)],
    }
    intensities = {
        name: {str(share): _range(entry["intensities"][name][n] for entry in cases.values())
               for n, share in enumerate(SHARES)}
        for name in first["intensities"]
    }
    return {
        "cases": len(cases),
        "labeled": len(labeled),
        "shape": [_range(entry["shape"][axis] for entry in cases.values()) for axis in range(3)],
        "spacing": [_range(spacings[:, axis]) for axis in range(3)],
        "ml": {name: _range(entry["ml"][name] for entry in labeled.values()) for name in classes},
        "intensities": intensities,
        "patch": {"protocol": protocol.name, "patch": list(protocol.patch), "downsample": protocol.downsample}
        if protocol else None,
        "odd": odd,
    }


def markdown(summary: Mapping[str, Any]) -> str:
    """The summary for people: a table of ranges and the list of what to look at."""
    lines = [f"# {summary['title']}", "", f"{summary['name']}, recipe `{summary['recipe']}`: "
             f"{plural(summary['cases'])}, {summary['labeled']} with a label.", ""]
    if summary["groups"]:
        lines += ["Groups: " + ", ".join(f"{name} {count}" for name, count in summary["groups"].items()) + ".", ""]
    lines += ["| | least | median | greatest |", "| --- | --- | --- | --- |"]
    rows = [(f"voxels along {axis}", entry) for axis, entry in zip("xyz", summary["shape"], strict=True)]
    rows += [(f"spacing along {axis} (mm)", entry) for axis, entry in zip("xyz", summary["spacing"], strict=True)]
    rows += [(f"volume of {name} (ml)", entry) for name, entry in summary["ml"].items()]
    rows += [(f"{name}, intensity at {share} %", entry) for name, entries in summary["intensities"].items()
             for share, entry in entries.items()]
    lines += [f"| {name} | " + " | ".join(f"{value:.4g}" for value in entry) + " |" for name, entry in rows]
    lines += ["", "## To look at", ""]
    lines += [f"- {remark}" for remark in remarks(summary)] or ["Nothing stands out."]
    if summary["bad"]:
        lines += ["", f"## Left out: {plural(len(summary['bad']))}", ""]
        lines += [f"- {case}: {line}" for case, line in summary["bad"].items()]
    return "\n".join(lines) + "\n"


def plural(count: int) -> str:
    """1 case, 2 cases."""
    return f"{count} case{'s' * (count != 1)}"


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """What is odd about the data set, a line each."""
    odd, total = summary["odd"], summary["cases"]
    lines = [f"the same scan: {', '.join(group)}" for group in odd["duplicates"]]
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, ids in odd["empty"].items():
        alike.setdefault(tuple(ids), []).append(name)
    for ids, classes in alike.items():
        more = f" and {len(classes) - LISTED} more classes" if len(classes) > LISTED else ""
        if ids:
            lines.append(f"no voxel of {', '.join(classes[:LISTED])}{more}: {_listed(ids, summary['labeled'])}")
    if odd["spacing"]:
        lines.append(f"spacing {SPACING_FACTOR:g} times the median or more, or that part of it: "
                     + _listed(odd["spacing"], total))
    if odd["smaller_than_patch"]:
        patch = "x".join(map(str, summary["patch"]["patch"]))
        lines.append(f"smaller than the patch {patch} of protocol {summary['patch']['protocol']}, so that crops are "
                     f"padded: {_listed(odd['smaller_than_patch'], total)}")
    return lines + list(summary["notes"])


def chosen(cases: Sequence[str]) -> list[str]:
    """The cases of the contact sheet: all, or `AT_MOST` evenly spread over them."""
    if len(cases) <= AT_MOST:
        return list(cases)
    return [cases[n * len(cases) // AT_MOST] for n in range(AT_MOST)]


def tile(case: str, stored: Stored) -> Tile:
    """The planes of a case through the middle of its label, else of the volume, seen as radiologists do.

    That is, the patient's right is on the left and front or head are up. Of several channels the first is shown, from
    the 1st to the 99th percentile.
    """
    affine, path = stored.geometry.stored_affine, Path(case)
    label = np.zeros(stored.image.shape[1:], np.uint8) if stored.label is None else stored.label
    low, high = np.percentile(stored.image[0], (1, 99))
    if low == high:  # a small structure on an even background
        low, high = float(stored.image[0].min()), float(stored.image[0].max())
    shown = Geometry.of(Scan(label, affine, path), orientation="LPI")
    label = to_store(Scan(label, affine, path), shown, 0)
    image = to_store(Scan(stored.image[0], affine, path), shown, 0)
    spacing = spacing_of(shown.stored_affine)
    planes = []
    for across, center in reversed(list(enumerate(_middle(label)))):
        rows, columns = [axis for axis in (2, 1, 0) if axis != across]
        gray = np.take(image, center, axis=across).T
        gray = np.clip((gray - low) / max(high - low, 1e-12), 0, 1) * 255
        classes = np.ascontiguousarray(np.take(label, center, axis=across).T)
        planes.append(Plane(shown.axes[across], np.rint(gray).astype(np.uint8), classes,
                            (spacing[rows], spacing[columns])))
    return Tile(case, tuple(planes))


def contact_sheet(
    path: Path, tiles: Sequence[Tile], title: str, classes: Sequence[str], spacing: Sequence[float], note: str = ""
) -> None:
    """Write a PNG with a tile per case: label contours over three planes, or over one where planes are far apart.

    `spacing` is the usual one in mm along the axes of the stored cases; `classes` start with the background. The same
    input gives the same bytes. Raises DataError where the file cannot be written.
    """
    single = max(spacing) >= STACK * min(spacing)
    planes = [[plane for plane in tile.planes if not single or plane.across == int(np.argmax(spacing))]
              for tile in tiles]
    edge = next(edge for count, edge in ((4, 320), (16, 230), (AT_MOST, 150)) if len(tiles) <= count)
    pictures = [_pictures(case, edge, len(classes)) for case in planes]
    widths = [max(case[n].shape[1] for case in pictures) for n in range(len(pictures[0]))]
    cell = sum(widths) + GAP * (len(widths) - 1)
    columns = max(1, min(len(tiles), (WIDTH - 2 * MARGIN + 2 * GAP) // (cell + 2 * GAP)))
    heights = [max(picture.shape[0] for case in pictures[n : n + columns] for picture in case)
               for n in range(0, len(tiles), columns)]
    tops = [HEADER + sum(heights[:row]) + row * (CAPTION + 2 * GAP) for row in range(len(heights) + 1)]
    seen = "slice" if single else "axial, coronal and sagittal plane"
    note = f"{seen} through the middle of the label, 1 to 99 % of the intensities{note}"
    # what the widest line of the header may take
    least = 2 * MARGIN + max(9 * len(title), 6 * len(note), sum(30 + 7 * len(name) for name in classes[1:]))
    across = max(2 * MARGIN + columns * (cell + 2 * GAP) - 2 * GAP, least)
    canvas = np.empty((tops[-1] + MARGIN, across, 3), np.uint8)
    canvas[:] = _rgb(BACKGROUND)
    captions = []
    for n, (case, parts) in enumerate(zip(tiles, pictures, strict=True)):
        top, left = tops[n // columns], MARGIN + n % columns * (cell + 2 * GAP)
        captions.append((left, top + CAPTION - 4, case.case))
        for width, part in zip(widths, parts, strict=True):
            canvas[top + CAPTION : top + CAPTION + part.shape[0], left : left + part.shape[1]] = part
            left += width + GAP
    _save(path, canvas, captions, title, note, classes)


def _pictures(planes: Sequence[Plane], edge: int, classes: int) -> list[np.ndarray]:
    """Planes of a case in one scale, (rows, columns, 3) uint8, the longest side `edge` pixels."""
    longest = max(n * mm for plane in planes for n, mm in zip(plane.image.shape, plane.spacing, strict=True))
    result = []
    for plane in planes:
        shape = tuple(max(1, round(n * mm * edge / longest))
                      for n, mm in zip(plane.image.shape, plane.spacing, strict=True))
        picture = np.repeat(np.rint(_resized(plane.image, shape, smooth=True)).astype(np.uint8)[..., None], 3, axis=-1)
        contours = _contours(plane.label, shape)
        for value in range(1, classes):
            picture[contours == value] = _rgb(COLORS[(value - 1) % len(COLORS)])
        result.append(picture)
    return result


def _contours(label: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The class of every pixel on an outline, elsewhere 0; what lies between two classes belongs to the inner one."""
    from scipy import ndimage

    present = np.unique(label)
    # the most probable class of linear interpolation: outlines as smooth as the pixels allow
    classes = present[np.stack([_resized(label == value, shape) for value in present]).argmax(axis=0)]
    inward = [value for value in present if value]
    inward.sort(key=lambda value: -np.count_nonzero(ndimage.binary_fill_holes(classes == value)))
    depth = np.zeros(256, np.uint8)
    depth[inward] = 1 + np.arange(len(inward))
    depths = depth[classes]
    cross = ndimage.generate_binary_structure(2, 1)
    return np.where(ndimage.minimum_filter(depths, footprint=cross, mode="nearest") < depths, classes, 0)


def _resized(plane: np.ndarray, shape: tuple[int, int], smooth: bool = False) -> np.ndarray:
    """(rows, columns) on another number of pixels over the same area, linear; `smooth` where it shrinks."""
    from scipy import ndimage

    source, scale = plane.astype(np.float32), np.array(plane.shape) / np.array(shape)
    if smooth:
        source = ndimage.gaussian_filter(source, np.maximum(scale - 1, 0) / 2)
    return ndimage.affine_transform(source, scale, 0.5 * scale - 0.5, shape, order=1, mode="nearest")


def _middle(label: np.ndarray) -> list[int]:
    """Per axis the plane that halves the foreground, so that there is some on it; of an empty label the middle."""
    middle = []
    for axis in range(3):
        counts = np.count_nonzero(label, axis=tuple(other for other in range(3) if other != axis)).cumsum()
        middle.append(int(np.searchsorted(counts, counts[-1] / 2)) if counts[-1] else len(counts) // 2)
    return middle


def _save(
    path: Path, canvas: np.ndarray, captions: Iterable[tuple[int, int, str]], title: str, note: str,
    classes: Sequence[str],
) -> None:
    # without pyplot: no window system, no state, and the settings of the user's matplotlibrc that matter are given
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = canvas.shape[:2]
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="black")
    agg = FigureCanvasAgg(figure)
    figure.figimage(canvas, origin="upper")

    def write(left: float, bottom: float, text: str, size: float, color: str = INK, weight: str = "normal") -> float:
        """Text at pixels from the left and top; where it ends."""
        drawn = figure.text(left / width, 1 - bottom / height, text, size=size, color=color, weight=weight,
                            family="DejaVu Sans", parse_math=False)
        return drawn.get_window_extent(agg.get_renderer()).x1

    write(MARGIN, 22, title, 10, weight="bold")
    write(MARGIN, 38, note, 7.5, FAINT)
    left = MARGIN
    for n, name in enumerate(classes[1:]):
        left = write(left, 55, "\N{BLACK SQUARE}", 9, COLORS[n % len(COLORS)]) + 3
        left = write(left, 55, name, 7.5) + 12
    for left, bottom, case in captions:
        write(left, bottom, case, 6, FAINT)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})


def _smaller(shape: Sequence[int], protocol: Protocol) -> bool:
    """Whether the volume is smaller than the patch along an axis; slices are resized to it, whatever their size."""
    return not protocol.slices and any(n // protocol.downsample < patch
                                       for n, patch in zip(shape, protocol.patch, strict=True))


def _range(values: Iterable[float]) -> list[float]:
    values = np.array(list(values), np.float64)
    return [_short(value) for value in (values.min(), np.median(values), values.max())]


def _listed(ids: Sequence[str], total: int) -> str:
    more = f" and {len(ids) - LISTED} more" if len(ids) > LISTED else ""
    return f"{len(ids)} of {total} cases ({', '.join(ids[:LISTED])}{more})"


def _short(value: float) -> float:
    """Six digits: beyond them two processors may differ."""
    return float(f"{float(value):.6g}")


def _rgb(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:]))
