"""One step of UA-MT on stored logits against stored uncertainty, mask, terms and gradients."""

import numpy as np
import pytest
import torch

from ssl4mis.losses import cross_entropy, dice
from ssl4mis.method import Task
from ssl4mis.methods.ua_mt import UAMT, Config

RTOL, ATOL = 1e-5, 2e-6
EVERY = 150  # the files count the ramp in blocks of 150 steps
FILES = {
    "ua_mt_binary": {"dice": "foreground"},
    "ua_mt_binary_ssl4mis": {"dice": "all"},
    "ua_mt_multiclass": {"dice": "all", "compat": "legacy"},
}


@pytest.fixture(params=FILES)
def stored(request, golden, replay, stored_step):
    """The file, the method with its hyper-parameters, student logits, batch, clock and the noisy teacher passes."""
    data = golden(request.param)
    total, passes = int(data["max_iterations"]), torch.tensor(data["mc_logits"])
    student, batch, clock = stored_step(data, total)
    hp = Config(weight=float(data["consistency"]), ramp=float(data["consistency_rampup"]) * EVERY / total,
                ramp_every=EVERY, passes=len(passes), **FILES[request.param])
    method = UAMT(replay, Task(student.shape[1], student.ndim - 2), hp)
    pairs = [pair.flatten(0, 1) for pair in passes.unflatten(0, (-1, 2))]  # two passes share a forward pass
    return data, method, student, batch, clock, pairs


def test_uncertainty_and_mask(stored):
    data, method, student, batch, clock, pairs = stored
    method.student.waiting = [student]
    method.teacher.net.waiting = [torch.tensor(data["teacher_logits"]), *pairs]
    threshold = method(batch, clock).watch["threshold"]
    method.teacher.net.waiting = list(pairs)
    uncertainty = method.uncertainty(batch.unlabeled.image)
    np.testing.assert_allclose(uncertainty, data["uncertainty"], RTOL, ATOL)
    np.testing.assert_allclose(threshold, data["threshold"], 1e-9, 0)
    np.testing.assert_array_equal(uncertainty < threshold, data["mask"])


def test_step(stored, same_gradient):
    data, method, student, batch, clock, pairs = stored
    method.student.waiting = [student]
    method.teacher.net.waiting = [torch.tensor(data["teacher_logits"]), *pairs]

    terms, watch = method(batch, clock)
    total = sum(terms.values())
    total.backward()

    assert not method.student.waiting and not method.teacher.net.waiting
    n, label = len(batch.labeled.label), batch.labeled.label
    actual = {
        "mask_ratio": watch["certain"], "loss_ce": cross_entropy(student[:n], label),
        "loss_dice": dice(student[:n].softmax(1), label, method.hp.dice), "loss_supervised": terms["supervised"],
        "loss_consistency": terms["consistency"] / watch["weight"], "loss_total": total,
    }
    for name, value in actual.items():
        np.testing.assert_allclose(value.item(), data[name], RTOL, 0, err_msg=name)
    np.testing.assert_allclose(watch["weight"], data["consistency_weight"], 1e-9, 0)
    same_gradient(student.grad, data["grad_student_logits"])
