"""One step of R-Drop, as released, on stored logits of two networks against stored terms and gradients."""

import numpy as np
import pytest

from ssl4mis.method import Task
from ssl4mis.methods.r_drop import Config, RDrop

RTOL, ATOL = 1e-5, 2e-6
EVERY, TOTAL = 150, 30000  # the file counts the ramp in blocks of 150 steps; the run's length drops out


@pytest.fixture
def data(golden):
    return golden("r_drop")


def test_step(data, replay, stored_step, same_gradient):
    first, batch, clock = stored_step(data, TOTAL, "student_logits_1")
    second, _, _ = stored_step(data, TOTAL, "student_logits_2")
    hp = Config(weight=float(data["consistency"]), ramp=float(data["consistency_rampup"]) * EVERY / TOTAL,
                ramp_every=EVERY, networks="two", axis="last")
    method = RDrop(replay, Task(first.shape[1], first.ndim - 2), hp)
    method.first.waiting, method.second.waiting = [first], [second]

    terms, watch = method(batch, clock)
    total = sum(terms.values())
    total.backward()

    assert not method.first.waiting and not method.second.waiting
    actual = {
        "loss_supervised_1": terms["supervised/first"], "loss_supervised_2": terms["supervised/second"],
        "loss_consistency": terms["consistency"] / watch["weight"], "loss_total": total,
    }
    assert actual.keys() == {name for name in data if name.startswith("loss_")}
    for name, value in actual.items():
        np.testing.assert_allclose(value.item(), data[name], RTOL, ATOL, err_msg=name)
    np.testing.assert_allclose(watch["weight"], data["consistency_weight"], 1e-9, 0)
    for index, logits in enumerate((first, second), 1):
        same_gradient(logits.grad, data[f"grad_student_logits_{index}"], f"network {index}")


def test_every_array_is_compared(data, every_array_is_in_one):
    """`test_step` has all losses, by name."""
    inputs = ("student_logits_[12]", "labels", "labeled_bs", "iter_num", "consistency", "consistency_rampup")
    every_array_is_in_one(data, ("loss_*", "consistency_weight", "grad_student_logits_[12]"), inputs)
