"""Method cards: every part from a known source, counts that were worked out by hand, and laws on every method."""

import dataclasses
import re
import runpy
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from ssl4mis import cards, docstring, leaderboard, registry
from ssl4mis.batch import Losses
from ssl4mis.errors import UserError
from ssl4mis.method import Method, Needs, Phase, Preset, Stage, Teacher

ROOT = Path(__file__).resolve().parents[2]
NAMES = registry.names()
DOCSTRING = """Short: a longer name (Someone, Journal 2020).

First sentence of an
idea. Second one.

Family: dual task.
Paper: A title that goes
on, arXiv 2001.01234.
Code: some-one/the.repo, train.py.
Differs from the code:
- one thing, which
takes two lines;
- another (`compat` legacy).
"""


@pytest.fixture(scope="module")
def table():
    return cards.numbers(ROOT / "results")


@dataclasses.dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        first, second: two
            alike: both.
        kind: which one.
    """

    first: float = 0.5
    second: int | None = None
    kind: Literal["a", "b"] = "b"
    untold: int = 1


class Mixed(Method):
    """Two stages, three phases, a decoder that runs alone, a teacher and a projection outside of the networks."""

    Config = Config
    needs = Needs(multiple=2, strong=2, partner=True)
    presets = {
        "LA": Preset(hp={"first": 0.25}, run={"labeled_batch": 4, "unlabeled_batch": 2, "network": "vnet"}),
        "Another": Preset(run={"patch": [8, 8]}, iterations=70),
    }

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        assert hp.first == 0.25
        self.net = build({"seg": task.classes, "side": (3, 2)})
        self.teacher, self.projection = Teacher(self.net, 0.9), nn.Linear(1000, 2000)

    def stages(self):
        return Stage("warm", 0.25), Stage("main", 0.75, (Phase("segment"), Phase("criticize")), "step", 0.125)

    def enter(self, stage):
        self.entered = stage

    def forward(self, batch, clock):
        assert self.training and self.entered == clock.stage and clock.step == clock.total - 1
        labeled, unlabeled = batch.labeled, batch.unlabeled
        assert set(labeled.label.unique().tolist()) == {0, 1} and unlabeled.label is None
        if clock.stage == "warm":
            return Losses({"a": self.net(labeled.image).logits.mean()})
        if clock.phase == "criticize":
            return Losses({"b": self.net(batch.partner.image).logits.mean()})
        skips = self.net.encode(torch.cat(unlabeled.strong))
        assert unlabeled.valid.shape == (2, *batch.image.shape[2:])
        self.net.decode(skips)
        with torch.no_grad():
            self.net.decode([skip[:1] for skip in skips])
        self.teacher(unlabeled.image)
        return Losses({"c": self.net.decode(skips).logits.mean()})

    def after_step(self, clock):
        if clock.stage == "main":
            self.teacher(torch.zeros(3, 1, 32, 32, 32))

    def predict(self, image):
        return self.teacher(image).logits.softmax(1)


# --- parts -----------------------------------------------------------------------------------------------------------


def test_the_parts_of_a_docstring():
    assert docstring.read(DOCSTRING) == docstring.Text(
        "Short: a longer name (Someone, Journal 2020).", "First sentence of an idea. Second one.", "dual task",
        "A title that goes on, arXiv 2001.01234.", "some-one/the.repo, train.py.",
        ("one thing, which takes two lines;", "another (`compat` legacy)."))


@pytest.mark.parametrize(("text", "expected"), [
    (None, ("", "", "", "", "", ())),
    ("Only a title.", ("Only a title.", "", "", "", "", ())),
    ("Title.\n\nIdea.\n\nCode: x/y.", ("Title.", "Idea.", "", "", "x/y.", ())),
    ("Title.\n\nPaper: P.\nDiffers from the code: nothing.", ("Title.", "", "", "P.", "", ("nothing.",))),
])
def test_a_docstring_may_lack_sections(text, expected):
    assert tuple(docstring.read(text)) == expected


def test_links_and_needs():
    text = docstring.read(DOCSTRING)
    assert cards.facts(text, Mixed.needs).splitlines() == [
        "- Paper: A title that goes on, [arXiv 2001.01234](https://arxiv.org/abs/2001.01234).",
        "- Code: [some-one/the.repo](https://github.com/some-one/the.repo), train.py.",
        "- Needs: batch sizes in multiples of 2; strongly augmented views of each unlabeled sample: 2; a second draw "
        "of unlabeled samples",
    ]
    assert "labeled samples only" in cards.facts(text, Needs(unlabeled=False))
    assert "Needs" not in cards.facts(text, Needs())


def test_hyper_parameters_have_type_default_and_meaning():
    assert cards.hyper_parameters(Config).splitlines()[2:] == [
        "| `first` | float | 0.5 | two alike: both. |",
        "| `second` | int \\| None | None | two alike: both. |",
        "| `kind` | a or b | b | which one. |",
        "| `untold` | int | 1 |  |",
    ]


def test_a_config_without_a_docstring():
    config = dataclasses.make_dataclass("Config", [("rate", float, 0.5)], frozen=True)
    assert cards.hyper_parameters(config).splitlines()[2:] == ["| `rate` | float | 0.5 |  |"]
    assert cards.hyper_parameters(dataclasses.make_dataclass("Config", [], frozen=True)) == ""


def test_presets():
    assert cards.presets(Mixed).splitlines()[2:] == [
        "| Another | `patch [8,8]` | 70 |",
        "| LA | `hp.first 0.25`, `labeled_batch 4`, `unlabeled_batch 2`, `network vnet` |  |",
    ]


# --- networks and samples --------------------------------------------------------------------------------------------


def test_networks_samples_and_stages():
    body = cards.cost(Mixed)
    rows = [line for line in body.splitlines() if re.match(r"[|-] `|\| outside", line)]
    net, teacher, outside, *steps = rows
    assert net.startswith("| `net` | VNet | seg 2, side 3 (level 2) |")
    total, trained = re.findall(r"\d+\.\d{3}", net)
    assert total == trained == "9.449" and re.findall(r"\d+\.\d{3}", teacher) == ["9.449", "0.000"]
    assert outside == "| outside of them |  |  | 2.002 | 2.002 |"
    assert steps == [
        "| `warm` | `net` | 4 | 0 |",
        "| `main` | `net` | 6 encoded, 10 decoded | 0 encoded, 1 decoded |",
        "| `main` | `teacher.net` | 0 | 5 |",
        "- `warm`: 25 % of the run; `segment`; the run's schedule",
        "- `main`: 75 % of the run; `segment` and `criticize`; schedule step (a drop after every 0.125 of the stage)",
    ]
    assert "of a batch of 4 labeled and 2 unlabeled samples; prediction takes `teacher.net`:" in body


@pytest.mark.parametrize(("name", "expected"), [
    ("supervised", {("net", True): 2}),
    ("mean_teacher", {("student", True): 4, ("teacher.net", False): 2}),
    ("ua_mt", {("student", True): 4, ("teacher.net", False): 2 + 8 * 2}),
])
def test_samples_of_a_step(name, expected):
    measured, _ = cards.measure(registry.method_class(name))
    for part in ("encoded", "decoded"):
        counts = {(net, gradient): n for (net, of, gradient), n in measured["train"].items() if of == part}
        assert counts == expected


@pytest.mark.parametrize(("needs", "run", "expected"), [
    (Needs(), {}, (2, 2)),
    (Needs(), {"labeled_batch": 12, "unlabeled_batch": 12}, (2, 2)),
    (Needs(unlabeled=False), {}, (2, 0)),
    (Needs(multiple=2), {"labeled_batch": 4, "unlabeled_batch": 6}, (4, 6)),
    (Needs(multiple=3), {}, (3, 3)),
])
def test_batch_sizes(needs, run, expected):
    cls = type("Any", (Method,), {"needs": needs, "presets": {"LA": Preset(run=run)}})
    assert cards.batch_sizes(cls) == expected


def test_a_card_leaves_the_generators_alone():
    before = torch.get_rng_state()
    cards.card("supervised")
    assert torch.equal(before, torch.get_rng_state())


# --- scores ----------------------------------------------------------------------------------------------------------


def row(**values):
    return dict.fromkeys(leaderboard.COLUMNS, "") | {"dataset": "LA", "method": "m"} | values


def test_ours_stand_beside_the_published_numbers_of_the_same_data():
    mine = {"source": "measured", "protocol": "lite", "split": "S", "network": "vnet", "batch": "2+2",
            "precision": "p", "hp_hash": "abc"}
    found = cards.scores("m", [
        row(**mine, labeled="16", unlabeled="64", Dice="80.00", Dice_sd_seeds="0.50", runs="3", complete="yes",
            versus_published="below"),
        row(**mine, labeled="8", unlabeled="72", Dice="70.00", Dice_sd_folds="0.1", runs="1", complete="no"),
        row(**mine, labeled="8", unlabeled="9", Dice="60.00", runs="1", complete="yes", control="noise"),
        row(source="reported", labeled="16", unlabeled="64", split="80/20", Dice="88.0",
            reference="Paper T1 (read); and more"),
        row(source="reported", labeled="8", split="80/20", Dice="86", reference="Other T2 via Third: all"),
        row(source="reported", labeled="8", method="other", Dice="99", reference="x"),
        row(source="reported", dataset="ACDC", labeled="70", split="70/10/20", Dice="91", reference="Paper, read in x"),
    ])
    assert found.splitlines()[2:8] == [
        "| ACDC | 70 |  | 91 |  | 70/10/20 | Paper |",
        "| LA | 8 | 72 | **70.00** | 1 | lite, S, vnet, 2+2, p | ours, settings abc, folds missing |",
        "| LA | 8 | 9 | **60.00** | 1 | lite, S, vnet, 2+2, p | ours, settings abc, control noise |",
        "| LA | 8 |  | 86 |  | 80/20 | Other T2 via Third |",
        "| LA | 16 | 64 | **80.00 ± 0.50** | 3 | lite, S, vnet, 2+2, p | ours, settings abc, below published |",
        "| LA | 16 | 64 | 88.0 |  | 80/20 | Paper T1 |",
    ]
    assert "Comparable only where protocol and selection agree" in found
    assert cards.scores("nobody", []) == ""


@pytest.mark.parametrize("name", NAMES)
def test_no_number_of_a_method_is_left_out(name, table):
    dice = [line.split(" | ")[3].strip("*").partition(" ")[0] for line in cards.scores(name, table).splitlines()[2:]
            if line.startswith("| ")]
    assert sorted(dice) == sorted(row["Dice"] for row in table if row["method"] == name)


def test_numbers_without_a_folder_and_with_a_broken_record(tmp_path):
    assert cards.numbers(tmp_path / "absent") == []
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "bad.json").write_text("{")
    with pytest.raises(UserError, match="bad.json"):
        cards.numbers(tmp_path)


# --- methods from elsewhere ------------------------------------------------------------------------------------------

PLUGIN = '''
from dataclasses import dataclass
from ssl4mis.methods import supervised

@dataclass(frozen=True)
class Config(supervised.Config):
    pass

class Mine(supervised.Supervised):
    Config = Config
'''


@pytest.mark.parametrize(("docstring", "opening"), [
    ('"""Mine: of our own."""\n', "## a_lab:Mine\n\nMine: of our own.\n\n- Needs:"), ("", "## a_lab:Mine\n\n- Needs:"),
])
def test_a_method_from_elsewhere_has_a_card(tmp_path, monkeypatch, docstring, opening):
    (tmp_path / "a_lab.py").write_text(docstring + PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "a_lab", raising=False)
    text = cards.card("a_lab:Mine")
    sys.modules.pop("a_lab")
    assert text.startswith(opening) and "| `net` | VNet | seg 2 | 9.449 | 9.449 |" in text
    assert "Differs" not in text and "Published" not in text and "\n\n\n" not in text


def test_another_spelling_is_the_same_card():
    assert cards.card("MT").startswith("## mean_teacher\n")


# --- laws ------------------------------------------------------------------------------------------------------------


def says_what_it_is(text, baseline=False):
    cited = re.search(r"\([^()]+ (19|20)\d\d\b[^()]*\)", text.title) and text.paper
    assert text.family in docstring.FAMILIES, f"no line 'Family: ' with one of {docstring.FAMILIES}"
    assert baseline or cited, "no paper: the title names authors and year, and a line 'Paper: ' the paper"
    assert text.code, "no line 'Code: '"
    assert 1 <= len(re.findall(r"[.!?](?= [A-Z`]|$)", text.idea)) <= 3, "the idea takes one to three sentences"
    assert text.differs, "no list 'Differs from the code:'"


@pytest.mark.parametrize("name", NAMES)
def test_every_method_says_what_it_is(name):
    cls = registry.method_class(name)
    says_what_it_is(docstring.read(sys.modules[cls.__module__].__doc__), not cls.needs.unlabeled)


@pytest.mark.parametrize("name", NAMES)
def test_every_hyper_parameter_has_a_meaning(name):
    config = registry.method_class(name).Config
    told = cards.meanings(config)
    assert [f.name for f in dataclasses.fields(config) if not told.get(f.name)] == []


@pytest.mark.parametrize("change", [
    ("(Someone, Journal 2020)", ""), ("Paper:", "By:"), ("dual task", "unknown"), ("Code:", "From:"),
    ("Second one.", "Second. Third. Fourth."),
    ("- one thing, which\ntakes two lines;\n- another (`compat` legacy).", ""),
])
def test_a_poor_docstring_is_caught(change):
    assert change[0] in DOCSTRING
    says_what_it_is(docstring.read(DOCSTRING))
    with pytest.raises(AssertionError):
        says_what_it_is(docstring.read(DOCSTRING.replace(*change)))


# --- docs/methods.md -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(ROOT / "benchmarks" / "methods.py"))["main"]


def test_the_committed_cards_are_what_the_code_generates(main, capsys):
    arguments = ["--results", str(ROOT / "results"), "--out", str(ROOT / "docs" / "methods.md"), "--check"]
    assert main(arguments) == 0, f"{capsys.readouterr().err}regenerate it: python benchmarks/methods.py"


def test_the_file_is_written_once_and_checked(main, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(registry, "names", lambda: ["supervised", "from_a_wheel"])
    out = tmp_path / "docs" / "methods.md"
    arguments = ["--results", str(tmp_path), "--out", str(out)]
    assert main([*arguments, "--check"]) == 1 and not out.exists()
    assert "run benchmarks/methods.py" in capsys.readouterr().err
    assert main(arguments) == 0 and main([*arguments, "--check"]) == 0
    text = out.read_text()
    assert text.startswith("# Methods\n") and text.count("\n## ") == 1 and "[supervised](#supervised)" in text
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "bad.json").write_text("{")
    assert main(arguments) == 2 and capsys.readouterr().err.count("\n") == 1


def test_command_is_short():
    assert all(len((ROOT / "benchmarks" / f"{name}.py").read_text().splitlines()) < 40 for name in ("methods", "run"))


def test_the_readme_lists_every_method_in_its_family():
    words = {"the bound": "supervised", "pseudo-labels": "pseudo-label"}
    rows = re.findall(r"^\| ([\w -]+) \| (`\w+`.*) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    found = {name: words.get(family, family) for family, cells in rows for name in re.findall(r"`(\w+)`", cells)
             if family in (*docstring.FAMILIES, *words)}
    assert found.pop("mt") == found["mean_teacher"]
    assert found == {name: docstring.of_file(registry.FOLDER / f"{name}.py").family for name in NAMES}
