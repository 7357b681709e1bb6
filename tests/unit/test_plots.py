"""Charts and pictures: one look per method, the same bytes each time, contours where the structures end."""

import io
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from ssl4mis import pictures, plots

SVG = "{http://www.w3.org/2000/svg}"
NAMES = ["supervised", "ua_mt (bf16-mixed, 2+2)", "<script>alert(1)</script>", "$x^2$ & more"]
LOOKS = plots.looks([(name, name) for name in NAMES])
NAN = math.nan


def strips():
    return plots.strips({name: [80 + n, 81.5, 90 - n, 60] for n, name in enumerate(NAMES)}, LOOKS, "Dice [%]")


def intervals():
    bars = [plots.Bar(NAMES[0], 1, 0.5, 2), plots.Bar(NAMES[1], -1, NAN, NAN), plots.Bar(NAMES[2], 0, 0, 0)]
    return plots.intervals(bars, LOOKS, "difference [points]")


def critical():
    return plots.critical([(name, 90 - n) for n, name in enumerate(NAMES)], [NAMES[:2], NAMES[1:3]], LOOKS, "Dice [%]")


def courses():
    line = [((0, 50, 100), (1.0, 0.5, 0.2))]
    panels = {"loss a": {"seed 0": line, "seed 1": line * 2}, "watched b": {"seed 1": line}, "c": {"s": line}}
    return plots.courses(panels, "#332288", NAMES[2])


def lines():
    points = {name: [(4, 70 + n, 69, 71), (16, 80, NAN, NAN)] for n, name in enumerate(NAMES)}
    return plots.lines(points, LOOKS, "labeled cases", "Dice [%]", True)


def lines_from_zero():
    return plots.lines({NAMES[1]: [(0, 70, 60, 80), (64, 80, 79, 81)]}, LOOKS, "unlabeled cases", "Dice [%]")


def scatter():
    return plots.scatter([(name, n, 80 + n / 10) for n, name in enumerate(NAMES)], LOOKS, "hours", "Dice [%]")


CHARTS = [strips, intervals, critical, courses, lines, lines_from_zero, scatter]


def words(svg):
    return [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("chart", CHARTS)
def test_charts_are_well_formed_and_always_the_same(chart):
    first = chart()
    assert chart() == first
    root = ElementTree.fromstring(first)
    assert root.tag == f"{SVG}svg" and root.get("role") == "img" and root.get("aria-label")
    assert not list(root.iter(f"{SVG}script")) and "<script" not in first and "Date" not in first
    assert float(root.get("width").removesuffix("pt")) == pytest.approx(72 * plots.WIDTH)


@pytest.mark.parametrize("chart", [strips, intervals, critical, lines, scatter])
def test_axes_and_rows_are_named_as_they_are(chart):
    """Also a name with dollars, which is no formula."""
    said = words(chart())
    shown = NAMES[:3] if chart is intervals else NAMES
    for name in shown:
        first, _, second = name.partition(" (")
        assert name in said or (first in said and f"({second}" in said)
    assert any("[" in text for text in said)  # a unit


def test_the_settings_of_the_user_do_not_show():
    import matplotlib

    first = strips()
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red", "text.usetex": True}):
        assert strips() == first
        assert matplotlib.rcParams["font.size"] == 30


def test_every_point_is_a_case():
    shown = plots.looks([("a", "a"), ("b", "b")])
    svg = ElementTree.fromstring(plots.strips({"a": [1, 2, 3], "b": [2, 2]}, shown, "x"))
    counts = {}
    for use in svg.iter(f"{SVG}use"):
        style = use.get("style") or ""
        for color in plots.COLORS[:2]:
            counts[color] = counts.get(color, 0) + (f"fill: {color.lower()}" in style)
    assert counts == {plots.COLORS[0]: 3, plots.COLORS[1]: 2}


def test_one_color_per_method_and_a_marker_per_row():
    base = "supervised"
    rows = [("a (1)", "a"), ("a (2)", "a"), ("b", "b"), ("supervised (1)", base), ("supervised (2)", base)]
    found = plots.looks(rows)
    assert found["a (1)"].color == found["a (2)"].color != found["b"].color
    assert found["a (1)"].marker != found["a (2)"].marker
    assert {found[name].color for name, method in rows if method == base} == {plots.BASELINE}
    many = plots.looks([(f"m{n}", f"m{n}") for n in range(2 * len(plots.COLORS))])
    assert len(set(many.values())) == len(many)


def test_ids_of_a_page_are_apart():
    first, second = (plots.numbered(strips(), number) for number in (0, 1))
    for svg, mark in ((first, "p0-"), (second, "p1-")):
        root = ElementTree.fromstring(svg)
        ids = {element.get("id") for element in root.iter() if element.get("id")}
        assert ids and all(name.startswith(mark) for name in ids)
        for element in root.iter(f"{SVG}use"):
            assert element.get("{http://www.w3.org/1999/xlink}href")[1:] in ids
    assert "url(#p0-" in first


def test_labels_that_would_overlap_move_apart():
    assert plots._apart([0.9, 0.5, 0.1], 0.1) == [0.9, 0.5, 0.1]
    assert plots._apart([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.5, 0.4, 0.3])
    assert plots._apart([0.1, 0.05, 0.0], 0.1) == pytest.approx([0.2, 0.1, 0.0])


# Planes of a box in a volume: what is where follows from its corners.


def drawn(png):
    """Palette colours of a PNG as (rows, columns, 3)."""
    picture = Image.open(io.BytesIO(png))
    picture.load()
    return np.asarray(picture.convert("RGB"))


def where(rgb, color):
    return (rgb == np.array([int(color[n : n + 2], 16) for n in (1, 3, 5)])).all(-1)


def box(shape, low, high):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return mask


def test_contours_follow_the_structures():
    """160 x 160 voxels: a pixel is a voxel, so that the outline is that of the box."""
    shape = (160, 160)
    image = np.random.default_rng(0).normal(size=shape)
    truth, predicted = box(shape, (20, 40), (60, 100)), box(shape, (90, 40), (130, 100))
    rgb = drawn(pictures.planes(image, [truth], [predicted], (1, 1)))
    assert rgb.shape == (160, 160, 3)
    rows, columns = np.nonzero(where(rgb, pictures.TRUTH))  # the first axis goes right, the second down
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (40, 99, 20, 59)
    assert where(rgb, pictures.TRUTH).sum() == 60 * 40 - 56 * 36  # two pixels wide
    assert where(rgb, pictures.PREDICTION).sum() == 60 * 40 - 58 * 38  # one pixel wide
    rows, columns = np.nonzero(where(rgb, pictures.PREDICTION))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (40, 99, 90, 129)


def test_three_planes_in_the_aspect_of_the_voxels():
    """40 x 20 x 10 voxels of 1 x 1 x 2 mm: planes of 40 x 20, 40 x 20 and 20 x 20 mm."""
    image = np.random.default_rng(0).normal(size=(40, 20, 10))
    mask = box(image.shape, (10, 5, 2), (30, 15, 8))
    rgb = drawn(pictures.planes(image, [mask], [], (1, 1, 2)))
    assert rgb.shape == (160, 320 + 320 + 160 + 2 * pictures.GAP, 3)
    assert where(rgb, pictures.TRUTH).any(axis=0)[[85, 324 + 85, 648 + 45]].all()
    assert not where(rgb, pictures.PREDICTION).any()


def test_planes_go_through_the_middle_of_the_truth():
    """A prediction elsewhere is seen only where the truth is empty."""
    image = np.zeros((40, 40, 40))
    truth, far, none = box(image.shape, (2,) * 3, (8,) * 3), box(image.shape, (30,) * 3, (36,) * 3), image > 0
    both = drawn(pictures.planes(image, [truth], [far], (1, 1, 1)))
    assert where(both, pictures.TRUTH).any() and not where(both, pictures.PREDICTION).any()
    alone = drawn(pictures.planes(image, [none], [far], (1, 1, 1)))
    assert where(alone, pictures.PREDICTION).any()
    empty = drawn(pictures.planes(image, [none], [none], (1, 1, 1)))
    assert not where(empty, pictures.TRUTH).any() and not where(empty, pictures.PREDICTION).any()


def test_the_last_axis_goes_up():
    image = np.zeros((20, 20, 20))
    image[:, :, 15:] = 1  # the head is bright
    rgb = drawn(pictures.planes(image, [], [], (1, 1, 1)))
    across = rgb[:, 160 + pictures.GAP : 320 + pictures.GAP, 0]
    assert across[:30].mean() > 200 > 50 > across[60:].mean()


def test_pictures_are_small_and_always_the_same():
    image = np.random.default_rng(0).normal(size=(64, 64, 32))
    mask = box(image.shape, (10, 10, 10), (40, 40, 20))
    png = pictures.planes(image, [mask], [mask], (1, 1, 1))
    assert png == pictures.planes(image, [mask], [mask], (1, 1, 1)) and len(png) < 60_000
