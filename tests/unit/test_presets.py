"""What methods change for a data set: names and values that exist, and what a command line resolves to."""

import dataclasses
import typing

import pytest

import data_prep
from ssl4mis import config, registry
from ssl4mis.config import NOT_HYPER, RunSpec
from ssl4mis.method import Preset

SETTINGS = {f.name for f in dataclasses.fields(RunSpec)} - {*NOT_HYPER, "method", "hp", "iterations"}
PRESETS = [(method, dataset) for method in registry.names() for dataset in registry.method_class(method).presets]


def one(line: str) -> RunSpec:
    (spec,), _ = config.parse(line.split())
    return spec


def preset(method: str, dataset: str) -> Preset:
    return registry.method_class(method).presets[dataset]


@pytest.fixture
def bcp(monkeypatch):
    """bcp(hp, run, iterations): the command line of a method whose preset for LA is this one."""
    cls = registry.method_class("bcp")

    def change(*values):
        monkeypatch.setattr(cls, "presets", {"LA": Preset(*values)})
        return "--method bcp --dataset LA"

    return change


@pytest.mark.parametrize(("method", "dataset"), PRESETS)
def test_names_exist_and_values_can_work(method, dataset):
    hp, run, iterations, dims = preset(method, dataset)
    cls, described = registry.method_class(method), data_prep.dataset(dataset)
    assert dims in (None, *map(described.dims, described.protocols.values()))
    assert hp.keys() <= {f.name for f in dataclasses.fields(cls.Config)}
    assert run.keys() <= SETTINGS, "the published length belongs in `iterations`, and the rest is not a setting"
    assert iterations is None or isinstance(iterations, int) and iterations > 0
    for values, kinds in ((hp, typing.get_type_hints(cls.Config)), (run, typing.get_type_hints(RunSpec))):
        for name, value in values.items():
            if typing.get_origin(kinds[name]) is typing.Literal:
                assert value in typing.get_args(kinds[name]), name
    dims = dims or described.spatial_dims
    plain = {"patch": [32] * dims, "stride": [16] * dims, "unlabeled_batch": 2 * cls.needs.unlabeled}
    config.check_values(RunSpec(method=method, hp=hp, **plain | run), dims)


@pytest.mark.parametrize(("method", "dataset"), PRESETS)
def test_the_preset_is_what_a_command_resolves_to(method, dataset):
    described = data_prep.dataset(dataset)
    for protocol in described.protocols.values():
        hp, run, iterations, dims = preset(method, dataset)
        if dims not in (None, described.dims(protocol)):
            hp, run, iterations = {}, {}, None
        spec = one(f"--method {method} --dataset {dataset} --protocol {protocol.name}")
        assert spec.hp == dataclasses.asdict(registry.method_class(method).Config(**hp))
        assert {name: getattr(spec, name) for name in run} == run
        published = iterations if protocol.published else None
        assert spec.iterations == (published or protocol.iterations)


@pytest.mark.parametrize(("method", "dataset"), PRESETS)
def test_a_preset_does_not_repeat_the_protocol(method, dataset):
    """What all methods of a data set share stands in its protocol, once."""
    described = data_prep.dataset(dataset)
    hp, run, iterations, dims = preset(method, dataset)
    protocols = [p for p in described.protocols.values() if p.published and dims in (None, described.dims(p))]
    assert protocols
    for protocol in protocols:
        assert iterations != protocol.iterations
        for name, value in run.items():
            shared = getattr(protocol, name, None)
            assert value != (list(shared) if isinstance(shared, tuple) else shared), name


@pytest.mark.parametrize(("line", "expected"), [
    ("--method bcp --dataset LA", {"iterations": 17000, "labeled_batch": 4, "unlabeled_batch": 4}),
    ("--method bcp --dataset LA --protocol cv5", {"iterations": 6000, "labeled_batch": 4}),
    ("--method bcp --dataset LA --protocol lite", {"iterations": 3000, "labeled_batch": 4, "unlabeled_batch": 4}),
    ("--method mcf --dataset la", {"iterations": 6000, "augmentation": []}),
    ("--method mean_teacher --dataset ACDC --protocol slices", {
        "iterations": 30000, "labeled_batch": 12, "unlabeled_batch": 12, "schedule": "poly", "patch": [256, 256],
        "network": "unet"}),
    ("--method bcp --dataset ACDC --protocol slices", {
        "iterations": 40000, "labeled_batch": 12, "unlabeled_batch": 12, "schedule": "constant"}),
    ("--method cps --dataset ACDC", {"iterations": 30000, "labeled_batch": 2, "schedule": "poly"}),
    ("--method cps --dataset BraTS", {
        "iterations": 30000, "learning_rate": 0.1, "schedule": "poly", "network": "unet"}),
    ("--method dtc --dataset Pancreas", {"iterations": 6000, "augmentation": []}),
    ("--method corrmatch --dataset Pancreas", {"iterations": 15000, "augmentation": [], "schedule": "poly"}),
    ("--method mcf --dataset LA --protocol lite", {"iterations": 3000, "augmentation": []}),
    ("--method mcf --dataset phantom", {"iterations": 1000, "augmentation": ["rotflip"]}),
    ("--method ua_mt --dataset LA", {"iterations": 6000, "labeled_batch": 2, "augmentation": ["rotflip"]}),
])
def test_known_answers(line, expected):
    spec = one(line)
    assert {name: getattr(spec, name) for name in expected} == expected


def test_the_command_line_goes_over_the_preset(bcp):
    both = {"labeled_batch": 6, "unlabeled_batch": 6}
    line = bcp({"box": 0.5, "weight": 0.25}, {**both, "schedule": "poly"}, 123)
    spec = one(line)
    assert (spec.hp["box"], spec.hp["weight"], spec.labeled_batch, spec.schedule, spec.iterations) == (
        0.5, 0.25, 6, "poly", 123)
    spec = one(f"{line} --hp.box 0.75 --labeled_batch 8 --unlabeled_batch 8 --iterations 10")
    assert (spec.hp["box"], spec.hp["weight"], spec.labeled_batch, spec.schedule, spec.iterations) == (
        0.75, 0.25, 8, "poly", 10)


def test_a_config_file_goes_over_the_preset(bcp, tmp_path):
    line = bcp({"box": 0.5}, {"labeled_batch": 6, "unlabeled_batch": 6}, 123)
    file = tmp_path / "run.yaml"
    file.write_text("labeled_batch: 8\nunlabeled_batch: 8\niterations: 10\nhp:\n  weight: 0.25\n")
    spec = one(f"{line} --config {file}")
    assert (spec.hp["box"], spec.hp["weight"], spec.labeled_batch, spec.iterations) == (0.5, 0.25, 8, 10)


def test_a_preset_for_slices_changes_no_volumes(monkeypatch):
    cls = registry.method_class("bcp")
    for dims, box in ((2, 2 / 3), (3, 0.5), (None, 0.5)):
        monkeypatch.setattr(cls, "presets", {"LA": Preset({"box": 0.5}, dims=dims)})
        assert one("--method bcp --dataset LA").hp["box"] == box


def test_the_preset_of_another_data_set_changes_nothing(bcp):
    line = bcp({"box": 0.5}, {"labeled_batch": 6}, 123).replace("LA", "phantom")
    protocol = next(iter(data_prep.dataset("phantom").protocols.values()))
    spec = one(line)
    assert spec.hp == dataclasses.asdict(registry.method_class("bcp").Config())
    assert (spec.labeled_batch, spec.iterations) == (protocol.labeled_batch, protocol.iterations)
