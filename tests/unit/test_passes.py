"""Samples through networks per step, for methods whose papers say how many there are."""

import dataclasses

import pytest

import data_prep
import networks
from networks.base import NetSpec
from ssl4mis import config, passes, registry
from ssl4mis.method import Task


def per_step(name, labeled=2, unlabeled=2, **hp):
    cls = registry.method_class(name)
    (spec,), _ = config.parse(["--method", name, "--dataset", "phantom", "--labeled_batch", str(labeled),
                               "--unlabeled_batch", str(unlabeled)])
    spec = dataclasses.replace(spec, precision="32-true", patch=[16, 16, 16], hp=spec.hp | hp)
    task = Task(len(data_prep.dataset("phantom").classes), 3, 1, (labeled, unlabeled))
    build = networks.Build("vnet", task.classes, NetSpec(1, (16, 16, 16), 2))
    return passes.per_step(lambda: cls(build, task, cls.Config(**spec.hp)), spec)


@pytest.mark.parametrize(("name", "batch", "expected"), [
    ("supervised", (2, 0), (2, 2)),
    ("mean_teacher", (2, 2), (4 + 2, 4)),
    ("mean_teacher", (1, 3), (4 + 3, 4)),
    ("ua_mt", (2, 2), (4 + 2 + 8 * 2, 4)),  # the student, the teacher, and eight samples of its uncertainty
    ("cps", (2, 2), (8, 8)),
    ("mcf", (2, 2), (8, 8)),
    ("dtc", (2, 2), (4, 4)),
    ("urpc", (2, 2), (4, 4)),
])  # fmt: skip
def test_counts_by_hand(name, batch, expected):
    assert per_step(name, *batch) == pytest.approx(expected)


def test_stages_are_weighted_by_their_share():
    """BCP of 4 + 4: pre-training mixes the two halves of the labeled samples; self-training asks the teacher for the
    unlabeled ones and trains on two mixtures of two."""
    forward, backward = per_step("bcp", 4, 4)
    assert backward == pytest.approx(2 / 17 * 2 + 15 / 17 * 4)
    assert forward == pytest.approx(backward + 15 / 17 * 4)


def test_fewer_predictions_of_the_uncertainty_are_fewer_passes():
    assert per_step("ua_mt", passes=2)[0] == pytest.approx(4 + 2 + 2 * 2)
