"""`run.py --describe`, as a user types it."""

import pytest
from commands import ROOT, command


def describe(*words, cwd=ROOT):
    return command(ROOT / "benchmarks" / "run.py", *words, cwd=cwd)


def test_a_card_is_the_section_of_the_document():
    done = describe("--describe", "UA-MT")
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("## ua_mt\n")
    assert f"\n{done.stdout}" in (ROOT / "docs" / "methods.md").read_text(), "regenerate: python benchmarks/methods.py"


def test_elsewhere_there_are_no_numbers(tmp_path):
    done = describe("--describe=supervised", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("## supervised\n")
    assert "### Networks and steps" in done.stdout and "### Published and ours" not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("words", "expected"), [
    (("--describe", "ua_nt"), "did you mean ua_mt?"),
    (("--describe", "no.such:Thing"), "expected package.module:Class"),
    (("--describe",), "expected one of"),
])
def test_what_is_not_there_is_one_line(words, expected):
    done = describe(*words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and expected in done.stderr
