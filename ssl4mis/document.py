"""A page of text, tables, charts and pictures, and its two forms: one HTML file, and Markdown."""

import base64
import re
from pathlib import Path
from typing import NamedTuple

from ssl4mis import plots
from ssl4mis.leaderboard import markdown_table

TEMPLATE = "document.html.j2"
UNKNOWN = "unknown"  # in place of a number that there is not


class Text(NamedTuple):
    """A paragraph; `kind` is "plain", "note" for small print, "aside" for what is of this machine, which the
    Markdown lacks, or "flag" for what a reader must not overlook."""

    text: str
    kind: str = "plain"
    block = "text"


class Bullets(NamedTuple):
    """A list of sentences."""

    sentences: list[str]
    block = "bullets"


class Table(NamedTuple):
    """Rows of text cells under a header."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    block = "table"

    @property
    def numeric(self) -> list[bool]:
        """Whether a column holds numbers, which line up on the right."""
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.header)
        return [any(cells) and all(map(_is_number, cells)) for cells in columns]


class Charts(NamedTuple):
    """Pictures side by side: pairs of a caption and SVG text."""

    charts: list[tuple[str, str]]
    block = "charts"


class Pictures(NamedTuple):
    """Pairs of a caption and the bytes of a PNG."""

    pictures: list[tuple[str, bytes]]
    block = "pictures"

    @property
    def sources(self) -> list[tuple[str, str]]:
        """Captions and the pictures in base64."""
        return [(caption, base64.b64encode(png).decode()) for caption, png in self.pictures]


class Fold(NamedTuple):
    """Blocks behind a line that opens them; open in print."""

    summary: str
    blocks: list
    block = "fold"


class Section(NamedTuple):
    """A part of the page with a place in its table of contents."""

    anchor: str
    title: str
    blocks: list


def to_html(title: str, sections: list[Section]) -> str:
    """The page as one HTML file that loads nothing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True)  # fmt: skip
    numbers = iter(range(10**6))
    # the only markup that is not escaped: SVG, whose texts matplotlib has escaped
    environment.filters["inline"] = lambda svg: Markup(plots.numbered(svg, next(numbers)))
    return environment.get_template(TEMPLATE).render(title=title, sections=sections)


def to_markdown(title: str, sections: list[Section]) -> str:
    """The page as Markdown: words and tables; charts and pictures are in the HTML page only."""
    parts = [f"# {_plain(title)}\n"]
    for section in sections:
        parts.append(f"## {_plain(section.title)}\n")
        parts += _markdown_blocks(section.blocks)
    return "\n".join(parts)


def _markdown_blocks(blocks):
    parts = []
    for block in blocks:
        match block:
            case Text(_, "aside"):
                pass  # what scans and predictions are there is no matter of the records
            case Text(text, kind):
                parts.append(("**Flag.** " if kind == "flag" else "") + _plain(text) + "\n")
            case Bullets(sentences):
                parts.append("".join(f"- {_plain(item)}\n" for item in sentences))
            case Table(caption, header, rows):
                parts.append(f"{_plain(caption)}\n" if caption else "")
                cells = [[_plain(cell) for cell in row] for row in rows]
                parts.append(markdown_table(map(_plain, header), cells))
            case Fold(summary, inner):
                told = _markdown_blocks(inner)
                parts += [f"### {_plain(summary)}\n", *told] if told else []  # pictures alone
    return [part for part in parts if part]


def _plain(text):
    """Text in one line that Markdown takes as it is; pipes are the table's to escape."""
    text = " ".join(str(text).split())
    for mark, entity in (("&", "&amp;"), ("<", "&lt;"), ("\\", "&#92;"), ("`", "&#96;"), ("](", "]&#40;")):
        text = text.replace(mark, entity)
    return text


def _is_number(cell):
    return not cell or bool(re.fullmatch(r"[-+<\[ ]*\d[-\d.,eE+ /\]]*", cell)) or cell == UNKNOWN
