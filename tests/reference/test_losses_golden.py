"""Losses and their gradients against stored values."""

import math

import numpy as np
import pytest
import torch

from ssl4mis import losses

RTOL, ATOL = 1e-5, 1e-6


def mean_entropy(student):
    return losses.entropy(student.softmax(1)).mean()


def dice_per_class(student, label):
    """The term of one class is `dice` of that class alone."""
    probability = student.softmax(1)
    terms = [losses.dice(probability[:, k:k + 1], torch.where(label == k, 0, 1)) for k in range(student.shape[1])]
    return torch.stack(terms)


def bcp_dice(student, label, mask=None):
    return losses.dice(student.softmax(1), label, mask=mask, squared=False, per_sample=True)


def bcp_dice_2d(student, label, mask=None):
    return losses.dice(student.softmax(1), label, mask=mask, smooth=1e-10)


# The end of a name says on which logits it was computed; 2d is the first slice of the multi-class ones.
COVERED = {
    "loss_dice_binary": lambda s, t, y: losses.dice(s.softmax(1), y, "foreground"),
    "loss_dice_multi_onbinary": lambda s, t, y: losses.dice(s.softmax(1), y),
    "loss_dice_multi": lambda s, t, y: losses.dice(s.softmax(1), y),
    "dice_loss_per_class_multi": lambda s, t, y: dice_per_class(s, y),
    "loss_ce_binary": lambda s, t, y: losses.cross_entropy(s, y),
    "loss_ce_multi": lambda s, t, y: losses.cross_entropy(s, y),
    "softmax_mse_map_multi": lambda s, t, y: losses.softmax_mse(s, t),
    "softmax_mse_mean_multi": lambda s, t, y: losses.softmax_mse(s, t).mean(),
    "loss_entropy_c2_binary": lambda s, t, y: mean_entropy(s) / math.log(2),
    "loss_entropy_c2_multi": lambda s, t, y: mean_entropy(s) / math.log(2),
    "loss_entropy_cn_multi": lambda s, t, y: mean_entropy(s) / math.log(s.shape[1]),
    "entropy_map_c2_binary": lambda s, t, y: losses.entropy(s.softmax(1)) / math.log(2),
    "loss_entropy_minimization_multi": lambda s, t, y: mean_entropy(s),
    "entropy_map_multi": lambda s, t, y: losses.entropy(s.softmax(1)),
    "loss_dice1_binary": lambda s, t, y: losses.dice(s.softmax(1), y, "foreground", squared=False),
    "loss_bcp_dice_binary": lambda s, t, y: bcp_dice(s, y),
    "loss_mcnet_dice_binary": lambda s, t, y: losses.dice(s.softmax(1), y, "foreground", squared=False, smooth=1e-8),
    # MC-Net in 2D forgets the factor 2: 1 - D/2 in place of 1 - D
    "loss_mcnet_dice_2d": lambda s, t, y: 0.5 + 0.5 * bcp_dice_2d(s, y),
}
MASKED = {"loss_bcp_dice_masked_binary": bcp_dice, "loss_bcp_acdc_dice_masked_2d": bcp_dice_2d}
INPUTS = ("student_logits_*", "teacher_logits_*", "labels_*", "class_weights", "loss_mask")
NOT_COVERED = {
    "loss_softmax_dice_multi": "Dice between two softmaxes is not in the suite yet",
    "loss_dice_multi_weighted": "no method of the suite weights the classes",
    "softmax_kl_map_multi": "KL consistency is not in the suite yet",
    "softmax_kl_mean_multi": "KL consistency is not in the suite yet",
    "sigmoid_mse_map_multi": "no method of the suite has sigmoid outputs yet",
    "sigmoid_kl_mean_multi": "no method of the suite has sigmoid outputs yet",
    "loss_focal_g2_multi": "focal loss is not in the suite yet",
    "loss_rdrop_kl_multi": "R-Drop is not in the suite yet",
}


def tensors(data, name):
    """Student logits that take a gradient, teacher logits and labels for an array."""
    kind = "binary" if name.endswith("binary") else "multi"
    part = (..., 0) if name.endswith("2d") else ...
    student, teacher, label = (torch.tensor(data[f"{what}_{kind}"][part])
                               for what in ("student_logits", "teacher_logits", "labels"))
    return student.requires_grad_(), teacher, label.to(torch.uint8)


@pytest.mark.parametrize("name", COVERED)
def test_value_and_gradient(golden, same_gradient, name):
    data = golden("losses")
    student, teacher, label = tensors(data, name)
    value = COVERED[name](student, teacher, label)
    assert value.shape == data[name].shape
    np.testing.assert_allclose(value.detach(), data[name], RTOL, ATOL)
    if f"grad_{name}" in data:
        value.backward()
        same_gradient(student.grad, data[f"grad_{name}"])


@pytest.mark.parametrize("name", MASKED)
def test_masked_value_and_gradient(name, golden, same_gradient):
    data = golden("losses")
    student, _, label = tensors(data, name)
    mask = torch.tensor(data["loss_mask"][..., 0] if name.endswith("2d") else data["loss_mask"]) == 1
    value = MASKED[name](student, label, mask)
    np.testing.assert_allclose(value.item(), data[name], RTOL, ATOL)
    value.backward()
    same_gradient(student.grad, data[f"grad_{name}"])


@pytest.mark.parametrize(("classes", "dice", "cross_entropy"), [
    ("foreground", "loss_dice_binary", "loss_ce_binary"),
    ("all", "loss_dice_multi_onbinary", "loss_ce_binary"),
    ("all", "loss_dice_multi", "loss_ce_multi"),
])
def test_segmentation_is_the_mean_of_cross_entropy_and_dice(golden, same_gradient, classes, dice, cross_entropy):
    data = golden("losses")
    student, _, label = tensors(data, dice)
    value = losses.segmentation(student, label, classes)
    value.backward()
    np.testing.assert_allclose(value.item(), (data[dice] + data[cross_entropy]) / 2, RTOL, ATOL)
    same_gradient(student.grad, (data[f"grad_{dice}"] + data[f"grad_{cross_entropy}"]) / 2)


def test_every_array_is_accounted_for(golden, every_array_is_in_one):
    tables = [[*table, *(f"grad_{name}" for name in table)] for table in ([*COVERED, *MASKED], NOT_COVERED)]
    every_array_is_in_one(golden("losses"), INPUTS, *tables)
