"""One step of entropy minimization on stored logits against stored terms and gradients."""

import numpy as np
import pytest

from ssl4mis.losses import cross_entropy, dice
from ssl4mis.method import Task
from ssl4mis.methods.entropy_minimization import Config, EntropyMinimization

RTOL = 1e-5
EVERY, TOTAL = 150, 30000  # the file counts the ramp in blocks of 150 steps; the run's length drops out


@pytest.fixture
def data(golden):
    return golden("entropy_minimization")


def test_step(data, replay, stored_step, same_gradient):
    student, batch, clock = stored_step(data, TOTAL)
    hp = Config(weight=float(data["consistency"]), ramp=float(data["consistency_rampup"]) * EVERY / TOTAL,
                ramp_every=EVERY, images="all", compat="legacy")
    method = EntropyMinimization(replay, Task(student.shape[1], student.ndim - 2), hp)
    method.net.waiting = [student]

    terms, watch = method(batch, clock)
    total = sum(terms.values())
    total.backward()

    assert not method.net.waiting
    n, label = len(batch.labeled.label), batch.labeled.label
    actual = {
        "loss_ce": cross_entropy(student[:n], label), "loss_dice": dice(student[:n].softmax(1), label),
        "loss_supervised": terms["supervised"], "loss_consistency": terms["entropy"] / watch["weight"],
        "loss_total": total,
    }
    assert actual.keys() == {name for name in data if name.startswith("loss_")}
    for name, value in actual.items():
        np.testing.assert_allclose(value.item(), data[name], RTOL, 0, err_msg=name)
    np.testing.assert_allclose(watch["weight"], data["consistency_weight"], 1e-9, 0)
    same_gradient(student.grad, data["grad_student_logits"])


def test_every_array_is_compared(data, every_array_is_in_one):
    """`test_step` has all losses, by name."""
    inputs = ("student_logits", "labels", "labeled_bs", "iter_num", "consistency", "consistency_rampup")
    every_array_is_in_one(data, ("loss_*", "consistency_weight", "grad_student_logits"), inputs)
