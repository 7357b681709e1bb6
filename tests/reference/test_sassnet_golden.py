"""Both turns of a step of SASSNet on stored heads and critic's logits against stored maps, terms and gradients."""

import numpy as np
import pytest
import torch
from reference.critics import Critic

from ssl4mis.distance import class_distances
from ssl4mis.losses import cross_entropy
from ssl4mis.method import Task
from ssl4mis.methods.sassnet import Config, SASSNet

RTOL = 1e-5
EVERY, TOTAL = 150, 6000  # the file counts the ramp in blocks of 150 steps; the run's length drops out


@pytest.fixture
def stored(golden, replay, stored_step):
    """The file, the method, logits and tanh that take a gradient, the critic's logits, batch and clock.

    The authors' one channel z is the softmax of (0, z), and their tanh a head's map that float64 gives back exactly.
    """
    data = golden("sassnet")
    logits, batch, clock = stored_step(data, TOTAL)
    tanh = torch.tensor(data["student_tanh"], dtype=torch.float64, requires_grad=True)
    judged = [torch.tensor(data[f"discriminator_logits_{which}"], requires_grad=True) for which in ("unlabeled", "all")]
    hp = Config(sdf=float(data["beta"]), weight=float(data["consistency"]), ramp_every=EVERY,
                ramp=float(data["consistency_rampup"]) * EVERY / TOTAL, compat="legacy")
    method = SASSNet(replay, Task(2, logits.ndim - 2), hp)
    heads = {"seg": torch.cat([torch.zeros_like(logits), logits], 1), "sdf": tanh.atanh()}
    method.net.waiting = [heads, {name: head.detach() for name, head in heads.items()}]
    method.critic = Critic(*judged)
    return data, method, (logits, tanh), judged, batch, clock


def test_true_distance(stored):
    data, method, _, _, batch, _ = stored
    true = class_distances(batch.labeled.label, method.task.classes, method.hp.compat)
    np.testing.assert_allclose(true[:, 0], data["sdf_ground_truth"], RTOL, 1e-6)


def test_segmenter(stored, same_gradient):
    data, method, (logits, tanh), (judged, _), batch, clock = stored
    terms, watch = method(batch, clock)
    total = sum(terms.values())
    total.backward()

    n, z = len(batch.labeled.label), logits.detach()
    actual = {
        "loss_sdf": terms["sdf"] / method.hp.sdf, "loss_dice": terms["supervised"],
        "loss_ce": cross_entropy(torch.cat([torch.zeros_like(z), z], 1)[:n], batch.labeled.label),
        "loss_supervised": terms["supervised"] + terms["sdf"],
        "loss_adversarial": terms["adversarial"] / watch["weight"], "loss_total": total,
    }
    for name, value in actual.items():
        np.testing.assert_allclose(value.item(), data[name], RTOL, 0, err_msg=name)
    np.testing.assert_allclose(watch["weight"], data["consistency_weight"], 1e-9, 0)
    same_gradient(logits.grad, data["grad_student_logits"])
    same_gradient(tanh.grad, data["grad_student_tanh"])
    same_gradient(judged.grad, data["grad_discriminator_logits_unlabeled"])


def test_critic(stored, same_gradient):
    data, method, _, (_, judged), batch, clock = stored
    method(batch, clock)
    terms, _ = method(batch, clock._replace(phase="criticize"))
    sum(terms.values()).backward()

    np.testing.assert_allclose(terms["critic"].item(), data["loss_discriminator"], RTOL)
    same_gradient(judged.grad, data["grad_discriminator_logits_all"])


def test_what_the_critic_sees(stored):
    """First the unlabeled images without its dropout, then all with it."""
    data, method, _, _, batch, clock = stored
    for phase in ("segment", "criticize"):
        method(batch, clock._replace(phase=phase))
    assert not method.net.waiting and not method.critic.waiting
    (first, image, training), (again, images, later) = method.critic.seen
    n, tanh = len(batch.labeled.image), data["student_tanh"]
    np.testing.assert_allclose(first.detach(), tanh[n:], 0, 1e-9)
    np.testing.assert_allclose(again, tanh, 0, 1e-9)
    assert torch.equal(image, batch.unlabeled.image) and torch.equal(images, batch.image)
    assert (training, later) == (False, True) and first.requires_grad


def test_every_array_is_compared(golden, every_array_is_in_one):
    inputs = ("student_*", "labels", "discriminator_logits_*", "labeled_bs", "iter_num", "beta", "consistency",
              "consistency_rampup")
    compared = ("loss_*", "consistency_weight", "grad_*", "sdf_ground_truth")
    every_array_is_in_one(golden("sassnet"), inputs, compared)
