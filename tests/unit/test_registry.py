"""Methods by name: found as files, listed without importing, loaded from anywhere."""

import sys
from pathlib import Path

import pytest

import networks
from ssl4mis import config, registry
from ssl4mis.errors import UserError

PLUGIN = '''"""A method from elsewhere."""
from dataclasses import dataclass

from ssl4mis.method import Method, Needs


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        strength: of nothing.
    """

    strength: float = 0.25


class Base(Method):
    pass


class Mine(Base):
    Config = Config
    needs = Needs(unlabeled=False)
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "their_lab").mkdir()
    (tmp_path / "their_lab" / "__init__.py").touch()
    (tmp_path / "their_lab" / "mine.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "their_lab.mine:Mine"
    for name in ("their_lab", "their_lab.mine"):
        sys.modules.pop(name, None)


def test_every_file_is_a_method():
    files = {path.stem for path in Path(registry.__file__).with_name("methods").glob("[!_]*.py")}
    assert {"supervised", "mean_teacher", "ua_mt"} <= files <= set(registry.names())
    assert registry.names() == sorted(registry.names())


def test_names_and_titles_come_without_importing(tmp_path, monkeypatch):
    (tmp_path / "broken_one.py").write_text('"""Broken: but listed.\n\nMore.\n"""\nraise RuntimeError("imported")\n')
    monkeypatch.setattr(registry, "FOLDER", tmp_path)
    assert "broken_one" in registry.names()
    assert registry.title("broken_one") == "Broken: but listed."


@pytest.mark.parametrize("text", ["x = 1\n", "", "'''Single quotes.'''\n"])
def test_a_file_without_the_usual_docstring_does_not_break_the_list(tmp_path, monkeypatch, text):
    (tmp_path / "bare.py").write_text(text)
    monkeypatch.setattr(registry, "FOLDER", tmp_path)
    assert registry.title("bare") in ("", "Single quotes.")


@pytest.mark.parametrize("name", registry.names())
def test_every_method_has_a_title_a_config_and_needs(name):
    assert registry.title(name)
    method = registry.method_class(name)
    assert method.__module__.endswith(name)
    method.Config()  # every hyper-parameter has a default
    assert method.needs.unlabeled in (True, False)


@pytest.mark.parametrize(("written", "meant"), [
    ("ua_mt", "ua_mt"), ("UA-MT", "ua_mt"), ("Ua_Mt", "ua_mt"), ("mt", "mean_teacher"), ("MT", "mean_teacher"),
    ("mean-teacher", "mean_teacher"), ("a.b:C", "a.b:C"),
])
def test_spellings(written, meant):
    assert registry.canonical(written) == meant


def test_aliases_point_at_methods():
    assert set(registry.ALIASES.values()) <= set(registry.names())
    assert not set(registry.ALIASES) & set(registry.names())


def test_a_method_from_another_package_with_its_options(plugin):
    (spec,), _ = config.parse(["--method", plugin, "--hp.strength", "0.5"])
    assert (spec.method, spec.hp, spec.unlabeled_batch) == (plugin, {"strength": 0.5}, 0)
    assert registry.method_class(plugin).__name__ == "Mine"
    assert ":" not in spec.id and "/" not in spec.id


@pytest.mark.parametrize(("name", "expected"), [
    ("their_lab.mine:Yours", "found 0"), ("their_lab.other:Mine", "their_lab.other"),
    ("their_lab.mine:Config", "found 0"), ("ua_nt", "did you mean ua_mt?"),
])
def test_what_is_not_there_is_one_line(plugin, name, expected):
    with pytest.raises(UserError) as error:
        registry.method_class(name)
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("value", "expected"), [
    ("chery", "fruit 'chery' is not known: did you mean cherry?"),
    ("APPLE", "fruit 'APPLE' is not known: did you mean apple?"),
    ("xyz", "fruit 'xyz' is not known: expected one of apple, cherry"),
])
def test_nearest(value, expected):
    assert registry.nearest("fruit", value, ["cherry", "apple"]) == expected


def test_nearest_among_capital_letters():
    assert registry.nearest("data set", "LAA", ["LA", "phantom"]).endswith("did you mean LA?")


def test_the_catalog_says_a_line_of_every_network():
    lines = config.catalog().splitlines()
    for name in networks.NAMES:
        assert any(line.split()[0] == name and len(line.split()) > 3 for line in lines), name
