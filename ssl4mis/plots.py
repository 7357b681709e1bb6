"""Charts of the report: small SVG pictures, the same bytes for the same numbers.

Every chart is narrow enough for a phone; a page puts several of them side by side. No statistics here: what is drawn
was computed before.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Paul Tol's "muted", made for all kinds of colour vision; the pale ones last. The baseline is dark gray.
COLORS = ("#332288", "#CC6677", "#117733", "#882255", "#44AA99", "#AA4499", "#999933", "#88CCEE", "#DDCC77")
BASELINE, INK, FAINT, GRID = "#333333", "#1a1a1a", "#777777", "#dddddd"
MARKERS = "osD^vP*Xh"
DASHES = ("-", "--", ":", "-.")
WIDTH = 4.6  # inches of a chart: at 360 pixels its text has about nine
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "ssl4mis", "text.parse_math": False, "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial", "sans-serif"], "font.size": 9, "axes.titlesize": 9,
    "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 9, "axes.edgecolor": FAINT, "text.color": INK,
    "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.4, "axes.unicode_minus": True,
    "axes.titlelocation": "left", "figure.constrained_layout.use": True, "path.simplify": False,
    "axes.formatter.useoffset": False, "axes.xmargin": 0.05, "axes.ymargin": 0.05,
}  # fmt: skip


class Look(NamedTuple):
    """Colour of a method and marker of one of its rows."""

    color: str
    marker: str


class Bar(NamedTuple):
    """A value with its interval, both in the unit of the axis; NaN bounds are not drawn."""

    name: str
    value: float
    low: float
    high: float


def looks(rows: Sequence[tuple[str, str]], baseline: str = "supervised") -> dict[str, Look]:
    """Name -> look, from pairs of name and method: one colour per method, another marker per row of a method.

    With more methods than colours these come again, with other markers.
    """
    methods = list(dict.fromkeys(method for _, method in rows if method != baseline))
    found, seen = {}, {}
    for name, method in rows:
        place = methods.index(method) if method in methods else 0
        color = BASELINE if method == baseline else COLORS[place % len(COLORS)]
        seen[method] = seen.get(method, -1) + 1
        found[name] = Look(color, MARKERS[(seen[method] + place // len(COLORS)) % len(MARKERS)])
    return found


def strips(values: Mapping[str, Sequence[float]], shown: Mapping[str, Look], label: str) -> str:
    """SVG with a box over all values by name and a point for every value; values in the unit of `label`.

    The box holds the middle half and the median, the whiskers reach 1.5 times its length.
    """
    names = list(values)
    with _Chart(height=0.75 + 0.34 * _lines(names)) as chart:
        axes = chart.axes()
        places = _places(names)
        axes.boxplot(
            [list(values[name]) for name in names], positions=places, orientation="horizontal", widths=0.62,
            showfliers=False, manage_ticks=False, medianprops={"color": INK, "linewidth": 1.6},
            boxprops={"color": FAINT}, whiskerprops={"color": FAINT}, capprops={"color": FAINT},
        )  # fmt: skip
        for name, place in zip(names, places, strict=True):
            # spread by the golden ratio: even, and the same for the same number of cases
            off = [((n * 0.618034) % 1 - 0.5) * 0.5 for n in range(len(values[name]))]
            axes.plot(list(values[name]), [place + o for o in off], linestyle="", marker=shown[name].marker,
                      markersize=3.6, color=shown[name].color, alpha=0.75, markeredgewidth=0)  # fmt: skip
        _rows(axes, names, places)
        axes.set_xlabel(label)
        return chart.svg(f"Box plot with a point per case: {label} of {', '.join(names)}")


def intervals(bars: Sequence[Bar], shown: Mapping[str, Look], label: str, zero: bool = True) -> str:
    """SVG with a point and its interval by name, in the unit of `label`, and a line at 0."""
    names = [bar.name for bar in bars]
    with _Chart(height=0.75 + 0.3 * _lines(names)) as chart:
        axes = chart.axes()
        places = _places(names)
        if zero:
            axes.axvline(0, color=FAINT, linewidth=1)
        for bar, place in zip(bars, places, strict=True):
            look = shown[bar.name]
            if math.isfinite(bar.low) and math.isfinite(bar.high):
                axes.plot([bar.low, bar.high], [place, place], color=look.color, linewidth=2)
            axes.plot([bar.value], [place], marker=look.marker, color=look.color, markersize=6)
        _rows(axes, names, places)
        axes.set_xlabel(label)
        return chart.svg(f"Points with intervals: {label} of {', '.join(names)}")


def critical(
    means: Sequence[tuple[str, float]], cliques: Sequence[Sequence[str]], shown: Mapping[str, Look], label: str
) -> str:
    """SVG with the means on an axis, one row by name in the given order, and a bar along the rows of every clique."""
    names = [name for name, _ in means]
    drawn = [clique for clique in cliques if len(clique) > 1]
    with _Chart(height=0.75 + 0.3 * _lines(names)) as chart:
        axes = chart.axes()
        places = dict(zip(names, _places(names), strict=True))
        for name, mean in means:
            axes.plot([mean], [places[name]], marker=shown[name].marker, color=shown[name].color, markersize=6)
        _rows(axes, names, list(places.values()))
        axes.set_xlabel(label)
        for number, clique in enumerate(drawn):
            ends = sorted(places[name] for name in clique)
            # right of the axis, where no point can be
            axes.plot([1.03 + 0.035 * number] * 2, [ends[0] - 0.25, ends[-1] + 0.25], color=INK, linewidth=3.5,
                      solid_capstyle="butt", transform=axes.get_yaxis_transform(), clip_on=False)  # fmt: skip
        groups = "; ".join(", ".join(clique) for clique in drawn) or "none"
        return chart.svg(f"Mean {label} by method; bars join what does not differ significantly: {groups}")


def courses(
    panels: Mapping[str, Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]]], color: str, title: str
) -> str:
    """SVG of small multiples: a panel by quantity with the lines (iterations, values) by label, told apart by dashes.

    Labels come in the order of their first appearance in any panel; the lines of one label look the same.
    """
    labels = list(dict.fromkeys(label for panel in panels.values() for label in panel))
    styles = {label: DASHES[number % len(DASHES)] for number, label in enumerate(labels)}
    count = len(panels)
    rows = math.ceil(count / 2)
    with _Chart(height=0.5 + 1.35 * rows) as chart:
        # a single panel stays half as wide, as all others
        grid = chart.figure.subplots(rows, 2, squeeze=False).ravel()
        for panel, (name, lines) in zip(grid, panels.items(), strict=False):
            for label, runs in lines.items():
                for xs, ys in runs:
                    panel.plot(xs, ys, color=color, linestyle=styles[label], linewidth=1.1)
            panel.set_title(name, size=8, wrap=True)
            panel.tick_params(labelsize=7)
            panel.locator_params(nbins=4)
        for panel in grid[count:]:
            panel.set_visible(False)
        chart.figure.supxlabel("iterations", size=8)
        if len(labels) > 1:
            from matplotlib.lines import Line2D

            handles = [Line2D([], [], color=color, linestyle=styles[label], label=label) for label in labels]
            chart.figure.legend(handles=handles, loc="outside upper right", ncols=min(4, len(labels)), fontsize=7)
        return chart.svg(f"Training of {title}: {', '.join(panels)}")


def lines(
    curves: Mapping[str, Sequence[tuple[float, float, float, float]]], shown: Mapping[str, Look], xlabel: str,
    ylabel: str, doublings: bool = False,
) -> str:
    """SVG of points (x, y, low, high) by name, joined by lines; with `doublings` x is on the scale of its logarithm.

    NaN bounds are not drawn, and intervals far beyond the points are cut at the edge."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    with _Chart(height=3.3) as chart:
        axes = chart.axes()
        widest = max(point[0] for points in curves.values() for point in points)
        for place, (name, points) in enumerate(curves.items()):
            look, off = shown[name], place - (len(curves) - 1) / 2
            # beside each other, or equal points would hide all but one
            xs = [p[0] * 2 ** (0.025 * off) if doublings else p[0] + 0.006 * off * widest for p in points]
            axes.plot(xs, [p[1] for p in points], color=look.color, marker=look.marker, markersize=5, label=name)
            for x, (_, _, low, high) in zip(xs, points, strict=True):
                if math.isfinite(low) and math.isfinite(high):
                    axes.plot([x, x], [low, high], color=look.color, linewidth=1, alpha=0.6)
        means = [point[1] for points in curves.values() for point in points]
        room = max(5.0, (max(means) - min(means)) / 2)
        low, high = axes.get_ylim()
        # an interval of two runs can be as wide as the scale, and would flatten the curves
        axes.set_ylim(max(low, min(means) - room), min(high, max(means) + room))
        xs = sorted({point[0] for points in curves.values() for point in points})
        if doublings:
            axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(xs))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        chart.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return chart.svg(f"{ylabel} against {xlabel} of {', '.join(curves)}")


def scatter(points: Sequence[tuple[str, float, float]], shown: Mapping[str, Look], xlabel: str, ylabel: str) -> str:
    """SVG of points (name, x, y), each with its name in a column on the right, in the order of the heights."""
    height = max(2.6, 0.75 + 0.17 * len(points))
    with _Chart(height=height, right=0.62) as chart:
        axes = chart.axes()
        for name, x, y in points:
            axes.plot([x], [y], marker=shown[name].marker, color=shown[name].color, markersize=6)
        axes.set_xlim(left=0)
        axes.margins(x=0.08, y=0.08)
        axes.set_xlim(0, max(x for _, x, _ in points) * 1.08 or 1)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        low, high = axes.get_ylim()
        order = sorted(points, key=lambda point: (-point[2], point[0]))
        wanted = [(y - low) / (high - low) for _, _, y in order]
        for (name, x, y), place in zip(order, _apart(wanted, 0.15 / (height - 0.75)), strict=True):
            label = axes.annotate(
                name, (x, y), xytext=(1.04, place), textcoords="axes fraction", va="center", size=8,
                color=INK, annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": shown[name].color, "linewidth": 0.6, "shrinkA": 0,
                            "shrinkB": 3, "relpos": (0, 0.5)},
            )  # fmt: skip
            label.set_in_layout(False)  # the room for the names is set aside
        return chart.svg(f"{ylabel} against {xlabel} of {', '.join(name for name, _, _ in points)}")


def _apart(wanted, gap):
    """Places from high to low, at least `gap` apart and as near to the wanted ones as one pass down and up allows."""
    found = []
    for place in wanted:
        found.append(min(place, found[-1] - gap) if found else place)
    floor = 0.0
    for n in reversed(range(len(found))):
        if found[n] < floor:
            found[n] = floor
        floor = found[n] + gap
    return found


def _wrapped(name):
    """A name in two lines where it tells rows apart in brackets."""
    return name.replace(" (", "\n(", 1) if len(name) > 16 else name


def _lines(names):
    return sum(1.35 if "\n" in _wrapped(name) else 1 for name in names)


def _places(names):
    """Heights of rows, the first on top, those of two lines with more room."""
    places, at = [], 0.0
    for name in names:
        room = 1.35 if "\n" in _wrapped(name) else 1
        places.append(-(at + room / 2))
        at += room
    return places


def _rows(axes, names, places):
    axes.set_yticks(places, [_wrapped(name) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(places[-1] - 0.6, places[0] + 0.6)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)


class _Chart:
    """A figure without pyplot: no window system and no settings but ours."""

    def __init__(self, height, right=1.0):
        self.height, self.right = height, right

    def __enter__(self):
        import matplotlib
        from matplotlib.figure import Figure

        # the user's matplotlibrc must not show
        self.context = matplotlib.rc_context(dict(matplotlib.rcParamsDefault) | STYLE | {"backend": "svg"})
        self.context.__enter__()
        self.figure = Figure(figsize=(WIDTH, self.height))
        self.figure.get_layout_engine().set(rect=(0, 0, self.right, 1))
        return self

    def __exit__(self, *error):
        return self.context.__exit__(*error)

    def axes(self):
        return self.figure.subplots()

    def svg(self, title):
        """The figure as an element to put into a page, with a title for those who do not see it."""
        from html import escape

        text = io.StringIO()
        self.figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        body = text.getvalue()
        body = body[body.index("<svg") :]
        body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, count=1, flags=re.S)
        body = re.sub(r"[ \t]+$", "", body, flags=re.M)
        name = escape(title)
        return re.sub(r"<svg ", f'<svg role="img" aria-label="{name}" ', body, count=1)


def numbered(svg: str, number: int) -> str:
    """The SVG with ids of its own, so that several fit into one page."""
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>p{number}-", svg)
