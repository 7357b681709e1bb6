"""The parts of a method file's docstring, in the shape of `methods/ua_mt.py`; nothing is imported to read them."""
import ast
import re
from inspect import cleandoc
from pathlib import Path
from typing import NamedTuple

LABELS = ("Family", "Paper", "Code", "Differs from the code")
FAMILIES = ("consistency", "adversarial", "co-training", "mixing", "dual task", "pseudo-label", "contrastive",
            "supervised")


class Text(NamedTuple):
    """The parts of a method file's docstring; those that it lacks are empty."""

    title: str
    idea: str
    family: str
    paper: str
    code: str
    differs: tuple[str, ...]


def read(docstring: str | None) -> Text:
    """The parts of a docstring."""
    title, _, rest = cleandoc(docstring or "").partition("\n")
    idea, *labeled = re.split(rf"^({'|'.join(LABELS)}):", rest, flags=re.M)
    found = dict.fromkeys(LABELS, "") | dict(zip(labeled[::2], labeled[1::2], strict=True))
    family, paper, code, differs = found.values()
    items = map(flat, re.split(r"^- ", differs.lstrip(), flags=re.M))
    return Text(title, flat(idea), flat(family).rstrip("."), flat(paper), flat(code), tuple(filter(None, items)))


def of_file(path: Path) -> Text:
    """The parts of a module's docstring."""
    return read(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))))


def flat(text: str) -> str:
    """The text in one line."""
    return " ".join(text.split())
