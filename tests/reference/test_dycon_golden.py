"""One step of DyCON on stored logits and projected features against stored embeddings, terms and gradients.

The stored classes of positions come from the labels of unlabeled images; here they are given to the loss as they are.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from networks.base import Features, Output
from ssl4mis.batch import Clock
from ssl4mis.losses import cross_entropy, dice
from ssl4mis.method import Task
from ssl4mis.methods.dycon import Config, DyCON, contrast, embedding, uncertain_consistency

RTOL, ATOL = 1e-5, 2e-6
EVERY, TOTAL = 150, 30000  # the file counts the ramp in blocks of 150 steps; the run's length drops out
CROSS = 0.3, 0.5  # first and last threshold of the released loss


class Last(nn.Module):
    """In place of a projection: what was stored as projected."""

    def forward(self, encoder):
        return encoder[-1]


@pytest.fixture
def stored(golden, replay, stored_step):
    """The file, the method with its hyper-parameters, logits and features that take a gradient, batch and clock."""
    data = golden("dycon")
    logits, batch, _ = stored_step(data, TOTAL)
    features = torch.tensor(data["student_features"], requires_grad=True)
    dims = logits.ndim - 2

    class Network(replay):
        backbone = SimpleNamespace(spatial_dims=dims, encoder_channels=(1, features.shape[1]),
                                   encoder_strides=((8,) * dims, (16,) * dims))

        def forward(self, image):
            self.waiting[0], features = self.waiting[0]
            return Output(super().forward(image).heads, Features([features], []))

    hp = Config(weight=float(data["consistency"]), ramp=float(data["consistency_rampup"]) * EVERY / TOTAL,
                ramp_every=EVERY, uncertainty=float(data["u_weight"]), contrast=float(data["u_weight"]),
                beta_first=float(data["beta_max"]), beta_last=float(data["beta_min"]),
                temperature=float(data["temperature"]), gamma=float(data["gamma"]), cross=float(data["lambda_cross"]),
                cross_first=CROSS[0], cross_last=CROSS[1],
                cross_ramp=float(data["rampup_epochs"] / data["total_epochs"]), contrasted="unlabeled",
                compat="legacy")
    method = DyCON(Network, Task(logits.shape[1], dims), hp)
    method.projection, method.teacher_projection = Last(), Last()
    method.student.waiting = [(logits, features)]
    method.teacher.net.waiting = [tuple(torch.tensor(data[f"teacher_{name}"]) for name in ("logits", "features"))]
    # the file has beta and the threshold by the epoch and the weight by the iteration
    clock = Clock(torch.tensor(int(data["epoch"])), int(data["total_epochs"]))
    count, weight = Clock(torch.tensor(int(data["iter_num"])), TOTAL), method.consistency_weight
    method.consistency_weight = lambda _: weight(count)
    return data, method, logits, features, batch, clock


def given(data):
    """Stored classes of positions (B, N), all of them certain."""
    classes = torch.tensor(data["patch_labels"]).flatten(1).long()
    return classes, torch.ones(classes.shape)


def test_step(stored, same_gradient):
    data, method, logits, features, batch, clock = stored
    assert data["l_weight"] == 1, "the method has no weight for this term"
    method.positions = lambda *_: given(data)
    terms, watch = method(batch, clock)
    total = sum(terms.values())
    total.backward()

    assert not method.student.waiting and not method.teacher.net.waiting
    n, label, hp = len(batch.labeled.label), batch.labeled.label, method.hp
    ce, overlap = cross_entropy(logits[:n], label), dice(logits[:n].softmax(1), label, "foreground")
    actual = {
        "loss_ce": ce, "loss_dice": overlap, "loss_consistency": terms["consistency"] / watch["weight"],
        "loss_fecl": terms["contrast"] / hp.contrast, "loss_uncl": terms["uncertainty"] / hp.uncertainty,
        "loss_total": total,
    }
    assert actual.keys() == {name for name in data if name.startswith("loss_")}
    for name, value in actual.items():
        np.testing.assert_allclose(value.item(), data[name], RTOL, 0, err_msg=name)
    np.testing.assert_allclose(terms["supervised"].item(), data["loss_ce"] + data["loss_dice"], RTOL)
    np.testing.assert_allclose(watch["weight"], data["consistency_weight"], 1e-9, 0)
    np.testing.assert_allclose(watch["beta"], data["beta"], 1e-9, 0)
    same_gradient(logits.grad, data["grad_student_logits"], "logits")
    same_gradient(features.grad, data["grad_student_features"], "features")


def test_embeddings_and_classes_of_positions(stored):
    data, method, logits, features, *_ = stored
    np.testing.assert_allclose(embedding(features).detach(), data["student_embedding"], RTOL, ATOL)
    theirs = embedding(torch.tensor(data["teacher_features"]))
    np.testing.assert_allclose(theirs, data["teacher_embedding"], RTOL, ATOL)
    classes, certain = method.positions(logits.detach().softmax(1), torch.tensor(data["labels"]), features.shape[2:])
    np.testing.assert_array_equal(classes, data["patch_labels"].squeeze(1))
    assert (certain == 1).all(), "labels are certain"


@pytest.mark.parametrize(("name", "gamma", "teacher"), [
    ("fecl_no_focal_no_teacher", 0.0, False), ("fecl_focal_no_teacher", None, False),
    ("fecl_teacher_no_focal", 0.0, True), ("loss_fecl", None, True),
])
def test_contrast(stored, name, gamma, teacher):
    data, method, _, _, batch, clock = stored
    n, (classes, certain) = len(batch.labeled.label), given(data)
    own, other = (torch.tensor(data[f"{key}_embedding"])[n:] for key in ("student", "teacher"))
    near, apart = contrast(own, other, classes[n:], certain[n:], method.cross_threshold(clock), method.hp.temperature,
                           method.hp.gamma if gamma is None else gamma, legacy=True)
    actual = near + (method.hp.cross * apart if teacher else 0)
    np.testing.assert_allclose(actual, data[name], RTOL, 0)


def test_uncertain_consistency(stored):
    data, method, logits, _, _, clock = stored
    target = torch.tensor(data["teacher_logits"]).softmax(1)
    actual = uncertain_consistency(logits.detach().softmax(1), target, method.beta(clock))
    np.testing.assert_allclose(actual, data["loss_uncl"], RTOL, 0)


def test_every_array_is_compared(stored, every_array_is_in_one):
    step = ("loss_*", "grad_student_*", "beta", "consistency_weight")
    others = ("student_embedding", "teacher_embedding", "patch_labels", "fecl_*")
    inputs = ("student_logits", "teacher_logits", "student_features", "teacher_features", "labels", "labeled_bs",
              "iter_num", "epoch", "total_epochs", "beta_max", "beta_min", "temperature", "gamma", "rampup_epochs",
              "l_weight", "u_weight", "consistency", "consistency_rampup", "lambda_cross")
    every_array_is_in_one(stored[0], step, others, inputs)


def test_beta_along_the_run(golden, stored):
    data, method = golden("schedules"), stored[1]
    method.hp = Config()
    actual = [float(method.beta(Clock(torch.tensor(epoch), total))) for epoch, total in data["epochs"].tolist()]
    np.testing.assert_allclose(actual, data["dycon_beta"], 1e-9, 0)
