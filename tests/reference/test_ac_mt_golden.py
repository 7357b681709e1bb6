"""One step of AC-MT on stored logits against stored uncertainty, masks, prototypes, terms and gradients."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from networks.base import Features, Output
from ssl4mis.batch import Clock
from ssl4mis.losses import cross_entropy, dice, entropy
from ssl4mis.method import Task
from ssl4mis.methods.ac_mt import ACMT, MODE, Config, distances, prototypes

RTOL, ATOL = 1e-5, 2e-6
EVERY = 150  # steps between two changes of the weight in the authors' code
RISE = {"entropy": 0.2, "model_uncertainty": 0.15, "prototype_error": 0.0}  # of the released scripts
LAST = 0.95  # of the entropy's threshold there, wherever it begins
FILES = {"ac_mt_entropy": "entropy", "ac_mt_model_uncertainty": "model_uncertainty",
         "ac_mt_prototype_error": "prototype_error"}
STEP = ("loss_*", "grad_student_logits", "consistency_weight", "threshold")
INPUTS = ("student_logits", "teacher_logits", "teacher_logits_clean", "mc_logits", "mc_features", "labels",
          "labeled_bs", "iter_num", "max_iterations", "consistency", "consistency_rampup", "entropy_threshold",
          "uncertainty_threshold")
MASKS = {
    "ac_mt_entropy": ("entropy", "mask"), "ac_mt_model_uncertainty": ("uncertainty", "mask"),
    "ac_mt_prototype_error": ("uncertainty", "rectified_labels", "prototype_*", "distance_*", "clean_mask",
                              "noisy_mask"),
}


@pytest.fixture
def step(golden, replay, stored_step):
    """step(name) -> the file, the method with its hyper-parameters and waiting maps, student logits, batch, clock."""

    class Network(replay):
        """Answers with logits alone, or with a pair of logits and decoder features at the second level."""

        def forward(self, image):
            features = None
            if isinstance(self.waiting[0], tuple):
                self.waiting[0], features = self.waiting[0]
            return Output(super().forward(image).heads, Features([], [None, features]))

    def make(name):
        data, ambiguity = golden(name), FILES[name]
        maps = {key: torch.tensor(data[key]) for key in data if key.startswith(("teacher_logits", "mc_"))}
        total, passes = int(data["max_iterations"]), maps.get("mc_logits", torch.zeros(1))
        student, batch, clock = stored_step(data, total)
        threshold = float(data.get("entropy_threshold", 0.75))
        rise = LAST - threshold if ambiguity == "entropy" else RISE[ambiguity]
        hp = Config(ambiguity=ambiguity, threshold=threshold, rise=rise, passes=len(passes),
                    spread=float(data.get("uncertainty_threshold", 0.1)), weight=float(data["consistency"]),
                    ramp=float(data["consistency_rampup"]) * EVERY / total, ramp_every=EVERY, compat="legacy")
        method = ACMT(Network, Task(student.shape[1], student.ndim - 2), hp)
        method.student.waiting, method.teacher.net.waiting = [student], [maps["teacher_logits"]]
        if ambiguity == "model_uncertainty":
            method.student.waiting = [*passes, student]
        if ambiguity == "prototype_error":
            sampled = list(zip(passes, maps["mc_features"], strict=True))
            method.teacher.net.waiting += [maps["teacher_logits_clean"], *sampled]
        return data, method, student, batch, clock

    return make


@pytest.mark.parametrize("name", FILES)
def test_step(step, same_gradient, name):
    data, method, student, batch, clock = step(name)
    terms, watch = method(batch, clock)
    total = sum(terms.values())
    total.backward()

    assert not method.student.waiting and not method.teacher.net.waiting
    n, label = len(batch.labeled.label), batch.labeled.label
    actual = {
        "loss_ce": cross_entropy(student[:n], label), "loss_dice": dice(student[:n].softmax(1), label),
        "loss_supervised": terms["supervised"], "loss_total": total,
        "loss_consistency": (terms["consistency"] + terms.get("entropy", 0)) / watch["weight"],
    }
    assert actual.keys() == {key for key in data if key.startswith("loss_")}
    for key, value in actual.items():
        np.testing.assert_allclose(value.item(), data[key], RTOL, 0, err_msg=key)
    np.testing.assert_allclose(watch["weight"], data["consistency_weight"], 1e-9, 0)
    same_gradient(student.grad, data["grad_student_logits"])
    if "threshold" in data:
        np.testing.assert_allclose(watch["threshold"] * scale(name), data["threshold"], 1e-9, 0)
    mask = data["mask" if "mask" in data else "noisy_mask"]
    np.testing.assert_allclose(watch["ambiguous"], mask.mean(), RTOL)


def scale(name):
    """What the method's shares of the largest entropy are multiplied by in a file."""
    return np.log(2) if name == "ac_mt_model_uncertainty" else 1


def ambiguous(method, monkeypatch, batch, clock):
    """The mask that the method's consistency is computed with."""
    seen = []
    monkeypatch.setattr(method, "distance", lambda p, target, mask: seen.append(mask) or p.mean())
    method(batch, clock)
    return seen[0]


def test_entropy_and_mask(step, monkeypatch):
    data, method, student, batch, clock = step("ac_mt_entropy")
    actual = entropy(student[len(batch.labeled.label):].softmax(1)).detach() / method.largest
    np.testing.assert_allclose(actual[:, 0], data["entropy"], RTOL, ATOL)
    mask = ambiguous(method, monkeypatch, batch, clock)
    np.testing.assert_array_equal(mask.expand(data["mask"].shape), data["mask"])


def test_model_uncertainty_and_mask(step, monkeypatch):
    data, method, _, batch, clock = step("ac_mt_model_uncertainty")
    waiting = list(method.student.waiting)
    actual = method.uncertainty(batch.unlabeled.image) * scale("ac_mt_model_uncertainty")
    np.testing.assert_allclose(actual, data["uncertainty"], RTOL, ATOL)
    method.student.waiting = waiting
    np.testing.assert_array_equal(ambiguous(method, monkeypatch, batch, clock), data["mask"])


def test_prototypes_and_masks(step):
    data, method, student, batch, _ = step("ac_mt_prototype_error")
    target, *_ = rest = method.teacher.net.waiting[1:]
    image, n = batch.unlabeled.image, len(batch.labeled.label)
    method.teacher.net.waiting = list(rest[1:])
    spread, features = method.sampled(image)
    np.testing.assert_allclose(spread, data["uncertainty"], RTOL, ATOL)
    weight = method.certain(target.softmax(1), spread)
    np.testing.assert_array_equal(weight.argmax(1), data["rectified_labels"])
    features = F.interpolate(features, image.shape[2:], mode=MODE[image.ndim - 2])
    centers = prototypes(features, weight)
    for index, name in enumerate(("background", "object")):
        np.testing.assert_allclose(centers[:, index], data[f"prototype_{name}"], RTOL, ATOL)
        away = distances(features, centers)[:, index:index + 1]
        np.testing.assert_allclose(away, data[f"distance_{name}"], RTOL, ATOL)
    method.teacher.net.waiting = list(rest)
    noisy, clean = method.disputed(image, student[n:].detach().argmax(1, keepdim=True))
    np.testing.assert_array_equal(noisy.expand(data["noisy_mask"].shape), data["noisy_mask"])
    np.testing.assert_array_equal(clean.expand(data["clean_mask"].shape), data["clean_mask"])


@pytest.mark.parametrize("name", FILES)
def test_every_array_is_compared(golden, every_array_is_in_one, name):
    every_array_is_in_one(golden(name), STEP, INPUTS, MASKS[name])


@pytest.mark.parametrize(("kind", "unit"), [("ent", 1.0), ("mu", np.log(2))])
def test_thresholds_along_the_run(golden, step, kind, unit):
    data = golden("schedules")
    names = [name for name in data if name.startswith(f"threshold_acmt_{kind}_max")]
    assert names
    _, method, student, batch, _ = step("ac_mt_entropy")
    method.hp = Config(rise=RISE["entropy" if kind == "ent" else "model_uncertainty"])
    target = method.teacher.net.waiting[0]
    for name in names:
        total = int(data[name.replace(f"threshold_acmt_{kind}", "max_iterations")])
        for k, expected in zip(data["iterations"].tolist(), data[name].tolist(), strict=True):
            method.student.waiting, method.teacher.net.waiting = [student], [target]
            watch = method(batch, Clock(torch.tensor(int(k)), total)).watch
            np.testing.assert_allclose(float(watch["threshold"]) * unit, expected, 1e-9, 0, err_msg=name)
