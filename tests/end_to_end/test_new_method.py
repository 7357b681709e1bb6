"""A method of 30 lines in a folder of its own gets command line, laws, resume and a row; no other file is edited."""

import csv
from functools import partial

import commands
import pytest

from ssl4mis import records

SOURCE = '''"""Pseudo-labels (Lee, ICML workshop 2013).

The network's own decision on an unlabeled voxel is its target there. It is the simplest of all methods.
"""
from dataclasses import dataclass

from ssl4mis.batch import Losses
from ssl4mis.losses import cross_entropy, segmentation
from ssl4mis.method import Method
from ssl4mis.schedules import sigmoid_ramp


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        weight: final weight of the pseudo-labels.
    """

    weight: float = 0.1


class PseudoLabel(Method):
    Config = Config

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.net = build()

    def forward(self, batch, clock):
        n, logits = len(batch.labeled.image), self.net(batch.image).logits
        terms = {"supervised": segmentation(logits[:n], batch.labeled.label)}
        if len(batch.unlabeled.image):
            weight = self.hp.weight * sigmoid_ramp(clock.step, clock.total)
            terms["pseudo"] = weight * cross_entropy(logits[n:], logits[n:].argmax(1))
        return Losses(terms)
'''
METHOD = "their_lab.pseudo_label:PseudoLabel"
RUN = ("benchmarks/run.py", "--method", METHOD, "--dataset", "phantom-2d4c", "--patch", "[32,32]", "--stride",
       "[32,32]", "--width", "2", "--iterations", "8", "--labeled", "2", "--log_every", "2", "--save_every", "2",
       "--hp.weight", "0.5")  # fmt: skip


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """command(*words) -> the finished process; `their_lab` can be imported there."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "their_lab").mkdir()
    (folder / "their_lab" / "__init__.py").touch()
    (folder / "their_lab" / "pseudo_label.py").write_text(SOURCE)
    return partial(commands.command, path=[folder])


def test_options_record_and_row(command, tmp_path):
    assert "final weight of the pseudo-labels" in command("benchmarks/run.py", "--method", METHOD, "--help").stdout
    done = command(*RUN, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (record,) = records.read_all(tmp_path / "records")
    assert (record["spec"]["method"], record["spec"]["hp"]) == (METHOD, {"weight": 0.5})
    assert set(record["curve"][0]["terms"]) == {"supervised", "pseudo"}
    assert command("benchmarks/leaderboard.py", "--results", tmp_path).returncode == 0
    (row,) = csv.DictReader((tmp_path / "leaderboard.csv").read_text().splitlines())
    assert row["method"] == METHOD and float(row["Dice"]) >= 0


def test_the_laws_are_put_to_it(command):
    done = command("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/contract/test_methods.py", "--method", METHOD,
                   "-k", "2D-4classes and not every_network")
    assert done.returncode == 0, done.stdout
    assert METHOD in command("-m", "pytest", "--collect-only", "-q", "tests/contract/test_methods.py", "--method",
                             METHOD).stdout


def test_a_law_that_it_breaks_is_named(command, tmp_path):
    broken = SOURCE.replace("if len(batch.unlabeled.image):", "if True:")
    assert broken != SOURCE
    (tmp_path / "careless.py").write_text(broken)
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import pytest; "
    words = ["-q", "-p", "no:cacheprovider", "tests/contract/test_methods.py", "--method", "careless:PseudoLabel", "-k",
             "2D-2classes and without_unlabeled"]
    done = command("-c", path + f"sys.exit(pytest.main({words!r}))")
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout
    assert "FAILED tests/contract/test_methods.py::test_without_unlabeled_samples" in done.stdout


BOMB = """
import os, runpy, sys
from ssl4mis.loading import Loader

original, cut, sys.argv = Loader.batch, sys.argv[1], sys.argv[2:]

def batch(self, stage, step):
    if str(step) == cut:
        os._exit(9)
    return original(self, stage, step)

Loader.batch = batch
sys.path.insert(0, "benchmarks")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_it_resumes(command, tmp_path):
    """Killed before its sixth step, it goes on to the same scores and losses."""
    assert command("-c", BOMB, "5", *RUN, "--out", tmp_path / "cut").returncode == 9
    again, whole = (command(*RUN, "--out", tmp_path / out) for out in ("cut", "whole"))
    assert again.returncode == whole.returncode == 0, again.stderr + whole.stderr
    assert "resuming at iteration 4 of 8" in again.stderr + again.stdout
    whole, cut = (records.read_all(tmp_path / out / "records")[0] for out in ("whole", "cut"))
    assert whole["cases"] == cut["cases"]
    assert [event["terms"] for event in whole["curve"]] == [event["terms"] for event in cut["curve"]]
