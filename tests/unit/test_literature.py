"""The reading list: what is read, which papers are implemented, what filters leave, and what Markdown says."""

import csv
import re
from pathlib import Path

import commands
import pytest

from ssl4mis import literature, registry
from ssl4mis.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    ["medical 3D", "2019-10", "L. Yu", "Uncertainty-aware self-ensembling model: for Semi-supervised 3D Left Atrium "
     "Segmentation", "UA-MT", "MICCAI2019", "https://example.org/a(1).pdf", "https://example.org/code"],
    ["medical 3D", "2021", "A. Nobody", "A *bold* [title] <script>", "", "", "https://example.org/b", ""],
    ["scenes", "2021-06", "X. Chen", "Another title", "CPS", "CVPR", "https://arxiv.org/pdf/2106.01226v2.pdf", ""],
    ["scenes", "2022-01", "X. Chen", "Mutual", "", "CVPR", "https://arxiv.org/abs/2106.01227", "http://example.org"],
]


def write(path, rows, columns=literature.COLUMNS):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])
    return path


@pytest.fixture
def papers(tmp_path):
    return literature.read(write(tmp_path / "list.csv", ROWS))


def test_a_paper_is_implemented_where_a_docstring_names_its_title_or_number(papers):
    assert {paper.date: paper.method for paper in papers} == {"2019-10": "ua_mt", "2021": "", "2021-06": "cps",
                                                              "2022-01": ""}


@pytest.mark.parametrize("title, found", [
    ("MCF: Mutual Correction Framework for Semi-Supervised Medical Image Segmentation", "mcf"),
    ("Mutual Correction Framework", ""),
    ("Mutual correction framework for something else", ""),
    ("Label Propagation via Correlation Matching for Semi-Supervised Semantic Segmentation", "corrmatch"),
])
def test_titles_may_begin_with_the_short_name(tmp_path, title, found):
    row = ["a", "2023", "", title, "", "", "https://example.org", ""]
    assert literature.read(write(tmp_path / "list.csv", [row]))[0].method == found


@pytest.mark.parametrize("filters, dates", [
    ({}, ["2022-01", "2021-06", "2019-10", "2021"]),
    ({"years": "2021"}, ["2021-06", "2021"]),
    ({"years": "2020-2021"}, ["2021-06", "2021"]),
    ({"years": "2021-"}, ["2021-06", "2021"]),
    ({"tasks": ["medical"]}, ["2019-10", "2021"]),
    ({"tasks": ["medical", "scenes"], "code": True}, ["2022-01", "2019-10"]),
    ({"implemented": True}, ["2021-06", "2019-10"]),
])
def test_filters(papers, filters, dates):
    assert sorted(p.date for p in literature.select(papers, **filters)) == sorted(dates)


@pytest.mark.parametrize("filters, message", [
    ({"years": "soon"}, "year 'soon': expected a year such as 2022"),
    ({"tasks": ["medicine"]}, "task 'medicine' is not known: did you mean medical 3D?"),
])
def test_filters_that_make_no_sense(papers, filters, message):
    with pytest.raises(UserError, match=re.escape(message)):
        literature.select(papers, **filters)


def test_lines(papers):
    text = literature.lines(literature.select(papers, "2019-2021", ["medical"]))
    assert text == (
        "- 2021 [A \\*bold\\* \\[title\\] \\<script\\>](https://example.org/b). A. Nobody.\n"
        "- 2019-10 **UA-MT**: [Uncertainty-aware self-ensembling model: for Semi-supervised 3D Left Atrium "
        "Segmentation](https://example.org/a%281%29.pdf). L. Yu, MICCAI2019. [Code](https://example.org/code). "
        "**In the suite: [`ua_mt`](methods.md#ua_mt).**\n")


def test_the_document_counts_and_links(papers):
    text = literature.document(papers)
    assert "4 papers, 2 of them with code and 2 implemented here." in text
    assert "| 2021 | [1](#medical-3d-2021) | [1](#scenes-2021) |" in text
    assert "| 2019 | [1](#medical-3d-2019) |  |" in text
    assert text.index("## Medical 3D, 2021") < text.index("## Medical 3D, 2019") < text.index("## Scenes, 2022")
    missing = text.partition("not in this list: ")[2].partition("\n")[0]
    assert "`dtc`" in missing and "`cps`" not in missing and "`supervised`" not in missing


@pytest.mark.parametrize("rows, columns, message", [
    ([["a", "2021"]], literature.COLUMNS, "row 2: 2 cells, expected 8"),
    ([[*ROWS[1][:1], "June", *ROWS[1][2:]]], literature.COLUMNS, "row 2: date 'June'"),
    ([ROWS[0], [*ROWS[1][:6], "javascript:x", ""]], literature.COLUMNS, "row 3: paper_url 'javascript:x'"),
    ([], ("task", "date"), "columns task, date, expected task, date, authors"),
])
def test_a_bad_table_is_named(tmp_path, rows, columns, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        literature.read(write(tmp_path / "list.csv", rows, columns))
    assert "list.csv" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", None])
def test_a_table_that_is_none(tmp_path, content):
    path = tmp_path / "list.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"list\.csv: .*expected a table") as error:
        literature.read(path)
    assert "\n" not in str(error.value)


def test_the_committed_list():
    papers = literature.read(ROOT / "results" / "literature.csv")
    assert len(papers) >= 330
    assert {"ua_mt", "cps", "dtc", "urpc", "bcp", "mcf"} <= {paper.method for paper in papers}
    assert {paper.method for paper in papers} <= {"", *registry.names()}


def test_the_command(tmp_path):
    def command(*arguments):
        return commands.command("benchmarks/literature.py", *arguments)

    table, out = write(tmp_path / "list.csv", ROWS), tmp_path / "literature.md"
    where = ["--table", table, "--out", out]
    assert command(*where, "--check").returncode == 1
    assert command(*where).returncode == 0 and out.read_text() == literature.document(literature.read(table))
    assert command(*where, "--check").returncode == 0
    part = command(*where, "--year", "2022", "--code")
    assert (part.returncode, part.stdout.count("\n"), part.stdout[:9]) == (0, 1, "- 2022-01")
    bad = command(*where, "--year", "x")
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
