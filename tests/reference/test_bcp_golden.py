"""Steps of BCP on stored logits and corners against stored masks, mixtures, pseudo labels, terms and gradients."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from ssl4mis import copy_paste
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.losses import cross_entropy, dice
from ssl4mis.method import Task
from ssl4mis.methods.bcp import BCP, DICE, Config

RTOL = 1e-5
COMPONENTS = {1: "faces", 2: "edges", 3: "corners"}  # by scikit-image's connectivity


class File(NamedTuple):
    """`first`: which half of the file's batch is ours to come first: ACDC's second half receives the first box.

    `losses`: what the file holds of each mixture, by the start of its name.
    """

    hp: dict
    first: int
    losses: tuple[str, ...]


FILES = {"bcp_la": File({"dice": "linear"}, 0, ("loss",)),
         "bcp_acdc": File({"dice": "squared"}, 1, ("loss_dice", "loss_ce"))}
INPUTS = ("images", "labels", "teacher_logits*", "student_logits*", "mask_corner", "mask_ratio", "labeled_bs",
          "u_weight")
EXPECTED = {
    "bcp_la": ("mask", "loss_mask", "pseudo_labels_?", "mixed_images_?", "mixed_labels_?", "loss_?",
               "loss_total", "grad_*", "pretrain_mixed_labels", "pretrain_loss_*", "pretrain_grad_*"),
    "bcp_acdc": ("mask", "loss_mask", "pseudo_labels_?", "mixed_images_?", "loss_dice_?", "loss_ce_?", "loss_total",
                 "grad_*"),
    "bcp_pancreas": ("pseudo_labels_connectivity[123]", "loss_mix_*", "grad_*"),
}


class Stored(BCP):
    """Keeps what enters the loss."""

    def loss(self, logits, label, mask=None):
        self.entered.append((label, mask))
        return super().loss(logits, label, mask)


def make(replay, monkeypatch, name, data):
    """The method with the file's corner and teacher, the student's logits (l, u) that take a gradient, the batch."""
    file = FILES[name]
    students = [torch.tensor(data[f"student_logits_{half}"], requires_grad=True) for half in "lu"]
    hp = Config(weight=float(data["u_weight"]), box=float(data.get("mask_ratio", 2 / 3)), **file.hp)
    method = Stored(replay, Task(students[0].shape[1], students[0].ndim - 2), hp)
    monkeypatch.setattr(copy_paste, "corner", lambda *_: torch.tensor(data["mask_corner"]))
    method.entered = []
    method.student.waiting = list(students)
    method.teacher.net.waiting = in_order([torch.tensor(data[f"teacher_logits_{half}"]) for half in "ab"], file.first)
    n = int(data["labeled_bs"])
    images, labels = ((torch.tensor(data[key][:n]), torch.tensor(data[key][n:])) for key in ("images", "labels"))
    labeled, unlabeled, label = (torch.cat(in_order(x.chunk(2), file.first)) for x in (*images, labels[0]))
    return method, students, Batch(torch.cat([labeled, unlabeled]), Half(labeled, label.to(torch.uint8), ("l",) * n),
                                   Half(unlabeled, None, ("u",) * len(unlabeled)))


def in_order(halves, first):
    return [halves[first], halves[1 - first]]


def step(method, batch, stage):
    """The sum of the terms, after its backward pass."""
    total = sum(method(batch, Clock(torch.tensor(0), 1, stage)).terms.values())
    total.backward()
    return total.detach()


@pytest.mark.parametrize("name", FILES)
def test_self_training(name, golden, replay, monkeypatch, same_gradient):
    data, file = golden(name), FILES[name]
    method, students, batch = make(replay, monkeypatch, name, data)
    total = step(method, batch, "self_train")
    assert not method.student.waiting and not method.teacher.net.waiting

    (true_l, outside), (true_u, inside), (pseudo_l, filled), (pseudo_u, around) = method.entered
    assert filled is inside and around is outside
    np.testing.assert_array_equal(outside, data["mask"])
    np.testing.assert_array_equal(~inside, data["mask"])
    np.testing.assert_array_equal(outside.expand_as(pseudo_u), data["loss_mask"])
    for half, label in zip("ab", in_order([pseudo_l, pseudo_u], file.first), strict=True):
        np.testing.assert_array_equal(label, data[f"pseudo_labels_{half}"])
    for half, image in zip("lu", method.student.seen, strict=True):
        np.testing.assert_array_equal(image, data[f"mixed_images_{half}"])
    np.testing.assert_allclose(total, data["loss_total"], RTOL)

    def value(kind, logits, label, mask):
        mask = mask.expand_as(label)
        ce = cross_entropy(logits, label, mask)
        overlap = dice(logits.softmax(1), label, mask=mask, **DICE[file.hp["dice"]])
        return {"loss_ce": ce, "loss_dice": overlap, "loss": (ce + overlap) / 2}[kind].item()

    regions = {"l": [(true_l, outside, 1), (pseudo_l, inside, method.hp.weight)],
               "u": [(true_u, inside, 1), (pseudo_u, outside, method.hp.weight)]}
    for logits, (half, parts) in zip(students, regions.items(), strict=True):
        same_gradient(logits.grad, data[f"grad_student_logits_{half}"], half)
        for kind in file.losses:
            both = sum(weight * value(kind, logits, label, mask) for label, mask, weight in parts)
            np.testing.assert_allclose(both, data[f"{kind}_{half}"], RTOL, err_msg=f"{kind}_{half}")
    if name == "bcp_la":
        for half, parts in regions.items():
            np.testing.assert_array_equal(sum(label * mask for label, mask, _ in parts), data[f"mixed_labels_{half}"])


def test_pretraining(golden, replay, monkeypatch, same_gradient):
    data = golden("bcp_la")
    method, (logits, _), batch = make(replay, monkeypatch, "bcp_la", data)
    total = step(method, batch, "pretrain")
    [(label, mask)] = method.entered
    assert mask is None
    np.testing.assert_array_equal(label, data["pretrain_mixed_labels"])
    np.testing.assert_allclose(cross_entropy(logits, label).item(), data["pretrain_loss_ce"], RTOL)
    overlap = dice(logits.softmax(1), label, **DICE["linear"])
    np.testing.assert_allclose(overlap.item(), data["pretrain_loss_dice"], RTOL)
    np.testing.assert_allclose(total, data["pretrain_loss_total"], RTOL)
    same_gradient(logits.grad, data["pretrain_grad_student_logits_l"])


@pytest.fixture
def pancreas(golden, replay):
    """pancreas(component) -> the file, the method, its pseudo labels."""

    def make(component):
        data = golden("bcp_pancreas")
        logits = torch.tensor(data["teacher_logits"])
        method = BCP(replay, Task(logits.shape[1], logits.ndim - 2), Config(component=component))
        method.teacher.net.waiting = list(logits.chunk(2))
        return data, method, method.pseudo_labels(torch.zeros(len(logits), 1, *logits.shape[2:]))()

    return make


@pytest.mark.parametrize("connectivity", COMPONENTS)
def test_connectivity(connectivity, pancreas):
    data, _, pseudo = pancreas(COMPONENTS[connectivity])
    np.testing.assert_array_equal(pseudo, data[f"pseudo_labels_connectivity{connectivity}"])


@pytest.mark.parametrize("first", ["image", "pseudo"])
def test_mixed_loss(first, pancreas, same_gradient):
    data, method, pseudo = pancreas("edges")
    student = torch.tensor(data["student_logits"], requires_grad=True)
    outside, label = torch.tensor(data["loss_mask"]) == 1, torch.tensor(data["labels"])
    of_label = outside if first == "image" else ~outside
    loss = method.loss(student, label, of_label) + method.hp.weight * method.loss(student, pseudo, ~of_label)
    loss.backward()
    np.testing.assert_allclose(loss.item(), data[f"loss_mix_{first}_first"], RTOL)
    same_gradient(student.grad, data[f"grad_student_logits_{first}_first"])


@pytest.mark.parametrize("name", EXPECTED)
def test_every_array_is_accounted_for(name, golden, every_array_is_in_one):
    data = golden(name)
    inputs = (*INPUTS, "loss_mask") if name == "bcp_pancreas" else INPUTS
    every_array_is_in_one(data, inputs, EXPECTED[name])
