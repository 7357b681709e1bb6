"""One step of UPC on stored logits against stored terms and gradients, with the released and with the paper's loss."""

import numpy as np
import pytest
import torch

from ssl4mis.losses import cross_entropy, dice
from ssl4mis.method import Task
from ssl4mis.methods.upc import UPC, Config

RTOL = 1e-5
EVERY, TOTAL = 150, 6000  # the files count the ramp in blocks of 150 steps; the run's length drops out
LOSSES = {"confident": "threshold", "rectified": "rectified"}


@pytest.mark.parametrize("loss", LOSSES)
def test_step(golden, replay, stored_step, same_gradient, loss):
    data, name = golden("upc"), LOSSES[loss]
    student, batch, clock = stored_step(data, TOTAL)
    hp = Config(loss=loss, threshold=float(data["threshold"]), temperature=float(data["temperature"]),
                weight=float(data["consistency"]), ramp=float(data["consistency_rampup"]) * EVERY / TOTAL,
                ramp_every=EVERY)
    method = UPC(replay, Task(student.shape[1], student.ndim - 2), hp)
    method.student.waiting, method.teacher.net.waiting = [student], [torch.tensor(data["teacher_logits"])]
    terms, watch = method(batch, clock)
    total = sum(terms.values())
    total.backward()

    assert not method.student.waiting and not method.teacher.net.waiting
    n, label = len(batch.labeled.label), batch.labeled.label
    actual = {
        "loss_ce": cross_entropy(student[:n], label), "loss_dice": dice(student[:n].softmax(1), label, hp.dice),
        "loss_supervised": terms["supervised"], f"loss_total_{name}": total,
        f"loss_consistency_{name}": terms["consistency"] / watch["weight"],
    }
    for key, value in actual.items():
        np.testing.assert_allclose(value.item(), data[key], RTOL, 0, err_msg=key)
    np.testing.assert_allclose(watch["weight"], data["consistency_weight"], 1e-9, 0)
    same_gradient(student.grad, data[f"grad_student_logits_{name}"])


def test_every_array_is_compared(golden, every_array_is_in_one):
    step = ("loss_ce", "loss_dice", "loss_supervised", "loss_consistency_*", "loss_total_*", "grad_student_logits_*",
            "consistency_weight")
    inputs = ("student_logits", "teacher_logits", "labels", "labeled_bs", "iter_num", "threshold", "temperature",
              "consistency", "consistency_rampup")
    every_array_is_in_one(golden("upc"), step, inputs)
