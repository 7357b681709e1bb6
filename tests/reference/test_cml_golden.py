"""One step of CML on stored logits and features of both networks against stored mixtures, terms and gradients."""

import numpy as np
import pytest
import torch
from torch import nn

from networks.base import Features, Output
from ssl4mis import copy_paste
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.method import Task
from ssl4mis.methods import cml
from ssl4mis.methods.cml import CML, Config, cosines

RTOL = 1e-5


class Stored(nn.Module):
    """A network that answers with stored logits and coarsest features, in order; what it saw is in `seen`."""

    def __init__(self):
        super().__init__()
        self.waiting, self.seen = [], []
        self.backbone = nn.Module()
        self.backbone.upsamplings = (None, None, None)

    def forward(self, image):
        logits, features = self.waiting.pop(0)
        assert len(image) == len(logits) and image.shape[2:] == logits.shape[2:]
        self.seen.append(image)
        return Output({"seg": logits}, Features([features], []))


@pytest.fixture
def stored(golden, monkeypatch):
    """The file, the method, what its networks will say, the batch, and the masks and labels that it will compute."""
    data = golden("cml")
    leaves = {name: torch.tensor(data[name], requires_grad=True) for name in data
              if name.startswith(("student_logits_", "features_"))}
    classes = data["student_logits_1_l"].shape[1]
    hp = Config(box=float(data["mask_ratio"]), weight=float(data["u_weight"]), supervised=float(data["l_weight"]),
                discrepancy=float(data["dis_weight"]))
    method = CML(lambda upsampling=None: Stored(), Task(classes, data["labels"].ndim - 1), hp)
    for index, net in enumerate((method.first, method.second), 1):
        steps = [(leaves[f"student_logits_{index}_{half}"], leaves[f"features_{index}_{half}"]) for half in "lu"]
        net.waiting = [(torch.tensor(data[f"unlabeled_logits_{index}"]), None), *steps]
    n = int(data["labeled_bs"])
    image, label = torch.tensor(data["images"]), torch.tensor(data["labels"][:n]).to(torch.uint8)
    batch = Batch(image, Half(image[:n], label, ("l",) * n), Half(image[n:], None, ("u",) * (len(image) - n)))

    corners = [torch.tensor(data[f"mask_corner_{half}"]) for half in ("unlabeled", "labeled")]
    found, box, loss = {"boxes": [], "labels": [], "losses": []}, copy_paste.box, cml.segmentation
    monkeypatch.setattr(copy_paste, "corner", lambda *args: corners.pop(0))
    monkeypatch.setattr(copy_paste, "box", lambda *args: kept(found["boxes"], box(*args)))

    def segmentation(logits, label, **kind):
        found["labels"].append(label)
        return kept(found["losses"], loss(logits, label, **kind))

    monkeypatch.setattr(cml, "segmentation", segmentation)
    return data, method, leaves, batch, found


def kept(where, value):
    where.append(value)
    return value


def test_step(stored, same_gradient):
    data, method, leaves, batch, found = stored
    terms, _ = method(batch, Clock(torch.tensor(0), 1, "train"))
    sum(terms.values()).backward()

    free, inside = found["boxes"]
    for half, box in (("labeled", inside), ("unlabeled", free)):
        np.testing.assert_array_equal(~box, data[f"mask_{half}"], half)
    for index, net in enumerate((method.first, method.second), 1):
        assert not net.waiting
        np.testing.assert_array_equal(net.seen[0], batch.unlabeled.image)
        for half, image in zip("lu", net.seen[1:], strict=True):
            np.testing.assert_array_equal(image, data[f"mixed_images_{half}"], f"network {index}, {half}")

    names = [f"loss_supervised_{index}_{half}" for half in "lu" for index in (1, 2)]
    targets = ["mixed_labels_l", "mixed_labels_l", "mixed_pseudo_labels_1", "mixed_pseudo_labels_2"]
    for name, loss, target, label in zip(names, found["losses"], targets, found["labels"], strict=True):
        np.testing.assert_array_equal(label, data[target], target)
        np.testing.assert_allclose(loss.item(), data[name], RTOL, err_msg=name)
    actual = {"loss_total": sum(terms.values()), "loss_discrepancy_weighted": terms["discrepancy"]}
    for half, key, weight in (("l", "supervised", "l_weight"), ("u", "pseudo", "u_weight")):
        actual[f"loss_{half}"] = terms[key] / float(data[weight])
        outs = [Output({}, Features([leaves[f"features_{index}_{half}"]], [])) for index in (1, 2)]
        actual[f"loss_discrepancy_{half}"] = cosines(*outs)
    assert {*actual, *names} == {name for name in data if name.startswith("loss_")}
    for name, value in actual.items():
        np.testing.assert_allclose(value.item(), data[name], RTOL, err_msg=name)
    for name, leaf in leaves.items():
        same_gradient(leaf.grad, data[f"grad_{name}"], name)


def test_pseudo_labels(stored):
    data, method, _, batch, _ = stored
    for index, net in enumerate((method.first, method.second), 1):
        pseudo = method.pseudo_labels(net, batch.unlabeled.image)()
        np.testing.assert_array_equal(pseudo, data[f"pseudo_labels_{index}"])


def test_every_array_is_compared(stored, every_array_is_in_one):
    """`test_step` has all losses, by name."""
    expected = ("mask_labeled", "mask_unlabeled", "mixed_*", "pseudo_labels_?", "loss_*", "grad_*")
    inputs = ("images", "labels", "unlabeled_logits_?", "mask_corner_*", "student_logits_*", "features_*", "labeled_bs",
              "*_weight", "mask_ratio")
    every_array_is_in_one(stored[0], expected, inputs)
