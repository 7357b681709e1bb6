"""The field's reading list: results/literature.csv as Markdown, with what the suite implements marked.

A paper is implemented where a method names it in its line "Paper: title, arXiv number; another title, venue". No torch.
"""
import csv
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from ssl4mis import docstring, registry
from ssl4mis.errors import UserError
from ssl4mis.leaderboard import markdown_table, stale
from ssl4mis.records import write_text
from ssl4mis.registry import nearest

COLUMNS = ("task", "date", "authors", "title", "abbreviation", "venue", "paper_url", "code_url")
DATE, URL, ARXIV = r"\d{4}(-\d{2})?", r"https?://\S+", r"(?<!\d)\d{4}\.\d{4,5}(?!\d)"
INTRODUCTION = """# Literature

Generated from `results/literature.csv` and the docstrings of the methods by `python benchmarks/literature.py`: do not
edit. The same command with a filter prints a part, such as `--year 2022-2023 --task medical --code` or
`--implemented`.
"""


class Paper(NamedTuple):
    """A row of the list, and the method of the suite that implements it, or an empty text."""

    task: str
    date: str
    authors: str
    title: str
    abbreviation: str
    venue: str
    paper_url: str
    code_url: str
    method: str

    @property
    def year(self) -> str:
        return self.date[:4]


def read(path: Path) -> list[Paper]:
    """The papers of a list, by task and newest first; UserError, with the line, where it is not as expected."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file, strict=True)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: {error}; expected a table with the columns {', '.join(COLUMNS)}") from None
    if tuple(header) != COLUMNS:
        raise UserError(f"{path}: columns {', '.join(header)}, expected {', '.join(COLUMNS)}")
    known, papers = implemented(), []
    for number, row in enumerate(rows, start=2):
        if len(row) != len(COLUMNS):
            raise UserError(f"{path}, row {number}: {len(row)} cells, expected {len(COLUMNS)}")
        for column, pattern in {"date": DATE, "paper_url": URL, "code_url": f"({URL})?", "title": ".+"}.items():
            value = row[COLUMNS.index(column)]
            if not re.fullmatch(pattern, value):
                raise UserError(f"{path}, row {number}: {column} {value!r}, expected {pattern}")
        found = dict(zip(COLUMNS, row, strict=True))
        papers.append(Paper(*row, next((name for name, text in known.items() if same(text, found)), "")))
    return sorted(papers, key=lambda paper: (paper.task, paper.date, paper.title), reverse=True)


def implemented() -> dict[str, str]:
    """What the docstring of each method says of its papers."""
    return {path.stem: docstring.of_file(path).paper for path in sorted(registry.FOLDER.glob("[!_]*.py"))}


def same(text: str, row: dict[str, str]) -> bool:
    """Whether what a docstring says of its papers names the paper of a row."""
    numbers, title = set(re.findall(ARXIV, text)), row["title"]
    if not numbers.isdisjoint(re.findall(ARXIV, row["paper_url"])):
        return True
    told = {plain(part[:comma.start()]) for part in text.split(";") for comma in re.finditer(r",|$", part)}
    return not told.isdisjoint({plain(title), plain(re.sub(r"^[\w-]+: ", "", title))})


def plain(title: str) -> str:
    """Letters and digits, for titles that differ in punctuation and capitals."""
    return re.sub(r"[^a-z0-9]", "", unicodedata.normalize("NFKC", title).lower())


def select(papers, years: str | None = None, tasks=(), code: bool = False, implemented: bool = False) -> list[Paper]:
    """Papers of some years (2022 or 2020-2022) and of tasks whose names contain a word, with code, or in the suite.

    UserError where the years are none, or where no task contains a word.
    """
    first, _, last = (years or "0-9999").partition("-")
    if not (first.isdigit() and (last or first).isdigit()):
        raise UserError(f"year {years!r}: expected a year such as 2022, or two such as 2020-2022")
    known = {paper.task for paper in papers}
    for task in tasks:
        if not any(task in name for name in known):
            raise UserError(nearest("task", task, known))
    return [paper for paper in papers
            if int(first) <= int(paper.year) <= int(last or first)
            and (not tasks or any(task in paper.task for task in tasks))
            and (paper.code_url or not code) and (paper.method or not implemented)]


def document(papers) -> str:
    """All papers by task and year, below a table of how many there are."""
    count = Counter((paper.task, paper.year) for paper in papers)
    tasks, years = sorted({task for task, _ in count}), sorted({year for _, year in count}, reverse=True)
    rows = [[year, *(f"[{count[task, year]}](#{anchor(heading(task, year))})" if count[task, year] else ""
                     for task in tasks)] for year in years]
    parts = [INTRODUCTION, f"{len(papers)} papers, {sum(bool(p.code_url) for p in papers)} of them with code and "
             f"{sum(bool(p.method) for p in papers)} implemented here.\n", markdown_table(["year", *tasks], rows)]
    listed = {paper.method for paper in papers}
    if missing := [name for name in implemented() if name not in listed and implemented()[name]]:
        parts.append("Implemented here and not in this list: " + ", ".join(map(link, missing)) + ".\n")
    for task in tasks:
        for year in years:
            if part := [paper for paper in papers if (paper.task, paper.year) == (task, year)]:
                parts += [f"## {heading(task, year)}\n", lines(part)]
    return "\n".join(parts)


def heading(task: str, year: str) -> str:
    return f"{task[:1].upper()}{task[1:]}, {year}"


def anchor(title: str) -> str:
    """The name that a heading gets as a place to link to."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def link(method: str) -> str:
    return f"[`{method}`](methods.md#{method})"


def lines(papers) -> str:
    """A list item for each paper."""
    return "".join(map(line, papers))


def line(paper: Paper) -> str:
    """Date, short name, title, authors, venue, and the links to code and method."""
    name = f"**{escaped(paper.abbreviation)}**: " if paper.abbreviation else ""
    text = f"- {paper.date} {name}[{escaped(paper.title)}]({address(paper.paper_url)}). "
    text += ", ".join(escaped(part) for part in (paper.authors, paper.venue) if part) + "."
    text += f" [Code]({address(paper.code_url)})." if paper.code_url else ""
    return text + (f" **In the suite: {link(paper.method)}.**" if paper.method else "") + "\n"


def escaped(text: str) -> str:
    """Text without a meaning in Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", docstring.flat(text))


def address(url: str) -> str:
    """A URL that cannot end a Markdown link."""
    return url.replace("(", "%28").replace(")", "%29").replace("<", "%3C").replace(">", "%3E")


def regenerate(table: Path, out: Path, check: bool = False) -> int:
    """Write the list as Markdown, or with `check` say whether it would change; returns the exit status."""
    texts = {out: document(read(table))}
    for path in stale(texts):
        if check:
            print(f"{path} differs from {table} or the methods: run benchmarks/literature.py", file=sys.stderr)
            return 1
        write_text(path, texts[path])
    return 0
