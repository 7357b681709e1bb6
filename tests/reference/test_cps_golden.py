"""One step of CPS on stored logits of two networks against stored terms, pseudo labels and gradients."""

import numpy as np
import pytest
import torch

from ssl4mis.method import Task
from ssl4mis.methods.cps import CPS, Config

RTOL = 1e-5
EVERY, TOTAL = 150, 30000  # the file counts the ramp in blocks of 150 steps; the run's length drops out


@pytest.fixture
def step(golden, replay, stored_step):
    """The file, the logits of both networks, the number of labeled samples, and the losses of the step."""
    data = golden("cps")
    first, batch, clock = stored_step(data, TOTAL, "student_logits_1")
    second = torch.tensor(data["student_logits_2"], requires_grad=True)
    hp = Config(weight=float(data["consistency"]), ramp=float(data["consistency_rampup"]) * EVERY / TOTAL,
                ramp_every=EVERY)
    method = CPS(replay, Task(first.shape[1], first.ndim - 2), hp)
    method.first.waiting, method.second.waiting = [first], [second]
    losses = method(batch, clock)
    assert not method.first.waiting and not method.second.waiting
    return data, first, second, len(batch.labeled.label), losses


def test_step(step, same_gradient):
    data, first, second, _, (terms, watch) = step
    total = sum(terms.values())
    total.backward()

    actual = {
        "loss_supervised_1": terms["supervised/first"], "loss_supervised_2": terms["supervised/second"],
        "loss_pseudo_1": terms["cross/first"] / watch["weight"],
        "loss_pseudo_2": terms["cross/second"] / watch["weight"],
        "loss_1": terms["supervised/first"] + terms["cross/first"],
        "loss_2": terms["supervised/second"] + terms["cross/second"], "loss_total": total,
    }
    for name, value in actual.items():
        np.testing.assert_allclose(value.item(), data[name], RTOL, 0, err_msg=name)
    np.testing.assert_allclose(watch["weight"], data["consistency_weight"], 1e-9, 0)
    for index, logits in enumerate((first, second), 1):
        same_gradient(logits.grad, data[f"grad_student_logits_{index}"], f"network {index}")


def test_pseudo_labels(step):
    """Cross-entropy raises the logit of the target class and lowers all others: the gradient tells the target."""
    data, first, second, n, (terms, _) = step
    for student, name, teacher in ((first, "first", 2), (second, "second", 1)):
        [gradient] = torch.autograd.grad(terms[f"cross/{name}"], student, retain_graph=True)
        np.testing.assert_array_equal(gradient[n:].argmin(1), data[f"pseudo_labels_{teacher}"], f"network {teacher}")
        assert not gradient[:n].any(), "labeled images are in the cross term"
