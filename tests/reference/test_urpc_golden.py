"""One step of URPC on stored logits of several scales against stored divergences, terms and gradients."""

import numpy as np
import pytest
import torch

from ssl4mis.losses import cross_entropy, dice
from ssl4mis.method import Task
from ssl4mis.methods.urpc import URPC, Config, consistency, disagreement

RTOL, ATOL = 1e-5, 2e-6
EVERY, TOTAL = 150, 30000  # the file counts the ramp in blocks of 150 steps; the run's length drops out


@pytest.fixture
def stored(golden, replay, stored_step):
    """The file, the method, the logits of all scales, batch and clock."""
    data = golden("urpc")
    finest, batch, clock = stored_step(data, TOTAL, "student_logits_1")
    count = sum(name.startswith("student_logits_") for name in data)
    coarse = [torch.tensor(data[f"student_logits_{scale}"], requires_grad=True) for scale in range(2, count + 1)]
    hp = Config(weight=float(data["consistency"]), ramp=float(data["consistency_rampup"]) * EVERY / TOTAL,
                ramp_every=EVERY, scales=count)
    method = URPC(replay, Task(finest.shape[1], finest.ndim - 2), hp)
    return data, method, [finest, *coarse], batch, clock


def test_divergence_and_consistency_of_each_scale(stored):
    data, _, maps, batch, _ = stored
    unlabeled = [logits[len(batch.labeled.label):].detach() for logits in maps]
    _, _, divergence = disagreement(unlabeled)
    for scale, (mine, loss) in enumerate(zip(divergence, consistency(unlabeled), strict=True), 1):
        np.testing.assert_allclose(mine[:, None], data[f"kl_map_{scale}"], RTOL, ATOL, err_msg=f"scale {scale}")
        np.testing.assert_allclose(loss, data[f"loss_consistency_{scale}"], RTOL, 0, err_msg=f"scale {scale}")


def test_step(stored, same_gradient):
    data, method, maps, batch, clock = stored
    method.net.waiting = [{"seg" if level == 0 else f"seg{level}": logits for level, logits in enumerate(maps)}]

    terms, watch = method(batch, clock)
    total = sum(terms.values())
    total.backward()

    assert not method.net.waiting
    n, label = len(batch.labeled.label), batch.labeled.label
    actual = {"loss_supervised": terms["supervised"], "loss_consistency": terms["consistency"] / watch["weight"],
              "loss_total": total}
    for scale, logits in enumerate(maps, 1):
        actual[f"loss_ce_{scale}"] = cross_entropy(logits[:n], label)
        actual[f"loss_dice_{scale}"] = dice(logits[:n].softmax(1), label)
    for name, value in actual.items():
        np.testing.assert_allclose(value.item(), data[name], RTOL, 0, err_msg=name)
    np.testing.assert_allclose(watch["weight"], data["consistency_weight"], 1e-9, 0)
    for scale, logits in enumerate(maps, 1):
        same_gradient(logits.grad, data[f"grad_student_logits_{scale}"], f"scale {scale}")
