"""One step of DCT's released form on stored logits of straight and turned images against stored terms and gradients."""

import numpy as np
import pytest
import torch

from ssl4mis.batch import Batch
from ssl4mis.losses import cross_entropy, dice
from ssl4mis.method import Task
from ssl4mis.methods.dct import DCT, Config

RTOL, ATOL = 1e-5, 2e-6
EVERY, TOTAL = 150, 30000  # the file counts the ramp in blocks of 150 steps; the run's length drops out


class Stored(DCT):
    """Turns as the file does, which has no square plane."""

    def turns(self, space):
        return self.drawn


@pytest.fixture
def data(golden):
    return golden("dct")


def test_step(data, replay, stored_step, same_gradient):
    straight, stored, clock = stored_step(data, TOTAL)
    turned, n = torch.tensor(data["student_logits_rotated"], requires_grad=True), len(stored.labeled.label)
    image = torch.tensor(data["images"])
    batch = Batch(image, stored.labeled._replace(image=image[:n]), stored.unlabeled._replace(image=image[n:]))
    hp = Config(weight=float(data["consistency"]), ramp=float(data["consistency_rampup"]) * EVERY / TOTAL,
                ramp_every=EVERY, views="rotations")
    method = Stored(replay, Task(straight.shape[1], straight.ndim - 2), hp)
    method.drawn, method.first.waiting = int(data["rotation_k"]), [straight, turned]

    terms, watch = method(batch, clock)
    total = sum(terms.values())
    total.backward()

    assert not method.first.waiting
    assert torch.equal(method.first.seen[0], image)
    np.testing.assert_array_equal(method.first.seen[1], data["rotated_images"])
    label = batch.labeled.label
    actual = {
        "loss_ce": cross_entropy(straight[:n], label), "loss_dice": dice(straight[:n].softmax(1), label),
        "loss_supervised": terms["supervised"], "loss_consistency": terms["agreement"] / watch["weight"],
        "loss_total": total,
    }
    assert actual.keys() == {name for name in data if name.startswith("loss_")}
    for name, value in actual.items():
        np.testing.assert_allclose(value.item(), data[name], RTOL, ATOL, err_msg=name)
    np.testing.assert_allclose(watch["weight"], data["consistency_weight"], 1e-9, 0)
    same_gradient(straight.grad, data["grad_student_logits"], "straight")
    same_gradient(turned.grad, data["grad_student_logits_rotated"], "turned")


def test_every_array_is_compared(data, every_array_is_in_one):
    """`test_step` has all losses, by name."""
    inputs = ("images", "student_logits", "student_logits_rotated", "labels", "rotation_k", "labeled_bs", "iter_num",
              "consistency", "consistency_rampup")
    step = ("loss_*", "rotated_images", "consistency_weight", "grad_student_logits", "grad_student_logits_rotated")
    every_array_is_in_one(data, step, inputs)
