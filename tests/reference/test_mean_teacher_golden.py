"""One step of Mean Teacher on stored logits against stored terms and gradients."""

import numpy as np
import torch

from ssl4mis.losses import cross_entropy, dice
from ssl4mis.method import Task
from ssl4mis.methods.mean_teacher import Config, MeanTeacher

RTOL = 1e-5
EVERY, TOTAL = 150, 6000  # the file counts the ramp in blocks of 150 steps; the run's length drops out


def test_step(golden, replay, stored_step, same_gradient):
    data = golden("mean_teacher")
    student, batch, clock = stored_step(data, TOTAL)
    hp = Config(weight=float(data["consistency"]), ramp=float(data["consistency_rampup"]) * EVERY / TOTAL,
                ramp_every=EVERY, dice="all")
    method = MeanTeacher(replay, Task(student.shape[1], student.ndim - 2), hp)
    method.student.waiting, method.teacher.net.waiting = [student], [torch.tensor(data["teacher_logits"])]

    terms, watch = method(batch, clock)
    total = sum(terms.values())
    total.backward()

    assert not method.student.waiting and not method.teacher.net.waiting
    n, label = len(batch.labeled.label), batch.labeled.label
    actual = {
        "loss_ce": cross_entropy(student[:n], label), "loss_dice": dice(student[:n].softmax(1), label),
        "loss_supervised": terms["supervised"], "loss_consistency": terms["consistency"] / watch["weight"],
        "loss_total": total,
    }
    for name, value in actual.items():
        np.testing.assert_allclose(value.item(), data[name], RTOL, 0, err_msg=name)
    np.testing.assert_allclose(watch["weight"], data["consistency_weight"], 1e-9, 0)
    same_gradient(student.grad, data["grad_student_logits"])
