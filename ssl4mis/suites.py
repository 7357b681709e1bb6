"""Suites: runs that belong together, as TOML files of lists to combine."""
import dataclasses
import itertools
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import data_prep
from ssl4mis import config, registry
from ssl4mis.config import RunSpec
from ssl4mis.errors import UserError

FOLDER = Path(__file__).parents[1] / "benchmarks" / "suites"
AXES = {  # lists of a file, what they are called on the command line, and what they hold
    "methods": ("method", str), "datasets": ("dataset", str), "protocols": ("protocol", str),
    "networks": ("network", str), "labeled": ("labeled", int | str), "unlabeled": ("unlabeled", int | str),
    "controls": ("control", str), "folds": ("fold", int), "seeds": ("seed", int),
}  # fmt: skip
ALL = ("methods", "folds")  # may be the word all: methods that learn from unlabeled data, folds of the split
NEEDED = ("methods", "datasets")
DECIDING = ("method", "dataset", "protocol")  # options that decide the defaults of others
OPTIONS = {field.name for field in dataclasses.fields(RunSpec)} - {option for option, _ in AXES.values()}


class Run(NamedTuple):
    """A run of a suite, and the words after `benchmarks/run.py` that make it."""

    spec: RunSpec
    words: list[str]


class Suite(NamedTuple):
    """The runs of a file in its order, none twice."""

    name: str
    about: str
    runs: list[Run]


def find(name: str) -> Path:
    """The file of a suite, by its path or as one of benchmarks/suites; UserError naming the nearest one."""
    if name.endswith(".toml"):
        return Path(name)
    known = [path.stem for path in FOLDER.glob("*.toml")]
    if name not in known:
        raise UserError(registry.nearest("suite", name, known))
    return FOLDER / f"{name}.toml"


def read(path: Path, options: Sequence[str] = ()) -> Suite:
    """The suite in a file; `options` are further words for every run, which do not decide its result.

    UserError of one line naming file and key where the file is not as it should be; a setting that `run.py` would turn
    away ends the program with status 2, as it does there.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UserError(f"{path}: cannot be read ({reason}), expected a TOML file with [[runs]]") from None
    check_keys(path, "", content, ("about", "runs"))
    about, blocks = content.get("about"), content.get("runs")
    if not isinstance(about, str):
        raise UserError(f"{path}: about is {about!r}, expected a line of text")
    if not isinstance(blocks, list) or not blocks or not all(isinstance(block, dict) for block in blocks):
        raise UserError(f"{path}: runs is {blocks!r}, expected blocks that start with [[runs]]")
    runs = {}
    for number, block in enumerate(blocks, 1):
        for run in expand(block, f"{path}: runs {number}", list(options)):
            runs.setdefault(run.spec.id, run)
    return Suite(path.stem, about, list(runs.values()))


def expand(block: dict, place: str, options: list[str]) -> list[Run]:
    """The runs of one [[runs]] block, in the order of its lists; errors as of `read`, starting with `place`."""
    check_keys(place, "", block, (*AXES, "options"))
    for key in NEEDED:
        if key not in block:
            raise UserError(f"{place}: no {key}, expected a list")
    axes = {AXES[key][0]: values(place, key, value) for key, value in block.items() if key != "options"}
    fixed = settings(place, block.get("options", {}))
    parsed, runs = {}, []
    for chosen in itertools.product(*axes.values()):
        stated = dict(zip(axes, chosen, strict=True))
        deciding = tuple(stated.get(name) for name in DECIDING)
        if deciding not in parsed:
            parsed[deciding] = Line([*words(stated | fixed), *options], place)
        for spec in parsed[deciding].runs({name: stated[name] for name in stated if name not in DECIDING}):
            fold = {"fold": spec.fold} if "fold" in stated else {}  # of all, this one
            runs.append(Run(spec, [*words(stated | fold | fixed), *options]))
    return runs


class Line:
    """A command line that was parsed once, for runs that differ in the axes which decide no default of another option.

    Making a parser takes longer than all else of a run's settings. A line that cannot work ends as in `config.parse`.
    """

    def __init__(self, argv: list[str], place: str):
        config.parse(argv, place)  # checks the options of the machine, too
        argv = config.in_order(argv)
        self.parser = config.make_parser(argv, place)
        found = self.parser.parse_args(argv).as_dict()
        names = {field.name for field in dataclasses.fields(RunSpec)} & set(found)
        self.spec = RunSpec(**{name: found[name] for name in names})
        self.dataset = data_prep.locate(self.spec.dataset, found["data_root"])[0]

    def runs(self, others: dict) -> list[RunSpec]:
        """The runs of the line with other values of these options, several for all folds."""
        try:
            return config.resolve(dataclasses.replace(self.spec, **others), self.dataset)
        except (UserError, data_prep.DataError) as error:
            self.parser.error(error)


def values(place: str, key: str, found) -> list:
    """The entries of a list; UserError unless it is one of the right type and not empty."""
    if found == "all" and key == "methods":
        return [name for name in registry.names() if registry.method_class(name).needs.unlabeled]
    if found == "all" and key == "folds":
        return ["all"]
    kind = AXES[key][1]
    if not isinstance(found, list) or not found or any(
            isinstance(value, bool) or not isinstance(value, kind) for value in found):
        what = {str: "words", int: "whole numbers"}.get(kind, "counts or shares")
        raise UserError(f"{place}: {key} is {found!r}, expected a list of {what}{' or all' if key in ALL else ''}")
    return found


def settings(place: str, found) -> dict:
    """The options of a block by their names on the command line; UserError naming one that is none of a run."""
    if not isinstance(found, dict):
        raise UserError(f"{place}: options is {found!r}, expected a table")
    check_keys(place, "options.", found, OPTIONS)
    hp = found.get("hp", {})
    if not isinstance(hp, dict):
        raise UserError(f"{place}: options.hp is {hp!r}, expected a table")
    return {key: value for key, value in found.items() if key != "hp"} | {f"hp.{key}": hp[key] for key in hp}


def words(stated: dict) -> list[str]:
    """Settings as words of a command line."""
    pairs = ((f"--{name}", value if isinstance(value, str) else json.dumps(value, separators=(",", ":")))
             for name, value in stated.items())
    return [word for pair in pairs for word in pair]


def check_keys(place, prefix: str, found: dict, known) -> None:
    """UserError naming the place, the first unknown key and the nearest known one."""
    for key in found:
        if key not in known:
            raise UserError(f"{place}: " + registry.nearest("key", prefix + key, [prefix + name for name in known]))
